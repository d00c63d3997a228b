"""Rewrites of the lowered model into operators for which ONNX Runtime has better kernels; the function stays the same."""

from __future__ import annotations

import onnx_ir as ir


def tune(model: ir.Model) -> int:
    """Rewrite in place; returns how many nodes were.

    ReduceMean over all spatial axes becomes GlobalAveragePool: torch's exporter writes the former for adaptive pools,
    the runtime has an integer kernel and a blocked layout for the latter alone.
    """
    done = 0
    for node in list(model.graph.all_nodes()):
        if node.domain in ("", "ai.onnx") and node.op_type == "ReduceMean" and _spatial(node):
            pool = ir.Node("", "GlobalAveragePool", [node.inputs[0]], num_outputs=1, name=node.name)
            old, new = node.outputs[0], pool.outputs[0]
            new.shape, new.type, new.name = old.shape, old.type, old.name
            graph = node.graph
            assert graph is not None
            graph.insert_after(node, pool)
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            done += 1
    if done:
        _drop_unread(model)
    return done


def _spatial(node: ir.Node) -> bool:
    """Whether it averages floats over exactly the axes behind the second, and keeps them."""
    x = node.inputs[0]
    if x is None or x.shape is None or x.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return False
    rank = len(x.shape)
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
