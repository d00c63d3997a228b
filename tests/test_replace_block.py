"""ReplaceBlock: a linear map in the place of blocks: exact where they are linear, better than dropping, composable."""

from __future__ import annotations

import foldline as fl
import numpy as np
import pytest
import torch
from foldline import passes as P
from foldline.graph.errors import ConstraintError
from foldline.graph.execute import run_graph
from foldline.graph.ir import Graph
from foldline.passes.base import Context
from foldline.passes.prune.blocks import residual_blocks
from support import trained_language as language
from support.frontends import FRONT_ENDS, load, toy_graph
from support.resnet_cifar import ResNetCifar
from torch import nn


class Stream(nn.Module):
    """Four branches on a stream; those in ``planted`` are linear whatever is in between."""

    def __init__(self, planted: tuple[int, ...]) -> None:
        super().__init__()
        self.planted = planted
        self.up = nn.ModuleList([nn.Linear(12, 20) for _ in range(4)])
        self.down = nn.ModuleList([nn.Linear(20, 12) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            y = up(x)
            x = x + down(y if i in self.planted else torch.relu(y))
        return x


def stream(front: str, planted: tuple[int, ...] = ()) -> tuple[Graph, list[tuple[torch.Tensor, ...]]]:
    torch.manual_seed(0)
    x = (torch.randn(6, 5, 12),)
    return load(Stream(planted).eval(), x, front), [(torch.randn(6, 5, 12),) for _ in range(4)]


def outputs(graph: Graph, batch: object) -> np.ndarray:
    return run_graph(graph, graph.bind(batch))[0][0]


def off(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_planted_linear_blocks_become_one_product_exactly(front: str) -> None:
    graph, batches = stream(front, planted=(1, 2))
    after = graph.clone()
    outcome = P.ReplaceBlock(first=1, last=2, unit="block").apply(after, Context(calibration=batches))
    fresh = (torch.randn(6, 5, 12, generator=torch.Generator().manual_seed(7)),)
    assert off(outputs(after, fresh), outputs(graph, fresh)) < 1e-5
    assert len(residual_blocks(after)) == 2 and sum(len(w.shape) == 2 for w in after.weights.values()) == 5
    assert outcome.details["error"] < 1e-10 < outcome.details["error_dropped"]


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_the_map_is_the_least_squares_one(front: str) -> None:
    graph, batches = stream(front)
    block = residual_blocks(graph)[2]
    names = [block.start.name, block.stop.name]
    taps = [run_graph(graph, graph.bind(b), names)[1] for b in batches]
    x, y = (np.concatenate([t[n].reshape(-1, 12) for t in taps]).astype(np.float64) for n in names)
    wanted = np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=None)[0]
    after = graph.clone()
    P.ReplaceBlock(first=2, unit="block", ridge=0.0).apply(after, Context(calibration=batches))
    matrix, bias = (after.weight(f"{block.name}_linear.{part}").numpy() for part in ("weight", "bias"))
    np.testing.assert_allclose(matrix, wanted[:-1].T, atol=1e-5)
    np.testing.assert_allclose(bias, wanted[-1], atol=1e-5)


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_adjacent_maps_fold_into_one(front: str) -> None:
    graph, batches = stream(front)
    ctx = Context(calibration=batches)
    for _ in range(2):  # the first is gone after the first round
        P.ReplaceBlock(first=1, unit="block").apply(graph, ctx)
    merged = fl.Pipeline([P.Fold()]).run(graph, batches[0]).graph
    assert off(outputs(merged, batches[1]), outputs(graph, batches[1])) < 1e-5
    count = [sum(len(w.shape) == 2 for w in g.weights.values()) for g in (graph, merged)]
    assert count == [6, 5]


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_feature_maps_get_a_pointwise_convolution(front: str) -> None:
    torch.manual_seed(0)
    x = (torch.randn(4, 3, 16, 16),)
    graph = load(ResNetCifar(2).eval(), x, front)
    after = graph.clone()
    outcome = P.ReplaceBlock(first=1, unit="block").apply(after, Context(calibration=[x]))
    made = next(n for n in after.nodes if n.name.endswith("_linear"))
    assert made.op == "conv" and made.inputs[1].hint == (16, 16, 1, 1)
    assert outcome.details["error"] < outcome.details["error_dropped"]
    assert fl.cost(after).macs < fl.cost(graph).macs


def test_what_is_no_run_is_refused() -> None:
    graph, batches = stream("fx")
    with pytest.raises(ConstraintError, match="no such run"):
        P.ReplaceBlock(first=3, last=4, unit="block").apply(graph, Context(calibration=batches))
    with pytest.raises(ConstraintError, match="no such run"):
        P.ReplaceBlock(first=0).apply(toy_graph("norm_mlp", "fx"), Context(calibration=batches))
    with pytest.raises(ConstraintError, match="empty"):
        P.ReplaceBlock(first=0, unit="block").apply(graph, Context(calibration=[]))


@pytest.mark.slow
def test_a_language_model_loses_less_by_a_map_than_by_dropping() -> None:
    model, batches = language.trained("gpt2"), language.calibration(12, 16)
    found = {"whole": language.perplexity(model)}
    for name, step in {
        "dropped": P.DropBlocks(count=1, unit="layer", criterion=lambda b, g: float(b.name != middle(g))),
        "mapped": P.ReplaceBlock(first=1),
    }.items():
        graph = load(model, batches[0], "fx")
        step.apply(graph, Context(calibration=batches))
        found[name] = language.perplexity(graph.to_model())
    assert found["whole"] < found["mapped"] < found["dropped"]


def middle(graph: Graph) -> str:
    """The name of the second of the layers."""
    from foldline.passes.prune.blocks import Reach, layers

    reach = Reach(graph)
    return layers(graph, residual_blocks(graph, reach), reach)[1].name
