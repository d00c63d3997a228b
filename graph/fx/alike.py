"""Comparing attribute values of calls, and the fake results of calls."""

from __future__ import annotations

from typing import Any

import torch


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def same(a: Any, b: Any) -> bool:
    """Whether two attribute values say the same; lists and tuples are one."""
    return bool(_plain(a) == _plain(b))


def merged(current: Any, wanted: Any) -> Any:
    """What was asked, where given; entries asked as None keep what the call says."""
    if isinstance(wanted, (list, tuple)) and isinstance(current, (list, tuple)) and len(wanted) == len(current):
        return [c if w is None else w for c, w in zip(current, wanted, strict=True)]
    return current if wanted is None and current is not None else wanted


def alike(a: Any, b: Any) -> bool:
    """Whether two fake results have the same shape and dtype."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.device.type == b.device.type == "meta" and type(a) is type(b) is torch.Tensor:
            return a.dtype == b.dtype and a.shape == b.shape  # of a recorded call: numbers
        return a.dtype == b.dtype and [str(s) for s in a.shape] == [str(s) for s in b.shape]
    return type(a) is type(b) and str(a) == str(b)
