"""Small quantized ONNX files, each with what fl.check must say about ONNX Runtime's CPU provider."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from .trt_cases import E4, I4, I8, U8, F, integers, model, qd, scales

CONV = "g (float[1,16,8,8] x) => (float[1,16,8,8] y) {\n"
FLAT = "g (float[8,32] x) => (float[8,32] y) {\n"
CUBE = "g (float[2,8,32] x) => (float[2,8,32] y) {\n"


@dataclass(frozen=True)
class Case:
    """One file: the rules that fire, how many products ONNX Runtime then computes in integers, and its accuracy.

    ``integer`` is None where ONNX Runtime refuses the file; ``wrong`` says that its optimized graph gives other
    numbers than the file.
    """

    name: str
    model: onnx.ModelProto = field(repr=False)
    rules: frozenset[str]
    integer: int | None
    wrong: bool = False
    target: str = "onnxruntime-cpu"


SX = F(0.03)
SW = scales(16)


def _conv(**changes: Any) -> dict[str, Any]:
    base = {
        "sx": SX,
        "zx": U8(128),
        "s2": F(0.3),
        "z2": U8(100),
        "w": integers(16, 16, 3, 3),
        "sw": SW,
        "zw": np.zeros(16, I8),
        "b": np.arange(16, dtype=np.int32) * 9,
        "sb": (SX * SW).astype(F),
        "zb": np.zeros(16, np.int32),
        "bf": np.ones(16, F),
    }
    return {**base, **changes}


def _matrix(**changes: Any) -> dict[str, Any]:
    sw = scales(32)
    wide = {"w": integers(32, 32), "sw": sw, "zw": np.zeros(32, I8), "bf": np.ones(32, F)}
    bias = {"b": np.arange(32, dtype=np.int32) * 9, "sb": (SX * sw).astype(F), "zb": np.zeros(32, np.int32)}
    return {**_conv(), **wide, **bias, **changes}


W = " wd = DequantizeLinear<axis=0>(w, sw, zw)\n"
BIAS = " bd = DequantizeLinear<axis=0>(b, sb, zb)\n"
C = " c = Conv<pads=[1,1,1,1]>(xd, wd, bd)\n"
X = qd("x", "xd")
OUT = qd("c", "y", "s2", "z2")
MW = " wd = DequantizeLinear<axis=1>(w, sw, zw)\n"


def cases() -> Iterator[Case]:
    """All of them."""
    for name, rules, integer, text, more in [*_convolutions(), *_matrices(), *_sums()]:
        head = more.pop("head", CONV)
        opset = more.pop("opset", 21)
        target, wrong = more.pop("target", "onnxruntime-cpu"), more.pop("wrong", False)
        constants = (_conv if "[1,16" in head else _matrix)(**more)
        constants = {key: value for key, value in constants.items() if value is not None and key in text}
        yield Case(name, model(head + text + "}", constants, opset), frozenset(rules.split()), integer, wrong, target)


Row = tuple[str, str, int | None, str, dict[str, Any]]


def _convolutions() -> Iterator[Row]:
    base = X + W + BIAS + C + OUT
    more = {"head": CONV.replace("y)", "y, float[1,16,8,8] z)")}
    yield "conv", "", 1, base, {}
    yield "conv int8", "", 1, base, {"zx": I8(0), "z2": I8(3)}
    unsigned = (integers(16, 16, 3, 3).astype(int) + 128).astype(U8)
    yield "conv uint8 weights", "weight-type", 1, base, {"w": unsigned, "zw": np.full(16, 128, U8)}
    yield "conv, weights off 0", "", 1, base, {"zw": np.full(16, 3, I8)}
    yield "conv without Q behind", "output-q", 0, X + W + BIAS + C.replace(" c =", " y ="), {}
    yield "conv, float bias", "", 1, base.replace("wd, bd", "wd, bf"), {}
    yield "conv, bias scale", "bias-scale-conv", 0, base, {"sb": (SX * SW * 2).astype(F)}
    small = {"b": np.ones(16, I8), "zb": np.zeros(16, I8)}
    yield "conv, int8 bias", "bias-type", 0, base, small
    yield "conv, wrong axis", "weight-axis", 1, base.replace("<axis=0>(w", "<axis=1>(w"), {"wrong": True}
    yield "conv, no zero points", "zero-point", 1, base.replace("sx, zx", "sx"), {"zx": U8(0)}
    yield "conv, one zero point for many", "zero-point-shape", None, base, {"zw": I8(0)}
    for kind in (np.int16, np.uint16):
        yield f"conv {kind.__name__}", "type", 0, base, {"zx": kind(0), "z2": kind(0)}
    yield (
        "conv float8",
        "float8",
        None,
        base.replace("bd)", "bf)"),
        {
            "zx": np.array(0, E4),
            "z2": np.array(0, E4),
            "w": np.random.default_rng(0).normal(size=(16, 16, 3, 3)).astype(E4),
            "zw": np.zeros(16, E4),
        },
    )
    nibbles = np.random.default_rng(0).integers(-7, 7, (16, 16, 3, 3)).astype(I4)
    yield "conv int4 weights", "type", 0, base, {"w": nibbles, "zw": np.zeros(16, I4)}
    yield "conv is an output too", "fan-out", 0, base, {"head": CONV.replace("y)", "y, float[1,16,8,8] c)")}
    yield "conv and Tanh", "fan-out", 0, base + " z = Tanh(c)\n", dict(more)
    yield "two equal pairs", "", 1, base + qd("c", "z", "s2", "z2"), dict(more)
    yield "two pairs", "fan-out", 0, base + qd("c", "z"), dict(more)
    relu = X + W + BIAS + C + " r = Relu(c)\n" + qd("r", "y", "s2", "z2")
    yield "relu", "", 1, relu, {"z2": U8(0)}
    yield "relu, zero point 100", "relu-zero-point", 0, relu, {}
    yield "relu, int8", "relu-zero-point", 0, relu, {"zx": I8(0), "z2": I8(0)}
    yield "relu, int8 from -128", "", 1, relu, {"zx": I8(0), "z2": I8(-128)}
    clip = relu.replace("Relu(c)", "Clip(c, lo, hi)")
    six = {"lo": F(0), "hi": F(6), "z2": U8(0)}
    yield "clip to 6", "", 1, clip, {**six, "s2": F(6 / 255)}
    yield "clip to 6, wider integers", "relu-zero-point", 0, clip, {**six, "s2": F(0.3)}
    yield "sigmoid before Q", "output-q", 0, relu.replace("Relu", "Sigmoid"), {}
    yield "reshape before Q", "", 1, relu.replace("Relu(c)", "Reshape(c, k)"), {"k": np.array([1, 16, 8, 8])}
    yield "weight alone", "input-q", 0, W + " y = Conv<pads=[1,1,1,1]>(x, wd, bf)\n", {}
    floats = {"wf": integers(16, 16, 3, 3) * F(0.01)}
    alone = X + " c = Conv<pads=[1,1,1,1]>(xd, wf, bf)\n" + OUT
    yield "activation alone", "weight-float", 1, alone, {**floats, "wrong": True}
    channels = base.replace("Linear(x, ", "Linear<axis=1>(x, ").replace("Linear(xd_q", "Linear<axis=1>(xd_q")
    yield "per channel", "activation-axis", 0, channels, {"sx": scales(16), "zx": np.full(16, 128, U8)}
    run_time = " m = ReduceMax<keepdims=0>(x)\n sx = Div(m, k)\n" + X + W + " c = Conv<pads=[1,1,1,1]>(xd, wd)\n" + OUT
    yield "scale from a run", "", 1, run_time, {"sx": None, "k": F(100)}
    run_time = run_time.replace("(xd, wd)", "(xd, wd, bd)").replace(" c =", BIAS + " c =")
    yield "scale from a run, bias", "dynamic-scale", 0, run_time, {"sx": None, "k": F(100)}
    between = X + " r = {}\n" + W + " c = Conv<pads=[1,1,1,1]>(r, wd)\n" + OUT
    yield "max pool between", "", 1, between.format("MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(xd)"), {}
    up = X + MW + " c = ConvTranspose<strides=[2,2]>(xd, wd)\n" + OUT
    big = {"head": CONV.replace("8,8] y", "16,16] y"), "w": integers(16, 16, 2, 2)}
    yield "transposed", "transposed-conv", 0, up, big
    kept, tall = X + " c = ConvTranspose<strides=[2,2]>(xd, wf)\n", {**big, "wf": integers(16, 16, 2, 2) * F(0.01)}
    yield "transposed, float weight, Q behind", "transposed-conv", 0, kept + OUT, {**tall, "wrong": True}
    yield "transposed, float weight", "", 0, kept + " y = Sin(c)\n", tall
    both = base + " z = Sin(xd)\n"
    yield "int8, read twice", "activation-type", 0, both, {**more, "zx": I8(0), "z2": I8(3)}
    yield "uint8, read twice", "", 1, both, dict(more)
    yield "7 bits", "", 1, base, {"target": "onnxruntime-cpu-avx2", "w": np.clip(integers(16, 16, 3, 3), -64, 63)}
    yield "8 bits", "saturation", 1, base, {"target": "onnxruntime-cpu-avx2"}


def _matrices() -> Iterator[Row]:
    mm = X + MW + " y = MatMul(xd, wd)\n"
    mq = X + MW + " c = MatMul(xd, wd)\n" + OUT
    two = FLAT.replace("y)", "y, float[8,32] z)")
    for name, head in (("flat", FLAT), ("cube", CUBE)):
        yield f"matmul {name}", "", 1, mm, {"head": head}
        yield f"matmul Q {name}", "", 1, mq, {"head": head}
        yield f"matmul, K axis {name}", "weight-axis", 1, mm.replace("axis=1", "axis=0"), {"head": head, "wrong": True}
    add = X + MW + " c = MatMul(xd, wd)\n y = Add(c, bf)\n"
    yield "matmul, float bias", "bias-type", 0, add, {"head": CUBE}
    yield "matmul, int32 bias", "", 1, add.replace(" y =", BIAS + " y =").replace("c, bf", "c, bd"), {"head": CUBE}
    free = CUBE.replace("[2,8", "[n,8")
    yield "matmul, float bias, any batch", "", 1, add, {"head": free}
    yield "matmul fan-out", "fan-out", 0, mq + " z = Sin(c)\n", {"head": two}
    relu = X + MW + " c = MatMul(xd, wd)\n r = Relu(c)\n" + qd("r", "y", "s2", "z2")
    yield "matmul relu", "relu-zero-point", 0, relu, {"head": FLAT}
    yield "matmul tanh", "", 1, relu.replace("Relu", "Tanh"), {"head": FLAT}
    yield "matmul int8", "", 1, mm, {"head": FLAT, "zx": I8(0)}
    yield "matmul int8, read twice", "activation-type", 0, mm + " z = Tanh(xd)\n", {"head": two, "zx": I8(0)}
    yield "matmul weight alone", "", 1, MW + " y = MatMul(x, wd)\n", {"head": FLAT}
    yield "matmul weight alone, K axis", "input-q", 0, MW.replace("1", "0") + " y = MatMul(x, wd)\n", {"head": FLAT}
    activation = X + " y = MatMul(xd, wf)\n"
    yield "matmul activation alone", "input-q", 0, activation, {"head": FLAT, "wf": integers(32, 32).astype(F)}
    pair = "g (float[2,8,32] x, float[2,32,8] v) => (float[2,8,8] y) {\n"
    run_time = " m = ReduceMax<keepdims=0>(x)\n sx = Div(m, k)\n" + mm
    yield "matmul, scale from a run", "", 1, run_time, {"head": FLAT, "sx": None, "k": F(100)}
    yield "two activations", "", 1, X + qd("v", "vd") + " y = MatMul(xd, vd)\n", {"head": pair}
    gemm = X + MW.replace("1", "0") + BIAS + " y = Gemm<transB=1>(xd, wd, bd)\n"
    yield "gemm", "", 1, gemm, {"head": FLAT}
    yield "gemm, K axis", "weight-axis", 1, gemm.replace("axis=0>(w", "axis=1>(w"), {"head": FLAT, "wrong": True}
    yield "gemm, float bias", "bias-type", 0, gemm.replace("wd, bd", "wd, bf"), {"head": FLAT}
    wide = {"head": FLAT, "sb": (SX * scales(32) * 2).astype(F), "b": np.full(32, 9999, np.int32), "wrong": True}
    yield "gemm, bias scale", "bias-scale", 1, gemm, wide
    yield "gemm, alpha", "alpha", 0, gemm.replace("transB=1", "transB=1, alpha=0.5"), {"head": FLAT}
    yield "gemm int8, read twice", "", 1, gemm + " z = Tanh(xd)\n", {"head": two, "zx": I8(0)}
    half = {"sx": np.float16(0.03), "sw": scales(32, np.float16), "head": FLAT.replace("float[", "float16[")}
    yield "float16", "type", 0, mm, half


def _sums() -> Iterator[Row]:
    add = X + " t = Tanh(x)\n" + qd("t", "td") + " a = Add(xd, td)\n" + qd("a", "y", "s2", "z2")
    yield "sum", "", 0, add, {}
    yield "sum and Sin", "join-fan-out", 0, add + " z = Sin(a)\n", {"head": CONV.replace("y)", "y, float[1,16,8,8] z)")}
    yield "sum is an output", "join-fan-out", 0, add, {"head": CONV.replace("y)", "y, float[1,16,8,8] a)")}
