"""ATen call -> canonical node: reshapes, moves, slices, concatenations, fills and arithmetic on sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .ops import Call, Slot, Spec, list_slots, reads, slots

aten = torch.ops.aten
_OPEN = 2**62


@reads("view", "reshape", "_unsafe_view")
def _reshape(c: Call) -> Spec | None:
    if c.overload == "dtype":
        return None
    name = "shape" if c.has("shape") else "size"
    sizes = c.get(name)
    return Spec(
        "reshape",
        slots("self"),
        {"shape": c.sizes(sizes)},
        c.dynamic(sizes),
        {"shape": lambda v: c.put_sizes(name, v) if v is not None else None},
    )


@reads("flatten", "view_as", "reshape_as", "ravel")
def _reshape_without_constant(c: Call) -> Spec | None:
    if c.overload not in ("", "using_ints"):
        return None
    return Spec("reshape", slots("self"), {"shape": None}, c.dynamic(c.get("other", [])))


@reads("unflatten")
def _unflatten(c: Call) -> Spec | None:
    dim, sizes, rank = c.axis(c.get("dim"), c.rank("self")), c.get("sizes"), c.rank("self")
    full = [None] * dim + c.sizes(sizes) + [None] * (rank - dim - 1)

    def put(new: Any) -> None:
        c.put_sizes("sizes", new[dim : dim + len(sizes)])

    return Spec("reshape", slots("self"), {"shape": full}, c.dynamic(sizes), {"shape": put})


def _permutation(c: Call) -> list[int]:
    rank, name = c.rank("self"), str(c.node.target).split(".")[1]
    perm = list(range(rank))
    if name == "permute":
        return [c.axis(d, rank) for d in c.get("dims")]
    if name in ("t", "numpy_T"):
        return perm[::-1]
    if name in ("mT", "adjoint"):
        return [*perm[:-2], perm[-1], perm[-2]]
    if name in ("movedim", "moveaxis"):
        source, target = c.get("source"), c.get("destination")
        source = [c.axis(d, rank) for d in (source if isinstance(source, (list, tuple)) else [source])]
        target = [c.axis(d, rank) for d in (target if isinstance(target, (list, tuple)) else [target])]
        rest = iter(d for d in perm if d not in source)
        placed = dict(zip(target, source, strict=True))
        return [placed[i] if i in placed else next(rest) for i in range(rank)]
    first, second = ("dim0", "dim1") if c.has("dim0") else ("axis0", "axis1")
    a, b = c.axis(c.get(first), rank), c.axis(c.get(second), rank)
    if rank:
        perm[a], perm[b] = perm[b], perm[a]
    return perm


@reads("permute", "transpose", "t", "numpy_T", "mT", "movedim", "moveaxis", "swapaxes", "swapdims")
def _transpose(c: Call) -> Spec | None:
    write = {"perm": lambda v: c.retarget(aten.permute.default, c.get("self"), [int(d) for d in v])}
    return Spec("transpose", slots("self"), {"perm": _permutation(c)}, write=write)


@reads("squeeze", "unsqueeze")
def _squeeze(c: Call) -> Spec | None:
    dim = c.get("dim")
    if "unsqueeze" in str(c.node.target):
        return Spec("unsqueeze", slots("self"), {"axes": [c.axis(dim, c.rank("self") + 1)]})
    shape = c.val(c.get("self")).shape
    dims = list(range(len(shape))) if dim is None else (list(dim) if isinstance(dim, (list, tuple)) else [dim])
    axes = sorted(c.axis(d, len(shape)) for d in dims)
    return Spec("squeeze", slots("self"), {"axes": [d for d in axes if isinstance(shape[d], int) and shape[d] == 1]})


@reads("expand", "broadcast_to", "expand_as")
def _expand(c: Call) -> Spec | None:
    if c.has("other"):
        return Spec("expand", slots("self"), {"shape": [None] * c.output_rank()}, c.dynamic(c.get("other")))
    size = c.get("size")
    source, offset = c.val(c.get("self")).shape, len(size) - c.rank("self")
    kept = [i >= offset and isinstance(s, int) and source[i - offset] == s and s != 1 for i, s in enumerate(size)]
    for i, keep in enumerate(kept):  # an axis that already has this length needs no baked size
        if keep:
            size = [-1 if i == j else s for j, s in enumerate(size)]
    if any(kept):
        c.put("size", list(size))
    return Spec(
        "expand",
        slots("self"),
        {"shape": c.sizes(size)},
        c.dynamic(size),
        {"shape": lambda v: c.put_sizes("size", v)},
    )


@reads("cat", "concat", "concatenate", "stack")
def _concat(c: Call) -> Spec | None:
    op = "stack" if "stack" in str(c.node.target) else "concat"
    write = {"axis": lambda v: c.put("dim", int(v))}
    return Spec(op, list_slots(c, "tensors"), {"axis": c.axis(c.get("dim"), c.output_rank())}, write=write)


@reads("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split", "unsafe_split_with_sizes")
def _split(c: Call) -> Spec | None:
    if c.overload == "tensor_indices_or_sections" or not isinstance(c.node.meta.get("val"), (list, tuple)):
        return None
    axis = c.axis(c.get("dim"), c.rank("self"))
    sizes = c.get("split_sizes", c.get("split_size"))
    if not isinstance(sizes, (list, tuple)):
        sizes = [v.shape[axis] for v in c.val(c.node)]

    def put(new: Any) -> None:
        c.retarget(aten.split_with_sizes.default, c.get("self"), [int(s) for s in new], axis)

    known = [s if isinstance(s, int) else None for s in sizes]
    return Spec("split", slots("self"), {"axis": axis, "sizes": known}, write={"sizes": put})


@reads("unbind")
def _unbind(c: Call) -> Spec | None:
    return Spec("unbind", slots("self"), {"axis": c.axis(c.get("dim"), c.rank("self"))})


@reads("slice", "narrow")
def _slice(c: Call) -> Spec | None:
    axis = c.axis(c.get("dim"), c.rank("self"))
    length = c.val(c.get("self")).shape[axis]
    start, step = c.get("start"), c.get("step", 1)
    narrow = c.has("length")
    end = c.get("end")
    if narrow:
        span = c.get("length")
        end = start + span if isinstance(start, int) and isinstance(span, int) else None
        if isinstance(start, int) and start < 0:
            return None

    def bound(x: Any) -> int | None:
        if not isinstance(x, int) or x >= _OPEN:
            return None
        if isinstance(length, int):
            return min(max(x + length if x < 0 else x, 0), length)
        return x

    starts = 0 if start is None else bound(start)
    ends = bound(end) if end is not None else None
    if isinstance(length, int) and ends is None and isinstance(end, int):
        ends = None
    attrs = {"axes": [axis], "starts": [starts], "ends": [ends], "steps": [step if isinstance(step, int) else None]}

    def put_starts(new: Any) -> None:
        if new[0] is not None:
            to_slice()
            c.put("start", int(new[0]))

    def put_ends(new: Any) -> None:
        to_slice()
        if new[0] is not None:
            c.put("end", int(new[0]))
        elif not isinstance(c.get("end"), fx.Node):
            c.put("end", 2**63 - 1)

    def to_slice() -> None:
        if narrow and c.has("length"):
            c.retarget(aten.slice.Tensor, c.get("self"), axis, start, end, 1)

    write = {"starts": put_starts, "ends": put_ends, "steps": lambda v: c.put("step", int(v[0]))}
    return Spec("slice", slots("self"), attrs, c.dynamic([start, c.get("end"), c.get("length")]), write)


@reads("select")
def _select(c: Call) -> Spec | None:
    axis, index = c.axis(c.get("dim"), c.rank("self")), c.get("index")
    length = c.val(c.get("self")).shape[axis]
    fixed = index if isinstance(index, int) else None
    if fixed is not None and fixed < 0 and isinstance(length, int):
        fixed += length
    write = {"index": lambda v: c.put("index", int(v)) if v is not None else None}
    return Spec("select", slots("self"), {"axis": axis, "index": fixed}, c.dynamic(index), write)


_PAD_MODES = {"reflection": "reflect", "replication": "replicate"}


@reads(
    "pad",
    "constant_pad_nd",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
)
def _pad(c: Call) -> Spec | None:
    rank, name = c.rank("self"), "pad" if c.has("pad") else "padding"
    flat = c.get(name)
    packet = str(c.node.target).split(".")[1]
    mode = c.get("mode") or _PAD_MODES.get(packet.split("_")[0], "constant")
    pads: list[tuple[int | None, int | None]] = [(0, 0)] * rank
    known = [s if isinstance(s, int) else None for s in flat]  # negative pads crop
    for i in range(len(flat) // 2):
        pads[rank - 1 - i] = (known[2 * i], known[2 * i + 1])

    def put(new: Any) -> None:
        last = max([i for i, p in enumerate(reversed(new)) if tuple(p) != (0, 0)] + [len(flat) // 2 - 1])
        out: list[Any] = []
        for i in range(last + 1):
            for side, value in enumerate(new[rank - 1 - i]):
                old = flat[2 * i + side] if 2 * i + side < len(flat) else 0
                out.append(old if value is None else int(value))
        c.put(name, out)

    attrs = {"pads": pads, "mode": mode, "value": c.get("value", 0.0) or 0.0}
    return Spec("pad", slots("self"), attrs, c.dynamic(flat), {"pads": put, "value": lambda v: c.put("value", v)})


@reads("flip")
def _flip(c: Call) -> Spec | None:
    return Spec("flip", slots("self"), {"axes": sorted(c.axis(d, c.rank("self")) for d in c.get("dims"))})


@reads("roll")
def _roll(c: Call) -> Spec | None:
    dims = c.get("dims")
    if not dims or c.dynamic(c.get("shifts")):
        return None
    shifts = c.get("shifts")
    attrs = {"axes": [c.axis(d, c.rank("self")) for d in dims], "shifts": list(shifts)}
    return Spec("roll", slots("self"), attrs, write={"shifts": lambda v: c.put("shifts", [int(s) for s in v])})


@reads("repeat", "tile")
def _tile(c: Call) -> Spec | None:
    name = "repeats" if c.has("repeats") else "dims"
    given = list(c.get(name))
    lead = c.output_rank() - len(given)

    def put(new: Any) -> None:
        c.put_sizes(name, new[lead:])

    attrs = {"repeats": [1] * lead + c.sizes(given)}
    return Spec("tile", slots("self"), attrs, c.dynamic(given), {"repeats": put})


@reads("repeat_interleave")
def _repeat_interleave(c: Call) -> Spec | None:
    if c.overload != "self_int" or c.get("dim") is None or not isinstance(c.get("repeats"), int):
        return None

    def put(new: Any) -> None:
        c.put("repeats", int(new))
        if c.get("output_size") is not None:
            c.put("output_size", None)

    attrs = {"axis": c.axis(c.get("dim"), c.rank("self")), "repeats": c.get("repeats")}
    return Spec("repeat_interleave", slots("self"), attrs, write={"repeats": put})


@reads("pixel_shuffle", "pixel_unshuffle")
def _pixel_shuffle(c: Call) -> Spec | None:
    name = "upscale_factor" if c.has("upscale_factor") else "downscale_factor"
    op = "pixel_shuffle" if name.startswith("up") else "pixel_unshuffle"
    write = {"factor": lambda v: c.put(name, int(v))}
    return Spec(op, slots("self"), {"factor": c.get(name), "mode": "crd"}, write=write)


@reads("im2col", "col2im")
def _im2col(c: Call) -> Spec | None:
    def two(name: str) -> list[int]:
        value = list(c.get(name))
        return value * 2 if len(value) == 1 else value

    attrs: dict[str, Any] = {k: two(n) for k, n in (("kernel", "kernel_size"), ("stride", "stride"))}
    attrs |= {"padding": two("padding"), "dilation": two("dilation")}
    if c.has("output_size"):
        return Spec("fold", slots("self"), attrs | {"output_size": c.sizes(c.get("output_size"))})
    return Spec("unfold", slots("self"), attrs)


@reads("index", "index_select")
def _index(c: Call) -> Spec | None:
    if c.has("dim"):
        return Spec("gather", slots("self", "index"), {"axis": c.axis(c.get("dim"), c.rank("self"))})
    if c.overload != "Tensor":
        return None
    given = [(i, x) for i, x in enumerate(c.get("indices")) if x is not None]
    if any(c.val(x).dtype in (torch.bool, torch.uint8) for _, x in given):
        return None
    axes = [i for i, _ in given]
    operands: list[Slot] = [("self", None), *[("indices", i) for i in axes]]
    return (
        Spec("gather", operands, {"axis": axes[0]}) if len(given) == 1 else Spec("gather_nd", operands, {"axes": axes})
    )


@reads("gather", "take_along_dim")
def _gather_elements(c: Call) -> Spec | None:
    if c.get("dim") is None:
        return None
    index = "index" if c.has("index") else "indices"
    return Spec("gather_elements", slots("self", index), {"axis": c.axis(c.get("dim"), c.rank("self"))})
