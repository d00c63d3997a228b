"""Scales before quantization: Smooth, Equalize and AwqScale keep the function and even out what they should."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from foldline import passes as P
from foldline.graph.execute import run_graph, synthesize_inputs
from foldline.graph.ir import Graph
from foldline.graph.verify import compare
from foldline.passes.base import Context, Contract
from foldline.passes.quantize.spec import TensorFormat
from foldline.passes.transform.boundary import environment, find_boundaries, weight_matrix
from foldline.passes.transform.common import Site
from foldline.passes.transform.grids import Formats, layer_error
from foldline.passes.transform.samples import Halves, Rows
from foldline.passes.transform.smooth import factors_of, search
from support.frontends import FRONT_ENDS, load
from support.language_shapes import batches, language_graph
from torch import nn


def transformed(graph: Graph, step: P.Pass, calibration: Any = None, rtol: float = 1e-4) -> tuple[Graph, P.Outcome]:
    """A clone after one pass, checked against the original."""
    after = graph.clone()
    outcome = step.apply(after, Context(calibration=calibration))
    inputs = [synthesize_inputs(graph, seed) for seed in (0, 1)]
    found = compare(graph, after, inputs, rtol=rtol)
    assert found.ok, (found.first_divergence, {k: v.max_rel for k, v in found.outputs.items()})
    return after, outcome


def said(outcome: P.Outcome, action: str) -> list[P.Decision]:
    return [d for d in outcome.decisions if d.action == action]


@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("shape", ["llama", "gpt2", "bert"])
def test_smooth_keeps_the_function_and_lowers_the_error(shape: str, front: str) -> None:
    graph = language_graph(shape, front)
    after, outcome = transformed(graph, P.Smooth(rows=64), batches())
    smoothed = said(outcome, "smoothed")
    assert smoothed and all(d.data["after_db"] > d.data["before_db"] for d in smoothed)
    assert not any(d.data["inserted"] for d in smoothed)
    assert len(after.nodes) == len(graph.nodes)
    if shape == "bert":  # after a norm whose output a residual reads too nothing absorbs; values do
        assert all(
            any(word in d.reason.lower() for word in ("add", "gelu", "vector", "gains")) for d in said(outcome, "kept")
        )
    else:
        gains = [d.data["after_db"] - d.data["before_db"] for d in smoothed]
        assert max(gains) > 5  # three channels of every norm are twelve times as large; held-out samples


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_smooth_inserts_products_only_if_asked(front: str) -> None:
    graph = language_graph("bert", front, layers=1)
    after, outcome = transformed(graph, P.Smooth(rows=64, insert=True, insert_gain_db=0.1), batches())
    inserted = [d for d in said(outcome, "smoothed") if d.data["inserted"]]
    assert inserted and sum(n.op == "mul" for n in after.nodes) > sum(n.op == "mul" for n in graph.nodes)
    query = next(d for d in inserted if "query" in d.subject or len(d.subject.split(",")) == 3)
    assert len(query.data["into"]) == 1  # one product for query, key and value


def test_smooth_passes_grouped_queries_to_the_value_heads() -> None:
    graph = language_graph("llama", "fx", layers=1)
    _, outcome = transformed(graph, P.Smooth(rows=64, gain_db=0.0), batches())
    taken = {name for d in said(outcome, "smoothed") for name in d.data["into"]}
    values = [
        n.name for n in graph.nodes if n.op == "linear" and "v_proj" in (n.input(1).weight.name if n.input(1) else "")
    ]
    assert values and set(values) <= taken


def test_smooth_does_not_depend_on_the_order_of_batches() -> None:
    graph = language_graph("gpt2", "fx", layers=1)
    data = batches(count=5)
    one, two = graph.clone(), graph.clone()
    P.Smooth(rows=32).apply(one, Context(calibration=data))
    P.Smooth(rows=32).apply(two, Context(calibration=data[::-1]))
    for name, w in one.weights.items():
        assert np.array_equal(w.numpy(), two.weights[name].numpy()), name


def test_a_single_alpha_is_the_published_recipe() -> None:
    """With one alpha the factors are max|x|^a / max|W|^(1-a), up to a constant."""
    module = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5)).eval()
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([1.0, 20.0, 0.5, 1.0, 3.0, 1.0]))
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    graph = load(module, (x,), "fx")
    after, _ = transformed(graph, P.Smooth(alphas=[0.5], rows=16), [(x,)])
    peak = module[0](x).abs().amax(0).detach().numpy()
    weight = module[1].weight.detach().abs().amax(0).numpy()
    wanted = np.sqrt(peak / weight)
    name = next(w for w in graph.weights if w.endswith("1.weight"))
    got = after.weights[name].numpy()[0] / graph.weights[name].numpy()[0]
    assert np.allclose(got / got[0], wanted / wanted[0], rtol=1e-4)


# ---- equalization ------------------------------------------------------------------------------------------------
class Depthwise(nn.Module):
    """Pointwise, depthwise, pointwise, with an activation and a residual in the middle."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.activation(self.b(self.activation(self.a(x)))))


def uneven(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            spread = torch.exp(1.5 * torch.randn(len(p), *[1] * (p.ndim - 1), generator=generator))
            p.copy_(torch.randn(p.shape, generator=generator) * spread)
    return module.eval()


@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2)])
def test_equalize_evens_out_depthwise_chains(front: str, activation: nn.Module) -> None:
    module = uneven(Depthwise(activation))
    graph = load(module, (torch.randn(2, 3, 5, 5),), front)
    after, outcome = transformed(graph, P.Equalize())
    assert len(said(outcome, "equalized")) == 2
    a, b, c = (next(w.numpy() for n, w in after.weights.items() if n.endswith(f"{k}.weight")) for k in "abc")
    made, depth, read = np.abs(a).max((1, 2, 3)), np.abs(b).max((1, 2, 3)), np.abs(c).max((0, 2, 3))
    assert np.allclose(made, depth, rtol=1e-2) and np.allclose(depth, read, rtol=1e-2)


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_equalize_refuses_a_cap_or_scales_it(front: str) -> None:
    graph = load(uneven(Depthwise(nn.ReLU6())), (torch.randn(2, 3, 5, 5),), front)
    _, refused = transformed(graph, P.Equalize())
    assert not said(refused, "equalized") and all("clip" in d.reason for d in said(refused, "kept")[-2:])
    _, scaled = transformed(graph, P.Equalize(caps="scale"))
    assert len(said(scaled, "equalized")) == 2


def test_equalize_leaves_what_a_residual_reads() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.tanh(self.a(x))
            return y + self.c(torch.relu(self.b(y)))

    graph = load(uneven(Residual()), (torch.randn(4, 6),), "fx")
    _, outcome = transformed(graph, P.Equalize())
    assert [d.subject for d in said(outcome, "equalized")] == ["c"]
    assert any("tanh" in d.reason or "add" in d.reason for d in said(outcome, "kept"))


def test_bias_absorption_keeps_the_function_where_nothing_is_cut_off() -> None:
    module = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).eval()
    with torch.no_grad():
        module[0].bias.copy_(torch.tensor([30.0, 25.0, 0.0, -1.0, 40.0, 0.1, 0.0]))
    data = [(torch.randn(64, 5, generator=torch.Generator().manual_seed(i)),) for i in range(3)]
    step = P.Equalize(absorb_bias=True)
    assert step.promise() is Contract.APPROXIMATE
    graph = load(module, data[0], "fx")
    after, outcome = transformed(graph, step, data, rtol=0.02)
    assert said(outcome, "absorbed")[0].data["channels"] == 3
    before = np.abs(graph.weights["0.bias"].numpy()).max()
    assert np.abs(after.weights["0.bias"].numpy()).max() < before / 2


@pytest.mark.parametrize("seed", range(12))
def test_equalize_keeps_random_graphs(seed: int) -> None:
    from foldline.graph.onnx import load_onnx
    from support.fold_nets import random_model

    model, _, _ = random_model(seed)
    graph = load_onnx(model)
    transformed(graph, P.Equalize(caps="scale"))


# ---- activation-aware weight scales ----------------------------------------------------------------------------------
@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_awq_scales_lower_the_rounding_error(shape: str, front: str) -> None:
    graph = language_graph(shape, front)
    after, outcome = transformed(graph, P.AwqScale(bits=3, block=16, rows=64, grid=8), batches())
    scaled = said(outcome, "scaled")
    assert scaled and all(d.data["error_after"] < d.data["error_before"] for d in scaled)
    assert len(after.nodes) == len(graph.nodes)


def test_clipping_lowers_the_error_of_rounded_weights_and_is_approximate() -> None:
    from foldline.passes.transform.awq import best_clip
    from foldline.passes.transform.grids import formats_of

    rng = np.random.default_rng(0)
    w, x = rng.standard_t(3, (16, 64)).astype(np.float32), rng.standard_normal((200, 64)).astype(np.float32)
    formats = formats_of(Context(), None, 3, 16, 32)
    cut, share = best_clip(x, w, formats, 0.4, 32)
    plain = np.square(x @ (formats.weights(w) - w).T).sum()
    clipped = np.square(x @ (formats.weights(cut) - w).T).sum()
    assert clipped < plain and 0.4 <= share < 1
    assert P.AwqScale(clip=True).promise() is Contract.APPROXIMATE


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_searches_see_the_rounding_that_the_weights_will_get(bits: int, symmetric: bool) -> None:
    from foldline.passes.quantize.formats import format_of
    from foldline.passes.transform.grids import formats_of

    w = np.random.default_rng(0).standard_normal((8, 96)).astype(np.float32) + 0.2
    stored = format_of("int", bits=bits, block=32, symmetric=symmetric).fit(w).decode()
    simulated = formats_of(Context(), None, bits, 16, 32, symmetric=symmetric)
    assert simulated.activation is None and np.allclose(simulated.weights(w), stored, atol=1e-6)


def test_clipping_never_errs_more_in_a_block_and_keeps_the_gain() -> None:
    from foldline.passes.quantize.formats import format_of
    from foldline.passes.transform.awq import best_clip
    from foldline.passes.transform.grids import formats_of

    rng = np.random.default_rng(3)
    w = rng.standard_normal((16, 128)).astype(np.float32)
    x = (rng.standard_normal((300, 8)) @ rng.standard_normal((8, 128))).astype(np.float32)
    formats = formats_of(Context(), None, 2, 16, 64, symmetric=False)
    stored = {"plain": format_of("int", bits=2, block=64).fit(w).decode()}
    for gain in (False, True):
        cut, _ = best_clip(x, w, formats, 0.5, 64, gain=gain)
        stored[str(gain)] = format_of("int", bits=2, block=64).fit(cut).decode()
    for k in (0, 64):
        part, wanted = x[:, k : k + 64], x[:, k : k + 64] @ w[:, k : k + 64].T
        made = {name: part @ q[:, k : k + 64].T for name, q in stored.items()}
        error = {name: np.square(m - wanted).sum(0) for name, m in made.items()}
        assert (error["False"] <= error["plain"] * 1.001).all() and (error["True"] <= error["plain"] * 1.001).all()
        shares = {name: float((m * wanted).sum() / np.square(wanted).sum()) for name, m in made.items()}
        assert shares["False"] < 0.98 < 0.99 < shares["True"] < 1.01


# ---- parts -------------------------------------------------------------------------------------------------------
def test_rows_do_not_depend_on_order_and_shards_merge() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((30, 4)).astype(np.float32) for _ in range(6)]
    one, two, left, right = Rows(limit=20), Rows(limit=20), Rows(limit=20), Rows(limit=20)
    for p in parts:
        one.update(p)
    for p in parts[::-1]:
        two.update(p[::-1])
    for p in parts[:3]:
        left.update(p)
    for p in parts[3:]:
        right.update(p)
    left.merge(right)
    for other in (two, left):
        assert np.array_equal(one.rows, other.rows) and np.array_equal(one.peak, other.peak)
    assert len(one.rows) == 20 and np.array_equal(one.peak, np.abs(np.concatenate(parts)).max(0))


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_boundaries_join_the_readers_of_one_value(front: str) -> None:
    graph = language_graph("llama", front, layers=1)
    found = find_boundaries(graph)
    assert sorted(len(b.readers) for b in found) == [1, 1, 1, 2, 3]
    arrays = synthesize_inputs(graph)
    for b in found:
        node, x = b.readers[0]
        _, tapped = run_graph(graph, arrays, [x.name, node.output.name, b.name])
        assert tapped[b.name].shape[b.axis] == b.size
        flat = tapped[x.name].reshape(-1, b.size)
        matrix = weight_matrix(node)
        assert matrix is not None and node.input(2) is None
        assert np.allclose(flat @ matrix.T, tapped[node.output.name].reshape(len(flat), -1), atol=1e-4)
    assert environment(graph, Context()).graph is graph


def test_samples_fall_into_halves_by_their_contents() -> None:
    rng = np.random.default_rng(0)
    samples = rng.standard_normal((12, 5, 4)).astype(np.float32)
    one, two, three = Halves(limit=40), Halves(limit=40), Halves(limit=40)
    one.update(samples)
    for part in (samples[7:], samples[:7][::-1]):
        two.update(part)
    three.update(samples[:5])
    rest = Halves(limit=40)
    rest.update(samples[5:])
    three.merge(rest)
    for other in (two, three):
        assert one.samples == other.samples
        assert all(np.array_equal(a.peak, b.peak) for a, b in zip(one.parts, other.parts, strict=True))
    assert sum(one.samples) == 12 and min(one.samples) >= 2
    assert np.array_equal(one.whole.peak, np.abs(samples).reshape(-1, 4).max(0))
    (fit, judge), (again, first) = one.folds()
    assert fit is first and judge is again and not set(fit.kept) & set(judge.kept)


def test_smooth_does_not_fit_factors_to_few_samples() -> None:
    """All tokens of a sample alike: fitted and judged on the same rows, strengths near 1 look best and lose."""
    rng = np.random.default_rng(0)

    def draw(n: int) -> np.ndarray:
        return np.repeat(rng.standard_normal((n, 1, 48)), 20, 1).astype(np.float32)

    matrix = rng.standard_normal((64, 48)).astype(np.float32) / 7
    site = Site(None, [matrix])  # type: ignore[arg-type]
    forms = Formats(TensorFormat("int8", True, "out_channel"), TensorFormat("uint8"))
    seen, fresh = draw(24), draw(400).reshape(-1, 48)
    halves = Halves()
    halves.update(seen)
    found = search(site, halves, forms, [0.25, 0.5, 0.75, 1.0])
    rows = seen.reshape(-1, 48)

    def error(s: np.ndarray) -> float:
        made = forms.activations(fresh / s, rows.min(0) / s, rows.max(0) / s)
        return layer_error(fresh @ matrix.T, made, [forms.weights(matrix * s)])

    plain = error(np.ones(48, np.float32))
    assert error(factors_of(np.abs(rows).max(0), site.weight_peak, 1.0).astype(np.float32)) > 2 * plain
    chosen = np.ones(48) if found.factors is None else found.factors
    assert error(chosen.astype(np.float32)) < 1.02 * plain
