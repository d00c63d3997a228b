"""Maps learned through the whole network: the simulation is what will run, and what is learned holds after rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from foldline import passes as P
from foldline.graph.errors import ConstraintError
from foldline.graph.execute import batches_of, run_graph, synthesize_inputs
from foldline.graph.groups import axis_groups
from foldline.graph.ir import Graph
from foldline.graph.rotate import freedom, rotate
from foldline.graph.verify import compare
from foldline.passes.base import Context
from foldline.passes.transform.boundary import find_boundaries
from foldline.passes.transform.common import sites_of
from foldline.passes.transform.grids import Formats, formats_of
from foldline.passes.transform.hadamard import random_orthogonal
from foldline.passes.transform.learning import fake_quantize
from foldline.passes.transform.network import Network, turned
from support.frontends import FRONT_ENDS, load
from support.language_shapes import batches, language_graph
from torch import nn


def network(graph: Graph, formats: Formats) -> Network:
    return Network(graph, [s.boundary for s in sites_of(find_boundaries(graph), [])], formats)


def outputs(graph: Graph) -> np.ndarray:
    """The logits of all batches, one below the other."""
    made = [run_graph(graph, b)[0][0] for b in batches_of(graph, batches())]
    return np.concatenate([np.asarray(m).reshape(-1, m.shape[-1]) for m in made])


def rounded(graph: Graph, bits: int, ctx: Context | None = None) -> Graph:
    """A clone with weights of few bits; ``ctx``: of the passes before."""
    after = graph.clone()
    P.WeightOnly(bits=bits, block=0, symmetric=True, storage="packed").apply(after, ctx or Context())
    return after


def divergence(wanted: np.ndarray, made: np.ndarray) -> float:
    p, q = (torch.log_softmax(torch.from_numpy(m), -1) for m in (wanted, made))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(("shape", "front"), [("llama", "onnx"), ("gpt2", "fx")])
def test_the_simulated_network_is_the_one_that_the_rounding_pass_writes(shape: str, front: str) -> None:
    graph = language_graph(shape, front, layers=1)
    net = network(graph, formats_of(Context(), None, 3, 16, 20, symmetric=False))  # 20 divides neither 32 nor 48
    written = graph.clone()
    P.WeightOnly(bits=3, block=20, storage="packed").apply(written, Context())
    env = net.bind(batches())[0]
    with torch.no_grad():
        net.execute(range(net.length), env, {}, free=True)
    fed = next(iter(batches_of(graph, batches())))
    wanted = run_graph(written, fed)[0][0]
    plain = run_graph(graph, fed)[0][0]
    made = net.outputs(env)[0].numpy()
    assert np.abs(made - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert np.abs(made - plain).max() > 1e-2 * np.abs(plain).max()


@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_turned_weights_are_those_of_a_rotation(shape: str, front: str) -> None:
    graph = language_graph(shape, front, layers=1)
    P.Rotate(where=["query_key"]).apply(graph, Context())  # norms made ready
    groups = axis_groups(graph)
    rng = np.random.default_rng(0)
    chosen = {g: random_orthogonal(g.size, rng) for g in groups if g.size >= 4 and _free(groups, g)}
    assert {g.size for g in chosen} >= (
        {8} if (shape, front) == ("gpt2", "onnx") else {32, 8}
    )  # ONNX keeps layer norms
    made = turned(groups, {g.atom: torch.from_numpy(r).float() for g, r in chosen.items()})
    rotate(groups, chosen)
    assert made
    for weight, data in made.items():
        assert np.allclose(data.numpy(), weight.numpy(), atol=1e-5)


def _free(groups: Any, group: Any) -> bool:
    roles = {m.role for m in group.members}
    found = freedom(groups, group)
    return bool({"produces", "both"} & roles) and not found.reason and not found.ones and len(group.members) > 1


@pytest.mark.parametrize(("shape", "front"), [("llama", "fx"), ("gpt2", "onnx")])
def test_rotations_learned_by_the_outputs_beat_their_start_after_rounding(shape: str, front: str) -> None:
    graph = language_graph(shape, front, layers=1)
    options: dict[str, Any] = {"weight_bits": 3, "activation_bits": 16}
    step = P.Rotate(method="learned", objective="outputs", top=20, steps=48, rate=0.03, **options)
    learned, start = graph.clone(), graph.clone()
    outcome = step.apply(learned, Context(calibration=batches()))
    P.Rotate().apply(start, Context())
    assert compare(graph, learned, [synthesize_inputs(graph, 0)], rtol=1e-4).ok
    facts = outcome.details
    assert facts["divergence"] < 0.88 * facts["divergence_start"]
    wanted = outputs(graph)
    before, after = (divergence(wanted, outputs(rounded(g, 3))) for g in (start, learned))
    assert after < 0.9 * before
    assert len(learned.nodes) == len(start.nodes)


@pytest.mark.parametrize(("shape", "front"), [("llama", "fx"), ("gpt2", "onnx")])
def test_affine_maps_learned_by_the_blocks_output(shape: str, front: str) -> None:
    graph = language_graph(shape, front, layers=1)
    step = P.FlatTransform(objective="blocks", steps=24, rate=0.01, weight_bits=3, activation_bits=16)
    after, ctx = graph.clone(), Context(calibration=batches())
    outcome = step.apply(after, ctx)
    assert compare(graph, after, [synthesize_inputs(graph, 0)], rtol=1e-4).ok
    made = [d for d in outcome.decisions if d.action == "transformed"]
    assert made and all(d.data["of"] == "block" and d.data["error_after"] < d.data["error_before"] for d in made)
    errors = {d.data["error_after"] for d in made}
    assert len(errors) < len(made)  # the maps of a block share its error
    wanted = outputs(graph)
    final = rounded(after, 3, ctx)
    plain, mapped = (np.square(outputs(g) - wanted).sum() for g in (rounded(graph, 3), final))
    assert mapped < 0.9 * plain
    for name in (name for d in made for name in d.data["nodes"]):  # the two small products stay in float
        stored = [v.weight for v in final.node(name).inputs if v is not None and v.weight is not None]
        assert stored and stored[0].dtype == "float32"


def test_learning_by_the_outputs_sees_the_rotations_at_run_time() -> None:
    """What it reports for its start is what the network with them, rounded, diverges by."""
    graph = language_graph("llama", "fx", layers=1)
    options: dict[str, Any] = {"weight_bits": 3, "activation_bits": 16, "online": ["*down_proj"], "scale": False}
    made, ctx = graph.clone(), Context(calibration=batches())
    learned = P.Rotate(method="learned", objective="outputs", top=60, steps=1, rate=1e-9, **options)
    start = learned.apply(made, ctx).details["divergence_start"]
    assert any(n.op == "matmul" and "_rotation_" in n.name for n in made.nodes)
    found = divergence(outputs(graph), outputs(rounded(made, 3, ctx)))
    assert abs(found - start) < 0.02 * start


def test_a_network_without_logits_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(4, 8), nn.RMSNorm(8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.norm(self.a(x))).sum((0, 1))

    graph = load(Net().eval(), (torch.randn(6, 4),), "fx")
    with pytest.raises(ConstraintError, match="no logits"):
        step = P.Rotate(method="learned", objective="outputs", steps=1)
        step.apply(graph, Context(calibration=[torch.randn(6, 4)]))


def test_rounding_in_blocks_that_do_not_divide_a_row() -> None:
    from foldline.passes.quantize.formats import format_of

    w = np.random.default_rng(0).standard_normal((6, 50)).astype(np.float32)
    form = formats_of(Context(), None, 3, 16, 16, symmetric=False).weight
    wanted = format_of("int", bits=3, block=16).fit(w).decode()
    assert np.allclose(fake_quantize(torch.from_numpy(w), form, per_row=True).numpy(), wanted, atol=1e-6)
