"""Latency targets: the table of times per node, the correction by measurement, and ONNX Runtime's times traced back."""

from __future__ import annotations

from typing import Any

import foldline as fl
import numpy as np
import pytest
import torch
from foldline import passes as P
from foldline.backends.base import Backend, get
from foldline.graph.errors import BackendError, ConstraintError
from foldline.graph.groups import axis_groups
from foldline.graph.ir import Graph
from foldline.graph.ops.macs import macs
from foldline.passes import pipeline
from foldline.passes.prune.latency import LatencyTable
from support.frontends import FRONT_ENDS, exported, load
from support.resnet_cifar import ResNetCifar
from support.toys import toy
from torch import nn


def resnet(batch: int = 2) -> tuple[ResNetCifar, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    return ResNetCifar(2).eval(), (torch.randn(batch, 3, 32, 32),)


class Clock:
    """An artifact whose latency is computed: a constant, and per product a time that bends with its work."""

    def __init__(self, graph: Graph, constant: float) -> None:
        self.ms = constant + sum(spent(n) for n in graph.nodes)

    def benchmark(self, runs: int = 50, warmup: int = 10, against: Clock | None = None) -> dict[str, Any]:
        found: dict[str, Any] = {"median_ms": self.ms, "spread_ms": 0.0}
        if against is not None:
            found |= {"against": {"median_ms": against.ms}, "ratio": self.ms / against.ms, "ratio_spread": 0.0}
        return found


def spent(node: Any) -> float:
    return ((macs(node) or 0) / 1e6) ** 0.8


class Computed:
    """A backend without noise; its profiler overlooks ``constant`` and reads everything ``gain`` times too long."""

    name = "computed"
    spec = None
    gain = 1.7

    def __init__(self, constant: float) -> None:
        self.constant = constant
        self.lowered = 0

    def lower(self, graph: Graph, example_inputs: Any = None) -> Clock:
        self.lowered += 1
        return Clock(graph, self.constant)

    def node_times(self, graph: Graph, example_inputs: Any = None, *, artifact: Any = None) -> dict[str, float]:
        return {n.name: self.gain * spent(n) for n in graph.nodes if macs(n)}


def prune_on(
    backend: Computed, monkeypatch: pytest.MonkeyPatch, target: fl.Target, **options: Any
) -> tuple[Any, dict[str, Any]]:
    monkeypatch.setattr(pipeline, "backend", lambda name: backend)
    model, x = resnet()
    result = P.prune(model, x, target=target, backend="computed", **options)
    return result, result.report.passes[0].details


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_a_share_is_reached_and_confirmed(share: float, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result, details = prune_on(Computed(3.0), monkeypatch, fl.latency(share), scope=scope)
    before, after = Clock(fl.load(*resnet()), 3.0).ms, Clock(result.graph, 3.0).ms
    assert after / before == pytest.approx(share, rel=0.05)
    assert details["reached"] == pytest.approx(after / before)
    assert details["latency"] == {"before_ms": pytest.approx(before), "after_ms": pytest.approx(after)}
    facts = details["latency_target"]
    assert facts["table"]["entries"] >= 3 * facts["table"]["nodes"] > 0
    assert 1 <= len(facts["rounds"]) <= 6


def test_milliseconds_above_one_are_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Clock(fl.load(*resnet()), 3.0).ms
    result, _ = prune_on(Computed(3.0), monkeypatch, fl.latency(round(0.7 * before, 3)))
    assert Clock(result.graph, 3.0).ms == pytest.approx(0.7 * before, rel=0.05)


def test_what_no_width_can_reach_is_an_error_with_the_measured_least(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConstraintError, match="cannot be reached") as caught:
        prune_on(Computed(100.0), monkeypatch, fl.latency(0.3))
    assert "ms" in str(caught.value)


def test_a_coarse_grid_is_reported_as_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    result, details = prune_on(Computed(0.0), monkeypatch, fl.latency(0.7), round_to=16)
    missed = [d for d in result.report.passes[0].decisions if d.action == "missed"]
    assert bool(missed) == (abs(details["reached"] / 0.7 - 1) > 0.05)


def test_the_table_gives_back_what_was_measured_and_never_falls_with_width() -> None:
    groups = axis_groups(fl.load(*resnet()))
    chosen = [g for g in groups if g.can("select")]
    product = next(n for n in groups.graph.nodes if n.name == "conv2d_1")
    whole, half = {}, {g: g.size // 2 for g in chosen}
    table = LatencyTable(groups, chosen, [(whole, {"conv2d_1": 4.0, "": 1.0}), (half, {"conv2d_1": 1.0, "": 1.0})])
    assert table(whole) == pytest.approx(5.0) and table(half) == pytest.approx(2.0)
    widths = [table({g: max(g.size * k // 8, 1) for g in chosen}) for k in range(1, 9)]
    assert all(a <= b for a, b in zip(widths, widths[1:], strict=False)) and widths[0] >= 1.0
    noisy = LatencyTable(groups, chosen, [(whole, {"conv2d_1": 1.0}), (half, {"conv2d_1": 2.0})])
    assert noisy(whole) >= noisy(half) and macs(product)


# ---- ONNX Runtime ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("name", ["residual_cnn", "vision_transformer", "separate_qkv", "lstm", "grouped_query_rope"])
def test_onnxruntime_times_are_traced_back_to_the_products(name: str, front: str) -> None:
    model, x = toy(name)
    graph = load(model, x, front)
    backend = get("onnxruntime")
    times = backend.node_times(graph, x, runs=5, threads=1)
    products = {n.name for n in graph.nodes if macs(n)}
    assert products <= set(times) <= products | {""}
    assert all(t >= 0 for t in times.values())
    assert sum(t for n, t in times.items() if n) > 0


def test_a_backend_without_a_profiler_says_so() -> None:
    class Plain(Backend):
        name = "plain"

        def check(self, graph: Graph) -> list[Any]:
            return []

        def lower(self, graph: Graph, example_inputs: Any = None) -> Any:
            raise NotImplementedError

    with pytest.raises(BackendError, match="no times of single nodes"):
        Plain().node_times(load(*toy("norm_mlp"), "fx"))


class Wide(nn.Module):
    """Linear layers whose time is almost all arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(),
            nn.Linear(1024, 16),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_a_real_model_gets_faster_by_about_what_was_asked(front: str) -> None:
    torch.manual_seed(0)
    model, x = Wide().eval(), (torch.randn(64, 256),)
    given = model if front == "fx" else exported(model, x)
    result = P.prune(given, x, target=fl.latency(0.6), round_to=8, backend_options={"threads": 1})
    details = result.report.passes[0].details
    assert details["reached"] == pytest.approx(0.6, rel=0.2)  # a busy machine: the benchmark shows what is reached
    assert details["latency"]["after_ms"] < details["latency"]["before_ms"]
    assert np.isfinite(details["latency_target"]["first_prediction"])
