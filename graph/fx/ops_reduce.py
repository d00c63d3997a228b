"""ATen call -> canonical node: reductions, scans, sorting and pooling."""

from __future__ import annotations

from typing import Any

import torch

from .ops import Call, Spec, reads, slots


def _axes(c: Call, value: Any) -> list[int]:
    rank = c.rank("self")
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return list(range(rank))
    items = value if isinstance(value, (list, tuple)) else [value]
    return sorted(c.axis(d, rank) for d in items)


_REDUCE = {
    "mean": "mean",
    "sum": "sum",
    "amax": "amax",
    "amin": "amin",
    "prod": "prod",
    "logsumexp": "logsumexp",
    "all": "all",
    "any": "any",
    "var": "var",
    "std": "std",
}


@reads(*_REDUCE)
def _reduce(c: Call) -> Spec | None:
    name = str(c.node.target).split(".")[1]
    attrs: dict[str, Any] = {"axes": _axes(c, c.get("dim")), "keepdims": bool(c.get("keepdim", False))}
    if name in ("var", "std"):
        correction = c.get("correction") if c.has("correction") else int(bool(c.get("unbiased")))
        attrs["correction"] = 1 if correction is None else correction
    return Spec(_REDUCE[name], slots("self"), attrs)


@reads("norm", "linalg_vector_norm")
def _norm(c: Call) -> Spec | None:
    p = c.get("p") if c.has("p") else c.get("ord")
    attrs = {"axes": _axes(c, c.get("dim")), "keepdims": bool(c.get("keepdim", False)), "p": 2.0 if p is None else p}
    return Spec("norm", slots("self"), attrs)


@reads("max", "min")
def _max(c: Call) -> Spec | None:
    name = str(c.node.target).split(".")[1]
    if c.overload == "other":
        return Spec("maximum" if name == "max" else "minimum", slots("self", "other"))
    if c.overload == "dim":
        if any(u.args[1] == 1 for u in c.node.users):
            return None  # the indices are used: canonical amax has none
        attrs = {"axes": _axes(c, c.get("dim")), "keepdims": bool(c.get("keepdim"))}
        return Spec("a" + name, slots("self"), attrs)
    return Spec("a" + name, slots("self"), {"axes": list(range(c.rank("self"))), "keepdims": False})


@reads("argmax", "argmin", "cumsum", "cumprod", "logcumsumexp", "topk", "sort")
def _along(c: Call) -> Spec | None:
    name, dim = str(c.node.target).split(".")[1], c.get("dim")
    if dim is None or name in ("cumprod", "logcumsumexp"):
        return None
    attrs: dict[str, Any] = {"axis": c.axis(dim, c.rank("self"))}
    if name == "topk":
        attrs["k"] = c.get("k") if isinstance(c.get("k"), int) else None
    return Spec(name, slots("self"), attrs)


def _list(value: Any, n: int) -> list[int]:
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    return items * n if len(items) == 1 else items


@reads(*[f"{k}_pool{n}d" for k in ("max", "avg") for n in (1, 2, 3)])
@reads("max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool1d_with_indices")
def _pool(c: Call) -> Spec | None:
    name = str(c.node.target).split(".")[1]
    if "indices" in name and any(u.args[1] == 1 for u in c.node.users):
        return None
    n = int(name.split("pool")[1][0])
    kernel = _list(c.get("kernel_size"), n)
    stride = _list(c.get("stride") or kernel, n)
    attrs = {
        "kernel": kernel,
        "stride": stride,
        "padding": [(p, p) for p in _list(c.get("padding"), n)],
        "dilation": _list(c.get("dilation", 1), n),
        "ceil": bool(c.get("ceil_mode")),
        "count_include_pad": bool(c.get("count_include_pad", True)),
    }
    if c.get("divisor_override") is not None:
        return None
    return Spec("max_pool" if name.startswith("max") else "avg_pool", slots("self"), attrs)


@reads(*[f"adaptive_{k}_pool{n}d" for k in ("avg", "max") for n in (1, 2, 3)])
@reads("_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
def _adaptive(c: Call) -> Spec | None:
    name = str(c.node.target).split(".")[1]
    if "max" in name and any(u.args[1] == 1 for u in c.node.users):
        return None
    size = c.get("output_size")
    op = "adaptive_max_pool" if "max" in name else "adaptive_avg_pool"
    return Spec(op, slots("self"), {"output_size": c.sizes(size)}, c.dynamic(size))


@reads("glu")
def _glu(c: Call) -> Spec | None:
    return Spec("glu", slots("self"), {"axis": c.axis(c.get("dim"), c.rank("self"))})


def is_tensor(value: Any) -> bool:
    """True for a (fake) tensor."""
    return isinstance(value, torch.Tensor)
