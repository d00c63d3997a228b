"""Sizes that a model computes from static shapes, written into the file as the numbers they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import native as onnx_native
from .attrs import write_ints
from .place import drop_unused, new_constant

if TYPE_CHECKING:
    from .graph import ONNXGraph


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
            if elements is None or elements.all_known or not elements.known.any():
                continue
            if np.issubdtype(elements.a.dtype, np.integer):
                write_ints(g, node, i, elements.ints())
    for native in g.settled:
        for output in native.outputs:
            uses = [u for u in output.uses() if u.node not in g.settled]
            if uses:
                constant = new_constant(g, f"{output.name}_static", g.table.elements[output].a)
            for use in uses:
                use.node.replace_input_with(use.idx, constant)
    g.resync()


def drop_dead_sizes(g: ONNXGraph, *, settled_only: bool = False) -> None:
    """Remove size computations that nothing reads any more since their results were written as numbers."""
    graph = g.model.graph
    for native in reversed(list(graph)):
        node = g.by_native.get(native)
        live = not settled_only and node is not None and node.op in ("scalar", "shape_of")
        sizes = live or native in g.settled
        if sizes and not any(o.uses() or o.is_graph_output() for o in native.outputs):
            operands = [v for v in native.inputs if v is not None]
            graph.remove(native, safe=True)
            drop_unused(g, operands)
