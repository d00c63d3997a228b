"""How many indices a group may keep: blocks that keep its axes multiples of a number, and the least that must stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import gcd, prod

import numpy as np

from ...graph.groups import AxisGroup
from ...graph.space import Atom, Leaf, Space, Sum, atoms, norm


class Widths:
    """The legal sizes of groups that are pruned together.

    Args:
        chosen: the groups that may be cut.
        round_to: every axis that is cut stays a multiple of it, as far as it was one before; at least one block.
        min_keep: indices that stay at least.

    A group is cut in steps of so many indices that all its axes keep to ``round_to``: with heads of 64 a head is a
    block of its own; where head dims are cut too, they keep to blocks first and then heads need not.
    """

    def __init__(self, chosen: Iterable[AxisGroup], round_to: int = 1, min_keep: int = 1) -> None:
        self.round_to = round_to
        self.min_keep = min_keep
        self._steps: dict[Atom, int] = {}
        groups = {g.atom: g for g in chosen}
        if round_to > 1:
            inside = _inside(groups.values())
            # An inner factor is settled before the outer one, which may then count on its steps.
            for atom in sorted(groups, key=lambda a: len(inside.get(a, ()))):
                self._steps[atom] = self._step(groups[atom], groups)

    def _step(self, g: AxisGroup, chosen: dict[Atom, AxisGroup]) -> int:
        def factor(atom: Atom) -> int:
            """A number that the size of another atom is a multiple of, whatever is selected there."""
            if atom not in chosen:
                return atom.size
            return gcd(self._steps.get(atom, 1), atom.size)  # it may stay whole, too

        slab = 0
        for m in g.members:
            slab = gcd(slab, _repeats(norm(m.space), g.atom, factor))
        return self.round_to // gcd(self.round_to, max(slab, 1))

    def step(self, g: AxisGroup) -> int:
        """Indices per block."""
        return self._steps.get(g.atom, 1)

    def count(self, g: AxisGroup, wanted: float) -> int:
        """The legal size nearest to ``wanted`` indices: whole blocks (the smaller of two that are equally near), or
        the group as it is. Never nothing, never more than there are."""
        step = self.step(g)
        n = max(int(np.ceil(wanted / step - 0.5)), -(-self.min_keep // step), 1) * step
        return n if n < g.size and n - wanted <= g.size - wanted >= wanted - n else g.size

    def together(self, members: Iterable[AxisGroup], wanted: float) -> int:
        """As :meth:`count`, for groups of one size that must all keep the same number."""
        members = list(members)
        joint = Widths((), 1, self.min_keep)
        joint._steps[members[0].atom] = int(np.lcm.reduce([self.step(g) for g in members]))
        return joint.count(members[0], wanted)


def _inside(groups: Iterable[AxisGroup]) -> dict[Atom, set[Atom]]:
    """Per atom the atoms that are inner factors of a product with it."""
    found: dict[Atom, set[Atom]] = {}

    def walk(e: Space) -> None:
        if isinstance(e, Sum):
            for t in e.terms:
                walk(t)
        elif not isinstance(e, Leaf):
            for i, f in enumerate(e.factors):
                inner = {a for later in e.factors[i + 1 :] for a in atoms(later)}
                for a in atoms(f):
                    found.setdefault(a, set()).update(inner - {a})
                walk(f)

    for g in groups:
        for m in g.members:
            walk(norm(m.space))
    return found


def _repeats(e: Space, atom: Atom, factor: Callable[[Atom], int]) -> int:
    """A number that divides how many positions of an axis stand for one index of ``atom``, after any selection."""
    if isinstance(e, Leaf):
        return 1 if e.atom is atom else 0
    if isinstance(e, Sum):
        return sum(_repeats(t, atom, factor) for t in e.terms)
    here = [_repeats(f, atom, factor) for f in e.factors]
    if not any(here):
        return 0
    return prod(r or _length(f, factor) for r, f in zip(here, e.factors, strict=True))


def _length(e: Space, factor: Callable[[Atom], int]) -> int:
    """A number that divides the size of an expression after any selection."""
    if isinstance(e, Leaf):
        return factor(e.atom)
    if isinstance(e, Sum):
        return gcd(*(_length(t, factor) for t in e.terms))
    return prod(_length(f, factor) for f in e.factors)
