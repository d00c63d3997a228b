"""Calls without canonical form that are written out by a rule of this package, where tracing torch's own takes long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .functional import by_identity

aten = torch.ops.aten
Do = Callable[..., Any]
"""Makes a call: (operator, *arguments) -> result."""


def _addcmul(do: Do, x: Any, a: Any, b: Any, *, value: Any = 1) -> Any:
    """x + value * a * b, in the order in which torch's own reference multiplies."""
    scaled = a if value == 1 else do(aten.mul.Tensor, a, value)
    return do(aten.add.Tensor, x, do(aten.mul.Tensor, scaled, b))


_RULES: dict[Any, Callable[..., Any]] = {aten.addcmul.default: _addcmul}
_PLAIN = (torch.float32, torch.float64)
"""Kinds of numbers that no operator computes in a wider one."""


@by_identity
def rule_of(target: Any) -> Callable[..., Any] | None:
    """The rule of an operator, where there is one."""
    return _RULES.get(target)


def fits(operands: list[torch.Tensor]) -> bool:
    """Whether the rules say what torch does with such tensors: all of one plain type."""
    return bool(operands) and operands[0].dtype in _PLAIN and all(t.dtype == operands[0].dtype for t in operands)
