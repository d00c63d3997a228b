"""fl.check for ONNX Runtime against the optimized graphs that ONNX Runtime writes, and against its numbers."""

from __future__ import annotations

import platform
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from foldline.backends.check import check
from foldline.backends.onnxruntime.rules import RULES
from foldline.backends.onnxruntime.rules_cuda import RULES as CUDA
from foldline.passes.quantize.numerics import sqnr_db
from support.ort_cases import Case, cases
from support.trt_cases import I4, integers, model, scales

ALL = list(cases())
KERNELS = ("QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "MatMulNBits")
X86 = platform.machine().lower() in ("x86_64", "amd64")


def session(made: onnx.ModelProto, level: str, target: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if target is not None:
        options.optimized_model_filepath = str(target)
    return onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


def optimized(made: onnx.ModelProto, folder: Path) -> tuple[Counter[str], float]:
    """Operators of the optimized graph, and the least SQNR of its outputs against the graph as written."""
    target = folder / "optimized.onnx"
    fast, plain = session(made, "ORT_ENABLE_ALL", target), session(made, "ORT_DISABLE_ALL")
    rng = np.random.default_rng(1)
    feeds = {}
    for value in fast.get_inputs():
        shape = [d if isinstance(d, int) else 3 for d in value.shape]
        feeds[value.name] = rng.normal(size=shape).astype(np.float16 if "16" in value.type else np.float32)
    results = zip(plain.run(None, feeds), fast.run(None, feeds), strict=True)
    quality = min(sqnr_db(a.astype(np.float64), b.astype(np.float64)) for a, b in results)
    return Counter(node.op_type for node in onnx.load(target).graph.node), quality


@pytest.mark.skipif(not X86, reason="the rules for x86 are measured on x86")
@pytest.mark.parametrize("case", ALL, ids=lambda c: c.name)
def test_rules_fire_where_onnx_runtime_does_not_fuse_or_computes_otherwise(case: Case, tmp_path: Path) -> None:
    assert {d.rule for d in check(case.model, case.target)} == case.rules
    if case.integer is None:
        with pytest.raises(Exception, match=r"ONNXRuntimeError"):
            optimized(case.model, tmp_path)
        return
    ops, quality = optimized(case.model, tmp_path)
    assert sum(ops[kernel] for kernel in KERNELS) == case.integer
    # MatMulNBits quantizes its activation on the way; the sums are full of ties.
    if not ops["MatMulNBits"] and "sum" not in case.name:
        assert (quality < 45) == case.wrong, quality
    if "sum" in case.name:
        assert ops["QLinearAdd"] == (not case.rules)


def test_every_rule_has_a_case() -> None:
    assert {rule for case in ALL for rule in case.rules} == {r.id for r in RULES}
    assert len({r.id for r in RULES}) == len(RULES) >= 10


def test_the_cuda_provider_has_rules_of_its_own() -> None:
    (conv,) = [c for c in ALL if c.name == "conv"]
    assert {d.rule for d in check(conv.model, "onnxruntime-cuda")} == {"activation-qdq"}
    head = "g (float[2,8,64] x) => (float[2,8,16] y) {\n"
    blocks = " wd = DequantizeLinear<axis={}, block_size={}>(w, s)\n y = MatMul(x, wd)\n}}"
    data = {"w": integers(64, 16).clip(-7, 7).astype(I4)}
    good = model(head + blocks.format(0, 32), {**data, "s": np.ones((2, 16), np.float32)})
    bad = model(head + blocks.format(1, 16), {**data, "s": np.ones((64, 1), np.float32)})
    assert check(good, "onnxruntime-cuda") == []
    assert {d.rule for d in check(bad, "onnxruntime-cuda")} == {"weight-blocks"}
    odd = " y = com.microsoft.MatMulNBits<K=64, N=16, bits=4, block_size=24>(x, w, s)\n}"
    made = model(head + odd, {"w": np.zeros((16, 3, 12), np.uint8), "s": scales(48)})
    assert {d.rule for d in check(made, "onnxruntime-cuda")} == {"nbits-block"}
    integer = "g (int8[8,16] x) => (int32[8,16] y) { y = MatMulInteger(x, w) }"
    assert check(model(integer, {"w": integers(16, 16)}), "onnxruntime-cuda") == []
    linear = "g (int8[8,16] x) => (int8[8,16] y) { y = com.microsoft.QLinearSigmoid(x, s, z, s, z) }"
    made = model(linear, {"s": np.float32(0.1), "z": np.int8(0)})
    assert {d.rule for d in check(made, "onnxruntime-cuda")} == {"integer-op"}
    assert len(CUDA) == 4
