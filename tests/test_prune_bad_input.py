"""Bad input to pruning: every refusal is a ConstraintError that says what to change, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import foldline as fl
import numpy as np
import pytest
import torch
from foldline import passes as P
from foldline.graph.errors import ConstraintError, VerificationError
from foldline.passes.prune import prune_pass
from support.frontends import exported
from support.toys import toy
from torch import nn

FRONTS = ["fx", "fx in place", "onnx", "onnx file"]


class Case:
    """A model from one front end that can tell whether anything about it changed."""

    def __init__(self, front: str, folder: Path) -> None:
        self.module, self.x = toy("residual_cnn")
        self.model: Any = self.module
        if front.startswith("onnx"):
            proto = exported(self.module, self.x)
            self.model = proto
            if front == "onnx file":
                self.model = folder / "m.onnx"
                fl.save(proto, self.model)
        self.options = {"inplace": True} if front == "fx in place" else {}
        self.before = self.state()

    def state(self) -> Any:
        if isinstance(self.model, nn.Module):
            tensors = {n: (id(p), p.detach().numpy().tobytes()) for n, p in self.model.named_parameters()}
            tensors |= {n: (id(b), b.numpy().tobytes()) for n, b in self.model.named_buffers()}
            sizes = [{k: v for k, v in vars(m).items() if isinstance(v, (int, tuple))} for m in self.model.modules()]
            return tensors, [type(m) for m in self.model.modules()], sizes
        if isinstance(self.model, Path):
            return self.model.read_bytes(), sorted(p.name for p in self.model.parent.iterdir())
        return self.model.SerializeToString()

    def refuse(self, message: str, act: Callable[[], Any] | None = None, **options: Any) -> ConstraintError:
        with pytest.raises(ConstraintError, match=message) as caught:
            if act is None:
                P.prune(self.model, self.x, **options, **self.options)
            else:
                act()
        assert self.state() == self.before
        error = caught.value
        assert error.hint, "it does not say what to change"
        return error


@pytest.fixture(params=FRONTS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return Case(request.param, tmp_path)


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5, float("nan")])
def test_ratio_out_of_range(case: Case, ratio: float) -> None:
    assert "target" in str(case.refuse("out of range", ratio=ratio).hint)


@pytest.mark.parametrize("target", [fl.params(0.001), fl.macs(0.001), fl.bytes(5.0)])
def test_a_target_that_cannot_be_reached(case: Case, target: fl.Target) -> None:
    error = case.refuse("cannot be reached", target=target)
    assert "raise the target" in str(error.hint) and error.expected and error.found


def test_an_ignore_pattern_that_matches_nothing(case: Case) -> None:
    error = case.refuse("matches nothing", ratio=0.5, ignore=["no.such.layer"])
    assert error.value == "no.such.layer"


def test_nothing_left_to_prune(case: Case) -> None:
    case.refuse("nothing was pruned", ratio=0.5, round_to=4096)
    error = case.refuse("nothing was pruned", ratio=0.5, ignore=["*"])
    assert "ignored by '*'" in str(error.found)


@pytest.mark.parametrize("goal", [{"ratio": 0.5}, {"target": fl.macs(0.5)}])
def test_a_model_without_anything_to_cut_says_why(goal: dict[str, Any]) -> None:
    with pytest.raises(ConstraintError, match="no axis group can be cut") as caught:
        P.prune(nn.LSTM(6, 16).eval(), torch.randn(5, 2, 6), **goal)
    assert "graph output" in str(caught.value.found)


def test_a_group_that_would_vanish(case: Case) -> None:
    groups = fl.axis_groups(fl.load(case.model, case.x))
    g = next(g for g in groups if g.can("select"))
    weight, axis = g.members[0].weight.name, g.members[0].axis

    def by_plan(kept: list[int]) -> Any:
        return P.select(case.model, case.x, plan={weight: {axis: kept}}, **case.options)

    for act in (lambda: by_plan([]), lambda: fl.PruneSession(case.model, case.x).keep(g.name, [])):
        error = case.refuse("empty|vanish", act)
        assert error.node and error.node.startswith(weight)
    case.refuse("out of range", lambda: by_plan([g.size]))
    result = P.prune(case.model, case.x, ratio=0.999)
    assert min(len(k) for axes in result.plan.weights.values() for k in axes.values()) == 1


def test_a_plan_for_another_model(case: Case) -> None:
    plan = P.prune(case.model, case.x, ratio=0.5).plan
    name = next(iter(plan.weights))
    lacking = fl.Plan({"other": plan.weights[name]}, {"other": plan.shapes[name]})
    wider = fl.Plan(plan.weights, {**plan.shapes, name: [s + 1 for s in plan.shapes[name]]})
    axis = next(iter(plan.weights[name]))
    torn = plan.edit(name, axis, plan.weights[name][axis][:-1])
    for bad, message in ((lacking, "another model"), (wider, "another model"), (torn, "different indices")):
        case.refuse(message, lambda bad=bad: P.select(case.model, case.x, plan=bad, **case.options))
        case.refuse(message, lambda bad=bad: fl.apply_plan(case.model, bad, case.x))
    frozen = next(g for g in fl.axis_groups(fl.load(case.model, case.x)) if not g.can("select") and g.size > 2)
    m = frozen.members[0]
    error = case.refuse(
        "not possible|cannot be cut",
        lambda: P.select(case.model, case.x, plan={m.weight.name: {m.axis: [0, 1]}}, **case.options),
    )
    assert error.pass_name == "select (1 of 1)"


def test_a_failed_check_leaves_the_model(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(groups: Any, kept: Any, seed: int) -> Any:
        def fail(graph: Any) -> Any:
            raise VerificationError("the pruned model is not the masked original", found=np.inf)

        return fail

    monkeypatch.setattr(prune_pass, "identity_check", check)
    with pytest.raises(VerificationError, match="masked original"):
        P.prune(case.model, case.x, ratio=0.5, **case.options)
    assert case.state() == case.before


def test_a_result_that_cannot_be_put_in_place() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(x)).view(-1, 8))

    model, x = Fixed().eval(), (torch.randn(3, 6),)
    before = {n: (id(p), p.detach().numpy().tobytes()) for n, p in model.named_parameters()}
    with pytest.raises(ConstraintError, match="cannot be put in place") as caught:
        P.prune(model, x, ratio=0.5, inplace=True)
    assert "result.model" in str(caught.value.hint)
    assert {n: (id(p), p.detach().numpy().tobytes()) for n, p in model.named_parameters()} == before
    assert model.up.out_features == 8 and model(*x).shape == (3, 4)
