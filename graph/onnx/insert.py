"""Spelling canonical ops as ONNX nodes at the model's opset."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..errors import UnsupportedOp
from ..ir import Value
from . import native as onnx_native
from .attrs import opset_of
from .ops import PLAIN
from .ops_math import PARAMETERS, REDUCTIONS, VARIADIC
from .place import fresh, new_constant

if TYPE_CHECKING:
    from .graph import ONNXGraph

Operands = Sequence[ir.Value | None]


class Speller:
    """Collects the nodes that spell one canonical op; the last one's output is the result."""

    def __init__(self, g: ONNXGraph, op: str, views: Sequence[Value | None], name: str) -> None:
        self.g, self.op, self.views, self.name = g, op, list(views), name
        self.operands: list[ir.Value | None] = [None if v is None else v.native for v in views]
        self.opset = opset_of(g)
        self.made: list[ir.Node] = []

    def emit(self, op_type: str, inputs: Operands, **attrs: Any) -> ir.Value:
        """Append a node (of ``results`` outputs); attributes are plain data, None leaves one out."""
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        results = attrs.pop("results", 1)
        given = [_attr(k, v) for k, v in attrs.items() if v is not None]
        self.made.append(ir.Node("", op_type, list(inputs), given, num_outputs=results))
        return self.made[-1].outputs[0]

    def const(self, data: Any, dtype: Any) -> ir.Value:
        return new_constant(self.g, f"{self.name}_const", np.asarray(data, dtype))

    def like(self, data: Any, i: int = 0) -> ir.Value:
        """A constant of the dtype of operand i."""
        view = self.views[i]
        assert view is not None
        return self.const(data, onnx_native.dtype_of(view.dtype).numpy())

    def rank(self, i: int = 0) -> int:
        view = self.views[i]
        if view is None or view.rank is None:
            self.refuse(f"the rank of operand {i} is unknown")
        assert view is not None and view.rank is not None
        return view.rank

    def need(self, opset: int, op_type: str) -> None:
        if self.opset < opset:
            self.refuse(f"{op_type} needs opset {opset}, the model has {self.opset}")

    def refuse(self, why: str) -> None:
        raise UnsupportedOp(f"'{self.op}' cannot be written in this model: {why}", node=self.name)


def _attr(name: str, value: Any) -> ir.Attr:
    if isinstance(value, bool):
        return ir.AttrInt64(name, int(value))
    if isinstance(value, int):
        return ir.AttrInt64(name, value)
    if isinstance(value, float):
        return ir.AttrFloat32(name, value)
    if isinstance(value, str):
        return ir.AttrString(name, value)
    if isinstance(value, np.ndarray):
        return ir.AttrTensor(name, ir.tensor(value))
    return ir.AttrInt64s(name, [int(v) for v in value])


Spelling = Callable[[Speller, dict[str, Any]], Any]


def spell(g: ONNXGraph, op: str, inputs: Sequence[Value | None], attrs: dict[str, Any], name: str) -> list[ir.Node]:
    """Native nodes for one canonical op; the last one is called ``name`` and its output too.

    Raises UnsupportedOp where ONNX has no spelling for it at the model's opset.
    """
    s = Speller(g, op, inputs, name)
    spelling = SPELLINGS.get(op)
    if spelling is None:
        s.refuse("no ONNX spelling is known")
    assert spelling is not None
    spelling(s, attrs)
    for i, node in enumerate(s.made):
        last = i == len(s.made) - 1
        node.name = name if last else fresh(g, f"{name}_{node.op_type}")
        node.outputs[0].name = name if last else fresh(g, f"{name}_{node.op_type}_out")
        for k, further in enumerate(node.outputs[1:], 1):
            further.name = fresh(g, f"{name}_{k}")
    return s.made


def _same(op_type: str, since: int = 1) -> Spelling:
    def spelling(s: Speller, a: dict[str, Any]) -> None:
        s.need(since, op_type)
        s.emit(op_type, s.operands)

    return spelling


def _with(op_type: str, names: dict[str, tuple[str, float]]) -> Spelling:
    return lambda s, a: s.emit(
        op_type, s.operands, **{k: float(a.get(c, d)) for c, (k, d) in names.items() if not k.startswith("#")}
    )


def _linear(s: Speller, a: dict[str, Any]) -> None:
    x, w, *rest = s.operands
    bias = rest[0] if rest else None
    transposed = bool(a.get("transposed_weight", False))
    alpha, beta = float(a.get("alpha", 1.0)), float(a.get("beta", 1.0))
    if s.rank() == 2:
        s.emit("Gemm", [x, w, bias], alpha=alpha, beta=beta, transB=int(not transposed))
        return
    if alpha != 1.0 or beta != 1.0:
        s.refuse("alpha and beta exist for matrices only")
    out = s.emit("MatMul", [x, w if transposed else s.emit("Transpose", [w], perm=[1, 0])])
    if bias is not None:
        s.emit("Add", [out, bias])


def _conv(s: Speller, a: dict[str, Any]) -> None:
    weight = s.views[1]
    n = (weight.rank if weight is not None and weight.rank is not None else s.rank()) - 2
    padding = a.get("padding") or [(0, 0)] * n
    common: dict[str, Any] = {
        "strides": a.get("stride") or [1] * n,
        "pads": [lo for lo, _ in padding] + [hi for _, hi in padding],
        "dilations": a.get("dilation") or [1] * n,
        "group": int(a.get("groups", 1)),
        "kernel_shape": None if weight is None or weight.hint is None else weight.hint[2:],
    }
    if a.get("transposed"):
        s.emit("ConvTranspose", s.operands, output_padding=a.get("output_padding") or [0] * n, **common)
    else:
        s.emit("Conv", s.operands, **common)


def _pool(s: Speller, a: dict[str, Any]) -> None:
    kernel = a["kernel"]
    padding = a.get("padding") or [(0, 0)] * len(kernel)
    window: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": a.get("stride") or kernel,
        "pads": [lo for lo, _ in padding] + [hi for _, hi in padding],
        "ceil_mode": int(a.get("ceil", False)),
    }
    dilation = a.get("dilation")
    if dilation and any(d != 1 for d in dilation):
        if s.op == "avg_pool":
            s.need(19, "AveragePool with dilations")
        window["dilations"] = dilation
    if s.op == "avg_pool":
        s.emit("AveragePool", s.operands, count_include_pad=int(a.get("count_include_pad", False)), **window)
    else:
        s.emit("MaxPool", s.operands, **window)


def _global_pool(s: Speller, a: dict[str, Any]) -> None:
    if any(size != 1 for size in a["output_size"]):
        s.refuse("adaptive pools other than global ones")
    s.emit("GlobalAveragePool" if s.op == "adaptive_avg_pool" else "GlobalMaxPool", s.operands)


def _norm(op_type: str, since: int) -> Spelling:
    def spelling(s: Speller, a: dict[str, Any]) -> None:
        s.need(since, op_type)
        axes = a.get("axes")
        s.emit(
            op_type, s.operands, epsilon=float(a.get("eps", 1e-5)), num_groups=a.get("groups"),
            axis=None if axes is None else -len(axes),
        )  # fmt: skip

    return spelling


def _reshape(s: Speller, a: dict[str, Any]) -> None:
    """None entries: copied where the input has the same position, else inferred (at most one)."""
    shape = list(a["shape"])
    dynamic = [i for i, d in enumerate(shape) if d is None]
    target = [-1 if d is None else d for d in shape]
    if len(dynamic) > 1:
        rank = s.rank()
        target = [0 if d is None and i < rank else target[i] for i, d in enumerate(shape)]
        if target.count(-1) > 1:
            s.refuse("more than one inferred entry")
    s.emit("Reshape", [s.operands[0], s.const(target, np.int64)])


def _axes(op_type: str) -> Spelling:
    def spelling(s: Speller, a: dict[str, Any]) -> None:
        if s.opset >= 13:
            s.emit(op_type, [s.operands[0], s.const(a["axes"], np.int64)])
        else:
            s.emit(op_type, [s.operands[0]], axes=a["axes"])

    return spelling


def _slice(s: Speller, a: dict[str, Any]) -> None:
    axes, steps = a["axes"], a.get("steps") or [1] * len(a["axes"])
    far = np.iinfo(np.int64)
    starts = [(0 if st > 0 else far.max) if v is None else v for v, st in zip(a["starts"], steps, strict=True)]
    ends = [(far.max if st > 0 else far.min) if v is None else v for v, st in zip(a["ends"], steps, strict=True)]
    _emit_slice(s, starts, ends, axes, steps)


def _split(s: Speller, a: dict[str, Any]) -> None:
    sizes, listed = [int(v) for v in a["sizes"]], s.opset >= 13
    split = {"axis": int(a["axis"]), "split": None if listed else sizes, "results": len(sizes)}
    s.emit("Split", [s.operands[0], *([s.const(sizes, np.int64)] if listed else [])], **split)


def _flip(s: Speller, a: dict[str, Any]) -> None:
    n, far = len(a["axes"]), np.iinfo(np.int64)
    _emit_slice(s, [far.max] * n, [far.min] * n, a["axes"], [-1] * n)


def _emit_slice(s: Speller, starts: Any, ends: Any, axes: Any, steps: Any) -> None:
    s.need(10, "Slice")
    s.emit("Slice", [s.operands[0], *(s.const(v, np.int64) for v in (starts, ends, axes, steps))])


def _pad(s: Speller, a: dict[str, Any]) -> None:
    mode = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[
        a.get("mode", "constant")
    ]
    s.need({"wrap": 19}.get(mode, 11), f"Pad with mode {mode}")
    flat = [lo for lo, _ in a["pads"]] + [hi for _, hi in a["pads"]]
    value = s.like(a.get("value") or 0.0) if mode == "constant" else None
    s.emit("Pad", [s.operands[0], s.const(flat, np.int64), value], mode=mode)


def _reduce(op_type: str) -> Spelling:
    def spelling(s: Speller, a: dict[str, Any]) -> None:
        keep = int(a.get("keepdims", True))
        if s.opset >= (13 if op_type == "ReduceSum" else 18):
            s.emit(op_type, [s.operands[0], s.const(a["axes"], np.int64)], keepdims=keep)
        else:
            s.emit(op_type, [s.operands[0]], axes=a["axes"], keepdims=keep)

    return spelling


def _vector_norm(s: Speller, a: dict[str, Any]) -> None:
    if a.get("p") not in (1, 2):
        s.refuse("norms other than 1 and 2")
    _reduce("ReduceL1" if a["p"] == 1 else "ReduceL2")(s, a)


def _quantize(op_type: str) -> Spelling:
    def spelling(s: Speller, a: dict[str, Any]) -> None:
        s.need(13 if a.get("axis") is not None else 10, op_type)
        operands = list(s.operands)
        attrs: dict[str, Any] = {"axis": a.get("axis") if s.opset >= 13 else None}
        if a.get("block"):
            s.need(21, "block quantization")
            attrs["block_size"] = int(a["block"])
        if (
            op_type == "QuantizeLinear"
            and (len(operands) < 3 or operands[2] is None)
            and a.get("dtype", "uint8") != "uint8"
        ):
            scale = s.views[1]
            shape = scale.hint if scale is not None and scale.hint is not None else ()
            operands = [*operands[:2], s.const(np.zeros(shape), onnx_native.dtype_of(a["dtype"]).numpy())]
        s.emit(op_type, operands, **attrs)

    return spelling


def _clip(s: Speller, a: dict[str, Any]) -> None:
    low, high = a.get("min"), a.get("max")
    if s.opset < 11:
        s.emit("Clip", s.operands, min=None if low is None else float(low), max=None if high is None else float(high))
        return
    s.emit("Clip", [s.operands[0], None if low is None else s.like(low), None if high is None else s.like(high)])


def _gelu(s: Speller, a: dict[str, Any]) -> None:
    x = s.operands[0]
    approximate = a.get("approximate", "none")
    if s.opset >= 20:
        s.emit("Gelu", [x], approximate=approximate)
    elif approximate == "none":
        erf = s.emit("Erf", [s.emit("Mul", [x, s.like(1 / math.sqrt(2))])])
        s.emit("Mul", [s.emit("Mul", [x, s.emit("Add", [erf, s.like(1.0)])]), s.like(0.5)])
    else:
        cubic = s.emit("Mul", [s.emit("Mul", [s.emit("Mul", [x, x]), x]), s.like(0.044715)])
        inner = s.emit("Mul", [s.emit("Add", [x, cubic]), s.like(math.sqrt(2 / math.pi))])
        half = s.emit("Mul", [x, s.like(0.5)])
        s.emit("Mul", [half, s.emit("Add", [s.emit("Tanh", [inner]), s.like(1.0)])])


def _full(s: Speller, a: dict[str, Any]) -> None:
    if any(d is None for d in a["shape"]):
        s.refuse("a dynamic shape")
    value = np.asarray([a.get("value", 0.0)])
    value = value.astype(a["dtype"] if "dtype" in a else (np.float32 if value.dtype.kind == "f" else value.dtype))
    s.emit("ConstantOfShape", [s.const(a["shape"], np.int64)], value=value)


def _sdpa(s: Speller, a: dict[str, Any]) -> None:
    s.need(23, "Attention")
    s.emit("Attention", s.operands, is_causal=int(a.get("causal", False)), scale=a.get("scale"))


def _shuffle(s: Speller, a: dict[str, Any]) -> None:
    if s.op == "pixel_shuffle":
        s.emit("DepthToSpace", s.operands, blocksize=int(a["factor"]), mode=a.get("mode", "crd").upper())
    elif a.get("mode") == "dcr":
        s.emit("SpaceToDepth", s.operands, blocksize=int(a["factor"]))
    else:
        s.refuse("SpaceToDepth exists in the 'dcr' order only")


def _shape_of(s: Speller, a: dict[str, Any]) -> None:
    axes = list(a.get("axes") or range(s.rank()))
    whole = s.emit("Shape", s.operands)
    if axes != list(range(s.rank())):
        s.emit("Gather", [whole, s.const(axes, np.int64)], axis=0)


SPELLINGS: dict[str, Spelling] = {
    **{op: _same(name) for name, op in PLAIN.items()},
    **{op: _with(name, names) for name, (op, names) in PARAMETERS.items()},
    **{op: _reduce(name) for name, op in REDUCTIONS.items() if op != "norm"},
    **{op: _same(name) for name, pair in VARIADIC.items() for op in pair if op != "add"},
    "identity": lambda s, a: s.emit("Identity", s.operands[:1]),
    "isinf": _same("IsInf", 10),
    "hardswish": _same("HardSwish", 14),
    "mish": _same("Mish", 18),
    "square": lambda s, a: s.emit("Mul", [s.operands[0], s.operands[0]]),
    "rsqrt": lambda s, a: s.emit("Reciprocal", [s.emit("Sqrt", s.operands)]),
    "silu": lambda s, a: s.emit("Mul", [s.operands[0], s.emit("Sigmoid", s.operands)]),
    "ne": lambda s, a: s.emit("Not", [s.emit("Equal", s.operands)]),
    "mod": lambda s, a: s.emit("Mod", s.operands),
    "fmod": lambda s, a: s.emit("Mod", s.operands, fmod=1),
    "gelu": _gelu,
    "norm": _vector_norm,
    "linear": _linear,
    "matmul": _same("MatMul"),
    "einsum": lambda s, a: s.emit("Einsum", s.operands, equation=a["equation"]),
    "conv": _conv,
    "max_pool": _pool,
    "avg_pool": _pool,
    "adaptive_avg_pool": _global_pool,
    "adaptive_max_pool": _global_pool,
    "batch_norm": lambda s, a: s.emit("BatchNormalization", s.operands, epsilon=float(a.get("eps", 1e-5))),
    "instance_norm": _norm("InstanceNormalization", 6),
    "group_norm": _norm("GroupNormalization", 21),
    "layer_norm": _norm("LayerNormalization", 17),
    "rms_norm": _norm("RMSNormalization", 23),
    "softmax": lambda s, a: s.emit("Softmax", s.operands, axis=int(a["axis"])),
    "log_softmax": lambda s, a: s.emit("LogSoftmax", s.operands, axis=int(a["axis"])),
    "sdpa": _sdpa,
    "reshape": _reshape,
    "transpose": lambda s, a: s.emit("Transpose", s.operands, perm=a["perm"]),
    "squeeze": _axes("Squeeze"),
    "unsqueeze": _axes("Unsqueeze"),
    "expand": lambda s, a: s.emit(
        "Expand", [s.operands[0], s.const([1 if d is None else d for d in a["shape"]], np.int64)]
    ),
    "tile": lambda s, a: s.emit("Tile", [s.operands[0], s.const(a["repeats"], np.int64)]),
    "concat": lambda s, a: s.emit("Concat", s.operands, axis=int(a["axis"])),
    "slice": _slice,
    "split": _split,
    "flip": _flip,
    "gather_elements": lambda s, a: s.emit("GatherElements", s.operands, axis=int(a["axis"])),
    "gather": lambda s, a: s.emit("Gather", s.operands, axis=int(a["axis"])),
    "select": lambda s, a: s.emit("Gather", [s.operands[0], s.const(int(a["index"]), np.int64)], axis=int(a["axis"])),
    "pad": _pad,
    "cast": lambda s, a: s.emit("Cast", s.operands, to=onnx_native.dtype_of(a["dtype"]).value),
    "clip": _clip,
    "quantize": _quantize("QuantizeLinear"),
    "dequantize": _quantize("DequantizeLinear"),
    "full": _full,
    "pixel_shuffle": _shuffle,
    "pixel_unshuffle": _shuffle,
    "argmax": lambda s, a: s.emit("ArgMax", s.operands, axis=int(a["axis"]), keepdims=int(a.get("keepdims", True))),
    "argmin": lambda s, a: s.emit("ArgMin", s.operands, axis=int(a["axis"]), keepdims=int(a.get("keepdims", True))),
    "cumsum": lambda s, a: s.emit("CumSum", [s.operands[0], s.const(int(a["axis"]), np.int64)]),
    "shape_of": _shape_of,
}
"""canonical op -> its ONNX spelling"""
