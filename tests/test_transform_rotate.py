"""Rotations, affine maps, query-key fusion: exact before quantization, refused where indices are told apart."""

from __future__ import annotations

from typing import Any

import foldline as fl
import numpy as np
import pytest
import torch
from foldline import passes as P
from foldline.graph.errors import ConstraintError
from foldline.graph.execute import synthesize_inputs
from foldline.graph.groups import axis_groups
from foldline.graph.ir import Graph
from foldline.graph.rotate import freedom, off_orthogonal, rotate
from foldline.graph.verify import compare
from foldline.passes.base import Context
from foldline.passes.transform.affine import near_square
from foldline.passes.transform.hadamard import hadamard, keeping_ones, random_hadamard, random_orthogonal
from foldline.passes.transform.learning import cayley, fake_quantize, qsur
from foldline.passes.transform.rotate import Rotate
from support.frontends import FRONT_ENDS, load
from support.language_shapes import batches, language_graph
from torch import nn

ALL = ["residual", "inner", "query_key"]


def transformed(graph: Graph, step: P.Pass, calibration: Any = None) -> tuple[Graph, P.Outcome]:
    """A clone after one pass, which must compute what the original computes to 1e-4."""
    after = graph.clone()
    outcome = step.apply(after, Context(calibration=calibration))
    found = compare(graph, after, [synthesize_inputs(graph, seed) for seed in (0, 1)], rtol=1e-4)
    assert found.ok, (found.first_divergence, {k: v.max_rel for k, v in found.outputs.items()})
    return after, outcome


def said(outcome: P.Outcome, action: str) -> list[P.Decision]:
    return [d for d in outcome.decisions if d.action == action]


# ---- matrices ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 24, 32, 48, 384])
def test_hadamard_matrices(size: int) -> None:
    made = hadamard(size)
    assert made is not None and set(np.unique(made)) <= {-1, 1}
    assert np.array_equal(made.astype(int) @ made.astype(int).T, size * np.eye(size, dtype=int))


@pytest.mark.parametrize("size", [7, 12, 36, 86])
def test_random_matrices_are_orthogonal_and_seeded(size: int) -> None:
    one, two = (random_hadamard(size, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(one, two) and off_orthogonal(one) < 1e-10
    kept = keeping_ones(random_orthogonal(size - 1, np.random.default_rng(0)))
    assert off_orthogonal(kept) < 1e-10 and np.allclose(kept @ np.ones(size), 1) and np.allclose(kept.sum(0), 1)


def test_the_cayley_map_gives_orthogonal_matrices() -> None:
    free = torch.randn(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert off_orthogonal(cayley(free).numpy()) < 1e-12
    assert torch.equal(cayley(torch.zeros(3, 3)), torch.eye(3))


def test_rms_norms_commute_with_rotations_and_layer_norms_do_not() -> None:
    x = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    r = torch.from_numpy(random_hadamard(12, np.random.default_rng(0)))
    ones = torch.from_numpy(keeping_ones(random_orthogonal(11, np.random.default_rng(0))))
    rms = lambda v: nn.functional.rms_norm(v, (12,))  # noqa: E731
    layer = lambda v: nn.functional.layer_norm(v, (12,))  # noqa: E731
    assert torch.allclose(rms(x @ r), rms(x) @ r)
    assert not torch.allclose(layer(x @ r), layer(x) @ r, atol=1e-2)
    assert torch.allclose(layer(x @ ones), layer(x) @ ones)


# ---- rotations ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_residual_and_value_rotations_are_exact_and_leave_no_operator(shape: str, front: str) -> None:
    graph = language_graph(shape, front)
    after, outcome = transformed(graph, P.Rotate())
    rotated = said(outcome, "rotated")
    assert {d.data["size"] for d in rotated} == {32, 8} and all(d.data["off_orthogonal"] < 1e-5 for d in rotated)
    assert len(after.nodes) <= len(graph.nodes) + (shape == "gpt2")  # the head gets the last norm's bias
    assert len([d for d in rotated if "residual" in d.reason]) == 1
    assert len([d for d in rotated if "inner" in d.reason]) == 2  # the values of two layers
    refused = " ".join(d.reason for d in said(outcome, "refused"))
    assert "silu" in refused or "sigmoid" in refused or "power" in refused or "gelu" in refused


def test_a_tied_embedding_is_copied_where_the_head_takes_a_gain() -> None:
    graph = language_graph("gpt2", "fx", tied=True)
    after, outcome = transformed(graph, P.Rotate())
    assert said(outcome, "untied")
    assert any(n.op == "rms_norm" for n in after.nodes) and not any(n.op == "layer_norm" for n in after.nodes)
    _, left = transformed(graph, P.Rotate(untie=False))
    assert not [d for d in said(left, "rotated") if "residual" in d.reason]
    assert any("gain" in d.reason for d in said(left, "refused"))


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_rotary_embeddings_refuse_a_head_rotation(front: str) -> None:
    _, outcome = transformed(language_graph("llama", front), P.Rotate(where=ALL))
    assert not [d for d in said(outcome, "rotated") if "query_key" in d.reason]
    assert any("rotary" in d.reason or "cos" in d.reason for d in said(outcome, "refused"))


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_queries_and_keys_rotate_where_nothing_stands_between(front: str) -> None:
    _, outcome = transformed(language_graph("gpt2", front, layers=1), P.Rotate(where=["query_key"]))
    assert [d.data["size"] for d in said(outcome, "rotated")] == [8]


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_a_post_norm_stream_is_refused_its_values_are_not(front: str) -> None:
    _, outcome = transformed(language_graph("bert", front), P.Rotate())
    assert all(d.data["size"] == 8 for d in said(outcome, "rotated")) and said(outcome, "rotated")
    assert any("graph output" in d.reason or "gain" in d.reason for d in said(outcome, "refused"))


def test_rotating_what_may_not_be_rotated_raises() -> None:
    graph = load(nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)).eval(), (torch.randn(2, 4),), "fx")
    groups = axis_groups(graph)
    group = groups["0.weight:0"]
    assert "gelu" in freedom(groups, group).reason
    with pytest.raises(ConstraintError, match="cannot be rotated"):
        rotate(groups, {group: np.eye(6)})
    plain = load(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).eval(), (torch.randn(2, 4),), "fx")
    groups = axis_groups(plain)
    with pytest.raises(ConstraintError, match="orthogonal"):
        rotate(groups, {groups["0.weight:0"]: 2 * np.eye(6)})


@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("seed", range(6))
def test_random_branches_of_linear_layers(seed: int, front: str) -> None:
    """Sums, concatenations, reshapes and norms between linear layers: whatever is rotated, the function stays."""
    rng = np.random.default_rng(seed)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 8)
            self.d = nn.Linear(16 if seed % 2 else 8, 4)
            self.norm = nn.RMSNorm(8) if seed % 3 else nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x) + self.b(x) * 0.5
            z = self.c(self.norm(y))
            z = torch.relu(z) if seed == 4 else z + y
            z = torch.cat([z, y], -1) if seed % 2 else z.reshape(3, 2, 8).reshape(6, 8)
            return self.d(z)

    torch.manual_seed(int(rng.integers(100)))
    graph = load(Net().eval(), (torch.randn(6, 5),), front)
    _, outcome = transformed(graph, P.Rotate(where=ALL, method="random"))
    assert said(outcome, "rotated") or said(outcome, "refused")


@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_learned_rotations_lower_the_quantized_error(shape: str, front: str) -> None:
    step = P.Rotate(method="learned", steps=25, rows=64, rate=0.02)
    after, outcome = transformed(language_graph(shape, front, layers=1), step, batches())
    layers = outcome.details["layers"]
    assert layers and sum(v["loss"] for v in layers.values()) < 0.9 * sum(v["loss_start"] for v in layers.values())
    assert sum(v["qsur_after"] for v in layers.values()) > sum(v["qsur_before"] for v in layers.values())
    assert all(d.data["off_orthogonal"] < 1e-5 for d in said(outcome, "rotated"))
    assert said(outcome, "scaled")
    assert len(after.nodes) <= len(language_graph(shape, front, layers=1).nodes) + 1  # the head's new bias


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_online_rotations_are_two_products_before_the_layer(front: str) -> None:
    graph = language_graph("llama", front, layers=1)
    after, outcome = transformed(graph, P.Rotate(online=["*down_proj"]))
    made = said(outcome, "rotated online")
    assert [d.data["sizes"] for d in made] == [[6, 8]] and len(made[0].data["nodes"]) == 2
    products = lambda g: sum(n.op in ("matmul", "linear") for n in g.nodes)  # noqa: E731
    assert products(after) == products(graph) + 2


# ---- affine maps -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("shape", ["llama", "gpt2", "bert"])
def test_affine_maps_are_two_small_products_per_input(shape: str, front: str) -> None:
    graph = language_graph(shape, front, layers=1)
    after, outcome = transformed(graph, P.FlatTransform(steps=15, rows=64, rate=0.01), batches())
    made = said(outcome, "transformed")
    assert made
    for d in made:
        assert len(d.data["nodes"]) == 2 and d.data["error_after"] < d.data["error_before"]
        assert 1 <= d.data["condition"] < 1e3 and 0 < d.data["activation_clip"] <= 1
        a, b = d.data["sizes"]
        for name, size in zip(d.data["nodes"], (a, b), strict=True):
            small = [v.weight.shape for v in after.node(name).inputs if v is not None and v.weight is not None]
            assert small == [(size, size)]
    products = lambda g: sum(n.op in ("matmul", "linear") for n in g.nodes)  # noqa: E731
    assert products(after) == products(graph) + 2 * len(made)
    if shape == "llama":  # query, key and value share one map, gate and up another
        assert sorted(len(d.subject.split(",")) for d in made)[-2:] == [2, 3]


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_the_small_products_stay_float_when_the_layer_is_quantized(front: str) -> None:
    graph = language_graph("llama", front, layers=1)
    pipe = fl.Pipeline([P.FlatTransform(steps=5, rows=64, rate=0.01), P.Quantize()])
    result = pipe.run(graph, calibration=batches(), verify=False)
    made = [d for d in result.report.passes[0].decisions if d.action == "transformed"]
    assert made
    for d in made:
        for name in d.data["nodes"]:
            producers = [v.producer for v in result.graph.node(name).inputs if v is not None and v.producer is not None]
            assert all(n.op != "dequantize" for n in producers)


def test_near_square() -> None:
    assert [near_square(n) for n in (48, 384, 7, 64)] == [(6, 8), (16, 24), (1, 7), (8, 8)]


# ---- queries and keys as one matrix ----------------------------------------------------------------------------------
@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("shape", ["gpt2", "bert"])
def test_query_key_fusion_is_exact_with_biases(shape: str, front: str) -> None:
    graph = language_graph(shape, front)
    after, outcome = transformed(graph, P.FuseQueryKey())
    assert len(said(outcome, "fused")) == 2
    weights = [w for name, w in after.weights.items() if "_key" in name and len(w.shape) == 2]
    assert [w.shape for w in weights] == [(128, 32)] * 2 and len(after.nodes) != len(graph.nodes)


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_query_key_fusion_is_refused_under_rotary_embeddings(front: str) -> None:
    graph = language_graph("llama", front)
    after, outcome = transformed(graph, P.FuseQueryKey())
    assert not said(outcome, "fused") and len(said(outcome, "refused")) == 2
    assert all("stands between" in d.reason for d in said(outcome, "refused"))
    assert len(after.nodes) == len(graph.nodes)


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_query_key_fusion_through_a_plain_softmax(front: str) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            b, n, _ = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
            scores = (q * 0.5) @ k.transpose(-2, -1)
            return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, 12))

    torch.manual_seed(0)
    _, outcome = transformed(load(Attention().eval(), (torch.randn(2, 5, 12),), front), P.FuseQueryKey())
    assert [d.data["heads"] for d in said(outcome, "fused")] == [3]


# ---- parts -------------------------------------------------------------------------------------------------------
def test_simulated_rounding_is_the_quantizers() -> None:
    from foldline.passes.quantize.numerics import grid, weight_params
    from foldline.passes.quantize.spec import TensorFormat

    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 32)).astype(np.float32) + 0.3
    for form in (TensorFormat("uint8"), TensorFormat("int8", True), TensorFormat("uint8", range=(0, 15))):
        wanted = grid(x.min(), x.max(), form).apply(x)
        assert np.allclose(fake_quantize(torch.from_numpy(x), form).numpy(), wanted, atol=1e-6)
    for form in (TensorFormat("int8", True, "out_channel"), TensorFormat("int8", True, "block", 8, (-8, 7))):
        wanted = weight_params(x, 0, form, in_axis=1).apply(x)
        assert np.allclose(fake_quantize(torch.from_numpy(x), form, per_row=True).numpy(), wanted, atol=1e-6)


def test_qsur_is_larger_without_outliers() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 16)).astype(np.float32)
    spoilt = x.copy()
    spoilt[:, 3] *= 30
    turned = spoilt @ random_hadamard(16, rng).astype(np.float32)
    assert qsur(x) > qsur(turned) > qsur(spoilt)


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_the_pipeline_verifies_transforms_as_exact(front: str) -> None:
    graph = language_graph("gpt2", front, layers=1)
    import foldline as fl

    result = fl.Pipeline([Rotate(), P.Smooth(rows=32)]).run(graph.to_model(), *_example(front), calibration=batches())
    for record in result.report.passes:
        assert record.comparison is not None and record.comparison["ok"], record


def _example(front: str) -> tuple[Any, ...]:
    return ((torch.zeros(2, 9, dtype=torch.int64),),) if front == "fx" else ()
