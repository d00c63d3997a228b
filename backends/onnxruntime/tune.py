"""Rewrites of the lowered model into operators that ONNX Runtime runs faster; the function stays the same."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ...graph.ir import Value
from ...passes.quantize.reference.kernels import Grid, Quantized, ends_at_0_and_1, hard_sigmoid_terms
from .blocks import block_product
from .lookup import DOMAIN, block_lookup


def tune(model: ir.Model, values: Mapping[str, Value] | None = None) -> int:
    """Rewrite in place; returns how many nodes were.

    - ReduceMean over all spatial axes becomes GlobalAveragePool: torch's exporter writes the former for adaptive pools,
      the runtime has an integer kernel and a blocked layout for the latter alone.
    - A Pad with zeros between DequantizeLinear and QuantizeLinear of one grid pads the integers with the zero point:
      the runtime moves no Q/DQ across it, so that it would run in float.
    - A HardSigmoid between a DQ and a Q that ends at 0 and 1 becomes an addition, which has an integer kernel.
    - A look-up in a table dequantized in blocks becomes GatherBlockQuantized.
    - A Gemm whose weight is dequantized in blocks becomes MatMul and Add, of which MatMulNBits is made.
    - In a quantized model an addition of two activations that a LayerNormalization reads is written as Sum, the same to
      the bit: the runtime would make both into SkipLayerNormalization, whose kernel is slower on the CPU.

    ``values``: what is known of values by name, where the model itself says less (files without inner shapes).
    """
    done = 0
    nodes = list(model.graph.all_nodes())
    quantized = any(node.op_type == "DequantizeLinear" for node in nodes)
    for node in nodes:
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type == "ReduceMean" and _spatial(node, values or {}):
            _global_pool(node)
            done += 1
        elif node.op_type == "Pad":
            done += _integer_pad(node)
        elif node.op_type == "HardSigmoid":
            done += _saturating_sum(node)
        elif node.op_type == "Gemm":
            done += block_product(node)
        elif node.op_type == "Gather" and block_lookup(node):
            model.graph.opset_imports[DOMAIN] = 1
            done += 1
        elif node.op_type == "Add" and quantized:
            done += _apart_from_norm(node)
    if done:
        _drop_unread(model)
    return done


def _global_pool(node: ir.Node) -> None:
    pool = ir.Node("", "GlobalAveragePool", [node.inputs[0]], num_outputs=1, name=node.name)
    _replace(node, pool, node.outputs[0])


def _replace(node: ir.Node, by: ir.Node, old: ir.Value) -> None:
    """Put ``by`` behind ``node``, let it take over ``old`` (name and readers), and remove the node that made that."""
    new = by.outputs[0]
    new.shape, new.type, new.name = old.shape, old.type, old.name
    graph, maker = node.graph, old.producer()
    assert graph is not None and maker is not None and maker.graph is not None
    graph.insert_after(node, by)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    maker.graph.remove(maker, safe=True)


def _integer_pad(node: ir.Node) -> bool:
    """Rewrite one Pad if it stands between a DQ and a Q of the same grid and adds zeros."""
    x, padded = node.inputs[0], node.outputs[0]
    dq = None if x is None else x.producer()
    readers = [use.node for use in padded.uses()]
    if dq is None or dq.op_type != "DequantizeLinear" or node.attributes.get_string("mode", "constant") != "constant":
        return False
    if len(readers) != 1 or readers[0].op_type != "QuantizeLinear" or padded.is_graph_output() or len(node.inputs) < 2:
        return False
    fill = node.inputs[2] if len(node.inputs) > 2 else None
    if fill is not None and (_number(fill) is None or _number(fill) != 0):
        return False
    quantize = readers[0]
    scales, points = ([_number(n.inputs[i]) if len(n.inputs) > i else None for n in (dq, quantize)] for i in (1, 2))
    stored = dq.inputs[0]
    if None in scales or None in points or scales[0] != scales[1] or points[0] != points[1] or stored is None:
        return False
    if dq.inputs[2] is None or quantize.inputs[2] is None or dq.inputs[2].dtype != quantize.inputs[2].dtype:
        return False
    pad = ir.Node(
        "", "Pad", [stored, node.inputs[1], dq.inputs[2], *node.inputs[3:]], list(node.attributes.values()),
        num_outputs=1, name=node.name,
    )  # fmt: skip
    _replace(node, pad, quantize.outputs[0])
    for unread in (node, dq):
        if not unread.outputs[0].uses() and not unread.outputs[0].is_graph_output() and unread.graph is not None:
            unread.graph.remove(unread, safe=True)
    return True


def _saturating_sum(node: ir.Node) -> bool:
    """clip(alpha x + beta, 0, 1) as a sum of x on another scale and a constant; the Q behind it saturates."""
    x, result = node.inputs[0], node.outputs[0]
    dq = None if x is None else x.producer()
    readers = [use.node for use in result.uses()]
    if dq is None or dq.op_type != "DequantizeLinear" or result.is_graph_output() or node.graph is None:
        return False
    if len(readers) != 1 or readers[0].op_type != "QuantizeLinear":
        return False
    operand, grid = _stored(dq), _stored(readers[0])
    if operand is None or grid is None or not ends_at_0_and_1(Grid(*grid)):
        return False
    slope, shift = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
    empty = np.zeros(1, operand[1].dtype)
    scaled, constant = hard_sigmoid_terms(Quantized(empty, *operand), slope, shift)
    named = node.name or result.name or "hard_sigmoid"
    terms = {"scale": scaled.scale, "beta": constant.data, "beta_scale": constant.scale, "beta_zero": constant.zero}
    made = [_initializer(node.graph, f"{named}_{key}", data) for key, data in terms.items()]
    first = ir.Node("", "DequantizeLinear", [dq.inputs[0], made[0], dq.inputs[2]], num_outputs=1, name=f"{named}_x")
    second = ir.Node("", "DequantizeLinear", made[1:], num_outputs=1, name=f"{named}_c")
    for i, extra in enumerate((first, second)):
        extra.outputs[0].name = f"{named}_term{i}"
    total = ir.Node("", "Add", [first.outputs[0], second.outputs[0]], num_outputs=1, name=node.name)
    node.graph.insert_before(node, [first, second])
    _replace(node, total, result)
    if not dq.outputs[0].uses() and not dq.outputs[0].is_graph_output() and dq.graph is not None:
        dq.graph.remove(dq, safe=True)
    return True


def _apart_from_norm(node: ir.Node) -> bool:
    """Add as Sum where a LayerNormalization reads it, and no integer addition could come of it."""
    result = node.outputs[0]
    readers = [use.node for use in result.uses()]
    if not any(r.op_type == "LayerNormalization" and r.inputs[0] is result for r in readers):
        return False
    if any(r.op_type == "QuantizeLinear" for r in readers):
        return False
    if any(v is None or ir.convenience.get_const_tensor(v) is not None for v in node.inputs):
        return False
    _replace(node, ir.Node("", "Sum", node.inputs, num_outputs=1, name=node.name), result)
    return True


def _stored(node: ir.Node) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and zero point of a Q or DQ node, both 0-d, if they are stored scalars of 8 bits."""
    tensors = [ir.convenience.get_const_tensor(v) if v is not None else None for v in node.inputs[1:3]]
    if len(tensors) != 2 or any(t is None or t.size != 1 for t in tensors):
        return None
    scale, zero = (t.numpy().reshape(()) for t in tensors if t is not None)
    return (scale.astype(np.float32), zero) if zero.dtype.itemsize == 1 and zero.dtype.kind in "iu" else None


def _initializer(graph: ir.Graph, name: str, data: np.ndarray) -> ir.Value:
    while name in graph.initializers:
        name += "_"
    tensor = ir.tensor(data, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(data.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def _number(value: ir.Value | None) -> float | None:
    """The number that a stored scalar is."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.size != 1 else float(tensor.numpy().reshape(()))


def _spatial(node: ir.Node, values: Mapping[str, Value]) -> bool:
    """Whether it averages floats over exactly the axes behind the second, and keeps them."""
    x = node.inputs[0]
    if x is None:
        return False
    known = values.get(x.name or "")
    rank, dtype = (known.rank, known.dtype) if known is not None else (None, "")
    if x.shape is not None and x.dtype is not None:
        rank, dtype = len(x.shape), {"FLOAT": "float32", "FLOAT16": "float16"}.get(x.dtype.name, "")
    if rank is None or dtype not in ("float32", "float16"):
        return False
    if rank < 3 or node.attributes.get_int("keepdims", 1) != 1:
        return False
    axes = _axes(node)
    return axes is not None and sorted(a % rank for a in axes) == list(range(2, rank))


def _axes(node: ir.Node) -> list[int] | None:
    if "axes" in node.attributes:
        return list(node.attributes["axes"].as_ints())
    stored = node.inputs[1] if len(node.inputs) > 1 else None
    tensor = None if stored is None else ir.convenience.get_const_tensor(stored)
    return None if tensor is None else [int(a) for a in tensor.numpy().reshape(-1)]


def _drop_unread(model: ir.Model) -> None:
    """Initializers that nothing reads any more."""
    for graph in model.graphs():
        outputs = {id(v) for v in graph.outputs}
        for name, value in list(graph.initializers.items()):
            if not value.uses() and id(value) not in outputs and not value.is_graph_input():
                del graph.initializers[name]
