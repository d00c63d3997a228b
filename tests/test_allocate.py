"""The budget allocator: equal to brute force, monotone in the budget, deterministic; savings and several budgets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from foldline.graph.errors import ConfigError, ConstraintError
from foldline.passes.allocate import Allocation, Level, allocate
from hypothesis import assume, given, settings
from hypothesis import strategies as st

Items = dict[str, list[Level]]


def brute(items: Items, budget: tuple[float, ...]) -> float | None:
    """The least loss of all allocations within the budget; None if there is none."""
    best = None
    for choice in itertools.product(*items.values()):
        cost = np.sum([np.atleast_1d(level.cost) for level in choice], axis=0)
        if (cost <= np.asarray(budget) + 1e-9).all():
            loss = sum(level.loss for level in choice)
            best = loss if best is None or loss < best else best
    return best


@st.composite
def problems(draw: st.DrawFn, layers: int = 4, levels: int = 5, budgets: int = 1) -> tuple[Items, list[float]]:
    whole = st.integers(0, 40).map(float)
    items = {
        f"layer{i}": [
            Level(
                draw(whole) if budgets == 1 else tuple(draw(whole) for _ in range(budgets)),
                draw(st.integers(0, 50)) / 8,
            )
            for _ in range(levels)
        ]
        for i in range(layers)
    }
    return items, [float(draw(st.integers(0, 160))) for _ in range(budgets)]


@settings(max_examples=60, deadline=None)
@given(problems())
def test_dp_equals_brute_force(problem: tuple[Items, list[float]]) -> None:
    items, (budget,) = problem
    expected = brute(items, (budget,))
    if expected is None:
        with pytest.raises(ConstraintError, match="no choice of levels"):
            allocate(items, budget)
        return
    found = allocate(items, budget)
    assert found.exact and found.loss == pytest.approx(expected) and found.cost[0] <= budget
    assert found.loss == sum(items[name][i].loss for name, i in found.levels.items())


@settings(max_examples=25, deadline=None)
@given(problems(layers=4, levels=5, budgets=2))
def test_milp_equals_brute_force_under_two_budgets(problem: tuple[Items, list[float]]) -> None:
    items, budgets = problem
    expected = brute(items, tuple(budgets))
    if expected is None:
        with pytest.raises(ConstraintError, match="no choice of levels"):
            allocate(items, budgets, method="milp")
        return
    found = allocate(items, budgets, method="milp")
    assert found.loss == pytest.approx(expected, abs=1e-7)
    assert all(c <= b + 1e-9 for c, b in zip(found.cost, budgets, strict=True))


@settings(max_examples=25, deadline=None)
@given(problems())
def test_both_solvers_agree_and_a_saving_is_a_budget_from_the_other_side(problem: tuple[Items, list[float]]) -> None:
    items, (budget,) = problem
    assume(brute(items, (budget,)) is not None)
    top = {name: max(level.cost for level in levels) for name, levels in items.items()}
    saved = {name: [Level(top[name] - x.cost, x.loss) for x in levels] for name, levels in items.items()}
    a, b = allocate(items, budget), allocate(items, budget, method="milp")
    c = allocate(saved, saving=sum(top.values()) - budget)
    assert a.loss == pytest.approx(b.loss, abs=1e-7) and a.loss == pytest.approx(c.loss)
    assert c.cost[0] >= sum(top.values()) - budget


@settings(max_examples=30, deadline=None)
@given(problems(), st.booleans())
def test_more_budget_never_loses_more(problem: tuple[Items, list[float]], fractional: bool) -> None:
    items, (budget,) = problem
    if fractional:  # irrational costs: the bucketed path
        items = {n: [Level(x.cost * np.pi, x.loss) for x in levels] for n, levels in items.items()}
    least = sum(min(x.cost for x in levels) for levels in items.values())
    losses = [allocate(items, least + extra, buckets=50).loss for extra in (0, 1, budget / 3, budget / 2, budget)]
    order = np.argsort([0, 1, budget / 3, budget / 2, budget], kind="stable")
    assert (np.diff(np.array(losses)[order]) <= 1e-12).all()


@settings(max_examples=30, deadline=None)
@given(problems(), st.integers(20, 200))
def test_buckets_keep_their_stated_bound(problem: tuple[Items, list[float]], buckets: int) -> None:
    items, (budget,) = problem
    items = {n: [Level(x.cost * np.sqrt(2), x.loss) for x in levels] for n, levels in items.items()}
    assume(brute(items, (budget,)) is not None)
    found = allocate(items, budget, buckets=buckets)
    assert found.cost[0] <= budget + 1e-9
    tighter = brute(items, (budget - found.slack,))
    assert tighter is None or found.loss <= tighter + 1e-9


def test_ties_go_to_the_cheaper_allocation_and_repeat() -> None:
    items = {name: [Level(c, 1.0) for c in (5, 3, 4)] for name in "abc"}
    first = allocate(items, 100)
    assert first.levels == dict.fromkeys("abc", 1) and first.cost == (9.0,)
    assert isinstance(first, Allocation) and all(allocate(items, 100) == first for _ in range(3))
    assert all(allocate(items, 100, method="milp") == allocate(items, 100, method="milp") for _ in range(3))


def test_many_items_stay_exact_and_fast() -> None:
    rng = np.random.default_rng(0)
    items = {f"w{i}": [Level(float(b * 64), float(rng.random() / 4**b)) for b in (2, 3, 4, 8)] for i in range(300)}
    a = allocate(items, 300 * 64 * 4.0)
    assert a.exact and a.cost[0] <= 300 * 64 * 4
    assert a.loss == pytest.approx(allocate(items, 300 * 64 * 4.0, method="milp").loss, rel=1e-6)


def test_bad_input_says_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="nothing to allocate"):
        allocate({}, 1)
    with pytest.raises(ConfigError, match="no levels"):
        allocate({"a": []}, 1)
    with pytest.raises(ConfigError, match="finite"):
        allocate({"a": [(1, float("nan"))]}, 1)
    with pytest.raises(ConfigError, match="one budget"):
        allocate({"a": [((1, 2), 0.0)]}, [1, 2])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="exactly one"):
        allocate({"a": [(1, 0)]}, 1, saving=1)
    with pytest.raises(ConstraintError, match="cheapest level"):
        allocate({"a": [(5, 0)], "b": [(4, 0)]}, 8)
    with pytest.raises(ConstraintError, match="largest saving"):
        allocate({"a": [(5, 0)]}, saving=6)
