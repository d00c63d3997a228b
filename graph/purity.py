"""Which nodes are nothing but functions of their operands, and when two of them compute the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache

from .ir import Graph, Node


def is_pure(graph: Graph, node: Node) -> bool:
    """Whether a node draws no random numbers, writes nothing, learns nothing and holds nothing that does.

    Operators of other domains and calls of functions may do any of that, so they are not pure; nor is a layer in
    training mode. A pure node that nobody reads can go, and of two pure nodes with one signature one can go.
    """
    if node.op == "random" or node.attrs.get("training"):
        return False
    return _native(graph.kind)[0](node, graph)


def signature(graph: Graph, node: Node) -> Hashable | None:
    """Equal for two pure nodes of one graph exactly where operator, domain, attributes and all operands are equal.

    Operands are equal if they are the same value. None where the node is not pure, holds a graph of its own, or its
    attributes cannot be compared.
    """
    if node.captured or node.op == "random" or node.attrs.get("training"):
        return None
    pure, of = _native(graph.kind)
    return of(node) if pure(node, graph) else None


@cache
def _native(kind: str) -> tuple[Callable[[Node, Graph], bool], Callable[[Node], Hashable | None]]:
    """What a front end knows about its own nodes: purity and signature."""
    if kind == "onnx":
        from .onnx import purity as of_onnx

        return of_onnx.is_pure, of_onnx.signature
    if kind == "fx":
        from .fx import purity as of_fx

        return of_fx.is_pure, of_fx.signature
    return lambda node, graph: False, lambda node: None
