"""Which axis groups may be cut, and why each of the others may not."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

from ...graph.errors import ConstraintError
from ...graph.groups import AxisGroup, AxisGroups
from ..base import Decision


def candidates(
    groups: AxisGroups, ignore: Sequence[str], atoms: Literal["outer", "all"], decisions: list[Decision]
) -> list[AxisGroup]:
    """The groups that may be cut; for every other one the decision says why not.

    Raises:
        ConstraintError: an ignore pattern matches nothing.
    """
    unused = set(ignore)
    chosen = []
    for g in groups:
        hit = [p for p in ignore if matches(p, g)]
        unused -= set(hit)
        if not g.can("select"):
            decisions.append(Decision(g.name, "kept", f"frozen: {g.why()}", {"size": g.size}))
        elif hit:
            decisions.append(Decision(g.name, "kept", f"ignored by {hit[0]!r}", {"size": g.size}))
        elif g.nested and atoms == "outer":
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


def matches(pattern: str, g: AxisGroup) -> bool:
    """Whether a pattern (fnmatch) names the group, one of its weights or a module that holds one."""
    names = [g.name]
    for m in g.members:
        for n in (m.weight.name, *m.weight.aliases):
            parts = n.split(".")
            names += [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return any(fnmatchcase(n, pattern) for n in names)
