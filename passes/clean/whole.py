"""What is tidied on the graph as a whole, before and after the rules."""

from __future__ import annotations

from collections.abc import Collection

from ...graph.ir import Graph
from ..base import Decision

SMALLEST = 1024
"""Floating tensors of fewer bytes than this are not merged: equal biases of two layers have nothing in common."""


NAMES = ("functions", "settled_sizes", "constant_node", "duplicate_tensor", "unused_tensor")
"""What ``disable`` may name besides the rules."""


def but_whole(names: Collection[str]) -> list[str]:
    """The names that are rules' names."""
    return [name for name in names if name not in NAMES]


def tidy_before(graph: Graph, disable: Collection[str] = ()) -> list[Decision]:
    """ONNX: inline the model's own functions, write settled sizes as numbers, merge equal integers and scalars.

    The rules then see plain operators, and equal operands as one value.
    """
    if graph.kind != "onnx":
        return []
    from ...graph.onnx import tidy

    inlined = [] if "functions" in disable else tidy.inline_functions(graph)  # type: ignore[arg-type]
    settled = [] if "settled_sizes" in disable else tidy.write_settled_sizes(graph)  # type: ignore[arg-type]
    made = [Decision(n, "inlined", "a function of the model", {"rule": "functions"}) for n in inlined]
    made += [Decision(n, "stored", "the same in every run", {"rule": "settled_sizes"}) for n in settled]
    return made + ([] if "duplicate_tensor" in disable else _merged(graph, 1 << 62))


def tidy_after(graph: Graph, disable: Collection[str] = ()) -> list[Decision]:
    """ONNX: Constant nodes become initializers, equal stored tensors one; those that nothing reads are forgotten."""
    if graph.kind != "onnx":
        return []
    from ...graph.onnx import tidy

    unused = [] if "unused_tensor" in disable else tidy.drop_unused_tensors(graph)  # type: ignore[arg-type]
    stored = [] if "constant_node" in disable else tidy.store_constants(graph)  # type: ignore[arg-type]
    made = [Decision(n, "removed", "nobody reads it", {"rule": "unused_tensor"}) for n in unused]
    made += [Decision(n, "stored", "a Constant node is an initializer", {"rule": "constant_node"}) for n in stored]
    return made + ([] if "duplicate_tensor" in disable else _merged(graph, SMALLEST))


def _merged(graph: Graph, smallest: int) -> list[Decision]:
    from ...graph.onnx import tidy

    merged = tidy.merge_duplicates(graph, smallest=smallest)  # type: ignore[arg-type]
    return [
        Decision(gone, "merged", f"equal to {kept} in every bit", {"rule": "duplicate_tensor", "kept": kept})
        for gone, kept in merged.items()
    ]
