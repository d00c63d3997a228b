"""Adapters that are no plain low-rank product: Tucker, Kronecker, SVD, Bone, transforms, scales, bottlenecks, parts."""

from __future__ import annotations

import copy
from typing import Any

import foldline as fl
import numpy as np
import pytest
import torch
from foldline import passes as P
from foldline.passes.adapters import Entry, Geometry, NotFoldable, View, kind_of
from foldline.passes.adapters.adapter import merged_weight
from foldline.passes.adapters.disjoint import merge_disjoint, split_adapter
from foldline.passes.adapters.factors import factorise_kron, kron_apply, kron_sum, tucker
from foldline.passes.adapters.spectra import rank_of_energy
from foldline.passes.adapters.training import freeze_most_moved, penalty
from foldline.passes.adapters.transforms import as_transform, cayley, transformed, unfold_bone
from torch import nn
from torch.nn import functional as F


def relative(a: Any, b: Any) -> float:
    x, y = (np.asarray(v.detach() if isinstance(v, torch.Tensor) else v, dtype=np.float64) for v in (a, b))
    return float(np.abs(x - y).max() / np.abs(y).max())


def perturb(model: nn.Module, scale: float = 0.3) -> nn.Module:
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn_like(p))
    return model


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def entry_of(model: nn.Module, target: str = "weight") -> Entry:
    return next(e for e in P.adapter_of(model).entries if e.target == target)


def linear(out: int = 12, inp: int = 8, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inp, out, bias=bias).eval()


# ---- F5-05: Tucker --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layer", [
    nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 12, 3, groups=4),
    nn.Conv2d(8, 8, 3, groups=8), nn.Conv1d(6, 8, 5), nn.Conv3d(4, 6, 2),
    nn.ConvTranspose2d(6, 8, 3, stride=2), nn.ConvTranspose2d(8, 6, 3, groups=2),
], ids=lambda m: f"{type(m).__name__}-{m.groups}")  # fmt: skip
def test_tucker_in_every_dimension(layer: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, layer.in_channels, *[9] * (layer.weight.ndim - 2))
    tuned = P.insert_adapter(layer.eval(), kind="tucker", options={"ranks": [3, 2]}).model
    assert torch.equal(tuned(x), layer(x))
    g = entry_of(tuned).view.geometry(tuple(layer.weight.shape))
    r = [min(3, g.out), min(2, g.inp), *g.kernel]
    assert count(tuned) == int(np.prod(r)) + sum(a * b for a, b in zip(r, g.shape, strict=True))
    perturb(tuned)
    merged = P.merge_adapter(tuned)
    assert relative(merged.model(x), tuned(x)) < 1e-5 and torch.equal(merged.unmerge().weight, layer.weight)


def test_tucker_is_the_papers_einsum_and_lora_where_the_core_is_the_identity() -> None:
    rng = np.random.default_rng(0)
    core, sides = rng.standard_normal((2, 3, 2, 2)), [rng.standard_normal(s) for s in ((5, 2), (4, 3), (3, 2), (3, 2))]
    want = np.einsum("abcd,oa,ib,hc,wd->oihw", core, *sides)
    assert relative(tucker(core, sides), want) < 1e-12
    b, a = rng.standard_normal((5, 3)), rng.standard_normal((3, 4))
    w = rng.standard_normal((5, 4))
    one, _ = merged_weight(
        w, None, Entry("w", "tucker", {"core": np.eye(3), "factor0": b, "factor1": a.T}, {"scale": 0.5})
    )
    two, _ = merged_weight(w, None, Entry("w", "lora", {"A": a, "B": b}, {"scale": 0.5}))
    assert relative(one, two) < 1e-12


# ---- F5-12: Bone ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["affine", "plain"])
@pytest.mark.parametrize("transposed", [False, True])
def test_bone_by_blocks_in_both_modes_and_back(mode: str, transposed: bool) -> None:
    rng = np.random.default_rng(0)
    w, b = rng.standard_normal((12, 8)), rng.standard_normal((3, 4, 4)) * 0.3
    view = View(transposed)
    entry = Entry("w", "bone", {"B": b}, {"rank": 4, "mode": mode}, view)
    stored = w.T.copy() if transposed else w
    new, _ = merged_weight(stored, None, entry)
    new = new.T if transposed else new
    want = w.copy()
    for j in range(3):
        for i in range(2):
            block = w[4 * j : 4 * j + 4, 4 * i : 4 * i + 4]
            want[4 * j : 4 * j + 4, 4 * i : 4 * i + 4] += block @ b[j] + b[j] if mode == "affine" else b[j]
    assert relative(new, want) < 1e-12 and relative(unfold_bone(new, b, mode), w) < 1e-10
    none, _ = merged_weight(stored, None, Entry("w", "bone", {"B": 0 * b}, {"rank": 4, "mode": mode}, view))
    assert np.array_equal(none, stored)


def test_bone_refuses_blocks_that_do_not_divide_and_lost_bases() -> None:
    with pytest.raises(fl.ConstraintError, match="divide"):
        P.insert_adapter(linear(), kind="bone", rank=5)
    with pytest.raises(fl.ConstraintError, match="singular"):
        unfold_bone(np.ones((4, 4)), -np.eye(4)[None])


# ---- F5-14: transform + residual ------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, options", [
    ("lora", {"rank": 3}), ("dora", {"rank": 3, "per": "in"}), ("oft", {"block": 4}), ("bone", {"rank": 4}),
    ("bone", {"rank": 4, "mode": "plain"}), ("transform", {"rank": 2, "sizes": [2, 4]}), ("tucker", {"rank": 3}),
])  # fmt: skip
def test_special_cases_of_the_transform_agree_with_their_own_formula(kind: str, options: dict[str, Any]) -> None:
    layer = linear()
    tuned = perturb(P.insert_adapter(layer, kind=kind, options=options).model)
    entry, w = entry_of(tuned), layer.weight.detach().numpy()
    t, delta = as_transform(w, entry)
    own, _ = merged_weight(w, None, entry)
    assert relative(transformed(w, t, delta), own) < 1e-5 and relative(own, w) > 1e-3
    assert relative(P.merge_adapter(tuned).model.weight, own) < 1e-6


def test_the_ring_starts_as_the_identity_and_learns() -> None:
    layer, x = linear(), torch.randn(16, 8)
    tuned = P.insert_adapter(layer, kind="transform", rank=2, options={"ring_rank": 3}).model
    assert relative(tuned(x), layer(x)) < 1e-6
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], 0.02)
    for _ in range(3):
        optimizer.zero_grad()
        (tuned(x) ** 2).sum().backward()
        optimizer.step()
    cores = [p for n, p in tuned.named_parameters() if "core" in n]
    assert all((p.grad != 0).any() for p in cores)
    with pytest.raises(fl.ConstraintError, match="multiply"):
        P.insert_adapter(layer, kind="transform", options={"sizes": [3, 3]})


def test_oft_is_orthogonal() -> None:
    r = cayley(np.random.default_rng(0).standard_normal((2, 4, 4)))
    assert np.abs(r @ r.swapaxes(-1, -2) - np.eye(4)).max() < 1e-12
    tuned = perturb(P.insert_adapter(linear(), kind="oft", options={"block": 4}).model)
    merged = P.merge_adapter(tuned).model
    assert relative(merged.weight.norm(dim=1), linear().weight.norm(dim=1)) < 1e-5


# ---- F5-15: Kronecker sums ------------------------------------------------------------------------------------------
def test_kronecker_sums_apply_without_the_dense_matrix_and_van_loan_recovers_them() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 4, 2)), rng.standard_normal((3, 5, 6))
    dense = kron_sum(a, b)
    assert relative(dense, sum(np.kron(a[i], b[i]) for i in range(3))) < 1e-12
    x = rng.standard_normal((7, 12))
    assert relative(kron_apply(a, b, x), x @ dense.T) < 1e-12
    x32 = [torch.from_numpy(v).float() for v in (a, b, x)]
    assert relative(kron_apply(*x32), x @ dense.T) < 1e-5
    left, right, error = factorise_kron(dense, (4, 2), 3)
    assert error < 1e-12 and relative(kron_sum(left, right), dense) < 1e-12
    assert factorise_kron(dense, (4, 2), 2)[2] > 1e-2
    with pytest.raises(fl.ConstraintError, match="divide"):
        factorise_kron(dense, (3, 2), 1)


@pytest.mark.parametrize("kind", ["kron", "compacter"])
def test_layers_share_one_left_factor(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12)).eval()
    options = {"terms": 2, **({"size": 2, "share": ["A"]} if kind == "kron" else {"rank": 4})}
    result = P.insert_adapter(model, kind=kind, options=options)
    tuned, x = perturb(result.model), torch.randn(3, 8)
    shared = {id(p) for n, p in tuned.named_parameters(remove_duplicate=False) if n.endswith(".A")}
    assert len(shared) == 1 and result.report.passes[0].details["trainable"] == count(tuned)
    if kind == "compacter":
        with pytest.raises(NotFoldable):
            P.merge_adapter(tuned)
        return
    adapter = P.adapter_of(tuned)
    assert adapter.count() == count(tuned) and adapter.entries[0].tensors["A"] is adapter.entries[1].tensors["A"]
    assert relative(P.merge_adapter(tuned).model(x), tuned(x)) < 1e-5


# ---- F5-16, F5-17, F5-18: the SVD family ----------------------------------------------------------------------------
def test_svfit_trains_the_leading_singular_values() -> None:
    layer, x = linear(20, 16), torch.randn(4, 16)
    tuned = P.insert_adapter(layer, kind="svfit", options={"energy": 0.99}).model
    s = np.linalg.svd(layer.weight.detach().double().numpy(), compute_uv=False)
    r, energy = count(tuned), np.cumsum(s**2) / (s**2).sum()
    assert r == rank_of_energy(s, 0.99) and energy[r - 1] >= 0.99 > energy[r - 2]
    assert torch.equal(tuned(x), layer(x))
    perturb(tuned)
    t = {k: v.detach().double().numpy() for k, v in tuned.weight_adapter.tensors().items()}
    residual = layer.weight.detach().double().numpy() - (t["U"] * t["s_start"]) @ t["V"]
    merged = P.merge_adapter(tuned).model
    assert relative(merged.weight, residual + (t["U"] * t["s"]) @ t["V"]) < 1e-6
    assert relative(merged(x), tuned(x)) < 1e-5


def test_vectorfit_trains_all_singular_values_and_biases() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Conv1d(1, 4, 3), nn.Linear(10, 3, bias=False)).eval()
    x = torch.randn(5, 1, 8)
    tuned = P.insert_adapter(model, kind="vectorfit").model
    assert count(tuned) == 8 + 3 + 3 + (12 + 4) and relative(tuned(x), model(x)) < 1e-5
    perturb(tuned)
    merged = P.merge_adapter(tuned)
    assert relative(merged.model(x), tuned(x)) < 1e-5
    moved = {
        f"{path}.{n}": float((p.detach() - dict(m.named_buffers()).get(f"{n}_start", torch.zeros(()))).abs().mean())
        for path, m in tuned.named_modules()
        for n, p in m.named_parameters(recurse=False)
        if "adapter" in path
    }
    frozen = freeze_most_moved(tuned, 2)
    assert frozen == sorted(moved, key=lambda n: -moved[n])[:2]
    assert {n for n, p in tuned.named_parameters() if "adapter" in n and not p.requires_grad} == set(frozen)


def test_sorsa_keeps_its_residual_and_its_vectors_orthonormal() -> None:
    layer = linear(20, 16)
    torch.manual_seed(1)
    x, goal = torch.randn(64, 16), torch.randn(64, 20)

    def fit(weight: float) -> tuple[nn.Module, float]:
        tuned = P.insert_adapter(layer, kind="sorsa", rank=4).model
        optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], 0.01)
        for _ in range(40):
            optimizer.zero_grad()
            (F.mse_loss(tuned(x), goal) + weight * penalty(tuned)).backward()
            optimizer.step()
        return tuned, float(penalty(tuned).detach())

    tuned, kept = fit(0.1)
    _, loose = fit(0.0)
    assert kept < loose / 2
    state = P.insert_adapter(layer, kind="sorsa", rank=4).model.state_dict()
    for name in ("weight", "weight_adapter.U_start", "weight_adapter.s_start", "weight_adapter.V_start"):
        assert torch.equal(tuned.state_dict()[name], state[name])
    assert relative(P.merge_adapter(tuned).model(x), tuned(x)) < 1e-5


# ---- F5-11: IA3; F5-01: SSF -----------------------------------------------------------------------------------------
class Attention(nn.Module):
    """Separate projections with fewer heads for keys and values, and a feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = nn.Linear(12, 12), nn.Linear(12, 6), nn.Linear(12, 6), nn.Linear(12, 12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, 3)).transpose(1, 2) for m in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(x)))


def test_ia3_scales_rows_of_keys_and_values_and_columns_of_the_next_projection() -> None:
    model, x = Attention().eval(), torch.randn(2, 5, 12)
    targets = {"k": {}, "v": {}, "down": {"axis": "in"}}
    tuned = P.insert_adapter(model, kind="ia3", targets=targets).model
    assert relative(tuned(x), model(x)) == 0
    perturb(tuned)
    lk, ff = tuned.k.weight_adapter.l.detach(), tuned.down.weight_adapter.l.detach()
    merged = P.merge_adapter(tuned).model
    assert torch.allclose(merged.k.weight, model.k.weight * lk[:, None]) and torch.allclose(
        merged.k.bias, model.k.bias * lk
    )
    assert torch.allclose(merged.down.weight, model.down.weight * ff) and torch.equal(merged.down.bias, model.down.bias)
    assert relative(merged(x), tuned(x)) < 1e-5
    wrong = Entry("up.weight", "ia3", {"l": ff.numpy()}, {"axis": "in"})
    with pytest.raises(fl.ConstraintError, match=r"up\.weight"):
        P.merge_adapter(model, P.Adapter([wrong]))


def test_ia3_scales_the_inputs_of_every_group() -> None:
    conv, x = nn.Conv2d(8, 12, 3, groups=4).eval(), torch.randn(2, 8, 6, 6)
    tuned = perturb(P.insert_adapter(conv, kind="ia3", options={"axis": "in"}).model)
    want = conv(x * tuned.weight_adapter.l.detach().view(-1, 1, 1))
    assert relative(tuned(x), want) < 1e-5 and relative(P.merge_adapter(tuned).model(x), want) < 1e-5


def test_ssf_behind_every_kind_of_layer_with_negative_scales() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(2),
        nn.LayerNorm(25), nn.Linear(25, 6),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 6, 6)
    tuned = P.insert_adapter(model, kind="ssf").model
    assert relative(tuned(x), model(x)) < 1e-6
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "adapter" in name:
                p.copy_(torch.randn_like(p))
    h = x
    for plain, own in zip(model, tuned, strict=True):
        h = plain(h)
        a = getattr(own, "weight_adapter", None)
        if a is not None:
            shape = (-1, *[1] * (h.ndim - 2)) if h.ndim == 4 else (-1,)
            h = h * a.scale.view(shape) + a.shift.view(shape)
    assert relative(tuned(x), h) < 1e-5
    merged = P.merge_adapter(tuned)
    assert relative(merged.model(x), h) < 1e-5 and merged.model[0].bias is not None
    assert merged.unmerge()[0].bias is None
    with pytest.raises(fl.ConstraintError, match="bias"):
        P.insert_adapter(nn.Embedding(5, 4), kind="ssf", targets=["weight"])


# ---- F5-04, F5-10: what stays in the model --------------------------------------------------------------------------
def test_bottlenecks_compute_what_the_unified_view_says() -> None:
    layer, x = linear(), torch.randn(3, 5, 8)
    tuned = perturb(P.insert_adapter(layer, kind="bottleneck", options={"rank": 4, "scale": 0.5}).model)
    a = tuned.output_adapter
    h = layer(x)
    want = h + 0.5 * (F.relu(h @ a.down.T + a.down_bias) @ a.up.T + a.up_bias)
    assert relative(tuned(x), want) < 1e-5
    side = perturb(P.insert_adapter(layer, kind="parallel_adapter", options={"rank": 4}).model)
    a = side.output_adapter
    assert relative(side(x), h + 4 * (F.relu(x @ a.down.T + a.down_bias) @ a.up.T + a.up_bias)) < 1e-5
    conv, image = nn.Conv2d(3, 6, 3).eval(), torch.randn(2, 3, 7, 7)
    assert relative(perturb(P.insert_adapter(conv, kind="bottleneck").model)(image), conv(image)) > 1e-2


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_heads, self.qkv, self.proj = 2, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_prefixes_are_gated_attention_over_learned_keys() -> None:
    model, x = Fused().eval(), torch.randn(2, 5, 8)
    tuned = P.insert_adapter(model, (x,), kind="prefix", targets=["qkv[0/3]"], options={"length": 3}).model
    assert relative(tuned(x), model(x)) == 0
    perturb(tuned)
    a = tuned.proj.prefix_adapter
    q, k, v = model.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    h = F.scaled_dot_product_attention(q, k, v)
    keys, values = (t.unflatten(-1, (2, 4)).transpose(0, 1) for t in (a.key, a.value))
    p = torch.softmax(q @ keys.transpose(-1, -2) / 2, -1) @ values
    want = model.proj(((1 - a.gate) * h + a.gate * p).transpose(1, 2).flatten(2))
    assert relative(tuned(x), want) < 1e-5
    assert torch.equal(copy.deepcopy(tuned)(x), tuned(x))
    with pytest.raises(NotFoldable, match="prefix"):
        P.merge_adapter(tuned)
    with pytest.raises(fl.ConstraintError, match="output projection"):
        P.insert_adapter(nn.Sequential(linear(8, 8)), kind="prefix", targets=["0"])


# ---- F5-32: disjoint parts ------------------------------------------------------------------------------------------
def test_disjoint_parts_merge_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    tensors = {"down": rng.standard_normal((4, 9)).astype(np.float32), "up": -np.zeros((9, 4), np.float16)}
    parts, masks = split_adapter(tensors, 3, seed=1)
    for name, data in tensors.items():
        assert (np.sum([m[name] for m in masks], axis=0) == 1).all()
        assert relative(sum(p[name].astype(np.float64) for p in parts) + 1, data + 1.0) < 1e-7
        merged = merge_disjoint(parts, masks)[name]
        assert merged.tobytes() == data.tobytes() and merged.dtype == data.dtype
    parts[1]["down"] = np.where(masks[1]["down"], np.float32(7), parts[1]["down"])
    assert (merge_disjoint(parts, masks)["down"][masks[1]["down"]] == 7).all()
    masks[0]["down"] = masks[0]["down"] | masks[1]["down"]
    with pytest.raises(fl.ConstraintError, match="disjoint"):
        merge_disjoint(parts, masks)


def test_geometry_counts_what_a_matrix_has() -> None:
    g = Geometry(8, 3, (2, 2), groups=2)
    assert g.shape == (8, 3, 2, 2) and g.columns == 12 and g.small == 8
    assert kind_of("lora").options({"rank": 2})["scale"] == 1.0
