"""Pruning by hand, group by group: look at scores, drop indices, see what it would cost, undo, apply."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...graph.cost import Cost
from ...graph.errors import ConstraintError
from ...graph.groups import AxisGroup, axis_groups
from ...graph.load import load
from ...graph.plans import Plan, plan_of
from ...graph.preview import preview_cost
from ..base import Decision, Progress, no_progress
from ..report import CostSummary, change, count
from ..result import Result
from .candidates import candidates
from .evidence import Evidence
from .importance import Reduction, importance
from .kinds import kinds
from .select import Kept, keep_best


@dataclass(frozen=True)
class Choice:
    """One axis group of a session.

    Attributes:
        name, kind, size: of the group.
        kept: indices kept so far, ascending.
        members: labels ``weight[axis]`` of everything that is cut along.
        scores: importance per index (float64 [size]), or None where the criterion cannot judge the group.
        exact: dropping an index equals zeroing it (no statistic is taken over the axis).
    """

    name: str
    kind: str
    size: int
    kept: tuple[int, ...]
    members: tuple[str, ...]
    scores: np.ndarray | None
    exact: bool


class PruneSession:
    """Interactive structured pruning of one model; nothing is changed before :meth:`apply`, and then only a copy.

    Args:
        model: anything ``fl.load`` takes.
        example_inputs: one call's arguments.
        criterion, calibration, data, loss, reduction, atoms, ignore: as the options of ``prune``.
        seed: of random criteria and of the check's inputs.

    Iterating gives a :class:`Choice` per group that can be cut; printing shows them as a table.

    Raises:
        ConstraintError: a name that no group has, a group that cannot be cut (with the reason), indices that do not
            exist, or a group that would vanish. The session is then as it was.
    """

    def __init__(
        self,
        model: Any,
        example_inputs: Any = None,
        *,
        criterion: str | Callable[..., Any] = "l2",
        calibration: Iterable[Any] | None = None,
        data: Iterable[Any] | None = None,
        loss: str | Callable[..., Any] = "cross_entropy",
        reduction: Reduction = "mean",
        atoms: str | list[str] = "all",
        ignore: Sequence[str] = (),
        seed: int = 0,
        progress: Progress = no_progress,
    ) -> None:
        self.seed = seed
        self._given = load(model, example_inputs, static=calibration is None and data is None)
        self._example = example_inputs
        graph = self._given.clone()
        graph.separate_shared()
        self.groups = axis_groups(graph)
        self._whole: list[Decision] = []
        chosen = candidates(self.groups, list(ignore), atoms, self._whole)
        evidence = Evidence(self.groups, calibration, data, loss, seed, progress)
        self._scores = importance(self.groups, chosen, criterion, seed, reduction, evidence)
        self._chosen = {g.name: g for g in chosen}
        self._kinds = kinds(self.groups)
        self._kept: Kept = {}
        self._history: list[Kept] = []
        self._original = CostSummary.of(preview_cost(self.groups, {}))

    # ---- looking -----------------------------------------------------------------------------------------------
    def __iter__(self) -> Iterator[Choice]:
        return (self[name] for name in self._chosen)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, name: str) -> Choice:
        g = self._group(name)
        labels = tuple(m.label for m in g.members)
        kept = tuple(self._now(g).tolist())
        return Choice(g.name, self._kinds[g], g.size, kept, labels, self._scores.get(g), g.exact)

    def explain(self, name: str) -> str:
        """Why a layer, weight or group is as it is: what its axes are tied to, and what this session does to them."""
        lines = [self.groups.explain(name)]
        said = {d.subject: f"{d.action}: {d.reason}" for d in self._whole}
        for g in self.groups:
            if g.name == name or any(name in (a, a.rpartition(".")[0]) for m in g.members for a in m.weight.aliases):
                what = said.get(g.name) or f"keeps {len(self._now(g))} of {g.size} here"
                lines.append(f"{g.name}: {what}")
        return "\n".join(lines)

    def cost(self) -> Cost:
        """Parameters, bytes and MACs that the model would have now."""
        return preview_cost(self.groups, self._kept)

    def preview(self, name: str, *, keep: Sequence[int] | None = None, ratio: float | None = None) -> Cost:
        """The cost if one group were cut like this too; the session stays as it is."""
        g = self._group(name)
        return preview_cost(self.groups, {**self._kept, g: self._wanted(g, keep, ratio)})

    def plan(self) -> Plan:
        """What the choices so far keep, as data."""
        return plan_of(self.groups, {g.atom: k for g, k in self._kept.items()})

    def __str__(self) -> str:
        now = CostSummary.of(self.cost())
        before = self._original
        lines = [
            f"{len(self)} groups; parameters {count(now.parameters)} ({change(before.parameters, now.parameters)}), "
            f"MACs {count(now.macs)} ({change(before.macs, now.macs)})",
            f"  {'group':40s} {'kind':12s} {'kept':>11s}  {'half of it would leave':24s} members",
        ]
        for choice in self:
            g = self._chosen[choice.name]
            half = CostSummary.of(self.preview(choice.name, ratio=0.5))
            saved = f"MACs {change(now.macs, half.macs)}, par. {change(now.parameters, half.parameters)}"
            more = "" if g.exact else "; changes a statistic"
            shown = ", ".join(choice.members[:3]) + (" ..." if len(choice.members) > 3 else "") + more
            lines.append(
                f"  {choice.name:40s} {choice.kind:12s} {len(choice.kept):5d}/{g.size:<5d}  {saved:24s} {shown}"
            )
        return "\n".join(lines)

    # ---- choosing ----------------------------------------------------------------------------------------------
    def keep(self, name: str, indices: Sequence[int]) -> PruneSession:
        """Keep exactly these indices of a group (of its original numbering)."""
        return self._set(self._group(name), self._indices(self._group(name), indices))

    def drop(
        self, name: str, indices: Sequence[int] | None = None, *, count: int | None = None, ratio: float | None = None
    ) -> PruneSession:
        """Drop indices, or the ``count`` least important ones that are left, or so many that ``ratio`` of all go."""
        g = self._group(name)
        if sum(x is not None for x in (indices, count, ratio)) != 1:
            raise ConstraintError("give exactly one of indices, count and ratio", node=name)
        if indices is not None:
            return self._set(g, np.setdiff1d(self._now(g), self._indices(g, indices, empty=True)))
        if ratio is not None:
            return self._set(g, self._wanted(g, None, ratio))
        assert count is not None
        return self._set(g, self._best(g, len(self._now(g)) - count))

    def restore(self, name: str) -> PruneSession:
        """Take a group back whole."""
        return self._set(self._group(name), np.arange(self._group(name).size))

    def undo(self) -> PruneSession:
        """Take back the last choice. Raises ConstraintError if there is none."""
        if not self._history:
            raise ConstraintError("there is nothing to undo", hint="no choice has been made yet")
        self._kept = self._history.pop()
        return self

    def apply(self, verify: bool = True, inplace: bool = False) -> Result:
        """The pruned model with plan and report: a run of the pass ``select`` with :meth:`plan`, checked like it.

        Args:
            verify: check that slicing equals masking, and measure the errors.
            inplace: put the result into the module that the session was given.

        Raises:
            ConstraintError: nothing was chosen.
            VerificationError: the sliced model is not the masked one.
        """
        from ..inplace import put
        from ..pipeline import Pipeline
        from .select_pass import Select

        if not self._kept:
            raise ConstraintError("nothing was chosen", hint="drop(...) or keep(...) something first")
        pipe = Pipeline([Select(plan=self.plan())], seed=self.seed, name="session")
        result = pipe.run(self._given, self._example, verify=verify)
        if inplace:
            module = getattr(getattr(self._given, "source", None), "module", None)
            if module is None:
                raise ConstraintError("only an nn.Module can be changed in place", found=self._given.kind)
            result.model = put(module, result.model)
        return result

    # ---- inside ------------------------------------------------------------------------------------------------
    def _group(self, name: str) -> AxisGroup:
        found = self._chosen.get(name)
        if found is not None:
            return found
        g = self.groups[name]  # raises, naming the nearest one
        why = next((d.reason for d in self._whole if d.subject == g.name), g.why())
        raise ConstraintError(
            "this axis group cannot be cut in this session",
            node=name,
            found=why,
            hint="session.explain(name) tells more; printing the session lists what can be cut",
        )

    def _now(self, g: AxisGroup) -> np.ndarray:
        return self._kept.get(g, np.arange(g.size))

    def _set(self, g: AxisGroup, kept: np.ndarray) -> PruneSession:
        if len(kept) == 0:
            raise ConstraintError(
                "the group would vanish", node=g.name, expected="at least one index", hint="keep one, or drop fewer"
            )
        self._history.append(dict(self._kept))
        self._kept = {**self._kept, g: kept}
        if len(kept) == g.size:
            del self._kept[g]
        return self

    def _wanted(self, g: AxisGroup, keep: Sequence[int] | None, ratio: float | None) -> np.ndarray:
        if (keep is None) == (ratio is None):
            raise ConstraintError("give exactly one of keep and ratio", node=g.name)
        if keep is not None:
            return self._indices(g, keep)
        assert ratio is not None
        if not 0 <= ratio < 1:
            raise ConstraintError(
                "the ratio is out of range", node=g.name, expected="a share of at least 0 and below 1", found=ratio
            )
        return self._best(g, max(round(g.size * (1 - ratio)), 1))

    def _best(self, g: AxisGroup, n: int) -> np.ndarray:
        """The n most important indices of those that are left."""
        now = self._now(g)
        if g not in self._scores:
            raise ConstraintError(
                "the criterion cannot judge this group", node=g.name, hint="name the indices, or take another criterion"
            )
        return now[keep_best(self._scores[g][now], n)] if n > 0 else now[:0]

    def _indices(self, g: AxisGroup, indices: Sequence[int], empty: bool = False) -> np.ndarray:
        found = np.asarray(indices, dtype=np.int64).reshape(-1)
        if (not empty and not len(found)) or (len(found) and (found.min() < 0 or found.max() >= g.size)):
            raise ConstraintError(
                "indices are empty or out of range" if len(found) else "the group would vanish",
                node=g.name,
                expected=f"indices in 0..{g.size - 1}, at least one",
                found=found.tolist()[:8],
                hint="name indices of the group as it was in the model that came in",
            )
        return np.unique(found)
