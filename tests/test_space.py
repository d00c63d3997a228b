"""Index-space expressions: cutting, factoring, permuting and unifying keep what every position stands for."""

from __future__ import annotations

import numpy as np
import pytest
from foldline.graph.positions import coordinates, kept_positions, size_after, spread
from foldline.graph.refine import Conflict, cut, factor, permute, unify
from foldline.graph.space import UNIT, Leaf, Prod, Space, Sum, atoms, fresh, make_prod, make_sum, norm
from hypothesis import given, settings
from hypothesis import strategies as st


def meaning(e: Space) -> list[tuple[tuple[int, int], ...]]:
    """For each position the (atom, index) pairs it stands for: the semantics every operation must respect."""
    e = norm(e)
    if isinstance(e, Leaf):
        perm = range(e.size) if e.perm is None else e.perm.tolist()
        return [((e.atom.uid, int(i)),) for i in perm]
    if isinstance(e, Sum):
        return [p for t in e.terms for p in meaning(t)]
    out: list[tuple[tuple[int, int], ...]] = [()]
    for f in e.factors:
        out = [a + b for a in out for b in meaning(f)]
    return out


def test_sum_against_sum_cuts_both() -> None:
    a, b = make_sum([fresh(32), fresh(96)]), make_sum([fresh(64), fresh(64)])
    unify(a, b)
    assert [t.size for t in norm(a).terms] == [32, 32, 64]  # type: ignore[union-attr]
    assert meaning(a) == meaning(b)


def test_heads_and_dim_factor() -> None:
    qkv = fresh(3 * 4 * 8)
    rest, dim = factor(qkv, 8)
    three, heads = factor(rest, 4)
    assert [three.size, heads.size, dim.size] == [3, 4, 8]
    assert isinstance(norm(qkv), Prod)
    kept = kept_positions(qkv, {next(iter(atoms(heads))): np.array([0, 2])})
    assert kept.tolist() == [i for i in range(96) if (i // 8) % 4 in (0, 2)]


def test_shuffle_of_odd_halves_ties_channels() -> None:
    # Two halves of 29, shuffled in two groups, split again: the second split falls inside a pair.
    half_a, half_b = fresh(29), fresh(29)
    two, c = factor(make_sum([half_a, half_b]), 29)
    shuffled = make_prod([c, two])
    left, right = cut(shuffled, 29)
    assert left.size == right.size == 29
    assert meaning(half_a) == meaning(half_b)
    assert sorted(meaning(left) + meaning(right)) == sorted(meaning(half_a) + meaning(half_b))


def test_coprime_groups_freeze_the_outer_part_only() -> None:
    inner_a, inner_b = fresh(8), fresh(6)
    a, b = make_prod([fresh(3), inner_a]), make_prod([fresh(4), inner_b])
    with pytest.raises(Conflict, match="share no divisor"):
        unify(a, b)
    innermost = next(reversed(atoms(inner_a)))
    assert innermost.size == 2 and not innermost.marks


def test_marks_follow_refinement() -> None:
    from foldline.graph.space import mark

    e = fresh(6)
    mark(e, ("select",), "graph output", "head")
    cut(e, 2)
    assert [a.marks["select"] for a in atoms(e)] == [[("graph output", "head")]] * 2


def test_flip_tied_to_itself_is_a_conflict() -> None:
    e = fresh(4)
    flipped = permute(e, np.arange(4)[::-1])
    with pytest.raises(Conflict, match="permutation of itself"):
        unify(e, flipped)


def test_permuted_occurrences_keep_the_same_indices() -> None:
    e = fresh(5)
    perm = np.array([3, 1, 4, 0, 2])
    p = permute(e, perm)
    (atom,) = atoms(e)
    kept = np.array([1, 3, 4])
    assert {int(perm[j]) for j in kept_positions(p, {atom: kept})} == set(kept.tolist())


# ---- properties ---------------------------------------------------------------------------------------------------
@st.composite
def spaces(draw: st.DrawFn, size: int, depth: int = 3) -> Space:
    """A random expression of the given size."""
    if size == 1:
        return UNIT
    kind = draw(st.sampled_from(["leaf", "sum", "prod"])) if depth else "leaf"
    if kind == "sum":
        k = draw(st.integers(1, size - 1))
        return make_sum([draw(spaces(k, depth - 1)), draw(spaces(size - k, depth - 1))])
    divisors = [d for d in range(2, size) if size % d == 0]
    if kind == "prod" and divisors:
        d = draw(st.sampled_from(divisors))
        return make_prod([draw(spaces(d, depth - 1)), draw(spaces(size // d, depth - 1))])
    return fresh(size)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(2, 24))
def test_unify_makes_positions_mean_the_same(data: st.DataObject, size: int) -> None:
    a, b = data.draw(spaces(size)), data.draw(spaces(size))
    try:
        unify(a, b)
    except Conflict:
        left = [*atoms(a), *atoms(b)]  # none: every position stands alone by now, and none can go
        frozen = [x for x in left if "select" in x.marks]
        assert frozen or not left, "a conflict must freeze what it leaves inconsistent"
        return
    for atom in {**atoms(a), **atoms(b)}:
        assert coordinates(a, atom).tolist() == coordinates(b, atom).tolist()
    again = norm(a)
    unify(a, b)
    assert repr(norm(a)) == repr(again)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(2, 24))
def test_cut_and_factor_keep_the_meaning(data: st.DataObject, size: int) -> None:
    e = data.draw(spaces(size))
    k = data.draw(st.integers(1, size - 1))
    left, right = cut(e, k)
    assert (left.size, right.size) == (k, size - k)
    assert [set(p) for p in meaning(left) + meaning(right)] == [set(p) for p in meaning(e)]
    divisors = [d for d in range(2, size) if size % d == 0]
    if divisors:
        inner = data.draw(st.sampled_from(divisors))
        try:
            outer, rest = factor(e, inner)
        except Conflict:
            return
        assert (outer.size, rest.size) == (size // inner, inner)
        assert [set(p) for p in meaning(make_prod([outer, rest]))] == [set(p) for p in meaning(e)]


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(2, 24))
def test_kept_positions_agree_with_the_meaning(data: st.DataObject, size: int) -> None:
    e = data.draw(spaces(size))
    selection = {a: np.array(sorted(data.draw(st.sets(st.integers(0, a.size - 1), min_size=1)))) for a in atoms(e)}
    uid = {a.uid: set(k.tolist()) for a, k in selection.items()}
    expected = [j for j, pairs in enumerate(meaning(e)) if all(i in uid[u] for u, i in pairs)]
    assert kept_positions(e, selection).tolist() == expected
    assert size_after(e, selection) == len(expected)
    vectors = {a: np.arange(1, a.size + 1, dtype=float) for a in atoms(e)}
    by_uid = {a.uid: v for a, v in vectors.items()}
    assert np.allclose(spread(e, vectors), [np.prod([by_uid[u][i] for u, i in pairs]) for pairs in meaning(e)])
