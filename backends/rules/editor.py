"""Edits of an ONNX model that repairs are made of: store a constant, set a pair's numbers, add or remove a pair."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import ml_dtypes
import numpy as np
import onnx_ir as ir

from .onnx_file import OnnxFile, name_of
from .qdq import DQ, Pair, Q, dequantizer, is_op, quantizer, readers

LIMITS = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767), "uint16": (0, 65535)}


class Editor:
    """A model of its own that repairs change. ``file`` is the view of its present state.

    ``done`` collects (repair's words, node) of every change.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.done: list[tuple[str, str]] = []
        self.file = OnnxFile(model)
        self._names: set[str] = set()
        self.reread()

    def reread(self) -> None:
        """See the model as it is now."""
        self.file = OnnxFile(self.model)
        values = [v for n in self.file.nodes for v in n.outputs] + list(self.model.graph.inputs)
        self._names = {v.name or "" for v in values} | set(self.model.graph.initializers)
        self._names |= {n.name or "" for n in self.file.nodes}

    def say(self, what: str, node: ir.Node) -> None:
        self.done.append((what, name_of(node)))

    def unique(self, name: str) -> str:
        """A name that nothing has yet."""
        found, i = name, 1
        while found in self._names:
            found, i = f"{name}_{i}", i + 1
        self._names.add(found)
        return found

    # ---- constants ----------------------------------------------------------------------------------------------
    def store(self, name: str, data: np.ndarray) -> ir.Value:
        """A new initializer."""
        name = self.unique(name)
        tensor = ir.tensor(np.array(data, order="C"), name=name)  # ascontiguousarray makes scalars vectors
        value = ir.Value(name=name, shape=ir.Shape(data.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.model.graph.initializers[name] = value
        return value

    def set_operand(self, node: ir.Node, position: int, value: ir.Value) -> None:
        """Rewire one operand, which may be the first absent one."""
        if position >= len(node.inputs):
            node.resize_inputs(position + 1)
        node.replace_input_with(position, value)

    def set_numbers(self, pair: Pair, scale: np.ndarray, zero: np.ndarray) -> None:
        """Give a node another scale and zero point (constants of its own), and its result the zero point's type."""
        base = name_of(pair.node)
        self.set_operand(pair.node, 1, self.store(f"{base}_scale", scale))
        self.set_operand(pair.node, 2, self.store(f"{base}_zero_point", zero))
        pair.node.attributes.pop("output_dtype", None)
        if pair.quantizes:
            retype(pair.node.outputs[0], ir.DataType.from_numpy(zero.dtype))

    # ---- nodes ------------------------------------------------------------------------------------------------------
    def add(
        self,
        op_type: str,
        operands: Iterable[ir.Value | None],
        name: str,
        *,
        before: ir.Node | None = None,
        after: ir.Node | None = None,
        **attributes: int | float | str,
    ) -> ir.Node:
        """A new node with one result, beside another one."""
        made = [
            ir.AttrInt64(k, v) if isinstance(v, int) else ir.AttrFloat32(k, float(v)) for k, v in attributes.items()
        ]
        result = ir.Value(name=self.unique(f"{name}_out"))
        node = ir.Node("", op_type, list(operands), made, outputs=[result], name=self.unique(name))
        beside = before or after
        graph = self.model.graph if beside is None or beside.graph is None else beside.graph
        if before is not None:
            graph.insert_before(before, node)
        elif after is not None:
            graph.insert_after(after, node)
        else:
            graph.insert_before(graph[0], node)
        return node

    def rewire(self, old: ir.Value, new: ir.Value, only: Callable[[ir.Node], bool] = lambda node: True) -> int:
        """Let readers of ``old`` read ``new``; a graph output stays where it is. Returns how many were changed."""
        uses = [use for use in old.uses() if only(use.node)]
        for use in uses:
            use.node.replace_input_with(use.idx, new)
        return len(uses)

    def take_over_output(self, old: ir.Value, new: ir.Value) -> None:
        """Let ``new`` be the graph output that ``old`` is, under its name."""
        outputs = self.model.graph.outputs
        name = old.name
        old.name = self.unique(f"{name}_before")
        new.name = name
        new.type, new.shape = old.type, old.shape
        for i, value in enumerate(outputs):
            if value is old:
                outputs[i] = new

    def remove_pair(self, dq: Pair) -> bool:
        """Let readers of a dequantized value read what was quantized; a graph output becomes a plain copy."""
        source = quantizer(self.file, dq.data)
        value = source.data if source is not None else None
        if value is None:
            return False
        result = dq.node.outputs[0]
        self.rewire(result, value)
        if result.is_graph_output():
            if value.is_graph_output() or value.producer() is None:
                copy = self.add("Identity", [value], f"{name_of(dq.node)}_copy", after=dq.node)
                self.take_over_output(result, copy.outputs[0])
            else:
                self.take_over_output(result, value)
        return True

    def insert_pair(self, value: ir.Value, like: Pair, after: ir.Node) -> ir.Value:
        """A pair of ``like``'s numbers behind a value; returns the dequantized one."""
        base = f"{value.name}_pair"
        operands = [like.scale, *([like.zero] if like.zero is not None else [])]
        q = self.add(Q, [value, *operands], f"{base}_quantize", after=after)
        dq = self.add(DQ, [q.outputs[0], *operands], f"{base}_dequantize", after=q)
        return dq.outputs[0]

    def weight_dq(self, dq: Pair, data: np.ndarray, scale: np.ndarray, axis: int | None) -> None:
        """Store another int8 weight behind a DequantizeLinear, symmetric, with scales along ``axis``."""
        base = name_of(dq.node)
        dq.node.replace_input_with(0, self.store(f"{base}_quantized", data))
        self.set_numbers(dq, scale, np.zeros(scale.shape, data.dtype))
        dq.node.attributes.pop("block_size", None)
        if axis is not None:
            dq.node.attributes["axis"] = ir.AttrInt64("axis", axis)

    def clean(self) -> None:
        """Drop nodes and initializers that nothing reads."""
        from onnx_ir.passes.common import RemoveUnusedNodesPass

        RemoveUnusedNodesPass()(self.model)
        self.reread()


def retype(value: ir.Value, dtype: ir.DataType) -> None:
    """Note an element type on a value and on what moves its elements on."""
    value.type = ir.TensorType(dtype)  # a new one: clones share theirs, and setting .dtype would change the original
    for node in readers(value):
        if not is_op(node, DQ) and node.op_type in (
            "Reshape",
            "Transpose",
            "Identity",
            "Squeeze",
            "Unsqueeze",
            "Slice",
        ):
            retype(node.outputs[0], dtype)


def named(editor: Editor, names: set[str]) -> list[Pair]:
    """The pairs among these node names."""
    nodes = [n for n in editor.file.of(Q, DQ) if name_of(n) in names]
    return [Pair(editor.file, n) for n in nodes]


def nodes_named(editor: Editor, names: set[str], *op_types: str) -> list[ir.Node]:
    """The nodes among these names, of these types if any are given."""
    return [n for n in editor.file.nodes if name_of(n) in names and (not op_types or n.op_type in op_types)]


def dequantizers(editor: Editor, q: Pair) -> list[Pair]:
    """What reads a QuantizeLinear's integers, past operators that move elements."""
    found, stack = [], [q.node.outputs[0]]
    while stack:
        for node in readers(stack.pop()):
            if is_op(node, DQ):
                found.append(Pair(editor.file, node))
            else:
                stack += node.outputs
    return found


def spread(a: np.ndarray, axis: int | None, rank: int) -> np.ndarray:
    """A vector along one axis, ready to broadcast."""
    return a if a.ndim == 0 or axis is None else a.reshape([-1 if i == axis else 1 for i in range(rank)])


def real(editor: Editor, dq: Pair) -> np.ndarray | None:
    """What a DequantizeLinear of stored integers stands for, in float32; None where that is not known."""
    data, scale, zero = editor.file.const(dq.data), dq.scales, dq.zeros
    if data is None or scale is None or dq.block or data.dtype.kind not in "iu":
        return editor.file.const(dq.node.outputs[0])
    # Not through the evaluator, which leaves large tensors alone.
    axis = None if dq.per_tensor else dq.positive_axis
    scale = scale.reshape(()) if dq.per_tensor else spread(scale, axis, data.ndim)
    if zero is not None and zero.any():
        shift = zero.reshape(()) if zero.size == 1 else spread(zero, axis, data.ndim)
        data = data.astype(np.int32) - shift.astype(np.int32)
    return np.asarray(data.astype(scale.dtype) * scale)


def symmetric(data: np.ndarray, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    """int8 integers and float32 scales of a weight, within -127..127, per index of ``axis`` or for all of it."""
    data = data.astype(np.float32)
    other = None if axis is None else tuple(i for i in range(data.ndim) if i != axis)
    peak = np.abs(data).max(axis=other) if data.size else np.zeros((), np.float32)
    scale = np.asarray(np.where(peak > 0, peak / np.float32(127), np.float32(1)), np.float32)
    integers = np.clip(np.rint(data / spread(scale, axis, data.ndim)), -127, 127).astype(np.int8)
    return integers, scale


def floating(data: np.ndarray) -> bool:
    return data.dtype.kind == "f" or data.dtype == ml_dtypes.bfloat16


__all__ = [
    "LIMITS",
    "Editor",
    "dequantizer",
    "dequantizers",
    "floating",
    "named",
    "nodes_named",
    "real",
    "retype",
    "spread",
    "symmetric",
]
