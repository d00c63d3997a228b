"""Runs a graph over batches and streams the tensors of chosen values into statistics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from ...graph.errors import ConstraintError
from ...graph.execute import batches_of, run_graph
from ...graph.ir import Graph
from ..base import Progress, no_progress
from .statistics import Statistic

S = TypeVar("S", bound=Statistic)


def _lots(graph: Graph, names: Iterable[str], memory: int) -> list[list[str]]:
    lots: list[list[str]] = []
    room = 0
    for name in names:
        hint = graph.values[name].hint
        need = 8 * math.prod(hint) if hint is not None else memory
        if not lots or need > room:
            lots.append([])
            room = memory
        lots[-1].append(name)
        room -= need
    return lots


def collect(
    graph: Graph,
    batches: Iterable[Any],
    wanted: Mapping[str, S],
    *,
    memory: int = 1 << 30,
    progress: Progress = no_progress,
) -> int:
    """Run the graph over the batches once and feed the tensor of each wanted value to its statistic.

    Args:
        graph: what to run.
        batches: each in a form that ``Graph.bind`` takes; may be a generator, is read once, one batch at a time.
        wanted: value name -> statistic, updated in place. Graph inputs may be wanted too.
        memory: bound in bytes on the tensors tapped at a time (estimated from the hint shapes); when the wanted
            values need more, each batch is run several times.
        progress: wraps the loop over batches.

    Returns:
        The number of batches seen.

    Raises:
        ConstraintError: there was no batch, or a value that is not finite came up (it names the value).
    """
    fed = [name for name in wanted if graph.values[name].is_input]
    lots = _lots(graph, [name for name in wanted if not graph.values[name].is_input], memory)
    seen = 0
    for arrays in batches_of(graph, progress(batches, "calibrating")):
        seen += 1
        for name in fed:
            _update(wanted[name], name, np.asarray(arrays[name]))
        for lot in lots:
            _, tapped = run_graph(graph, arrays, lot)
            for name in lot:
                _update(wanted[name], name, tapped.pop(name))
    if seen == 0:
        raise ConstraintError(
            "the calibration data is empty", expected="at least one batch", found="none", hint="pass a list of batches"
        )
    return seen


def _update(statistic: Statistic, name: str, x: np.ndarray) -> None:
    try:
        statistic.update(x)
    except ConstraintError as exc:
        raise ConstraintError(exc.message, value=name, expected=exc.expected, found=exc.found, hint=exc.hint) from exc
