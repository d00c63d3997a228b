"""Low-rank adapters as their papers have them: initialisations from data, budgets, growth, gates, seeds, penalties."""

from __future__ import annotations

import copy
import math
from typing import Any

import foldline as fl
import numpy as np
import pytest
import torch
from foldline import passes as P
from foldline.passes.adapters import Entry, NotFoldable, kind_of
from foldline.passes.adapters.adapter import merged_weight
from foldline.passes.adapters.attach import weight_adapters
from foldline.passes.adapters.gather import IncrementalSVD
from foldline.passes.adapters.low_rank_variants import uniform_stream
from foldline.passes.adapters.ranks import (
    RankImportance,
    adapter_importance,
    allocate_budget,
    budget_at,
    compact_rank,
    grow_rank,
    keep_ranks,
    mask_ranks,
    most_important,
    ranks,
)
from foldline.passes.adapters.training import penalty, shrink_gates
from torch import nn
from torch.nn import functional as F


class MLP(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two, self.three = nn.Linear(12, 20), nn.Linear(20, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))


def data(seed: int = 0, count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 12, generator=g) @ torch.diag(torch.linspace(2, 0.1, 12))
    return x, (x[:, :5] + 0.3 * x[:, 5:10]).argmax(1)


def loss_of(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return F.cross_entropy(output, data()[1])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def fit(model: nn.Module, steps: int, lr: float = 0.01, optimizer: Any = None, extra: Any = None) -> float:
    x, y = data()
    optimizer = optimizer or torch.optim.Adam(trained(model), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) + (extra(model) if extra else 0)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


def perturb(model: nn.Module, scale: float = 0.3) -> nn.Module:
    torch.manual_seed(3)
    with torch.no_grad():
        for p in trained(model):
            p.add_(scale * torch.randn_like(p))
    return model


# ---- magnitudes: F5-09, F5-13 ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("per", ["out", "in"])
def test_dora_is_its_formula_on_both_norm_axes_and_survives_zero_rows(per: str) -> None:
    model, (x, _) = MLP(), data()
    with torch.no_grad():
        model.one.weight[3] = 0
        model.one.weight[:, 5] = 0
    tuned = P.insert_adapter(model, kind="dora", rank=3, options={"per": per}).model
    assert relative(tuned(x), model(x)) < 1e-6
    F.cross_entropy(tuned(x), data()[1]).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained(tuned))
    perturb(tuned)
    a = tuned.two.weight_adapter.tensors()
    moved = model.two.weight.detach().double() + a["B"].double() @ a["A"].double()
    dim = 1 if per == "out" else 0
    want = moved / moved.norm(dim=dim, keepdim=True) * a["magnitude"].double().unsqueeze(dim)
    merged = P.merge_adapter(tuned).model
    assert relative(merged.two.weight, want) < 1e-6 and relative(merged(x), tuned(x)) < 1e-5
    assert torch.isfinite(merged.one.weight).all()


def test_bora_has_magnitudes_of_both_axes_in_this_order() -> None:
    model = MLP()
    tuned = perturb(P.insert_adapter(model, kind="bora", rank=3).model)
    a = {k: v.detach().double().numpy() for k, v in tuned.two.weight_adapter.tensors().items()}
    assert a["magnitude_in"].size + a["magnitude_out"].size == 20 + 16
    w = model.two.weight.detach().double().numpy() + a["B"] @ a["A"]
    columns = w / np.linalg.norm(w, axis=0) * a["magnitude_in"]
    want = columns / np.linalg.norm(columns, axis=1, keepdims=True) * a["magnitude_out"][:, None]
    got = P.merge_adapter(tuned).model.two.weight.detach().numpy()
    assert np.abs(got - want).max() < 1e-6
    rows = w / np.linalg.norm(w, axis=1, keepdims=True) * a["magnitude_out"][:, None]
    swapped = rows / np.linalg.norm(rows, axis=0) * a["magnitude_in"]
    assert np.abs(got - swapped).max() > 1e-3
    entry = next(e for e in P.adapter_of(tuned).entries if e.target == "two.weight")
    t = entry.tensors
    turned = {**t, "magnitude_in": t["magnitude_out"], "magnitude_out": t["magnitude_in"]}
    with pytest.raises(fl.ConstraintError):
        P.merge_adapter(model, P.Adapter([Entry("two.weight", "bora", turned, entry.options)]))


# ---- budgets: F5-19 --------------------------------------------------------------------------------------------------
def test_adalora_meets_its_budget_and_dropping_ranks_keeps_the_function() -> None:
    model, (x, y) = MLP(), data()
    tuned = P.insert_adapter(model, kind="adalora", rank=4).model
    optimizer, importance = torch.optim.Adam(trained(tuned), 0.02), RankImportance(tuned)
    schedule = [budget_at(i, 12, 5, 4, 30, 8) for i in range(30)]
    assert schedule[0] == 12 and schedule[-1] == 5 and schedule == sorted(schedule, reverse=True)
    for budget in schedule:
        optimizer.zero_grad()
        (F.cross_entropy(tuned(x), y) + 0.1 * penalty(tuned)).backward()
        importance.update()
        optimizer.step()
        kept = allocate_budget(importance.scores(), budget)
        mask_ranks(tuned, kept)
    assert sum(len(k) for k in kept.values()) == 5
    want = tuned(x)
    left = compact_rank(tuned, optimizer)
    assert sum(left.values()) == 5 and relative(tuned(x), want) < 1e-6
    assert all(r > 0 for r in left.values())
    assert relative(P.merge_adapter(tuned).model(x), want) < 1e-5
    fit(tuned, 1, optimizer=optimizer)  # the optimizer's state still fits


def test_layers_of_rank_zero_vanish() -> None:
    tuned = P.insert_adapter(MLP(), kind="adalora", rank=2).model
    left = keep_ranks(tuned, {"one.weight_adapter": [], "two.weight_adapter": [1]})
    assert left == {"two.weight_adapter": 1, "three.weight_adapter": 2}
    assert type(tuned.one) is nn.Linear and "one.weight_adapter" not in dict(tuned.named_modules())
    assert {e.target for e in P.adapter_of(tuned).entries} == {"two.weight", "three.weight"}
    with pytest.raises(fl.ConstraintError, match="budget"):
        allocate_budget({"a": np.ones(2)}, 3)


# ---- growth: F5-20, F5-21 --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["increlora", "lora", "triangular_lora", "dora", "group_lora", "adalora"])
def test_growth_keeps_the_function_and_extends_the_optimizer(kind: str) -> None:
    model, (x, _) = MLP(), data()
    tuned = P.insert_adapter(model, kind=kind, rank=2).model
    optimizer = torch.optim.Adam(trained(tuned), 0.01)
    fit(tuned, 5, optimizer=optimizer)
    adapter = tuned.two.weight_adapter
    before = tuned(x)
    moments = optimizer.state[adapter.A]["exp_avg"].clone()
    axis = adapter.kind.ranks["A"]
    for chosen in (most_important(adapter_importance(tuned, "sensitivity"), 2), {"two.weight_adapter": 2}):
        sizes = ranks(tuned)
        grown = grow_rank(tuned, chosen, optimizer)
        assert all(grown[p] == sizes[p] + chosen.get(p, 0) for p in grown)
        assert relative(tuned(x), before) <= 1e-6
    state = optimizer.state[adapter.A]["exp_avg"]
    assert state.shape == adapter.A.shape
    assert torch.equal(state.narrow(axis, 0, 2), moments) and not state.narrow(axis, 2, 2).any()
    assert float(optimizer.state[adapter.A]["step"]) == 5
    kept = adapter.A.detach().clone()
    fit(tuned, 5, optimizer=optimizer)
    assert all(not torch.equal(kept.select(axis, i), adapter.A.detach().select(axis, i)) for i in range(4))
    assert relative(P.merge_adapter(tuned).model(x), tuned(x)) < 1e-5


def test_triangles_stay_triangles() -> None:
    model = MLP()
    tuned = P.insert_adapter(model, kind="triangular_lora", rank=4).model
    assert not adapter_importance(tuned)["one.weight_adapter"]
    fit(tuned, 6)
    a, b = tuned.two.weight_adapter.A.detach(), tuned.two.weight_adapter.B.detach()
    assert torch.equal(a, a.triu()) and torch.equal(b, b.tril()) and b.abs().sum() > 0
    grow_rank(tuned, {"two.weight_adapter": 1})
    a = tuned.two.weight_adapter.A.detach()
    want = tuned.two.weight_adapter.B.detach().tril() @ a.triu()
    merged = P.merge_adapter(tuned).model
    assert relative(merged.two.weight - model.two.weight, want) < 1e-4


# ---- gates: F5-22 ----------------------------------------------------------------------------------------------------
def test_sparse_gates_reach_zero_and_compacting_keeps_the_function() -> None:
    model, (x, y) = MLP(), data()
    tuned = P.insert_adapter(model, kind="gated_lora", rank=6).model
    optimizer = torch.optim.SGD(trained(tuned), 0.05)
    zeros = 0
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(tuned(x), y).backward()
        optimizer.step()
        zeros = shrink_gates(tuned, 0.05 * 0.21)
    assert 0 < zeros < 18
    want = tuned(x)
    left = compact_rank(tuned)
    assert sum(left.values()) == 18 - zeros and relative(tuned(x), want) < 1e-6
    assert relative(P.merge_adapter(tuned).model(x), want) < 1e-5


# ---- initialisations: F5-23, F5-24, F5-25 ----------------------------------------------------------------------------
def test_gradient_initialisation_takes_disjoint_directions_and_learns_faster() -> None:
    x, y = data()
    better = 0
    for seed in range(3):
        model = MLP(seed)
        tuned = P.insert_adapter(
            model, kind="lora", rank=2, init="gradient", loss=loss_of, calibration=[x], targets=["one", "two"]
        ).model
        assert relative(tuned(x), model(x)) == 0
        twin = copy.deepcopy(model)
        F.cross_entropy(twin(x), y).backward()
        u, _, vt = torch.linalg.svd(twin.two.weight.grad.double(), full_matrices=False)
        a, b = tuned.two.weight_adapter.A.detach().double(), tuned.two.weight_adapter.B.detach().double()
        onto_v, onto_u = (F.normalize(a, dim=1) @ vt.T).abs(), (u.T @ F.normalize(b, dim=0)).abs()
        assert (onto_v[:, :2].diagonal() > 0.999).all() and (onto_u[2:4].diagonal() > 0.999).all()
        assert onto_u[:2].max() < 1e-3
        plain = P.insert_adapter(model, kind="lora", rank=2, targets=["one", "two"]).model
        better += fit(tuned, 50, 0.01) < fit(plain, 50, 0.01)
        assert relative(P.merge_adapter(tuned).model(x), tuned(x)) < 1e-5
    assert better == 3
    with pytest.raises(fl.ConfigError, match="at most 2"):
        P.insert_adapter(MLP(), kind="lora", rank=3, init="gradient", loss=loss_of, calibration=[x], targets=["three"])
    with pytest.raises(fl.ConfigError, match="loss"):
        P.insert_adapter(MLP(), kind="lora", init="gradient", calibration=[x])


def test_eva_takes_the_inputs_directions_and_shares_the_ranks_by_explained_variance() -> None:
    model, (x, _) = MLP(), data(count=200)
    batches = [x[i : i + 50] for i in range(0, 200, 50)]
    result = P.insert_adapter(model, kind="lora", rank=3, init="eva", calibration=batches)
    tuned = result.model
    assert torch.equal(tuned(x), model(x))
    a = tuned.one.weight_adapter.A.detach().double()
    assert (a @ a.T - torch.eye(3, dtype=torch.double)).abs().max() < 1e-5
    _, _, vt = torch.linalg.svd(x.double(), full_matrices=False)
    assert (a * vt[:3]).sum(1).abs().min() > math.cos(1e-2)
    flat = [b[:, :1] * x[:1] + b[:, 1:2] * x[1:2] for b in batches]  # two directions explain what the first layer sees
    shared = P.insert_adapter(model, kind="lora", rank=3, init="eva", allocate=True, calibration=flat).model
    assert torch.equal(shared(x), model(x))
    given = ranks(shared)
    assert sum(given.values()) == 9 and given["one.weight_adapter"] == 2
    assert relative(P.merge_adapter(perturb(shared)).model(x), shared(x)) < 1e-5


def test_the_streaming_svd_is_the_svd() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, 120)) * 0.9 ** np.arange(120)
    svd = IncrementalSVD(40)
    for i in range(0, 600, 60):
        svd.update(x[i : i + 60])
    _, s, vt = np.linalg.svd(x, full_matrices=False)
    assert svd.vectors is not None and svd.vectors.shape == (40, 120)
    angles = np.arccos(np.clip(np.abs((svd.vectors[:5] * vt[:5]).sum(1)), 0, 1))
    assert angles.max() < 1e-2 and np.allclose(svd.values[:5], s[:5], rtol=1e-4)
    assert np.isclose(svd.energy().sum(), (s[:40] ** 2).sum() / (s**2).sum(), rtol=1e-2)


def test_update_initialisation_is_one_step() -> None:
    model, (x, y) = MLP(), data()
    common: dict[str, Any] = {"kind": "xs", "init": "update_svd", "loss": loss_of, "calibration": [x]}
    result = P.insert_adapter(model, rank=2, step=1e-3, **common)
    assert all(p.numel() == 4 for p in trained(result.model))
    with torch.no_grad():
        assert F.cross_entropy(result.model(x), y) < F.cross_entropy(model(x), y)
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(x), y).backward()
    full = P.insert_adapter(model, rank=5, step=1e-3, targets=["three"], **common).model
    want = model.three.weight - 1e-3 * twin.three.weight.grad.sign()
    assert relative(full.three.weight, want) < 1e-6
    assert P.InsertAdapter(**{k: v for k, v in common.items() if k != "calibration"}).promise() == P.Contract.FRESH
    plain = P.insert_adapter(model, kind="xs", rank=2).model
    assert torch.equal(plain(x), model(x))


def test_svd_initialisation_is_the_identity_and_trains_the_principal_part() -> None:
    model, (x, _) = MLP(), data()
    tuned = P.insert_adapter(model, kind="lora", rank=3, init="svd").model
    assert torch.equal(tuned(x), model(x))
    t = tuned.two.weight_adapter.tensors()
    u, s, vt = torch.linalg.svd(model.two.weight.detach(), full_matrices=False)
    assert relative(t["B"] @ t["A"], (u[:, :3] * s[:3]) @ vt[:3]) < 1e-5
    with pytest.raises(fl.ConstraintError, match="grow"):
        grow_rank(tuned, {"two.weight_adapter": 1})


# ---- groups, seeds, concepts: F5-26, F5-27, F5-30 --------------------------------------------------------------------
def test_a_group_of_adapters_is_one_of_the_summed_rank() -> None:
    model = MLP()
    tuned = perturb(P.insert_adapter(model, kind="group_lora", rank=2, options={"count": 3}).model)
    entry = next(e for e in P.adapter_of(tuned).entries if e.target == "two.weight")
    a, b = entry.tensors["A"], entry.tensors["B"]
    stacked = {"A": a.reshape(6, -1), "B": b.transpose(1, 0, 2).reshape(16, 6)}
    w = model.two.weight.detach().numpy()
    one, _ = merged_weight(w, None, entry)
    two, _ = merged_weight(w, None, Entry("two.weight", "lora", stacked, {"scale": 1.0}))
    assert np.abs(one - two).max() < 1e-6
    cross = np.einsum("nri,msi->nmrs", a, a)
    own = sum((cross[n, m] ** 2).sum() for n in range(3) for m in range(3) if n != m)
    rule = kind_of("group_lora").penalty
    assert rule is not None and np.isclose(rule({"A": a.astype(np.float64)}), own, rtol=1e-4)
    start = float(penalty(tuned).detach())
    fit(tuned, 20, 0.02, extra=penalty)
    assert float(penalty(tuned).detach()) < start / 2


def test_nola_stores_coefficients_only() -> None:
    model, (x, _) = MLP(), data()
    for rank in (1, 4):
        tuned = P.insert_adapter(model, kind="nola", rank=rank, options={"bases": 7}, targets=["two"]).model
        assert sum(p.numel() for p in trained(tuned)) == 14
    perturb(tuned)
    stored = P.adapter_of(tuned).entries[0].tensors
    assert set(stored) == {"a", "b"} and not any("bases" in k for k in tuned.state_dict())
    assert relative(P.merge_adapter(tuned).model(x), tuned(x)) < 1e-5
    assert np.array_equal(uniform_stream(3, (4, 5)).astype(np.float32), uniform_stream(3, (4, 5)))
    u = uniform_stream(11, (100_000,))
    assert abs(u.mean()) < 0.01 and abs(u.var() - 1 / 3) < 0.01 and -1 <= u.min() and u.max() < 1


def test_concepts_with_constant_gates_are_lora_and_dynamic_gates_refuse() -> None:
    model, (x, _) = MLP(), data()
    options = {"count": 3, "gates": [1.0, 0.5, 0.0]}
    tuned = perturb(P.insert_adapter(model, kind="concept_lora", options=options).model)
    entry = next(e for e in P.adapter_of(tuned).entries if e.target == "two.weight")
    u, v, gate = (entry.tensors[k] for k in ("u", "v", "gate"))
    assert gate.tolist() == [1.0, 0.5, 0.0]
    w = model.two.weight.detach().numpy()
    as_lora, _ = merged_weight(w, None, Entry("w", "lora", {"A": u, "B": v.T * gate}, {"scale": 1.0}))
    assert np.abs(merged_weight(w, None, entry)[0] - as_lora).max() < 1e-12
    assert relative(P.merge_adapter(tuned).model(x), tuned(x)) < 1e-5
    dynamic = P.insert_adapter(model, kind="concept_lora", options={"count": 2, "dynamic": True}).model
    with pytest.raises(NotFoldable, match="dynamic"):
        P.merge_adapter(dynamic)
    assert len(weight_adapters(dynamic)) == 3
