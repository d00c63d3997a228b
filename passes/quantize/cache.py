"""The pass: keys and values of attention quantized where a cache holds them, or their scales as data for a runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from ...graph.errors import ConstraintError
from ...graph.ir import Graph, Node, Value
from ..base import Context, Contract, Decision, Needs, Outcome, Pass
from ..calibrate import MinMax, collect
from .numerics import QuantParams, grid
from .spec import TensorFormat

MOVES = frozenset("transpose reshape expand squeeze unsqueeze identity cast repeat_interleave tile".split())
"""Operators between a cache and the product that reads it; they change no number."""
BETWEEN = frozenset("add sub mul div where masked_fill clip reshape cast identity transpose expand slice".split())
"""Operators between the scores and their softmax."""


@dataclass(frozen=True)
class Cached:
    """One tensor of keys or values.

    Attributes:
        value: what a cache stores.
        kind: ``keys`` or ``values``.
        reader: the product that reads it.
        at_hand: the graph itself hands it in or out, so that Q/DQ belongs on it.
    """

    value: Value
    kind: str
    reader: Node
    at_hand: bool


class QuantizeCache(Pass):
    """Ranges of keys and values from calibration; Q/DQ on them where they enter or leave the graph as a cache.

    A graph without a cache (a single forward pass) is left as it is: its scales are in the report, by layer, for the
    runtime that keeps the cache.
    """

    name: ClassVar[str] = "quantize_cache"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    needs: ClassVar[Needs] = Needs.CALIBRATION

    dtype: Literal["int8", "uint8", "float8_e4m3fn", "float8_e5m2"] = "int8"
    """Stored type; int8 and float8 are symmetric, uint8 takes the range seen."""
    granularity: Literal["tensor", "head", "channel"] = "tensor"
    """What shares a scale: a layer's keys (values), a head of them, or a channel of a head."""
    write: Literal["auto", "always", "never"] = "auto"
    """auto: Q/DQ where the graph has a cache; always: also where it has none; never: scales only."""
    calibration: Any = Field(default=None, exclude=True, repr=False)
    """Batches of typical inputs; the run's own when absent."""

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        """Find, calibrate, write.

        Raises:
            ConstraintError: the graph has no attention that is understood, or its opset has no such type.
        """
        found = keys_and_values(graph)
        if not found:
            raise ConstraintError(
                "no keys and values were found", node=graph.name, expected="sdpa, or a softmax between two products"
            )
        self._opset(graph)
        statistics = {c.value.name: MinMax(self._axis(c.value)) for c in found}
        collect(graph, self.batches(ctx), statistics, progress=ctx.progress)
        scales: dict[str, Any] = {}
        decisions = []
        for cached in found:
            name = cached.value.name
            params = self._params(statistics[name], self._axis(cached.value))
            written = self.write == "always" or (self.write == "auto" and cached.at_hand)
            scales[name] = {
                "kind": cached.kind,
                "reader": cached.reader.name,
                "dtype": self.dtype,
                "axis": params.axis,
                "scale": np.asarray(params.scale, np.float32).tolist(),
                "zero_point": np.asarray(params.zero_point).astype(np.float64).tolist(),
            }
            if written:
                _insert_pair(graph, cached.value, params)
                decisions.append(Decision(name, "quantized", f"{cached.kind} of {cached.reader.name}, {self.dtype}"))
            else:
                reason = "the graph keeps no cache; its runtime takes the scale from the report"
                decisions.append(Decision(name, "calibrated", reason, scales[name]))
        graph.refresh()
        return Outcome(decisions=decisions, details={"scales": scales, "cached": sum(c.at_hand for c in found)})

    def _axis(self, value: Value) -> int | None:
        rank = value.rank or 0
        return {"tensor": None, "head": rank - 3, "channel": rank - 1}[self.granularity] if rank >= 3 else None

    def _params(self, seen: MinMax, axis: int | None) -> QuantParams:
        form = TensorFormat(
            self.dtype, symmetric=self.dtype != "uint8", range=(-127, 127) if self.dtype == "int8" else None
        )
        return grid(seen.low, seen.high, form, axis)

    def _opset(self, graph: Graph) -> None:
        if graph.kind != "onnx":
            return
        from ...graph.onnx.attrs import opset_of

        least = 19 if self.dtype.startswith("float8") else 13
        if self.write != "never" and opset_of(graph) < least:  # type: ignore[arg-type]
            raise ConstraintError(
                f"{self.dtype} needs opset {least}", node=graph.name, found=opset_of(graph),  # type: ignore[arg-type]
                hint="export at a newer opset, or take write='never' for the scales alone",
            )  # fmt: skip


def keys_and_values(graph: Graph) -> list[Cached]:
    """Keys and values of every attention, in order, each value once."""
    found: dict[str, Cached] = {}
    for node in graph.nodes:
        for kind, value, reader in _operands(node):
            stored = _stored(value)
            if stored is not None:
                found.setdefault(stored.name, Cached(stored, kind, reader, _at_hand(stored)))
    return list(found.values())


def _operands(node: Node) -> list[tuple[str, Value, Node]]:
    if node.op == "sdpa":
        keys, values = node.input(1), node.input(2)
        return [(k, v, node) for k, v in (("keys", keys), ("values", values)) if v is not None]
    if node.op != "softmax":
        return []
    found = []
    x = node.inputs[0]
    scores = _above(x) if x is not None else None
    if scores is not None and scores.input(1) is not None:
        found.append(("keys", scores.inputs[1], scores))
    mixed = _below(node.output)
    if mixed is not None and mixed.input(1) is not None:
        found.append(("values", mixed.inputs[1], mixed))
    return [(k, v, n) for k, v, n in found if v is not None] if len(found) == 2 else []


def _above(value: Value) -> Node | None:
    """The product that made the scores."""
    for _ in range(16):
        node = value.producer
        if node is None:
            return None
        if node.op == "matmul":
            return node
        first = next((v for v in node.inputs if v is not None and not v.is_const and v.producer is not None), None)
        if node.op not in BETWEEN or first is None:
            return None
        value = first
    return None


def _below(value: Value) -> Node | None:
    """The product of the probabilities with the values."""
    for _ in range(8):
        for node, position in value.uses:
            if node.op == "matmul" and position == 0:
                return node
        following = [n for n, i in value.uses if i == 0 and n.op in ("cast", "identity", "reshape", "where", "mul")]
        if not following:
            return None
        value = following[0].output
    return None


def _stored(value: Value) -> Value | None:
    """What a cache holds of an operand: the graph's output, or the heads as [..., heads, length, dim], each once."""
    chain = [value]
    while not value.is_output and (node := value.producer) is not None:
        scaled = node.op in ("mul", "div") and any(v is not None and v.is_const and _single(v) for v in node.inputs)
        inner = next((v for v in node.inputs if v is not None and not v.is_const), None)
        if inner is None or not (node.op in MOVES or scaled):
            break
        value = inner
        chain.append(value)
    if value.is_output:
        return value
    sizes = [int(np.prod(v.hint)) if v.hint is not None else 0 for v in chain]
    least = min(sizes)
    heads = [v for v, n in zip(chain, sizes, strict=True) if n == least and (v.rank or 0) >= 4][::-1]
    if not heads:
        return value if not value.is_const and (value.rank or 0) == 3 else None
    # The projection is cut into heads, which are then turned to stand before the length.
    turned = len(heads) > 1 and _made_by(heads[0], "reshape") and _made_by(heads[1], "transpose")
    return heads[1] if turned else heads[0]


def _made_by(value: Value, op: str) -> bool:
    return value.producer is not None and value.producer.op == op


def _single(value: Value) -> bool:
    return value.hint is not None and int(np.prod(value.hint)) == 1


def _at_hand(value: Value) -> bool:
    if value.is_output or value.is_input:
        return True
    node = value.producer
    return node is not None and node.op == "concat" and any(v is not None and v.is_input for v in node.inputs)


def _insert_pair(graph: Graph, value: Value, params: QuantParams) -> None:
    name = value.name
    scale = graph.add_weight(f"{name}_cache_scale", np.asarray(params.scale, np.float32))
    zero = graph.add_weight(f"{name}_cache_zero_point", np.asarray(params.zero_point))
    attrs = {"axis": params.axis, "dtype": params.dtype, "block": 0}
    q = graph.insert("quantize", [value, scale, zero], attrs, name=f"{name}_cache_quantize", after=value.producer)
    dq = graph.insert(
        "dequantize", [q.output, scale, zero], {**attrs, "dtype": "float32"}, name=f"{name}_cache_dequantize", after=q
    )
    graph.replace_uses(value, dq.output, except_nodes=[q])
