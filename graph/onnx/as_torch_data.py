"""ONNX operators that move, select or make data, in torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .as_torch_run import Call, torch_op

DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16, 6: torch.int32, 7: torch.int64,
    9: torch.bool, 10: torch.float16, 11: torch.float64, 12: torch.uint32, 13: torch.uint64, 16: torch.bfloat16,
}  # fmt: skip
"""ONNX element type -> torch dtype"""


def dtype_of(c: Call, code: int) -> torch.dtype:
    if code not in DTYPES:
        raise c.refuse(f"element type {code}")
    return DTYPES[code]


def positive(axes: list[int], rank: int) -> list[int]:
    return [a + rank if a < 0 else a for a in axes]


@torch_op("Cast")
def cast(c: Call) -> Tensor:
    return c.x().to(dtype_of(c, c.attr("to")))


@torch_op("CastLike")
def cast_like(c: Call) -> Tensor:
    return c.x().to(c.x(1).dtype)


@torch_op("Reshape")
def reshape(c: Call) -> Tensor:
    x, shape = c.x(), c.ints(1, "shape")
    if not c.attr("allowzero", 0):
        shape = [x.shape[i] if d == 0 else d for i, d in enumerate(shape)]
    return x.reshape(shape)


@torch_op("Flatten")
def flatten(c: Call) -> Tensor:
    x = c.x()
    axis = c.axis(1, x.dim())
    rows = 1
    for n in x.shape[:axis]:
        rows *= n
    columns = 1
    for n in x.shape[axis:]:
        columns *= n
    return x.reshape(rows, columns)


@torch_op("Transpose")
def transpose(c: Call) -> Tensor:
    x = c.x()
    return x.permute(c.attr("perm", list(reversed(range(x.dim())))))


@torch_op("Squeeze")
def squeeze(c: Call) -> Tensor:
    x, axes = c.x(), c.ints(1, "axes")
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


@torch_op("Unsqueeze")
def unsqueeze(c: Call) -> Tensor:
    x, axes = c.x(), c.ints(1, "axes")
    for axis in sorted(positive(axes, x.dim() + len(axes))):
        x = x.unsqueeze(axis)
    return x


@torch_op("Expand")
def expand(c: Call) -> Tensor:
    x, shape = c.x(), c.ints(1)
    return x.expand(torch.broadcast_shapes(x.shape, tuple(shape)))


@torch_op("Concat")
def concat(c: Call) -> Tensor:
    return torch.cat(c.all(), c.attr("axis", 1))


@torch_op("Split")
def split(c: Call) -> tuple[Tensor, ...]:
    x = c.x()
    axis = c.axis(0, x.dim())
    sizes = c.ints(1, "split")
    if sizes is None:
        parts = c.attr("num_outputs", len(c.step.outputs))
        step = -(-x.shape[axis] // parts)
        sizes = [max(min(step, x.shape[axis] - i * step), 0) for i in range(parts)]
    return tuple(torch.split(x, sizes, axis))


@torch_op("Slice")
def slice_(c: Call) -> Tensor:
    x = c.x()
    starts, ends = c.ints(1, "starts"), c.ints(2, "ends")
    axes = positive(c.ints(3, "axes", list(range(len(starts)))), x.dim())
    steps = c.ints(4, "", [1] * len(starts))
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        n = x.shape[axis]
        picks = range(n)[slice(start, None if step < 0 and end < -n else end, step)]
        if step > 0:
            index: list[slice] = [slice(None)] * x.dim()
            index[axis] = slice(picks.start, picks.stop, step)
            x = x[tuple(index)]
        else:
            x = x.index_select(axis, torch.tensor(list(picks), dtype=torch.int64, device=x.device))
    return x


@torch_op("Gather")
def gather(c: Call) -> Tensor:
    x, indices = c.x(), c.x(1)
    axis = c.axis(0, x.dim())
    n = x.shape[axis]
    if indices.dim() == 0:
        return x.select(axis, int(indices))
    indices = indices.to(device=x.device, dtype=torch.int64)
    flat = torch.where(indices < 0, indices + n, indices).reshape(-1)
    picked = x.index_select(axis, flat)
    return picked.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


@torch_op("GatherElements")
def gather_elements(c: Call) -> Tensor:
    x, indices = c.all()
    axis = c.axis(0, x.dim())
    return torch.gather(x, axis, torch.where(indices < 0, indices + x.shape[axis], indices).long())


@torch_op("GatherND")
def gather_nd(c: Call) -> Tensor:
    x, indices = c.all()
    batch, depth = c.attr("batch_dims", 0), indices.shape[-1]
    coordinates = [indices[..., i].long() for i in range(depth)]
    lead = [
        torch.arange(n, device=x.device).reshape([-1 if i == b else 1 for i in range(indices.dim() - 1)])
        for b, n in enumerate(x.shape[:batch])
    ]
    return x[tuple(lead + coordinates)]


_SCATTER = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@torch_op("ScatterElements", "Scatter")
def scatter_elements(c: Call) -> Tensor:
    x, indices, updates = c.all()
    axis, mode = c.axis(0, x.dim()), c.attr("reduction", "none")
    indices = torch.where(indices < 0, indices + x.shape[axis], indices).long()
    if mode == "none":
        return x.scatter(axis, indices, updates)
    return x.scatter_reduce(axis, indices, updates, _SCATTER[mode], include_self=True)


@torch_op("ScatterND")
def scatter_nd(c: Call) -> Tensor:
    x, indices, updates = c.all()
    depth, mode = indices.shape[-1], c.attr("reduction", "none")
    rows = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
    for i in range(depth):
        part = indices[..., i].long()
        rows = rows * x.shape[i] + torch.where(part < 0, part + x.shape[i], part)
    tail = x.shape[depth:]
    flat = x.reshape(-1, *tail).reshape(int(torch.tensor(x.shape[:depth]).prod()), -1)
    values = updates.reshape(rows.numel(), -1)
    index = rows.reshape(-1, 1).expand_as(values)
    if mode == "none":
        return flat.scatter(0, index, values).reshape(x.shape)
    return flat.scatter_reduce(0, index, values, _SCATTER[mode], include_self=True).reshape(x.shape)


@torch_op("Pad")
def pad(c: Call) -> Tensor:
    x = c.x()
    rank = x.dim()
    flat = c.attr("paddings") if c.opset < 2 else c.ints(1, "pads")
    axes = positive(c.ints(3, "", list(range(rank))), rank)
    lows, highs = [0] * rank, [0] * rank
    for i, axis in enumerate(axes):
        lows[axis], highs[axis] = flat[i], flat[i + len(axes)]
    mode = c.attr("mode", "constant")
    if mode == "constant":
        value = c.scalar(2, "value", 0)
        amounts = [p for axis in reversed(range(rank)) for p in (lows[axis], highs[axis])]
        return F.pad(x, amounts, value=value)
    for axis in range(rank):
        x = x.index_select(axis, _border(x.shape[axis], lows[axis], highs[axis], mode, x.device))
    return x


def _border(n: int, low: int, high: int, mode: str, device: torch.device) -> Tensor:
    """Which element stands at each position of a padded axis."""
    at = torch.arange(-low, n + high, device=device)
    if mode == "edge" or n == 1:
        return at.clamp(0, n - 1)
    if mode == "wrap":
        return at.remainder(n)
    period = 2 * (n - 1)
    at = at.remainder(period)
    return torch.where(at < n, at, period - at)


@torch_op("Tile")
def tile(c: Call) -> Tensor:
    return c.x().repeat(c.ints(1))


@torch_op("Shape")
def shape(c: Call) -> Tensor:
    return torch.tensor(list(c.x().shape)[slice(c.attr("start", 0), c.attr("end"))], dtype=torch.int64)


@torch_op("Size")
def size(c: Call) -> Tensor:
    return torch.tensor(c.x().numel(), dtype=torch.int64)


@torch_op("ConstantOfShape")
def constant_of_shape(c: Call) -> Tensor:
    fill = c.attr("value")
    dims = c.ints(0)
    return torch.zeros(dims) if fill is None else torch.full(dims, fill.reshape(-1)[0].item(), dtype=fill.dtype)


@torch_op("Range")
def arange(c: Call) -> Tensor:
    start, limit, delta = (t.reshape(()) for t in (c.x(0), c.x(1), c.x(2)))
    count = max(int(torch.ceil((limit - start).double() / delta.double())), 0)
    steps = torch.arange(count, device=start.device)
    return (start + steps.to(start.dtype) * delta).to(start.dtype)


@torch_op("EyeLike")
def eye_like(c: Call) -> Tensor:
    x = c.x()
    dtype = dtype_of(c, c.attr("dtype")) if c.attr("dtype") else x.dtype
    rows, columns = x.shape
    at = torch.arange(columns, device=x.device) - torch.arange(rows, device=x.device)[:, None]
    return (at == c.attr("k", 0)).to(dtype)


@torch_op("Trilu")
def trilu(c: Call) -> Tensor:
    k = c.ints(1, "", [0])[0]
    return torch.triu(c.x(), k) if c.attr("upper", 1) else torch.tril(c.x(), k)


@torch_op("OneHot")
def one_hot(c: Call) -> Tensor:
    indices, values = c.x(), c.x(2)
    depth = int(c.x(1).reshape(-1)[0])
    hot = indices.long().remainder(depth).unsqueeze(-1) == torch.arange(depth, device=indices.device)
    inside = (indices >= -depth) & (indices < depth)
    hot = hot & inside.unsqueeze(-1)
    axis = c.axis(-1, indices.dim() + 1)
    return torch.where(hot, values[1], values[0]).movedim(-1, axis)


@torch_op("NonZero")
def non_zero(c: Call) -> Tensor:
    return torch.nonzero(c.x()).T.contiguous()


@torch_op("Compress")
def compress(c: Call) -> Tensor:
    x, keep = c.x(), c.x(1).bool()
    axis = c.attr("axis")
    if axis is None:
        x, axis = x.reshape(-1), 0
    return x.index_select(axis, torch.nonzero(keep).reshape(-1).to(x.device))


@torch_op("DepthToSpace")
def depth_to_space(c: Call) -> Tensor:
    x, b = c.x(), c.attr("blocksize")
    if c.attr("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, b)
    n, channels, h, w = x.shape
    blocks = x.reshape(n, b, b, channels // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(n, channels // b**2, h * b, w * b)


@torch_op("SpaceToDepth")
def space_to_depth(c: Call) -> Tensor:
    x, b = c.x(), c.attr("blocksize")
    if c.attr("mode", "DCR") == "CRD":
        return F.pixel_unshuffle(x, b)
    n, channels, h, w = x.shape
    blocks = x.reshape(n, channels, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(n, channels * b**2, h // b, w // b)


@torch_op("ReverseSequence")
def reverse_sequence(c: Call) -> Tensor:
    x, lengths = c.all()
    batch, time = c.attr("batch_axis", 1), c.attr("time_axis", 0)
    moved = x.movedim((batch, time), (0, 1))
    steps = torch.arange(moved.shape[1], device=x.device)
    index = torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)
    return moved[torch.arange(moved.shape[0], device=x.device)[:, None], index].movedim((0, 1), (batch, time))


@torch_op("Dropout")
def dropout(c: Call) -> tuple[Tensor, Tensor]:
    """Active in the module's train mode, or where the file itself asks for training."""
    x, ratio = c.x(), c.scalar(1, "ratio", 0.5)
    on = bool(c.scalar(2, "", False)) or c.training
    if not on or ratio == 0:
        return x, torch.ones_like(x, dtype=torch.bool)
    mask = torch.rand_like(x, dtype=torch.float32) >= ratio
    return x * mask.to(x.dtype) / (1 - ratio), mask
