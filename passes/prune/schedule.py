"""PruneIteratively: cut a little, let the user train, look again, until the target of one Prune is reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from glob import escape
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import numpy as np
from pydantic import Field, SkipValidation

from ...graph.actions import Plan, groups_of_plan, select
from ...graph.errors import ConfigError, ConstraintError
from ...graph.groups import AxisGroup, AxisGroups, axis_groups
from ...graph.ir import Graph
from ...graph.preview import preview_cost
from ..base import Context, Contract, Decision, Needs, Outcome, Pass
from ..finetune import FineTune
from ..plan import as_data, compose, remember
from ..targets import Target
from .automatic import settled
from .candidates import candidates
from .importance import importance
from .oracle import identity_check
from .prune_pass import Prune
from .select import Kept, normalized

Course: TypeAlias = Literal["linear", "cubic", "geometric"]
Goal: TypeAlias = tuple[float | None, Target | None, dict[str, float]]
"""(ratio, target, overrides) of one step, ratio or target None, all relative to the original model."""


class PruneIteratively(Pass):
    """Structured pruning in steps with the user's training between them.

    Step i of n prunes to its share of what ``prune`` asks for, relative to the ORIGINAL model, then hands the module
    to ``train``. Criteria are evaluated anew in each step, on the model as it then is; what is gone stays gone, so the
    kept sets are nested. With scope "uniform" the sizes of the last step are those of the one-shot ``prune``. The
    whole plan applies to the original checkpoint.

    "cubic" is the course of "To prune, or not to prune: exploring the efficacy of pruning for model compression":
    much at first, little at the end. "geometric" takes the same share of what is left in every step.

    Raises:
        ConfigError: the schedule does not rise from 0 to 1.
        ConstraintError: what the one-shot ``prune`` would raise, before any training.
    """

    name: ClassVar[str] = "prune_iteratively"
    contract: ClassVar[Contract] = Contract.FRESH
    needs: ClassVar[Needs] = Needs.TRAINING
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    establishes: ClassVar[frozenset[str]] = frozenset({"pruned"})

    prune: Prune
    """What to reach and how to choose: criterion, ratio or target, scope, ignore and so on."""
    train: Annotated[Callable[[Any], Any], SkipValidation] | str | None = None
    """The training loop between the steps, a function of one nn.Module (in files `module:function`); None: none."""
    steps: int = Field(5, ge=1)
    """Number of steps."""
    schedule: Course | Callable[[float], float] = "linear"
    """"linear", "cubic", "geometric", or a function from the share of steps done to the share of the goal reached,
    both in 0..1, never falling, with f(1) = 1."""

    def prepare(self, ctx: Context) -> None:
        """The training loop can be found and the schedule reaches its end."""
        self.prune.prepare(ctx)
        if self.train is not None:
            FineTune(self.train).prepare(ctx)
        self.shares()

    def promise(self) -> Contract:
        """Without training the function only loses what was cut."""
        return Contract.APPROXIMATE if self.train is None else self.contract

    def requirement(self) -> Needs:
        """Without training, what ``prune`` needs."""
        return self.prune.requirement() if self.train is None else self.needs

    def shares(self) -> list[float]:
        """Share of the goal that each step reaches ("geometric": in the exponent of what is left).

        Raises:
            ConfigError: the shares leave 0..1, fall, or do not end at 1.
        """
        done = [(i + 1) / self.steps for i in range(self.steps)]
        if callable(self.schedule):
            found = [float(self.schedule(x)) for x in done]
        elif self.schedule == "cubic":
            found = [1 - (1 - x) ** 3 for x in done]
        else:
            found = done
        rising = all(a <= b for a, b in zip([0.0, *found], found, strict=False))
        if not (rising and abs(found[-1] - 1) < 1e-9):
            raise ConfigError(
                "the schedule must rise from 0 to 1 without falling",
                node="schedule",
                value=getattr(self.schedule, "__name__", self.schedule),
                expected="f(1) == 1 and f(a) <= f(b) for a <= b",
                found=[round(x, 4) for x in found],
            )
        return [*found[:-1], 1.0]

    def goals(self, groups: AxisGroups) -> list[Goal]:
        """What each step asks of Prune, relative to the graph of ``groups``.

        Raises:
            ConfigError: an absolute latency, whose share of the original is not known beforehand.
        """
        geometric = self.schedule == "geometric"

        def gone(end: float, share: float) -> float:
            return 1 - (1 - end) ** share if geometric else end * share

        prune, target = self.prune, self.prune.target
        end = 0.0
        if target is not None and target.is_fraction:
            end = 1 - target.value
        elif target is not None and target.metric == "latency":
            raise ConfigError(
                "an absolute latency has no schedule", node="target", value=str(target), expected="a share of 1"
            )
        elif target is not None:
            end = 1 - min(target.value / target.of(preview_cost(groups, {})), 1.0)
        found: list[Goal] = []
        for share in self.shares()[:-1]:
            ratio = None if prune.ratio is None else gone(prune.ratio, share)
            part = None if target is None else Target(metric=target.metric, value=1 - gone(end, share))
            found.append((ratio, part, {p: gone(r, share) for p, r in prune.overrides.items()}))
        return [*found, (prune.ratio, target, prune.overrides)]

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        graph.separate_shared()
        run = _Run(self.prune, graph, ctx)
        goals = self.goals(run.groups)
        run.rehearse()
        train = None if self.train is None else FineTune(self.train)
        steps: list[dict[str, Any]] = []
        for i, goal in enumerate(ctx.progress(goals, "pruning in steps")):
            record = {"step": i + 1, **run.step(goal, first=not run.plans, last=i == len(goals) - 1)}
            if train is not None and (record["cut"] or i == len(goals) - 1):
                record["weights_changed"] = train.apply(graph, ctx).details["weights_changed"]
            steps.append(record)
        plan = compose(run.plans, run.original)
        remember(ctx, run.original, plan)
        details = {"steps": steps, "groups": run.summary()}
        return Outcome(decisions=run.decisions(len(steps)), details=details, plan=plan)


class _Run:
    """The state between the steps: the original graph, what is kept of it, and the graph as it is now."""

    def __init__(self, prune: Prune, graph: Graph, ctx: Context) -> None:
        # Every step reads the data anew: what can be read only once is kept.
        prune = settled(prune, graph, ctx)
        self.prune = prune.model_copy(update={"data": _again(prune.data), "calibration": _again(prune.calibration)})
        self.graph, self.ctx = graph, replace(ctx, calibration=_again(ctx.calibration))
        self.original = graph.clone()
        self.groups = axis_groups(self.original)
        self.kept: Kept = {g: np.arange(g.size) for g in self.groups}
        self.cut_in: dict[AxisGroup, int] = {}
        self.refused: list[Decision] = []
        self.last: dict[str, np.ndarray] = {}
        self.plans: list[Plan] = []
        self.done = 0

    def rehearse(self) -> None:
        """The one-shot pruning on a copy: what it refuses is found before hours of training."""
        self.prune.apply(self.original.clone(), self._quiet())

    def _quiet(self) -> Context:
        return replace(self.ctx, verify=False, reference=None, untouched=None)

    def step(self, goal: Goal, *, first: bool, last: bool) -> dict[str, Any]:
        """Cut to one goal."""
        self.done += 1
        now = axis_groups(self.graph)
        twins = twins_of(self.groups, now, self.kept)
        table, unjudged = self._scores(now, twins)
        full = _spread(self.original.clone(), self.graph, compose(self.plans, self.original))

        def known(g: AxisGroup, _: AxisGroups) -> np.ndarray:
            return table[g.name]

        known.__name__ = self.prune._criterion_name()
        asked = {"ratio": goal[0], "target": goal[1], "overrides": goal[2]}
        ignore = [*self.prune.ignore, *(escape(name) for name in unjudged)]
        settled = {"criterion": known, "normalizer": "none", "ignore": ignore}
        record: dict[str, Any] = {"asked": goal[0] if goal[1] is None else str(goal[1]), "cut": 0}
        try:
            outcome = self.prune.model_copy(update={**asked, **settled}).apply(full, self._quiet())
        except ConstraintError:
            if last or not first:
                raise
            return record  # too small a share to lose a whole index yet: the rehearsal has seen that the end can
        assert outcome.plan is not None
        wanted = groups_of_plan(self.groups, outcome.plan)
        local: Kept = {}
        for g, k in wanted.items():
            keep = np.intersect1d(self.kept[g], k)
            if g in twins and len(keep) < len(self.kept[g]):
                local[twins[g]] = np.searchsorted(self.kept[g], keep)
                self.kept[g], self.cut_in[g] = keep, self.done
        if local:
            check = identity_check(now, local, self.ctx.seed) if self.ctx.verify else None
            self.plans.append(select(now, local))
            if check is not None:
                record["identity"] = check(self.graph)
        return {**record, **{k: v for k, v in outcome.details.items() if k == "reached"}, "cut": len(local)}

    def _scores(self, now: AxisGroups, twins: dict[AxisGroup, AxisGroup]) -> tuple[dict[str, np.ndarray], list[str]]:
        """Scores on the original's indices, those that are gone below all others; and the groups without any."""
        self.refused = []
        prune, ctx = self.prune, self.ctx
        chosen = candidates(self.groups, prune.ignore, prune.atoms, self.refused, prune.ignore_types)
        alive = [twins[g] for g in chosen if g in twins]
        found = importance(now, alive, prune.criterion, ctx.seed, prune.reduction, prune._evidence(now, ctx))
        scaled: dict[AxisGroup, np.ndarray] = {}
        for g in chosen:
            if g in twins and twins[g] in found:
                scaled[g] = normalized(found[twins[g]], prune.normalizer)
            elif g in twins and g.name in self.last:
                # Judged before and not now (no zero activations are left to count): what was known still ranks them.
                scaled[g] = self.last[g.name][self.kept[g]]
        everything = np.concatenate(list(scaled.values())) if scaled else np.zeros(1)
        # Strictly below the lowest score of all, or a group of dead indices would tie with what is gone.
        floor = float(everything.min()) - max(float(np.abs(everything).max()), 1e-12)
        table = {}
        for g, s in scaled.items():
            table[g.name] = np.full(g.size, floor)
            table[g.name][self.kept[g]] = s
        self.last = {**self.last, **table}
        return table, [g.name for g in chosen if g.name not in table]

    def decisions(self, steps: int) -> list[Decision]:
        """What became of every group."""
        found = list(self.refused)
        for g, at in self.cut_in.items():
            k = len(self.kept[g])
            why = f"kept {k} of {g.size} by {self.prune._criterion_name()} over {steps} steps, last cut in step {at}"
            found.append(Decision(g.name, "cut", why, {"size": g.size, "kept": k, "step": at}))
        return found

    def summary(self) -> list[dict[str, Any]]:
        """Sizes of all groups, for the report's drawing."""
        return [
            {"name": g.name, "size": g.size, "kept": len(self.kept[g]), "reason": "" if g in self.cut_in else g.why()}
            for g in self.groups
        ]


def _again(data: Any) -> Any:
    """Data that can be iterated over more than once."""
    return list(data) if isinstance(data, Iterator) else data


def twins_of(groups: AxisGroups, now: AxisGroups, kept: Kept) -> dict[AxisGroup, AxisGroup]:
    """For each group of the original the group of the cut graph that holds what is left of it.

    A group cut down to one index has none: there is nothing left to choose.
    """
    twins: dict[AxisGroup, AxisGroup] = {}
    for g in groups:
        for m in g.members:
            if m.weight.name not in now.graph.weights:
                continue
            before = [h for h in groups.of(m.weight, m.axis) if len(kept[h]) > 1]
            after = [h for h in now.of(m.weight.name, m.axis) if h.size > 1]
            if g in before and [len(kept[h]) for h in before] == [h.size for h in after]:
                twins[g] = after[before.index(g)]
                break
    return twins


def _spread(full: Graph, current: Graph, plan: Plan) -> Graph:
    """``full`` with the weights of the cut graph where they came from and zeros where an index is gone."""
    axes_of = as_data(plan)
    for weight in list(full.weights.values()):
        now = current.weights.get(weight.name)
        if now is None or not weight.dtype.startswith(("float", "bfloat")):
            continue
        data, axes = now.numpy(), axes_of.get(weight.name, {})
        if axes:
            places = [axes.get(i, np.arange(n)) for i, n in enumerate(weight.shape)]
            if tuple(len(p) for p in places) != data.shape:
                continue
            whole = np.zeros(weight.shape, data.dtype)
            whole[np.ix_(*places)] = data
            data = whole
        if data.shape == weight.shape:
            full.set_weight(weight, np.ascontiguousarray(data))
    return full
