"""Writing canonical attributes back to native nodes, sizes that the model computes included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..errors import ConstraintError, UnsupportedOp
from ..ir import Node
from . import native as onnx_native
from .place import adopt, drop_unused, fresh, new_constant, put_constant

if TYPE_CHECKING:
    from .graph import ONNXGraph

SIZES = frozenset({"shape", "sizes", "starts", "ends", "pads", "repeats", "index", "output_size", "start", "end"})
"""Attributes that hold lengths or positions along axes."""

Ints = Sequence["int | None"]
Writer = Callable[["ONNXGraph", Node, Any], None]


def write(g: ONNXGraph, node: Node, key: str, value: Any) -> None:
    """Write one canonical attribute. Raises ConstraintError where the native op cannot express it."""
    writer = WRITERS.get((node.native.op_type, key))
    if writer is None or node.native.domain not in onnx_native.STANDARD_DOMAINS or node.op == "opaque":
        known = sorted(k for op, k in WRITERS if op == node.native.op_type)
        raise UnsupportedOp(
            f"attribute '{key}' of {node.origin} cannot be set", node=node.name, value=value, expected=known or "none",
            found=key,
        )  # fmt: skip
    writer(g, node, value)


def slot_of(node: Node, position: int) -> int:
    """Native input position of a canonical operand that is absent now."""
    recurrent = {"LSTM": (0, 5, 6, 1, 2, 3), "GRU": (0, 5, None, 1, 2, 3), "RNN": (0, 5, None, 1, 2, 3)}
    optional = {
        "Conv": 3, "ConvTranspose": 3, "Gemm": 3, "Attention": 4, "LayerNormalization": 3,
        "QuantizeLinear": 3, "DequantizeLinear": 3,
    }  # fmt: skip
    op = node.native.op_type
    slot: int | None = None
    if op in recurrent and position < 6:
        slot = recurrent[op][position]
    elif position < optional.get(op, 0) or (op in ("Concat", "Sum", "Max", "Min", "Mean", "Einsum")):
        slot = position
    if slot is None:
        raise ConstraintError(
            f"{node.origin} takes no operand at position {position}", node=node.name,
            expected=f"below {len(node.inputs)}", found=position,
        )  # fmt: skip
    return slot


# ---- plain attributes --------------------------------------------------------------------------------------
def put(native: ir.Node, name: str, value: Any) -> None:
    """Set a native attribute from plain data; None removes it."""
    if value is None:
        native.attributes.pop(name, None)
    elif isinstance(value, (list, tuple)):
        native.attributes.add(ir.AttrInt64s(name, [int(v) for v in value]))
    elif isinstance(value, str):
        native.attributes.add(ir.AttrString(name, value))
    elif isinstance(value, float):
        native.attributes.add(ir.AttrFloat32(name, value))
    else:
        native.attributes.add(ir.AttrInt64(name, int(value)))


def _plain(name: str, kind: Callable[[Any], Any]) -> Writer:
    return lambda g, node, value: put(node.native, name, None if value is None else kind(value))


def _listed(value: Any) -> list[int]:
    return [int(v) for v in value]


def _padding(g: ONNXGraph, node: Node, value: Any) -> None:
    put(node.native, "pads", [lo for lo, _ in value] + [hi for _, hi in value])
    put(node.native, "auto_pad", None)
    put(node.native, "output_shape", None)


def _layer_norm_axes(g: ONNXGraph, node: Node, value: Any) -> None:
    rank = node.inputs[0].rank if node.inputs[0] is not None else None
    if rank is None or list(value) != list(range(rank - len(value), rank)):
        raise ConstraintError("only trailing axes can be normalised", node=node.name, value=value)
    put(node.native, "axis", -len(value))


# ---- operands that feed attributes -------------------------------------------------------------------------
def write_ints(g: ONNXGraph, node: Node, position: int, new: Ints) -> None:
    """Make the size operand at a native position read ``new``; None entries stay what they are now.

    A stored tensor that others share is copied first; a computed one is rebuilt as a Concat of its dynamic pieces and
    constants (or replaced by a constant if no entry is None).
    """
    native: ir.Node = node.native
    old = native.inputs[position] if position < len(native.inputs) else None
    dtype = np.dtype(np.int64) if old is None else np.dtype(g.table.info[old].dtype or "int64")
    label = f"{native.name or native.outputs[0].name}_sizes"
    stored = None if old is None else onnx_native.constant_tensor(old)
    if stored is not None and old is not None:
        data = stored.numpy().astype(dtype)
        flat = data.ravel().copy()
        if len(new) == flat.size:
            flat = np.asarray([f if n is None else n for f, n in zip(flat.tolist(), new, strict=True)], dtype)
            flat = flat.reshape(data.shape)
        else:
            flat = _complete(node, new, dtype)
        if flat.shape != data.shape or not np.array_equal(flat, data):
            write_constant(g, node, position, flat, label)
        return
    if (
        old is None
        or all(n is not None for n in new)
        or len(new) != len(g.table.elements[old].ints() if old in g.table.elements else new)
    ):
        shape = (len(new),) if old is None or g.table.info[old].a != () else ()
        write_constant(g, node, position, _complete(node, new, dtype).reshape(shape), label)
        return
    pieces = _pieces(g, node, old, new, dtype, label)
    joined = ir.Node("", "Concat", pieces, [ir.AttrInt64("axis", 0)], name=fresh(g, label))
    joined.outputs[0].name = fresh(g, f"{label}_joined")
    place_before(g, node, [joined])
    native.replace_input_with(position, joined.outputs[0])


def _complete(node: Node, new: Ints, dtype: Any) -> np.ndarray:
    if sum(n is None for n in new) > 1:
        raise ConstraintError(
            "the number of sizes changes, so at most one entry may stay dynamic", node=node.name, value=list(new)
        )
    return np.asarray([-1 if n is None else n for n in new], dtype)


def _pieces(g: ONNXGraph, node: Node, old: ir.Value, new: Ints, dtype: Any, label: str) -> list[ir.Value]:
    """1-d values whose concatenation is ``new``, the dynamic entries taken from ``old``."""
    producer = old.producer()
    parts: list[tuple[ir.Value, int]] = [(old, len(new))]
    if producer is not None and producer.op_type == "Concat" and producer.domain in onnx_native.STANDARD_DOMAINS:
        lengths = [g.table.info[v].a if v is not None else None for v in producer.inputs]
        if all(n is not None and len(n) == 1 for n in lengths) and sum(n[0] for n in lengths if n) == len(new):
            parts = [(v, n[0]) for v, n in zip(producer.inputs, lengths, strict=True) if v is not None and n]
    pieces: list[ir.Value] = []
    start = 0
    for part, length in parts:
        want = list(new[start : start + length])
        start += length
        stored = onnx_native.constant_tensor(part)
        if stored is not None:
            data = stored.numpy().ravel().tolist()
            want = [d if w is None else w for d, w in zip(data, want, strict=True)]
            if want == data:
                pieces.append(part)
                continue
        if all(w is None for w in want):
            pieces.append(part)
            continue
        i = 0
        while i < length:
            j = i
            while j < length and (want[j] is None) == (want[i] is None):
                j += 1
            if want[i] is None:
                bounds = [_constant(g, f"{label}_{what}", [at], np.int64) for what, at in (("from", i), ("to", j))]
                cut = ir.Node("", "Slice", [part, *bounds], name=fresh(g, f"{label}_slice"))
                cut.outputs[0].name = fresh(g, f"{label}_kept")
                place_before(g, node, [cut])
                pieces.append(cut.outputs[0])
            else:
                pieces.append(_constant(g, f"{label}_fixed", want[i:j], dtype))
            i = j
    return pieces


def _constant(g: ONNXGraph, name: str, data: Any, dtype: Any) -> ir.Value:
    return new_constant(g, name, np.asarray(data, dtype))


def place_before(g: ONNXGraph, node: Node, made: list[ir.Node]) -> None:
    g.model.graph.insert_before(node.native, made)
    adopt(g, made, node.scope)


def write_constant(g: ONNXGraph, node: Node, position: int, data: np.ndarray, label: str) -> None:
    """Make a native operand read this constant: in place if nothing else reads the old one, else a new tensor."""
    native: ir.Node = node.native
    old = native.inputs[position] if position < len(native.inputs) else None
    alone = old is not None and len(old.uses()) == 1 and not old.is_graph_output()
    if old is not None and alone and onnx_native.constant_tensor(old) is not None:
        put_constant(old, ir.tensor(np.ascontiguousarray(data).reshape(data.shape), name=old.name))
        g.table.constant(old)
        return
    if position >= len(native.inputs):
        native.resize_inputs(position + 1)
    native.replace_input_with(position, _constant(g, label, data, data.dtype))
    if old is not None:
        drop_unused(g, [old])


def _operand(position: int, since: int, name: str) -> Writer:
    """A list that is an attribute before opset ``since`` and the operand at ``position`` from then on."""

    def writer(g: ONNXGraph, node: Node, value: Any) -> None:
        if opset_of(g) < since:
            put(node.native, name, list(value))
        else:
            write_ints(g, node, position, list(value))

    return writer


def opset_of(g: ONNXGraph) -> int:
    imports = g.model.graph.opset_imports
    return imports.get("", 0) or imports.get("ai.onnx", 0)


def _split_sizes(g: ONNXGraph, node: Node, value: Any) -> None:
    put(node.native, "num_outputs", None)
    _operand(1, 13, "split")(g, node, value)


def _resized(g: ONNXGraph, node: Node, value: Any) -> None:
    listed = onnx_native.attribute(node.native, "axes")
    axes = range(len(value)) if listed is None else [a % len(value) for a in listed]
    write_ints(g, node, 3, [value[a] for a in axes])


def _slice_bounds(which: str) -> Writer:
    def writer(g: ONNXGraph, node: Node, value: Any) -> None:
        _operand(1 if which == "starts" else 2, 10, which)(g, node, value)

    return writer


def _index(g: ONNXGraph, node: Node, value: Any) -> None:
    old = node.native.inputs[1]
    dtype = np.dtype(g.table.info[old].dtype or "int64")
    write_constant(g, node, 1, np.asarray(int(value), dtype), f"{node.name}_index")


def _pads(g: ONNXGraph, node: Node, value: Any) -> None:
    new = [lo for lo, _ in value] + [hi for _, hi in value]
    native: ir.Node = node.native
    if opset_of(g) < 11:
        put(native, "pads", new)
        return
    if len(native.inputs) > 3 and native.inputs[3] is not None:  # pads of some axes only
        axes = onnx_native.constant_tensor(native.inputs[3])
        if axes is None or None in new:
            raise ConstraintError("padding of axes that are chosen at run time cannot be set", node=node.name)
        native.replace_input_with(3, None)
        native.resize_inputs(3 if native.inputs[2] is not None else 2)
        write_constant(g, node, 1, np.asarray(new, np.int64), f"{node.name}_pads")
        return
    write_ints(g, node, 1, new)


def _scalar(position: int, since: int, name: str) -> Writer:
    """A bound that is an attribute before opset ``since`` and an operand from then on; None drops it."""

    def writer(g: ONNXGraph, node: Node, value: Any) -> None:
        native: ir.Node = node.native
        if opset_of(g) < since:
            put(native, name, None if value is None else float(value))
        elif value is None:
            if position < len(native.inputs):
                native.replace_input_with(position, None)
        else:
            data = native.inputs[0]
            assert data is not None
            dtype = onnx_native.dtype_of(g.table.info[data].dtype).numpy()
            write_constant(g, node, position, np.asarray(value, dtype), f"{node.name}_{name}")

    return writer


def _axes(since: int) -> Writer:
    return _operand(1, since, "axes")


def _cast_dtype(g: ONNXGraph, node: Node, value: Any) -> None:
    put(node.native, "to", onnx_native.dtype_of(value).value)


def _range(position: int) -> Writer:
    def writer(g: ONNXGraph, node: Node, value: Any) -> None:
        if value is not None:
            old = node.native.inputs[position]
            write_constant(g, node, position, np.asarray(value, g.table.info[old].dtype), f"{node.name}_bound")

    return writer


def _fill(g: ONNXGraph, node: Node, value: Any) -> None:
    old = onnx_native.attribute(node.native, "value")
    dtype = np.dtype(np.float32) if old is None else old.numpy().dtype
    node.native.attributes.add(ir.AttrTensor("value", ir.tensor(np.asarray([value], dtype))))


def _window(op: str) -> dict[tuple[str, str], Writer]:
    return {
        (op, "stride"): _plain("strides", _listed),
        (op, "dilation"): _plain("dilations", _listed),
        (op, "padding"): _padding,
    }


def _each(ops: Sequence[str], key: str, writer: Writer) -> dict[tuple[str, str], Writer]:
    return {(op, key): writer for op in ops}


LATE_REDUCTIONS = (
    "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSumExp", "ReduceL1", "ReduceL2",
)  # fmt: skip
"""Reductions whose axes became an operand at opset 18 (ReduceSum's did at 13)."""

WRITERS: dict[tuple[str, str], Writer] = {
    **_window("Conv"), **_window("ConvTranspose"), **_window("MaxPool"), **_window("AveragePool"),
    **_each(("Conv", "ConvTranspose"), "groups", _plain("group", int)),
    ("ConvTranspose", "output_padding"): _plain("output_padding", _listed),
    **_each(("MaxPool", "AveragePool"), "kernel", _plain("kernel_shape", _listed)),
    **_each(("MaxPool", "AveragePool"), "ceil", _plain("ceil_mode", int)),
    ("AveragePool", "count_include_pad"): _plain("count_include_pad", int),
    ("Gemm", "alpha"): _plain("alpha", float), ("Gemm", "beta"): _plain("beta", float),
    ("Gemm", "transposed_weight"): _plain("transB", lambda v: int(not v)),
    ("BatchNormalization", "training"): _plain("training_mode", int),
    **_each(("BatchNormalization", "InstanceNormalization", "GroupNormalization", "LayerNormalization",
             "RMSNormalization"), "eps", _plain("epsilon", float)),
    ("GroupNormalization", "groups"): _plain("num_groups", int),
    **_each(("LayerNormalization", "RMSNormalization"), "axes", _layer_norm_axes),
    ("LpNormalization", "p"): _plain("p", int),
    ("LpNormalization", "axes"): lambda g, node, v: put(node.native, "axis", int(v[0])),
    ("LRN", "size"): _plain("size", int),
    **_each(("Softmax", "LogSoftmax", "Concat", "Split", "Gather", "ArgMax", "ArgMin", "TopK"), "axis",
            _plain("axis", int)),
    ("Attention", "causal"): _plain("is_causal", int), ("Attention", "scale"): _plain("scale", float),
    ("Attention", "gqa"): lambda g, node, v: None,
    **_each(("LSTM", "GRU", "RNN"), "hidden", _plain("hidden_size", int)),
    **_each(("DepthToSpace", "SpaceToDepth"), "factor", _plain("blocksize", int)),
    ("DepthToSpace", "mode"): _plain("mode", lambda v: str(v).upper()),
    **_each(("QuantizeLinear", "DequantizeLinear"), "axis", _plain("axis", int)),
    **_each(("QuantizeLinear", "DequantizeLinear"), "block", _plain("block_size", int)),
    ("Reshape", "shape"): _operand(1, 5, "shape"),
    ("Expand", "shape"): _operand(1, 8, "shape"),
    ("Tile", "repeats"): _operand(1, 6, "repeats"),
    ("Resize", "shape"): _resized,
    ("ConstantOfShape", "shape"): _operand(0, 9, "shape"), ("ConstantOfShape", "value"): _fill,
    ("Col2Im", "output_size"): _operand(1, 18, "image_shape"),
    ("Split", "sizes"): _split_sizes,
    ("Slice", "starts"): _slice_bounds("starts"), ("Slice", "ends"): _slice_bounds("ends"),
    ("Slice", "axes"): _operand(3, 10, "axes"), ("Slice", "steps"): _operand(4, 10, "steps"),
    ("Gather", "index"): _index,
    ("Pad", "pads"): _pads, ("Pad", "value"): _scalar(2, 11, "value"),
    **_each(("Squeeze", "Unsqueeze", "ReduceSum"), "axes", _axes(13)),
    **_each(LATE_REDUCTIONS, "axes", _axes(18)),
    **_each((*LATE_REDUCTIONS, "ReduceSum", "ArgMax", "ArgMin"), "keepdims", _plain("keepdims", int)),
    ("Transpose", "perm"): _plain("perm", _listed),
    ("Cast", "dtype"): _cast_dtype,
    ("Clip", "min"): _scalar(1, 11, "min"), ("Clip", "max"): _scalar(2, 11, "max"),
    ("Range", "start"): _range(0), ("Range", "end"): _range(1), ("Range", "step"): _range(2),
    ("LeakyRelu", "slope"): _plain("alpha", float), ("ThresholdedRelu", "threshold"): _plain("alpha", float),
    **_each(("Elu", "Celu", "Selu", "HardSigmoid"), "alpha", _plain("alpha", float)),
    ("Selu", "gamma"): _plain("gamma", float), ("HardSigmoid", "beta"): _plain("beta", float),
    ("Gelu", "approximate"): _plain("approximate", str), ("Einsum", "equation"): _plain("equation", str),
}  # fmt: skip
"""(native op, canonical attribute) -> how to write it"""
