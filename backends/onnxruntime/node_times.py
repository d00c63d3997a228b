"""Time per node of a graph in ONNX Runtime: its profiler's kernels, traced back to the nodes they came from."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...graph.errors import BackendError
from ...graph.ir import Graph, Node
from ...graph.ops.macs import macs
from .session import open_session, refused

SUFFIX = "_kernel_time"
PRODUCTS = frozenset("Conv ConvTranspose Gemm MatMul Einsum LSTM GRU RNN Attention".split())


def node_times(
    graph: Graph,
    model: ir.Model | Path,
    lowered: ir.Model,
    feeds: Mapping[str, np.ndarray],
    providers: list[str],
    *,
    threads: int | None,
    runs: int,
) -> dict[str, float]:
    """Milliseconds per call of each node of ``graph``, the lower quartile over the runs (interruptions only add time).

    All time goes to products (convolutions, matrix products, recurrent layers): that of other kernels to the product
    whose result they work on, that of kernels which no node asked for (layout changes) to the one before. ``""`` holds
    what ran before the first product. Nodes that took no time are absent.

    Args:
        graph: what was lowered.
        model: what the session opens.
        lowered: the ONNX model, for its names.
        feeds: one call's inputs by name.
    """
    kernels = kernel_times(model, feeds, providers, threads=threads, runs=runs)
    return _attributed(kernels, graph, lowered)


def kernel_times(
    model: ir.Model | Path,
    feeds: Mapping[str, np.ndarray],
    providers: list[str],
    *,
    threads: int | None,
    runs: int,
    provider_options: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[tuple[str, str, float]]:
    """(kernel name, op type, milliseconds per call) in the order of execution, from ONNX Runtime's own profiler.

    The lower quartile over the runs; the profiler adds some microseconds per kernel.

    Raises:
        BackendError: nothing was profiled, or the runtime refuses the model or the inputs.
    """
    with tempfile.TemporaryDirectory(prefix="foldline-") as folder:
        session = open_session(
            model, providers, threads=threads, profile=Path(folder) / "profile", provider_options=provider_options
        )
        try:
            for _ in range(runs + 1):
                session.run(None, dict(feeds))
        except Exception as exc:  # onnxruntime raises classes of its own that share only this base
            raise refused(exc) from exc
        events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [e for e in events if e.get("cat") == "Node" and str(e["name"]).endswith(SUFFIX)]
    if not kernels:
        raise BackendError("ONNX Runtime profiled no kernel", found=", ".join(providers))
    return _quartiles(kernels, runs)


def _quartiles(kernels: list[dict[str, Any]], runs: int) -> list[tuple[str, str, float]]:
    """(kernel name, op type, milliseconds) in the order of execution; the first run warms up and is left out."""
    times: dict[tuple[str, str], list[float]] = {}
    for e in kernels:
        key = str(e["name"]).removesuffix(SUFFIX), str(e["args"].get("op_name", ""))
        times.setdefault(key, []).append(float(e["dur"]) / 1e3)
    found = []
    for (name, op), spent in times.items():
        per_run = max(len(spent) // (runs + 1), 1)  # a loop body runs several times in one call
        found.append((name, op, per_run * float(np.percentile(spent[per_run:] or spent, 25))))
    return found


def _attributed(kernels: list[tuple[str, str, float]], graph: Graph, lowered: ir.Model) -> dict[str, float]:
    """Kernel times summed per node of ``graph``; a kernel of unknown origin counts for the node of the one before."""
    sites = _sites(graph, lowered)
    total: dict[str, float] = {}
    last = ""
    for name, _, ms in kernels:
        last = sites.get(_known(name, sites), last)
        total[last] = total.get(last, 0.0) + ms
    return total


def _sites(graph: Graph, lowered: ir.Model) -> dict[str, str]:
    """Node and value names of the lowered model -> name of the graph's node they belong to.

    Products (convolutions, matrix products, recurrent layers) are found by name, or in order where the exporter
    renamed them; everything else belongs to the last product before it.
    """
    nodes = [n for n in lowered.graph if n.op_type in PRODUCTS]
    known = {id(n): site for n, site in zip(nodes, _products(graph, nodes), strict=True)}
    of_value: dict[str, tuple[int, str]] = {}
    found: dict[str, str] = {}
    for at, node in enumerate(lowered.graph):
        before = [of_value[v.name] for v in node.inputs if v is not None and v.name in of_value]
        site = (at, known[id(node)]) if id(node) in known else max(before, default=(-1, ""))
        for v in node.outputs:
            if v.name:
                of_value[v.name] = site
                found[v.name] = site[1]
        if node.name:
            found.setdefault(node.name, site[1])
    return found


def _products(graph: Graph, nodes: list[ir.Node]) -> list[str]:
    """For each product of the lowered model the graph's node.

    Raises:
        BackendError: they do not correspond.
    """
    mine = {v.name: n.name for n in graph.nodes if macs(n) for v in n.outputs}
    named = [next((mine[v.name] for v in n.outputs if v.name in mine), None) for n in nodes]
    if None not in named:
        return [name for name in named if name is not None]
    expected = [n.name for n in graph.nodes if macs(n) for _ in range(_parts(n))]
    if len(expected) != len(nodes):
        raise BackendError(
            "the products of the lowered model cannot be told apart",
            node=graph.name,
            expected=f"{len(expected)} products",
            found=f"{len(nodes)}: {', '.join(sorted({n.op_type for n in nodes}))}",
            hint="export the model to ONNX yourself and prune the ONNX file, whose nodes keep their names",
        )
    return expected


def _parts(node: Node) -> int:
    """How many products the exporter makes of one node."""
    if node.op == "sdpa":
        return 2
    return int(node.attrs.get("layers", 1)) if node.op in ("lstm", "gru", "rnn") else 1


def _known(kernel: str, sites: Mapping[str, str]) -> str:
    """The longest known name that a kernel's name starts with: fusions and layouts append to it."""
    name = kernel.removeprefix("fused ")
    while name and name not in sites:
        name = re.sub(r"([^A-Za-z0-9]+|[A-Za-z0-9]+)$", "", name)
    return name
