"""ReplaceAttention: the softmax over keys written as exp and a sum, or replaced by a length-scaled softplus."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from ...graph.ir import Graph, Node, Value
from ..base import Context, Contract, Decision, Outcome, Pass
from ..rewrite import Refusal
from .attention import Writer, cores, take_apart
from .common import matches

MASKED = -1e30
"""Scores below this are taken for masked (exporters write -inf or the smallest number of the type)."""
TINY = 1e-30


class ReplaceAttention(Pass):
    """Attention weights as a positive function of the scores divided by its sum, with any such function.

    ``softmax = l1norm o exp``: form "exp" writes just that, ``e^(x - max) / sum``, and keeps the function. Form
    "softplus" puts ``softplus(s(n) x)`` in the place of exp, with n the number of keys a query sees and
    ``s(n) = log(n + 1)``: the more keys, the sharper, so that attention does not flatten on longer texts than trained
    on. ``power`` sharpens further and needs no training: weights under ``threshold / n`` become zero, the rest is
    raised to the power and normalised again, ``l1norm(relu(n a - threshold)^power)``. Source: "Softplus Attention with
    Re-weighting Boosts Length Extrapolation in Large Language Models" (there the scale also holds log d, which is
    constant and which training absorbs; the threshold is this library's).

    Fused attention is written out first. Masks of any kind count (truth values, -inf, the smallest number): a masked
    key gets exactly zero, and a query that sees no key gives zeros, not NaN.

    Contract: EXACT for "exp" without a power (up to queries that see no key), FRESH otherwise: softplus is a new model
    that has to be trained.

    Refused, with the reason: fused attention with a causal mask over lengths known at run time only.
    """

    name: ClassVar[str] = "replace_attention"
    contract: ClassVar[Contract] = Contract.FRESH
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    form: Literal["softplus", "exp"] = "softplus"
    """What takes the place of the exponential."""
    power: float | None = Field(None, gt=0)
    """Power of the re-weighting; None: none."""
    threshold: float = Field(0.5, ge=0)
    """Share of the mean weight 1/n under which a key is dropped by the re-weighting."""
    ignore: list[str] = Field(default_factory=list)
    """Glob patterns of nodes, or of the modules they are in, to leave alone."""

    @model_validator(mode="after")
    def _below_mean(self) -> ReplaceAttention:
        if self.power is not None and self.threshold >= 1:
            raise ValueError("a threshold of 1 or more can drop every key: where all weights are equal, they are 1/n")
        return self

    def promise(self) -> Contract:
        return Contract.EXACT if self.form == "exp" and self.power is None else Contract.FRESH

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        decisions = []
        for node in cores(graph):
            if matches(node, self.ignore):
                decisions.append(Decision(node.name, "kept", "ignored by a pattern"))
                continue
            name, scope = node.name, node.scope
            softmax = take_apart(graph, node) if node.op == "sdpa" else node
            if isinstance(softmax, Refusal):
                decisions.append(Decision(name, "refused", softmax.reason))
                continue
            self._rewrite(graph, softmax)
            decisions.append(Decision(scope or name, "replaced", f"softmax became {self._said()}", {"node": name}))
        graph.refresh()
        return Outcome(decisions=decisions, details={"replaced": sum(d.action == "replaced" for d in decisions)})

    def _said(self) -> str:
        what = "exp over its sum" if self.form == "exp" else "softplus(log(n + 1) x) over its sum"
        return what if self.power is None else f"{what}, re-weighted with power {self.power:g}"

    def _rewrite(self, graph: Graph, softmax: Node) -> None:
        x = softmax.inputs[0]
        assert x is not None and x.rank is not None
        axes = [int(softmax.attrs["axis"]) % x.rank]
        write = Writer(graph, softmax.name, x.producer, softmax.scope)
        x = write.wide(x)
        made = exponential(write, x, axes) if self.form == "exp" else None
        if made is None or self.power is not None:
            visible, count = _keys(write, x, axes)
            if made is None:
                made = _softplus(write, x, visible, count)
            if self.power is not None:
                made = self._sharpened(write, normalised(write, made, axes, "first"), count)
        weights = normalised(write, made, axes, "weights")
        graph.replace_uses(softmax.output, write.narrow(weights, softmax.output.dtype))
        graph.erase(softmax)

    def _sharpened(self, write: Writer, weights: Value, count: Value) -> Value:
        scaled = write.put("mul", [weights, count], "times_n")
        above = write.put("sub", [scaled, write.number(self.threshold, "threshold", weights.dtype)], "above")
        kept = write.put("relu", [above], "kept")
        return write.put("pow", [kept, write.number(self.power or 1.0, "power", weights.dtype)], "raised")


def exponential(write: Writer, x: Value, axes: list[int]) -> Value:
    """``e^(x - max x)``; a row of -inf alone gives zeros."""
    top = write.put("amax", [x], "max", axes=axes, keepdims=True)
    top = write.put("clip", [top], "finite_max", min=MASKED, max=None)
    return write.put("exp", [write.put("sub", [x, top], "shifted")], "exp")


def normalised(write: Writer, x: Value, axes: list[int], part: str) -> Value:
    """``x / sum x`` for x >= 0; zeros stay zeros."""
    total = write.put("sum", [x], f"{part}_sum", axes=axes, keepdims=True)
    total = write.put("clip", [total], f"{part}_positive", min=TINY, max=None)
    return write.put("div", [x, total], part)


def _keys(write: Writer, x: Value, axes: list[int]) -> tuple[Value, Value]:
    """(1 where a query sees a key and 0 elsewhere, how many keys it sees, at least 1)."""
    seen = write.put("gt", [x, write.number(MASKED, "masked_below", x.dtype)], "sees")
    visible = write.put("cast", [seen], "visible", dtype=x.dtype)
    count = write.put("sum", [visible], "count", axes=axes, keepdims=True)
    return visible, write.put("clip", [count], "n", min=1.0, max=None)


def _softplus(write: Writer, x: Value, visible: Value, count: Value) -> Value:
    more = write.put("add", [count, write.number(1.0, "one", x.dtype)], "n_plus_one")
    scale = write.put("log", [more], "length_scale")
    made = write.put("softplus", [write.put("mul", [x, scale], "sharpened")], "softplus", beta=1.0, threshold=20.0)
    return write.put("mul", [made, visible], "unmasked")
