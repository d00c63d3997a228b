"""ReplaceSoftmax: softmaxes that cannot overflow, or that do not saturate (StableMax)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ...graph.ir import Graph, Node, Value
from ..base import Context, Contract, Decision, Outcome, Pass
from .attention import HALF, Writer, cores
from .common import matches
from .replace_attention import normalised


class ReplaceSoftmax(Pass):
    """Softmaxes rewritten for numerical stability: the same function without overflow, or StableMax.

    Form "stable" keeps the function (EXACT) and mends how it is computed: ``exp(x) / sum exp(x)`` becomes a softmax,
    ``log(softmax(x))`` a log-softmax, ``log(sum exp(x))`` subtracts the maximum first, and a softmax in half precision
    computes in float32. Each of them overflows or loses its small results otherwise.

    Form "stablemax" (FRESH: a new model, to be trained) puts ``s(x) / sum s(x)`` in the place of softmax, and its
    logarithm in that of log-softmax, with ``s(x) = x + 1`` for x >= 0 and ``1 / (1 - x)`` below, written as
    ``relu(x) + 1 / (1 + relu(-x))``. s rises strictly, so the largest stays the largest; it grows linearly, so that a
    loss behind it does not collapse to zero in floating point and gradients do not vanish with it (:mod:`.collapse`
    tells whether they do). Source: "Grokking at the Edge of Numerical Stability". By default the attention's
    softmaxes are left alone: a finite mask of -1e4 would leave its keys a weight of 1e-4.
    """

    name: ClassVar[str] = "replace_softmax"
    contract: ClassVar[Contract] = Contract.FRESH
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    form: Literal["stablemax", "stable"] = "stablemax"
    """"stablemax": s(x) over its sum; "stable": the same function, computed without overflow."""
    where: Literal["outputs", "attention", "all"] = "outputs"
    """For "stablemax": every softmax but those over an attention's keys, these alone, or both."""
    ignore: list[str] = Field(default_factory=list)
    """Glob patterns of nodes, or of the modules they are in, to leave alone."""

    def promise(self) -> Contract:
        return Contract.EXACT if self.form == "stable" else Contract.FRESH

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        attention = {id(n) for n in cores(graph)}
        decisions = []
        for node in list(graph.nodes):
            if not graph.holds(node) or matches(node, self.ignore):
                continue
            if self.form == "stable":
                said = _stable(graph, node)
            else:
                inside = id(node) in attention
                wanted = self.where == "all" or inside == (self.where == "attention")
                said = _stablemax(graph, node) if wanted and node.op in ("softmax", "log_softmax") else None
            if said is not None:
                decisions.append(Decision(node.name, "replaced", said))
        graph.refresh()
        return Outcome(decisions=decisions, details={"replaced": len(decisions)})


# ---- StableMax -----------------------------------------------------------------------------------------------------
def _stablemax(graph: Graph, node: Node) -> str:
    x = node.inputs[0]
    assert x is not None and x.rank is not None
    axes = [int(node.attrs["axis"]) % x.rank]
    write = Writer(graph, node.name, x.producer, node.scope)
    x = write.wide(x)
    one = write.number(1.0, "one", x.dtype)
    below = write.put("relu", [write.put("neg", [x], "negated")], "below")
    small = write.put("reciprocal", [write.put("add", [below, one], "below_plus_one")], "small")
    made = write.put("add", [write.put("relu", [x], "above"), small], "s")
    made = normalised(write, made, axes, "stablemax")
    if node.op == "log_softmax":
        made = write.put("log", [made], "log")
    made = write.narrow(made, node.output.dtype)
    graph.replace_uses(node.output, made)
    graph.erase(node)
    return "log-softmax became the logarithm of StableMax" if node.op == "log_softmax" else "softmax became StableMax"


# ---- the same function, without overflow -----------------------------------------------------------------------------
def _stable(graph: Graph, node: Node) -> str | None:
    """What was mended at this node, or None."""
    if node.op == "div":
        return _quotient(graph, node)
    if node.op == "log":
        return _logarithm(graph, node)
    if node.op in ("softmax", "log_softmax") and node.output.dtype in HALF:
        return _upcast(graph, node)
    return None


def _quotient(graph: Graph, node: Node) -> str | None:
    """``exp(x) / sum(exp(x))``, the sum over one axis that stays."""
    top, total = node.inputs[0], node.inputs[1]
    axis = None if total is None else _sums(total, top)
    x = None if top is None else _made_by(top, "exp")
    if axis is None or x is None:
        return None
    _put(graph, node, "softmax", x, axis)
    return "exp over the sum of exp became a softmax, which cannot overflow"


def _logarithm(graph: Graph, node: Node) -> str | None:
    """``log(softmax(x))``, or ``log(sum(exp(x)))``."""
    inner = node.inputs[0]
    assert inner is not None
    made = inner.producer
    if made is not None and made.op == "softmax" and made.inputs[0] is not None:
        _put(graph, node, "log_softmax", made.inputs[0], int(made.attrs["axis"]))
        return "the logarithm of a softmax became a log-softmax, which keeps small results"
    source = None if made is None or made.op != "sum" else made.inputs[0]
    x = None if source is None else _made_by(source, "exp")
    if x is None or made is None or made.attrs.get("axes") is None or _shifted(x):
        return None
    axes, keep = list(made.attrs["axes"]), bool(made.attrs.get("keepdims"))
    write = Writer(graph, node.name, x.producer, node.scope)
    top = write.put("amax", [x], "max", axes=axes, keepdims=True)
    shifted = write.put("exp", [write.put("sub", [x, top], "shifted")], "exp")
    logs = write.put("log", [write.put("sum", [shifted], "sum", axes=axes, keepdims=keep)], "log")
    if not keep:
        top = write.put("squeeze", [top], "max_squeezed", axes=axes)
    graph.replace_uses(node.output, write.put("add", [logs, top], "logsumexp"))
    _sweep(graph, node)
    return "the logarithm of a sum of exp subtracts the maximum first"


def _upcast(graph: Graph, node: Node) -> str | None:
    x = node.inputs[0]
    assert x is not None
    if x.producer is not None and x.producer.op == "cast" and x.dtype == "float32":
        return None
    write = Writer(graph, node.name, x.producer, node.scope)
    made = write.put(node.op, [write.wide(x)], "wide", axis=int(node.attrs["axis"]))
    graph.replace_uses(node.output, write.narrow(made, node.output.dtype))
    graph.erase(node)
    return f"a {node.op} in {x.dtype} computes in float32"


def _shifted(x: Value) -> bool:
    """Whether a maximum was subtracted already."""
    made = x.producer
    return (
        made is not None
        and made.op == "sub"
        and made.inputs[1] is not None
        and _made_by(made.inputs[1], "amax") is not None
    )


def _made_by(value: Value, op: str) -> Value | None:
    """The operand of the op that makes a value, or None if another one does."""
    return value.producer.inputs[0] if value.producer is not None and value.producer.op == op else None


def _sums(total: Value, source: Value | None) -> int | None:
    """The one axis that ``total`` sums ``source`` over, kept with size 1; None for anything else."""
    made = total.producer
    if made is None or source is None or source.rank is None:
        return None
    axes = made.attrs.get("axes")
    if made.op == "sum" and made.inputs[0] is source and made.attrs.get("keepdims") and axes and len(axes) == 1:
        return int(axes[0]) % source.rank
    if made.op == "unsqueeze" and made.inputs[0] is not None and made.inputs[0].producer is not None:
        inner = made.inputs[0].producer
        axes = inner.attrs.get("axes")
        if (
            inner.op == "sum"
            and inner.inputs[0] is source
            and axes
            and len(axes) == 1
            and not inner.attrs.get("keepdims")
        ):
            at = int(axes[0]) % source.rank
            return at if [int(a) % source.rank for a in made.attrs["axes"]] == [at] else None
    return None


def _put(graph: Graph, node: Node, op: str, x: Value, axis: int) -> None:
    made = graph.insert(op, [x], {"axis": axis}, name=f"{node.name}_{op}", after=x.producer, scope=node.scope)
    graph.replace_uses(node.output, made.output)
    _sweep(graph, node)


def _sweep(graph: Graph, node: Node) -> None:
    """Erase a node that nobody reads, and what only it read of exponentials and sums."""
    operands = [v for v in node.inputs if v is not None]
    graph.erase(node)
    for value in dict.fromkeys(operands):
        made = value.producer
        if made is not None and made.op in ("exp", "sum", "softmax", "unsqueeze") and not graph.is_read(value):
            _sweep(graph, made)
