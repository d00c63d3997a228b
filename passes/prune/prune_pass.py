"""Prune: cut the least important indices of axis groups, everywhere they occur, and prove it equals masking them."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from ...graph.actions import mask, select
from ...graph.errors import ConstraintError, VerificationError
from ...graph.execute import run_graph, synthesize_inputs
from ...graph.groups import AxisGroup, AxisGroups, axis_groups
from ...graph.ir import Graph
from ..base import Context, Contract, Decision, Needs, Outcome, Pass, nearest
from ..targets import Target
from .importance import NAMES, Reduction, importance
from .select import Kept, Normalizer, isomorphic, ranked, reach, uniform

IDENTITY_TOLERANCE = 1e-4


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
        chosen = self._candidates(groups, decisions)
        scores = importance(groups, chosen, self.criterion, ctx.seed, self.reduction)
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
        oracle = self._oracle(groups, cut, ctx) if ctx.verify else None
        plan = select(groups, cut)
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

    # ---- what may be cut ---------------------------------------------------------------------------------------
    def _candidates(self, groups: AxisGroups, decisions: list[Decision]) -> list[AxisGroup]:
        unused = set(self.ignore)
        chosen = []
        for g in groups:
            hit = [p for p in self.ignore if _matches(p, g)]
            unused -= set(hit)
            if not g.can("select"):
                decisions.append(Decision(g.name, "kept", f"frozen: {g.why()}", {"size": g.size}))
            elif hit:
                decisions.append(Decision(g.name, "kept", f"ignored by {hit[0]!r}", {"size": g.size}))
            elif g.nested and self.atoms == "outer":
                decisions.append(Decision(g.name, "kept", "nested in a group that can be cut itself", {"size": g.size}))
            elif not any(m.role in ("produces", "both", "consumes") for m in g.members):
                decisions.append(Decision(g.name, "kept", "no weight produces or consumes it", {"size": g.size}))
            else:
                chosen.append(g)
        if unused:
            raise ConstraintError(
                "an ignore pattern matches nothing",
                node="ignore",
                value=sorted(unused)[0],
                expected="a weight name, module path or group name (wildcards allowed)",
                hint="`foldline inspect MODEL` lists the names",
            )
        return chosen

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

    def _criterion_name(self) -> str:
        return self.criterion if isinstance(self.criterion, str) else getattr(self.criterion, "__name__", "criterion")

    # ---- the proof -----------------------------------------------------------------------------------------------
    def _oracle(self, groups: AxisGroups, cut: Kept, ctx: Context) -> Callable[[Graph], dict[str, Any]]:
        """Run the masked original now; the returned check compares the sliced model with it."""
        exact = {g: k for g, k in cut.items() if g.exact}
        if not exact:
            return lambda graph: {"checked": False, "reason": "every cut axis carries a statistic"}
        inputs = synthesize_inputs(groups.graph, ctx.seed)
        masked, _ = run_graph(mask(groups, exact), inputs)
        partial: Graph | None = None
        if len(exact) < len(cut):
            partial = groups.graph.clone()
            again = axis_groups(partial)
            select(again, {again[g.name]: k for g, k in exact.items()})

        def check(graph: Graph) -> dict[str, Any]:
            sliced, _ = run_graph(graph if partial is None else partial, inputs)
            error = 0.0
            for value, a, b in zip(graph.outputs, masked, sliced, strict=True):
                x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
                if x.shape != y.shape:
                    raise VerificationError(
                        "pruning changed the shape of an output", value=value.name, expected=x.shape, found=y.shape
                    )
                finite = np.isfinite(x)
                if not finite.any():
                    continue
                top = max(float(np.abs(x[finite]).max()), 1e-12)
                error = max(error, float(np.abs(x - y)[finite].max()) / top)
            if not error <= IDENTITY_TOLERANCE:
                raise VerificationError(
                    "the pruned model is not the masked original",
                    expected=f"relative error of at most {IDENTITY_TOLERANCE}",
                    found=error,
                    hint="please report this model; `ignore` the groups concerned meanwhile",
                )
            if partial is not None:
                run_graph(graph, inputs)
            return {
                "checked": True,
                "relative_error": error,
                "groups": len(exact),
                "inexact_groups": len(cut) - len(exact),
            }

        return check


def _matches(pattern: str, g: AxisGroup) -> bool:
    names = [g.name]
    for m in g.members:
        for n in (m.weight.name, *m.weight.aliases):
            parts = n.split(".")
            names += [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return any(fnmatchcase(n, pattern) for n in names)
