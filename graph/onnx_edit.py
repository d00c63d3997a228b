"""Edits of an ONNXGraph: weights, wiring, insertion and removal, each on the native graph first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from . import onnx_attrs, onnx_insert, onnx_load, onnx_native
from .errors import ConstraintError
from .ir import Node, Value, Weight

if TYPE_CHECKING:
    from .onnx import ONNXGraph

LAZY = 1 << 20
"""Slices of stored files larger than this are taken when the tensor is read or saved, not before."""


# ---- weights -----------------------------------------------------------------------------------------------
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
        data = source.numpy()
        for axis, picks in sorted(steps, key=lambda s: s[1].size / max(weight_shape[s[0]], 1)):
            data = np.take(data, picks, axis=axis)
        return ir.tensor(np.ascontiguousarray(data))

    weight_shape = weight.shape
    lazy = isinstance(source, ir.LazyTensor) or (isinstance(source, ir.ExternalTensor) and source.nbytes > LAZY)
    tensor = ir.LazyTensor(gather, source.dtype, ir.Shape(shape)) if lazy else gather()
    _assign(g, weight, tensor)


def _assign(g: ONNXGraph, weight: Weight, tensor: ir.TensorProtocol) -> None:
    for native in g.carriers[weight]:
        put_constant(native, tensor)
        g.table.constant(native)
        g.moved.add(native)
        g.constant_of(native, operand=True)
    weight.shape, weight.dtype = onnx_native.tensor_shape(tensor), onnx_native.dtype_name(tensor.dtype)
    for native in g.carriers[weight]:
        for use in native.uses():
            node = g.by_native.get(use.node)
            if node is not None and (use.idx in g.canon[node].sizes or not weight.shape):
                g.dirty.add(use.node)
                g.reread(node)
    g.touch()


def put_constant(native: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Change the tensor of an initializer or of a Constant node in place, name and all."""
    producer = native.producer()
    if producer is not None:
        for name in [n for n in producer.attributes if n.startswith("value") or n == "sparse_value"]:
            producer.attributes.pop(name)
        producer.attributes.add(ir.AttrTensor("value", tensor))
    else:
        native.const_value = tensor if tensor.name == native.name else _named(tensor, native.name)
    native.shape, native.type = ir.Shape(onnx_native.tensor_shape(tensor)), ir.TensorType(tensor.dtype)


def _named(tensor: ir.TensorProtocol, name: str | None) -> ir.TensorProtocol:
    if tensor.name is None:
        tensor.name = name
    return tensor


def add_weight(g: ONNXGraph, name: str, data: np.ndarray, *, trainable: bool = False) -> Value:
    native = new_constant(g, name, np.asarray(data))
    value = g.constant_of(native, operand=True)
    if value.weight is not None:
        value.weight.trainable = trainable
        value.weight.kind = "parameter" if trainable else value.weight.kind
        g.weights[value.weight.name] = value.weight
    return value


def new_constant(g: ONNXGraph, name: str, data: np.ndarray) -> ir.Value:
    """A new initializer under a name nobody uses yet."""
    name = fresh(g, name)
    tensor = ir.tensor(np.ascontiguousarray(data).reshape(data.shape), name=name)
    native = ir.Value(name=name, shape=ir.Shape(data.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    g.model.graph.initializers.add(native)
    g.table.constant(native)
    g.touch()
    return native


def fresh(g: ONNXGraph, name: str) -> str:
    unique, i = name, 1
    while unique in g.taken or unique in g.values:
        unique, i = f"{name}_{i}", i + 1
    g.taken.add(unique)
    return unique


def untie(g: ONNXGraph, weight: Weight) -> list[Weight]:
    _same_graph(g, weight)
    carriers = list(g.carriers[weight])
    made = [weight]
    first = True
    for native in carriers:
        for use in list(native.uses()):
            if first:
                first = False
                continue
            tensor = onnx_native.constant_tensor(native)
            assert tensor is not None
            name = fresh(g, f"{weight.name}_{len(made)}")
            copy = ir.LazyTensor(lambda t=tensor: t, tensor.dtype, tensor.shape, name=name)  # type: ignore[misc]
            twin = ir.Value(name=name, shape=ir.Shape(weight.shape), type=ir.TensorType(tensor.dtype), const_value=copy)
            g.model.graph.initializers.add(twin)
            g.table.constant(twin)
            use.node.replace_input_with(use.idx, twin)
            made_value = g.constant_of(twin, operand=True)
            if made_value.weight is not None:
                made.append(made_value.weight)
    for native in carriers[1:]:
        if not native.uses() and not native.is_graph_output() and native.producer() is None:
            g.model.graph.initializers.pop(native.name or "")
    for part in made:  # what shared a tensor may now differ in its role: statistics are no parameters
        native = g.carriers[part][0]
        tensor = onnx_native.constant_tensor(native)
        assert tensor is not None
        part.kind = onnx_load.kind_of(native, tensor)
        part.trainable = part.kind == "parameter" and tensor.dtype.is_floating_point()
    g.resync()
    g.touch()
    return made


def _same_graph(g: ONNXGraph, weight: Weight) -> None:
    if weight not in g.carriers:
        raise ConstraintError("the weight belongs to another graph or was removed", node=weight.name)


# ---- attributes --------------------------------------------------------------------------------------------
def set_attr(g: ONNXGraph, node: Node, attrs: dict[str, Any]) -> None:
    changed = {k: v for k, v in attrs.items() if k not in node.attrs or node.attrs[k] != v}
    if not changed:
        return
    if any(k in onnx_attrs.SIZES for k in changed):
        bake_sizes(g)
    for key, value in changed.items():
        onnx_attrs.write(g, node, key, value)
    g.dirty.add(node.native)
    g.reread(node)
    g.touch()


def bake_sizes(g: ONNXGraph) -> None:
    """Write every size the view shows as a number into the file as a number.

    A size computed from a *static* shape is a constant of the model: ``Shape(x)[2] / 12`` must stay 64 when an edit
    shortens x. Done once, before the first edit that changes a shape; sizes of dynamic dimensions stay computed.
    """
    if g.baked:
        return
    g.baked = True
    for node in list(g.nodes):
        for i in g.canon[node].sizes:
            native = node.native.inputs[i]
            if native is None or onnx_native.constant_tensor(native) is not None:
                continue
            elements = g.table.elements.get(native)
            if elements is not None and elements.known.any():
                onnx_attrs.write_ints(g, node, i, elements.ints())
        if node.op == "scalar":
            continue
        for i in g.canon[node].operands:
            native = None if i is None else node.native.inputs[i]
            view = None if native is None else g.view.get(native)
            if view is None or view.producer is None or view.producer.op != "scalar" or view.literal is None:
                continue
            constant = new_constant(g, f"{view.name}_static", np.asarray(view.literal))
            node.native.replace_input_with(i, constant)
    g.resync()


def drop_dead_sizes(g: ONNXGraph) -> None:
    """Remove size computations that nothing reads any more since their results were written as numbers."""
    graph = g.model.graph
    for node in reversed(list(g.nodes)):
        native: ir.Node = node.native
        outputs = native.outputs
        if node.op in ("scalar", "shape_of") and not any(o.uses() or o.is_graph_output() for o in outputs):
            operands = [v for v in native.inputs if v is not None]
            graph.remove(native, safe=True)
            _drop_unused(g, operands)


# ---- wiring ------------------------------------------------------------------------------------------------
def set_input(g: ONNXGraph, node: Node, position: int, value: Value | None) -> None:
    native: ir.Node = node.native
    operands = g.canon[node].operands
    slot = operands[position] if position < len(operands) else None
    if slot is None:
        slot = onnx_attrs.slot_of(node, position)
    old = native.inputs[slot] if slot < len(native.inputs) else None
    if value is not None and value.native is old:
        return
    if slot >= len(native.inputs):
        native.resize_inputs(slot + 1)
    native.replace_input_with(slot, None if value is None else value.native)
    while native.inputs and native.inputs[-1] is None:
        native.resize_inputs(len(native.inputs) - 1)
    g.dirty.add(native)
    g.reread(node)
    if old is not None:
        g.idle.append(old)
    g.touch()


def replace_uses(g: ONNXGraph, old: Value, new: Value, except_nodes: Iterable[Node] = ()) -> None:
    if old is new:
        return
    spared = {n.native for n in except_nodes}
    source, target = old.native, new.native
    owners: dict[ir.Node, None] = {}
    for use in list(source.uses()):
        owner = _top(use.node, g)
        if owner in spared:
            continue
        use.node.replace_input_with(use.idx, target)
        owners[owner] = None
    if source.is_graph_output():
        _move_output(g, old, new)
    for owner in owners:
        g.dirty.add(owner)
        if owner in g.by_native:
            g.reread(g.by_native[owner])
    g.moved.add(target)
    g.orphans[source] = None
    g.touch()


def drop_orphans(g: ONNXGraph) -> None:
    """Forget stored values that lost their last reader since the last refresh (until then they may be wired again)."""
    orphans, g.orphans = list(g.orphans), {}
    _drop_unused(g, [v for v in orphans if v in g.view])


def _top(node: ir.Node, g: ONNXGraph) -> ir.Node:
    """The node of the main graph whose subgraphs hold ``node``."""
    while node.graph is not g.model.graph:
        node = next(n for n in g.model.graph if _holds(n, node))
    return node


def _holds(outer: ir.Node, inner: ir.Node) -> bool:
    return any(n is inner or _holds(n, inner) for graph in onnx_native.subgraphs(outer) for n in graph)


def _move_output(g: ONNXGraph, old: Value, new: Value) -> None:
    """Let the graph output of ``old`` be ``new`` under the same name."""
    graph = g.model.graph
    name, source, target = old.native.name, old.native, new.native
    slots = [i for i, v in enumerate(graph.outputs) if v is source]
    free = target.producer() is not None and not target.is_graph_output() and not onnx_native.is_constant_node(target.producer())
    if not free:
        bridge = ir.Node("", "Identity", [target], name=fresh(g, f"{name}_output"))
        bridge.outputs[0].shape, bridge.outputs[0].type = target.shape, target.type
        graph.append(bridge)
        g.table.visit(bridge, stored=False)
        target = bridge.outputs[0]
    for i in slots:
        graph.outputs[i] = target
    parked = fresh(g, f"{name}_before")
    source.name = parked
    target.name = name
    if target.shape is None:
        target.shape = source.shape
    if target.type is None:
        target.type = source.type
    if not free:
        g.resync()
    for value in (old, new):
        g.values.pop(value.name, None)
    for value in (old, new):
        value.name = value.native.name
        g.values[value.name] = value
        if value.weight is not None and value.weight.value is value:
            value.weight.name = value.name
    old.is_output = False
    out = g.value_of(target)
    out.is_output = True
    for i in slots:
        g.outputs[i] = out


# ---- nodes -------------------------------------------------------------------------------------------------
def insert(
    g: ONNXGraph, op: str, inputs: Sequence[Value | None], attrs: dict[str, Any], *, name: str, after: Node | None, scope: str
) -> Node:
    made = onnx_insert.spell(g, op, inputs, attrs, fresh(g, name))
    graph = g.model.graph
    index = 0 if after is None else g.nodes.index(after) + 1
    if after is not None:
        graph.insert_after(after.native, made)
    elif len(graph):
        graph.insert_before(graph[0], made)
    else:
        graph.extend(made)
    return adopt(g, made, index, scope)


def adopt(g: ONNXGraph, made: Sequence[ir.Node], index: int, scope: str = "") -> Node:
    """Give new native nodes their view (at ``index`` of ``g.nodes``), shapes included; returns the last one's."""
    node: Node | None = None
    used: set[str] = set()
    for i, native in enumerate(made):
        for output in native.outputs:
            g.taken.add(output.name or "")
        g.table.visit(native, stored=False)
        for output in native.outputs:
            _write_shape(g, output, fill=True)
        node = g.by_native[native] = g._new_node(native, used)
        node.scope = scope or node.scope
        g.nodes.insert(index + i, node)
        g.reread(node)
        g.dirty.add(native)
    assert node is not None
    g.touch()
    return node


def erase(g: ONNXGraph, node: Node) -> None:
    native: ir.Node = node.native
    for value in native.outputs:
        if value.uses() or value.is_graph_output():
            users = [u.node.name or u.node.op_type for u in value.uses()]
            raise ConstraintError(
                "the node is still in use", node=node.name, value=value.name,
                found="a graph output" if value.is_graph_output() else f"read by {users[:4]}",
                hint="replace_uses first",
            )  # fmt: skip
    operands = [v for v in native.inputs if v is not None]
    operands += onnx_native.captures(native, g.model.graph)
    for graph in onnx_native.subgraphs(native):
        for inner in list(graph):
            for i in range(len(inner.inputs)):
                inner.replace_input_with(i, None)
    g.model.graph.remove(native, safe=True)
    g.nodes.remove(node)
    for held in node.inputs:
        if held is not None:
            held.uses = [u for u in held.uses if u[0] is not node]
    for value in native.outputs:
        g.values.pop(value.name or "", None)
        g.view.pop(value, None)
        g.table.info.pop(value, None)
    g.by_native.pop(native, None)
    g.canon.pop(node, None)
    g.dirty.discard(native)
    _drop_unused(g, operands)
    g.touch()


def drop_idle(g: ONNXGraph) -> None:
    """Forget stored operands that were replaced and that nothing has taken up again."""
    idle, g.idle = g.idle, []
    _drop_unused(g, idle)


def _drop_unused(g: ONNXGraph, candidates: Iterable[ir.Value]) -> None:
    """Forget stored values that nothing reads any more."""
    graph = g.model.graph
    for native in dict.fromkeys(candidates):
        if onnx_native.constant_tensor(native) is None or native.uses() or native.is_graph_output():
            continue
        producer = native.producer()
        if producer is not None:
            graph.remove(producer, safe=True)
        else:
            graph.initializers.pop(native.name or "")
        view = g.view.pop(native, None)
        g.values.pop(native.name or "", None)
        g.table.info.pop(native, None)
        g.table.elements.pop(native, None)
        g.moved.discard(native)
        weight = None if view is None else view.weight
        if weight is not None and weight in g.carriers:
            g.carriers[weight] = [v for v in g.carriers[weight] if v is not native]
            if not g.carriers[weight]:
                del g.carriers[weight]
                g.weights.pop(weight.name, None)


# ---- shapes in the file ------------------------------------------------------------------------------------
def write_shapes(g: ONNXGraph) -> None:
    """Bring the shapes stored in the file in line with the table, changing only those that disagree."""
    for node in g.model.graph:
        if not onnx_native.is_constant_node(node):
            for value in node.outputs:
                _write_shape(g, value, fill=False)


def _write_shape(g: ONNXGraph, value: ir.Value, *, fill: bool) -> None:
    info = g.table.info.get(value)
    if info is None or info.shape is None or info.a is None:
        return
    if info.dtype and (value.type is None or (isinstance(value.type, ir.TensorType) and value.dtype is not None
                                              and onnx_native.dtype_name(value.dtype) != info.dtype)):  # fmt: skip
        value.type = ir.TensorType(onnx_native.dtype_of(info.dtype))
    if value.shape is None and not fill and not value.is_graph_output():
        return
    old = list(value.shape) if value.shape is not None else []
    fits = len(old) == len(info.shape) and all(
        (o == n) if isinstance(o, int) else isinstance(n, str) or o.value is None for o, n in zip(old, info.shape, strict=True)
    )
    if fits:
        return
    keep = len(old) == len(info.shape)
    dims: list[Any] = []
    for i, dim in enumerate(info.shape):
        if isinstance(dim, int):
            dims.append(dim)
        elif keep and not isinstance(old[i], int):
            dims.append(old[i])
        else:
            dims.append(dim if dim in g.table.declared else None)
    value.shape = ir.Shape(dims)
