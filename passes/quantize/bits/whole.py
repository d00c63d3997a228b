"""Allocations measured as a whole: the best of several candidates, and improved where layers' losses do not add up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ....graph.ir import Graph
from ...allocate import Level, allocate
from ...base import Progress
from ..placement import Placement, WeightSite
from ..spec import TensorFormat
from .losses import Losses, point_trials, summed, weight_trials

Costs = float | tuple[float, ...]


@dataclass
class Pick:
    """One combination: widths of a group's weights and of its activation."""

    weights: dict[str, int]
    points: dict[str, int] = field(default_factory=dict)


@dataclass
class Group:
    """What is chosen together: a weight by itself, or an activation with the weights that meet it."""

    name: str
    sites: list[WeightSite]
    forms: dict[str, dict[int, TensorFormat]]
    picks: list[Pick]
    costs: list[Costs] = field(default_factory=list)
    """Of each pick."""


Chosen = dict[str, int]
"""Group -> number of its pick."""


@dataclass
class Chooser:
    """Solves the integer program over groups under budgets, and measures solutions as a whole.

    Attributes:
        limits: one number per budget.
        forms, point_forms: format of each weight site and of each root at each width.
    """

    graph: Graph
    placement: Placement
    groups: list[Group]
    limits: list[float]
    sites: Sequence[WeightSite]
    forms: Mapping[str, Mapping[int, TensorFormat]]
    point_forms: Mapping[str, Mapping[int, TensorFormat]]
    batches: list[Any]
    metric: Literal["sqnr", "kl"]
    method: Literal["milp", "dp"]
    progress: Progress

    def solved(
        self, weights: Losses, points: Losses, allowed: Callable[[Group, Pick], bool] | None = None
    ) -> tuple[Chosen, Any]:
        """The exact solution under these losses among the allowed picks: picks, and the allocation.

        Raises:
            ConstraintError: no choice meets the budgets.
        """
        items, numbers = {}, {}
        for group in self.groups:
            mine = [i for i, p in enumerate(group.picks) if allowed is None or allowed(group, p)]
            items[group.name] = [Level(group.costs[i], _loss(group.picks[i], weights, points)) for i in mine]
            numbers[group.name] = mine
        total = self.limits if len(self.limits) > 1 else self.limits[0]
        found = allocate(items, total, method=self.method)
        return {name: numbers[name][level] for name, level in found.levels.items()}, found

    def uniform(self) -> dict[str, Chosen]:
        """Allocations of one width everywhere (or the nearest that a group has) within the budgets, the widest."""
        weights = sorted({b for widths in self.forms.values() for b in widths})
        acts: list[int | None] = sorted({b for widths in self.point_forms.values() for b in widths}) or [None]  # type: ignore[assignment]
        found = {}
        for act in acts:
            for bits in reversed(weights):
                chosen = {g.name: _nearest(g, bits, act) for g in self.groups}
                if self.fits(chosen):
                    found[f"uniform {bits}" + (f", activations {act}" if act else "")] = chosen
                    break
        return found

    def fits(self, chosen: Chosen) -> bool:
        """Whether an allocation meets the budgets."""
        totals = [0.0] * len(self.limits)
        for group in self.groups:
            cost = group.costs[chosen[group.name]]
            for i, c in enumerate(cost if isinstance(cost, tuple) else (cost,)):
                totals[i] += c
        return all(t <= limit + 1e-9 * max(abs(limit), 1) for t, limit in zip(totals, self.limits, strict=True))

    def measured(self, candidates: Sequence[Chosen]) -> list[float]:
        """What each allocation costs at the outputs, all of it done at once."""
        from ..sensitivity.measured import measure_together

        sets = [self._choices(c) for c in candidates]
        return measure_together(self.graph, self._trials(), sets, self.batches, self.metric)

    def around(self, chosen: Chosen) -> tuple[Losses, Losses, Callable[[Group, Pick], bool]]:
        """Losses one width up and down, everything else at its width; and which picks these speak for."""
        from ..sensitivity.measured import Trial, measure

        now = self._choices(chosen)
        trials = []
        for t in self._trials():
            widths = sorted(t.choices)
            at = widths.index(now[t.name])
            trials.append(Trial(t.name, t.value, widths[max(at - 1, 0) : at + 2], t.change))
        losses = measure(self.graph, trials, self.batches, self.metric, self.progress, others=now)
        weights: Losses = {n: dict(losses[n]) for n in self.forms}
        points = summed(self.placement, self.point_forms, {n: x for n, x in losses.items() if n not in self.forms})

        def known(group: Group, pick: Pick) -> bool:
            pairs = [(weights, pick.weights), (points, pick.points)]
            return all(b in losses[n] for losses, widths in pairs for n, b in widths.items())

        return weights, points, known

    def _trials(self) -> list[Any]:
        return [*weight_trials(self.sites, self.forms), *point_trials(self.placement, self.point_forms)]

    def _choices(self, chosen: Chosen) -> dict[str, int]:
        """Width per trial."""
        roots: dict[str, int] = {}
        found: dict[str, int] = {}
        for group in self.groups:
            pick = group.picks[chosen[group.name]]
            found |= pick.weights
            roots |= pick.points
        return found | {n: roots[p.root] for n, p in self.placement.points.items() if p.root in roots}


def best_of(chooser: Chooser, candidates: dict[str, Chosen], rounds: int) -> tuple[Chosen, dict[str, float], str]:
    """The allocation that costs least as a whole, what each tried one costs, and the name of the best.

    The candidates first. Then, ``rounds`` times at most: the losses of one width up and down are measured around the
    best so far, all other layers at their widths, the integer program is solved with them for steps of one width, and
    the result is kept if it costs less as a whole.
    """
    names = list(candidates)
    losses = dict(zip(names, chooser.measured([candidates[n] for n in names]), strict=True))
    best = min(names, key=lambda n: losses[n])
    chosen = candidates[best]
    for turn in range(rounds):
        weights, points, known = chooser.around(chosen)
        found, _ = chooser.solved(weights, points, known)
        if found == chosen:
            break
        name = f"refined {turn + 1}"
        (losses[name],) = chooser.measured([found])
        if losses[name] >= losses[best]:
            break
        best, chosen = name, found
    return chosen, losses, best


def _loss(pick: Pick, weights: Losses, points: Losses) -> float:
    loss = sum(weights[n][b] for n, b in pick.weights.items())
    return float(loss + sum(points[n][b] for n, b in pick.points.items()))


def _nearest(group: Group, bits: int, act: int | None) -> int:
    """The pick whose widths are nearest to one width of weights and of activations; ties: the narrower."""

    def distance(i: int) -> tuple[float, ...]:
        pick = group.picks[i]
        far = sum(abs(b - bits) for b in pick.weights.values())
        wide = sum(abs(b - act) for b in pick.points.values()) if act is not None else 0
        return (wide, far, sum(pick.weights.values()) + sum(pick.points.values()))

    return min(range(len(group.picks)), key=distance)
