"""MixedPrecision: the exact choice of widths (brute force agrees), budgets kept, costs as counted by hand."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from foldline import Pipeline
from foldline import passes as P
from foldline.backends import get
from foldline.graph.errors import ConfigError, ConstraintError
from foldline.graph.verify import compare
from foldline.passes.quantize.bits import MixedPrecision
from foldline.passes.quantize.bits.costs import Budget, budgets, site_bytes, site_macs
from foldline.passes.quantize.bits.losses import rounded
from foldline.passes.quantize.bits.mixed import first_samples
from foldline.passes.quantize.bits.noise import (
    QuantNoise,
    discretise,
    expected_bit_operations,
    insert_quant_noise,
    noises,
    settle,
)
from foldline.passes.quantize.choices import narrowed
from foldline.passes.quantize.placement import place
from foldline.passes.quantize.spec import BackendSpec
from support.small_nets import graph_of
from torch import nn

SPEC: BackendSpec = get("onnxruntime-cpu").spec


class Six(nn.Module):
    """Six layers of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 4, 8, 6, 10, 5)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.head = nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            x = torch.relu(conv(x))
        return self.head(x.mean((2, 3)))


def six() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    return Six().eval(), [torch.randn(4, 3, 8, 8) for _ in range(2)]


@pytest.mark.parametrize("budget", [2.5, 3.7, "bytes(2200)", "bitops(0.55)", {"bits": 5, "bitops": 0.5}])
def test_equal_to_brute_force_on_six_layers_of_three_widths(budget: Any) -> None:
    model, batches = six()
    graph = graph_of(model, batches[0], "fx")
    placement = place(graph, SPEC, set())
    assert len(placement.weights) == 6
    mixed = MixedPrecision(choices=(2, 4, 8), budget=budget)
    found = mixed.choose(graph, placement, SPEC, batches)
    losses = {n: found.details["losses"][n] for n in (s.node.name for s in placement.weights)}

    def spent(bits: tuple[int, ...], kind: str) -> float:
        pairs = list(zip(placement.weights, bits, strict=True))
        if kind == "bits":
            return sum(s.weight.size * b for s, b in pairs)
        if kind == "bytes":
            return sum(site_bytes(s, narrowed(s.form, b, SPEC.weight_dtypes)) for s, b in pairs)
        return sum(site_macs(graph, s) * b * 8 for s, b in pairs)

    def limit(b: Budget) -> float:
        if b.kind == "bits":
            return b.value * sum(s.weight.size for s in placement.weights)
        return b.value if b.value > 1 else b.value * spent((8,) * 6, b.kind)

    best = min(
        sum(losses[s.node.name][b] for s, b in zip(placement.weights, bits, strict=True))
        for bits in itertools.product((2, 4, 8), repeat=6)
        if all(spent(bits, b.kind) <= limit(b) + 1e-9 for b in budgets(budget))
    )
    assert found.details["expected_loss"] == pytest.approx(best, rel=1e-9)
    for kind, data in found.details["budgets"].items():
        assert data["spent"] <= data["limit"] + 1e-6, kind


def test_activations_and_weights_are_chosen_together_under_bit_operations() -> None:
    model, batches = six()
    graph = graph_of(model, batches[0], "fx")
    placement = place(graph, SPEC, set())
    mixed = MixedPrecision(choices=(4, 8), activations=(4, 8), budget="bitops(0.4)")
    found = mixed.choose(graph, placement, SPEC, batches)
    roots = {p.root for p in placement.points.values()}
    assert roots <= set(found.formats) and {s.node.name for s in placement.weights} <= set(found.formats)
    total = sum(
        site_macs(graph, s) * found.formats[s.node.name].bits * found.formats[placement.points[s.x.name].root].bits
        for s in placement.weights
    )
    assert found.details["budgets"]["bitops"]["spent"] == pytest.approx(total)
    assert total <= 0.4 * sum(site_macs(graph, s) * 64 for s in placement.weights)
    # by hand: the first convolution, 3 -> 4 channels, 3x3 at 8x8
    assert site_macs(graph, placement.weights[0]) == 3 * 4 * 9 * 64


@pytest.mark.parametrize("front", ["fx", "onnx"])
@pytest.mark.parametrize("sensitivity", ["sqnr", "kl", "fisher", "pqi"])
def test_mixed_is_at_least_as_good_as_uniform_at_equal_bytes(front: str, sensitivity: str) -> None:
    model, batches = six()
    with torch.no_grad():
        model.convs[1].weight[:, 0] *= 20  # a layer that few bits ruin
    before = graph_of(model, batches[0], front)
    inputs = [before.bind(b) for b in batches]
    found = {}
    for name, options in {
        "uniform": {"weight_bits": 4},
        "mixed": {"bits": {"choices": (2, 3, 4, 5, 6, 8), "budget": 4, "sensitivity": sensitivity}},
    }.items():
        run = Pipeline([P.Quantize(**options)]).run(before, batches[0], calibration=batches, verify=False)
        out = next(iter(compare(before, run.graph, inputs).outputs.values()))
        found[name] = out.sqnr_db
        if name == "mixed":
            chosen = run.report.passes[-1].details["bits"]
            assert chosen["average_weight_bits"] <= 4 and len(set(chosen["widths"].values())) > 1
            stored = {n: d["weight_bits"] for n, d in run.report.passes[-1].details["layers"].items()}
            assert {n: chosen["widths"][n] for n in stored} == stored
            tried = chosen["measured"]
            assert tried[chosen["taken"]] == min(tried.values()) <= tried["uniform 4"]
    assert found["mixed"] > found["uniform"] + (1 if sensitivity == "sqnr" else 0)


def test_the_choice_is_measured_as_a_whole_and_never_loses_to_uniform_widths() -> None:
    """What is reported equals a run with all weights rounded; the program alone may lose, the choice may not."""
    model, batches = six()
    graph = graph_of(model, batches[0], "fx")
    placement = place(graph, SPEC, set())
    sites = {s.node.name: s for s in placement.weights}

    def truth(widths: dict[str, int]) -> float:
        other, signal, noise = graph.clone(), 0.0, 0.0
        for name, bits in widths.items():
            form = narrowed(sites[name].form, bits, SPEC.weight_dtypes)
            other.set_weight(other.weight(sites[name].weight.name), rounded(sites[name], form))
        for batch in batches:
            (a,), (b,) = (g.run(g.bind(batch))[0] for g in (graph, other))
            signal, noise = signal + float((a**2).sum()), noise + float(((a - b) ** 2).sum())
        return noise / signal

    for budget in (2.2, 2.6, 3, 3.5, 4, 5):
        found, alone = (
            MixedPrecision(choices=(2, 3, 4, 5, 6, 8), budget=budget, compare=c).choose(graph, placement, SPEC, batches)
            for c in (True, False)
        )
        tried = found.details["measured"]
        assert tried[found.details["taken"]] == min(tried.values())
        assert truth(found.details["widths"]) == pytest.approx(min(tried.values()), rel=1e-3)
        assert truth(alone.details["widths"]) == pytest.approx(tried["program"], rel=1e-3)
        assert tried[f"uniform {int(budget)}"] == pytest.approx(truth(dict.fromkeys(sites, int(budget))), rel=1e-3)
        assert found.details["budgets"]["bits"]["spent"] <= found.details["budgets"]["bits"]["limit"]
    # losses that lead astray: the program gives the bits to the wrong layers, the comparison sees it
    wrong = {n: {2: 1e-3 * i, 8: 0.0} for i, n in enumerate(sites)}
    given = MixedPrecision(choices=(2, 8), budget=4, sensitivity=wrong).choose(graph, placement, SPEC, batches)
    assert "measured" not in given.details  # the caller's losses are the caller's choice


def test_more_budget_never_loses_more_and_the_same_call_gives_the_same() -> None:
    model, batches = six()
    graph = graph_of(model, batches[0], "fx")
    losses = []
    for budget in (2, 3, 4, 6, 8):
        mixed = MixedPrecision(choices=(2, 3, 4, 6, 8), budget=budget, sensitivity="weights")
        one, two = (mixed.choose(graph, place(graph, SPEC, set()), SPEC, batches) for _ in range(2))
        assert one.formats == two.formats
        losses.append(one.details["expected_loss"])
    assert losses == sorted(losses, reverse=True)


def test_given_losses_settled_widths_and_a_latency_table() -> None:
    model, batches = six()
    graph = graph_of(model, batches[0], "fx")
    placement = place(graph, SPEC, set())
    names = [s.node.name for s in placement.weights]
    given = {n: {4: float(i), 8: 0.0} for i, n in enumerate(names)}
    times = {n: {4: 1.0, 8: 2.0} for n in names}
    mixed = MixedPrecision(choices=(4, 8), budget="latency(9)", sensitivity=given, latency=times, keep={names[0]: 8})
    found = mixed.choose(graph, placement, SPEC, [])
    widths = [found.formats[n].bits for n in names]
    assert widths == [8, 4, 4, 4, 8, 8]  # 9 ms: three layers at 8 bits, one of them settled, the others the dearest
    with pytest.raises(ConfigError, match="a latency budget needs a time"):
        MixedPrecision(choices=(2, 4), budget="latency(9)", latency=times).choose(graph, placement, SPEC, batches)
    with pytest.raises(ConfigError, match="no sensitivity was given"):
        MixedPrecision(choices=(2, 4), sensitivity=given).choose(graph, placement, SPEC, batches)


def test_bad_wishes_are_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="not a budget"):
        MixedPrecision(budget="flops(3)")
    with pytest.raises(ConfigError, match="no option"):
        MixedPrecision(choice=(2, 4))
    model, batches = six()
    graph = graph_of(model, batches[0], "fx")
    with pytest.raises(ConstraintError, match="no choice of levels"):
        MixedPrecision(choices=(4, 8), budget=3).choose(graph, place(graph, SPEC, set()), SPEC, batches)


def test_samples_are_counted() -> None:
    model, batches = six()
    graph = graph_of(model, batches[0], "fx")
    assert sum(len(next(iter(b.values()))) for b in first_samples(graph, batches, 6)) in (6, 8)
    assert len(first_samples(graph, batches, 4)) == 1
    assert np.isclose(next(iter(first_samples(graph, batches, 4)[0].values())).mean(), batches[0].mean().item())


# ---- widths found by training with noise --------------------------------------------------------------------------
def test_noise_has_the_variance_of_rounding_and_none_is_the_identity() -> None:
    noise = QuantNoise((4,), seed=1).train()
    w = torch.linspace(-1, 1, 200_000)
    added = noise(w).detach() - w
    step = 1 / 7
    assert added.var().item() == pytest.approx(step**2 / 12, rel=0.02) and added.abs().max() <= step / 2
    assert abs(added.mean().item()) < 1e-3
    assert torch.equal(noise.eval()(w), w) and torch.equal(QuantNoise((4,), scale=0.0).train()(w), w)


def test_search_settles_on_few_bits_where_they_do_not_matter() -> None:
    model, batches = six()
    x = torch.cat(batches)
    wanted = model(x).detach()
    found = insert_quant_noise(model, {"convs.0": (2, 8), "head": (2, 8)}, seed=3)
    macs = {"convs.0": 1000, "head": 1000}
    assert expected_bit_operations(model, macs).item() == pytest.approx(2 * 1000 * 5 * 8)  # the mean of 2 and 8 bits
    model.train()
    adam = torch.optim.Adam([n.logits for n in found.values()], lr=0.2)
    for _ in range(60):
        error = (model(x) - wanted).square().mean()
        loss = error + settle(model) + expected_bit_operations(model, macs) / 8e4
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert settle(model).item() < 0.2
    formats = discretise(model)
    assert formats == {"convs.0": {"weight": 2}, "head": {"weight": 2}} and not noises(model)
    np.testing.assert_allclose(model.eval()(x).detach(), wanted, atol=1e-6)
    run = Pipeline([P.Quantize(formats=formats)]).run(model, batches[0], calibration=batches, verify=False)
    layers = run.report.passes[-1].details["layers"]
    assert sorted(d["weight_bits"] for d in layers.values()) == [2, 2, 8, 8, 8, 8]
