"""Importance criteria: hand counts, exact identities, the true change of the loss, both front ends, bad input."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import foldline as fl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foldline import passes as P
from foldline.graph.actions import mask
from foldline.graph.errors import ConfigError, ConstraintError
from foldline.graph.execute import run_graph
from foldline.graph.groups import AxisGroup, AxisGroups, axis_groups
from foldline.passes.base import Needs
from foldline.passes.prune.evidence import Evidence
from foldline.passes.prune.importance import NAMES, importance, needs_of
from foldline.passes.prune.lora_criteria import attach
from foldline.passes.prune.spectral import participation
from scipy.stats import spearmanr
from support import timm_models
from support.frontends import FRONT_ENDS, exported, load, toy_graph
from support.toys import toy
from torch import nn

GRADIENTS = ("taylor", "taylor_elements", "fisher", "obd", "hessian", "obd_kfac", "lora", "lora_elements")
ACTIVATIONS = ("wanda", "activation", "apoz")


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 8)
        self.b = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.b(torch.relu(self.a(x)))
        return out


def regression() -> tuple[Regression, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return Regression().eval(), torch.randn(24, 5), torch.randn(24, 4)


def scores(model: Any, x: torch.Tensor, name: str, evidence: dict[str, Any], group: str = "a.weight:0") -> np.ndarray:
    groups = axis_groups(fl.load(model, (x[:2],)))
    g = groups[group]
    return importance(groups, [g], name, 0, "mean", Evidence(groups, **evidence))[g]


def hidden(model: Regression, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(model.a(x)).detach()


# ---- hand counts and identities ------------------------------------------------------------------------------------
def test_wanda_is_weights_times_input_norms() -> None:
    model, x, _ = regression()
    rows = (model.a.weight.abs() * x.square().mean(0).sqrt()).sum(1).detach().numpy()
    columns = (model.b.weight.abs() * hidden(model, x).square().mean(0).sqrt()).sum(0).detach().numpy()
    found = scores(model, x, "wanda", {"batches": [x[:10], x[10:]]})
    assert np.allclose(found, (rows / rows.mean() + columns / columns.mean()) / 2, rtol=1e-5)


def test_activations_and_zeros_are_counted_where_they_are_read() -> None:
    model, x, _ = regression()
    h = hidden(model, x).double().numpy()
    square = (h**2).mean(0)
    assert np.allclose(scores(model, x, "activation", {"batches": [x]}), square / square.mean(), rtol=1e-5)
    assert np.allclose(scores(model, x, "apoz", {"batches": [x[:7], x[7:]]}), (h != 0).mean(0))


def test_taylor_is_the_slope_of_a_gate() -> None:
    """First order, exactly: the derivative of the loss by a factor on the index."""
    model, x, y = regression()
    gate = torch.ones(8, requires_grad=True)
    loss = F.mse_loss(model.b(torch.relu(model.a(x)) * gate), y)
    slope = torch.autograd.grad(loss, gate)[0].abs().numpy()
    found = scores(model, x, "taylor", {"data": [(x[:20], y[:20]), (x[20:], y[20:])], "loss": "mse"})
    assert np.allclose(found, slope, rtol=1e-4)


def test_fisher_is_the_mean_squared_slope_of_a_gate_over_samples() -> None:
    model, x, y = regression()
    gate = torch.ones(24, 8, requires_grad=True)
    losses = F.mse_loss(model.b(torch.relu(model.a(x)) * gate), y, reduction="none").mean(1)
    slopes = torch.autograd.grad(losses.sum(), gate)[0]
    found = scores(model, x, "fisher", {"data": [(x, y)], "loss": "mse"})
    assert np.allclose(found, (slopes**2).mean(0).numpy() / 2, rtol=1e-4)


def test_diagonal_obd_counts_every_sample_once() -> None:
    model, x, y = regression()
    total = [torch.zeros_like(p) for p in (model.a.weight, model.b.weight)]
    for n in range(len(x)):
        loss = F.mse_loss(model(x[n : n + 1]), y[n : n + 1])
        grads = torch.autograd.grad(loss, [model.a.weight, model.b.weight])
        total = [t + g.square() / len(x) for t, g in zip(total, grads, strict=True)]
    rows = (total[0] * model.a.weight.square()).sum(1).detach().numpy() / 2
    columns = (total[1] * model.b.weight.square()).sum(0).detach().numpy() / 2
    for cut in ([24], [1, 20, 3]):
        data = list(zip(x.split(cut), y.split(cut), strict=True))
        assert np.allclose(scores(model, x, "obd", {"data": data, "loss": "mse"}), (rows + columns) / 2, rtol=1e-4)


@pytest.mark.parametrize("side", ["columns", "rows"])
def test_kronecker_obd_is_the_exact_change_of_a_squared_loss(side: str) -> None:
    """A linear layer, residuals independent of the inputs with the covariance that makes Fisher the Hessian: removing
    a slab changes the loss by just what the factors say."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        linear = nn.Linear(6, 4, bias=False).eval()
        mix = torch.randn(6, 6)
        x = torch.randn(10, 6) @ mix
        noise = 4 / 2**0.5 * torch.cat([torch.eye(4), -torch.eye(4)])
        inputs, residual = x.repeat_interleave(8, 0), noise.repeat(10, 1)
        target = linear(inputs).detach() + residual
        groups = axis_groups(fl.load(linear, (x[:2],)))
        axis = 1 if side == "columns" else 0
        g = groups.of("weight", axis)[0]
        evidence = Evidence(groups, data=[(inputs, target)], loss="mse")
        found = importance(groups, [g], "obd_kfac", 0, "mean", evidence)[g]
        base = F.mse_loss(linear(inputs), target)
        for i in range(g.size):
            w = linear.weight.detach().clone()
            w[(slice(None), i) if axis else i] = 0
            assert np.isclose(found[i], float(F.mse_loss(inputs @ w.T, target).detach() - base.detach()), rtol=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)


def kfac_by_hand(groups: AxisGroups, g: AxisGroup, evidence: Evidence) -> np.ndarray:
    """1/2 w_S^T (L (x) R) w_S with the Kronecker product written out, one slab at a time."""
    total = np.zeros(g.size)
    for f in evidence.kronecker():
        for m in g.members:
            if m.weight is not f.site.weight or m.role != "consumes":
                continue
            at = m.positions(g.atom)
            for i in range(g.size):
                w = np.zeros(m.weight.shape)
                index = [slice(None)] * w.ndim
                index[m.axis] = np.nonzero(at == i)[0]  # type: ignore[call-overload]
                w[tuple(index)] = m.weight.numpy()[tuple(index)]
                for b, block in enumerate(w.reshape(f.site.shape)):
                    v = block.reshape(-1)
                    total[i] += v @ np.kron(f.left[b].numpy(), f.right[b].numpy()) @ v / 2
    return total


@pytest.mark.parametrize("name", ["residual_cnn", "grouped_convs", "transposed_convs", "separate_qkv"])
def test_kronecker_obd_equals_the_written_out_product(name: str) -> None:
    groups = axis_groups(toy_graph(name, "fx"))
    chosen = [g for g in prunable(groups) if any(m.role == "consumes" for m in g.members) and g.size < 20]
    model, x = toy(name)
    evidence = Evidence(groups, [x if len(x) > 1 else x[0]], loss="mse")
    found = importance(groups, chosen, "obd_kfac", 0, "mean", evidence)
    assert found
    for g, s in found.items():
        assert np.allclose(s, kfac_by_hand(groups, g, evidence), rtol=1e-5, atol=1e-12), g.name


# ---- the true change of the loss -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """A perceptron on scikit-learn's digits, trained for two seconds, and the true cost of each of its units."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.tensor(digits.data / 16, dtype=torch.float32)
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(250):
        rows = torch.randint(0, 1200, (96,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    x, y = x[:300], y[:300]
    groups = axis_groups(fl.load(model.eval(), (x[:4],)))
    chosen = [groups["0.weight:0"], groups["2.weight:0"]]

    def loss(graph: Any) -> float:
        (logits,), _ = run_graph(graph, {graph.inputs[0].name: x.numpy()})
        return float(F.cross_entropy(torch.from_numpy(logits).double(), y))

    base = loss(groups.graph)
    every = {g: np.arange(g.size) for g in chosen}
    true = {g: np.array([loss(mask(groups, {g: np.delete(a, i)})) - base for i in a]) for g, a in every.items()}
    data = list(zip(x.split(60), y.split(60), strict=True))
    return {"groups": groups, "chosen": chosen, "true": true, "data": data, "model": model}


def correlation(trained: dict[str, Any], name: str, **evidence: Any) -> float:
    """Spearman's rank correlation of scores and true loss changes, averaged over the two layers."""
    groups = trained["groups"]
    found = importance(groups, trained["chosen"], name, 0, "mean", Evidence(groups, **evidence))
    return float(np.mean([spearmanr(found[g], trained["true"][g])[0] for g in trained["chosen"]]))


def chance(trained: dict[str, Any]) -> float:
    """The largest correlation that twenty random rankings reach."""
    groups, chosen = trained["groups"], trained["chosen"]
    tries = [importance(groups, chosen, "random", seed) for seed in range(20)]
    return float(max(np.mean([spearmanr(t[g], trained["true"][g])[0] for g in chosen]) for t in tries))


@pytest.mark.parametrize("name", ["taylor", "taylor_elements", "fisher", "obd", "obd_kfac", "lora_elements", "wanda"])
def test_scores_follow_the_true_change_of_the_loss(name: str, trained: dict[str, Any]) -> None:
    assert correlation(trained, name, data=trained["data"]) > max(chance(trained), 0.3)


@pytest.mark.parametrize("name", ["fisher", "obd", "obd_kfac"])
def test_second_order_needs_no_labels(name: str, trained: dict[str, Any]) -> None:
    batches = [x for x, _ in trained["data"]]
    assert correlation(trained, name, batches=batches) > max(chance(trained), 0.3)


def test_adapter_importance_follows_the_gradient_it_never_forms(
    trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """F1-02: only adapters are differentiated, and the scores rank the weights' slabs as their true |g * w| does."""
    from foldline.passes import gradients

    leaves: list[set[str]] = []
    real = gradients.gradients

    def watched(of: Any, by: Any, **options: Any) -> Any:
        leaves.append(set(by))
        return real(of, by, **options)

    monkeypatch.setattr(gradients, "gradients", watched)
    groups, chosen = trained["groups"], trained["chosen"]
    evidence = Evidence(groups, data=trained["data"])
    elements = importance(groups, chosen, "lora_elements", 0, "mean", evidence)
    assert leaves and all(n.endswith((".lora_a", ".lora_b")) for names in leaves for n in names)
    assert all(p.grad is None or p.requires_grad for p in trained["model"].parameters())
    monkeypatch.undo()
    data = trained["data"]
    true = importance(groups, chosen, "taylor_elements", 0, "mean", Evidence(groups, data=data))
    for g in chosen:
        others = [importance(groups, [g], "random", s)[g] for s in range(20)]
        assert spearmanr(elements[g], true[g])[0] > max(spearmanr(o, true[g])[0] for o in others), g.name
    # The slab as a whole hangs on the signs of a projection on eight directions: right on average over draws.
    true = importance(groups, chosen, "taylor", 0, "mean", Evidence(groups, data=data))
    draws = [importance(groups, chosen, "lora", 0, "mean", Evidence(groups, data=data, seed=s)) for s in range(4)]
    assert np.mean([spearmanr(draw[g], true[g])[0] for draw in draws for g in chosen]) > 0.3


# ---- adapters ------------------------------------------------------------------------------------------------------
class Adapted(nn.Module):
    """A frozen linear layer with a LoRA branch of its own."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.base = nn.Linear(10, 12)
        self.base.requires_grad_(False)
        self.low = nn.Linear(10, 3, bias=False)
        self.high = nn.Linear(3, 12, bias=False)
        self.drop = nn.Dropout(0.1)
        self.scale = scale
        self.out = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(torch.tanh(self.base(x) + self.high(self.low(self.drop(x))) * self.scale))
        return out


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_attached_adapters_leave_the_function_and_the_models_own_are_read(front: str) -> None:
    torch.manual_seed(0)
    graph = load(Adapted().eval(), (torch.randn(4, 10),), front)
    x = {graph.inputs[0].name: np.random.default_rng(0).standard_normal((4, 10)).astype(np.float32)}
    before, _ = run_graph(graph, x)
    names = [n for n, w in graph.weights.items() if len(w.shape) == 2]
    adapters = attach(graph, names)
    own = [ad for ad in adapters if ad.own]
    assert len(own) == 1 and own[0].scale == 2.0 and own[0].weight.shape in ((12, 10), (10, 12))
    assert {ad.weight.shape for ad in adapters if not ad.own} <= {(4, 12), (12, 4)}
    after, _ = run_graph(graph, x)
    assert np.allclose(before[0], after[0], atol=1e-6)


def test_own_adapters_give_the_formula() -> None:
    """G = s (dB A + B dA - dB dA), importance (G * (W + s B A))^2."""
    torch.manual_seed(0)
    model, x, y = Adapted().eval(), torch.randn(16, 10), torch.randn(16, 4)
    groups = axis_groups(fl.load(model, (x[:2],)))
    evidence = Evidence(groups, data=[(x, y)], loss="mse")
    g = groups["base.weight:0"]
    evidence.judged = [g]
    from foldline.passes.prune.lora_criteria import adapter_importance

    slopes, squares = adapter_importance(evidence)
    a, b = model.low.weight, model.high.weight
    da, db = torch.autograd.grad(F.mse_loss(model(x), y), [a, b])
    step = 2 * (db @ a + b @ da - db @ da)
    expected = (step * (model.base.weight + 2 * b @ a)).detach().numpy()
    assert np.allclose(slopes["base.weight"], expected, rtol=1e-4, atol=1e-9)
    assert np.allclose(squares["base.weight"], expected**2, rtol=1e-4, atol=1e-12)


# ---- spectral ------------------------------------------------------------------------------------------------------
def test_participation_tells_a_wave_from_noise() -> None:
    t = np.arange(23)
    wave, noise = np.cos(2 * np.pi * 3 * t / 23 + 0.4), np.random.default_rng(0).standard_normal(23)
    assert participation(wave) == pytest.approx(1) and participation(noise) < 0.5
    assert participation(np.ones(23)) == 0


class ModularAddition(nn.Module):
    def __init__(self, p: int, width: int) -> None:
        super().__init__()
        self.p = p
        self.u, self.v = nn.Linear(p, width, bias=False), nn.Linear(p, width, bias=False)
        self.w = nn.Linear(width, p, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.w((self.u(x[:, : self.p]) + self.v(x[:, self.p :])).square())
        return out


def test_spectral_pruning_forgets_corrupted_labels_before_clean_ones() -> None:
    """F1-07: addition modulo 23, a fifth of the training labels wrong; the least periodic units go first."""
    p, width = 23, 128
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    a, b = np.divmod(np.arange(p * p), p)
    label = (a + b) % p
    train = rng.permutation(p * p)[: int(0.9 * p * p)]
    bad = train[: len(train) // 5]
    given = label.copy()
    given[bad] = (label[bad] + rng.integers(1, p, len(bad))) % p
    good = train[len(bad) :]
    x = torch.cat([F.one_hot(torch.tensor(v), p) for v in (a, b)], 1).float()
    model, target = ModularAddition(p, width), F.one_hot(torch.tensor(given), p).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=5.0)
    for _ in range(500):
        optimizer.zero_grad()
        F.mse_loss(model(x[train]), target[train]).backward()
        optimizer.step()
    model.eval()

    def accuracy(net: Any) -> tuple[float, float]:
        guess = net(x).argmax(1).numpy()
        return float((guess[bad] == given[bad]).mean()), float((guess[good] == label[good]).mean())

    whole = accuracy(model)
    assert min(whole) > 0.98  # it has memorised the wrong labels as well
    for ratio, limit in ((0.4, 0.75), (0.6, 0.4)):
        result = P.prune(model, (x[:4],), criterion="spectral", ratio=ratio)
        memorised, clean = accuracy(result.model)
        assert memorised < limit and clean > 0.97
        assert result.report.passes[0].details["identity"]["relative_error"] < 1e-4
        for name in ("random", "l2"):
            other = accuracy(P.prune(model, (x[:4],), criterion=name, ratio=ratio).model)
            assert clean - memorised > other[1] - other[0], name


# ---- everywhere ----------------------------------------------------------------------------------------------------
def prunable(groups: AxisGroups) -> list[AxisGroup]:
    return [g for g in groups if g.can("select") and any(m.role != "carries" for m in g.members)]


@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("name", ["residual_cnn", "grouped_convs", "vision_transformer", "grouped_query_rope"])
def test_every_criterion_judges_convolutions_heads_and_ffns(name: str, front: str) -> None:
    _, x = toy(name)
    groups = axis_groups(toy_graph(name, front))
    chosen = prunable(groups)
    evidence = Evidence(groups, [x if len(x) > 1 else x[0]], loss="mse", probes=2)
    for criterion in NAMES:
        found = importance(groups, chosen, criterion, 0, "mean", evidence)
        for g, s in found.items():
            assert s.shape == (g.size,) and s.dtype == np.float64 and np.isfinite(s).all()
        if criterion not in ("apoz", "norm_scale"):
            assert len(found) == len(chosen), criterion


@pytest.mark.parametrize(
    "criterion", [c for c in (*GRADIENTS, *ACTIVATIONS) if c not in ("hessian", "lora", "lora_elements")]
)
def test_front_ends_agree(criterion: str) -> None:
    model, x, y = regression()
    given = exported(model, (x[:24],))
    found = []
    for source in (model, given):
        graph = fl.load(source, (x[:24],))
        graph.separate_shared()
        groups = axis_groups(graph)
        g = next(g for g in groups if g.can("select") and g.size == 8)
        found.append(importance(groups, [g], criterion, 0, "mean", Evidence(groups, data=[(x, y)], loss="mse"))[g])
    assert np.allclose(*found, rtol=1e-4)


@pytest.mark.parametrize("criterion", GRADIENTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_autograd_mode_does_not_matter(criterion: str, mode: Any) -> None:
    model, x, y = regression()
    groups = axis_groups(fl.load(model, (x[:2],)))
    g = groups["a.weight:0"]
    plain = importance(groups, [g], criterion, 0, "mean", Evidence(groups, data=[(x, y)], loss="mse"))[g]
    with mode():
        found = importance(groups, [g], criterion, 0, "mean", Evidence(groups, data=[(x, y)], loss="mse"))[g]
    assert plain.any() and np.allclose(plain, found, rtol=1e-5)


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "obd_kfac", "wanda"])
def test_the_pass_prunes_a_transformer_by_it(criterion: str) -> None:
    model, (x,) = toy("vision_transformer")
    data = [(x, torch.randint(0, 5, (len(x),)))]
    result = P.prune(model, (x,), criterion=criterion, data=data, ratio=0.4, ignore=["head*"])
    assert result.report.passes[0].details["identity"]["checked"]
    assert fl.cost(result.graph).parameters < 0.8 * fl.cost(fl.load(model, (x,))).parameters


def test_a_users_criterion_may_ask_for_evidence() -> None:
    model, x, y = regression()
    data = [(x, y)]

    def two(g: AxisGroup, evidence: Evidence) -> np.ndarray:
        return np.abs(evidence.gradients[g.members[0].weight.name]).sum(1)

    def annotated(g: AxisGroup, e: Evidence) -> np.ndarray:
        return two(g, e)

    def three(g: AxisGroup, groups: AxisGroups, evidence: Evidence) -> np.ndarray:
        assert groups is evidence.groups
        return two(g, evidence)

    kept = {
        str(P.prune(model, (x,), criterion=c, data=data, loss="mse", ratio=0.5).plan.weights)
        for c in (two, annotated, three)
    }
    assert len(kept) == 1
    plain = P.prune(model, (x,), criterion=lambda g, _: np.arange(g.size), ratio=0.5)
    assert plain.plan.weights["a.weight"][0] == [4, 5, 6, 7]
    with pytest.raises(ConfigError, match="one finite score"):
        P.prune(model, (x,), criterion=lambda g, evidence: np.full(g.size, np.nan), ratio=0.5)


def test_missing_evidence_says_what_to_pass() -> None:
    model, x, _ = regression()
    for name in GRADIENTS:
        assert needs_of(name) is Needs.GRADIENTS
        with pytest.raises(ConfigError, match="data="):
            P.prune(model, (x,), criterion=name, ratio=0.5)
    for name in ACTIVATIONS:
        assert needs_of(name) is Needs.CALIBRATION
        with pytest.raises(ConfigError, match="calibration="):
            P.prune(model, (x,), criterion=name, ratio=0.5)
    with pytest.raises(ConstraintError, match="empty"):
        P.prune(model, (x,), criterion="taylor", data=[], ratio=0.5)
    assert needs_of("l2") is Needs.NOTHING and needs_of("random") is Needs.NOTHING


def test_generators_are_read_more_than_once() -> None:
    model, x, y = regression()
    groups = axis_groups(fl.load(model, (x[:2],)))
    g = groups["a.weight:0"]
    evidence = Evidence(groups, data=(pair for pair in [(x, y)]), loss="mse")
    first = importance(groups, [g], "obd_kfac", 0, "mean", evidence)[g]
    assert np.isfinite(importance(groups, [g], "fisher", 0, "mean", evidence)[g]).all() and first.any()


@pytest.mark.slow
def test_adapters_prune_a_language_model_better_than_magnitude() -> None:
    """F1-02 on a GPT-2 shape trained for seconds on a licence text: loss below magnitude's, with the
    sliced model equal to the masked one; the base weights never require a gradient."""
    transformers = timm_models.transformers()
    text = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_bytes()
    tokens = torch.tensor([c % 128 for c in text[:60000]])
    config = transformers.GPT2Config(
        vocab_size=128, n_positions=32, n_embd=48, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)

    def batch(count: int, low: int, high: int) -> torch.Tensor:
        starts = torch.randint(low, high, (count,))
        return torch.stack([tokens[i : i + 33] for i in starts])

    def loss(net: Any, rows: torch.Tensor) -> torch.Tensor:
        logits = net(input_ids=rows[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    for _ in range(300):
        optimizer.zero_grad()
        loss(model, batch(16, 0, 50000)).backward()
        optimizer.step()
    optimizer.zero_grad()
    model.eval().requires_grad_(False)
    data = [({"input_ids": rows[:, :-1]}, rows[:, 1:]) for rows in (batch(8, 0, 50000) for _ in range(8))]
    test = batch(128, 50000, 59000)
    example = data[0][0]
    found: dict[str, list[float]] = {}
    for criterion in ("lora", "l2", "taylor", "obd_kfac"):
        for ratio in (0.25, 0.5):
            result = P.prune(
                model, example, criterion=criterion, data=data, ratio=ratio, ignore=["*wte*", "*wpe*"],
            )  # fmt: skip
            assert result.report.passes[0].details["identity"]["relative_error"] < 1e-4
            with torch.no_grad():
                found.setdefault(criterion, []).append(float(loss(result.model, test)))
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    for better in ("lora", "taylor", "obd_kfac"):
        assert np.mean(found[better]) < np.mean(found["l2"]), found


@pytest.mark.slow
def test_a_small_vision_transformer_of_timm_by_every_criterion() -> None:
    model = timm_models.create("vit_tiny_patch16_224", img_size=64, depth=3)
    x = torch.randn(2, 3, 64, 64)
    groups = axis_groups(fl.load(model, (x,)))
    chosen = [g for g in prunable(groups) if not g.nested]
    evidence = Evidence(groups, [x], probes=2)
    for criterion in NAMES:
        found = importance(groups, chosen, criterion, 0, "mean", evidence)
        if criterion not in ("apoz", "norm_scale"):
            assert len(found) == len(chosen), criterion
