"""ReplaceAttention: cores found fused or written out; exp over its sum is softmax; softplus masks, scales, sharpens."""

from __future__ import annotations

import math
from typing import Any

import foldline as fl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foldline import passes as P
from foldline.graph.execute import run_graph, synthesize_inputs
from foldline.graph.ir import Graph
from foldline.passes.base import Context, Contract
from foldline.passes.transform.attention import cores
from support.frontends import FRONT_ENDS, load, toy_graph
from support.language_shapes import batches, language_graph
from torch import nn


class Fused(nn.Module):
    """Scaled dot-product attention with everything it can have."""

    def __init__(self, causal: bool = False, gqa: bool = False) -> None:
        super().__init__()
        self.causal, self.gqa = causal, gqa

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, enable_gqa=self.gqa, scale=0.7)


class Rows(nn.Module):
    """softmax(q k^T + mask) v, written out."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) + mask, -1) @ v


def qkv(heads: int = 4, keys: int = 4, queries: int = 5, length: int = 5) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(2, heads, queries, 8), torch.randn(2, keys, length, 8), torch.randn(2, keys, length, 6)


def replaced(graph: Graph, **options: Any) -> Graph:
    after = graph.clone()
    outcome = P.ReplaceAttention(**options).apply(after, Context())
    assert outcome.details["replaced"] == len(cores(graph)) > 0
    assert not [n for n in after.nodes if n.op in ("softmax", "sdpa")]
    return after


def same(one: Graph, other: Graph, inputs: Any, bound: float = 1e-6) -> None:
    a, b = (run_graph(g, g.bind(inputs))[0][0] for g in (one, other))
    assert np.isfinite(b).all() and np.abs(a - b).max() <= bound * np.abs(a).max()


@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize(
    ("name", "count"),
    [("vision_transformer", 2), ("separate_qkv", 1), ("grouped_query_rope", 1), ("window_attention", 1)],
)
def test_every_attention_of_the_toys_is_found(name: str, count: int, front: str) -> None:
    graph = toy_graph(name, front)
    assert len(cores(graph)) == count
    same(graph, replaced(graph, form="exp"), synthesize_inputs(graph, 0), 2e-6)


@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("shape", ["gpt2", "llama", "bert"])
def test_every_attention_of_transformers_is_found(shape: str, front: str) -> None:
    graph = language_graph(shape, front)
    assert len(cores(graph)) == 2
    same(graph, replaced(graph, form="exp"), batches()[0], 1e-5)


def test_classifiers_softmax_is_no_attention() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.linear(x), -1)

    assert not cores(load(Head().eval(), (torch.randn(2, 3, 8),), "fx"))


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (Fused(), qkv()),
        (Fused(causal=True), qkv()),
        (Fused(gqa=True), qkv(keys=2)),
        (Fused(), (*qkv(queries=3), torch.rand(2, 1, 3, 5, generator=torch.Generator().manual_seed(0)) > 0.3)),
        (Fused(), (*qkv(queries=3), torch.randn(3, 5, generator=torch.Generator().manual_seed(0)))),
    ],
    ids=["plain", "causal", "grouped", "truth", "additive"],
)
def test_fused_attention_is_taken_apart_exactly(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    graph = load(module.eval(), inputs, "fx")
    assert [n.op for n in cores(graph)] == ["sdpa"]
    same(graph, replaced(graph, form="exp"), inputs)


def test_a_causal_mask_over_unknown_lengths_is_refused() -> None:
    q = torch.export.Dim("length", min=2, max=64)
    inputs = qkv()
    program = torch.export.export(Fused(causal=True).eval(), inputs, dynamic_shapes=({2: q}, {2: q}, {2: q}))
    graph = fl.load(program, inputs)
    outcome = P.ReplaceAttention(form="exp").apply(graph, Context())
    assert [d.action for d in outcome.decisions] == ["refused"] and "run time" in outcome.decisions[0].reason


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_large_scores_and_masks_stay_finite(front: str) -> None:
    """exp over its sum is the stable softmax to 1e-6 at scores of 1e4; a query that sees no key gives zeros."""
    q, k, v = qkv()
    mask = torch.zeros(2, 1, 5, 5)
    mask[:, :, 1, 2:], mask[0, :, 3] = -math.inf, -math.inf
    inputs = (q * 1000, k, v, mask)
    graph = load(Rows().eval(), inputs, front)
    for options in ({"form": "exp"}, {}, {"power": 3.0}, {"form": "exp", "power": 2.0}):
        after = replaced(graph, **options)
        y = run_graph(after, after.bind(inputs))[0][0]
        assert np.isfinite(y).all() and (y[0, :, 3] == 0).all()
        if options == {"form": "exp"}:
            wanted = (
                torch.softmax((q.double() * 1000) @ k.double().transpose(-1, -2) + mask, -1).nan_to_num() @ v.double()
            )
            assert np.abs(y - wanted.numpy()).max() < 1e-5


@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("power", [None, 4.0])
def test_softplus_is_what_the_formula_says(power: float | None, front: str) -> None:
    q, k, v = qkv()
    mask = torch.full((5, 5), torch.finfo(torch.float32).min).triu(1).expand(2, 1, 5, 5).contiguous()
    graph = load(Rows().eval(), (q, k, v, mask), front)
    after = replaced(graph, power=power, threshold=0.6)
    seen = torch.ones(5, 5, dtype=torch.float64).tril()
    n = seen.sum(-1, keepdim=True)
    a = F.softplus((n + 1).log() * (q.double() @ k.double().transpose(-1, -2))) * seen
    a = a / a.sum(-1, keepdim=True)
    if power is not None:
        a = torch.relu(n * a - 0.6) ** power
        a = a / a.sum(-1, keepdim=True)
    y = run_graph(after, after.bind((q, k, v, mask)))[0][0]
    np.testing.assert_allclose(y, (a @ v.double()).numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in qkv())
    mask = torch.full((5, 5), torch.finfo(dtype).min, dtype=dtype).triu(1)
    graph = load(Fused().eval(), (q, k, v, mask), "fx")
    wanted = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), mask.double(), scale=0.7)
    for options in ({"form": "exp"}, {"power": 2.0}):
        after = replaced(graph, **options)
        y = run_graph(after, after.bind((q, k, v, mask)))[0][0].astype(np.float64)
        assert np.isfinite(y).all()
        assert options != {"form": "exp"} or np.abs(y - wanted.numpy()).max() < 0.05
        np.testing.assert_allclose(y[:, :, 0], v[:, :, 0].double().numpy(), atol=1e-2)  # it sees one key alone


def test_contracts() -> None:
    assert P.ReplaceAttention(form="exp").promise() is Contract.EXACT
    assert P.ReplaceAttention(form="exp", power=2.0).promise() is Contract.FRESH
    with pytest.raises(fl.ConfigError, match="threshold"):
        P.ReplaceAttention(power=2.0, threshold=1.5)


def test_sharpening_needs_no_training_and_keeps_the_order() -> None:
    """The re-weighting alone: of a softmax's weights those under the threshold go, the largest stays the largest."""
    q, k, v = qkv(length=40, queries=3)
    mask = torch.zeros(2, 1, 3, 40)
    graph = load(Rows().eval(), (q, k, torch.eye(40).expand(2, 4, 40, 40).contiguous(), mask), "fx")
    inputs = (q, k, torch.eye(40).expand(2, 4, 40, 40).contiguous(), mask)
    plain = run_graph(graph, graph.bind(inputs))[0][0]
    after = replaced(graph, form="exp", power=1.5, threshold=0.5)
    sharp = run_graph(after, after.bind(inputs))[0][0]
    assert (sharp.argmax(-1) == plain.argmax(-1)).all() and np.allclose(sharp.sum(-1), 1, atol=1e-5)
    assert ((sharp == 0) == (plain * 40 <= 0.5)).mean() > 0.999 and (sharp == 0).mean() > 0.2
    assert (sharp.max(-1) >= plain.max(-1) - 1e-6).all()
