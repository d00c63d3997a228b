"""Adapters, what holds for every kind: insertion is the identity, training works, merging is exact and undone."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import foldline as fl
import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from foldline import passes as P
from foldline.passes.adapters import Entry, NotFoldable, View, kind_of, kinds
from foldline.passes.adapters.adapter import cast_once, merged_weight
from foldline.passes.adapters.attach import weight_adapters
from foldline.passes.adapters.training import penalty
from support.frontends import exported
from torch import nn

OPTIONS: dict[str, dict[str, Any]] = {
    "svfit": {"rank": 3},
    "bone": {"rank": 2},
    "oft": {"block": 4},
    "kron": {"size": 2},
    "nola": {"bases": 6},
    "compacter": {"rank": 4, "terms": 2},
}
OWN = """
lora dora bora adalora increlora gated_lora triangular_lora group_lora concept_lora nola xs svfit vectorfit sorsa tucker
kron transform oft bone ia3 ssf bottleneck parallel_adapter compacter prefix
""".split()
FOLDABLE = [k for k in OWN if kind_of(k).foldable]
LINEAR_ONLY = ("parallel_adapter",)


class Net(nn.Module):
    """Convolutions (plain, grouped, depthwise, transposed), a linear layer without bias, and one with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.grouped = nn.Conv2d(8, 12, 2, groups=4)
        self.back = nn.ConvTranspose2d(12, 8, 2, stride=2, groups=2)
        self.one = nn.Linear(8, 16, bias=False)
        self.two = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.grouped(self.depthwise(torch.relu(self.conv(x))))
        h = torch.relu(self.back(h)).mean((2, 3))
        return self.two(torch.tanh(self.one(h)))


def net() -> tuple[Net, torch.Tensor]:
    model = Net().eval()
    torch.manual_seed(1)
    return model, torch.randn(3, 4, 9, 9)


def options_of(kind: str) -> dict[str, Any]:
    own = OPTIONS.get(kind, {})
    return {**({"rank": 3} if "rank" in kind_of(kind).defaults and "rank" not in own else {}), **own}


def targets_of(kind: str) -> list[str] | None:
    """The blocks of some kinds must divide the weights; the depthwise filters have 9 columns."""
    if kind in ("bone", "oft", "kron"):
        return ["conv", "one", "two"]
    return ["one", "two"] if kind in LINEAR_ONLY else None


def inserted(model: nn.Module, kind: str, example: Any = None, **more: Any) -> nn.Module:
    options = {**options_of(kind), **more.pop("options", {})}
    return P.insert_adapter(
        model, example, kind=kind, targets=more.pop("targets", targets_of(kind)), options=options, **more
    ).model


def train(model: nn.Module, x: torch.Tensor, steps: int = 4) -> list[float]:
    """A few steps of plain PyTorch towards a random target."""
    torch.manual_seed(2)
    goal = torch.randn(model(x).shape)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((model(x) - goal) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def perturb(model: nn.Module, scale: float = 0.2) -> nn.Module:
    """Move everything that trains, as training would."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn_like(p))
    return model


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())


def same_state(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return list(one) == list(two) and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("kind", [k for k in OWN if k != "prefix"])
def test_inserting_is_the_identity_and_training_moves_only_the_adapters(kind: str) -> None:
    model, x = net()
    before, state = model(x), copy.deepcopy(model.state_dict())
    tuned = inserted(model, kind)
    assert type(tuned) is Net and isinstance(tuned.conv, nn.Conv2d) and type(tuned.conv).__name__ == "Conv2d"
    assert relative(tuned(x), before) < 1e-6
    assert {k for k in tuned.state_dict() if k in state} == set(state)  # the base keeps its names
    losses = train(tuned, x)
    assert losses[-1] < losses[0]
    assert all(torch.equal(tuned.state_dict()[k], state[k]) for k in state)
    assert all(torch.equal(model.state_dict()[k], state[k]) for k in state) and torch.equal(model(x), before)
    trained = {n for n, p in tuned.named_parameters() if p.requires_grad}
    assert trained and all("_adapter" in n for n in trained)


@pytest.mark.parametrize("kind", FOLDABLE)
def test_merging_is_exact_and_unmerging_restores_the_bits(kind: str, tmp_path: Path) -> None:
    model, x = net()
    tuned = perturb(inserted(model, kind))
    want = tuned(x)
    assert relative(want, model(x)) > 1e-3  # something was learned
    merged = P.merge_adapter(tuned)
    assert relative(merged.model(x), want) < 1e-5
    extra = set(merged.model.state_dict()) - set(model.state_dict())
    assert set(model.state_dict()) <= set(merged.model.state_dict()) and not weight_adapters(merged.model)
    assert extra == ({"depthwise.bias", "one.bias"} if kind == "ssf" else set())
    assert all(type(a) is type(b) for a, b in zip(merged.model.modules(), model.modules(), strict=True))
    assert same_state(merged.unmerge(), model)
    path = merged.save_originals(tmp_path / "base.safetensors")
    assert same_state(P.unmerge_adapter(merged.model, path), model)
    # float64 end to end: no more than rounding
    wide, double = copy.deepcopy(tuned).double(), x.double()
    assert relative(P.merge_adapter(wide).model(double), wide(double)) < 1e-10


@pytest.mark.parametrize("kind", FOLDABLE)
def test_an_adapter_file_merges_into_its_base_and_nowhere_else(kind: str, tmp_path: Path) -> None:
    model, x = net()
    tuned = perturb(inserted(model, kind))
    want = P.merge_adapter(tuned).model.state_dict()
    path = P.adapter_of(tuned).save(tmp_path / "adapter.safetensors")
    assert P.Adapter.load(path).fingerprint() == P.adapter_of(tuned).fingerprint()
    merged = P.merge_adapter(model, path)
    assert all(torch.equal(merged.model.state_dict()[k], want[k]) for k in want)
    assert same_state(merged.unmerge(), model)
    state = P.merge_adapter(model.state_dict(), path)
    assert set(state.model) == set(want) and all(torch.equal(state.model[k], want[k]) for k in want)
    back = state.unmerge()
    assert set(back) == set(model.state_dict()) and all(torch.equal(back[k], v) for k, v in model.state_dict().items())
    with pytest.raises(fl.ConstraintError, match="already"):
        P.merge_adapter(merged.model, path)
    other = perturb(copy.deepcopy(model), 1e-3)
    with pytest.raises(fl.ConstraintError, match="another base"):
        P.merge_adapter(other, path)
    assert P.merge_adapter(other, path, any_base=True).model is not other


@pytest.mark.parametrize("kind", [k for k in OWN if not kind_of(k).foldable])
def test_what_is_not_linear_refuses_to_merge_by_name(kind: str) -> None:
    definition = kind_of(kind)
    assert definition.flags["foldable"] is False and definition.why_not
    if kind == "prefix":
        return
    tuned = inserted(net()[0], kind)
    with pytest.raises(NotFoldable, match=kind) as error:
        P.merge_adapter(tuned)
    assert error.value.node is not None and "one" in error.value.node or "conv" in str(error.value.node)


def test_every_kind_says_what_can_be_done_with_it() -> None:
    for name, kind in kinds().items():
        assert kind.name == name and kind.paper
        assert kind.foldable == (kind.function == "linear" and (kind.delta is not None or kind.weight is not None))
        assert set(kind.flags) == {"insertable", "foldable", "exact", "identity"}
    assert {k for k in OWN if kind_of(k).foldable} == set(FOLDABLE)
    with pytest.raises(fl.ConfigError, match="did you mean|try"):
        kind_of("loar")


@pytest.mark.parametrize("kind", ["lora", "dora", "ssf", "tucker", "bottleneck", "vectorfit"])
def test_through_the_pipeline_with_verification(kind: str) -> None:
    model, x = net()
    result = P.insert_adapter(model, (x,), kind=kind, options=options_of(kind))
    assert type(result.model) is Net and result.report.passes[0].comparison is not None
    tuned = perturb(result.model)
    if kind_of(kind).foldable:
        merged = P.merge_adapter(tuned, None, (x,))
        assert merged.report.passes[0].comparison["ok"] and relative(merged.model(x), tuned(x)) < 1e-5
        assert same_state(merged.unmerge(), model)


def test_the_exported_model_keeps_no_node_of_a_merged_adapter() -> None:
    model, x = net()
    tuned = perturb(inserted(model, "dora"))
    plain, merged = exported(model, (x,)), exported(P.merge_adapter(tuned).model, (x,))
    assert [n.op_type for n in merged.graph.node] == [n.op_type for n in plain.graph.node]
    onnx.checker.check_model(merged)
    got = fl.load(merged).run({merged.graph.input[0].name: x.numpy()})[0][0]
    assert relative(torch.from_numpy(np.array(got)), tuned(x)) < 1e-4


@pytest.mark.parametrize("kind", ["lora", "dora", "bone"])
def test_folding_the_captured_module_merges_its_adapters_too(kind: str) -> None:
    model, x = net()
    tuned = perturb(inserted(model, kind))
    folded = P.fold(tuned, (x,)).model
    assert type(folded) is Net and relative(folded(x), tuned(x)) < 1e-5
    assert list(folded.state_dict()) == list(model.state_dict())
    merged = P.merge_adapter(tuned).model.state_dict()
    assert all(relative(folded.state_dict()[k], merged[k]) < 1e-6 for k in merged)
    with pytest.raises(fl.ConstraintError, match="no adapters"):
        P.adapter_of(folded)
    assert len(fl.load(folded, (x,)).nodes) == len(fl.load(model, (x,)).nodes)


def test_an_adapted_model_copies_pickles_and_reloads() -> None:
    model, x = net()
    tuned = perturb(inserted(model, "lora"))
    want = tuned(x)
    buffer = io.BytesIO()
    torch.save(tuned, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), want)
    assert torch.equal(copy.deepcopy(tuned)(x), want)
    fresh = inserted(model, "lora", seed=1)
    assert relative(perturb(copy.deepcopy(fresh))(x), want) > 1e-4
    fresh.load_state_dict(tuned.state_dict())
    assert torch.equal(fresh(x), want)
    left = fresh.load_state_dict(model.state_dict(), strict=False)
    assert not left.unexpected_keys and all("_adapter" in k for k in left.missing_keys)


def test_two_adapters_on_one_weight_apply_in_order() -> None:
    model, x = net()
    tuned = perturb(inserted(perturb(inserted(model, "lora")), "ia3"))
    assert relative(P.merge_adapter(tuned).model(x), tuned(x)) < 1e-5
    assert [e.kind for e in P.adapter_of(tuned).targets()["one.weight"]] == ["lora", "ia3"]


def test_parts_of_a_fused_weight() -> None:
    model, x = net()
    tuned = perturb(inserted(model, "lora", targets=["one[1/4]", "one[8:12]"]))
    merged = P.merge_adapter(tuned).model
    changed = (merged.one.weight != model.one.weight).any(1)
    assert changed.tolist() == [False] * 4 + [True] * 8 + [False] * 4
    assert relative(merged(x), tuned(x)) < 1e-5
    with pytest.raises(fl.ConstraintError, match="part"):
        inserted(model, "lora", targets=["one[3/3]"])


def test_tied_weights_are_adapted_together_and_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.embed(ids)))

    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.arange(5)[None]
    tuned = perturb(inserted(model, "lora", targets=["embed"]))
    assert len(weight_adapters(tuned)) == 1 and torch.equal(tuned.embed.weight, tuned.head.weight)
    merged = P.merge_adapter(tuned).model
    assert merged.head.weight is merged.embed.weight
    assert relative(merged(ids), tuned(ids)) < 1e-5


def test_recurrent_and_attention_layers_that_read_weights_themselves() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(5, 4, 2, batch_first=True).eval()
    x = torch.randn(2, 3, 5)
    tuned = perturb(inserted(lstm, "lora", targets=["weight_ih_l0", "weight_hh_l1"]))
    assert relative(tuned(x)[0], lstm(x)[0]) > 1e-3
    assert relative(P.merge_adapter(tuned).model(x)[0], tuned(x)[0]) < 1e-5
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    q = torch.randn(2, 4, 8)
    tuned = inserted(attention, "lora", targets=["in_proj_weight[0/3]", "out_proj"])
    assert relative(tuned(q, q, q)[0], attention(q, q, q)[0]) == 0
    perturb(tuned)
    assert relative(tuned(q, q, q)[0], attention(q, q, q)[0]) > 1e-3
    assert relative(P.merge_adapter(tuned).model(q, q, q)[0], tuned(q, q, q)[0]) < 1e-5


def test_fused_inference_paths_see_the_adapted_weights() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 4, 8)
    tuned = perturb(inserted(layer, "lora"))
    slow = tuned(x.clone().requires_grad_())
    with torch.no_grad():
        assert relative(tuned(x), slow) < 1e-5 and relative(tuned(x), layer(x)) > 1e-3
        assert relative(P.merge_adapter(tuned).model(x), slow) < 1e-5


def test_half_precision_is_rounded_once() -> None:
    rng = np.random.default_rng(0)
    exact = rng.standard_normal(20_000)
    tie = np.float64(1 + 2**-8) + 2.0**-40  # just above a bfloat16 tie: float32 rounds it onto the tie first
    x = np.concatenate([exact, [tie, -tie, 0.0, -0.0, 1e-40]])
    got = cast_once(x, ml_dtypes.bfloat16).astype(np.float64)
    step = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(x), 1e-38))) - 7)
    assert (np.abs(got - x) <= step / 2 * (1 + 1e-12)).all() and got[20_000] == 1 + 2**-7
    with pytest.raises(fl.ConstraintError, match="finite"):
        cast_once(np.array([1e39]), np.float32, "w")
    model, _ = net()
    half = copy.deepcopy(model).bfloat16()
    tuned = perturb(P.insert_adapter(half, kind="lora", rank=3, dtype="float32").model)
    merged = P.merge_adapter(tuned).model
    entry = P.adapter_of(tuned).targets()["one.weight"][0]
    reference, _ = merged_weight(half.one.weight.detach().float().numpy(), None, entry)
    error = np.abs(merged.one.weight.detach().float().numpy() - reference)
    assert merged.one.weight.dtype == torch.bfloat16
    assert (error <= 2.0**-8 * np.abs(reference) * 1.0001 + 1e-30).all()


def test_bad_input_is_refused_by_name() -> None:
    model, _ = net()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"kind": "lora", "options": {"rnak": 3}}, "rank"),
        ({"kind": "lora", "targets": ["tow"]}, "two"),
        ({"kind": "sorsa", "rank": 99}, "conv.weight"),
        ({"kind": "bone", "rank": 5}, "conv.weight"),
        ({"kind": "lora", "init": "eva"}, "calibration"),
        ({"kind": "lora", "init": "nothing"}, "zero, svd, gradient, eva"),
        ({"kind": "lora", "allocate": True}, "eva"),
    ]
    for given, said in cases:
        with pytest.raises(fl.FoldlineError, match=said):
            P.insert_adapter(model, **given)
    with pytest.raises(fl.ConstraintError, match="no adapters"):
        P.merge_adapter(model)
    wrong = P.Adapter([Entry("one.weight", "lora", {"A": np.ones((2, 5)), "B": np.ones((16, 2))}, {"scale": 1.0})])
    with pytest.raises(fl.ConstraintError, match=r"one\.weight"):
        P.merge_adapter(model, wrong)
    with pytest.raises(fl.ConstraintError, match="not in this model"):
        P.merge_adapter(model, P.Adapter([Entry("three.weight", "lora", {}, {"scale": 1.0})]))


def test_views_turn_stored_weights_and_back() -> None:
    rng = np.random.default_rng(0)
    for view, shape in [
        (View(), (6, 4)),
        (View(True), (4, 6)),
        (View(True, 2), (8, 3, 2, 2)),
        (View(rows=(2, 5)), (6, 4)),
    ]:
        w = rng.standard_normal(shape)
        c = view.canonical(w)
        assert c.shape == view.geometry(shape).shape and np.array_equal(view.stored(c, w), w)
        assert np.array_equal(view.stored(torch.from_numpy(c), torch.from_numpy(w)).numpy(), w)
    groups = nn.ConvTranspose2d(8, 6, 2, groups=2)
    c = View(True, 2).canonical(groups.weight.detach())
    assert torch.equal(c[3:, :], groups.weight.detach()[4:].transpose(0, 1))


def test_same_seed_same_bytes_in_another_process() -> None:
    code = (
        "import torch; from torch import nn; from foldline import passes as P; torch.manual_seed(0);"
        "m = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3));"
        "print(P.adapter_of(P.insert_adapter(m, kind='{}', rank=2, seed=5).model).fingerprint())"
    )
    for kind in ("lora", "nola"):
        runs = [
            subprocess.run(
                [sys.executable, "-c", code.format(kind)], capture_output=True, text=True, check=True,
                env={"OMP_NUM_THREADS": str(n), "PATH": ""},
            ).stdout
            for n in (1, 2)
        ]  # fmt: skip
        assert runs[0] == runs[1] and len(runs[0]) > 60


def test_penalties_are_the_kinds_own() -> None:
    model, _ = net()
    assert float(penalty(inserted(model, "lora"))) == 0
    loose = perturb(inserted(model, "sorsa"))
    assert float(penalty(inserted(model, "sorsa")).detach()) < 1e-6 < float(penalty(loose).detach())


def test_the_documentation_lists_every_kind() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "adapters.md").read_text(encoding="utf-8")
    for name, kind in kinds().items():
        if not name.startswith("peft_"):
            row = next((line for line in text.splitlines() if line.startswith(f"| `{name}` |")), "")
            assert row.endswith(f"| {'yes' if kind.foldable else 'no'} | {kind.paper} |"), name
