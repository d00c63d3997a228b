"""ATen call -> canonical node: fills, ranges, arithmetic on sizes, casts and calls that change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .ops import TORCH_DTYPES, Call, Spec, dtype_name, reads, slots

aten = torch.ops.aten


@reads("full", "zeros", "ones", "empty", "new_full", "new_zeros", "new_ones", "new_empty", "scalar_tensor")
def _full(c: Call) -> Spec | None:
    name = str(c.node.target).split(".")[1]
    size = c.get("size", [])
    value = c.get("fill_value", c.get("s", {"zeros": 0.0, "ones": 1.0, "empty": None}.get(name.split("_")[-1])))
    value = float(value) if isinstance(value, (int, float)) else None
    write = {"shape": lambda v: c.put_sizes("size", v)}
    return Spec("full", [], {"shape": c.sizes(size), "value": value}, c.dynamic([*size, c.get("fill_value")]), write)


@reads("full_like", "zeros_like", "ones_like", "empty_like", "fill", "zero")
def _full_like(c: Call) -> Spec | None:
    name = str(c.node.target).split(".")[1]
    value = c.get("fill_value", c.get("value", {"zeros_like": 0.0, "ones_like": 1.0, "zero": 0.0}.get(name)))
    return Spec("full_like", slots("self"), {"value": float(value) if isinstance(value, (int, float)) else None})


@reads("arange")
def _arange(c: Call) -> Spec | None:
    start, step = c.get("start", 0), c.get("step", 1)
    plain = {k: v if isinstance(v, (int, float)) else None for k, v in (("start", start), ("end", c.get("end")))}
    step = step if isinstance(step, (int, float)) else None

    def put(name: str) -> Callable[[Any], None]:
        def write_bound(value: Any) -> None:
            if value is None:
                return
            if not c.has("step"):
                c.retarget(
                    aten.arange.start_step, c.get("start", 0), c.get("end"), c.get("step", 1), **dict(c.node.kwargs)
                )
            c.put(name, value)

        return write_bound

    write = {name: put(name) for name in ("start", "end", "step")}
    return Spec("arange", [], {**plain, "step": step}, c.dynamic([start, c.get("end"), c.get("step")]), write)


@reads("sym_size")
def _sym_size(c: Call) -> Spec | None:
    return Spec("shape_of", slots("self"), {"axes": [c.axis(c.get("dim"), c.rank("self"))]})


_SCALAR_FUNCTIONS = (
    "mul add sub truediv floordiv mod neg pow eq ne lt le gt ge and_ or_ xor lshift rshift pos abs not_".split()
)


@reads(
    *[f"operator.{n}" for n in _SCALAR_FUNCTIONS],
    *[
        f"torch.{n}"
        for n in ("sym_max", "sym_min", "sym_float", "sym_int", "sym_sum", "sym_not", "sym_ite", "sym_sqrt")
    ],
    *[f"math.{n}" for n in ("ceil", "floor", "trunc", "sqrt")],
    *[f"builtins.{n}" for n in ("round", "int", "float", "max", "min")],
)
def _scalar(c: Call) -> Spec | None:
    if isinstance(c.node.meta.get("val"), torch.Tensor):
        return None
    args = c.node.args
    if len(args) == 1 and isinstance(args[0], (list, tuple)):
        return Spec("scalar", [(0, i) for i in range(len(args[0]))])
    return Spec("scalar", [(i, None) for i in range(len(args))])


@reads("to", "_to_copy", "type_as", "_cast_Float", "float", "half")
def _cast(c: Call) -> Spec | None:
    source, target = c.val(c.get("self")), c.node.meta.get("val")
    if isinstance(target, torch.Tensor) and source.dtype != target.dtype:

        def put(name: Any) -> None:
            c.retarget(aten.to.dtype, c.get("self"), TORCH_DTYPES[name])

        return Spec("cast", slots("self"), {"dtype": dtype_name(target.dtype)}, write={"dtype": put})
    return Spec("identity", slots("self"), {"fn": "to"})


_IDENTITY = {
    "clone": "clone",
    "contiguous": "contiguous",
    "detach": "detach",
    "alias": "alias",
    "lift_fresh": "alias",
    "lift_fresh_copy": "clone",
    "dropout": "dropout",
    "feature_dropout": "dropout",
    "alpha_dropout": "dropout",
    "feature_alpha_dropout": "dropout",
    "view_as_real_copy": "alias",
    "resolve_conj": "alias",
    "resolve_neg": "alias",
    "positive": "alias",
}


@reads(*_IDENTITY)
def _identity(c: Call) -> Spec | None:
    name = str(c.node.target).split(".")[1]
    if _IDENTITY[name] == "dropout" and c.get("train") and float(c.get("p")) > 0:
        return Spec("random", slots("input"))
    first = "input" if c.has("input") else "self"
    return Spec("identity", slots(first), {"fn": _IDENTITY[name]})


@reads("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d")
@reads("upsample_bilinear2d", "upsample_linear1d", "upsample_trilinear3d", "upsample_bicubic2d")
@reads("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
def _resize(c: Call) -> Spec | None:
    name = "input" if c.has("input") else "self"
    name_op = str(c.node.target).split(".")[1]
    attrs = {"axes": list(range(2, c.rank(name))), "mode": name_op}
    return Spec("resize", slots(name), attrs, c.dynamic(c.get("output_size") or []))


@reads("rand", "randn", "randint", "rand_like", "randn_like", "bernoulli", "normal", "multinomial", "randperm")
def _random(c: Call) -> Spec | None:
    return Spec("random", slots("self") if c.has("self") else [])
