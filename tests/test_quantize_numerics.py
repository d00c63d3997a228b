"""QuantParams against ONNX's own definition (its reference evaluator) and against ONNX Runtime, bit for bit."""

from __future__ import annotations

import sys
import tracemalloc

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from foldline.graph.errors import ConfigError, ConstraintError
from foldline.passes.quantize import TensorFormat
from foldline.passes.quantize.numerics import QuantParams, grid, quality_db, range_params, sqnr_db, weight_params
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

INTEGERS = ("int8", "uint8", "int16", "uint16", "int4", "uint4", "int2", "uint2")
FLOATS = ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn")
CODES = {
    "int8": TensorProto.INT8, "uint8": TensorProto.UINT8, "int16": TensorProto.INT16, "uint16": TensorProto.UINT16,
    "int32": TensorProto.INT32, "int4": TensorProto.INT4, "uint4": TensorProto.UINT4, "int2": TensorProto.INT2,
    "uint2": TensorProto.UINT2, "float8_e4m3fn": TensorProto.FLOAT8E4M3FN, "float8_e5m2": TensorProto.FLOAT8E5M2,
    "float4_e2m1fn": TensorProto.FLOAT4E2M1,
}  # fmt: skip
SHAPE = (6, 10)
# What this build of ONNX Runtime computes on the CPU, in blocks too.
RUNTIME = ("int8", "uint8", "int16", "uint16", "int4", "uint4")


def model(p: QuantParams, steps: str = "both") -> onnx.ModelProto:
    """x -> QuantizeLinear -> q -> DequantizeLinear -> d, with the parameters as initializers."""
    attrs = {} if p.axis is None else {"axis": p.axis}
    attrs |= {"block_size": p.block} if p.block else {}
    scale = numpy_helper.from_array(p.scale, "s")
    zero = numpy_helper.from_array(p.zero_point, "z")
    nodes, inputs = [], []
    if steps == "both":
        nodes.append(helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attrs))
        inputs.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE))
    else:
        inputs.append(helper.make_tensor_value_info("q", CODES[p.dtype], SHAPE))
    nodes.append(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], **attrs))
    outputs = [helper.make_tensor_value_info("d", TensorProto.FLOAT, SHAPE)]
    if steps == "both":
        outputs.append(helper.make_tensor_value_info("q", CODES[p.dtype], SHAPE))
    graph = helper.make_graph(nodes, "g", inputs, outputs, [scale, zero])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=10)


def samples(p: QuantParams, seed: int = 0) -> np.ndarray:
    """Values in and beyond the range, zeros, and values on ties."""
    x = np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32) * 3
    whole = p.spread(p.scale.astype(np.float32), SHAPE) * np.ones(SHAPE, np.float32)
    x[0] = whole[0] * (np.arange(SHAPE[1]) - 5 + 0.5)
    x[1, :4] = (0, -0.0, 1e30, -1e30)
    return x


def params(dtype: str, kind: str, symmetric: bool = True) -> QuantParams:
    rng = np.random.default_rng(3)
    form = TensorFormat(dtype, symmetric=symmetric)
    shape = {"tensor": (), "axis0": (6,), "axis1": (10,), "block0": (2, 10), "block1": (6, 3)}[kind]
    low, high = -rng.uniform(0.5, 4, shape), rng.uniform(0.5, 4, shape)
    axis = None if kind == "tensor" else int(kind[-1])
    return grid(low, high, form, axis, 4 if kind.startswith("block") else 0)


KINDS = ("tensor", "axis0", "axis1", "block0", "block1")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", INTEGERS + FLOATS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_bit_for_bit_as_onnx_defines_it(dtype: str, kind: str, symmetric: bool) -> None:
    p = params(dtype, kind, symmetric)
    assert p.dtype == dtype
    x = samples(p)
    if kind.startswith("block") and x.shape[p.axis] % p.block:
        # The reference evaluator wants whole blocks: give it the part that has them.
        whole = x.shape[p.axis] // p.block * p.block
        part = tuple(slice(whole) if i == p.axis else slice(None) for i in range(2))
        x = x[part]
        scale = p.scale[tuple(slice(whole // p.block) if i == p.axis else slice(None) for i in range(2))]
        zero = p.zero_point[tuple(slice(whole // p.block) if i == p.axis else slice(None) for i in range(2))]
        p = QuantParams(scale, zero, p.axis, p.block)
    d, q = ReferenceEvaluator(model(p)).run(None, {"x": x})
    mine = p.quantize(x)
    assert mine.dtype == q.dtype
    # The reference converts to int32 before it clips, so huge values wrap there.
    inside = np.abs(x) < 1e8
    np.testing.assert_array_equal(mine.astype(np.float32)[inside], q.astype(np.float32)[inside])
    np.testing.assert_array_equal(p.dequantize(q), d)
    low, high = p.limits
    assert mine.astype(np.float32).min() == low and mine.astype(np.float32).max() == high  # 1e30 saturates


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", RUNTIME)
def test_bit_for_bit_as_onnxruntime_computes_it(dtype: str, kind: str) -> None:
    p = params(dtype, kind, symmetric=False)
    session = ort.InferenceSession(model(p).SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.clip(samples(p, 1), -1e4, 1e4)  # beyond int32 some of its kernels wrap where QuantParams saturates
    d, *_ = session.run(["d"], {"x": x})
    np.testing.assert_array_equal(p.dequantize(p.quantize(x)), d)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32"])
def test_large_zero_points_and_integers_keep_every_bit(dtype: str) -> None:
    info = np.iinfo(dtype)
    zero = np.array(0 if dtype == "int32" else info.max - 3, dtype)
    p = QuantParams(np.array(0.1, np.float32), zero)
    q = np.linspace(info.min, info.max, 60).astype(dtype).reshape(SHAPE)
    session = ort.InferenceSession(model(p, "dq").SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(p.dequantize(q), session.run(None, {"q": q})[0])


def test_int32_saturates_at_the_ends_of_its_range() -> None:
    p = QuantParams(np.array(1, np.float32), np.array(0, np.int32))
    found = p.quantize(np.array([3e9, -3e9, 2.5, 3.5, 2**30 + 64], np.float32))
    np.testing.assert_array_equal(found, [2**31 - 1, -(2**31), 2, 4, 2**30])


@pytest.mark.parametrize(
    ("form", "ends"),
    [
        (TensorFormat("uint8", range=(0, 15)), (0, 15)),
        (TensorFormat("int8", symmetric=True, range=(-64, 63)), (-63, 63)),
        (TensorFormat("int8", symmetric=True, range=(-127, 127)), (-127, 127)),
        (TensorFormat("uint8", symmetric=True), (1, 255)),
        (TensorFormat("float8_e4m3fn", range=(-240, 240)), (-240, 240)),
    ],
)
def test_a_narrower_range_is_filled_and_kept(form: TensorFormat, ends: tuple[float, float]) -> None:
    low = -2.0 if form.symmetric or form.is_float else -0.5
    p = range_params(low, 2.0, form)
    q = p.quantize(np.linspace(low, 2, 4001, dtype=np.float32)).astype(np.float32)
    assert (q.min(), q.max()) == ends
    beyond = p.quantize(np.array([-9, 9], np.float32)).astype(np.float32)
    low, high = form.limits
    assert beyond[0] >= low and beyond[1] == high


@pytest.mark.parametrize("granularity", ["tensor", "out_channel", "in_channel", "block"])
@pytest.mark.parametrize("dtype", ["int8", "int4", "uint4", "float8_e4m3fn", "float4_e2m1fn"])
def test_weights_are_covered_to_half_a_step(dtype: str, granularity: str) -> None:
    w = np.random.default_rng(0).standard_normal((5, 7, 3, 3)).astype(np.float32)
    w[1] = 0
    form = TensorFormat(dtype, symmetric=dtype != "uint4", granularity=granularity, block=4 * (granularity == "block"))
    p = weight_params(w, 0, form, in_axis=1)
    shapes = {"tensor": (), "out_channel": (5,), "in_channel": (7,), "block": (5, 2, 3, 3)}
    assert p.scale.shape == p.zero_point.shape == shapes[granularity]
    error = np.abs(p.apply(w) - w)
    step = p.spread(p.scale, w.shape)
    # An element of a floating type lies half its own gap away: at most half of the gap below the largest value.
    widest = {"float8_e4m3fn": 32, "float4_e2m1fn": 2, "uint4": 2}.get(dtype, 1)
    assert (error <= widest * step / 2 * (1 + 1e-5)).all()
    assert not p.apply(w)[1].any()


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e8m0fnu", "float8_e4m3fn"])
def test_scales_are_rounded_to_their_type_first(name: str) -> None:
    w = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    form = TensorFormat("int4", symmetric=True, granularity="block", block=16, scale_dtype=name)
    p = weight_params(w, 0, form, in_axis=1)
    assert str(p.scale.dtype) == name and p.scale.shape == (4, 4)
    full = weight_params(w, 0, TensorFormat("int4", symmetric=True, granularity="block", block=16), in_axis=1).scale
    ratio = p.scale.astype(np.float64) / full
    if name == "float8_e8m0fnu":
        assert (np.log2(p.scale.astype(np.float64)) % 1 == 0).all() and (ratio >= 1).all() and (ratio < 2).all()
    else:
        assert np.abs(ratio - 1).max() <= float(ml_dtypes.finfo(name).eps) / 2
    assert str(p.dequantize(p.quantize(w)).dtype) == (name if name in ("float16", "bfloat16") else "float32")


def test_reciprocal_rounding_differs_on_ties_only() -> None:
    scale = np.float32(0.0374)
    x = (np.arange(-100, 100) + 0.5).astype(np.float32) * scale
    divide = QuantParams(np.array(scale), np.array(0, np.int8))
    reciprocal = QuantParams(np.array(scale), np.array(0, np.int8), rule="reciprocal")
    a, b = divide.quantize(x), reciprocal.quantize(x)
    assert (a != b).any() and np.abs(a.astype(int) - b).max() == 1
    import torch

    theirs = torch.quantize_per_tensor(torch.from_numpy(x), float(scale), 0, torch.qint8).int_repr().numpy()
    np.testing.assert_array_equal(b, theirs)
    others = np.random.default_rng(0).standard_normal(10000).astype(np.float32)
    np.testing.assert_array_equal(divide.quantize(others), reciprocal.quantize(others))


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"dtype": "int8", "block": 32}, "block"),
        ({"dtype": "int4", "granularity": "block"}, "block"),
        ({"dtype": "int8", "range": (-200, 10)}, "range"),
        ({"dtype": "uint8", "range": (3, 3)}, "range"),
        ({"dtype": "float8_e4m3fn", "range": (-1, 2)}, "range"),
        ({"dtype": "int8", "range": (-1.5, 2)}, "range"),
    ],
)
def test_contradictions_in_a_format_are_refused(fields: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        TensorFormat(**fields)


def test_bits_count_the_values_used() -> None:
    assert TensorFormat("uint8", range=(0, 15)).bits == 4 and TensorFormat("uint8", range=(0, 15)).stored_bits == 8
    assert TensorFormat("int8", range=(-64, 63)).bits == 7
    assert TensorFormat("int8", range=(-127, 127)).bits == 8
    assert TensorFormat("float4_e2m1fn").bits == 4


def test_blocks_need_an_input_axis() -> None:
    form = TensorFormat("int4", symmetric=True, granularity="block", block=32)
    with pytest.raises(ConstraintError, match="input-channel axis"):
        weight_params(np.ones((4, 64), np.float32), 0, form)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["int8", "uint4", "float8_e4m3fn"])
def test_large_tensors_are_worked_on_in_lots(dtype: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = params(dtype, kind, symmetric=False)
    x = np.clip(samples(p), -10, 10)
    whole = p.quantize(x)
    monkeypatch.setattr(sys.modules[QuantParams.__module__], "LOT", 20)
    assert len(list(p.parts(SHAPE))) == (2 if kind == "block0" else 3)
    np.testing.assert_array_equal(p.quantize(x), whole)
    assert quality_db(x, whole, p) == pytest.approx(sqnr_db(x, p.dequantize(whole)), rel=1e-9)


def test_a_large_weight_is_not_copied_whole() -> None:
    w = np.random.default_rng(0).standard_normal((4096, 1024)).astype(np.float32)
    form = TensorFormat("int8", symmetric=True, granularity="out_channel")
    tracemalloc.start()
    p = weight_params(w, 0, form)
    q = p.quantize(w)
    quality_db(w, q, p)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < q.nbytes + 40 * 2**20 / 2  # the result, and a few arrays of a million elements
