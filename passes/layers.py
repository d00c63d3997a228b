"""Error per layer: how far the inner values of an approximated graph are from those of the graph before."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..graph.execute import run_graph
from ..graph.ir import Graph, Node

LAYERS = frozenset("conv linear matmul einsum sdpa lstm gru rnn".split())
"""Ops that a reader calls a layer; the others carry their errors on."""

TAP_BYTES = 256 << 20
"""Values are tapped in lots of about this many bytes."""


def layer_errors(before: Graph, after: Graph, arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """SQNR in decibel of every layer's output, in graph order.

    Args:
        before, after: the graphs; layers are matched by the name of their output, and those whose output has another
            shape (cut by pruning) or no counterpart are left out.
        arrays: one call's inputs, as ``run_graph`` takes them.

    Returns:
        ``{name, layer, op, sqnr_db}`` each: name of the node, module path, op; SQNR None where the outputs are equal,
        NaN where they are not finite.
    """
    found = []
    for lot in _lots(before, after):
        names = [node.output.name for node in lot]
        _, one = run_graph(before, arrays, names)
        _, two = run_graph(after, arrays, names)
        for node, name in zip(lot, names, strict=True):
            if one[name].shape != two[name].shape or not np.any(one[name]):
                continue  # an output of zeros has no signal to compare with
            sqnr = _sqnr(one[name], two[name])
            found.append({"name": node.name, "layer": node.scope or node.name, "op": node.op, "sqnr_db": sqnr})
    return found


def _lots(before: Graph, after: Graph) -> Iterator[list[Node]]:
    lot: list[Node] = []
    size = 0
    for node in before.nodes:
        value = node.outputs[0] if node.outputs else None
        twin = None if value is None else after.values.get(value.name)
        if node.op not in LAYERS or value is None or twin is None or twin.is_const or value.hint != twin.hint:
            continue
        need = 8 * math.prod(value.hint) if value.hint is not None else 1 << 20
        if lot and size + need > TAP_BYTES:
            yield lot
            lot, size = [], 0
        lot.append(node)
        size += need
    if lot:
        yield lot


def _sqnr(a: np.ndarray, b: np.ndarray) -> float | None:
    x, y = a.astype(np.float64), b.astype(np.float64)
    signal, noise = float((x * x).sum()), float(((x - y) ** 2).sum())
    return None if noise == 0 else 10 * math.log10(signal / noise)
