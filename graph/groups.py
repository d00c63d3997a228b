"""Axis groups: all (weight, axis) pairs that share one atom, what may be done to them, and why not where not."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .analysis import INEXACT, Analysis, analyse
from .errors import ConstraintError
from .ir import Graph, Weight
from .positions import coordinates
from .space import FROZEN, Atom, Leaf, Mark, Prod, Space, Sum, mark, norm

if TYPE_CHECKING:
    import networkx

    from .plans import Plan

ACTIONS = FROZEN


@dataclass(frozen=True)
class Member:
    """One (weight, axis) of a group.

    Attributes:
        role: ``"produces"`` (rows that make the indices), ``"consumes"`` (columns that read them), ``"carries"``
            (gains, statistics, tables: one entry per index) or ``"both"``.
        space: index-space expression of the whole axis.
        stat: a running statistic.
    """

    weight: Weight
    axis: int
    role: str
    space: Space
    stat: bool = False

    def positions(self, atom: Atom) -> np.ndarray:
        """For each position of the axis the group index it stands for, -1 for none. int64, length of the axis."""
        return coordinates(self.space, atom)

    @property
    def label(self) -> str:
        return f"{self.weight.name}[{self.axis}]"


@dataclass(eq=False)
class AxisGroup:
    """All (weight, axis, slab) that mention one atom: the indices that can only be acted on together.

    Attributes:
        name: ``weight:axis`` of its first producer, with ``#k`` where that axis holds several groups.
        size: number of indices.
        members: where they occur, in graph order.
        nested: the atom is an inner factor of a product whose outer factor can be selected itself (head dim under
            heads, channels of a group under groups).
    """

    name: str
    atom: Atom
    members: list[Member] = field(default_factory=list)
    nested: bool = False

    @property
    def size(self) -> int:
        return self.atom.size

    @property
    def frozen(self) -> dict[str, list[Mark]]:
        """Forbidden actions with their (reason, node) pairs."""
        return {k: v for k, v in self.atom.marks.items() if k in ACTIONS}

    def can(self, action: str) -> bool:
        """Whether ``"select"``, ``"permute"`` or ``"scale"`` is legal here."""
        return self.size > 1 and action not in self.atom.marks

    @property
    def exact(self) -> bool:
        """Selecting equals zeroing the removed slabs: no statistic (mean, variance, maximum) is taken over them."""
        return INEXACT not in self.atom.marks

    def why(self, action: str = "select") -> str:
        """The reason why an action is forbidden, or why it is not exact; "" if it is free."""
        if self.size < 2:
            return "a single index"
        reasons = self.atom.marks.get(action, [])
        return "; ".join(f"{r} ({n})" if n else r for r, n in reasons)

    def __repr__(self) -> str:
        state = "" if self.can("select") else f", frozen: {self.why()}"
        return f"AxisGroup({self.name!r}, size={self.size}, members={[m.label for m in self.members]}{state})"


class AxisGroups:
    """The axis groups of a graph, in graph order: iterable, printable, explainable.

    Holds the analysis they come from; it is valid until the graph is edited.
    """

    def __init__(self, graph: Graph, analysis: Analysis) -> None:
        self.graph = graph
        self.analysis = analysis
        self.groups: list[AxisGroup] = []
        self._by_atom: dict[Atom, AxisGroup] = {}
        self._axes: dict[tuple[Weight, int], list[AxisGroup]] = {}
        self._collect()

    def __iter__(self) -> Iterator[AxisGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> AxisGroup:
        for g in self.groups:
            if g.name == name:
                return g
        near = difflib.get_close_matches(name, [g.name for g in self.groups], 1)
        raise ConstraintError(
            "no such axis group",
            node=name,
            hint=f"did you mean {near[0]!r}?" if near else "print the groups to see them",
        )

    def of(self, weight: str | Weight, axis: int) -> list[AxisGroup]:
        """The groups that one weight axis mentions, outermost first."""
        w = self.graph.weight(weight) if isinstance(weight, str) else weight
        return self._axes.get((w, axis % max(len(w.shape), 1)), [])

    def by_atom(self, atom: Atom) -> AxisGroup | None:
        return self._by_atom.get(atom)

    def complete(self, given: Plan | Mapping[str, Mapping[int, Sequence[int]]]) -> Plan:
        """The whole plan that follows from ``{weight: {axis: kept indices}}`` of one axis per group (or more).

        Raises:
            ConstraintError: indices that do not exist, axes that disagree, or a group that cannot be cut.
        """
        from .plans import complete

        return complete(self, given)

    # ---- building ------------------------------------------------------------------------------------------------
    def _collect(self) -> None:
        an = self.analysis
        roles = self._roles()
        inner: dict[Atom, set[Atom]] = {}
        for w in self.graph.weights.values():
            if w.value is None or w.value not in an.spaces:
                continue
            for axis, e in enumerate(an.spaces[w.value]):
                self._collect_axis(w, axis, norm(e), roles, inner)
        for g in self.groups:
            first = next((m for m in g.members if m.role in ("produces", "both")), g.members[0])
            there = self._axes[first.weight, first.axis]
            name = f"{first.weight.name}:{first.axis}"
            g.name = f"{name}#{there.index(g)}" if len(there) > 1 else name
        for g in self.groups:
            if not any(m.role in ("produces", "both") for m in g.members):
                mark(Leaf(g.atom), ("scale",), "no weight produces these indices", "")
            g.nested = any((o := self._by_atom.get(a)) is not None and o.can("select") for a in inner.get(g.atom, ()))

    def _collect_axis(
        self, w: Weight, axis: int, e: Space, roles: dict[tuple[Weight, int], _AxisRoles], inner: dict[Atom, set[Atom]]
    ) -> None:
        found: dict[Atom, None] = {}
        _walk(e, (), found, inner)
        here = roles.get((w, axis))
        for atom in found:
            group = self._by_atom.get(atom)
            if group is None:
                group = self._by_atom[atom] = AxisGroup("", atom)
                self.groups.append(group)
            exponents = here.of(atom) if here else set()
            if not exponents:
                mark(Leaf(atom), ("scale",), f"part of {w.name} in the computation is not linear", "")
            elif len(exponents) > 1:
                mark(Leaf(atom), ("scale",), f"{w.name} is used where it would have to scale in different ways", "")
            role = (
                "both"
                if {1, -1} <= exponents
                else "produces"
                if 1 in exponents
                else "consumes"
                if -1 in exponents
                else "carries"
            )
            group.members.append(Member(w, axis, role, e, bool(here and here.stat)))
            self._axes.setdefault((w, axis), []).append(group)

    def _roles(self) -> dict[tuple[Weight, int], _AxisRoles]:
        table: dict[tuple[Weight, int], _AxisRoles] = {}
        for r in self.analysis.roles:
            entry = table.setdefault((r.weight, r.axis), _AxisRoles())
            entry.stat = entry.stat or r.stat
            use = entry.uses.setdefault(r.node.name, {})
            for atom in {leaf.atom for leaf in _leaves(norm(r.space))}:
                use[atom] = use.get(atom, 0) + r.exponent
        return table

    # ---- reading ---------------------------------------------------------------------------------------------------
    def explain(self, layer: str, axis: int | None = None) -> str:
        """What a layer's (or weight's) axes are tied to, and why they are frozen where they are.

        Args:
            layer: module path (``"layer1.conv1"``), weight name or group name.
            axis: one axis, or None for all.
        """
        weights = [
            w
            for w in self.graph.weights.values()
            if any(a == layer or a.rsplit(".", 1)[0] == layer for a in (w.name, *w.aliases))
        ]
        if not weights and any(g.name == layer for g in self.groups):
            return self._describe(self[layer])
        if not weights:
            near = difflib.get_close_matches(layer, [n.rsplit(".", 1)[0] for n in self.graph.weights], 1)
            raise ConstraintError(
                "no such layer or weight",
                node=layer,
                hint=f"did you mean {near[0]!r}?" if near else "see `foldline inspect`",
            )
        lines = []
        for w in weights:
            for i in range(len(w.shape)):
                if axis is not None and i != axis % len(w.shape):
                    continue
                value = w.value
                if value is None or value not in self.analysis.spaces:
                    lines.append(f"{w.name}[{i}]: not used by the graph")
                    continue
                e = norm(self.analysis.spaces[value][i])
                lines.append(f"{w.name}[{i}] ({w.shape[i]}) = {self._pretty(e)}")
                if not self.of(w, i):
                    lines.append("  only single indices, told apart by how the graph cuts them: nothing to select")
                for g in self.of(w, i):
                    lines.extend("  " + line for line in self._describe(g).splitlines())
        return "\n".join(lines)

    def _describe(self, g: AxisGroup) -> str:
        lines = [f"group {g.name}: {g.size} indices, {len(g.members)} members"]
        for action in ACTIONS:
            lines.append(f"  {action}: {'free' if g.can(action) else 'frozen: ' + g.why(action)}")
        if not g.exact:
            lines.append(f"  not exact when selected: {g.why(INEXACT)}")
        if g.nested:
            lines.append("  nested: inner factor of a product whose outer group can be selected")
        shown = g.members[:12]
        lines += [f"  {m.role:9s} {m.label}" for m in shown]
        if len(g.members) > len(shown):
            lines.append(f"  ... and {len(g.members) - len(shown)} more")
        return "\n".join(lines)

    def _pretty(self, e: Space) -> str:
        if isinstance(e, Leaf):
            g = self._by_atom.get(e.atom)
            return f"<{g.name if g else e.atom}: {e.size}>" + ("~" if e.perm is not None else "")
        if isinstance(e, Sum):
            return "(" + " + ".join(self._pretty(t) for t in e.terms) + ")"
        return " * ".join(self._pretty(f) for f in e.factors) if e.factors else "1"

    def space(self, weight: str, axis: int) -> str:
        """The index-space expression of a weight axis, with group names for atoms."""
        w = self.graph.weight(weight)
        assert w.value is not None
        return self._pretty(norm(self.analysis.of(w.value)[axis]))

    def to_networkx(self) -> networkx.Graph:
        """Bipartite graph: group nodes (size, frozen) and (weight, axis) nodes, an edge per member."""
        import networkx as nx

        out: networkx.Graph = nx.Graph()
        for g in self.groups:
            out.add_node(g.name, kind="group", size=g.size, frozen=not g.can("select"), reason=g.why())
            for m in g.members:
                out.add_node(m.label, kind="axis", weight=m.weight.name, axis=m.axis)
                out.add_edge(g.name, m.label, role=m.role)
        return out

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain data for reports: name, size, members, actions and reasons of every group."""
        return [
            {
                "name": g.name,
                "size": g.size,
                "members": [{"weight": m.weight.name, "axis": m.axis, "role": m.role} for m in g.members],
                "actions": [a for a in ACTIONS if g.can(a)],
                "reason": g.why(),
                "exact": g.exact,
                "nested": g.nested,
            }
            for g in self.groups
        ]

    @cached_property
    def opaque(self) -> list[tuple[str, str]]:
        """(node, reason) for every node the analysis could not follow."""
        return [(n.name, r) for n, r in self.analysis.opaque]

    def __str__(self) -> str:
        free = [g for g in self.groups if g.can("select")]
        lines = [f"{len(self.groups)} axis groups, {len(free)} selectable"]
        hidden = [
            g
            for g in self.groups
            if all(r == "kernel axis" for r, _ in g.atom.marks.get("select", ())) and not g.can("select")
        ]
        for g in self.groups:
            if g in hidden:
                continue
            state = ("nested" if g.nested else "free") if g.can("select") else f"frozen: {g.why()}"
            members = ", ".join(m.label for m in g.members[:4]) + (" ..." if len(g.members) > 4 else "")
            lines.append(f"  {g.name:40s} {g.size:6d}  {state:12s}  {members}")
        if hidden:
            lines.append(f"  ({len(hidden)} kernel axes not shown)")
        return "\n".join(lines)


class _AxisRoles:
    """Exponents per use of one weight axis."""

    def __init__(self) -> None:
        self.uses: dict[str, dict[Atom, int]] = {}
        self.stat = False

    def of(self, atom: Atom) -> set[int]:
        return {use[atom] for use in self.uses.values() if atom in use}


def _leaves(e: Space) -> Iterator[Leaf]:
    if isinstance(e, Leaf):
        yield e
    else:
        for part in e.terms if isinstance(e, Sum) else e.factors:
            yield from _leaves(part)


def _walk(e: Space, outer: tuple[Atom, ...], found: dict[Atom, None], inner: dict[Atom, set[Atom]]) -> None:
    """Collect atoms in order, and for each the atoms it is an inner factor of."""
    if isinstance(e, Leaf):
        found[e.atom] = None
        if outer:
            inner.setdefault(e.atom, set()).update(outer)
    elif isinstance(e, Sum):
        for t in e.terms:
            _walk(t, outer, found, inner)
    elif isinstance(e, Prod):
        for f in e.factors:
            _walk(f, outer, found, inner)
            outer = (*outer, *{leaf.atom for leaf in _leaves(f)})


def axis_groups(graph: Graph) -> AxisGroups:
    """Find the axis groups of a graph. Reads shapes only: weights may be on the meta device."""
    return AxisGroups(graph, analyse(graph))
