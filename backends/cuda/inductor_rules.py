"""What Inductor's int8 patterns on x86 would not take, decided on the graph alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...graph.ir import Graph, Node, Value
from ..base import Diagnostic


def check_graph(graph: Graph) -> list[Diagnostic]:
    """Diagnostics for every convolution and linear layer with a quantized operand; nothing for float ones."""
    return [found for node in graph.nodes if node.op in ("conv", "linear") for found in _product(node)]


def _product(node: Node) -> Iterator[Diagnostic]:
    x, w = (_dequantizer(node.input(i)) for i in (0, 1))
    if w is None:
        return
    stored = w.input(0)
    if stored is not None and stored.dtype != "int8":
        yield _say(
            node, "weight-type", f"its weight is stored as {stored.dtype}; oneDNN takes int8", "use int8 weights"
        )
    zero = w.input(2)
    points = None if zero is None else zero.const()
    if points is not None and np.asarray(points).any():
        yield _say(node, "weight-zero-point", "its weight has zero points; oneDNN takes symmetric weights", "")
    if w.attrs.get("block"):
        yield _say(node, "weight-blocks", "its weight has scales per block: it is dequantized first", "")
    if x is None:
        yield _say(node, "weight-only", "its input is float: the weight is dequantized before a float product", "")
        return
    q = x.input(0)
    if q is not None and q.dtype not in ("uint8", "int8"):
        yield _say(node, "activation-type", f"its input is {q.dtype}; oneDNN takes uint8", "use uint8 activations")
    elif q is not None and q.dtype == "int8" and node.op == "conv":
        yield _say(node, "activation-type", "its input is int8; oneDNN's convolution here takes uint8", "use uint8")
    scale = x.input(1)
    if scale is not None and not scale.is_const:
        yield _say(node, "dynamic-scale", "the scale of its input is computed at run time", "calibrate a fixed one")
    elif scale is not None and (scale.hint or ()) not in ((), (1,)):
        yield _say(node, "activation-scale", "its input has a scale per channel", "use one scale per tensor")


def _dequantizer(value: Value | None) -> Node | None:
    node = None if value is None else value.producer
    return node if node is not None and node.op == "dequantize" else None


def _say(node: Node, rule: str, message: str, fix: str) -> Diagnostic:
    return Diagnostic(rule, "warning", node.name, message, fix)
