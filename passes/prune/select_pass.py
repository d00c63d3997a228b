"""Select: keep what a plan says, a plan made earlier, on another model, or by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import SkipValidation

from ...graph.actions import Plan, apply_kept
from ...graph.errors import ConfigError, ConstraintError
from ...graph.groups import axis_groups
from ...graph.ir import Graph
from ...graph.plans import groups_of_plan
from ..base import Context, Contract, Decision, Needs, Outcome, Pass
from ..plan import remember
from .kinds import kinds
from .oracle import identity_check


class Select(Pass):
    """Keep the indices that a plan lists, everywhere their axis groups occur.

    Identity: that of ``prune``: the result equals the original with the removed slabs zeroed wherever no statistic is
    taken over a cut axis; checked with ``verify``.

    Raises:
        ConstraintError: the plan is for another model, contradicts itself, or cuts what cannot be cut.
    """

    name: ClassVar[str] = "select"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    needs: ClassVar[Needs] = Needs.NOTHING
    establishes: ClassVar[frozenset[str]] = frozenset({"pruned"})

    plan: SkipValidation[Any]
    """A plan.json, or (in Python) a Plan or its data {weight: {axis: kept indices}}, which may name one axis per
    group."""

    def prepare(self, ctx: Context) -> None:
        if isinstance(self.plan, (str, Path)):
            Plan.load(self.plan)
        elif not isinstance(self.plan, (Plan, dict)):
            raise ConfigError(
                "not a plan", node="plan", expected="a path, Plan or dict", found=type(self.plan).__name__
            )

    def selects_only(self) -> bool:
        return True

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        graph.separate_shared()
        groups = axis_groups(graph)
        if isinstance(self.plan, dict):
            given = groups.complete(self.plan)
        else:
            given = self.plan if isinstance(self.plan, Plan) else Plan.load(self.plan)
        kept = groups_of_plan(groups, given)
        if not kept:
            raise ConstraintError(
                "the plan keeps everything", node="plan", hint="give fewer indices of at least one axis"
            )
        decisions = []
        for g in groups:
            data = {"size": g.size, "kept": len(kept.get(g, range(g.size))), "members": [m.label for m in g.members]}
            if g in kept:
                note = "" if g.exact else f"; changes a statistic: {g.why('inexact')}"
                decisions.append(Decision(g.name, "cut", f"kept {len(kept[g])} of {g.size} by the plan{note}", data))
            else:
                why = "the plan leaves it whole" if g.can("select") else f"frozen: {g.why()}"
                decisions.append(Decision(g.name, "kept", why, data))
        details: dict[str, Any] = {}
        kind_of = kinds(groups)
        oracle = identity_check(groups, kept, ctx.seed) if ctx.verify else None
        before = None if ctx.last else graph.clone()
        plan = apply_kept(groups, kept)
        remember(ctx, before, plan)
        if oracle is not None:
            details["identity"] = oracle(graph)
        details["groups"] = [
            {"name": d.subject, "kind": kind_of[g], "size": g.size, "kept": d.data["kept"], "reason": d.reason}
            for g, d in zip(groups, decisions, strict=True)
        ]
        return Outcome(decisions=decisions, details=details, plan=plan)
