"""PruneIteratively: the one-shot sizes, nested kept sets, fresh criteria, plans for the original, errors first."""

from __future__ import annotations

from typing import Any

import foldline as fl
import numpy as np
import pytest
import torch
from foldline import passes as P
from foldline.graph.actions import apply_plan
from foldline.graph.errors import ConfigError, ConstraintError
from foldline.passes.prune.importance import slabs_of
from foldline.passes.prune.schedule import PruneIteratively
from support.frontends import exported
from support.resnet_cifar import ResNetCifar
from support.toys import toy
from torch import nn


@pytest.fixture(scope="module")
def resnet() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    model = ResNetCifar(1)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.1, 2)
            nn.init.normal_(m.bias)
    return model.eval(), (torch.randn(2, 3, 32, 32),)


def vectors(g: Any, groups: Any) -> np.ndarray:
    """Sum over the biases and gains of an index: slicing other axes leaves it as it is."""
    found = [slabs_of(g, m) for m in g.members if len(m.weight.shape) == 1 and not m.stat]
    return np.sum([np.abs(s).sum(1) for s in found], axis=0) if found else np.ones(g.size)


def sizes(result: Any) -> dict[str, dict[int, int]]:
    return {w: {a: len(k) for a, k in axes.items()} for w, axes in result.plan.weights.items()}


@pytest.mark.parametrize("front", ["fx", "onnx"])
@pytest.mark.parametrize("schedule", ["linear", "geometric", lambda x: x**2])
def test_lands_on_the_sizes_of_one_shot(front: str, schedule: Any) -> None:
    model, x = toy("residual_cnn")
    given = model if front == "fx" else exported(model, x)
    for options in ({"ratio": 0.6}, {"ratio": 0.5, "round_to": 2}):
        once = P.prune(given, x, **options)
        result = P.prune_iteratively(given, x, prune=P.Prune(**options), steps=3, schedule=schedule)
        assert sizes(result) == sizes(once)
        assert fl.cost(result.graph).macs == fl.cost(once.graph).macs
        steps = result.report.passes[0].details["steps"]
        assert max(s["identity"]["relative_error"] for s in steps if s["cut"]) < 1e-4


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_a_criterion_that_slicing_does_not_change_keeps_the_same_indices(front: str, resnet: Any) -> None:
    model, x = resnet
    given = model if front == "fx" else exported(model, x)
    for scope in ("uniform", "global"):
        prune = P.Prune(criterion=vectors, ratio=0.5, scope=scope, normalizer="none")
        once = fl.Pipeline([prune]).run(given, x, verify=False)
        result = P.prune_iteratively(given, x, prune=prune, steps=3, train=lambda m: None, verify=False)
        assert result.plan.weights == once.plan.weights


def test_kept_sets_are_nested_and_every_step_sees_the_sliced_model(resnet: Any) -> None:
    model, x = resnet
    widths: list[int] = []

    def watch(g: Any, groups: Any) -> np.ndarray:
        widths.append(g.size)
        return vectors(g, groups)

    kept: list[Any] = []
    for steps in (1, 2, 3):
        widths.clear()
        part = P.prune_iteratively(
            model, x, prune=P.Prune(criterion=watch, ratio=0.2 * steps), steps=steps, verify=False
        )
        kept.append({(w, a): set(k) for w, axes in part.plan.weights.items() for a, k in axes.items()})
    assert {16, 32, 64} < set(widths) and {round(0.8 * 16), round(0.8 * 64)} <= set(widths)
    for earlier, later in zip(kept, kept[1:], strict=False):
        assert all(later[place] < keep for place, keep in earlier.items())


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_training_runs_between_the_steps_and_its_weights_are_kept(front: str) -> None:
    model, x = toy("residual_cnn")
    given = model if front == "fx" else exported(model, x)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    first = {n: w.numpy() for n, w in fl.load(given, x).weights.items()}
    seen: list[int] = []

    def train(module: nn.Module) -> None:
        seen.append(sum(p.numel() for p in module.parameters()))
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1.5)

    result = P.prune_iteratively(given, x, prune=P.Prune(ratio=0.6), steps=3, train=train)
    assert len(seen) == 3 and seen[0] > seen[1] > seen[2]
    weight = next(n for n in result.plan.weights if n.endswith("stem.0.weight"))
    axes = result.plan.weights[weight]
    expected = first[weight][axes[0]] * 1.5**3
    assert np.allclose(result.graph.weight(weight).numpy(), expected, rtol=1e-5)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    if front == "fx":  # the whole plan in terms of the model that came in
        again = apply_plan(before, result.plan)
        assert {n: t.shape for n, t in again.items()} == {n: t.shape for n, t in result.model.state_dict().items()}


def test_training_changes_what_goes_next() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[0].weight[:4] *= 1e-2
    x = (torch.randn(3, 6),)

    def revive(module: nn.Module) -> None:
        with torch.no_grad():
            small = module[0].weight.norm(dim=1) < 0.1
            module[0].weight[small] *= 1e4

    once = P.prune(model, x, ratio=0.5).plan.weights["0.weight"][0]
    taught = P.prune_iteratively(model, x, prune=P.Prune(ratio=0.5), steps=2, train=revive).plan.weights["0.weight"][0]
    assert set(once) == {4, 5, 6, 7}
    assert len(taught) == 4 and len(set(taught) & {0, 1, 2, 3}) == 2


def test_cost_targets_and_scopes(resnet: Any) -> None:
    model, x = resnet
    before = fl.cost(fl.load(model, x))
    for options in ({"target": fl.macs(0.5)}, {"target": fl.params(before.parameters * 0.4), "scope": "global"}):
        result = P.prune_iteratively(model, x, prune=P.Prune(**options), steps=2, schedule="cubic", verify=False)
        target = options["target"]
        now, all_of_it = target.of(fl.cost(result.graph)), target.of(before)
        assert abs(now - target.amount(all_of_it)) / all_of_it < 0.03


def test_schedules_follow_their_formulas() -> None:
    steps = {s: PruneIteratively(prune=P.Prune(ratio=0.5), steps=4, schedule=s) for s in ("linear", "cubic")}
    assert np.allclose(steps["linear"].shares(), [0.25, 0.5, 0.75, 1])
    assert np.allclose(steps["cubic"].shares(), [1 - (3 / 4) ** 3, 1 - (2 / 4) ** 3, 1 - (1 / 4) ** 3, 1])
    groups = fl.axis_groups(fl.load(*toy("residual_cnn")))
    geometric = PruneIteratively(prune=P.Prune(ratio=0.5), steps=4, schedule="geometric").goals(groups)
    left = [1 - ratio for ratio, *_ in geometric]
    assert np.allclose([b / a for a, b in zip([1.0, *left], left, strict=False)], 0.5**0.25)


def test_overrides_follow_the_schedule_and_data_is_read_in_every_step() -> None:
    model, x = toy("residual_cnn")
    options: dict[str, Any] = {"ratio": 0.5, "overrides": {"b1.*": 0.8, "a1.*": 0.0}, "criterion": "apoz"}
    once = P.prune(model, x, **options, calibration=[x])
    result = P.prune_iteratively(model, x, prune=P.Prune(**options), steps=2, calibration=iter([x]))
    assert sizes(result) == sizes(once) and len(result.plan.weights["b1.0.weight"][0]) == 2
    half = PruneIteratively(prune=P.Prune(**options), steps=2).goals(fl.axis_groups(fl.load(model, x)))[0]
    assert half == (0.25, None, {"b1.*": 0.4, "a1.*": 0.0})


def test_errors_come_before_any_training() -> None:
    model, x = toy("residual_cnn")
    called: list[Any] = []
    with pytest.raises(ConstraintError, match="matches nothing"):
        P.prune_iteratively(model, x, prune=P.Prune(ratio=0.5, ignore=["nope"]), train=called.append)
    with pytest.raises(ConstraintError, match="cannot be reached"):
        P.prune_iteratively(model, x, prune=P.Prune(target=fl.params(1e-5)), train=called.append)
    with pytest.raises(ConstraintError, match="out of range"):
        P.prune_iteratively(model, x, prune=P.Prune(ratio=1.5), train=called.append)
    with pytest.raises(ConfigError, match="rise from 0 to 1"):
        P.prune_iteratively(model, x, prune=P.Prune(ratio=0.5), train=called.append, schedule=lambda x: 0.5)
    with pytest.raises(ConfigError, match="invalid option.*schedule"):
        P.prune_iteratively(model, x, prune=P.Prune(ratio=0.5), train=called.append, schedule="cosine")
    with pytest.raises(ConfigError, match="cannot be found"):
        P.prune_iteratively(model, x, prune=P.Prune(ratio=0.5), train="no_such_module:train")
    assert not called


def test_a_step_too_small_to_lose_an_index_is_passed_over() -> None:
    model, x = toy("residual_cnn")
    result = P.prune_iteratively(model, x, prune=P.Prune(ratio=0.25), steps=8, verify=False)
    cuts = [s["cut"] for s in result.report.passes[0].details["steps"]]
    assert cuts[0] == 0 and sum(cuts) > 0
    assert sizes(result) == sizes(P.prune(model, x, ratio=0.25))


def test_same_seed_same_bytes_and_text_form() -> None:
    model, x = toy("residual_cnn")
    a, b = (
        P.prune_iteratively(model, x, prune=P.Prune(criterion="random", ratio=0.5), seed=3, steps=2) for _ in range(2)
    )
    assert a.plan.to_json() == b.plan.to_json()
    pipe = fl.Pipeline([PruneIteratively(prune=P.Prune(ratio=0.5, round_to=2), steps=2, schedule="cubic")])
    again = fl.Pipeline.from_dict(pipe.to_dict())
    assert again.run(model, x).plan.weights == pipe.run(model, x).plan.weights
