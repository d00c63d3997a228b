"""Plans as data: what a selection keeps per weight and axis, read, written, edited, completed and checked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from .errors import ConstraintError
from .groups import AxisGroup, AxisGroups, axis_groups
from .ir import Graph
from .positions import Selection, kept_positions
from .space import norm

PlanData: TypeAlias = dict[str, dict[int, list[int]]]


@dataclass
class Plan:
    """What a selection keeps, as data: ``{weight name: {axis: kept indices}}``; JSON round trips it.

    Applies to any checkpoint of the same model: weights, optimizer state, EMA copies (:func:`apply_plan`).

    Attributes:
        weights: kept indices per weight and axis, in their new order; each stored tensor once.
        shapes: of those weights before the plan.
        aliases: other names of tied weights, by the name that ``weights`` uses.
        unsaved: weights that no state dict holds (constants, non-persistent buffers).
    """

    weights: PlanData
    shapes: dict[str, list[int]]
    aliases: dict[str, list[str]] = field(default_factory=dict)
    unsaved: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, graph: Graph, weights: PlanData) -> Plan:
        """The plan of these selections in ``graph`` as it is before them."""
        plan = cls(weights, {}, {}, [])
        for name in weights:
            w = graph.weight(name)
            plan.shapes[name] = list(w.shape)
            if others := [a for a in w.aliases if a != name]:
                plan.aliases[name] = others
            if w.kind == "constant" or not any(graph.is_persistent(a) for a in (w.name, *w.aliases)):
                plan.unsaved.append(name)
        return plan

    def to_dict(self) -> PlanData:
        """The kept indices per weight and axis, as plain data."""
        return self.weights

    def to_json(self) -> str:
        data = {
            "format": "foldline-plan",
            "version": 1,
            "weights": {n: {str(a): k for a, k in sorted(axes.items())} for n, axes in sorted(self.weights.items())},
            "shapes": dict(sorted(self.shapes.items())),
            "aliases": dict(sorted(self.aliases.items())),
            "unsaved": sorted(self.unsaved),
        }
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Parse a plan. Raises ConstraintError if the text is not one."""
        try:
            data = json.loads(text)
            weights = {n: {int(a): [int(i) for i in k] for a, k in axes.items()} for n, axes in data["weights"].items()}
            shapes = {n: [int(i) for i in data["shapes"][n]] for n in weights}
            aliases = {n: [str(a) for a in names] for n, names in data.get("aliases", {}).items()}
            return cls(weights, shapes, aliases, [str(n) for n in data.get("unsaved", [])])
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ConstraintError(
                "not a foldline plan", found=repr(e), hint="pass the plan.json that a run wrote"
            ) from e

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """The plan in a file. Raises ConstraintError if there is none."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ConstraintError(
                f"the plan cannot be read: {e}", node=str(path), hint="pass the plan.json that a run wrote"
            ) from e
        return cls.from_json(text)

    def __bool__(self) -> bool:
        return bool(self.weights)

    def __repr__(self) -> str:
        axes = sum(len(a) for a in self.weights.values())
        return f"Plan({len(self.weights)} weights, {axes} axes)"

    # ---- names -------------------------------------------------------------------------------------------------
    def names(self, weight: str) -> list[str]:
        """All names of a planned weight."""
        return [weight, *self.aliases.get(weight, ())]

    def axes(self, name: str) -> dict[int, list[int]]:
        """What the weight of that name or alias keeps; {} if it stays whole."""
        if name in self.weights:
            return self.weights[name]
        return next((self.weights[n] for n, others in self.aliases.items() if name in others), {})

    def prefix_in(self, names: Iterable[str]) -> str:
        """What the holder of ``names`` puts before every name (``"module."`` in EMA copies), "" if nothing."""
        known = set(names)
        wanted = [self.names(n) for n in self.weights if n not in self.unsaved]
        if not wanted or any(n in known for n in wanted[0]):
            return ""
        prefixes = {k[: -len(n)] for n in wanted[0] for k in known if k.endswith(f".{n}")}
        fitting = [p for p in prefixes if all(any(p + n in known for n in group) for group in wanted)]
        return fitting[0] if len(fitting) == 1 else ""

    def prefixed(self, prefix: str) -> Plan:
        """The same plan with ``prefix`` before every name."""
        return Plan(
            {prefix + n: axes for n, axes in self.weights.items()},
            {prefix + n: shape for n, shape in self.shapes.items()},
            {prefix + n: [prefix + a for a in others] for n, others in self.aliases.items()},
            [prefix + n for n in self.unsaved],
        )

    # ---- by hand -----------------------------------------------------------------------------------------------
    def edit(self, weight: str, axis: int, kept: Sequence[int]) -> Plan:
        """A copy that keeps other indices of one weight axis: ``weight`` must be in the plan.

        The other members of the axis group stay as they were: :meth:`check` says which disagree, and
        ``groups.complete`` makes a plan of one axis per group.

        Raises:
            ConstraintError: the plan does not name this axis, or the indices are empty, repeated or out of range.
        """
        name = next((n for n in self.weights if weight in self.names(n)), None)
        if name is None or axis not in self.weights[name]:
            raise ConstraintError(
                "the plan does not name this axis",
                node=f"{weight}[{axis}]",
                hint="start from groups.complete({weight: {axis: kept}})",
            )
        edited = Plan({n: dict(axes) for n, axes in self.weights.items()}, self.shapes, self.aliases, self.unsaved)
        edited.weights[name][axis] = [int(i) for i in kept]
        _check_indices(edited, name, tuple(self.shapes[name]))
        return edited

    def check(self, model: Any, example_inputs: Any = None) -> dict[str, int]:
        """Whether the plan fits a model and is complete; returns {group name: indices kept}.

        Args:
            model: anything :func:`foldline.load` takes, a graph or AxisGroups.

        Raises:
            ConstraintError: another model; indices that do not exist; members of one axis group that disagree (the
                others and the indices they keep are named); a cut in a frozen group (the reason is named); a member
                that is left out.
        """
        groups = model if isinstance(model, AxisGroups) else _groups(model, example_inputs)
        kept = groups_of_plan(groups, self)
        full = plan_of(groups, {g.atom: k for g, k in kept.items()})
        for name, axes in full.weights.items():
            for axis, keep in axes.items():
                if self.axes(name).get(axis) != keep:
                    owner = next(g for g in groups.of(name, axis) if g in kept)
                    raise ConstraintError(
                        "the plan leaves out a member of an axis group that it cuts",
                        node=f"{name}[{axis}]",
                        expected=f"{len(keep)} indices kept, as group {owner.name!r} has them",
                        found=self.axes(name).get(axis, "all kept"),
                        hint="groups.complete(plan.weights) adds what follows from the rest",
                    )
        return {g.name: len(k) for g, k in kept.items()}


def _groups(model: Any, example_inputs: Any) -> AxisGroups:
    from .load import load

    graph = load(model, example_inputs, static=True)
    if not isinstance(model, Graph):
        graph.separate_shared()
    return axis_groups(graph)


def plan_of(groups: AxisGroups, selection: Selection) -> Plan:
    """The plan that keeps ``selection[atom]`` of each atom: every member's positions, nothing applied."""
    return as_plan(groups, positions_left(groups, selection))


def positions_left(groups: AxisGroups, selection: Selection) -> dict[str, dict[int, np.ndarray]]:
    """Per weight and axis the positions that are kept, read-only: axes that keep the same may share the array."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for atom in selection:
        group = groups.by_atom(atom)
        assert group is not None
        for m in group.members:
            axes = found.setdefault(m.weight.name, {})
            if m.axis not in axes:
                axes[m.axis] = kept_positions(m.space, selection)
                axes[m.axis].flags.writeable = False
    return found


def as_plan(groups: AxisGroups, left: Mapping[str, Mapping[int, np.ndarray]]) -> Plan:
    """The plan of :func:`positions_left`."""
    return Plan.of(groups.graph, {name: {a: k.tolist() for a, k in axes.items()} for name, axes in left.items()})


def complete(groups: AxisGroups, given: Plan | Mapping[str, Mapping[int, Sequence[int]]]) -> Plan:
    """The whole plan that follows from a part of it: every member of every group that the given axes cut.

    Raises:
        ConstraintError: as :func:`groups_of_plan`.
    """
    if not isinstance(given, Plan):
        weights: PlanData = {}
        for name, axes in given.items():
            rank = len(groups.graph.weight(name).shape)
            weights[groups.graph.weight(name).name] = {
                int(a) % max(rank, 1): [int(i) for i in kept] for a, kept in axes.items()
            }
        given = Plan.of(groups.graph, weights)
    return plan_of(groups, {g.atom: k for g, k in groups_of_plan(groups, given).items()})


def check_shape(plan: Plan, name: str, shape: Sequence[int], weight: str | None = None) -> None:
    """ConstraintError unless weight ``weight`` of the plan (called ``name`` here) had that shape before the plan."""
    expected = plan.shapes[weight or name]
    if list(expected) != list(shape):
        raise ConstraintError(
            "the plan is for another model",
            node=name,
            expected=f"shape {list(expected)}",
            found=f"shape {list(shape)}",
            hint="use the plan with the unpruned checkpoint of the model it was made for",
        )
    _check_indices(plan, weight or name, shape)


def _check_indices(plan: Plan, name: str, shape: Sequence[int]) -> None:
    for axis, keep in plan.weights[name].items():
        size = shape[axis] if 0 <= axis < len(shape) else 0
        if not keep or min(keep) < 0 or max(keep) >= size or len(set(keep)) < len(keep):
            raise ConstraintError(
                "indices to keep are empty, repeated or out of range",
                node=f"{name}[{axis}]",
                expected=f"distinct indices in 0..{size - 1}, at least one" if size else f"an axis of shape {shape}",
                found=list(keep)[:8],
                hint="list positions of this axis as it was before the plan; to drop all of it, remove the layer",
            )


def groups_of_plan(groups: AxisGroups, plan: Plan) -> dict[AxisGroup, np.ndarray]:
    """The indices each group keeps under a plan, in their new order.

    Raises:
        ConstraintError: the plan is for another model, its members disagree, or it cuts what cannot be cut.
    """
    known = {a for w in groups.graph.weights.values() for a in (w.name, *w.aliases)}
    plan = plan.prefixed(plan.prefix_in(known))
    chosen: dict[AxisGroup, list[int]] = {}
    said: dict[AxisGroup, str] = {}
    for name, axes in plan.weights.items():
        found = next((n for n in plan.names(name) if n in known), None)
        if found is None:
            raise ConstraintError(
                "the plan is for another model: it names a weight that this one lacks",
                node=name,
                hint="apply it to the model it was made for (same class and configuration, unpruned)",
            )
        w = groups.graph.weight(found)
        check_shape(plan, found, w.shape, name)
        for axis, keep in axes.items():
            for g in groups.of(w, axis):
                member = next(m for m in g.members if m.weight is w and m.axis == axis)
                at = member.positions(g.atom)[np.asarray(keep, dtype=np.int64)]
                indices = list(dict.fromkeys(at[at >= 0].tolist()))
                if g in chosen and chosen[g] != indices:
                    raise ConstraintError(
                        "the plan keeps different indices of one axis group",
                        node=f"{name}[{axis}]",
                        expected=f"group {g.name!r}: {_brief(chosen[g])}, as {said[g]} keeps",
                        found=_brief(indices),
                        hint="edit the plan so that all members agree: "
                        + ", ".join(m.label for m in g.members[:8])
                        + (" ..." if len(g.members) > 8 else ""),
                    )
                chosen[g] = indices
                said.setdefault(g, f"{name}[{axis}]")
    kept = {g: np.array(k, dtype=np.int64) for g, k in chosen.items() if k != list(range(g.size))}
    selection = {g.atom: k for g, k in kept.items()}
    for name, axes in plan.weights.items():
        w = groups.graph.weight(next(n for n in plan.names(name) if n in known))
        assert w.value is not None
        for axis, keep in axes.items():
            if kept_positions(norm(groups.analysis.of(w.value)[axis]), selection).tolist() != list(keep):
                cut = [g for g in groups.of(w, axis) if g in kept]
                raise ConstraintError(
                    "the plan cuts an axis where its group cannot be cut",
                    node=f"{name}[{axis}]",
                    expected=f"whole slabs of {', '.join(g.name for g in cut)}" if cut else "all indices kept",
                    found=_brief(list(keep)),
                    hint=f"groups.explain({name!r}, {axis}) shows how the axis is made up",
                )
    for g, k in kept.items():
        action = "select" if len(k) < g.size else "permute"
        ordered = action == "permute" or bool((np.diff(k) > 0).all())
        if not g.can(action) or (not ordered and not g.can("permute")):
            raise ConstraintError(
                f"the plan needs {action} on an axis group where it is not possible",
                node=g.name,
                found=g.why(action) or g.why("permute"),
                hint="leave the weights of this group out of the plan, or groups.explain(...) it",
            )
    return kept


def _brief(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:12]))
    return f"{len(indices)} kept: [{shown}{', ...' if len(indices) > 12 else ''}]"
