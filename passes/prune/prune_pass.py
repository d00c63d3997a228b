"""Prune: cut the least important indices of axis groups, everywhere they occur, and prove it equals masking them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from ...graph.actions import select
from ...graph.errors import ConstraintError
from ...graph.groups import AxisGroups, axis_groups
from ...graph.ir import Graph
from ..base import Context, Contract, Decision, Needs, Outcome, Pass, nearest
from ..plan import remember
from ..targets import Target
from .candidates import candidates
from .evidence import Evidence
from .importance import NAMES, Reduction, importance
from .oracle import identity_check
from .select import Kept, Normalizer, isomorphic, ranked, reach, uniform


def _known(criterion: Any) -> Any:
    if isinstance(criterion, str) and criterion not in NAMES:
        near = nearest(criterion, NAMES)
        raise ValueError(f"unknown criterion {criterion!r}" + (f": did you mean {near!r}?" if near else ""))
    return criterion


class Prune(Pass):
    """Structured pruning: select the most important indices of each axis group and drop the rest.

    Identity: with S the kept indices, ``pruned(x) == original(x) with the removed slabs zeroed``, to 1e-4 of the
    largest output, wherever no statistic (norm, mean) is taken over the cut axis; checked on every run with
    ``verify``. Approximate as a whole: what the removed slabs contributed is lost, and the report says how much.

    Raises:
        ConstraintError: the ratio is out of range, the target cannot be reached, an ignore pattern matches nothing,
            or nothing at all could be pruned.
    """

    name: ClassVar[str] = "prune"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    needs: ClassVar[Needs] = Needs.NOTHING
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    establishes: ClassVar[frozenset[str]] = frozenset({"pruned"})

    criterion: Annotated[str | Callable[..., Any], AfterValidator(_known)] = "l2"
    """"l1", "l2", "linf", "fpgm" (distance to the others), "cosine" (distance to the nearest copy), "norm_scale"
    (gains of normalizations), "random", or a callable (group, groups) -> one score per index."""
    calibration: Any = None
    """Batches of model inputs for criteria that look at activations (those of the run, if None)."""
    data: Any = None
    """Pairs (batch of model inputs, target) for criteria that take gradients of ``loss``."""
    loss: str | Callable[..., Any] = "cross_entropy"
    """"cross_entropy" (class indices), "mse", or a function (output, target) -> scalar tensor."""
    reduction: Reduction = "mean"
    """How the scores of a group's members (each divided by its mean) become one."""
    normalizer: Normalizer = "mean"
    """How a group's scores are brought to a scale on which groups compare, where they compete (scope)."""
    ratio: float | None = None
    """Share of each prunable axis that goes (scope "uniform"), or of all indices (scope "global"); in (0, 1)."""
    target: Target | None = None
    """What is to remain instead: macs(0.5), params(0.5), bytes(1e6)."""
    scope: Literal["uniform", "global", "isomorphic"] = "uniform"
    """"uniform": every group loses the same share; "global": all indices are ranked together; "isomorphic": indices
    are ranked together with those of groups of the same structure."""
    round_to: int = Field(1, ge=1)
    """Every cut axis stays a multiple of this (8, 16, 32), at least one block; shorter axes are left whole."""
    min_keep: int = Field(1, ge=1)
    """Indices that each group keeps at least."""
    ignore: list[str] = Field(default_factory=list)
    """Patterns (fnmatch) of weight names, module paths or group names whose groups stay whole."""
    atoms: Literal["outer", "all"] = "outer"
    """"outer": of nested groups (heads and head dim, groups and channels) only the outermost; "all": both."""

    @model_validator(mode="after")
    def _one_goal(self) -> Prune:
        if (self.ratio is None) == (self.target is None):
            raise ValueError("give exactly one of ratio and target")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ConstraintError(
                "the ratio is out of range",
                node="ratio",
                expected="a number between 0 and 1: the share of each prunable axis that goes",
                found=self.ratio,
                hint="give what is to remain as a target instead, e.g. target=fl.macs(0.5)",
            )
        return self

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        graph.separate_shared()
        groups = axis_groups(graph)
        decisions: list[Decision] = []
        chosen = candidates(groups, self.ignore, self.atoms, decisions)
        scores = importance(groups, chosen, self.criterion, ctx.seed, self.reduction, self._evidence(groups, ctx))
        decisions += [
            Decision(g.name, "kept", f"{self._criterion_name()} finds nothing to judge it by", {"size": g.size})
            for g in chosen
            if g not in scores
        ]

        def pick(ratio: float) -> Kept:
            if self.scope == "uniform":
                return uniform(scores, ratio, self.round_to, self.min_keep)
            choose = ranked if self.scope == "global" else isomorphic
            return choose(scores, ratio, self.round_to, self.min_keep, self.normalizer)

        details: dict[str, Any] = {}
        if self.target is None:
            assert self.ratio is not None
            kept = pick(self.ratio)
        else:
            kept, ratio, share = reach(groups, scores, pick, self.target)
            details.update(ratio=ratio, target=str(self.target), reached=share)
        self._record(kept, decisions)
        cut = {g: k for g, k in kept.items() if len(k) < g.size}
        if not cut:
            raise ConstraintError(
                "nothing was pruned",
                found=f"{len(chosen)} prunable groups, none of which loses an index",
                hint="raise the ratio, lower round_to or min_keep, shorten ignore; `foldline inspect` shows the frozen",
            )
        oracle = identity_check(groups, cut, ctx.seed) if ctx.verify else None
        before = graph.clone()
        plan = select(groups, cut)
        remember(ctx, before, plan)
        if oracle is not None:
            details["identity"] = oracle(graph)
        details["groups"] = [
            {
                "name": g.name,
                "size": g.size,
                "kept": len(kept[g]) if g in kept else g.size,
                "reason": g.why() if g not in kept else "" if len(kept[g]) < g.size else "left whole by round_to",
            }
            for g in groups
        ]
        return Outcome(decisions=decisions, details=details, plan=plan)

    def _record(self, kept: Kept, decisions: list[Decision]) -> None:
        for g, k in kept.items():
            size = {"size": g.size, "kept": len(k), "members": [m.label for m in g.members]}
            if len(k) < g.size:
                note = "" if g.exact else f"; changes a statistic: {g.why('inexact')}"
                decisions.append(
                    Decision(g.name, "cut", f"kept {len(k)} of {g.size} by {self._criterion_name()}{note}", size)
                )
            else:
                why = (
                    f"shorter than a block of {self.round_to}"
                    if self.round_to > 1
                    else "all indices rank above the cut"
                )
                decisions.append(Decision(g.name, "kept", why, size))

    def _evidence(self, groups: AxisGroups, ctx: Context) -> Evidence:
        batches = ctx.calibration if self.calibration is None else self.calibration
        return Evidence(groups, batches, self.data, self.loss, ctx.seed, ctx.progress)

    def _criterion_name(self) -> str:
        return self.criterion if isinstance(self.criterion, str) else getattr(self.criterion, "__name__", "criterion")
