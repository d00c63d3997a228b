"""One budget allocator for sparsity, ranks and bits: a level for every item, least total loss within the budget.

Two solvers of the same multiple-choice knapsack. ``dp`` is dynamic programming over the budget, linear in the number
of buckets and in the number of levels ("Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural
Networks"); ``milp`` is an exact integer program (HiGHS), which also takes several budgets at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from ..graph.errors import ConfigError, ConstraintError

Method: TypeAlias = Literal["dp", "milp"]
Budget: TypeAlias = float | Sequence[float]


class Level(NamedTuple):
    """One choice for an item: what it costs (one number, or one per budget) and what it loses."""

    cost: float | tuple[float, ...]
    loss: float

    @property
    def single(self) -> float:
        """The cost where there is one budget."""
        return float(np.asarray(self.cost, dtype=np.float64).reshape(()))


@dataclass(frozen=True)
class Allocation:
    """The level chosen for every item.

    Attributes:
        levels: item -> position in its list of levels.
        cost: total, one number per budget.
        loss: total.
        exact: no allocation within the budgets loses less. Otherwise costs were rounded up to multiples of ``unit``,
            and no allocation that stays ``slack`` below the budget loses less.
        unit: the bucket width (0 for ``milp``).
        slack: bound on what the rounding wasted of the budget.
    """

    levels: dict[str, int]
    cost: tuple[float, ...]
    loss: float
    exact: bool
    unit: float = 0.0
    slack: float = 0.0


def allocate(
    items: Mapping[str, Sequence[Level | tuple[float, float]]],
    budget: Budget | None = None,
    *,
    saving: Budget | None = None,
    method: Method = "dp",
    buckets: int = 20_000,
) -> Allocation:
    """Choose one level per item so that the total loss is least and the total cost stays within the budget.

    Args:
        items: item -> its levels, each (cost, loss); a cost is one number or one per budget. Losses add over items.
        budget: most that may be spent (a number, or one per cost); or
        saving: least that must be reached instead: the numbers called cost then count what a level saves.
        method: ``"dp"`` (one budget; exact when the costs are multiples of a common unit of which the range holds at
            most ``buckets``, as with small integers; else within :attr:`Allocation.slack`), or ``"milp"`` (exact to
            the solver's 1e-9, any number of budgets).
        buckets: resolution of ``dp``; time and memory are linear in it.

    Ties go to the cheaper allocation (``dp``), and equal input always gives equal output. With more budget the loss
    never rises.

    Raises:
        ConstraintError: not even the cheapest levels fit; says what they would cost.
        ConfigError: no items, an item without levels, numbers that are not finite, or several budgets with ``dp``.
    """
    if (budget is None) == (saving is None):
        raise ConfigError("give exactly one of budget and saving", node="allocate")
    limits = np.atleast_1d(np.asarray(budget if saving is None else saving, dtype=np.float64))
    costs, losses = _arrays(items, len(limits))
    if saving is not None:
        limits, costs = -limits, [-c for c in costs]
    if not np.isfinite(limits).all():
        raise ConfigError("a budget must be a finite number", node="allocate", found=limits.tolist())
    _feasible(costs, limits, saving is not None)
    if method == "milp":
        picked, exact, unit = _milp(costs, losses, limits), True, 0.0
    elif method == "dp":
        if len(limits) != 1:
            raise ConfigError("dp takes one budget", node="method", found=len(limits), hint="use method='milp'")
        picked, exact, unit = _dp([c[:, 0] for c in costs], losses, float(limits[0]), buckets)
    else:
        raise ConfigError("unknown method", node="method", value=method, expected="dp or milp")
    total = np.sum([c[i] for c, i in zip(costs, picked, strict=True)], axis=0)
    return Allocation(
        levels=dict(zip(items, picked, strict=True)),
        cost=tuple(float(t) if saving is None else -float(t) for t in total),
        loss=float(sum(x[i] for x, i in zip(losses, picked, strict=True))),
        exact=exact,
        unit=unit,
        slack=0.0 if exact else unit * len(costs),
    )


def _arrays(
    items: Mapping[str, Sequence[Level | tuple[float, float]]], budgets: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per item the costs, float64 [levels, budgets], and the losses, float64 [levels]."""
    if not items:
        raise ConfigError("there is nothing to allocate", node="items", expected="at least one item")
    costs, losses = [], []
    for name, levels in items.items():
        if not levels:
            raise ConfigError("an item has no levels", node=name, expected="at least one (cost, loss)")
        cost = np.array([np.atleast_1d(np.asarray(level[0], dtype=np.float64)) for level in levels])
        loss = np.array([level[1] for level in levels], dtype=np.float64)
        if cost.shape[1] != budgets:
            raise ConfigError("each level needs a cost per budget", node=name, expected=budgets, found=cost.shape[1])
        if not (np.isfinite(cost).all() and np.isfinite(loss).all()):
            raise ConfigError(
                "costs and losses must be finite", node=name, found=[tuple(level) for level in levels][:4]
            )
        costs.append(cost)
        losses.append(loss)
    return costs, losses


def _feasible(costs: list[np.ndarray], limits: np.ndarray, saving: bool) -> None:
    least = np.sum([c.min(axis=0) for c in costs], axis=0)
    over = least > limits + 1e-12 * np.maximum(np.abs(limits), 1)
    if over.any():
        i = int(np.argmax(over))
        sign = -1 if saving else 1
        raise ConstraintError(
            "no choice of levels meets the budget",
            node="budget" if len(limits) == 1 else f"budget {i}",
            expected=f"at {'least' if saving else 'most'} {sign * limits[i]:,.6g}",
            found=f"{sign * least[i]:,.6g} with every item at its {'largest saving' if saving else 'cheapest level'}",
            hint="relax the budget, or give the items cheaper levels",
        )


# ---- dynamic programming -------------------------------------------------------------------------------------------
def _dp(costs: list[np.ndarray], losses: list[np.ndarray], limit: float, buckets: int) -> tuple[list[int], bool, float]:
    """Picked levels, whether the result is exact, and the unit. Costs are counted above each item's cheapest level."""
    above = [c - c.min() for c in costs]
    room = limit - sum(float(c.min()) for c in costs)
    span = sum(float(c.max()) for c in above)
    unit, exact = _unit(above, span, buckets)
    steps = [np.ceil(np.round(c / unit, 9)).astype(np.int64) for c in above]
    capacity = int(min(np.floor(np.round(max(room, 0.0) / unit, 9)), sum(int(s.max()) for s in steps)))
    best = np.full(capacity + 1, np.inf)
    best[0] = 0.0
    choices: list[np.ndarray] = []
    for step, loss in zip(steps, losses, strict=True):
        found = np.full(capacity + 1, np.inf)
        choice = np.zeros(capacity + 1, dtype=np.int32)
        # Cheaper levels first: with a strict comparison ties then go to the cheaper level.
        for i in np.argsort(step, kind="stable"):
            if step[i] > capacity:
                break
            reached = best[: capacity + 1 - step[i]] + loss[i]
            part = found[step[i] :]
            better = reached < part
            part[better] = reached[better]
            choice[step[i] :][better] = i
        best = found
        choices.append(choice)
    at = int(np.argmin(best))
    picked: list[int] = []
    for step, choice in zip(reversed(steps), reversed(choices), strict=True):
        i = int(choice[at])
        picked.append(i)
        at -= int(step[i])
    return picked[::-1], exact, unit


def _unit(above: list[np.ndarray], span: float, buckets: int) -> tuple[float, bool]:
    """The bucket width: the greatest common divisor of whole costs if that is fine enough, else a share of the span.

    It depends on the costs alone and not on the budget, so that a larger budget never does worse.
    """
    values = np.unique(np.concatenate(above))
    if span == 0:
        return 1.0, True
    if (values == np.round(values)).all() and values.max() < 2**53:
        common = gcd(*(int(v) for v in values))
        if span / common <= buckets:
            return float(common), True
    return span / buckets, False


# ---- integer program -----------------------------------------------------------------------------------------------
def _milp(costs: list[np.ndarray], losses: list[np.ndarray], limits: np.ndarray) -> list[int]:
    """One 0/1 variable per level, exactly one per item; budgets and losses scaled to 1 for the solver's tolerances.

    HiGHS up to 1.12 prints a line of its own, whatever it is told about output, when it drops a candidate that does not
    fit the problem as it was before presolving; no option of it stands in the way of that.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import block_diag, csr_array

    every = np.concatenate(costs)
    loss = np.concatenate(losses)
    spread = max(float(np.abs(loss).max()), 1e-300)
    scale = np.maximum(np.abs(every).max(axis=0), 1e-300)
    one_each = LinearConstraint(csr_array(block_diag([np.ones((1, len(x))) for x in losses])), 1, 1)
    margin = 0.0
    for _ in range(8):
        within = LinearConstraint((every / scale).T, -np.inf, limits / scale - margin)
        solved = milp(
            loss / spread,
            integrality=np.ones(len(loss), dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=[one_each, within],
            options={"mip_rel_gap": 0.0},
        )
        if solved.x is None:
            break
        picked, start = [], 0
        for x in losses:
            picked.append(int(np.argmax(solved.x[start : start + len(x)])))
            start += len(x)
        total = np.sum([c[i] for c, i in zip(costs, picked, strict=True)], axis=0)
        if (total <= limits + 1e-9 * np.maximum(np.abs(limits), scale)).all():
            return picked
        margin = max(10 * margin, 1e-9)  # the solver's feasibility tolerance let it overdraw: ask for a little less
    raise ConstraintError(
        "no choice of levels meets the budgets together",
        node="budget",
        expected=f"at most {limits.tolist()}",
        found="the integer program has no solution",
        hint="relax one of the budgets, or give the items cheaper levels",
    )
