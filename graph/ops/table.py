"""The operator table: one rule per canonical op, shared by both front ends, extended through entry points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from ..ir import Node

if TYPE_CHECKING:
    from ..analysis import Analysis, Resize

Infer = Callable[["Analysis", Node], None]
Update = Callable[["Resize", Node], dict[str, Any]]


@dataclass(frozen=True)
class OpRule:
    """What an operator means to the index analysis.

    Attributes:
        name: canonical op (docs/ops.md).
        infer: gives every output a space per axis, ties what the op ties, freezes what it cannot follow.
        update: the attributes to change once axes have new sizes (baked shape constants); None if it bakes none.
        linear: output is linear in operand 0 for fixed other operands.
        homogeneous: f(s*x) = s*f(x) for s > 0, elementwise.
        zero: f(0) = 0, elementwise.
        monotone: non-decreasing, elementwise.
        elementwise: acts on each element of operand 0 alone.
    """

    name: str
    infer: Infer
    update: Update | None = None
    linear: bool = False
    homogeneous: bool = False
    zero: bool = False
    monotone: bool = False
    elementwise: bool = False


_TABLE: dict[str, OpRule] = {}


def register(rule: OpRule) -> None:
    """Add a rule; a later one of the same name replaces it (so that a plug-in can refine a built-in rule)."""
    _TABLE[rule.name] = rule


def rule(*names: str, update: Update | None = None, **algebra: bool) -> Callable[[Infer], Infer]:
    """Decorator form of :func:`register` for one infer function that serves several ops."""

    def put(infer: Infer) -> Infer:
        for name in names:
            register(OpRule(name, infer, update, **algebra))
        return infer

    return put


@cache
def _load_plugins() -> None:
    for entry in entry_points(group="foldline.ops"):
        entry.load()


def get_rule(op: str) -> OpRule | None:
    """The rule of a canonical op, or None: then everything the op touches is frozen."""
    _load_plugins()
    return _TABLE.get(op)


def known_ops() -> tuple[str, ...]:
    """Every canonical op that has a rule, sorted."""
    _load_plugins()
    return tuple(sorted(_TABLE))
