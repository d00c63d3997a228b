"""What the Triton kernels share: activations, rounding to integers, the order of tiles, launching one."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "True")
"""Whether this process runs kernels in Triton's interpreter (the variable counts when triton is imported)."""


def launch(tuned: Any, plain: Any, fallback: dict[str, int], grid: Any, *args: Any, **meta: Any) -> None:
    """Run a kernel once.

    On a GPU the autotuned form runs, through torch's wrapper, which torch.compile and AOTInductor see through; in the
    interpreter the plain form with the block sizes of ``fallback``, since there is nothing to tune.
    """
    if INTERPRETED:
        plain[grid](*args, **meta, **fallback)
    else:
        torch.library.wrap_triton(tuned)[grid](*args, **meta)


@triton.jit
def tile_order(pid, m_tiles, n_tiles, GROUP_M: tl.constexpr):
    """Tiles of GROUP_M rows are walked column by column, so that what is read stays in the L2 cache."""
    per_group = GROUP_M * n_tiles
    group = pid // per_group
    first = group * GROUP_M
    rows = tl.minimum(m_tiles - first, GROUP_M)
    inside = pid % per_group
    return first + inside % rows, inside // rows


ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
"""Kernels take numbers: not every compiler that calls them writes strings as constants."""


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """A float32 tile after the activation of that number."""
    if ACTIVATION == 1:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == 2:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == 3:
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == 4:
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def round_even(y, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Clamp to [LOW, HIGH] (at most 2**21 in size), then round ties to even: adding 1.5 * 2**23 leaves no fraction."""
    y = tl.minimum(tl.maximum(y, LOW), HIGH)
    return (y + 12582912.0) - 12582912.0
