"""Embedding tables in blocks of few bits: rows looked up as integers (GatherBlockQuantized), not dequantized whole."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

DOMAIN = "com.microsoft"
TYPES = {"INT4": 4, "UINT4": 4, "UINT8": 8, "INT8": 8}
"""Stored types -> bits. int8 is stored as uint8 with zero points 128 higher: the operator has no other 8 bits."""


def block_lookup(node: ir.Node) -> bool:
    """Rewrite Gather(DequantizeLinear(table, scales, zero points), rows) with blocks along the features, in place.

    The numbers are the same ones; without this the runtime dequantizes all rows in every run. Taken: stored tables of
    rank 2 in int4, uint4, int8 and uint8, looked up along axis 0, blocks of a power of two from 16 on, float32 scales.
    """
    dq = None if node.inputs[0] is None else node.inputs[0].producer()
    if dq is None or dq.op_type != "DequantizeLinear" or node.graph is None or node.attributes.get_int("axis", 0) != 0:
        return False
    stored = [None if v is None else ir.convenience.get_const_tensor(v) for v in dq.inputs]
    table, scale = stored[0], stored[1] if len(stored) > 1 else None
    zero = stored[2] if len(stored) > 2 else None
    block = dq.attributes.get_int("block_size", 0)
    if table is None or scale is None or (len(dq.inputs) > 2 and dq.inputs[2] is not None and zero is None):
        return False
    if table.dtype.name not in TYPES or len(table.shape) != 2 or scale.dtype != ir.DataType.FLOAT:
        return False
    if block < 16 or block & (block - 1) or dq.attributes.get_int("axis", 1) not in (1, -1):
        return False
    operands = [dq.inputs[0], node.inputs[1], dq.inputs[1], *([] if zero is None else [dq.inputs[2]])]
    if table.dtype == ir.DataType.INT8:
        operands[0] = _shifted(node.graph, dq.inputs[0], table)
        if zero is not None:
            operands[3] = _shifted(node.graph, dq.inputs[2], zero)
    elif table.dtype == ir.DataType.UINT8 and zero is None:
        return False  # DequantizeLinear takes 0 where none is given, this operator takes 128
    attrs = {"bits": TYPES[table.dtype.name], "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    made = ir.Node(
        DOMAIN, "GatherBlockQuantized", operands, ir.convenience.convert_attributes(attrs), num_outputs=1,
        name=node.name,
    )  # fmt: skip
    old, new = node.outputs[0], made.outputs[0]
    new.shape, new.type, new.name = old.shape, old.type, old.name
    node.graph.insert_after(node, made)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
    if not dq.outputs[0].uses() and not dq.outputs[0].is_graph_output() and dq.graph is not None:
        dq.graph.remove(dq, safe=True)
    return True


def _shifted(graph: ir.Graph, value: ir.Value | None, tensor: ir.TensorProtocol) -> ir.Value:
    """The stored int8 numbers as uint8, 128 higher; stored once for all that read them."""
    assert value is not None
    name = f"{value.name}_u8"
    if name not in graph.initializers:
        data = (tensor.numpy().astype(np.int16) + 128).astype(np.uint8)
        made = ir.tensor(data, name=name)
        graph.register_initializer(
            ir.Value(name=name, type=ir.TensorType(made.dtype), shape=ir.Shape(data.shape), const_value=made)
        )
    return graph.initializers[name]
