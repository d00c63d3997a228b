"""Which nodes are nothing but functions of their operands, and when two of them compute the same."""

from __future__ import annotations

from collections.abc import Hashable

from .ir import Graph, Node


def is_pure(graph: Graph, node: Node) -> bool:
    """Whether a node draws no random numbers, writes nothing, learns nothing and holds nothing that does.

    Operators of other domains and calls of functions may do any of that, so they are not pure; nor is a layer in
    training mode. A pure node that nobody reads can go, and of two pure nodes with one signature one can go.
    """
    if node.op == "random" or node.attrs.get("training"):
        return False
    if graph.kind == "onnx":
        from .onnx.purity import is_pure as pure_native

        return pure_native(node, graph)
    if graph.kind == "fx":
        from .fx.purity import is_pure as pure_call

        return pure_call(node)
    return False


def signature(graph: Graph, node: Node) -> Hashable | None:
    """Equal for two pure nodes of one graph exactly where operator, domain, attributes and all operands are equal.

    Operands are equal if they are the same value. None where the node is not pure, holds a graph of its own, or its
    attributes cannot be compared.
    """
    if node.captured or not is_pure(graph, node):
        return None
    if graph.kind == "onnx":
        from .onnx.purity import signature as of_native

        return of_native(node)
    from .fx.purity import signature as of_call

    return of_call(node)
