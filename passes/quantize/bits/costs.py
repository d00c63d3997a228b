"""What a choice of bits costs: bytes of weights, bit operations, measured milliseconds; and the budgets on them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, get_args

from ....graph.errors import ConfigError, ConstraintError
from ....graph.ir import Graph
from ....graph.ops.macs import macs
from ..placement import Placement, WeightSite
from ..spec import TensorFormat

Kind = Literal["bits", "bytes", "bitops", "latency"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_TEXT = re.compile(r"\s*(\w+)\s*\(\s*([0-9.eE+_]+)\s*\)\s*")
FLOAT_BITS = 32


@dataclass(frozen=True)
class Budget:
    """The most that may be spent of one quantity.

    ``bits``: average bits per weight; ``bytes``: of stored weights with their scales; ``bitops``: multiply-accumulates
    times bits of both operands, per sample; ``latency``: milliseconds by the table given. For the last three a number
    up to 1 is a share of what the widest choice everywhere costs.
    """

    kind: Kind
    value: float


def budgets(wish: Any) -> list[Budget]:
    """``4`` (average bits), ``"bitops(0.25)"``, ``{"bytes": 70000, "bitops": 0.3}`` or a list of texts.

    Raises:
        ConfigError: not a budget.
    """
    if isinstance(wish, (int, float)) and not isinstance(wish, bool):
        found = [("bits", float(wish))]
    elif isinstance(wish, str):
        match = _TEXT.fullmatch(wish)
        found = [(match[1], float(match[2]))] if match else []
    elif isinstance(wish, Mapping):
        found = [(str(k), float(v)) for k, v in wish.items()]
    elif isinstance(wish, (list, tuple)):
        return [b for one in wish for b in budgets(one)]
    else:
        found = []
    if not found or any(kind not in KINDS or not value > 0 for kind, value in found):
        raise ConfigError(
            "not a budget of bits", node="budget", found=repr(wish)[:80],
            expected="average bits as a number, or bits(4), bytes(70000), bitops(0.25), latency(1.5); or a mapping",
        )  # fmt: skip
    return [Budget(kind, value) for kind, value in found]  # type: ignore[arg-type]


def stored_bytes(shape: tuple[int, ...], axis: int, in_axis: int | None, form: TensorFormat, packed: bool) -> float:
    """Bytes of a weight: its integers (packed to their bits, or in the type that holds them) and its scales."""
    size = prod(shape)
    bits = form.bits if packed else form.stored_bits
    into = in_axis if in_axis is not None else 0
    scales = {
        "tensor": 1,
        "out_channel": shape[axis],
        "in_channel": shape[into],
        "block": size // shape[into] * -(-shape[into] // max(form.block, 1)),
    }[form.granularity]
    width = 4 if form.scale_dtype == "float32" else 1 if form.scale_dtype.startswith("float8") else 2
    return size * bits / 8 + scales * (width if form.symmetric or form.is_float else width + bits / 8)


def site_bytes(site: WeightSite, form: TensorFormat, packed: bool = True) -> float:
    """:func:`stored_bytes` of a site's weight."""
    return stored_bytes(site.weight.shape, site.axis, site.in_axis, form, packed)


def bit_operations(multiply_accumulates: int, weight_bits: float, activation_bits: float) -> float:
    """Multiply-accumulates times the bits of both operands: what an adder tree of single bits has to do."""
    return float(multiply_accumulates) * weight_bits * activation_bits


def site_macs(graph: Graph, site: WeightSite) -> int:
    """Multiply-accumulates of a site per sample of the hint batch.

    Raises:
        ConstraintError: a shape is unknown.
    """
    from ....graph.cost import batch_of

    found = macs(site.node)
    if found is None:
        raise ConstraintError("the work of this layer is unknown", node=site.node.name, hint="give example inputs")
    return found // max(batch_of(graph), 1)


def activation_bits(placement: Placement, site: WeightSite) -> float:
    """Bits of what meets a weight; 32 where it stays float."""
    point = placement.points.get(site.x.name)
    return FLOAT_BITS if point is None else float(point.form.bits)
