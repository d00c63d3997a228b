"""The three CPU specs on gates and pools: the same rules, and as many integer kernels, AVX2 and ARM emulated here."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import foldline as fl
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from foldline import passes as P
from foldline.backends import get
from foldline.backends.onnxruntime.backend import onnx_model
from foldline.passes.quantize.numerics import sqnr_db
from support.frontends import load
from torch import nn

TARGETS = ("onnxruntime-cpu", "onnxruntime-cpu-avx2", "onnxruntime-arm")
INTEGER = {"QLinearConv": 4, "QLinearGlobalAveragePool": 2, "QLinearAdd": 1, "QLinearMul": 1, "QGemm": 1}


class Gated(nn.Module):
    """A convolution, a squeeze-and-excite gate (mean, hard sigmoid), a convolution, a pooled head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.down, self.up, self.head = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        gate = torch.relu(self.down(x.mean((2, 3), keepdim=True)))
        x = torch.relu(self.last(x * nn.functional.hardsigmoid(self.up(gate))))
        return self.head(x.mean((2, 3), keepdim=True).flatten(1))


def optimized(path: Path, arm: bool) -> onnx.ModelProto:
    """The graph that ONNX Runtime runs. On ARM it moves int8 pairs into kernels by default; here it has to be told."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".run.onnx"))
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    if arm:
        options.add_session_config_entry("session.qdqisint8allowed", "1")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath)


@pytest.mark.parametrize("front", ["fx", "onnx"])
@pytest.mark.parametrize("target", TARGETS)
def test_gates_and_pools_run_in_integers(target: str, front: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, batches = Gated().eval(), [torch.randn(4, 3, 12, 12) for _ in range(2)]
    graph = load(net, (batches[0],), front)
    made = fl.Pipeline([P.Quantize(target=target, calibration=batches)]).run(graph, batches[0], verify=False)
    path = tmp_path / "m.onnx"
    artifact = get(target).lower(made.graph, batches[0], path=path)
    written = Counter(n.op_type for n in onnx.load(path).graph.node)
    assert not {"ReduceMean", "HardSigmoid"} & set(written) and written["GlobalAveragePool"] == 2
    assert fl.check(path, target) == []
    ran = Counter(n.op_type for n in optimized(path, target.endswith("arm")).graph.node)
    assert {op: ran[op] for op in INTEGER} == INTEGER
    assert not {"Conv", "Gemm", "MatMul", "Mul", "Add", "GlobalAveragePool"} & set(ran)
    found = artifact.run(batches[0].numpy())[0]
    simulated = np.asarray(made.graph.run({made.graph.inputs[0].name: batches[0].numpy()})[0][0])
    assert np.abs(found - simulated).max() <= 0.02 * np.abs(simulated).max()
    assert sqnr_db(net(batches[0]).detach().numpy(), found) > 35


@pytest.mark.parametrize("target", TARGETS[1:])
def test_the_other_specs_have_the_rules_of_the_first_and_formats_of_their_own(target: str) -> None:
    base, spec = (get(name).spec for name in ("onnxruntime-cpu", target))
    assert spec.ops == base.ops and spec.commutes == base.commutes and spec.forbidden == base.forbidden
    assert {"mean", "hardsigmoid", "sigmoid", "leaky_relu", "adaptive_avg_pool"} <= set(spec.ops)
    if target.endswith("avx2"):  # a pair of products stays within 16 bits
        assert spec.activations == base.activations
        assert 2 * 255 * max(-spec.weights.limits[0], spec.weights.limits[1]) < 2**15
    else:  # both operands signed
        assert spec.activations.dtype == spec.weights.dtype == "int8" and not spec.activations.symmetric
        assert spec.weights.limits == base.weights.limits


def test_pairs_of_avx2_products_cannot_saturate(tmp_path: Path) -> None:
    """pmaddubsw adds two uint8 x int8 products in 16 bits: no pair of stored weights can overflow, whatever comes."""
    torch.manual_seed(0)
    net, batches = Gated().eval(), [torch.randn(4, 3, 12, 12)]
    reach = {}
    for target in TARGETS[:2]:
        made = fl.Pipeline([P.Quantize(target=target, calibration=batches)]).run(net, batches[0], verify=False)
        worst = 0
        for name, weight in made.graph.weights.items():
            if weight.dtype == "int8" and name.endswith("quantized"):
                rows = np.abs(weight.numpy().astype(int).reshape(weight.shape[0], -1))
                pairs = np.sort(rows, 1)[:, -2:].sum(1)
                worst = max(worst, 255 * int(pairs.max()))
        reach[target] = worst
    assert 0 < reach["onnxruntime-cpu-avx2"] < 2**15 <= reach["onnxruntime-cpu"]


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_weights_in_blocks_become_one_kernel_whatever_the_rank(front: str, tmp_path: Path) -> None:
    """Behind two axes a linear layer is a Gemm, of which ONNX Runtime itself makes no MatMulNBits."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 32, bias=False)
            self.head = nn.Linear(32, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.second(torch.relu(self.first(x))).mean(1))

    torch.manual_seed(0)
    x = torch.randn(3, 4, 64)
    graph = load(Net().eval(), (x,), front)
    graph = P.quantize(graph, target="onnxruntime-cuda").graph
    model, _ = onnx_model(graph)
    assert not any(node.op_type == "Gemm" for node in model.graph)
    fl.save(model, tmp_path / "m.onnx")
    assert fl.check(tmp_path / "m.onnx", "onnxruntime-cuda") == []
    assert Counter(n.op_type for n in optimized(tmp_path / "m.onnx", arm=False).graph.node)["MatMulNBits"] == 3
    expected = np.asarray(graph.run({graph.inputs[0].name: x.numpy()})[0][0])
    session = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    assert sqnr_db(expected, session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]) > 30
