"""Merging adapters: the one rounding to bfloat16, and originals that nothing done to either model can change."""

from __future__ import annotations

import copy

import foldline.passes as P
import ml_dtypes
import numpy as np
import pytest
import torch
from foldline.graph.errors import ConstraintError
from foldline.passes.adapters.adapter import Adapter, Entry, cast_once, widened
from foldline.passes.adapters.merge import _content
from torch import nn


def _halves() -> np.ndarray:
    """Numbers at, just above and just below the points halfway between two bfloat16."""
    bits = np.random.default_rng(0).integers(0, 0x7F7E, 20_000).astype(np.uint16)
    low, high = (b.view(ml_dtypes.bfloat16).astype(np.float64) for b in (bits, bits + np.uint16(1)))
    middle = (low + high) / 2
    found = [middle, np.nextafter(middle, 0), np.nextafter(middle, np.inf), middle * (1 + 2.0**-30), low]
    return np.concatenate([*found, -middle * (1 - 2.0**-40), [0.0, -0.0, 1e-50, -1e-50]])


def test_bfloat16_is_the_nearest_with_ties_to_even() -> None:
    exact = _halves()
    got = cast_once(exact, ml_dtypes.bfloat16)
    bits = got.view(np.uint16)
    near = np.stack([(bits + np.uint16(step)).view(ml_dtypes.bfloat16).astype(np.float64) for step in (0, 1, 65535)])
    with np.errstate(invalid="ignore", over="ignore"):
        off = np.abs(near - exact)
    off = np.where(np.isfinite(off), off, np.inf)
    assert (off[0] <= off[1:].min(axis=0)).all()
    tied = off[0] == off[1:].min(axis=0)
    assert tied.sum() > 10_000 and (bits[tied & (exact != 0)] % 2 == 0).all()
    assert (np.signbit(widened(got)) == np.signbit(exact)).all() and (widened(got) == got.astype(np.float64)).all()


@pytest.mark.parametrize("number", [np.nan, np.inf, 3.4e38, -1e300])
def test_what_bfloat16_cannot_hold_is_refused(number: float) -> None:
    with pytest.raises(ConstraintError, match="not finite"):
        cast_once(np.array([1.0, number]), ml_dtypes.bfloat16)


@pytest.mark.parametrize("inplace", [False, True])
def test_originals_are_nobody_elses(inplace: bool) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(96, 80), nn.ReLU(), nn.Linear(80, 3))
    before = copy.deepcopy(base.state_dict())
    rng = np.random.default_rng(0)
    tensors = {
        "A": rng.standard_normal((4, 96)).astype(np.float32),
        "B": rng.standard_normal((80, 4)).astype(np.float32),
    }
    result = P.merge_adapter(base, Adapter([Entry("0.weight", "lora", tensors, {"scale": 0.5})]), inplace=inplace)
    assert (result.model is base) == inplace
    a, b = (torch.from_numpy(tensors[k]).double() for k in "AB")
    wanted = before["0.weight"].double() + 0.5 * (b @ a)
    assert torch.equal(result.model[0].weight, wanted.float())
    for model in (base, result.model):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(3)
    back = result.unmerge()
    assert torch.equal(back[0].weight, before["0.weight"])


def test_a_weight_is_told_from_one_that_differs_in_one_bit() -> None:
    data = np.random.default_rng(0).standard_normal((300, 257)).astype(np.float32)
    keys = {_content(data)}
    for at in ((0, 0), (150, 7), (299, 256)):
        other = data.copy()
        other.view(np.uint32)[at] ^= 1
        keys.add(_content(other))
    swapped = data.copy()
    swapped[[3, 200]] = swapped[[200, 3]]
    assert len({*keys, _content(swapped), _content(data.T)}) == 6
    assert _content(data.copy()) == _content(data)
