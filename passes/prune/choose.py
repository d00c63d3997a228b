"""The choice of one Prune: from scores to the indices every group keeps, by ratio or by target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...graph.groups import AxisGroup, AxisGroups
from ...graph.preview import preview_cost
from ..base import Context, Decision
from ..targets import Target
from .candidates import equal_classes, overridden
from .costs import CostTable, Estimate, counts_of
from .evidence import Evidence
from .importance import Scores
from .latency import settle_latency
from .levels import Layerwise, Outputs, Trials, additivity, measure_levels
from .reach import TOLERANCE, Reached, reach
from .select import Kept, equalized, fixed, isomorphic, ranked, uniform
from .widths import Widths

if TYPE_CHECKING:
    from .prune_pass import Prune

ROUNDS = 3
"""Times that the layer-adaptive choice takes its costs anew around what it chose last."""


@dataclass
class Chooser:
    """What one run chooses from.

    Attributes:
        prune: the options.
        groups: of the graph.
        scores: of the groups that may be cut.
        decisions, details: receive what the report should say.
        unjudged: how many groups might be cut but have no scores.
    """

    prune: Prune
    groups: AxisGroups
    scores: Scores
    evidence: Evidence
    ctx: Context
    decisions: list[Decision]
    details: dict[str, Any]
    unjudged: int = 0
    ratios: dict[AxisGroup, float] = field(default_factory=dict)
    classes: list[list[AxisGroup]] = field(default_factory=list)

    def __post_init__(self) -> None:
        prune = self.prune
        self.widths = Widths(self.scores, prune.block, prune.min_keep)
        self.ratios = overridden(self.scores, prune.overrides, self.groups)
        self.free = {g: s for g, s in self.scores.items() if g not in self.ratios}
        self.classes = equal_classes(self.groups, list(self.free), prune.equal)
        self.layerwise: Layerwise | None = None
        self.outputs: Outputs | None = None
        self.trial = Trials(self.groups, prune.repair)
        self.stage = 1

    def choose(self) -> Kept:
        """The indices that every judged group keeps."""
        target = self.prune.target
        if self.prune.scope == "layerwise":
            self._measure(target)
        if target is None:
            assert self.prune.ratio is not None
            while self.layerwise is not None and self.stage < self.prune.stages:
                self._look_around(self.pick(self.prune.ratio * self.stage / self.prune.stages))
            kept = self.pick(self.prune.ratio)
        elif target.metric == "latency":
            kept = settle_latency(self, target)
        else:
            kept = self._reach(target)
        if self.layerwise is not None:
            self._report_distortion(kept)
        return kept

    def pick(self, ratio: float) -> Kept:
        """The selection at one ratio, overrides and equal widths included."""
        prune = self.prune
        if not self.free:
            kept: Kept = {}
        elif self.layerwise is not None:
            kept = self.layerwise.choose(ratio)
        elif prune.scope == "uniform":
            kept = uniform(self.free, ratio, self.widths)
        else:
            by = ranked if prune.scope == "global" else isomorphic
            kept = by(self.free, ratio, self.widths, prune.normalizer)
        kept = equalized(kept, self.classes, self.free, self.widths)
        settled = fixed(self.scores, self.ratios, self.widths)
        return {g: settled[g] if g in settled else kept[g] for g in self.scores}

    def why_whole(self, g: AxisGroup) -> str:
        """Why a group that might have been cut lost nothing."""
        if self.ratios.get(g) == 0:
            return "an override keeps it whole"
        if self.widths.step(g) >= g.size:
            return f"not longer than a block of {self.prune.block}"
        if g.size <= self.prune.min_keep:
            return f"min_keep={self.prune.min_keep} keeps it whole"
        return "its share rounds to the whole group" if self.prune.block > 1 else "all indices rank above the cut"

    # ---- targets that are counted --------------------------------------------------------------------------------
    def _reach(self, target: Target) -> Kept:
        table = CostTable(self.groups, self.scores, target)
        wanted = target.amount(table.original)
        found = self.reach_with(table, wanted, target)
        cost = target.of(preview_cost(self.groups, found.kept))
        self.details.update(ratio=found.ratio, target=str(target), reached=cost / table.original)
        if abs(cost - wanted) > TOLERANCE * wanted:
            self.decisions.append(coarse(target, wanted, cost, found, self.widths))
        return found.kept

    def reach_with(self, estimate: Estimate, wanted: float, target: Target) -> Reached:
        """The selection that an estimate puts closest to ``wanted``."""

        def once(amount: float) -> Reached:
            return reach(self.pick, estimate, amount, target, self.scores, self.classes, self.unjudged)

        if self.layerwise is None:
            return once(wanted)
        whole, stages = estimate({}), self.prune.stages
        while self.stage < stages:
            self._look_around(once(whole * (wanted / whole) ** (self.stage / stages)).kept)
        found = []
        for _ in range(ROUNDS):
            found.append(once(wanted))
            self.layerwise.settle(counts_of(found[-1].kept))
        met = [r for r in found if abs(r.cost - wanted) <= TOLERANCE * wanted]
        return min(met or found, key=lambda r: self._distortion(r.kept))

    # ---- layer-adaptive ------------------------------------------------------------------------------------------
    def _measure(self, target: Target | None) -> None:
        evidence = self.evidence
        given = evidence.batches is not None or evidence.data is not None
        self.outputs = Outputs(
            self.groups.graph, evidence.inputs() if given else None, self.prune.samples, self.ctx.seed
        )
        ladder = measure_levels(self.trial, self.free, self.widths, self.outputs, self.classes, None, self.ctx.progress)
        estimate: Estimate | None = None
        if target is not None:
            counted = target if target.metric != "latency" else Target(metric="macs", value=target.value)
            table = CostTable(self.groups, self.scores, counted)
            whole = counts_of(fixed(self.scores, self.ratios, self.widths))

            def with_overrides(counts: Mapping[AxisGroup, int]) -> float:
                return table({**whole, **counts})

            estimate = with_overrides

        self.layerwise = Layerwise(ladder, self.free, estimate, self.prune.solver)
        if target is not None:
            self.layerwise.settle(counts_of(uniform(self.free, 0.5, self.widths)))

    def _look_around(self, kept: Kept) -> None:
        """Measure the levels anew around a milder selection: far from the whole network distortions do not add up."""
        assert self.layerwise is not None and self.outputs is not None
        self.layerwise.ladder = measure_levels(
            self.trial, self.free, self.widths, self.outputs, self.classes, kept, self.ctx.progress
        )
        self.layerwise.settle(counts_of({g: k for g, k in kept.items() if g in self.free}))
        self.stage += 1

    def _distortion(self, kept: Kept) -> float:
        """Of all cuts together."""
        assert self.outputs is not None
        cut = {g: k for g, k in kept.items() if len(k) < g.size}
        return self.outputs.distortion(self.trial(cut)) if cut else 0.0

    def _report_distortion(self, kept: Kept) -> None:
        assert self.layerwise is not None and self.outputs is not None
        cut = {g: k for g, k in kept.items() if len(k) < g.size and g in self.free}
        facts: dict[str, Any] = {
            "samples": self.outputs.samples,
            "made_up_inputs": all(d is None for d in (self.prune.calibration, self.prune.data, self.ctx.calibration)),
            "levels": sum(len(c) for c in self.layerwise.ladder.counts),
            "summed": self.layerwise.summed(counts_of(cut)),
            "joint": self._distortion(kept),
            "stages": self.stage,
            "repaired": self.prune.repair,
            **additivity(self.trial, self.layerwise, self.outputs, self.ctx.seed),
        }
        self.details["distortion"] = facts


def coarse(target: Target, wanted: float, cost: float, found: Reached, widths: Widths) -> Decision:
    """Says that a target is missed by more than the tolerance, and by how much."""
    off = cost / wanted - 1
    why = (
        f"{cost:,.0f} {target.metric} remain, {abs(off):.1%} {'above' if off > 0 else 'below'} what was asked: "
        f"no selection in whole {'blocks of ' + str(widths.round_to) if widths.round_to > 1 else 'indices'} "
        "was found nearer"
    )
    return Decision(str(target), "missed", why, {"wanted": wanted, "reached": cost, "ratio": found.ratio})
