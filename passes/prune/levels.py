"""Layer-adaptive allocation: the distortion of the output at every level of every layer, measured one at a time.

"Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks": distortions of single layers
add up to the distortion of all together closely enough that a knapsack over them finds how much each layer can lose.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...graph.actions import mask
from ...graph.errors import ConstraintError
from ...graph.execute import batches_of, run_graph, synthesize_inputs
from ...graph.groups import AxisGroup, AxisGroups
from ...graph.ir import Graph
from ..allocate import Level, Method, allocate
from ..base import Progress, Reference, no_progress
from .costs import Estimate
from .importance import Scores
from .select import Kept, cut_clone, cut_with_plan, keep_best
from .widths import Widths

RUNGS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
"""Shares of a group that the measured levels remove."""
NEARBY = 2
"""Steps from a reference level within which levels are measured anew."""
PROBES = 6
"""Random joint selections that tell how well single distortions add up."""


class Outputs:
    """The outputs of a graph on a few inputs, to measure how far those of a changed graph are.

    Args:
        graph: the graph as it is.
        batches: one call's inputs each; made up (``synthesize_inputs``) where there are none.
        samples: batches are read until they hold that many samples.
    """

    def __init__(self, graph: Graph, batches: Iterable[Any] | None, samples: int = 64, seed: int = 0) -> None:
        self.inputs = list(few_inputs(graph, batches, samples, seed))
        self.samples = sum(_length(b) for b in self.inputs)
        self.outputs = [run_graph(graph, b)[0] for b in self.inputs]
        squares = np.sum([[_square(y) for y in batch] for batch in self.outputs], axis=0)
        self.scale = np.maximum(squares, 1e-30)

    def distortion(self, graph: Graph) -> float:
        """Squared error of the outputs over their squared norm, summed over the graph's outputs."""
        total = np.zeros(len(self.scale))
        for inputs, expected in zip(self.inputs, self.outputs, strict=True):
            found = run_graph(graph, inputs)[0]
            total += [
                _square(np.asarray(a, dtype=np.float64) - b) if _floating(b) else 0.0
                for a, b in zip(found, expected, strict=True)
            ]
        error = float((total / self.scale).sum())
        if not np.isfinite(error):
            raise ConstraintError("an output is not finite once an axis is cut", node=graph.name, found=error)
        return error


def few_inputs(graph: Graph, batches: Iterable[Any] | None, samples: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches until they hold that many samples, as ``run_graph`` takes them; made-up ones where there are none.

    Raises:
        ConstraintError: there are batches, but not one.
    """
    if batches is None:
        one = synthesize_inputs(graph, seed)
        for i in range(max(-(-samples // _length(one)), 1)):
            yield one if i == 0 else synthesize_inputs(graph, seed + i)
        return
    seen = 0
    for batch in batches_of(graph, batches):
        yield batch
        seen += _length(batch)
        if seen >= samples:
            return
    if not seen:
        raise ConstraintError("the calibration data is empty", expected="at least one batch", hint="pass a list")


def _length(batch: Mapping[str, np.ndarray]) -> int:
    first = next(iter(batch.values()))
    return int(first.shape[0]) if first.ndim else 1


def _floating(y: np.ndarray) -> bool:
    return y.dtype.kind == "f" or y.dtype.name in ("bfloat16", "float16")


def _square(y: np.ndarray) -> float:
    flat = np.asarray(y, dtype=np.float64).ravel() if _floating(y) else np.zeros(0)
    return float(flat @ flat)


# ---- levels of axis groups -----------------------------------------------------------------------------------------
@dataclass
class Ladder:
    """What was measured.

    Attributes:
        units: groups that keep the same number of indices (most of them alone).
        counts: per unit the numbers of indices kept, descending; the first is the whole group.
        losses: per unit and level the distortion with only this unit moved to it from the reference, less that of the
            reference (the whole network at first); inf where the level is too far from the reference to be measured.
    """

    units: list[list[AxisGroup]]
    counts: list[list[int]]
    losses: list[list[float]]


class Trials:
    """Graphs with a selection applied, to be measured.

    Attributes:
        repair: what is left is corrected as ``Recover(data="moments")`` does, so that a distortion is what remains
            after recovery: layers whose channels stand in for each other then give more. Else the graph is masked
            where that is the same thing as cutting, and cut where it is not.
    """

    def __init__(self, groups: AxisGroups, repair: bool = False) -> None:
        self.groups = groups
        self.repair = repair
        self._inputs: Mapping[str, Any] | None = None

    def __call__(self, kept: Kept) -> Graph:
        if not self.repair or not kept:
            return mask(self.groups, kept) if all(g.exact for g in kept) else cut_clone(self.groups, kept)
        from ..recover.absorb import absorb, input_moments
        from ..recover.recover_pass import MOMENTS_RIDGE

        if self._inputs is None:
            self._inputs = input_moments(self.groups.graph)
        clone, plan = cut_with_plan(self.groups, kept)
        absorb(clone, Reference(self.groups.graph, plan), MOMENTS_RIDGE, self._inputs)
        return clone


def measure_levels(
    trial: Trials,
    scores: Scores,
    widths: Widths,
    outputs: Outputs,
    classes: Sequence[list[AxisGroup]] = (),
    around: Kept | None = None,
    progress: Progress = no_progress,
) -> Ladder:
    """Distortion of the output for each unit and level, everything else whole, or as in the selection ``around``.

    Runs units x levels forward passes; around a selection only levels up to ``NEARBY`` steps from it. Within a level
    each group keeps its highest scores.
    """
    tied = {g for members in classes for g in members}
    units = [[g for g in c if g in scores] for c in classes] + [[g] for g in scores if g not in tied]
    units = [u for u in units if u]
    counts = [
        sorted({u[0].size, *(widths.together(u, u[0].size * (1 - r)) for r in RUNGS)}, reverse=True) for u in units
    ]
    fixed = {g: k for g, k in (around or {}).items() if len(k) < g.size}
    base = outputs.distortion(trial(fixed)) if fixed else 0.0
    losses: list[list[float]] = []
    for unit, sizes in progress(list(zip(units, counts, strict=True)), "measuring distortions"):
        now = len(fixed[unit[0]]) if unit[0] in fixed else unit[0].size
        here = min(range(len(sizes)), key=lambda i: abs(sizes[i] - now))
        found = []
        for i, n in enumerate(sizes):
            if n == now:
                found.append(0.0)
            elif around is not None and abs(i - here) > NEARBY:
                found.append(float("inf"))
            else:
                moved = {**fixed, **{g: keep_best(scores[g], n) for g in unit}}
                found.append(outputs.distortion(trial(_cut(moved))) - base)
        losses.append(found)
    return Ladder(units, counts, losses)


def _cut(kept: Kept) -> Kept:
    return {g: k for g, k in kept.items() if len(k) < g.size}


class Layerwise:
    """Selections of least summed distortion: a knapsack over the levels of a ladder.

    ``choose(t)`` spends the share 1 - t of the range between all levels at their cheapest and everything whole. Costs
    are those of one unit with the others as in a reference selection: axes share nodes, so costs do not quite add,
    and ``settle`` moves the reference to what was chosen last.
    """

    def __init__(self, ladder: Ladder, scores: Scores, estimate: Estimate | None, method: Method = "dp") -> None:
        self.ladder = ladder
        self.scores = scores
        self.estimate = estimate
        self.method = method
        self.reference: dict[AxisGroup, int] = {}
        self.first = ladder
        self.settle({})

    def settle(self, counts: Mapping[AxisGroup, int]) -> None:
        """Take costs around a selection; without a cost estimate an index costs 1."""
        self.reference = dict(counts)
        self.costs: list[list[float]] = []
        for unit, sizes in zip(self.ladder.units, self.ladder.counts, strict=True):
            if self.estimate is None:
                self.costs.append([float(n * len(unit)) for n in sizes])
            else:
                self.costs.append([self.estimate({**self.reference, **dict.fromkeys(unit, n)}) for n in sizes])

    def choose(self, t: float) -> Kept:
        """The selection of least summed distortion at a budget; indices by score."""
        known = [
            [(i, Level(c, x)) for i, (c, x) in enumerate(zip(costs, losses, strict=True)) if np.isfinite(x)]
            for costs, losses in zip(self.costs, self.ladder.losses, strict=True)
        ]
        items = {str(u): [level for _, level in levels] for u, levels in enumerate(known)}
        most = sum(max(x.single for x in levels) for levels in items.values())
        least = sum(min(x.single for x in levels) for levels in items.values())
        found = allocate(items, least + (1 - t) * (most - least), method=self.method)
        return self.at([levels[found.levels[str(u)]][0] for u, levels in enumerate(known)])

    def at(self, levels: Sequence[int]) -> Kept:
        """The selection with each unit at the given level."""
        kept: Kept = {}
        for unit, sizes, i in zip(self.ladder.units, self.ladder.counts, levels, strict=True):
            kept.update({g: keep_best(self.scores[g], sizes[i]) for g in unit})
        return {g: kept[g] for g in self.scores if g in kept}

    def summed(self, counts: Mapping[AxisGroup, int]) -> float:
        """Sum of the single distortions of a selection (of the whole network), linear between measured levels."""
        total = 0.0
        for unit, sizes, losses in zip(self.first.units, self.first.counts, self.first.losses, strict=True):
            n = counts.get(unit[0], unit[0].size)
            total += float(np.interp(n, sizes[::-1], losses[::-1]))
        return total


def additivity(trial: Trials, layerwise: Layerwise, outputs: Outputs, seed: int) -> dict[str, Any]:
    """Correlation of joint with summed distortion over random selections (logarithms; both span decades)."""
    rng = np.random.default_rng(seed)
    joint, summed = [], []
    for i in range(PROBES):
        levels = [int(rng.integers(0, max((i + 1) * len(c) // PROBES, 1))) for c in layerwise.ladder.counts]
        kept = {g: k for g, k in layerwise.at(levels).items() if len(k) < g.size}
        if kept:
            joint.append(outputs.distortion(trial(kept)))
            summed.append(layerwise.summed({g: len(k) for g, k in kept.items()}))
    if len(joint) < 3 or min(joint) <= 0 or min(summed) <= 0 or np.ptp(np.log(summed)) == 0:
        return {"probes": len(joint)}
    correlation = float(np.corrcoef(np.log(joint), np.log(summed))[0, 1])
    return {"correlation": correlation, "probes": len(joint)}
