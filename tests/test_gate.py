"""Dynamic gates: exact at r = 1, conv * mask by hand, expected MACs on inputs not seen, static top-k frequency."""

from __future__ import annotations

from typing import Any

import foldline as fl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foldline import passes as P
from foldline.graph.errors import ConfigError, ConstraintError
from foldline.graph.execute import run_graph
from foldline.passes.prune.gate import TopKFrequency, expected_macs, gates_of, top_k
from support.frontends import exported
from support.toys_base import fill
from torch import Tensor, nn

FRONTS = ("fx", "onnx")


class Small(nn.Module):
    """Two convolutions, their norms, a head. (An exporter folds the norms.)"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.b, self.nb = nn.Conv2d(12, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.na(self.a(x)))
        x = F.relu(self.nb(self.b(x)))
        return self.head(x.mean((2, 3)))


def small() -> tuple[Small, tuple[Tensor, ...]]:
    model = fill(Small())
    return model, (inputs(16, 0),)  # type: ignore[return-value]


def inputs(n: int, seed: int) -> Tensor:
    """Images whose channels and samples differ in strength, so that gates have something to tell apart."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=g) + 2 * torch.randn(n, 3, 1, 1, generator=g)


def given(front: str) -> tuple[Any, Small, tuple[Tensor, ...]]:
    model, x = small()
    return (model if front == "fx" else exported(model, x)), model, x


@pytest.mark.parametrize("front", FRONTS)
def test_all_filters_at_r_one_and_before_the_heads_know_anything(front: str) -> None:
    model, torch_model, x = given(front)
    wanted = torch_model(*x).detach().numpy()
    fitted = P.insert_dynamic_channel_gate(model, x, r=1.0, calibration=[x])
    assert np.array_equal(
        run_graph(fitted.graph, fitted.graph.bind(x))[0][0],
        run_graph(fl.load(model, x), fl.load(model, x).bind(x))[0][0],
    )
    assert fitted.report.passes[0].contract == "exact"
    blank = P.insert_dynamic_channel_gate(model, x, r=0.5)
    assert np.allclose(run_graph(blank.graph, blank.graph.bind(x))[0][0], wanted, atol=1e-5)


@pytest.mark.parametrize("front", FRONTS)
def test_a_gated_convolution_is_the_convolution_times_its_mask(front: str) -> None:
    model, torch_model, x = given(front)
    result = P.insert_dynamic_channel_gate(model, x, r=0.7, calibration=[x], layers=["b"])
    (gate,) = gates_of(result.graph)
    conv, mask = gate
    product = next(u for u, _ in conv.output.uses if u.op == "mul")
    taps = [conv.output.name, mask.name, product.output.name, conv.inputs[0].name, "gate_0_mass"]
    _, seen = run_graph(result.graph, result.graph.bind(x), taps)
    y, m, gated, before, mass = (seen[t] for t in taps)
    assert np.array_equal(gated, y * m[:, :, None, None]) and 0 < m.mean() < 1
    # The head by hand, and the fewest filters that reach 0.7 of the mass.
    w, b = (result.graph.weight(n).numpy() for n in ("gate_0_weight", "gate_0_bias"))
    assert np.allclose(mass, 1 / (1 + np.exp(-(before.mean((2, 3)) @ w + b))), atol=1e-5)
    assert np.array_equal(m.astype(bool), top_k(mass.astype(np.float64), 0.7))
    if front == "fx":
        assert torch.allclose(result.model(*x), torch.as_tensor(run_graph(result.graph, result.graph.bind(x))[0][0]))


def test_top_k_is_the_least_number_that_reaches_the_share() -> None:
    mass = np.array([[0.1, 0.5, 0.2, 0.2], [1.0, 1.0, 1.0, 1.0], [0.9, 0.05, 0.03, 0.02]])
    assert top_k(mass, 0.5).tolist() == [[False, True, False, False], [True] * 4, [True, False, False, False]]
    assert top_k(mass, 0.6)[0].tolist() == [False, True, True, True]  # the two equal ones come together
    rng = np.random.default_rng(0)
    for row in rng.random((20, 9)):
        chosen = top_k(row[None], 0.8)[0]
        k = int(chosen.sum())
        best = np.sort(row)[::-1]
        assert best[:k].sum() >= 0.8 * row.sum() > best[: k - 1].sum()
        assert row[chosen].min() > row[~chosen].max()


@pytest.mark.parametrize("front", FRONTS)
def test_expected_macs_hold_on_inputs_not_seen(front: str) -> None:
    model, torch_model, x = given(front)
    result = P.insert_dynamic_channel_gate(model, x, r=0.7, calibration=[(inputs(16, s),) for s in range(12)])
    details = result.report.passes[0].details
    fresh = [(inputs(16, s),) for s in range(100, 112)]
    # By hand: every kept filter of every sample costs its window, and each head its matrix.
    total, samples = 0.0, 0
    gates = gates_of(result.graph)
    for batch in fresh:
        _, seen = run_graph(result.graph, result.graph.bind(batch), [mask.name for _, mask in gates])
        for (_, mask), inner in zip(gates, (3, 12), strict=True):
            total += float(seen[mask.name].sum()) * inner * 9 * 64
        samples += 16
    heads = 3 * 12 + 12 * 10
    by_hand = total / samples + heads + 10 * 4
    assert details["expected_macs"] == pytest.approx(by_hand, rel=0.02)
    assert expected_macs(result.graph, fresh).macs == pytest.approx(by_hand, rel=1e-3)
    assert details["static_macs"] == pytest.approx(fl.cost(fl.load(model, x)).macs, rel=1e-3)
    assert details["expected_macs"] < 0.9 * details["static_macs"]


@pytest.mark.parametrize("front", FRONTS)
def test_fitted_gates_lose_less_than_random_ones(front: str) -> None:
    model, torch_model, x = given(front)
    calibration = [(inputs(16, s),) for s in range(12)]
    result = P.insert_dynamic_channel_gate(model, x, r=0.85, calibration=calibration)
    unseen = (inputs(16, 50),)
    wanted = torch_model(*unseen).detach().numpy()
    error = np.linalg.norm(run_graph(result.graph, result.graph.bind(unseen))[0][0] - wanted)
    graph = result.graph.clone()
    rng = np.random.default_rng(0)
    for i in (0, 1):  # the same masses, dealt out to other filters
        order = rng.permutation(graph.weight(f"gate_{i}_bias").shape[0])
        for name, axis in (("weight", 1), ("bias", 0)):
            w = graph.weight(f"gate_{i}_{name}")
            graph.set_weight(w, np.ascontiguousarray(np.take(w.numpy(), order, axis)))
    dealt = np.linalg.norm(run_graph(graph, graph.bind(unseen))[0][0] - wanted)
    assert error < 0.7 * dealt


def test_top_k_frequency_counts_and_prunes() -> None:
    model, x = small()
    batches = [(inputs(16, s),) for s in range(3)]
    criterion = TopKFrequency(batches, r=0.6)
    groups = fl.axis_groups(fl.load(model, x))
    scores = criterion(groups["a.weight:0"], groups)
    with torch.no_grad():
        strength = torch.cat([F.relu(model.na(model.a(b[0]))).abs().mean((2, 3)) for b in batches]).double().numpy()
    assert np.allclose(scores, top_k(strength, 0.6).mean(0), atol=2e-3)
    result = P.prune(model, x, criterion=criterion, ratio=0.5)
    kept = result.plan.weights["a.weight"][0]
    assert set(kept) == set(np.argsort(-scores, kind="stable")[:6].tolist())
    rest = np.setdiff1d(np.arange(12), kept)
    assert scores[kept].min() >= scores[rest].max()


def test_gates_survive_saving_and_train() -> None:
    model, x = small()
    module = P.insert_dynamic_channel_gate(model, x, r=0.7, calibration=[x]).model
    again = fl.load(module, x)
    assert len(gates_of(again)) == 2
    names = dict(module.named_parameters())
    assert any(n.endswith("gate_0_weight") for n in names)
    module(*x).sum().backward()


def test_errors() -> None:
    model, x = small()
    with pytest.raises(ConstraintError, match="matches no convolution"):
        P.insert_dynamic_channel_gate(model, x, layers=["a", "nope"])
    with pytest.raises(ConstraintError, match="no convolution to gate|matches no convolution"):
        P.insert_dynamic_channel_gate(nn.Linear(3, 4), (torch.randn(2, 3),))
    with pytest.raises(ConfigError, match="r"):
        P.insert_dynamic_channel_gate(model, x, r=0)
    with pytest.raises(ConstraintError, match="empty"):
        P.insert_dynamic_channel_gate(model, x, calibration=[])
    with pytest.raises(ConfigError, match="out of range"):
        TopKFrequency([x], r=1.5)
    with pytest.raises(ConstraintError, match="no gates"):
        expected_macs(fl.load(model, x), [x])
