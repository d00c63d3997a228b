"""Plans as data: on state dicts, files, EMA copies, optimizers; edited by hand, completed and checked."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import foldline as fl
import pytest
import torch
from foldline import passes as P
from foldline.graph.actions import Plan, apply_plan
from foldline.graph.errors import ConstraintError, ModelFileError
from safetensors.torch import save_file
from support.frontends import exported
from support.resnet_cifar import ResNetCifar
from support.toys import toy
from torch import nn
from torch.optim.swa_utils import AveragedModel


class Net(nn.Module):
    """A residual net with a tied output and a buffer that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.down = nn.Linear(12, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("gate", torch.linspace(0.5, 1, 12), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids)
        return self.out(h + self.down(torch.relu(self.up(h)) * self.gate))


def net() -> tuple[Net, tuple[torch.Tensor]]:
    torch.manual_seed(0)
    return Net().eval(), (torch.randint(0, 11, (4, 5)),)


def pruned(model: nn.Module, x: Any) -> tuple[nn.Module, Plan]:
    result = P.prune(model, x, ratio=0.5)
    return result.model, Plan.from_json(result.plan.to_json())


def assert_equal_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: tuple[torch.Tensor]) -> None:
    optimizer.zero_grad()
    model(*x).square().mean().backward()
    optimizer.step()


# ---- checkpoints ------------------------------------------------------------------------------------------------
def test_tied_and_unsaved_weights_of_a_state_dict() -> None:
    model, x = net()
    result, plan = pruned(model, x)
    assert plan.aliases == {"embed.weight": ["out.weight"]} and plan.unsaved == ["gate"]
    state = apply_plan(model.state_dict(), plan)
    assert_equal_states(state, result.state_dict())
    assert state["out.weight"].shape == state["embed.weight"].shape == (11, 4)
    del state["out.weight"]
    less = {n: t for n, t in model.state_dict().items() if n != "out.weight"}
    assert_equal_states(apply_plan(less, plan), state)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_checkpoint_files(tmp_path: Path, suffix: str) -> None:
    model, x = toy("residual_cnn")
    result, plan = pruned(model, x)
    path = tmp_path / f"other{suffix}"
    if suffix == ".pt":
        torch.save({"epoch": 3, "model": model.state_dict(), "ema": model.state_dict()}, path)
        found = apply_plan(path, plan)
        assert found["epoch"] == 3
        assert_equal_states(found["ema"], result.state_dict())
        found = found["model"]
    else:
        save_file(model.state_dict(), path)
        found = apply_plan(str(path), plan)
    assert_equal_states(found, result.state_dict())
    with pytest.raises(ModelFileError, match="no such checkpoint"):
        apply_plan(tmp_path / f"missing{suffix}", plan)


def test_ema_copies() -> None:
    model, x = toy("residual_cnn")
    result, plan = pruned(model, x)
    ema = AveragedModel(model)
    ema.update_parameters(model)
    state = apply_plan(ema.state_dict(), plan)
    assert state["n_averaged"] == 1
    small = AveragedModel(result)
    small.load_state_dict(state)
    assert torch.equal(small(*x), result(*x))
    again = apply_plan(ema, plan, x)
    assert torch.allclose(again(*x), result(*x), atol=1e-6)
    assert_equal_states(again.state_dict(), state)


def test_a_plan_for_another_model_is_refused_and_named() -> None:
    model, x = toy("residual_cnn")
    _, plan = pruned(model, x)
    state = model.state_dict()
    name = next(iter(plan.weights))
    with pytest.raises(ConstraintError, match="lacks") as caught:
        apply_plan({n: t for n, t in state.items() if n != name}, plan)
    assert caught.value.node == name
    state[name] = state[name][:-1]
    with pytest.raises(ConstraintError, match="another model") as caught:
        apply_plan(state, plan)
    assert caught.value.node == name and caught.value.hint
    other, y = net()
    with pytest.raises(ConstraintError, match="another model"):
        apply_plan(other, plan, y)
    with pytest.raises(ConstraintError, match="cannot be read"):
        apply_plan(state, "no/such/plan.json")


# ---- optimizers -------------------------------------------------------------------------------------------------
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, foreach=False),
    "adam foreach": lambda p: torch.optim.Adam(p, foreach=True, amsgrad=True),
    "adam fused": lambda p: torch.optim.Adam(p, fused=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, fused=True, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p),
    "nadam": lambda p: torch.optim.NAdam(p),
    "adafactor": lambda p: torch.optim.Adafactor(p),
}


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_training_goes_on_as_with_a_sliced_fresh_optimizer(kind: str) -> None:
    model, x = toy("residual_cnn")
    optimizer = OPTIMIZERS[kind](model.parameters())
    step(model, optimizer, x)
    small, plan = pruned(model, x)
    twin = copy.deepcopy(small)
    fresh = OPTIMIZERS[kind](twin.parameters())
    states = apply_plan(optimizer.state_dict(), plan, original=model)
    fresh.load_state_dict(copy.deepcopy(states))  # torch shares the tensors otherwise
    by_hand = {n: optimizer.state[p] for n, p in model.named_parameters()}
    before = {n: dict(s) for n, s in by_hand.items()}
    assert apply_plan(optimizer, plan, model=small) is optimizer
    for name, p in small.named_parameters():
        for key, value in optimizer.state[p].items():
            assert type(value) is type(before[name][key])
            if isinstance(value, torch.Tensor) and value.shape == p.shape:
                expected = before[name][key]
                for axis, kept in plan.axes(name).items():
                    expected = expected.index_select(axis, torch.tensor(kept))
                assert torch.equal(value, expected), (name, key)
    for _ in range(2):
        step(small, optimizer, x)
        step(twin, fresh, x)
    assert_equal_states(small.state_dict(), twin.state_dict())


def test_parameter_groups_are_told_apart_by_identity_or_name() -> None:
    model, x = toy("residual_cnn")

    def build(m: nn.Module, named: bool = False) -> torch.optim.Optimizer:
        flat = [(n, p) if named else p for n, p in m.named_parameters() if p.ndim == 1]
        rest = [(n, p) if named else p for n, p in m.named_parameters() if p.ndim > 1]
        return torch.optim.AdamW([{"params": rest}, {"params": flat, "weight_decay": 0.0}])

    for named in (False, True):
        optimizer = build(model, named)
        step(model, optimizer, x)
        before = {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
        small, plan = pruned(model, x)
        if not named:
            state = {p: dict(s) for p, s in optimizer.state.items()}
            with pytest.raises(ConstraintError, match="told apart"):
                apply_plan(optimizer, plan, model=small)
            assert all(optimizer.state[p].keys() == s.keys() for p, s in state.items())
        apply_plan(optimizer, plan, model=small, original=None if named else model)
        for name, p in small.named_parameters():
            expected = before[name]
            for axis, kept in plan.axes(name).items():
                expected = expected.index_select(axis, torch.tensor(kept))
            assert torch.equal(optimizer.state[p]["exp_avg"], expected), name
        step(small, optimizer, x)


def test_a_model_pruned_in_place_keeps_its_optimizer() -> None:
    model, x = toy("residual_cnn")
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer, x)
    result = P.prune(model, x, ratio=0.5, inplace=True)
    assert result.model is model
    apply_plan(optimizer, result.plan, model=model)
    step(model, optimizer, x)
    for p in model.parameters():
        assert optimizer.state[p]["exp_avg"].shape == p.shape and optimizer.state[p]["step"] == 2


def test_optimizer_states_that_cannot_be_sliced_are_refused_and_stay() -> None:
    model, x = toy("residual_cnn")
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(*x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    small, plan = pruned(model, x)
    first = next(model.parameters())
    with pytest.raises(ConstraintError, match="not laid out like its parameter"):
        apply_plan(optimizer, plan, model=small)
    assert optimizer.param_groups[0]["params"][0] is first and "d" in optimizer.state[first]
    with pytest.raises(ConstraintError, match="holds no names"):
        apply_plan(optimizer, plan)


def test_factored_states_of_square_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).eval()
    x = (torch.randn(2, 6),)
    small, plan = pruned(model, x)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    middle = model[2].weight
    row, col = torch.arange(6.0), torch.arange(6.0) * 10
    optimizer.state[middle] = {"exp_avg_sq_row": row, "exp_avg_sq_col": col, "step": 3}
    apply_plan(optimizer, plan, model=small)
    state, axes = optimizer.state[small[2].weight], plan.weights["2.weight"]
    assert state["exp_avg_sq_row"].tolist() == row[axes[0]].tolist()
    assert state["exp_avg_sq_col"].tolist() == col[axes[1]].tolist()
    assert state["step"] == 3


# ---- by hand ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_a_plan_by_hand_is_completed_checked_and_applied(front: str) -> None:
    torch.manual_seed(0)
    model = ResNetCifar(1).eval()
    x = (torch.randn(2, 3, 32, 32),)
    given = model if front == "fx" else exported(model, x)
    groups = fl.axis_groups(fl.load(given, x))
    g = next(g for g in groups if g.can("select") and g.size > 8 and len(g.members) > 1)
    name, axis = g.members[0].weight.name, g.members[0].axis
    plan = groups.complete({name: {axis: [0, 3, 7]}})
    assert {f"{n}[{a}]" for n, axes in plan.weights.items() for a in axes} == {m.label for m in g.members}
    assert plan.check(given, x) == plan.check(groups) == {g.name: 3}
    graph = fl.load(apply_plan(given, plan, x), x)
    assert graph.weight(name).shape[axis] == 3

    other = next(m for m in g.members if m.weight.name != name)
    edited = plan.edit(other.weight.name, other.axis, [0, 3])
    with pytest.raises(ConstraintError, match="different indices") as caught:
        edited.check(groups)
    assert name in str(caught.value) and g.name in str(caught.value)
    assert plan.weights[other.weight.name][other.axis] == [0, 3, 7]
    partial = Plan({name: {axis: [0, 3, 7]}}, {name: plan.shapes[name]})
    with pytest.raises(ConstraintError, match="leaves out a member"):
        partial.check(groups)
    assert groups.complete(partial).to_json() == plan.to_json()


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_edits_that_cannot_be(front: str) -> None:
    model, x = toy("residual_cnn")
    given = model if front == "fx" else exported(model, x)
    plan = P.prune(given, x, ratio=0.5).plan
    groups = fl.axis_groups(fl.load(given, x))
    name = next(iter(plan.weights))
    axis = next(iter(plan.weights[name]))
    for bad in ([], [0, 0], [-1], [10_000]):
        with pytest.raises(ConstraintError, match="out of range"):
            plan.edit(name, axis, bad)
    with pytest.raises(ConstraintError, match="does not name"):
        plan.edit("nothing", 0, [1])
    frozen = next(g for g in groups if not g.can("select") and g.size > 2)
    m = frozen.members[0]
    with pytest.raises(ConstraintError, match="not possible|cannot be cut") as caught:
        groups.complete({m.weight.name: {m.axis: list(range(m.weight.shape[m.axis] - 1))}})
    assert caught.value.hint
    with pytest.raises(ConstraintError, match="no such weight"):
        groups.complete({"nothing": {0: [1]}})


def test_a_plan_may_reorder() -> None:
    model, x = toy("residual_cnn")
    groups = fl.axis_groups(fl.load(model, x))
    g = next(g for g in groups if g.can("permute") and g.can("select") and g.size > 3 and not g.nested)
    m = g.members[0]
    order = list(range(g.size))[::-1]
    same = apply_plan(model, groups.complete({m.weight.name: {m.axis: order}}), x)
    assert torch.allclose(same(*x), model(*x), atol=1e-5)
    weight = dict(same.named_parameters())[m.weight.name]
    assert torch.equal(weight, dict(model.named_parameters())[m.weight.name].flip(m.axis))
