"""Refinement of index spaces: cutting, factoring, permuting, and unifying two expressions of one axis.

Unification *refines* atoms (cuts one into a sum, factors one into a product) until both sides have the same shape, and
then merges them (union-find with permutations). What an atom was refined into becomes its binding.
"""

from __future__ import annotations

from math import gcd

import numpy as np

from .space import FROZEN, UNIT, Leaf, Prod, Space, Sum, atoms, bind, fresh, make_prod, make_sum, mark, norm

MAX_RUNS = 64  # a permutation that scatters a composite space into more pieces than this is not followed


class Conflict(Exception):
    """Two views of one axis have no common refinement; the caller freezes both sides."""


# ---- permutation ---------------------------------------------------------------------------------------------
def permute(e: Space, perm: np.ndarray) -> Space:
    """The space whose position j is position ``perm[j]`` of ``e`` (``perm`` may also select a subset).

    Follows the permutation run by run; raises Conflict where it scatters a composite space too finely.
    """
    e = norm(e)
    n = len(perm)
    if n == e.size and bool((perm == np.arange(n)).all()):
        return e
    if isinstance(e, Leaf) and n == e.size:
        return Leaf(e.atom, perm if e.perm is None else e.perm[perm])
    if n == e.size and bool((perm == np.arange(n)[::-1]).all()):
        return _reverse(e)
    breaks = np.flatnonzero(np.diff(perm) != 1) + 1
    if len(breaks) >= MAX_RUNS:
        raise Conflict("the index list scatters the axis into too many pieces")
    pieces = [slice_space(e, int(run[0]), int(run[-1]) + 1) for run in np.split(perm, breaks)]
    return norm(make_sum(pieces))


def _reverse(e: Space) -> Space:
    if isinstance(e, Leaf):
        back = np.arange(e.size)[::-1]
        return Leaf(e.atom, back if e.perm is None else e.perm[::-1])
    if isinstance(e, Sum):
        return Sum(tuple(_reverse(t) for t in reversed(e.terms)))
    return make_prod([_reverse(f) for f in e.factors])


# ---- refinement ----------------------------------------------------------------------------------------------
def cut(e: Space, k: int) -> tuple[Space, Space]:
    """Cut an expression after ``k`` positions (0 < k < size), refining atoms where the cut falls inside one."""
    e = norm(e)
    if isinstance(e, Leaf):
        a = e.atom
        if e.perm is None:
            left, right = fresh(k), fresh(a.size - k)
            bind(a, Sum((left, right)))
            return left, right
        return permute_cut(e, k)
    if isinstance(e, Sum):
        done: list[Space] = []
        for i, t in enumerate(e.terms):
            if k == 0:
                return make_sum(done), make_sum(e.terms[i:])
            if k < t.size:
                left, right = cut(t, k)
                return make_sum([*done, left]), make_sum([right, *map(norm, e.terms[i + 1 :])])
            done.append(t)
            k -= t.size
        raise AssertionError("cut beyond the end")
    head, rest = e.factors[0], make_prod(e.factors[1:])
    q, r = divmod(k, rest.size)
    if r == 0:
        left, right = cut(head, q)
        rest = norm(rest)
        return make_prod([left, rest]), make_prod([right, rest])
    # The cut falls inside slab q: that slab is set apart, and the inner factor is cut (everywhere).
    before = slice_space(head, 0, q)
    slice_space(head, q, q + 1)
    after = slice_space(head, q + 1, head.size)
    inner_left, inner_right = cut(rest, r)
    rest = norm(rest)
    return (
        make_sum([make_prod([norm(before), rest]), inner_left] if q else [inner_left]),
        make_sum([inner_right, make_prod([norm(after), rest])] if q + 1 < head.size else [inner_right]),
    )


def permute_cut(leaf: Leaf, k: int) -> tuple[Space, Space]:
    """Cut a permuted atom: refine the atom into the runs of the permutation first."""
    assert leaf.perm is not None
    perm, n = leaf.perm, leaf.size
    step = -1 if perm[0] > perm[-1] else 1
    ends = {0, n}
    for part in (perm[:k], perm[k:]):
        breaks = np.flatnonzero(np.diff(part) != step) + 1
        if len(breaks) >= MAX_RUNS:
            raise Conflict("a permuted axis is cut into too many pieces")
        for run in np.split(part, breaks):
            ends.update((int(run.min()), int(run.max()) + 1))
    points = sorted(ends)
    parts = tuple(fresh(b - a) for a, b in zip(points, points[1:], strict=False))
    bind(leaf.atom, Sum(parts))
    start = {a: i for i, a in enumerate(points[:-1])}
    out: list[list[Space]] = [[], []]
    j = 0
    while j < n:
        lowest = int(perm[j])
        i = start.get(lowest) if step == 1 else None
        if i is None:
            i = max(x for x, a in enumerate(points[:-1]) if a <= lowest)
        piece = parts[i]
        whole = perm[j : j + piece.size]
        if step == -1 and piece.size > 1:
            piece = _reverse(piece)
        elif piece.size > 1 and int(whole[0]) != points[i]:
            raise Conflict("a permuted axis is cut irregularly")
        out[0 if j < k else 1].append(piece)
        j += piece.size
    return make_sum(out[0]), make_sum(out[1])


def slice_space(e: Space, start: int, end: int) -> Space:
    """Positions ``start`` to ``end`` (exclusive) of an expression."""
    e = norm(e)
    if start > 0:
        if start >= e.size:
            return Sum(())
        e, end = cut(e, start)[1], end - start
    if end <= 0:
        return Sum(())
    return norm(e) if end >= e.size else cut(e, end)[0]


def factor(e: Space, inner: int) -> tuple[Space, Space]:
    """Write an expression as outer * inner with the given inner size (which divides its size).

    Raises Conflict where no refinement of the atoms does that.
    """
    e = norm(e)
    outer = e.size // inner
    if inner == 1:
        return e, UNIT
    if outer == 1:
        return UNIT, e
    if isinstance(e, Leaf):
        if e.perm is not None:
            raise Conflict("a permuted axis is reshaped")
        left, right = fresh(outer), fresh(inner)
        bind(e.atom, Prod((left, right)))
        return left, right
    if isinstance(e, Prod):
        done: list[Space] = []
        need = inner
        for i in range(len(e.factors) - 1, -1, -1):
            f = e.factors[i]
            if need % f.size == 0:
                done.insert(0, f)
                need //= f.size
            elif f.size % need == 0:
                left, right = factor(f, need)
                return make_prod([*map(norm, e.factors[:i]), left]), make_prod([right, *map(norm, done)])
            else:
                break
            if need == 1:
                return make_prod(e.factors[:i]), make_prod(done)
    elif all(t.size % inner == 0 for t in e.terms):
        pairs = [factor(t, inner) for t in e.terms]
        for _, other in pairs[1:]:
            unify(pairs[0][1], other)
        return norm(make_sum([left for left, _ in pairs])), norm(pairs[0][1])
    if outer > MAX_RUNS:
        raise Conflict(f"an axis of {e.size} made of {e!r} is seen as {outer} x {inner}")
    # Last resort: cut into `outer` equal slices and tie them; the outer index is no longer free.
    pieces = [slice_space(e, i * inner, (i + 1) * inner) for i in range(outer)]
    for p in pieces[1:]:
        unify(pieces[0], p)
    return Sum((UNIT,) * outer), norm(pieces[0])


# ---- unification ---------------------------------------------------------------------------------------------
def unify(a: Space, b: Space) -> None:
    """Make two expressions of equal size stand for the same indices. Raises Conflict where they cannot."""
    work = [(a, b)]
    conflicts: list[str] = []
    while work:
        a, b = work.pop()
        a, b = norm(a), norm(b)
        if a is b:
            continue
        if a.size != b.size:
            raise Conflict(f"sizes {a.size} and {b.size} differ")
        if isinstance(b, Leaf) and not isinstance(a, Leaf):
            a, b = b, a
        try:
            if isinstance(a, Leaf):
                _unify_leaf(a, b)
            elif isinstance(a, Prod) and isinstance(b, Prod):
                pairs, misfit = _align_products(a, b)
                work.extend(pairs)
                if misfit:
                    conflicts.append(misfit)
            else:
                work.extend(_align_sums(a, b))
        except Conflict as c:
            conflicts.append(str(c))
            for side in (a, b):
                mark(side, FROZEN, f"seen in two ways that do not fit: {c}", "")
    if conflicts:
        raise Conflict(conflicts[0])


def _unify_leaf(a: Leaf, b: Space) -> None:
    if isinstance(b, Leaf):
        if a.atom is b.atom:
            pa = np.arange(a.size) if a.perm is None else a.perm
            pb = np.arange(a.size) if b.perm is None else b.perm
            if not bool((pa == pb).all()):
                raise Conflict("tied to a permutation of itself")
            return
        if a.perm is None and b.perm is None:
            bind(a.atom, b)
            return
        pb = np.arange(b.size) if b.perm is None else b.perm
        perm = np.empty_like(pb)
        perm[np.arange(a.size) if a.perm is None else a.perm] = pb
        bind(a.atom, Leaf(b.atom, None if bool((perm == np.arange(len(perm))).all()) else perm))
        return
    if a.atom in atoms(b):
        raise Conflict("tied to a part of itself")
    if a.perm is not None:
        inverse = np.empty_like(a.perm)
        inverse[a.perm] = np.arange(a.size)
        b = permute(b, inverse)
    bind(a.atom, b)


def _align_sums(a: Space, b: Space) -> list[tuple[Space, Space]]:
    pairs: list[tuple[Space, Space]] = []
    while True:
        a, b = norm(a), norm(b)
        if not (isinstance(a, Sum) or isinstance(b, Sum)):
            pairs.append((a, b))
            return pairs
        step = min(x.terms[0].size for x in (a, b) if isinstance(x, Sum))
        if step == a.size:
            pairs.append((a, b))
            return pairs
        left_a, rest_a = cut(a, step)
        left_b, rest_b = cut(norm(b), step)
        pairs.append((left_a, left_b))
        a, b = rest_a, rest_b


def _align_products(a: Prod, b: Prod) -> tuple[list[tuple[Space, Space]], str]:
    """Pairs of factors to unify, from the innermost outwards, and the reason why the outer rest does not fit ("")."""
    pairs: list[tuple[Space, Space]] = []
    left, right = list(a.factors), list(b.factors)
    while left and right:
        x, y = norm(left.pop()), norm(right.pop())
        if isinstance(x, Prod) or isinstance(y, Prod):
            left.extend(x.factors if isinstance(x, Prod) else (x,))
            right.extend(y.factors if isinstance(y, Prod) else (y,))
            continue
        g = gcd(x.size, y.size)
        if g == 1:
            misfit = f"grouped by {x.size} and by {y.size}, which share no divisor"
            for e in (*left, x, *right, y):
                mark(e, FROZEN, misfit, "")
            return pairs, misfit
        if x.size != g:
            outer, x = factor(x, g)
            left.append(outer)
        if y.size != g:
            outer, y = factor(norm(y), g)
            right.append(outer)
        pairs.append((x, y))
    return pairs, ""
