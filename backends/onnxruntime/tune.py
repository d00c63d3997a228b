"""Rewrites of the lowered model into operators that ONNX Runtime runs faster; the function stays the same."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ...graph.ir import Value


def tune(model: ir.Model, values: Mapping[str, Value] | None = None) -> int:
    """Rewrite in place; returns how many nodes were.

    ``values``: what is known of values by name, where the model itself says less (files without inner shapes).

    ReduceMean over all spatial axes becomes GlobalAveragePool: torch's exporter writes the former for adaptive pools,
    the runtime has an integer kernel and a blocked layout for the latter alone.
    """
    done = 0
    for node in list(model.graph.all_nodes()):
        if node.domain in ("", "ai.onnx") and node.op_type == "ReduceMean" and _spatial(node, values or {}):
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
