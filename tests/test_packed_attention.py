"""Products that make query, key and value at once: one scale for TensorRT, and every weight product in integers."""

from __future__ import annotations

from pathlib import Path

import foldline as fl
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from foldline import passes as P
from foldline.backends import get
from foldline.backends.tensorrt.engine import EngineOptions, build, library
from foldline.graph.ir import Graph
from foldline.passes.quantize.numerics import sqnr_db
from foldline.passes.quantize.placement import place
from foldline.passes.quantize.spec.attention import packed_attention
from support.digits_vit import digits_vit
from support.frontends import load
from torch import nn

FRONTS = pytest.mark.parametrize("front", ["fx", "onnx"])


class Attention(nn.Module):
    """Attention with one product or three, written out or as one operator, and a gated product behind it."""

    def __init__(self, packed: bool, written: bool) -> None:
        super().__init__()
        self.written = written
        self.qkv = nn.Linear(16, 48) if packed else None
        self.parts = nn.ModuleList([] if packed else [nn.Linear(16, 16) for _ in range(3)])
        self.gated, self.out = nn.Linear(16, 64), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, c = x.shape
        if self.qkv is not None:
            q, k, v = self.qkv(x).reshape(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (part(x).reshape(n, t, 2, c // 2).transpose(1, 2) for part in self.parts)
        if self.written:
            y = (q * 0.35 @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        a, b = self.gated(x + y.transpose(1, 2).reshape(n, t, c)).chunk(2, -1)
        return self.out(a * torch.sigmoid(b))


def graph_of(front: str, packed: bool, written: bool) -> Graph:
    torch.manual_seed(0)
    return load(Attention(packed, written).eval(), (torch.randn(2, 6, 16),), front)


@FRONTS
@pytest.mark.parametrize("written", [False, True])
def test_only_the_product_of_all_three_is_packed(front: str, written: bool) -> None:
    graph = graph_of(front, True, written)
    linear = [n for n in graph.nodes if n.op == "linear"]
    assert [packed_attention(n) for n in linear] == [True, False, False]
    assert not any(packed_attention(n) for n in graph_of(front, False, written).nodes if n.op == "linear")


@FRONTS
def test_its_weight_has_one_scale_where_the_target_wants_that(front: str) -> None:
    graph = graph_of(front, True, True)
    grains = {t: [s.form.granularity for s in place(graph, get(t).spec, set()).weights] for t in TARGETS}
    assert grains == TARGETS


TARGETS = {
    "tensorrt": ["tensor", "out_channel", "out_channel"],
    "tensorrt-fp8": ["tensor"] * 3,
    "onnxruntime-cpu": ["out_channel"] * 3,
}


@pytest.mark.slow
@pytest.mark.skipif(library() is None, reason="no TensorRT: pip install foldline[tensorrt-oracle]")
@FRONTS
def test_every_weight_product_of_a_trained_transformer_is_int8(front: str, tmp_path: Path) -> None:
    net, (calibration, _), (x, y) = digits_vit()
    batches = list(calibration[:64].split(32))
    path = tmp_path / "vit.onnx"
    passes = [P.Fold(), P.Quantize(target="tensorrt", calibration=batches)]
    made = fl.Pipeline(passes).run(load(net, (batches[0],), front), batches[0], verify=False)
    artifact = get("tensorrt").lower(made.graph, batches[0], path=path, engine=False)
    assert fl.check(path, "tensorrt") == []
    (report,) = build([path], EngineOptions(library=library(), capability=89))
    file = onnx.load(path).graph
    stored = {t.name for t in file.initializer}
    weights = {n.output[0] for n in file.node if n.op_type == "DequantizeLinear" and n.input[0] in stored}
    kinds = {n.name: report.precision(n.name) for n in file.node if set(n.input) & weights}
    assert report.built and len(kinds) == 14 and set(kinds.values()) == {"int8"}
    with torch.no_grad():
        wanted = net(x[:320]).numpy()
    found = np.concatenate([artifact.run(part)[0] for part in x[:320].split(32)])
    assert sqnr_db(wanted, found) > 20
    assert (found.argmax(1) == y[:320].numpy()).mean() >= (wanted.argmax(1) == y[:320].numpy()).mean() - 0.01
