"""How important each residual block is: block influence, change of the output, magnitude, random, or a user's rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...graph.errors import ConfigError
from ...graph.execute import run_graph
from ...graph.groups import AxisGroups, axis_groups
from ...graph.ir import Graph, Value
from ...graph.space import atoms, norm
from ..base import Context
from .blocks import Block, drop
from .levels import Outputs, few_inputs

TAPPED = 1 << 28
"""Elements of tapped values that one run holds at most."""


@dataclass
class Ranking:
    """Scores of the blocks that may go, and the blocks by ascending score (ties: graph order)."""

    name: str
    scores: dict[Block, float]

    @property
    def order(self) -> list[Block]:
        return sorted(self.scores, key=self.scores.__getitem__)


def rank(
    graph: Graph,
    blocks: list[Block],
    criterion: str | Callable[..., Any],
    batches: Iterable[Any] | None,
    samples: int,
    ctx: Context,
) -> Ranking:
    """Score every block.

    Raises:
        ConfigError: a user's criterion that gives no finite number.
    """
    if callable(criterion):
        scores = {b: _number(b, criterion(b, graph)) for b in blocks}
        return Ranking(getattr(criterion, "__name__", "criterion"), scores)
    if criterion == "random":
        draws = np.random.default_rng(ctx.seed).random(len(blocks))
        return Ranking(criterion, {b: float(x) for b, x in zip(blocks, draws, strict=True)})
    if criterion == "magnitude":
        return Ranking(criterion, {b: _magnitude(b) for b in blocks})
    if criterion == "influence":
        inputs = list(few_inputs(graph, batches, samples, ctx.seed))
        return Ranking(criterion, _influence(graph, blocks, inputs, ctx))
    outputs = Outputs(graph, batches, samples, ctx.seed)
    found = {}
    for b in ctx.progress(blocks, "leaving out blocks"):
        clone = graph.clone()
        drop(clone, [(b.start.name, b.stop.name)])
        found[b] = outputs.distortion(clone)
    return Ranking(criterion, found)


def _number(b: Block, score: Any) -> float:
    try:
        value = float(score)
    except (TypeError, ValueError):
        value = float("nan")
    if not np.isfinite(value):
        raise ConfigError("the criterion must return one finite number per block", node=b.name, found=repr(score)[:80])
    return value


def _magnitude(b: Block) -> float:
    """Mean absolute value of the branch's matrices."""
    total = count = 0.0
    for w in b.weights:
        if len(w.shape) > 1 and w.dtype.startswith(("float", "bfloat")):
            total += float(np.abs(w.numpy().astype(np.float32)).sum(dtype=np.float64))
            count += w.size
    return total / max(count, 1.0)


def _influence(
    graph: Graph, blocks: list[Block], inputs: list[dict[str, np.ndarray]], ctx: Context
) -> dict[Block, float]:
    """One minus the mean cosine, along the channel axis, of what goes into a block and what comes out."""
    groups = axis_groups(graph)
    total, count = dict.fromkeys(blocks, 0.0), dict.fromkeys(blocks, 0)
    for batch in ctx.progress(inputs, "measuring block influence"):
        for lot in _lots(blocks):
            names = {v.name for b in lot for v in (b.start, b.stop)}
            taps = sorted(n for n in names if n not in batch)
            _, found = run_graph(graph, batch, taps)
            found = {**batch, **found}
            for b in lot:
                cosines = _cosines(found[b.start.name], found[b.stop.name], _channel_axis(groups, b.start))
                total[b] += float(cosines.sum())
                count[b] += cosines.size
    return {b: 1 - total[b] / max(count[b], 1) for b in blocks}


def _lots(blocks: list[Block]) -> list[list[Block]]:
    lots: list[list[Block]] = []
    room = 0
    for b in blocks:
        need = 2 * int(np.prod(b.start.hint or (1,), dtype=np.int64))
        if not lots or need > room:
            lots.append([])
            room = TAPPED
        lots[-1].append(b)
        room -= need
    return lots


def _channel_axis(groups: AxisGroups, v: Value) -> int:
    """The axis whose indices weights produce; the last where none is found."""
    for axis, e in enumerate(groups.analysis.of(v)):
        members = [m for a in atoms(norm(e)) if (g := groups.by_atom(a)) is not None for m in g.members]
        if axis and any(m.role in ("produces", "both", "consumes") for m in members):
            return axis
    return len(groups.analysis.of(v)) - 1


def _cosines(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    lengths = np.sqrt((a * a).sum(axis) * (b * b).sum(axis))
    return np.asarray((a * b).sum(axis) / np.maximum(lengths, 1e-30))
