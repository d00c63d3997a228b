"""Sizes that a model computes from static shapes, written into the file as the numbers they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from . import onnx_native
from .onnx_attrs import write_constant, write_ints
from .onnx_place import drop_unused, new_constant

if TYPE_CHECKING:
    from .onnx import ONNXGraph


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
            if elements is None or not elements.known.any():
                continue
            if np.issubdtype(elements.a.dtype, np.integer):
                write_ints(g, node, i, elements.ints())
            elif elements.all_known:
                write_constant(g, node, i, elements.a, f"{node.name}_static")
        if node.op == "scalar":
            continue
        for slot in g.canon[node].operands:
            if slot is None:
                continue
            native = node.native.inputs[slot]
            view = None if native is None else g.view.get(native)
            if view is None or view.producer is None or view.producer.op != "scalar" or view.literal is None:
                continue
            constant = new_constant(g, f"{view.name}_static", np.asarray(view.literal))
            node.native.replace_input_with(slot, constant)
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
            drop_unused(g, operands)
