"""A table of milliseconds per layer and width, measured on a backend, for a latency budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ....graph.ir import Graph
from ...base import BackendLike


def latency_table(
    graph: Graph, backend: BackendLike, quantize: Any, widths: Sequence[int], example_inputs: Any = None, runs: int = 20
) -> dict[str, dict[int, float]]:
    """{node: {bits: ms}}: the graph quantized to each width everywhere, and each node timed on the backend.

    Args:
        graph: float.
        backend: with ``node_times``.
        quantize: (graph, bits) -> quantized graph in which layers keep their names, e.g. through a pipeline of
            ``P.Quantize(weight_bits=bits, ...)``.
        runs: of which the backend reports the median.
    """
    found: dict[str, dict[int, float]] = {}
    names = {n.name for n in graph.nodes if n.op in ("conv", "linear", "matmul")}
    for bits in widths:
        times = backend.node_times(quantize(graph, bits), example_inputs, runs=runs)
        for name in names & set(times):
            found.setdefault(name, {})[bits] = times[name]
    return found
