"""KV caches: keys and values are found in both spellings of attention; Q/DQ where a cache is, scales elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from foldline import passes as P
from foldline.graph.errors import ConstraintError
from foldline.graph.execute import run_graph
from foldline.graph.fx import load_torch
from foldline.graph.onnx import load_onnx
from foldline.passes.base import Context
from foldline.passes.quantize.cache import keys_and_values
from torch import nn


class Attention(nn.Module):
    """Grouped queries (4 heads over 2), spelled with sdpa or with products; with a cache it appends to it."""

    def __init__(self, fused: bool, cache: bool) -> None:
        super().__init__()
        self.fused, self.cache = fused, cache
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.o = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, past_k: Any = None, past_v: Any = None) -> Any:
        n, t, _ = x.shape
        q = self.q(x).view(n, t, 4, 8).transpose(1, 2)
        k, v = (m(x).view(n, t, 2, 8).transpose(1, 2) for m in (self.k, self.v))
        if self.cache:
            k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        wide_k, wide_v = (z.repeat_interleave(2, 1) for z in (k, v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, wide_k, wide_v)
        else:
            y = torch.softmax(q @ wide_k.transpose(2, 3) / 8**0.5, -1) @ wide_v
        y = self.o(y.transpose(1, 2).reshape(n, t, 32))
        return (y, k, v) if self.cache else y


_FILES: dict[tuple[bool, bool], onnx.ModelProto] = {}


def case(front: str, fused: bool, cache: bool) -> tuple[Any, list[Any]]:
    torch.manual_seed(0)
    model = Attention(fused, cache).eval()
    batches = []
    for _ in range(3):
        x = torch.randn(2, 5, 32)
        batches.append((x, torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8) * 3) if cache else (x,))
    if front == "fx":
        return load_torch(model, batches[0]), batches
    if (fused, cache) not in _FILES:
        program = torch.onnx.export(model, batches[0], dynamo=True, verbose=False, opset_version=20)
        _FILES[fused, cache] = program.model_proto
    model_file = onnx.ModelProto()
    model_file.CopyFrom(_FILES[fused, cache])
    return load_onnx(model_file), batches


@pytest.mark.parametrize("front", ["fx", "onnx"])
@pytest.mark.parametrize(("fused", "granularity"), [(True, "tensor"), (True, "head"), (False, "channel")])
def test_a_cache_gets_its_pairs(front: str, fused: bool, granularity: str) -> None:
    graph, batches = case(front, fused, cache=True)
    found = keys_and_values(graph)
    assert [c.kind for c in found] == ["keys", "values"] and all(c.at_hand for c in found)
    assert all(c.value.hint == (2, 2, 12, 8) for c in found)
    reference, _ = run_graph(graph, graph.bind(batches[0]))
    outcome = P.QuantizeCache(granularity=granularity).apply(graph, Context(calibration=batches))
    assert outcome.details["cached"] == 2
    pairs = [n for n in graph.nodes if n.op == "quantize"]
    assert len(pairs) == 2 == sum(n.op == "dequantize" for n in graph.nodes)
    outputs, _ = run_graph(graph, graph.bind(batches[0]))
    for scale, value, before in zip(outcome.details["scales"].values(), outputs[1:], reference[1:], strict=True):
        size = np.asarray(scale["scale"], np.float32)
        assert size.shape == {"tensor": (), "head": (2,), "channel": (8,)}[granularity]
        spread = size if scale["axis"] is None else size.reshape([-1 if i == scale["axis"] else 1 for i in range(4)])
        steps = value / spread
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)  # the output holds what the cache can hold
        assert (np.abs(value - before) <= spread * 0.5001).all()
    assert 0 < np.square(outputs[0] - reference[0]).mean() < 1e-3 * np.square(reference[0]).mean()


@pytest.mark.parametrize("front", ["fx", "onnx"])
@pytest.mark.parametrize("fused", [True, False])
def test_without_a_cache_the_scales_are_data(front: str, fused: bool) -> None:
    graph, batches = case(front, fused, cache=False)
    before = len(graph.nodes)
    outcome = P.QuantizeCache(dtype="float8_e4m3fn").apply(graph, Context(calibration=batches))
    assert len(graph.nodes) == before and outcome.details["cached"] == 0
    scales = outcome.details["scales"]
    assert [s["kind"] for s in scales.values()] == ["keys", "values"]
    for name, scale in scales.items():
        peak = 0.0
        for batch in batches:
            _, tapped = run_graph(graph, graph.bind(batch), [name])
            peak = max(peak, float(np.abs(tapped[name]).max()))
            assert tapped[name].size == 2 * 5 * 16  # before the heads are repeated
        assert scale["scale"] == pytest.approx(peak / 448, rel=1e-6)


def test_write_always_and_wrong_models() -> None:
    graph, batches = case("fx", True, cache=False)
    P.QuantizeCache(dtype="uint8", write="always").apply(graph, Context(calibration=batches))
    assert sum(n.op == "quantize" for n in graph.nodes) == 2
    plain = load_torch(nn.Linear(4, 4), torch.zeros(1, 4))
    with pytest.raises(ConstraintError, match="no keys and values"):
        P.QuantizeCache().apply(plain, Context(calibration=[torch.zeros(1, 4)]))
