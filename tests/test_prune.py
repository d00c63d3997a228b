"""Prune: scores, targets, blocks, patterns; the plan on checkpoints and optimizers; the caller's model untouched."""

from __future__ import annotations

import copy

import foldline as fl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foldline import passes as P
from foldline.graph.actions import Plan, apply_plan
from foldline.graph.errors import ConfigError, ConstraintError
from foldline.graph.groups import axis_groups
from foldline.passes.prune.importance import importance
from foldline.passes.prune.select import isomorphic, normalized, structure
from foldline.passes.prune.widths import Widths
from support.frontends import exported
from support.resnet_cifar import ResNetCifar
from support.toys import toy
from torch import nn


def hashes(model: nn.Module) -> dict[str, bytes]:
    return {n: t.detach().numpy().tobytes() for n, t in model.state_dict().items()}


def small() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    return model.eval(), (torch.randn(3, 6),)


HAND = {
    "l1": lambda m: m.abs().sum(1),
    "l2": lambda m: m.square().sum(1).sqrt(),
    "linf": lambda m: m.abs().amax(1),
    "fpgm": lambda m: torch.cdist(m, m).sum(1),
    "cosine": lambda m: 1 - (F.normalize(m) @ F.normalize(m).T - torch.eye(len(m)).double()).abs().amax(1),
}


@pytest.mark.parametrize("criterion", sorted(HAND))
def test_scores_equal_the_hand_count(criterion: str) -> None:
    model, x = small()
    groups = axis_groups(fl.load(model, x))
    g = groups["0.weight:0"]
    scores = importance(groups, [g], criterion, 0)[g]
    parts = [HAND[criterion](m.double()) for m in (model[0].weight.detach(), model[2].weight.detach().T)]
    expected = sum(p / p.mean() for p in parts) / 2
    assert np.allclose(scores, expected.numpy(), atol=1e-6)


def test_reductions_and_normalizers() -> None:
    model, x = small()
    groups = axis_groups(fl.load(model, x))
    g = groups["0.weight:0"]
    first, mean, total, top, product = (
        importance(groups, [g], "l2", 0, r)[g] for r in ("first", "mean", "sum", "max", "product")
    )
    second = total - first
    assert np.allclose(mean, total / 2) and np.allclose(top, np.maximum(first, second))
    assert np.allclose(product, first * second)
    s = np.array([1.0, 4.0, 2.0])
    assert np.allclose(normalized(s, "lamp"), [1 / 7, 1.0, 2 / 6])
    assert np.allclose(normalized(s, "sum").sum(), 1) and normalized(s, "max").max() == 1
    assert np.allclose(normalized(s, "mean").mean(), 1) and abs(normalized(s, "gaussian").mean()) < 1e-12
    assert (normalized(s, "none") == s).all()
    below = normalized(np.array([-3.0, -1.0, -2.0]), "mean")  # a callable may score below zero
    assert np.allclose(below, [-1.5, -0.5, -1.0]) and normalized(-s, "max").min() == -1


def test_a_copy_of_another_index_goes_first_by_cosine() -> None:
    model, x = small()
    with torch.no_grad():
        model[0].weight[6] = 3 * model[0].weight[2]
        model[2].weight[:, 6] = -2 * model[2].weight[:, 2]
    result = P.prune(model, x, criterion="cosine", ratio=0.125)
    assert set(range(8)) - set(result.plan.weights["0.weight"][0]) <= {2, 6}


def test_norm_scale_leaves_alone_what_has_no_norm() -> None:
    model, x = toy("residual_cnn")
    with torch.no_grad():
        model.a1[1].weight[[0, 3]] = 1e-6
    result = P.prune(model, x, criterion="norm_scale", ratio=0.34)
    assert result.plan.weights["a1.0.weight"][0] == [1, 2, 4, 5]
    plain, y = small()
    with pytest.raises(ConstraintError, match="nothing to judge any group by") as caught:
        P.prune(plain, y, criterion="norm_scale", target=fl.macs(0.5))
    assert "another criterion" in str(caught.value.hint)
    # Some groups have a norm and some have none: the least that is left says that the criterion is why.
    half = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    with pytest.raises(ConstraintError, match="cannot be reached") as caught:
        P.prune(half, y, criterion="norm_scale", target=fl.macs(0.5))
    assert "nothing to judge 1 of the groups" in str(caught.value.hint)
    with pytest.raises(ConstraintError, match="cannot be reached") as caught:
        P.prune(half, y, target=fl.macs(0.01))
    assert "judge" not in str(caught.value.hint)


class Heads(nn.Module):
    """Attention of 3 heads and a wide feed-forward: a head is a large step, a hidden unit a small one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))
        self.up, self.down = nn.Linear(24, 120), nn.Linear(120, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(2, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_small_steps_make_up_for_large_ones(scope: str) -> None:
    torch.manual_seed(0)
    model, x = Heads().eval(), (torch.randn(2, 10, 24),)
    for share in (0.3, 0.45, 0.55, 0.6, 0.7, 0.85):
        step = P.prune(model, x, target=fl.macs(share), scope=scope, verify=False).report.passes[0]
        assert step.details["reached"] == pytest.approx(share, rel=0.02), share
        assert not [d for d in step.decisions if d.action == "missed"]


def test_isomorphic_groups_compete_among_themselves() -> None:
    torch.manual_seed(0)
    model = ResNetCifar(3).eval()
    groups = axis_groups(fl.load(model, (torch.randn(2, 3, 32, 32),)))
    inner = [groups[f"layer{k}.1.conv1.weight:0"] for k in (1, 2, 3)]
    assert len({structure(g) for g in inner}) == 1
    assert structure(groups["conv1.weight:0"]) != structure(inner[0])
    scores = importance(groups, [*inner, groups["conv1.weight:0"]], "l2", 0)
    kept = isomorphic(scores, 0.5, Widths(scores))
    assert sum(len(kept[g]) for g in inner) == pytest.approx(sum(g.size for g in inner) / 2, abs=3)
    assert len(kept[groups["conv1.weight:0"]]) == 8


def test_the_least_important_indices_go() -> None:
    model, x = small()
    with torch.no_grad():
        model[0].weight[[1, 5]] *= 1e-3
        model[2].weight[:, [1, 5]] *= 1e-3
    result = P.prune(model, x, ratio=0.25)
    assert result.plan.weights["0.weight"] == {0: [0, 2, 3, 4, 6, 7]}
    assert isinstance(result.model, nn.Sequential)
    assert (result.model[0].out_features, result.model[2].in_features) == (6, 6)


def test_callers_model_stays_as_it_was_and_flags_are_kept() -> None:
    model, x = toy("residual_cnn")
    model.train()
    before, flags = hashes(model), [m.training for m in model.modules()]
    result = P.prune(model, x, ratio=0.5)
    with torch.no_grad():
        for p in result.model.parameters():
            p.add_(1)
    assert hashes(model) == before
    assert [m.training for m in model.modules()] == flags
    assert result.model.training


@pytest.mark.parametrize("front", ["fx", "onnx"])
@pytest.mark.parametrize("target", [fl.macs(0.5), fl.params(0.4)])
@pytest.mark.parametrize("scope", ["uniform", "global", "isomorphic"])
def test_targets_are_met(front: str, target: fl.Target, scope: str) -> None:
    torch.manual_seed(0)
    model = ResNetCifar(3).eval()
    x = (torch.randn(2, 3, 32, 32),)
    given = model if front == "fx" else exported(model, x)
    before = fl.cost(fl.load(given, x))
    result = P.prune(given, x, target=target, scope=scope)
    after = fl.cost(result.graph)
    share = target.of(after) / target.of(before)
    assert abs(share - target.value) < 0.03, share
    assert result.report.passes[0].details["identity"]["relative_error"] < 1e-4


def test_round_to_keeps_blocks_and_at_least_one() -> None:
    model, x = toy("residual_cnn")
    result = P.prune(model, x, ratio=0.9, round_to=4)
    for name, axes in result.plan.weights.items():
        for axis, kept in axes.items():
            assert len(kept) % 4 == 0 and kept, (name, axis)


def test_a_target_is_met_between_two_blocks() -> None:
    torch.manual_seed(0)
    model = ResNetCifar(3).eval()
    result = P.prune(model, (torch.randn(2, 3, 32, 32),), target=fl.macs(0.5), round_to=4)
    details = result.report.passes[0].details
    assert abs(details["reached"] - 0.5) < 0.01
    assert len({len(k) for axes in result.plan.weights.values() for k in axes.values()}) > 3


def test_blocks_count_slabs() -> None:
    model, x = toy("vision_transformer")
    groups = axis_groups(fl.load(model, x))
    heads = next(g for g in groups if g.can("select") and any(h.nested for h in groups.of(g.members[0].weight, 0)))
    dim = next(h for h in groups.of(heads.members[0].weight, 0) if h.nested)
    assert Widths([heads], dim.size).step(heads) == 1
    assert Widths([heads]).count(heads, 0.1) == 1
    assert Widths([heads], min_keep=2).count(heads, 0.1) == 2


def test_random_is_deterministic_by_seed() -> None:
    model, x = toy("residual_cnn")
    a, b, c = (P.prune(model, x, criterion="random", ratio=0.5, seed=s).plan for s in (1, 1, 2))
    assert a.to_json() == b.to_json() != c.to_json()


def test_own_criterion_and_ignore() -> None:
    model, x = toy("residual_cnn")
    result = P.prune(model, x, criterion=lambda g, _: np.arange(g.size), ratio=0.5, ignore=["stem*"])
    assert "stem.0.weight" not in result.plan.weights
    assert result.plan.weights["a1.0.weight"][0] == [3, 4, 5]
    assert "ignored" in result.report.explain("stem.0")


def test_bad_input_is_refused_and_says_what_to_change() -> None:
    model, x = small()
    before = hashes(model)
    with pytest.raises(ConstraintError, match="out of range"):
        P.prune(model, x, ratio=1.5)
    with pytest.raises(ConstraintError, match="out of range"):
        fl.Pipeline.from_dict({"passes": [{"prune": {"ratio": 0}}]})
    with pytest.raises(ConfigError, match="exactly one"):
        P.prune(model, x)
    with pytest.raises(ConstraintError, match="matches nothing"):
        P.prune(model, x, ratio=0.5, ignore=["no.such.layer"])
    with pytest.raises(ConstraintError, match="nothing was pruned"):
        P.prune(model, x, ratio=0.5, round_to=64)
    with pytest.raises(ConstraintError, match="cannot be reached"):
        P.prune(model, x, target=fl.params(0.01))
    with pytest.raises(ConfigError, match="l3"):
        P.prune(model, x, ratio=0.5, criterion="l3")
    assert hashes(model) == before


def test_plan_applies_to_checkpoints_models_and_optimizers() -> None:
    torch.manual_seed(0)
    model = ResNetCifar(1).eval()
    x = (torch.randn(2, 3, 32, 32),)
    optimizer = torch.optim.Adam(model.parameters())
    model(x[0]).square().sum().backward()
    optimizer.step()
    result = P.prune(model, x, ratio=0.5)
    plan = Plan.from_json(result.plan.to_json())

    sliced = apply_plan(model.state_dict(), plan)
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(sliced[name], tensor), name

    again = apply_plan(copy.deepcopy(model), plan, x)
    assert torch.equal(again(x[0]), result.model(x[0]))

    first = next(iter(model.parameters()))
    moment = optimizer.state[first]["exp_avg"].clone()
    apply_plan(optimizer, plan, model=result.model)
    q = next(iter(result.model.parameters()))
    assert torch.equal(optimizer.state[q]["exp_avg"], moment[plan.weights["conv1.weight"][0]])
    result.model.train()(x[0]).square().sum().backward()
    optimizer.step()


def test_plan_for_another_model_is_refused() -> None:
    model, x = small()
    plan = P.prune(model, x, ratio=0.5).plan
    with pytest.raises(ConstraintError, match="another model"):
        apply_plan({n: t[:, :2] if t.ndim > 1 else t for n, t in model.state_dict().items()}, plan)
    with pytest.raises(ConstraintError, match="not a foldline plan"):
        Plan.from_json("{}")
    edited = Plan.from_json(plan.to_json())
    edited.weights["0.weight"][0] = edited.weights["0.weight"][0][:-1]
    with pytest.raises(ConstraintError, match="all members agree"):
        apply_plan(model, edited, x)


def test_tied_weights_stay_tied() -> None:
    model, x = toy("tied_embedding")
    before = sum(p.numel() for p in model.parameters())
    result = P.prune(model, x, ratio=0.5)
    assert sum(p.numel() for p in result.model.parameters()) < before
    tied = [
        n
        for n in model.state_dict()
        if sum(t.data_ptr() == model.state_dict()[n].data_ptr() for t in model.state_dict().values()) > 1
    ]
    assert tied
    assert len({result.model.state_dict()[n].data_ptr() for n in tied}) == 1
