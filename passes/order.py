"""Pass order: which facts hold when each pass starts, and the legal order when one comes too early or too late."""

from __future__ import annotations

from collections.abc import Sequence

from ..graph.errors import ConstraintError
from .base import Pass

START = frozenset({"float"})
"""Facts that hold of a model that was just loaded."""


def after(facts: frozenset[str], step: Pass) -> frozenset[str]:
    """The facts that hold once ``step`` has run."""
    return (facts - step.invalidates) | step.establishes


def check_order(passes: Sequence[Pass], start: frozenset[str] = START) -> None:
    """Check that every pass finds the facts it requires.

    Raises:
        ConstraintError: one does not; names the two passes at odds and the nearest legal order, if there is one.
    """
    facts = start
    for i, step in enumerate(passes):
        missing = sorted(step.requires - facts)
        if missing:
            raise _conflict(passes, i, missing[0], start)
        facts = after(facts, step)


def _conflict(passes: Sequence[Pass], i: int, fact: str, start: frozenset[str]) -> ConstraintError:
    step = passes[i]
    label = f"pass {step.name!r} ({i + 1} of {len(passes)})"
    breaker = next((p for p in reversed(passes[:i]) if fact in p.invalidates - p.establishes), None)
    maker = next((p for p in passes[i + 1 :] if fact in p.establishes), None)
    order = legal_order(passes, start)
    hint = f"legal order: {', '.join(p.name for p in order)}" if order else None
    if breaker is not None:
        message = f"{label} requires {fact!r}, which pass {breaker.name!r} before it undoes"
        hint = hint or f"no order of these passes is legal: run {step.name!r} or {breaker.name!r} in another pipeline"
    elif maker is not None:
        message = f"{label} requires {fact!r}, which pass {maker.name!r} establishes only after it"
        hint = hint or "no order of these passes is legal"
    else:
        makers = _who_establishes(fact)
        message = f"{label} requires {fact!r}, which no pass before it establishes"
        hint = f"put {' or '.join(makers)} before it" if makers else "no registered pass establishes it"
    found = ", ".join(p.name for p in passes)
    return ConstraintError(message, node=step.name, expected=f"{fact!r} to hold", found=f"the order {found}", hint=hint)


def _who_establishes(fact: str) -> list[str]:
    from . import registry

    return [name for name in registry.names() if fact in registry.get(name).establishes]


def legal_order(passes: Sequence[Pass], start: frozenset[str] = START) -> list[Pass] | None:
    """The first legal order in a search that keeps passes as early as they were given; None if there is none."""
    kinds = [(p.requires, p.establishes, p.invalidates) for p in passes]
    ids = [kinds.index(kind) for kind in kinds]  # passes of one kind are interchangeable: only the first is tried
    dead: set[tuple[tuple[int, ...], frozenset[str]]] = set()

    def search(left: tuple[int, ...], facts: frozenset[str]) -> list[Pass] | None:
        if not left:
            return []
        state = (tuple(sorted(ids[i] for i in left)), facts)
        if state in dead:
            return None
        tried: set[int] = set()
        for i in left:
            if ids[i] not in tried and passes[i].requires <= facts:
                tried.add(ids[i])
                rest = search(tuple(j for j in left if j != i), after(facts, passes[i]))
                if rest is not None:
                    return [passes[i], *rest]
        dead.add(state)
        return None

    return search(tuple(range(len(passes))), start)
