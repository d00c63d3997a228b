"""What the exporter leaves around stored integers: casts to their own type, zeros that are computed, transposes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

NARROW = frozenset((ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT2, ir.DataType.UINT2, ir.DataType.UINT16))
PAIR = ("QuantizeLinear", "DequantizeLinear")


def narrow(model: ir.Model) -> int:
    """Store constants that are cast to a type of few bits in that type; returns how many casts went."""
    graph, gone = model.graph, 0
    taken = {*graph.initializers, *(v.name or "" for node in graph for v in node.outputs)}
    made: dict[tuple[ir.Value, int], ir.Value] = {}
    for node in list(graph):
        to = ir.DataType(node.attributes["to"].as_int()) if node.op_type == "Cast" else None
        source = node.inputs[0] if node.inputs else None
        if to not in NARROW or to is None or source is None or source.const_value is None or source.is_graph_input():
            continue
        key = (source, int(to))
        if key not in made:
            array = source.const_value.numpy().astype(to.numpy())
            made[key] = _constant(graph, source, array, taken, "narrow")
        node.outputs[0].replace_all_uses_with(made[key])
        graph.remove(node, safe=True)
        gone += 1
    for source, _ in made:
        if not source.uses() and not source.is_graph_output() and graph.initializers.get(source.name or "") is source:
            del graph.initializers[source.name or ""]
    return gone


def store_zeros(model: ir.Model) -> int:
    """Store zero points that the exporter computes with ConstantOfShape; returns how many nodes went."""
    graph, gone = model.graph, 0
    taken = {*graph.initializers, *(v.name or "" for node in graph for v in node.outputs)}
    for node in list(graph):
        users = [u for v in node.outputs for u in v.uses()]
        if (
            node.op_type != "ConstantOfShape"
            or not users
            or any(u.node.op_type not in PAIR or u.idx != 2 for u in users)
        ):
            continue
        sizes = node.inputs[0].const_value if node.inputs[0] is not None else None
        if sizes is None or node.outputs[0].is_graph_output():
            continue
        zeros = np.zeros(tuple(sizes.numpy().tolist()), node.attributes["value"].as_tensor().dtype.numpy())
        node.outputs[0].replace_all_uses_with(_constant(graph, node.outputs[0], zeros, taken, "stored"))
        operands = list(node.inputs)
        graph.remove(node, safe=True)
        _unused(graph, operands)
        gone += 1
    return gone


def turn_weights(model: ir.Model) -> int:
    """Store quantized weights the way round that they are read: ``Transpose(DQ(w))`` becomes ``DQ(transposed w)``.

    The numbers are the same, the scales' axis moves along. A transposed copy is shared by all that read it so; the
    other way round stays as long as something reads that. Returns how many transposes went.
    """
    graph = model.graph
    made: dict[tuple[ir.Value, tuple[int, ...]], ir.Value] = {}
    taken = {*graph.initializers, *(v.name or "" for node in graph for v in node.outputs)}
    gone = 0
    for node in list(graph):
        dq = node.inputs[0].producer() if node.op_type == "Transpose" and node.inputs[0] is not None else None
        if dq is None or dq.op_type != "DequantizeLinear" or node.outputs[0].is_graph_output():
            continue
        stored = dq.inputs[0]
        if stored is None or stored.const_value is None or stored.is_graph_input():
            continue
        rank = len(stored.const_value.shape)
        perm = tuple(node.attributes["perm"].as_ints()) if "perm" in node.attributes else tuple(reversed(range(rank)))
        key = (dq.outputs[0], perm)
        if key not in made:
            made[key] = _turned(graph, dq, perm, taken)
        node.outputs[0].replace_all_uses_with(made[key])
        graph.remove(node, safe=True)
        gone += 1
    for value in {value for value, _ in made}:
        _drop(graph, value)
    return gone


def turned(dq: ir.Node) -> ir.Value:
    """The dequantized matrix the other way round, by a DequantizeLinear of its own on transposed constants."""
    graph = dq.graph
    assert graph is not None
    return _turned(graph, dq, (1, 0), {*graph.initializers, *(v.name or "" for node in graph for v in node.outputs)})  # type: ignore[arg-type]


def _turned(graph: ir.Graph, dq: ir.Node, perm: tuple[int, ...], taken: set[str]) -> ir.Value:
    old = dq.outputs[0]
    axis = dq.attributes["axis"].as_int() if "axis" in dq.attributes else 1
    axis = axis % len(perm)
    inputs = []
    for value in dq.inputs:
        assert value is not None
        array = None if value.const_value is None else value.const_value.numpy()
        grid = array is not None and array.ndim == len(perm) > 1
        inputs.append(
            _constant(graph, value, array.transpose(perm), taken, "turned") if array is not None and grid else value
        )
    attributes = [a for name, a in dq.attributes.items() if name != "axis"]
    attributes.append(ir.AttrInt64("axis", perm.index(axis)))
    node = ir.Node("", "DequantizeLinear", inputs, attributes, name=f"{dq.name}_turned")
    made = node.outputs[0]
    made.name = _free(taken, f"{old.name}_turned")
    made.type = old.type
    if old.shape is not None:
        made.shape = ir.Shape([old.shape[i] for i in perm])
    graph.insert_after(dq, node)
    return made


def _constant(graph: ir.Graph, value: ir.Value, array: np.ndarray, taken: set[str], how: str) -> ir.Value:
    name = _free(taken, f"{value.name}_{how}")
    tensor = ir.tensor(np.array(array, order="C"), name=name)  # ascontiguousarray would give a scalar an axis
    made = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.initializers.add(made)
    return made


def _free(taken: set[str], name: str) -> str:
    unique, k = name, 1
    while unique in taken:
        k += 1
        unique = f"{name}_{k}"
    taken.add(unique)
    return unique


def _drop(graph: ir.Graph, value: ir.Value) -> None:
    """Take a dequantize away that nothing reads any more, and the constants it alone read."""
    if value.uses() or value.is_graph_output():
        return
    node = value.producer()
    assert node is not None
    operands = list(node.inputs)
    graph.remove(node, safe=True)
    _unused(graph, operands)


def _unused(graph: ir.Graph, operands: Iterable[ir.Value | None]) -> None:
    """Take constants away that nothing reads any more."""
    for operand in operands:
        if operand is None or operand.uses() or operand.is_graph_output():
            continue
        if graph.initializers.get(operand.name or "") is operand:
            del graph.initializers[operand.name or ""]
