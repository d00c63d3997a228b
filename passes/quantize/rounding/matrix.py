"""Weights of convolutions and linear maps as [groups, outputs, inputs] in torch, and the moments of their inputs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...recover.layers import LinearOp
from ...recover.solve import Normal


def rows(op: LinearOp, w: Tensor) -> Tensor:
    """A tensor of the weight's shape as [G, O, D], differentiably, so that Y = X rows(w)^T + bias."""
    node = op.node
    if node.op == "linear":
        t = w.t() if node.attrs["transposed_weight"] else w
        return (t * node.attrs["alpha"] if node.attrs["alpha"] != 1.0 else t)[None]
    if node.attrs["transposed"]:
        t = w.unflatten(0, (op.groups, -1)).transpose(1, 2)
        return t.flip(list(range(3, t.dim()))).flatten(2)
    return w.unflatten(0, (op.groups, -1)).flatten(2)


def unrows(op: LinearOp, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`rows` for stored integers, scales and weights alike (alpha left aside)."""
    node = op.node
    if node.op == "linear":
        return matrix[0].t() if node.attrs["transposed_weight"] else matrix[0]
    if node.attrs["transposed"]:
        t = matrix.unflatten(2, (-1, *shape[2:]))
        return t.flip(list(range(3, t.dim()))).transpose(1, 2).flatten(0, 1)
    return matrix.flatten(0, 1).reshape(shape)


def full(op: LinearOp, parameter: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A scale or zero point that broadcasts against the weight, as [G, O, D] (alpha left aside)."""
    node, spread = op.node, parameter.expand(shape)
    if node.op == "linear":
        return (spread.t() if node.attrs["transposed_weight"] else spread)[None]
    return rows(op, spread)


def moments(
    op: LinearOp, inputs: list[Tensor], outputs: list[Tensor], bias: Tensor | None, limit: int, seed: int
) -> list[Normal]:
    """Normal equations of the wanted outputs (less the bias) on the inputs, over rows drawn at random.

    Args:
        inputs, outputs: per batch; outputs as they should be.
        bias: [G * O] or None.
        limit: rows (output positions, tokens) at most over all batches, spread over all of them alike.

    Returns:
        Two lots, of the first and of the second half of every batch's samples.
    """
    total = sum(op.rows_in(y) for y in outputs)
    share = min(1.0, limit / max(total, 1))
    draw = torch.Generator().manual_seed(seed)
    folds: list[Normal | None] = [None, None]
    for x, y in zip(inputs, outputs, strict=True):
        half = (x.shape[0] + 1) // 2
        for i, part in enumerate((slice(0, half), slice(half, None))):
            xs, ys = x[part], y[part]
            count = op.rows_in(ys)
            if not count:
                continue
            picks = None
            if share < 1:
                picks = torch.randperm(count, generator=draw)[: max(1, round(share * count))]
            for some in _parts(op, xs, count, picks):
                patches, wanted = _patches(op, xs, ys, some), _outputs(op, ys, some)
                if bias is not None:
                    wanted = wanted - bias.reshape(op.groups, 1, -1)
                fold = folds[i] or Normal(op.groups, patches.shape[2], wanted.shape[2])
                fold.update(patches, wanted)
                folds[i] = fold
    first = folds[0] or folds[1]
    assert first is not None
    empty = Normal(first.xx.shape[0], first.xx.shape[1], first.y.shape[1])
    return [folds[0] or empty, folds[1] or empty]


CHUNK = 1 << 24
"""Elements of a patch matrix made at a time."""


def _parts(op: LinearOp, x: Tensor, count: int, picks: Tensor | None) -> list[Tensor | None]:
    if op.node.op == "linear":
        return [picks]
    w = op.weight.weight
    assert w is not None
    wide = x.shape[1] * math.prod(w.shape[2:])
    size = max(1, CHUNK // max(wide, 1))
    every = torch.arange(count) if picks is None else picks
    return list(every.split(size))


def _outputs(op: LinearOp, y: Tensor, picks: Tensor | None) -> Tensor:
    flat = y.movedim(1, -1) if op.node.op == "conv" else y
    flat = flat.reshape(-1, flat.shape[-1])
    flat = flat if picks is None else flat[picks]
    return flat.unflatten(1, (op.groups, -1)).transpose(0, 1)


def _patches(op: LinearOp, x: Tensor, out: Tensor, picks: Tensor | None) -> Tensor:
    """As LinearOp.patches, in the data's own dtype."""
    if op.node.op == "linear":
        flat = x.reshape(-1, x.shape[-1])
        return (flat if picks is None else flat[picks])[None]
    assert picks is not None
    if op.node.attrs["transposed"]:
        windows = op.windows(x, out)
        n = windows.dim() // 2 - 1
        index = torch.unravel_index(picks, (windows.shape[0], *windows.shape[2 : 2 + n]))
        found = windows.movedim(1, 1 + n)[index].flatten(1)
    else:
        found = _gathered(op, x, tuple(out.shape[2:]), picks)
    return found.unflatten(1, (op.groups, -1)).transpose(0, 1)


def _gathered(op: LinearOp, x: Tensor, places: tuple[int, ...], picks: Tensor) -> Tensor:
    """Patches of the picked output positions, [R, C * taps]: one contiguous read of all channels per tap."""
    attrs, w = op.node.attrs, op.weight.weight
    assert w is not None
    kernel, padding = w.shape[2:], list(attrs["padding"])
    if any(lo or hi for lo, hi in padding):
        x = F.pad(x, [int(p) for lo, hi in reversed(padding) for p in (lo, hi)])
    sizes = x.shape[2:]
    index = torch.unravel_index(picks, (x.shape[0], *places))
    at = index[0][:, None]
    for axis, (size, k) in enumerate(zip(sizes, kernel, strict=True)):
        taps = torch.arange(k) * attrs["dilation"][axis]
        position = index[1 + axis][:, None] * attrs["stride"][axis] + taps  # [R, k]
        at = (at[:, :, None] * size + position[:, None, :]).flatten(1)
    rows_of = x.movedim(1, -1).reshape(-1, x.shape[1])
    return rows_of.index_select(0, at.flatten()).unflatten(0, at.shape).transpose(1, 2).flatten(1)
