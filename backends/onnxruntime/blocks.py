"""A Gemm whose weight is dequantized in blocks, as MatMul and Add: ONNX Runtime fuses only that (MatMulNBits)."""

from __future__ import annotations

import onnx_ir as ir

from .turn import turned


def block_product(node: ir.Node) -> bool:
    """Rewrite one Gemm in place if its weight comes in blocks; the numbers are the same to the bias's rounding."""
    weight, graph = node.inputs[1], node.graph
    dq = None if weight is None else weight.producer()
    if dq is None or graph is None or dq.op_type != "DequantizeLinear" or "block_size" not in dq.attributes:
        return False
    if dq.inputs[0] is None or dq.inputs[0].const_value is None or node.attributes.get_int("transA", 0) != 0:
        return False
    if any(node.attributes.get_float(key, 1.0) != 1.0 for key in ("alpha", "beta")):
        return False
    if node.attributes.get_int("transB", 0):
        weight = turned(dq)  # the other way round stays as long as something else reads it
    product = ir.Node("", "MatMul", [node.inputs[0], weight], name=node.name)
    graph.insert_before(node, product)
    last = product
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        last = ir.Node("", "Add", [product.outputs[0], bias], name=f"{node.name}_bias")
        graph.insert_before(node, last)
        product.outputs[0].name = f"{node.outputs[0].name}_product"
        product.outputs[0].type, product.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    old, new = node.outputs[0], last.outputs[0]
    new.shape, new.type, new.name = old.shape, old.type, old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if not dq.outputs[0].uses() and not dq.outputs[0].is_graph_output():
        graph.remove(dq, safe=True)
    return True
