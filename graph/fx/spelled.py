"""Calls without canonical form that are written out by a rule of this package, where tracing torch's own takes long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .functional import by_identity

aten = torch.ops.aten
Do = Callable[..., Any]
"""Makes a call: (operator, *arguments) -> result."""
See = Callable[[Any], torch.Tensor]
"""The tensor (its shape and type count) behind an operand."""


def _addcmul(do: Do, see: See, x: Any, a: Any, b: Any, *, value: Any = 1) -> Any:
    """x + value * a * b, in the order in which torch's own reference multiplies."""
    dtypes = {see(t).dtype for t in (x, a, b)}
    if len(dtypes) > 1 or not dtypes <= _PLAIN:
        return None
    scaled = a if value == 1 else do(aten.mul.Tensor, a, value)
    return do(aten.add.Tensor, x, do(aten.mul.Tensor, scaled, b))


def _diff(do: Do, see: See, x: Any, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Any:
    """Each entry less the one before it."""
    parts = [t for t in (prepend, x, append) if t is not None]
    dtypes = {see(t).dtype for t in parts}
    if n != 1 or len(dtypes) > 1 or torch.bool in dtypes or not see(x).ndim:
        return None
    length = sum(see(t).shape[dim] for t in parts)
    if type(length) is not int or not length:
        return None
    whole = do(aten.cat.default, parts, dim) if len(parts) > 1 else x
    former = do(aten.slice.Tensor, whole, dim, 0, length - 1)
    return do(aten.sub.Tensor, do(aten.slice.Tensor, whole, dim, 1, length), former)


Rule = Callable[..., Any]
_RULES: dict[Any, Rule] = {aten.addcmul.default: _addcmul, aten.diff.default: _diff}
"""(do, see, *arguments) -> result; None, and nothing done, where torch has to say it."""
_PLAIN = {torch.float32, torch.float64}
"""Kinds of numbers that no operator computes in a wider one."""


@by_identity
def rule_of(target: Any) -> Rule | None:
    """The rule of an operator, where there is one."""
    return _RULES.get(target)
