"""Index-space expressions: what the positions of one tensor axis stand for.

    space ::= atom(n) | space + space + ... (concatenation, ordered) | space * space * ... (row-major product)

An atom is a set of ``n`` indices nothing is known to divide. Ops unify expressions (refine.py), which binds atoms to
finer expressions; ``norm`` reads an expression through the bindings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from math import prod
from typing import TypeAlias

import numpy as np

Space: TypeAlias = "Leaf | Sum | Prod"
Mark: TypeAlias = tuple[str, str]  # (reason, node name)

FROZEN = ("select", "permute", "scale")  # the actions; a mark of such a kind forbids it
_ids = count()
_bound = [0]
"""How many atoms were bound so far."""


class Atom:
    """A set of ``size`` indices. ``marks`` maps a kind (an action that is forbidden, or a remark) to its reasons."""

    __slots__ = ("binding", "marks", "size", "uid")

    def __init__(self, size: int) -> None:
        self.uid = next(_ids)
        self.size: int = size
        self.binding: Space | None = None
        self.marks: dict[str, list[Mark]] = {}

    def __repr__(self) -> str:
        return f"a{self.uid}[{self.size}]"


class Leaf:
    """An occurrence of an atom; position j stands for the atom's index ``perm[j]`` (None: identity)."""

    __slots__ = ("atom", "perm", "size")

    def __init__(self, atom: Atom, perm: np.ndarray | None = None) -> None:
        self.atom = atom
        self.perm = perm
        self.size: int = atom.size

    def __repr__(self) -> str:
        return f"{self.atom!r}{'' if self.perm is None else '~'}"


class Sum:
    """Ordered concatenation of at least two spaces, none of them a Sum or empty."""

    __slots__ = ("epoch", "size", "terms")

    def __init__(self, terms: tuple[Space, ...]) -> None:
        self.terms = terms
        self.epoch = -1
        self.size: int = sum(t.size for t in terms)

    def __repr__(self) -> str:
        return "(" + " + ".join(map(repr, self.terms)) + ")"


class Prod:
    """Row-major product of spaces, none of them a Prod or of size 1; the empty product is the unit (size 1)."""

    __slots__ = ("epoch", "factors", "size")

    def __init__(self, factors: tuple[Space, ...]) -> None:
        self.factors = factors
        self.epoch = -1
        self.size: int = prod(f.size for f in factors)

    def __repr__(self) -> str:
        return "·".join(map(repr, self.factors)) if self.factors else "1"


UNIT = Prod(())


def fresh(size: int) -> Space:
    """A new atom of that many indices (the unit for 1)."""
    return UNIT if size == 1 else Leaf(Atom(size))


def make_sum(terms: Sequence[Space]) -> Space:
    flat: list[Space] = []
    for t in terms:
        if isinstance(t, Sum):
            flat.extend(t.terms)
        elif t.size:
            flat.append(t)
    return flat[0] if len(flat) == 1 else Sum(tuple(flat))


def make_prod(factors: Sequence[Space]) -> Space:
    flat: list[Space] = []
    for f in factors:
        if isinstance(f, Prod):
            flat.extend(f.factors)
        elif f.size != 1:
            flat.append(f)
    return flat[0] if len(flat) == 1 else Prod(tuple(flat)) if flat else UNIT


def norm(e: Space) -> Space:
    """The expression with every bound atom replaced by what it was refined into."""
    if isinstance(e, Leaf):
        bound = e.atom.binding
        if bound is None:
            return e
        bound = e.atom.binding = norm(bound)
        if e.perm is None:
            return bound
        from .refine import permute  # reading a permuted atom that was cut meanwhile may have to cut it further

        return permute(bound, e.perm)
    epoch = _bound[0]
    if e.epoch == epoch:
        return e
    parts = e.terms if isinstance(e, Sum) else e.factors
    new = [norm(p) for p in parts]
    if all([a is b for a, b in zip(parts, new, strict=True)]):
        if _bound[0] == epoch:
            e.epoch = epoch  # nothing to replace until another atom is bound
        return e
    return make_sum(new) if isinstance(e, Sum) else make_prod(new)


def leaves(e: Space) -> Iterator[Leaf]:
    """Every leaf of a normalised expression, in order, repeats included."""
    stack: list[Space] = [e]
    while stack:
        x = stack.pop()
        if isinstance(x, Leaf):
            yield x
        else:
            stack.extend(reversed(x.terms if isinstance(x, Sum) else x.factors))


def atoms(e: Space) -> dict[Atom, None]:
    """The unbound atoms of an expression, in order of first occurrence."""
    if type(e) is Leaf and e.atom.binding is None:
        return {e.atom: None}
    return {leaf.atom: None for leaf in leaves(norm(e))}


# ---- marks -----------------------------------------------------------------------------------------------------
def mark(e: Space, kinds: Sequence[str], reason: str, node: str) -> None:
    """Put a mark of each kind on every atom of the expression (at most four reasons are kept per kind)."""
    for a in atoms(e):
        for kind in kinds:
            reasons = a.marks.setdefault(kind, [])
            if len(reasons) < 4 and (reason, node) not in reasons:
                reasons.append((reason, node))


def _inherit(a: Atom, e: Space) -> None:
    if a.marks:
        for kind, reasons in a.marks.items():
            for reason, node in reasons:
                mark(e, (kind,), reason, node)


def bind(a: Atom, e: Space) -> None:
    """Refine atom ``a`` into ``e``; its marks move to the atoms of ``e``."""
    a.binding = e
    _bound[0] += 1
    _inherit(a, e)
