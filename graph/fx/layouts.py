"""Memory order of elementwise results on meta tensors: the strides that torch's iterator gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def like(x: torch.Tensor) -> torch.Tensor | None:
    """Of the same layout, where torch keeps it: no gaps. None: it does not."""
    if x.is_contiguous():
        return torch.empty(x.shape, dtype=x.dtype, device="meta")
    if not dense(x):
        return None
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def elementwise(dtype: torch.dtype, *operands: torch.Tensor, common: torch.dtype | None = None) -> torch.Tensor | None:
    """What an operation on each element gives for tensors that are broadcast; None where torch must say it.

    ``common`` is the type that torch casts the operands to first: that moves one with gaps.
    """
    first, rest = operands[0], operands[1:]
    shape: Sequence[int] = first.shape
    same, plain = True, first.is_contiguous()
    for x in rest:
        if x.shape != shape:
            same = False
            wide = _broadcast(shape, x.shape)
            if wide is None:
                return None
            shape = wide
        plain = plain and x.is_contiguous()
    if (plain and same) or len(shape) < 2:
        return torch.empty(shape, dtype=dtype, device="meta")
    if common is not None and any([x.dtype != common and not dense(x) for x in operands]):
        return None
    strides = [x.stride() for x in operands]
    if same and all([s == strides[0] for s in strides]) and dense(first):
        return torch.empty_strided(shape, strides[0], dtype=dtype, device="meta")
    spread = [_expanded(shape, x) for x in operands]
    return torch.empty_strided(shape, _ordered(shape, spread), dtype=dtype, device="meta")


def dense(x: torch.Tensor) -> bool:
    """Whether a tensor's elements fill a piece of memory, each once."""
    size = 1
    for stride, n in sorted(zip(x.stride(), x.shape, strict=True)):
        if n > 1:
            if stride != size:
                return False
            size *= n
    return True


def _broadcast(a: Sequence[int], b: Sequence[int]) -> list[int] | None:
    """The common shape; None if there is none."""
    wide, narrow = (a, b) if len(a) >= len(b) else (b, a)
    shape, lead = list(wide), len(wide) - len(narrow)
    for i, n in enumerate(narrow, lead):
        if shape[i] == 1:
            shape[i] = n
        elif n not in (1, shape[i]):
            return None
    return shape


def _expanded(shape: Sequence[int], x: torch.Tensor) -> list[int]:
    """A tensor's strides once it is broadcast: 0 along what is repeated."""
    lead = len(shape) - x.ndim
    own = [0 if n == 1 != m else s for n, m, s in zip(x.shape, shape[lead:], x.stride(), strict=True)]
    return [0] * lead + own


def _ordered(shape: Sequence[int], strides: list[list[int]]) -> list[int]:
    """Dense strides in the order that the first operand with an opinion gives, axis by axis (an insertion sort)."""
    order = list(range(len(shape)))[::-1]  # fastest first
    for i in range(1, len(order)):
        at = i
        for below in range(i - 1, -1, -1):
            verdict = _slower(shape, strides, order[below], order[at])
            if verdict > 0:
                order[below], order[at] = order[at], order[below]
                at = below
            elif verdict < 0:
                break
    out, step = [0] * len(shape), 1
    for axis in order:
        out[axis] = step
        step *= max(shape[axis], 1)
    return out


def _slower(shape: Sequence[int], strides: list[list[int]], a: int, b: int) -> int:
    """1 where axis ``a`` moves further in memory than ``b``, -1 where less far, 0 where no operand says."""
    for held in strides:
        one, other = held[a], held[b]
        if one == 0 or other == 0:
            continue
        if one != other:
            return 1 if one > other else -1
        if shape[a] > shape[b]:
            return 1
    return 0


def not_channels_last(x: Any) -> bool:
    """Whether the layout of images with their channels last certainly does not fit a tensor of four axes."""
    return bool(x.shape[1] > 1 and x.shape[3] > 1 and x.stride(3) < x.stride(1))
