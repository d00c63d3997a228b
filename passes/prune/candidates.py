"""Which axis groups may be cut, and why each of the others may not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import TypeAlias

from ...graph.errors import ConstraintError
from ...graph.groups import AxisGroup, AxisGroups
from ...graph.ir import Graph, Node
from ..base import Decision
from .kinds import chosen_kinds, kinds

Atoms: TypeAlias = str | Sequence[str]
"""``"outer"``, ``"all"``, or kinds of groups (see :data:`.kinds.KINDS`), wildcards allowed."""


def candidates(
    groups: AxisGroups,
    ignore: Sequence[str],
    atoms: Atoms,
    decisions: list[Decision],
    ignore_types: Sequence[str] = (),
) -> list[AxisGroup]:
    """The groups that may be cut; for every other one the decision says why not.

    Args:
        groups: of the graph.
        ignore: patterns of names (see :func:`matches`) whose groups stay whole.
        atoms: ``"outer"`` leaves out groups nested in others, ``"all"`` takes both, kinds take those kinds only,
            nested or not.
        decisions: receives one entry per group that is left out.
        ignore_types: patterns of layer types (see :func:`types_of`) whose groups stay whole.

    Raises:
        ConstraintError: a pattern or a kind matches nothing.
    """
    by_kind = None if atoms in ("outer", "all") else chosen_kinds(atoms)
    kind_of: Mapping[AxisGroup, str] = {} if by_kind is None else kinds(groups)
    unused, unused_types = set(ignore), set(ignore_types)
    chosen = []
    for g in groups:
        hit = [p for p in ignore if matches(p, g)]
        names = set(types_of(groups.graph, g)) if ignore_types else set()
        typed = [p for p in ignore_types if any(fnmatchcase(n, p) for n in names)]
        unused -= set(hit)
        unused_types -= set(typed)
        why = ""
        if not g.can("select"):
            why = f"frozen: {g.why()}"
        elif hit:
            why = f"ignored by {hit[0]!r}"
        elif typed:
            why = f"ignored by its type, {typed[0]!r}"
        elif by_kind is not None and kind_of[g] not in by_kind:
            why = f"of kind {kind_of[g]}, which atoms does not name"
        elif g.nested and atoms == "outer":
            why = "nested in a group that can be cut itself"
        elif not any(m.role in ("produces", "both", "consumes") for m in g.members):
            why = "no weight produces or consumes it"
        if why:
            data = {"size": g.size, "members": [m.label for m in g.members]}
            decisions.append(Decision(g.name, "kept", why, data))
        else:
            chosen.append(g)
    if unused:
        raise unmatched("an ignore pattern", "ignore", unused)
    if unused_types:
        raise ConstraintError(
            "an ignored type matches nothing",
            node="ignore_types",
            value=sorted(unused_types)[0],
            expected=", ".join(sorted({n for g in groups for n in types_of(groups.graph, g)})),
            hint="take one of these names (wildcards allowed), or leave the pattern out",
        )
    if by_kind is not None and not any(kind in by_kind for kind in kind_of.values()):
        raise ConstraintError(
            "this model has no axis group of the kinds asked for",
            node="atoms",
            value=", ".join(by_kind),
            found=", ".join(sorted(set(kind_of.values()))),
            hint="name kinds that the model has, or take atoms='outer' or 'all'",
        )
    return chosen


def unmatched(what: str, option: str, patterns: Iterable[str]) -> ConstraintError:
    """The error for name patterns that match no group."""
    return ConstraintError(
        f"{what} matches nothing",
        node=option,
        value=sorted(patterns)[0],
        expected="a weight name, module path or group name (wildcards allowed)",
        hint="`foldline inspect MODEL` lists the names",
    )


def matches(pattern: str, g: AxisGroup) -> bool:
    """Whether a pattern (fnmatch) names the group, one of its weights or a module that holds one.

    The name may be taken from any member (``weight:axis``): another capture of the model may name the group so.
    """
    names = [(a, m.axis) for m in g.members for a in (m.weight.name, *m.weight.aliases)]
    if fnmatchcase(g.name, pattern) or any(fnmatchcase(f"{n}:{axis}", pattern) for n, axis in names):
        return True
    return any(matches_name(pattern, n) for n, _ in names)


def matches_name(pattern: str, name: str) -> bool:
    """Whether a pattern names this dotted path or a part of it that holds it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))


def overridden(
    chosen: Iterable[AxisGroup], overrides: Mapping[str, float], everything: Iterable[AxisGroup]
) -> dict[AxisGroup, float]:
    """The ratio that a pattern sets for a group; the first pattern that matches decides.

    Raises:
        ConstraintError: a pattern matches no group at all, or a ratio is out of range.
    """
    for pattern, ratio in overrides.items():
        if not 0 <= ratio < 1:
            raise ConstraintError(
                "the ratio of an override is out of range",
                node=pattern,
                expected="a share between 0 (kept whole) and 1",
                found=ratio,
                hint="give the share that goes: 0.3 drops 30 %, 0 keeps the group whole",
            )
    idle = {p for p in overrides if not any(matches(p, g) for g in everything)}
    if idle:
        raise unmatched("an override", "overrides", idle)
    found = {}
    for g in chosen:
        hit = next((p for p in overrides if matches(p, g)), None)
        if hit is not None:
            found[g] = overrides[hit]
    return found


# ---- types ---------------------------------------------------------------------------------------------------------
def types_of(graph: Graph, g: AxisGroup) -> Iterator[str]:
    """What the layers that hold the group's weights are called: canonical op, native op, module classes.

    A convolution of one input channel per group is also a ``depthwise_conv``, any with groups a ``grouped_conv``. The
    classes are those of the module that makes the call and of the modules around it (nn.Module models).
    """
    for m in g.members:
        for node, _ in () if m.weight.value is None else m.weight.value.uses:
            yield from _node_types(graph, node)


def _node_types(graph: Graph, node: Node) -> Iterator[str]:
    yield node.op
    yield node.origin
    parts = node.origin.split(".")
    if len(parts) > 2:
        yield parts[1]  # aten.conv2d.default
    if node.op == "conv" and node.attrs.get("groups", 1) > 1:
        yield "grouped_conv"
        weight = node.inputs[1]
        if weight is not None and weight.hint is not None and weight.hint[1] == 1:
            yield "depthwise_conv"
    module = getattr(getattr(graph, "source", None), "module", None)
    path = node.scope
    while module is not None and path:
        with suppress(AttributeError):  # a scope may name a call, not a module of the tree
            yield type(module.get_submodule(path)).__name__
        path = path.rpartition(".")[0]


# ---- equal widths --------------------------------------------------------------------------------------------------
def equal_classes(
    groups: AxisGroups, chosen: Sequence[AxisGroup], equal: bool | Sequence[str]
) -> list[list[AxisGroup]]:
    """Groups that must keep the same number of indices: those of one size and one kind, or of one size and pattern.

    ``True``: every kind. Else each entry is a kind (or a pattern of kinds: ``head_dim*`` ties queries and values) or a
    pattern of names.

    Raises:
        ConstraintError: an entry matches no group.
    """
    if not equal:
        return []
    kind_of = kinds(groups)
    found: dict[tuple[str, int], list[AxisGroup]] = {}
    wanted: Sequence[str] = sorted(set(kind_of.values())) if equal is True else list(equal)
    taken: set[AxisGroup] = set()
    for entry in wanted:
        members = [g for g in groups if fnmatchcase(kind_of[g], entry) or matches(entry, g)]
        if not members:
            raise unmatched("an entry of equal", "equal", [entry])
        for g in members:
            if g in chosen and g not in taken:
                found.setdefault((entry, g.size), []).append(g)
                taken.add(g)
    return [members for members in found.values() if len(members) > 1]
