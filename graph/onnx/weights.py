"""Edits of the stored tensors of an ONNXGraph: replace, slice, add, untie."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ..errors import ConstraintError
from ..ir import Value, Weight
from . import load as onnx_load
from . import native as onnx_native
from .place import fresh, new_constant, put_constant
from .sizes import bake_sizes

if TYPE_CHECKING:
    from .graph import ONNXGraph

LAZY = 1 << 20
"""Slices of stored files larger than this are taken when the tensor is read or saved, not before."""


def set_weight(g: ONNXGraph, weight: Weight, data: np.ndarray) -> None:
    _same_graph(g, weight)
    data = np.ascontiguousarray(data)
    if data.shape != weight.shape:
        bake_sizes(g)
    _assign(g, weight, ir.tensor(data))


def slice_weight(g: ONNXGraph, weight: Weight, kept: dict[int, np.ndarray]) -> None:
    _same_graph(g, weight)
    steps: list[tuple[int, np.ndarray]] = []
    shape = list(weight.shape)
    for axis, indices in kept.items():
        picks = np.asarray(indices, np.int64)
        if not 0 <= axis < len(shape) or (picks.size and (picks.min() < 0 or picks.max() >= shape[axis])):
            raise ConstraintError(
                f"slice of axis {axis} lies outside the weight", node=weight.name, expected=weight.shape,
                found=None if not picks.size else (int(picks.min()), int(picks.max())),
            )  # fmt: skip
        if picks.size != shape[axis] or not np.array_equal(picks, np.arange(shape[axis])):
            steps.append((axis, picks))
    if not steps:
        return
    bake_sizes(g)
    source = onnx_native.constant_tensor(g.carriers[weight][0])
    assert source is not None
    for axis, picks in steps:
        shape[axis] = picks.size

    def gather() -> ir.TensorProtocol:
        mapped = isinstance(source, ir.ExternalTensor) and source.raw is not None
        data = source.numpy()
        for axis, picks in sorted(steps, key=lambda s: s[1].size / max(weight_shape[s[0]], 1)):
            data = np.take(data, picks, axis=axis)
        result = ir.tensor(np.ascontiguousarray(data))
        del data
        if isinstance(source, ir.ExternalTensor) and not mapped:
            source.release()  # or the pages of a file larger than memory would pile up while it is saved
        return result

    weight_shape = weight.shape
    stored = onnx_native.stored_in(source)
    lazy = stored is not None and stored.nbytes > LAZY
    _assign(g, weight, onnx_native.lazy(gather, source, tuple(shape)) if lazy else gather())


def _assign(g: ONNXGraph, weight: Weight, tensor: ir.TensorProtocol) -> None:
    for native in g.carriers[weight]:
        put_constant(native, tensor)
        g.table.constant(native)
        g.moved.add(native)
        g.operand_of(native)
    weight.shape, weight.dtype = onnx_native.tensor_shape(tensor), onnx_native.dtype_name(tensor.dtype)
    for native in g.carriers[weight]:
        for use in native.uses():
            if use.idx == 1 and "kernel_shape" in use.node.attributes:  # a convolution states its kernel twice
                use.node.attributes.add(ir.AttrInt64s("kernel_shape", list(weight.shape[2:])))
            node = g.by_native.get(use.node)
            if node is not None and (use.idx in g.canon[node].sizes or not weight.shape):
                g.dirty.add(use.node)
                g.reread(node)
    g.touch()


def add_weight(g: ONNXGraph, name: str, data: np.ndarray, *, trainable: bool = False) -> Value:
    native = new_constant(g, name, np.asarray(data))
    if not trainable and np.asarray(data).dtype.kind == "f":
        native.metadata_props[onnx_load.KIND] = "BUFFER"  # or it would come back from a clone as a parameter
    value = g.operand_of(native)
    if value.weight is not None:
        value.weight.trainable = trainable
        value.weight.kind = "parameter" if trainable else value.weight.kind
        g.weights[value.weight.name] = value.weight
    return value


def untie(g: ONNXGraph, weights: Iterable[Weight]) -> list[list[Weight]]:
    """Give each use of each weight a tensor of its own; the first use keeps the old one."""
    groups = [_untie(g, weight) for weight in weights]
    for part in (w for group in groups for w in group):
        # what shared a tensor may differ in its role: statistics are no parameters
        native = g.carriers[part][0]
        tensor = onnx_native.constant_tensor(native)
        assert tensor is not None
        part.kind = onnx_load.kind_of(native, tensor)
        part.trainable = part.kind == "parameter" and tensor.dtype.is_floating_point()
    g.resync()
    g.touch()
    return groups


def _untie(g: ONNXGraph, weight: Weight) -> list[Weight]:
    _same_graph(g, weight)
    made = [weight]
    carriers = list(g.carriers[weight])
    uses = [(native, use) for native in carriers for use in native.uses()]
    for native, use in uses[1:]:
        tensor = onnx_native.constant_tensor(native)
        assert tensor is not None
        twin = _twin(g, fresh(g, f"{weight.name}_{len(made)}"), tensor)
        use.node.replace_input_with(use.idx, twin)
        part = g.operand_of(twin).weight
        if part is not None:
            made.append(part)
    for native in carriers[1:]:
        if not native.uses() and not native.is_graph_output() and native.producer() is None:
            g.model.graph.initializers.pop(native.name or "")
    return made


def _twin(g: ONNXGraph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """An initializer of the same data, which is not copied."""
    shape = onnx_native.tensor_shape(tensor)
    shared = onnx_native.lazy(lambda: tensor, tensor, shape)
    shared.name = name
    twin = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype), const_value=shared)
    g.model.graph.initializers.add(twin)
    g.table.constant(twin)
    return twin


def _same_graph(g: ONNXGraph, weight: Weight) -> None:
    if weight not in g.carriers:
        raise ConstraintError("the weight belongs to another graph or was removed", node=weight.name)
