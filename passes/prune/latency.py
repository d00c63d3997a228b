"""Latency targets: a table of measured times per node predicts any selection, measurements confirm the one chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...graph.errors import ConstraintError
from ...graph.groups import AxisGroup, AxisGroups
from ...graph.ir import Graph, Node
from ...graph.ops.macs import macs
from ..base import Decision
from ..targets import Target
from .costs import Part, Shapes, counts_of
from .reach import Reached, unreachable
from .select import Kept, cut_clone

if TYPE_CHECKING:
    from .choose import Chooser

GRID = (0.0, 0.25, 0.5, 0.75)
"""Ratios at which the nodes are timed."""
ROUNDS = 6
"""Times that a selection is measured and the prediction corrected."""
NEAR = 0.05
"""Relative distance from a latency target within which it counts as met."""
AIM = 0.03
"""Within this the search stops: timing again must not cross the line."""
NOISY = 0.2
"""Interquartile range of the pairwise ratios above which the machine is too busy for medians."""
SPELL_MS = 3000.0
"""About how long one comparison is timed."""


class LatencyTable:
    """Milliseconds per node at a few widths, interpolated over the node's multiply-accumulates.

    A node is taken to cost the more the more it computes: measured times are made monotone. Outside the widths
    measured the nearest two points are prolonged.

    Args:
        groups, chosen: of the unpruned graph.
        points: per selection how many indices its groups keep, and milliseconds per node name.
    """

    def __init__(
        self,
        groups: AxisGroups,
        chosen: Iterable[AxisGroup],
        points: Sequence[tuple[Mapping[AxisGroup, int], Mapping[str, float]]],
    ) -> None:
        shapes = Shapes(groups, chosen)
        self.entries = 0
        self.fixed = float(np.mean([times.get("", 0.0) for _, times in points]))
        self.parts: list[Part] = []
        for node in groups.graph.nodes:
            if any(node.name in times for _, times in points):
                touched = shapes.groups_of([*node.inputs, *node.outputs])
                part = _interpolated(shapes, node, points)
                self.parts.append(Part(touched, part))
                self.entries += len(part.work)

    def __call__(self, counts: Mapping[AxisGroup, int]) -> float:
        """Predicted milliseconds of one call."""
        return self.fixed + sum(part(counts) for part in self.parts)


@dataclass
class _Interpolated:
    """Time of one node over its work, both ascending."""

    shapes: Shapes
    node: Node
    work: list[float]
    times: list[float]

    def __call__(self, counts: dict[AxisGroup, int]) -> float:
        x = float(macs(self.shapes.node(self.node, counts)) or 0)
        if len(self.work) == 1:
            return self.times[0]
        if x < self.work[0]:
            (x0, x1), (y0, y1) = self.work[:2], self.times[:2]
            return max(y0 - (x0 - x) * (y1 - y0) / (x1 - x0), 0.0)
        return float(np.interp(x, self.work, self.times))


def _interpolated(
    shapes: Shapes, node: Node, points: Sequence[tuple[Mapping[AxisGroup, int], Mapping[str, float]]]
) -> _Interpolated:
    at: dict[float, list[float]] = {}
    for counts, times in points:
        at.setdefault(float(macs(shapes.node(node, counts)) or 0), []).append(times.get(node.name, 0.0))
    work = sorted(at)
    rising = np.maximum.accumulate([float(np.median(at[x])) for x in work])
    return _Interpolated(shapes, node, work, rising.tolist())


@dataclass
class _Bench:
    """The backend, the unpruned model on it, and what was measured of the pruned ones."""

    chooser: Chooser
    backend: Any = None
    whole: Any = None
    before_ms: float = 0.0
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        prune, ctx = self.chooser.prune, self.chooser.ctx
        self.options = {key: value for key, value in prune.backend_options.items() if key != "path"}
        self.backend = ctx.backends(prune.backend)
        self.whole = self.lower(self.chooser.groups.graph)
        found = self.whole.benchmark(runs=15, warmup=3)
        noisy = found["spread_ms"] > NOISY * found["median_ms"]
        self.before_ms = float(found["min_ms" if noisy else "median_ms"])

    def lower(self, graph: Graph) -> Any:
        return self.backend.lower(graph, self.chooser.ctx.example_inputs, **self.options)

    def table(self) -> LatencyTable:
        """Time the nodes of the graph at the widths of the grid."""
        chooser, points = self.chooser, []
        seen: list[dict[AxisGroup, int]] = []
        for ratio in chooser.ctx.progress(GRID, "timing nodes"):
            counts = counts_of(chooser.pick(ratio)) if ratio else {}
            if counts in seen:
                continue
            seen.append(counts)
            graph = cut_clone(chooser.groups, chooser.pick(ratio)) if ratio else chooser.groups.graph
            made = self.lower(graph) if ratio else self.whole
            times = self.backend.node_times(graph, chooser.ctx.example_inputs, artifact=made, **self.options)
            points.append((counts, times))
        return LatencyTable(chooser.groups, chooser.scores, points)

    def measure(self, kept: Kept, predicted: float) -> float:
        """Latency of a selection as a share of the unpruned model's, timed in turn; the rounds keep what was found.

        The median ratio of the pairs; on a busy machine, where that is noise, the ratio of the fastest calls.
        """
        artifact = self.lower(cut_clone(self.chooser.groups, kept))
        runs = int(np.clip(SPELL_MS / (2 * max(self.before_ms, 1e-3)), 11, 300))
        found = artifact.benchmark(runs=runs, warmup=5, against=self.whole)
        share, spread = float(found["ratio"]), float(found["ratio_spread"])
        after, before = float(found["median_ms"]), float(found["against"]["median_ms"])
        noisy = spread > NOISY
        if noisy:
            after, before = float(found["min_ms"]), float(found["against"]["min_ms"])
            share = after / before
        self.rounds.append(
            {
                "predicted_ms": predicted,
                "after_ms": after,
                "before_ms": before,
                "share": share,
                "pairs": float(found["ratio"]),
                "pairs_spread": spread,
                "noisy": noisy,
            }
        )
        return share


def settle_latency(chooser: Chooser, target: Target) -> Kept:
    """The selection whose measured latency comes closest to the target, within 5% where the widths allow it.

    Nodes are timed at a few ratios; the table predicts any selection; bisection over the ratio finds the one predicted
    to meet the target; it is timed against the unpruned model in turn, the prediction is scaled by what was found,
    and so on until the measured share is within 5% of what was asked.

    Raises:
        ConstraintError: the smallest selection is measured to be slower than the target.
        BackendError: the backend cannot lower the model or tells no times per node.
    """
    bench = _Bench(chooser)
    table = bench.table()
    unit = bench.before_ms / max(table({}), 1e-9)
    wanted = target.amount(bench.before_ms)
    share = wanted / bench.before_ms
    correction = 1.0
    best: tuple[float, Reached] | None = None
    tried: list[dict[AxisGroup, int]] = []
    for _ in chooser.ctx.progress(range(ROUNDS), "confirming latency"):

        def predict(counts: Mapping[AxisGroup, int], factor: float = unit * correction) -> float:
            return table(counts) * factor

        try:
            found = chooser.reach_with(predict, wanted, target)
        except ConstraintError:
            kept = chooser.pick(1.0)
            found = Reached(kept, 1.0, predict(counts_of(kept)))
        counts = counts_of(found.kept)
        if counts in tried:
            break
        tried.append(counts)
        measured = bench.measure(found.kept, found.cost)
        if best is None or abs(measured - share) < abs(best[0] - share):
            best = measured, found
        if abs(measured - share) <= AIM * share:
            break
        correction *= measured * bench.before_ms / max(found.cost, 1e-9)
    assert best is not None
    measured, found = best
    if measured > share * (1 + NEAR) and counts_of(chooser.pick(1.0)) in tried:
        raise unreachable(target, wanted, measured * bench.before_ms, chooser.unjudged)
    _report(chooser, bench, table, target, share, measured, found)
    return found.kept


def _report(
    chooser: Chooser, bench: _Bench, table: LatencyTable, target: Target, share: float, measured: float, found: Reached
) -> None:
    final = next(r for r in bench.rounds if r["share"] == measured)
    chooser.details.update(
        ratio=found.ratio,
        target=str(target),
        reached=measured,
        latency={"before_ms": final["before_ms"], "after_ms": final["after_ms"]},
        latency_target={
            "backend": chooser.prune.backend,
            "wanted_share": share,
            "measured_share": measured,
            "first_prediction": bench.rounds[0]["predicted_ms"] / bench.before_ms,
            "table": {"nodes": len(table.parts), "entries": table.entries},
            "rounds": bench.rounds,
        },
    )
    if final["noisy"]:
        why = f"the pairwise ratios vary by {final['pairs_spread']:.2f}: the fastest calls were compared instead"
        chooser.decisions.append(Decision(str(target), "warned", why, {"spread": final["pairs_spread"]}))
    if abs(measured - share) > NEAR * share:
        why = (
            f"measured at {measured:.3f} of the unpruned latency "
            f"(pairs vary by {final['pairs_spread']:.3f}), "
            f"{abs(measured / share - 1):.1%} {'above' if measured > share else 'below'} what was asked"
        )
        chooser.decisions.append(Decision(str(target), "missed", why, {"wanted": share, "reached": measured}))
