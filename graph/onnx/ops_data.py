"""Data movement in canonical terms: reshape, slice, gather, concat, pad, and tensors made from sizes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .native import dtype_name
from .ops import Canon, Native, axes_of, axis_of, rule

OPEN = 1 << 31
"""Slice ends at or beyond this mean "to the end"."""


@rule("Identity")
def identity(c: Native) -> Canon:
    return Canon("identity", (0,), {"fn": "identity"})


@rule("Dropout")
def dropout(c: Native) -> Canon | None:
    training = c.const(2) if c.has(2) else np.asarray(False)
    if training is None or training.any() or c.used(1):
        return None
    return Canon("identity", (0,), {"fn": "dropout"}, c.sizes(1, 2))


@rule("Cast", "CastLike")
def cast(c: Native) -> Canon | None:
    if c.node.op_type == "Cast":
        return Canon("cast", (0,), {"dtype": dtype_name(ir.DataType(c.attr("to")))})
    return Canon("cast", (0,), {"dtype": c.dtype(1)}, (1,)) if c.dtype(1) else None


@rule("Reshape")
def reshape(c: Native) -> Canon:
    if c.opset < 5 and c.attr("shape") is not None:
        shape: list[int | None] | None = list(c.attr("shape"))
    else:
        shape = c.ints(1)
    if shape is not None:
        zero_copies = not c.attr("allowzero", 0)
        shape = [None if d is None or d == -1 or (d == 0 and zero_copies) else d for d in shape]
    return Canon("reshape", (0,), {"shape": shape}, c.sizes(1))


@rule("Flatten")
def flatten(c: Native) -> Canon:
    return Canon("reshape", (0,), {"shape": None})


@rule("Transpose")
def transpose(c: Native) -> Canon | None:
    rank = c.rank(0)
    perm = c.attr("perm") or (None if rank is None else list(reversed(range(rank))))
    return None if perm is None else Canon("transpose", (0,), {"perm": perm})


@rule("Squeeze", "Unsqueeze")
def squeeze(c: Native) -> Canon | None:
    rank = c.rank(0)
    axes = c.axes_operand("axes", 1)
    if rank is None or (axes is None and c.has(1)):
        return None
    if c.node.op_type == "Unsqueeze":
        return None if axes is None else Canon("unsqueeze", (0,), {"axes": axes_of(axes, rank + len(axes))}, c.sizes(1))
    if axes is None:
        shape = c.hint(0)
        if shape is None:
            return None
        axes = [i for i, d in enumerate(shape) if d == 1]
    return Canon("squeeze", (0,), {"axes": axes_of(axes, rank)}, c.sizes(1))


@rule("Expand")
def expand(c: Native) -> Canon | None:
    shape, source = c.ints(1), c.hint(0)
    if shape is None or source is None:
        return None
    lead = len(shape) - len(source)
    if lead < 0:  # the missing leading axes are kept
        missing: list[int | None] = [None] * -lead
        shape, lead = missing + shape, 0
    kept = [None if d == 1 and i >= lead and source[i - lead] != 1 else d for i, d in enumerate(shape)]
    return Canon("expand", (0,), {"shape": kept}, c.sizes(1))


@rule("Concat")
def concat(c: Native) -> Canon | None:
    rank = c.rank(0)
    return None if rank is None else Canon("concat", c.every(), {"axis": axis_of(c.attr("axis", 1), rank)})


@rule("Split")
def split(c: Native) -> Canon | None:
    rank = c.rank(0)
    outs = [c.out(i) for i in range(len(c.node.outputs))]
    if rank is None:
        return None
    axis = axis_of(c.attr("axis", 0), rank)
    given = c.axes_operand("split", 1)
    if given is None and any(o is None for o in outs):
        return None
    sizes = given if given is not None else [o[axis] for o in outs if o is not None]
    return Canon("split", (0,), {"axis": axis, "sizes": sizes}, c.sizes(1))


@rule("SplitToSequence")
def split_to_sequence(c: Native) -> Canon | None:
    rank = c.rank(0)
    if rank is None:
        return None
    axis = axis_of(c.attr("axis", 0), rank)
    length, given = c.static(0, axis), c.const(1) if c.has(1) else None
    if c.has(1) and given is None:
        return None
    if given is not None and given.ndim == 1:
        sizes = [int(v) for v in given]
    elif length is None:
        return None
    else:
        step = 1 if given is None else int(given.ravel()[0])
        sizes = [min(step, length - start) for start in range(0, length, max(step, 1))]
    keepdims = given is not None or bool(c.attr("keepdims", 1))
    return Canon("split_to_sequence", (0,), {"axis": axis, "sizes": sizes, "keepdims": keepdims}, c.sizes(1))


@rule("SequenceAt")
def sequence_at(c: Native) -> Canon | None:
    index = c.const(1)
    return None if index is None else Canon("sequence_at", (0,), {"index": int(index.ravel()[0])}, c.sizes(1))


@rule("Slice")
def slice_(c: Native) -> Canon | None:
    rank = c.rank(0)
    old = c.opset < 10
    starts = list(c.attr("starts")) if old else c.ints(1)
    ends = list(c.attr("ends")) if old else c.ints(2)
    if rank is None or starts is None or ends is None:
        return None
    axes = c.axes_operand("axes", 3) if (old or c.has(3)) else None
    if axes is None:
        if not old and c.has(3):
            return None
        axes = list(range(len(starts)))
    strides = np.ones(len(starts)) if old or not c.has(4) else c.const(4)
    if strides is None:
        return None
    steps = [int(s) for s in strides.ravel()]
    axes = axes_of(axes, rank)
    sizes = [c.static(0, a) for a in axes]
    fixed = [_clamp(*p) for p in zip(starts, ends, steps, sizes, strict=True)]
    whole = all(step == -1 and lo == (None if n is None else n - 1) and hi is None
                for (lo, hi), step, n in zip(fixed, steps, sizes, strict=True))  # fmt: skip
    operands = c.sizes(1, 2, 3, 4)
    if whole and None not in starts and axes:
        return Canon("flip", (0,), {"axes": axes}, operands)
    attrs = {"axes": axes, "starts": [lo for lo, _ in fixed], "ends": [hi for _, hi in fixed], "steps": steps}
    return Canon("slice", (0,), attrs, operands)


def _clamp(start: int | None, end: int | None, step: int, n: int | None) -> tuple[int | None, int | None]:
    """Bounds as non-negative numbers within the length where it is known; an open end is None."""
    if step > 0:
        if n is not None:
            start = None if start is None else min(max(start + n if start < 0 else start, 0), n)
            end = None if end is None else min(max(end + n if end < 0 else end, 0), n)
        elif end is not None and end >= OPEN:
            end = None
        return start, end
    if n is not None:
        start = None if start is None else min(max(start + n if start < 0 else start, -1), n - 1)
        if end is not None:
            end = end + n if end < 0 else end
            end = None if end < 0 else min(end, n - 1)
    elif end is not None and end <= -OPEN:
        end = None
    return start, end


@rule("Gather")
def gather(c: Native) -> Canon | None:
    rank = c.rank(0)
    if rank is None:
        return None
    axis = axis_of(c.attr("axis", 0), rank)
    index = c.const(1)
    if index is not None and index.ndim == 0:
        position, n = int(index), c.static(0, axis)
        return Canon("select", (0,), {"axis": axis, "index": position + n if position < 0 and n else position}, (1,))
    return Canon("gather", (0, 1), {"axis": axis})


@rule("GatherElements")
def gather_elements(c: Native) -> Canon | None:
    rank = c.rank(0)
    return None if rank is None else Canon("gather_elements", (0, 1), {"axis": axis_of(c.attr("axis", 0), rank)})


@rule("GatherND")
def gather_nd(c: Native) -> Canon | None:
    batch, where = c.attr("batch_dims", 0), c.static(1, -1)
    if c.rank(0) is None or c.rank(1) is None or where is None:
        return None
    return Canon("gather_nd", (0, 1), {"axes": list(range(batch, batch + where)), "batch": batch})


@rule("Pad")
def pad(c: Native) -> Canon | None:
    rank = c.rank(0)
    if rank is None:
        return None
    old = c.opset < 11
    given = list(c.attr("pads") or c.attr("paddings") or []) if old else c.ints(1)
    flat: list[int | None] = [None] * (2 * rank)
    if given is not None:
        flat = given
    axes = list(range(rank))
    if not old and c.has(3):
        data = c.const(3)
        if data is None:
            return None
        axes = axes_of(data.ravel().tolist(), rank)
    pads: list[tuple[int | None, int | None]] = [(0, 0)] * rank
    for i, axis in enumerate(axes):
        pads[axis] = (flat[i], flat[i + len(axes)])
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}[
        c.attr("mode", "constant")
    ]
    value = c.attr("value", 0.0) if old else 0.0
    if not old and c.has(2):
        data = c.const(2)
        value = None if data is None else data.ravel()[0].item()
    return Canon("pad", (0,), {"pads": pads, "mode": mode, "value": value}, c.sizes(1, 2, 3))


@rule("Tile")
def tile(c: Native) -> Canon | None:
    repeats = c.ints(1)
    return None if repeats is None else Canon("tile", (0,), {"repeats": repeats}, c.sizes(1))


@rule("ConstantOfShape")
def full(c: Native) -> Canon:
    tensor = c.attr("value")
    value = 0.0 if tensor is None else tensor.numpy().ravel()[0].item()
    return Canon("full", (), {"shape": c.ints(0), "value": value}, (0,))


@rule("Range")
def arange(c: Native) -> Canon:
    data = [c.const(i) for i in range(3)]
    start, end, step = (None if d is None else d.ravel()[0].item() for d in data)
    return Canon("arange", (), {"start": start, "end": end, "step": step}, (0, 1, 2))


@rule("Shape", "Size")
def shape_of(c: Native) -> Canon | None:
    rank = c.rank(0)
    if rank is None:
        return None
    window = slice(c.attr("start", 0), c.attr("end")) if c.node.op_type == "Shape" else slice(None)
    return Canon("shape_of", (0,), {"axes": list(range(rank))[window]})


@rule("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")
def random(c: Native) -> Canon:
    return Canon("random", c.every())


@rule("If", "Loop", "Scan")
def control(c: Native) -> Canon:
    return Canon(c.node.op_type.lower(), c.every())
