"""regularize: penalties by hand count, any loop, nothing left behind; masked L1 on gains and what Cut absorbs."""

from __future__ import annotations

import copy
from typing import Any

import foldline as fl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foldline import passes as P
from foldline.graph.errors import ConfigError, ConstraintError
from support.data import accuracy, cifar10, trained_resnet
from support.frontends import exported
from support.toys import toy
from torch import Tensor, nn

KINDS = ("group_lasso", "bn_l1", "masked_l1", "growing")


def mlp() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), (torch.randn(3, 6),)


def cnn() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return toy("residual_cnn")


def test_group_lasso_equals_the_hand_count() -> None:
    model, x = mlp()
    hooks = P.regularize(model, x, "group_lasso", 0.3)
    slabs = torch.cat([model[0].weight, model[0].bias[:, None], model[2].weight.T], 1)
    assert hooks.penalty().item() == pytest.approx(0.3 * (11**0.5 * slabs.norm(dim=1)).sum().item(), rel=1e-6)
    assert np.allclose(hooks.norms()["0.weight:0"], slabs.norm(dim=1).detach())


def test_bn_l1_and_masked_l1_count_gains_only() -> None:
    model, x = cnn()
    gains = [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    expected = sum(g.abs().sum() for g in gains).item()
    assert P.regularize(model, x, "bn_l1", 2.0).penalty().item() == pytest.approx(2 * expected, rel=1e-6)
    hooks = P.regularize(model, x, "masked_l1", 2.0, ratio=0.5)
    kept = hooks.kept()["a1.0.weight:0"]
    own = model.a1[1].weight.abs()
    gone = [i for i in range(6) if i not in kept]
    assert len(kept) == 3 and own[kept].min() > own[gone].max()
    assert hooks.norms()["a1.0.weight:0"].shape == (6,)
    term = next(t for t in hooks.terms if t.name == "a1.0.weight:0")
    assert term.value("masked_l1", 2.0).item() == pytest.approx(2 * own[gone].sum().item())


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_mode_adds_the_gradient_of_the_penalty(kind: Any) -> None:
    model, x = cnn()
    model.train()
    twin = copy.deepcopy(model)
    loss = lambda m: m(x[0]).square().mean()  # noqa: E731
    with P.regularize(twin, x, kind, 0.05, mode="penalty") as hooks:
        hooks.strength = 0.05
        (loss(twin) + hooks.penalty()).backward()
    with P.regularize(model, x, kind, 0.05, every=100) as hooks:
        hooks.strength = 0.05
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        (0.5 * loss(model)).backward()
        (0.5 * loss(model)).backward()  # accumulation: the penalty still counts once
        optimizer.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=2e-5), name


def test_nothing_is_left_after_the_context() -> None:
    model, x = cnn()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="mine"), P.regularize(model, x, "group_lasso", 1.0):
        raise RuntimeError("mine")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())


def test_another_optimizer_is_left_alone() -> None:
    model, x = mlp()
    other = nn.Linear(2, 2)
    with P.regularize(model, x, "group_lasso", 1.0) as hooks:
        optimizer = torch.optim.SGD(other.parameters(), lr=1.0)
        other(torch.zeros(1, 2)).sum().backward()
        optimizer.step()
    assert torch.equal(other.weight.grad, torch.zeros(2, 2)) and hooks.steps == 0


def test_proximal_steps_reach_zero_and_follow_their_formula() -> None:
    model, x = mlp()
    hooks = P.regularize(model, x, "group_lasso", 0.1, mode="proximal")
    slabs = torch.cat([model[0].weight, model[0].bias[:, None], model[2].weight.T], 1).detach()
    factor = (1 - 0.5 * 0.1 * 11**0.5 / slabs.norm(dim=1)).clamp(min=0)
    start = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with hooks:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert torch.allclose(model[0].weight, start * factor[:, None], atol=1e-6)
        for _ in range(40):
            optimizer.step()
    assert (hooks.norms()["0.weight:0"] == 0).all()


def test_growing_rises_by_steps_up_to_its_ceiling() -> None:
    model, x = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with P.regularize(model, x, "growing", 0.5, every=2, ceiling=1.2, ratio=0.5) as hooks:
        kept, start, strengths = hooks.kept()["0.weight:0"], hooks.norms()["0.weight:0"], []
        for _ in range(60):
            optimizer.zero_grad()
            model(x[0]).sum().mul(0).backward()
            optimizer.step()
            strengths.append(hooks.strength)
    assert strengths[:6] == [0, 0.5, 0.5, 1.0, 1.0, 1.2] and strengths[-1] == 1.2
    ratio = hooks.norms()["0.weight:0"] / start
    gone = [i for i in range(8) if i not in kept]
    assert np.allclose(ratio[kept], 1) and (ratio[gone] < 2e-3).all()
    result = hooks.prune()
    assert result.plan.weights["0.weight"][0] == kept
    assert torch.allclose(result.model(x[0]), model(x[0]), atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_what_is_penalised_and_prune_follows(kind: Any) -> None:
    model, x = cnn()
    model.train()
    torch.manual_seed(0)
    data, labels = torch.randn(32, 3, 12, 12), torch.randint(5, (32,))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with P.regularize(model, x, kind, 0.05, every=1) as hooks:
        before = sum(n.sum() for n in hooks.norms().values())
        for _ in range(15):
            optimizer.zero_grad()
            F.cross_entropy(model(data), labels).backward()
            optimizer.step()
    assert sum(n.sum() for n in hooks.norms().values()) < 0.97 * before
    result = hooks.prune()
    assert result.report.passes[0].details["identity"]["relative_error"] < 1e-4
    assert result.model.training and result.plan.weights == hooks.plan().weights


def test_modules_made_from_onnx() -> None:
    """In P.finetune's loop the ONNX model itself tells the groups; the cut is ONNX again."""
    model, x = cnn()
    proto = exported(model, x)
    found: list[Any] = []

    def train(module: nn.Module) -> None:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        with P.regularize(module, proto, "group_lasso", 0.3, mode="proximal") as hooks:
            start = sum(n.sum() for n in hooks.norms().values())
            for _ in range(5):
                optimizer.zero_grad()
                module(x[0]).square().mean().backward()
                optimizer.step()
        found.extend([start, sum(n.sum() for n in hooks.norms().values()), hooks.prune()])
        with pytest.raises(ConfigError, match="made from an ONNX model"):
            P.regularize(module, x)

    trained = P.finetune(proto, x, train=train)
    start, end, cut = found
    assert end < 0.9 * start and type(cut.model) is type(trained.model)
    assert fl.cost(cut.graph).parameters < 0.5 * fl.cost(trained.graph).parameters
    name = "stem.0.weight"
    assert np.array_equal(cut.graph.weight(name).numpy(), trained.graph.weight(name).numpy()[cut.plan.weights[name][0]])


class Pointwise(nn.Module):
    """Convolutions and norms whose readers see a constant where a gain is zero."""

    def __init__(self, kernel: int, bias: bool) -> None:
        super().__init__()
        pad = kernel // 2
        self.a, self.na = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.nb = nn.Conv2d(8, 6, kernel, padding=pad, bias=bias), nn.BatchNorm2d(6)
        self.c, self.d = nn.Conv2d(6, 8, kernel, padding=pad), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.na(self.a(x)))
        x = F.gelu(self.nb(self.b(x)) + 0.3)
        return self.d(F.relu(self.c(x)).mean((2, 3)))


def silent(kernel: int, bias: bool, size: int = 8) -> tuple[Pointwise, tuple[Tensor, ...], dict[str, list[int]]]:
    torch.manual_seed(1)
    model = Pointwise(kernel, bias)
    for m in (model.na, model.nb):
        nn.init.normal_(m.bias)
        nn.init.uniform_(m.running_mean, -1, 1)
        nn.init.uniform_(m.running_var, 0.5, 2)
    with torch.no_grad():
        model.na.weight[[1, 4, 5]] = 0
        model.nb.weight[[0, 3]] = 0
    kept = {"a.weight:0": [0, 2, 3, 6, 7], "b.weight:0": [1, 2, 4, 5]}
    return model.eval(), (torch.randn(2, 3, size, size),), kept


@pytest.mark.parametrize("bias", [False, True])
def test_absorbing_a_constant_is_exact_at_one_by_one(bias: bool) -> None:
    model, x, kept = silent(1, bias)
    result = P.cut(model, x, kept=kept)
    assert type(result.model) is Pointwise  # into the bias or the running mean: no new operator
    assert torch.allclose(result.model(x[0]), model(x[0]), atol=1e-5)
    plain = P.cut(model, x, kept=kept, absorb=False)
    assert (plain.model(x[0]) - model(x[0])).abs().max() > 0.01


def test_absorbing_on_onnx() -> None:
    """The exporter folds the norms: what is left is a bias behind rows of zeros."""
    model, x, kept = silent(1, True)
    proto = exported(model, x)
    result = P.cut(proto, x, kept=kept)
    assert np.allclose(result.graph.run(result.graph.bind(x), [])[0][0], model(x[0]).detach(), atol=1e-5)


def test_absorbing_is_near_exact_at_padded_borders() -> None:
    model, x, kept = silent(3, False, size=24)
    with torch.no_grad():  # the inner constant alone: the outer one would pass two padded readers
        model.na.weight[:] = 1
    kept.pop("a.weight:0")
    result, plain = P.cut(model, x, kept=kept), P.cut(model, x, kept=kept, absorb=False)
    taps = []
    for m in (model, result.model):
        m.c.register_forward_hook(lambda m, i, o: taps.append(o))
        m(x[0])
    assert (taps[0] - taps[1]).mean((0, 2, 3)).abs().max() < 1e-5  # unbiased over the positions
    error = (result.model(x[0]) - model(x[0])).norm()
    assert 1e-5 < error < 0.3 * (plain.model(x[0]) - model(x[0])).norm()
    assert any("since it pads" in d.reason for d in result.report.passes[0].decisions)


def test_a_residual_width_carries_the_sum_of_the_constants() -> None:
    model, x = cnn()
    with torch.no_grad():
        for m in (model.stem[1], model.a2[1]):
            m.weight[[2, 5]] = 0
            m.bias[[2, 5]] = 0.7
    inner = x[0].new_zeros(2, 3, 40, 40).normal_()
    kept = {"stem.0.weight:0": [0, 1, 3, 4, 6, 7]}
    result, plain = P.cut(model, (inner,), kept=kept), P.cut(model, (inner,), kept=kept, absorb=False)
    wanted = model(inner)
    assert (result.model(inner) - wanted).norm() < 0.35 * (plain.model(inner) - wanted).norm()
    absorbed = {d.subject for d in result.report.passes[0].decisions if d.action == "absorbed"}
    assert len(absorbed) == 3  # both branches and the projection


def test_errors() -> None:
    model, x = mlp()
    with pytest.raises(ConstraintError, match="nothing to regularize"):
        P.regularize(model, x, "bn_l1")
    with pytest.raises(ConfigError, match="unknown kind"):
        P.regularize(model, x, "lasso")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="positive"):
        P.regularize(model, x, strength=0)
    with pytest.raises(ConfigError, match="either prune or ratio"):
        P.regularize(model, x, prune=P.Prune(ratio=0.5), ratio=0.5)
    with pytest.raises(ConstraintError, match="matches nothing"):
        P.regularize(model, x, ignore=["nope"])
    with pytest.raises(ConstraintError, match="no such axis group"):
        P.cut(model, x, kept={"0.wieght:0": [0]})
    with pytest.raises(ConstraintError, match="out of range"):
        P.cut(model, x, kept={"0.weight:0": [8]})
    with pytest.raises(ConstraintError, match="cannot be cut"):
        P.cut(model, x, kept={"2.weight:0": [0]})


@pytest.mark.slow
def test_masked_l1_on_a_trained_resnet20() -> None:
    """F1-04: masked gains below 1e-2, the rest less shrunk than by a global L1, slicing moves accuracy below 0.1%."""
    images, labels = cifar10("train", 1280)
    test_images, test_labels = cifar10("test", 2000)
    x = (images[:2],)
    ends: dict[str, Any] = {}
    for kind in ("masked_l1", "bn_l1"):
        torch.manual_seed(0)
        model = trained_resnet(20).train()
        inner = [f"layer{i}.{j}.conv2.weight:0" for i in (1, 2, 3) for j in (0, 1, 2)]
        prune = P.Prune(criterion="norm_scale", ratio=0.3, ignore=["conv1.weight:0", *_outer(model, x, inner)])
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        with P.regularize(model, x, kind, 2.0, prune=prune, mode="proximal") as hooks:
            mask = hooks.kept() if kind == "masked_l1" else ends["mask"]
            for _ in range(3):
                for i in torch.randperm(len(images)).split(64):
                    optimizer.zero_grad()
                    F.cross_entropy(model(images[i]), labels[i]).backward()
                    optimizer.step()
        named = dict(model.named_parameters())
        kept_ratio, gone = [], []
        for name, keep in mask.items():
            gain = name.replace("conv", "bn").removesuffix(":0")
            now, was = named[gain].detach().abs(), start[gain].abs()
            rest = np.setdiff1d(np.arange(len(now)), keep)
            kept_ratio.append((now[keep] / was[keep].clamp(min=1e-3)).mean().item())
            gone.append(now[rest].max().item())
        ends[kind] = np.mean(kept_ratio)
        if kind == "masked_l1":
            ends["mask"] = mask
            assert max(gone) < 1e-2
            whole = accuracy(model.eval(), test_images, test_labels)
            cut = hooks.prune()
            assert abs(accuracy(cut.model.eval(), test_images, test_labels) - whole) <= 1e-3
    assert ends["masked_l1"] > 0.9 and ends["masked_l1"] > ends["bn_l1"] + 0.1


def _outer(model: nn.Module, x: tuple[Tensor, ...], inner: list[str]) -> list[str]:
    """The groups that cross residual additions: they stay whole."""
    groups = fl.axis_groups(fl.load(model, x))
    return [g.name for g in groups if g.can("select") and len(g.members) > 8 and g.name not in inner]
