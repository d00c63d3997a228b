"""Reinitialize: same graph and shapes, seeds, which rule each weight got; inherited weights against scratch."""

from __future__ import annotations

from typing import Any

import foldline as fl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foldline import passes as P
from foldline.graph.errors import ConfigError, ConstraintError
from foldline.passes.prune.reinitialize import by_role, compare_with_scratch
from support.frontends import exported, toy_graph
from support.toys import toy
from torch import Tensor, nn


def arrays(result: Any) -> dict[str, bytes]:
    return {n: w.numpy().tobytes() for n, w in result.graph.weights.items()}


@pytest.mark.parametrize("front", ["fx", "onnx"])
@pytest.mark.parametrize("name", ["residual_cnn", "grouped_query_rope", "lstm"])
def test_same_graph_and_shapes_other_weights(front: str, name: str) -> None:
    model, x = toy(name)
    given = model if front == "fx" else exported(model, x)
    start = fl.load(given, x)
    a, b, again = (P.reinitialize(given, x, seed=s) for s in (1, 2, 1))
    assert [(n.op, n.name) for n in a.graph] == [(n.op, n.name) for n in start]
    assert {n: w.shape for n, w in a.graph.weights.items()} == {n: w.shape for n, w in start.weights.items()}
    assert arrays(a) == arrays(again) and arrays(a) != arrays(b)
    rules = {d.subject: d.reason for d in a.report.passes[0].decisions}
    for n, w in start.weights.items():
        if w.kind == "parameter" and len(w.shape) > 1 and not rules[n].startswith(("a table", "not learned")):
            assert not np.array_equal(w.numpy(), a.graph.weights[n].numpy()), n
    outputs, _ = a.graph.run(a.graph.bind(x), [])
    assert all(np.isfinite(np.asarray(o)).all() for o in outputs)


def test_modules_reset_themselves_and_the_rest_goes_by_role() -> None:
    model, x = toy("vision_transformer")
    result = P.reinitialize(model, x)
    rules = {d.subject: d.reason for d in result.report.passes[0].decisions}
    assert rules["patch.weight"] == "reset_parameters of Conv2d"
    assert rules["norm.bias"] == "reset_parameters of LayerNorm"
    assert type(result.model) is type(model)
    assert (result.model.norm.weight == 1).all() and (result.model.norm.bias == 0).all()
    bound = 24**-0.5  # what nn.Linear draws from
    assert 0.9 * bound < result.model.attn[0].qkv.weight.abs().max() <= bound
    rolled = P.reinitialize(model, x, by="roles").model
    assert rolled.attn[0].qkv.weight.std().item() == pytest.approx((2 / 24) ** 0.5, rel=0.1)


def test_pruned_sizes_are_what_the_fan_in_counts() -> None:
    model, x = toy("residual_cnn")
    pruned = P.prune(model, x, ratio=0.5)
    fresh = P.reinitialize(pruned.model, x)
    assert {n: t.shape for n, t in fresh.model.state_dict().items()} == {
        n: t.shape for n, t in pruned.model.state_dict().items()
    }
    assert (fresh.model.stem[1].running_var == 1).all() and (fresh.model.stem[1].running_mean == 0).all()


def test_roles_of_a_cnn() -> None:
    graph = toy_graph("residual_cnn", "fx")
    data = {n: by_role(w, 0) for n, w in graph.weights.items()}
    assert (data["stem.1.weight"][0] == 1).all() and (data["stem.1.bias"][0] == 0).all()
    assert (data["stem.1.running_mean"][0] == 0).all() and (data["stem.1.running_var"][0] == 1).all()
    conv, rule = data["b2.0.weight"]
    assert rule == "normal, variance 2 / fan-in" and conv.std() == pytest.approx((2 / 90) ** 0.5, rel=0.1)
    assert (data["head.2.bias"][0] == 0).all()


def test_own_initialisation_and_ignore() -> None:
    model, x = toy("residual_cnn")

    def init(module: nn.Module) -> None:
        for p in module.parameters():
            nn.init.constant_(p, 0.25)

    result = P.reinitialize(model, x, init=init, ignore=["head.*"])
    assert (result.model.stem[0].weight == 0.25).all()
    assert torch.equal(result.model.head[2].weight, model.head[2].weight)
    onnx = P.reinitialize(exported(model, x), x, init=init)
    assert all((w.numpy() == 0.25).all() for w in onnx.graph.weights.values() if w.kind == "parameter")


def test_errors() -> None:
    model, x = toy("residual_cnn")
    with pytest.raises(ConstraintError, match="matches nothing"):
        P.reinitialize(model, x, ignore=["nope"])
    with pytest.raises(ConstraintError, match="nothing was reinitialized"):
        P.reinitialize(model, x, ignore=["*"])
    with pytest.raises(ConfigError, match="cannot be found"):
        P.reinitialize(model, x, init="no_such_module:init")

    class Odd(nn.Linear):
        def reset_parameters(self) -> None:
            if hasattr(self, "ready"):
                raise RuntimeError("only once")
            super().reset_parameters()
            self.ready = True

    with pytest.raises(ConstraintError, match="only once"):
        P.reinitialize(nn.Sequential(Odd(3, 4)), (torch.randn(2, 3),))


def digits() -> tuple[Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    found = datasets.load_digits()
    return torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target)


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_inherited_against_scratch_on_digits(front: str) -> None:
    """F1-05: VGG-small, 40 % by L1; the table prints both, and no winner is asserted."""
    images, labels = digits()
    train_set, test_set = slice(0, 1200), slice(1200, None)
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in ((1, 16), (16, 16), (16, 32)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
    model = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 16, 10))

    def train(module: nn.Module, epochs: int = 2) -> None:
        module.train()
        optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
        for _ in range(epochs):
            for i in torch.randperm(1200).split(64):
                optimizer.zero_grad()
                F.cross_entropy(module(images[i]), labels[i]).backward()
                optimizer.step()

    @torch.no_grad()
    def evaluate(module: nn.Module) -> float:
        module.eval()
        return (module(images[test_set]).argmax(1) == labels[test_set]).float().mean().item()

    train(model, 3)
    x = (images[train_set][:64],)
    model.eval()
    given = model
    if front == "onnx":
        batch = torch.export.Dim("batch")
        program = torch.onnx.export(model, x, dynamo=True, verbose=False, dynamic_shapes=({0: batch},))
        given = program.model_proto
    result = P.prune(given, x, criterion="l1", ratio=0.4)
    before = arrays(result)
    table = compare_with_scratch(result, train, evaluate)
    assert [r.start for r in table.rows] == ["inherited", "scratch"]
    assert table["inherited"].before > table["scratch"].before  # ten classes: fresh weights know nothing yet
    assert table["scratch"].before < 0.4 and min(r.after for r in table.rows) > 0.8
    assert "inherited" in str(table) and "scratch" in str(table) and str(table).count("\n") == 2
    assert arrays(result) == before
