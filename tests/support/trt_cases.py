"""Small ONNX files, each with what fl.check must say about TensorRT and what TensorRT itself does with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import numpy_helper, parser

F = np.float32
I8, U8 = np.int8, np.uint8
E4, E5 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
I4, U4, F4 = ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.float4_e2m1fn


@dataclass(frozen=True)
class Case:
    """One file: its rules, and the verdict (``refused``, or the precision of each product by node name)."""

    name: str
    model: onnx.ModelProto = field(repr=False)
    rules: frozenset[str]
    refused: bool = False
    precision: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def model(text: str, constants: dict[str, Any], opset: int = 21) -> onnx.ModelProto:
    """A model from ONNX text; nodes get the names of their first results."""
    head = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft": 1]>\n'
    made = parser.parse_model(head + text)
    for name, value in constants.items():
        made.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    for node in made.graph.node:
        node.name = node.output[0]
    return made


def integers(*shape: int) -> np.ndarray:
    return np.clip(np.rint(np.random.default_rng(0).normal(size=shape) * 40), -127, 127).astype(I8)


def scales(n: int, dtype: Any = F) -> np.ndarray:
    return np.linspace(0.005, 0.01, n).astype(dtype)


def qd(source: str, result: str, scale: str = "sx", zero: str = "zx") -> str:
    """Text of a Q/DQ pair."""
    pair = f" {result}_q = QuantizeLinear({source}, {scale}, {zero})\n"
    return pair + f" {result} = DequantizeLinear({result}_q, {scale}, {zero})\n"


CONV_IN = "g (float[1,16,8,8] x) => (float[1,16,8,8] y) {\n"
MM_IN = "g (float[2,8,32] x) => (float[2,8,16] y) {\n"
W = " wd = DequantizeLinear<axis=0>(w, sw, zw)\n"
CONV = " y = Conv<pads=[1,1,1,1]>(xd, wd, b)\n}"
MM_W = " wd = DequantizeLinear<axis=1>(w, sw, zw)\n"
MM = " y = MatMul(xd, wd)\n}"


def conv_constants(**changes: Any) -> dict[str, Any]:
    base = {
        "sx": F(0.1),
        "zx": I8(0),
        "s2": F(0.2),
        "w": integers(16, 16, 3, 3),
        "sw": scales(16),
        "zw": np.zeros(16, I8),
        "b": np.ones(16, F),
    }
    return {k: v for k, v in {**base, **changes}.items() if v is not None}


def mm_constants(**changes: Any) -> dict[str, Any]:
    base = {"sx": F(0.1), "zx": I8(0), "w": integers(32, 16), "sw": scales(16), "zw": np.zeros(16, I8)}
    return {k: v for k, v in {**base, **changes}.items() if v is not None}


class Table:
    """Collects cases. ``ok`` names the products that compute in int8; ``slow`` those left in float."""

    def __init__(self) -> None:
        self.cases: list[Case] = []

    def add(
        self,
        name: str,
        made: onnx.ModelProto,
        rules: str = "",
        *,
        refused: bool = False,
        options: Any = None,
        **precision: str,
    ) -> None:
        self.cases.append(Case(name, made, frozenset(rules.split()), refused, precision, options or {}))

    def conv(
        self,
        name: str,
        text: str,
        rules: str = "",
        *,
        opset: int = 21,
        head: str = CONV_IN,
        refused: bool = False,
        says: dict[str, str] | None = None,
        **constants: Any,
    ) -> None:
        made = model(head + text, conv_constants(**constants), opset)
        self.add(name, made, rules, refused=refused, **(says or {}))

    def mm(
        self,
        name: str,
        text: str,
        rules: str = "",
        *,
        opset: int = 21,
        head: str = MM_IN,
        refused: bool = False,
        says: dict[str, str] | None = None,
        options: Any = None,
        **constants: Any,
    ) -> None:
        made = model(head + text, mm_constants(**constants), opset)
        self.add(name, made, rules, refused=refused, options=options, **(says or {}))


INT, FLOAT = {"y": "int8"}, {"y": "float"}


def _numbers(t: Table) -> None:
    base = qd("x", "xd") + W + CONV
    t.conv("conv", base, says=INT)
    t.conv("zero point", base, "zero-point", refused=True, zx=I8(3))
    t.conv("zero point of weights", base, "zero-point", refused=True, zw=np.full(16, 3, I8))
    t.conv("uint8", base, "uint8-activation", zx=U8(0), says=INT)
    t.conv("uint8 with a zero point", base, "zero-point", refused=True, zx=U8(128))
    t.conv("no type", base.replace("sx, zx", "sx"), "uint8-default", zx=None, opset=19, says=INT)
    t.conv("weights without zero points", base.replace("sw, zw", "sw"), zw=None, says=INT)
    unsigned = (integers(16, 16, 3, 3).astype(int) + 128).astype(U8)
    t.conv("uint8 weights", base, "uint8-stored zero-point", refused=True, w=unsigned, zw=np.full(16, 128, U8))
    t.conv("uint8 weights, zero point 0", base, "uint8-stored", refused=True, w=unsigned, zw=np.zeros(16, U8))
    for value in (0.0, -0.1, np.nan):
        t.conv(f"scale {value}", base, "scale-positive", refused=True, sx=F(value))
    t.conv("one weight scale 0", base, "scale-positive", refused=True, sw=np.r_[0, scales(15)].astype(F))
    t.conv("scale inf", base, "scale-finite", sx=F(np.inf), says=INT)
    given = CONV_IN.replace("x)", "x, float sx)")
    t.conv("scale is an input", base, "scale-constant", refused=True, head=given, sx=None)
    run_time = " m = ReduceMax<keepdims=0>(x)\n sx = Div(m, k)\n"
    t.conv("scale from a run", run_time + base, "scale-constant", refused=True, sx=None, k=F(127))
    t.conv("scale computed of constants", " sx = Div(s0, s1)\n" + base, sx=None, s0=F(12.7), s1=F(127), says=INT)
    t.conv("scale of shape [1]", base, "scale-vector", sx=np.array([0.1], F), zx=np.zeros(1, I8), says=FLOAT)
    t.conv("scale of shape [1,1]", base, "scale-rank", refused=True, sx=np.array([[0.1]], F), zx=np.zeros((1, 1), I8))
    t.conv("zero point of shape [1]", base, zx=np.zeros(1, I8), says=INT)
    t.conv("one zero point, many scales", base, "zero-point-shape", refused=True, zw=I8(0))
    t.conv("too few scales", base, "scale-length", refused=True, sw=scales(8), zw=np.zeros(8, I8))
    bias = " bd = DequantizeLinear<axis=0>(bq, sb, zb)\n"
    with_bias = qd("x", "xd") + W + bias + CONV.replace("wd, b", "wd, bd")
    stored = {"bq": np.ones(16, np.int32), "sb": scales(16), "zb": np.zeros(16, np.int32)}
    t.conv("int32 bias", with_bias, "bias-int32", refused=True, **stored)
    small = {**stored, "bq": np.ones(16, I8), "zb": np.zeros(16, I8)}
    t.conv("int8 bias", with_bias, says=INT, **small)
    whole = with_bias.replace("<axis=0>(bq", "(bq")  # the axis is then 1, which a vector has not
    t.conv("int8 bias per tensor", whole, says=INT, **{**small, "sb": F(0.01), "zb": I8(0)})
    channels = base.replace("Linear(x, ", "Linear<axis=1>(x, ").replace("Linear(xd_q", "Linear<axis=1>(xd_q")
    t.conv("activation per channel", channels, "activation-axis", sx=scales(16), zx=np.zeros(16, I8), says=FLOAT)
    t.conv("weight axis 1 of a square", base.replace("axis=0", "axis=1"), "weight-axis", says=FLOAT)
    t.conv("weight axis -4", base.replace("axis=0", "axis=-4"), says=INT)
    t.conv("weight per tensor", base, sw=F(0.01), zw=I8(0), says=INT)
    t.conv("weight per tensor, shape [1]", base, sw=scales(1), zw=np.zeros(1, I8), says=INT)
    fake = " wq = QuantizeLinear<axis=0>(w, sw, zw)\n wd = DequantizeLinear<axis=0>(wq, sw, zw)\n"
    t.conv("float weights, quantized", qd("x", "xd") + fake + CONV, w=integers(16, 16, 3, 3) * F(0.01), says=INT)
    identity = qd("x", "xd") + " wi = Identity(w)\n" + W.replace("(w,", "(wi,") + CONV
    t.conv("stored weights through Identity", identity, "stored-moved", refused=True)


def _stored(t: Table) -> None:
    head = "g (float[2,8,32] x) => (float[2,8,32] y) {\n"
    scalar = " d = DequantizeLinear(k, sx, zx)\n y = Mul(x, d)\n}"
    constants = {"sx": F(0.1), "zx": I8(0)}

    def add(name: str, text: str, rules: str = "", top: str = head, **more: Any) -> None:
        t.add(name, model(top + text, {**constants, **more}), rules, refused=bool(rules))

    add("stored scalar", scalar, "stored-scalar", k=I8(50))
    add("stored scalar, fp8", scalar, "stored-scalar", k=np.array(2, E4), zx=np.array(0, E4))
    add("stored number with an axis", scalar, k=np.array([50], I8))
    add("scalar quantized here", " q = QuantizeLinear(k, sx, zx)\n" + scalar.replace("(k,", "(q,"), k=F(2))
    add("scalar of int32", scalar, "bias-int32", k=np.int32(50), zx=np.int32(0))
    add("scalar read by nobody", " d = DequantizeLinear(k, sx, zx)\n y = Mul(x, x)\n}", k=I8(50))
    given = head.replace("y)", "y, float d)")
    add("scalar given back", " d = DequantizeLinear(k, sx, zx)\n y = Mul(x, x)\n}", "stored-scalar", given, k=I8(50))
    cast = " d = Cast<to=1>(k)\n y = Mul(x, d)\n}"
    add("int8 cast", cast, "stored-read", k=np.full(32, 3, I8))
    add("uint8 cast", cast, k=np.full(32, 3, U8))
    add("fp8 cast", cast, "stored-read", k=np.full(32, 3, E4))
    most = " q = QuantizeLinear(x, sx, zx)\n m = Max(q, k)\n y = DequantizeLinear(m, sx, zx)\n}"
    add("maximum of integers", most, "stored-read pair-unread", k=np.zeros(1, I8))
    add("maximum of uint8", most, "stored-read uint8-activation pair-unread", k=np.zeros(1, U8), zx=U8(0))
    table, ids = integers(50, 32), "g (int64[2,8] i) => (float[2,8,32] y) {\n"
    look = " e = Gather<axis=0>(k, i)\n y = DequantizeLinear(e, sx, zx)\n}"
    add("table looked up", look, "stored-moved pair-unread", ids, k=table)
    add("table of uint8", look, "stored-moved uint8-stored pair-unread", ids, k=table.view(U8), zx=U8(0))
    add(
        "table, a scale per feature",
        look.replace("Linear(", "Linear<axis=2>("),
        "stored-moved pair-unread",
        ids,
        k=table,
        sx=scales(32),
        zx=np.zeros(32, I8),
    )
    after = " d = DequantizeLinear(k, sx, zx)\n y = Gather<axis=0>(d, i)\n}"
    add("table dequantized first", after, top=ids, k=table)


def _types(t: Table) -> None:
    base = qd("x", "xd") + MM_W + MM
    t.mm("matmul", base, says=INT)
    t.mm("matmul per tensor", base, sw=F(0.01), zw=I8(0), says=INT)
    t.mm(
        "matmul, K axis",
        base.replace("axis=1", "axis=0"),
        "weight-axis",
        sw=scales(32),
        zw=np.zeros(32, I8),
        says=FLOAT,
    )
    t.mm("matmul, activation scale [1]", base, sx=np.array([0.1], F), zx=np.zeros(1, I8), says=INT)
    rows = base.replace("Linear(x, ", "Linear<axis=1>(x, ").replace("Linear(xd_q", "Linear<axis=1>(xd_q")
    t.mm("matmul, activation per row", rows, "activation-axis", sx=scales(8), zx=np.zeros(8, I8), says=FLOAT)
    for kind in (np.int16, np.uint16):
        t.mm(f"{kind.__name__} activation", base, "type", refused=True, zx=kind(0))
    t.mm("int16 weight", base, "type", refused=True, w=integers(32, 16).astype(np.int16), zw=np.zeros(16, np.int16))
    w8 = np.random.default_rng(0).normal(size=(32, 16)).astype(E4)
    fp8 = {"zx": np.array(0, E4), "w": w8, "zw": np.zeros(16, E4)}
    t.mm("fp8", base, says={"y": "fp8"}, **fp8)
    t.mm("fp8 per tensor", base, says={"y": "fp8"}, **{**fp8, "sw": F(0.01), "zw": np.array(0, E4)})
    t.mm("fp8 on 8.6", base, "capability", refused=True, options={"capability": 86}, **fp8)
    t.mm("fp8 e5m2", base, "type", refused=True, zx=np.array(0, E5), w=w8.astype(E5), zw=np.zeros(16, E5))
    t.mm("fp8 times int8", base, "operand-types", refused=True, zx=np.array(0, E4))
    t.mm("int4 activation", base, "int4-activation", zx=np.array(0, I4), says=INT)
    _blocks(t)
    half = MM_IN.replace("float[", "float16[")
    h = np.float16
    t.mm("float16", base, head=half, sx=h(0.1), sw=scales(16, h), says=INT)
    t.mm("float16, one float32 scale", base, "mixed-types", refused=True, head=half, sx=h(0.1))
    add = qd("x", "xd") + MM_W + " m = MatMul(xd, wd)\n y = Add(m, k)\n}"
    t.mm("float16 constant", add, "mixed-types", refused=True, k=np.ones(16, h))
    ints = MM_IN.replace("(float[2,8,32] x", "(int32[2,8,32] x")
    t.mm("quantized int32", base, "input-type", refused=True, head=ints, opset=13)
    t.mm(
        "activation alone",
        qd("x", "xd") + " y = MatMul(xd, w)\n}",
        "operand-float",
        w=integers(32, 16).astype(F),
        says=FLOAT,
    )
    t.mm("weight alone", MM_W + " y = MatMul(x, wd)\n}", "operand-float", says=FLOAT)
    incoming = MM_IN.replace("(float[2,8,32] x", "(int8[2,8,32] x")
    t.mm("int8 input", " xd = DequantizeLinear(x, sx, zx)\n" + MM_W + MM, head=incoming, says=INT)
    t.mm(
        "uint8 input",
        " xd = DequantizeLinear(x, sx, zx)\n" + MM_W + MM,
        "uint8-stored",
        refused=True,
        head=incoming.replace("int8", "uint8"),
        zx=U8(0),
    )
    turned = (
        qd("x", "xd")
        + " wd = DequantizeLinear<axis=0>(w, sw, zw)\n wt = Transpose<perm=[1,0]>(wd)\n y = MatMul(xd, wt)\n}"
    )
    t.mm("transposed weight", turned, w=integers(16, 32), says=INT)
    wrong = turned.replace("axis=0", "axis=1")
    t.mm("transposed weight, K axis", wrong, "weight-axis", w=integers(16, 32), sw=scales(32), zw=np.zeros(32, I8))
    stored = qd("x", "xd") + " wt = Transpose<perm=[1,0]>(w)\n" + MM_W.replace("(w,", "(wt,") + MM
    t.mm("transposed integers", stored, "stored-moved", refused=True, w=integers(16, 32))
    _stored(t)
    for op in ("Gemm<transB=1>", "Gemm"):
        axis, shape = (0, (16, 32)) if "trans" in op else (1, (32, 16))
        text = qd("x", "xd") + f" wd = DequantizeLinear<axis={axis}>(w, sw, zw)\n y = {op}(xd, wd, b)\n}}"
        flat = "g (float[8,32] x) => (float[8,16] y) {\n"
        t.mm(op, text, head=flat, w=integers(*shape), b=np.ones(16, F), says=INT)
        off = text.replace(f"axis={axis}", f"axis={1 - axis}")
        t.mm(
            f"{op}, K axis",
            off,
            "weight-axis",
            head=flat,
            w=integers(*shape),
            b=np.ones(16, F),
            sw=scales(32),
            zw=np.zeros(32, I8),
            says=FLOAT,
        )


def _blocks(t: Table) -> None:
    def case(
        name: str, rules: str = "", k: int = 128, block: int = 64, dtype: Any = I4, axis: int = 0, **more: Any
    ) -> None:
        n = 16
        shape = (-(-k // block), n) if axis == 0 else (k, n // block)
        text = f" wd = DequantizeLinear<axis={axis}, block_size={block}>(w, sw, zw)\n y = MatMul(x, wd)\n}}"
        head = f"g (float[2,8,{k}] x) => (float[2,8,{n}] y) {{\n"
        data = np.random.default_rng(0).integers(-6 if dtype is not U4 else 0, 7, (k, n)).astype(dtype)
        made = model(
            head + text, {"w": data, "sw": np.full(shape, 0.01, F), "zw": np.zeros(shape, dtype)}, more.pop("opset", 21)
        )
        t.add(name, made, rules, **more)

    case("int4 blocks")
    case("int4 blocks of 16", block=16)
    case("int4 blocks along the outputs", block=8, axis=1)
    case("int4, one block", "weight-blocks", block=128)
    case("int4, ragged blocks", "block-division", k=130, refused=True)
    case("uint4 blocks", "type", dtype=U4, refused=True)
    case("int8 blocks", "weight-blocks", dtype=I8)
    case("int4 on 7.5", "capability", options={"capability": 75}, refused=True)
    case("fp4 on 8.9", "capability weight-blocks", dtype=F4, block=16, opset=23, refused=True)
    case("fp4 on 12.0", "weight-blocks", dtype=F4, block=16, opset=23, options={"capability": 120})
    text = " wd = DequantizeLinear<axis=1>(w, sw)\n y = MatMul(x, wd)\n}"
    data = np.random.default_rng(0).integers(-6, 7, (32, 16)).astype(I4)
    t.mm("int4 per channel", text, "weight-blocks", w=data, zw=None)
    conv = " wd = DequantizeLinear<axis=1, block_size=16>(w, sw)\n y = Conv(x, wd)\n}"
    data = np.random.default_rng(0).integers(-6, 7, (16, 16, 1, 1)).astype(I4)
    t.conv(
        "int4 convolution", conv, "block-axis weight-blocks", w=data, sw=np.full((16, 1, 1, 1), 0.01, F), refused=True
    )


def _flow(t: Table) -> None:
    def between(name: str, op: str, rules: str = "", channels: int = 16, **constants: Any) -> None:
        text = qd("x", "xd") + f" {op}\n" + W + " y = Conv<pads=[1,1,1,1]>(p, wd)\n}"
        made = model(CONV_IN + text, conv_constants(w=integers(16, channels, 3, 3), **constants))
        for i, d in enumerate(made.graph.output[0].type.tensor_type.shape.dim):
            d.dim_param = f"d{i}"
        t.add(name, made, rules, y="float" if rules else "int8")

    def ints(*values: int) -> np.ndarray:
        return np.array(values, np.int64)

    blocked = "dequantize-blocked"
    between("relu", "p = Relu(xd)", blocked)
    between("clip", "p = Clip(xd, lo, hi)", blocked, lo=F(0), hi=F(6))
    between("leaky relu", "p = LeakyRelu(xd)", blocked)
    between("max pool", "p = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(xd)")
    between("average pool", "p = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(xd)", blocked)
    between("slice", "p = Slice(xd, s, e, a)", channels=8, s=ints(0), e=ints(8), a=ints(1))
    between("split", "p, q = Split<axis=1, num_outputs=2>(xd)", channels=8)
    between("pad", "p = Pad(xd, s)", s=ints(0, 0, 1, 1, 0, 0, 1, 1))
    between("pad with 1", "p = Pad(xd, s, c)", blocked, s=ints(0, 0, 1, 1, 0, 0, 1, 1), c=F(1))
    between("transpose", "p = Transpose<perm=[0,1,3,2]>(xd)")
    between("reshape", "p = Reshape(xd, s)", s=ints(1, 16, 4, 16))
    between("tile", "p = Tile(xd, s)", s=ints(2, 1, 1, 1))
    between("gather", "p = Gather<axis=1>(xd, s)", channels=4, s=ints(0, 3, 5, 7))
    between("resize", 'p = Resize<mode="nearest">(xd, , s)', blocked, s=np.array([1, 1, 2, 2], F))
    between("depth to space", "p = DepthToSpace<blocksize=2>(xd)", channels=4)
    between("times a constant", "p = Mul(xd, k)", k=F(0.5))
    between("times a vector", "p = Mul(xd, k)", blocked, k=np.linspace(1, 2, 16).astype(F).reshape(1, 16, 1, 1))
    between(
        "channel shuffle",
        "a = Reshape(xd, s)\n c = Transpose<perm=[0,2,1,3,4]>(a)\n p = Reshape(c, s2)",
        s=ints(1, 2, 8, 8, 8),
        s2=ints(1, 16, 8, 8),
    )
    between("concat", "p = Concat<axis=1>(xd, xd)", channels=32)
    between("concat of one scale", "t = Tanh(x)\n" + qd("t", "td") + " p = Concat<axis=1>(xd, td)", channels=32)
    between(
        "concat of two scales",
        "t = Tanh(x)\n" + qd("t", "td", "s2") + " p = Concat<axis=1>(xd, td)",
        "concat-scales",
        channels=32,
    )
    between(
        "concat with zeros", "p = Concat<axis=1>(xd, k)", "concat-scales", channels=32, k=np.zeros((1, 16, 8, 8), F)
    )
    up = " wd = DequantizeLinear<axis=1>(w, sw, zw)\n y = ConvTranspose<strides=[2,2]>(xd, wd)\n}"
    big = "g (float[1,16,8,8] x) => (float[1,16,16,16] y) {\n"
    t.conv(
        "transposed convolution", qd("x", "xd") + up, "transposed-conv", head=big, w=integers(16, 16, 2, 2), says=FLOAT
    )
    for groups in (16, 2):
        text = qd("x", "xd") + W + f" y = Conv<pads=[1,1,1,1], group={groups}>(xd, wd)\n}}"
        t.conv(f"{groups} groups", text, w=integers(16, 16 // groups, 3, 3), says=INT)


def _graphs(t: Table) -> None:
    first = qd("x", "xd") + W + " c = Conv<pads=[1,1,1,1]>(xd, wd, b)\n"
    second = " vd = DequantizeLinear<axis=0>(v, sw, zw)\n y = Conv<pads=[1,1,1,1]>(rd, vd, b)\n}"
    v = {"v": integers(16, 16, 3, 3)}
    both = {"c": "int8", "y": "int8"}

    def case(name: str, middle: str, rules: str = "", says: dict[str, str] | None = None, **more: Any) -> None:
        t.conv(name, first + middle + second, rules, says=says or both, **v, **more)

    case("conv relu conv", " r = Relu(c)\n" + qd("r", "rd", "s2"))
    case("pair before and behind relu", qd("c", "cd") + " r = Relu(cd)\n" + qd("r", "rd", "s2"), "pair-twice")
    case("pair before relu", qd("c", "cd") + " rd = Relu(cd)\n", "dequantize-blocked", {"c": "int8", "y": "float"})
    case("residual, float skip", " a = Add(c, x)\n r = Relu(a)\n" + qd("r", "rd", "s2"), "residual-skip")
    case("residual, quantized skip", " a = Add(c, xd)\n r = Relu(a)\n" + qd("r", "rd", "s2"))
    case(
        "residual, both quantized",
        qd("c", "cd", "s2") + " a = Add(cd, xd)\n r = Relu(a)\n" + qd("r", "rd", "s2"),
        "residual-branch",
    )
    case("silu", " s = Sigmoid(c)\n r = Mul(c, s)\n" + qd("r", "rd", "s2"))
    twice = qd("c", "rd", "s2") + qd("c", "r2") + second.replace("\n}", "\n z = Conv<pads=[1,1,1,1]>(r2, wd, b)\n}")
    head = CONV_IN.replace("y)", "y, float[1,16,8,8] z)")
    t.conv("two pairs on one value", first + twice, "fan-out", head=head, says={**both, "z": "int8"}, **v)
    one = "g (float[1,16,8,8] x) => (float[1,16,1,1] y) {\n"
    t.conv(
        "pair before a pool",
        first + qd("c", "cd") + " y = GlobalAveragePool(cd)\n}",
        "pair-unread",
        head=one,
        says={"c": "int8"},
    )
    t.conv("pair before the output", first + qd("c", "y") + "}", "pair-unread", says={"c": "int8"})
    _attention(t)
    h16 = np.float16
    nbits = {"w": np.zeros((16, 1, 16), U8), "sw": scales(16), "sx": None, "zx": None, "zw": None}
    product = " y = com.microsoft.MatMulNBits<K=32, N=16, bits=4, block_size=32>(x, w, sw)\n}"
    t.mm("MatMulNBits", product, "nbits-float16", refused=True, **nbits)
    del h16
    lstm = "g (float[4,1,16] x) => (float[4,1,1,16] y) {\n"
    cell = " a = DequantizeLinear(w, sx, zx)\n r = DequantizeLinear(u, sx, zx)\n"
    cell += " y, h, c = LSTM<hidden_size=16>(x, a, r)\n}"
    t.mm("lstm", cell, "recurrent", head=lstm, w=integers(1, 64, 16), u=integers(1, 64, 16), sw=None, zw=None)
    size = " s = DequantizeLinear(n, one, zx)\n i = Cast<to=7>(s)\n y = Reshape(x, i)\n}"
    t.mm(
        "dequantized shape",
        size,
        "shape-tensor",
        refused=True,
        head="g (float[2,8,32] x) => (float[A,B] y) {\n",
        n=np.array([16, 32], I8),
        one=F(1),
        w=None,
        sw=None,
        zw=None,
        sx=None,
    )
    wide = "g (double[8,16] x) => (double[8,16] y) { y = Relu(x) }"
    t.add("float64", model(wide, {}), "float64")


def _attention(t: Table) -> None:
    head = "g (float16[2,4,64,64] q, float16[2,4,64,64] k, float16[2,4,64,64] v) => (float16[2,4,64,64] y) {\n"
    core = " t = Transpose<perm=[0,1,3,2]>({k})\n s = MatMul({q}, t)\n m = Mul(s, f)\n"
    core += " p = Softmax<axis=-1>(m)\n{pair} y = MatMul({p}, {v})\n}}"
    constants = {"sx": np.float16(0.1), "zx": I8(0), "f": np.float16(0.125)}
    plain = core.format(q="q", k="k", v="v", p="p", pair="")
    t.add("attention", model(head + plain, constants))
    inside = core.format(q="qd", k="kd", v="vd", p="pd", pair=qd("p", "pd"))
    text = head + qd("q", "qd") + qd("k", "kd") + qd("v", "vd") + inside
    t.add("attention in int8", model(text, constants), "attention", s="int8", y="int8")
    packed = "g (float[1,16,96] x) => (float[1,3,16,32] y) {\n" + qd("x", "xd") + MM_W
    packed += " m = MatMul(xd, wd)\n r = Reshape(m, n)\n t = Transpose<perm=[2,0,3,1,4]>(r)\n"
    packed += " qs, ks, vs = Split<axis=0, num_outputs=3>(t)\n q = Squeeze(qs, a)\n k = Squeeze(ks, a)\n"
    packed += " v = Squeeze(vs, a)\n kt = Transpose<perm=[0,1,3,2]>(k)\n s = MatMul(q, kt)\n"
    packed += " p = Softmax<axis=-1>(s)\n y = MatMul(p, v)\n}"
    numbers = {"n": np.array([1, 16, 3, 3, 32]), "a": np.array([0]), "w": integers(96, 288)}
    channels = mm_constants(sw=scales(288), zw=np.zeros(288, I8), **numbers)
    t.add("packed attention", model(packed, channels), "packed-attention", m="float")
    whole = mm_constants(sw=F(0.01), zw=I8(0), **numbers)
    t.add("packed attention, one scale", model(packed, whole), m="int8")
    fused = "g (float[2,4,8,32] x, float[2,4,8,32] z) => (float[2,4,8,32] y) { y = Attention(x, z, z) }"
    t.add("Attention of float32", model(fused, {}, 23), "attention-op", refused=True)


def _operators(t: Table) -> None:
    x = "g (int8[8,16] x) => (%s[8,16] y) {\n"
    c = {"s": F(0.1), "z": I8(0), "w": integers(16, 16)}
    ms = "com.microsoft."
    for rule, kind, text in (
        ("qoperator", "int8", "QLinearMatMul(x, s, z, w, s, z, s, z)"),
        ("qoperator", "float", ms + "QGemm(x, s, z, w, s, z)"),
        ("qoperator", "int8", ms + "QLinearAdd(x, s, z, x, s, z, s, z)"),
        ("qoperator", "float", ms + "MatMulIntegerToFloat(x, w, s, s)"),
        ("dynamic-quantization", "int32", "MatMulInteger(x, w)"),
        ("operator", "int8", ms + "FancyOp(x)"),
    ):
        t.add(text.split("(")[0], model(x % kind + f" y = {text}\n}}", c), rule, refused=True)
    dynamic = (
        "g (float[8,16] x) => (float[8,16] y) {\n a, s, z = DynamicQuantizeLinear(x)\n y = DequantizeLinear(a, s, z)\n}"
    )
    t.add("DynamicQuantizeLinear", model(dynamic, {}), "dynamic-quantization scale-constant", refused=True)
    for text, outputs in (
        ("y = NonZero(x)", "int64[2,n] y"),
        ("y = Det(x)", "float y"),
        ("y = BitwiseNot(i)", "int32[8,8] y"),
    ):
        head = f"g (float[8,8] x, int32[8,8] i) => ({outputs}) {{ "
        t.add(text.split("= ")[1], model(head + text + " }", {}), "operator", refused=True)
    t.add("Gelu", model(f"g (float[8,16] x) => (float[8,16] y) {{ y = {ms}Gelu(x) }}", {}))


def cases() -> Iterator[Case]:
    """All of them."""
    table = Table()
    builders: tuple[Callable[[Table], None], ...] = (_numbers, _types, _flow, _graphs, _operators)
    for build in builders:
        build(table)
    return iter(table.cases)
