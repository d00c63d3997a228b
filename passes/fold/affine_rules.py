"""The rules of affine folding: constant maps per channel move into the linear operators before or behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ...graph.ir import Graph, Node, Value
from ..rewrite import Env, Refusal, Rewrite, Rule, Why
from . import travel
from .absorb import Absorbed, absorb_after, absorb_before, expected_bias, write
from .affine import Affine, affine_of
from .operands import LINEAR_OPS, bias_slot, channels

Plan = tuple[str, list[Absorbed], list[Node]]


class FoldNorm(Rule):
    """Fold a batch norm (eval mode) into the convolution or linear before it, or into all of those behind it.

    Identity: a batch norm with constant statistics is ``A(x) = scale * x + shift`` per channel, and
    ``A(W x + b) = (scale W) x + (scale b + shift)``, ``W A(x) + b = (W scale) x + (b + W shift)``.
    Conditions: every operator in between commutes with the map; all arithmetic is float64, cast once.
    Refuses: a second consumer, a graph output in between, training mode, a tied weight, statistics or a bias computed
    at run time, a zero-padded border under a shift.
    """

    name: ClassVar[str] = "fold_norm"
    ops: ClassVar[tuple[str, ...]] = ("batch_norm",)

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        affine = affine_of(node)
        if isinstance(affine, Refusal):
            return affine
        plan = _into_producer(node, affine, env)
        if isinstance(plan, Refusal):
            behind = _into_consumers(node, affine, env)
            if isinstance(behind, Refusal):
                return Refusal(f"before it: {plan.reason}; behind it: {behind.reason}", plan.node, plan.why)
            plan = behind
        side, absorbed, path = plan

        def apply(graph: Graph) -> Sequence[Node]:
            for new in absorbed:
                write(graph, new)
            source = node.inputs[0]  # an addition may now stand behind the operator
            assert source is not None
            graph.replace_uses(node.output, source)
            return [new.node for new in absorbed]

        biases = {new.node.name: expected_bias(new) for new in absorbed}
        reason = f"absorbed by {', '.join(biases)}, which stands {side} it"
        return Rewrite([node, *path], apply, "folded", reason, {"side": side, "bias": biases})


def _into_producer(node: Node, affine: Affine, env: Env) -> Plan | Refusal:
    """Walk up from the operand of ``node`` to the operator that absorbs a map acting on it."""
    value, reader, path = node.inputs[0], node, []
    while True:
        assert value is not None
        if (blocked := env.sole_reader(value, reader)) is not None:
            return blocked
        producer = value.producer
        if producer is None:
            kind = "an input" if value.is_input else "a constant"
            return Refusal(f"{value.name} is {kind}", why=Why.GRAPH_INPUT if value.is_input else Why.OTHER)
        path.append(producer)
        if producer.op in LINEAR_OPS:
            new = absorb_after(producer, affine)
            return new if isinstance(new, Refusal) else _checked("before", [new], path)
        if (biased := _biased(producer)) is not None:
            value, reader = biased, producer
            continue
        moved = travel.backward(producer, affine)
        if isinstance(moved, Refusal):
            return moved
        value, reader, affine = producer.inputs[0], producer, moved


def _biased(node: Node) -> Value | None:
    """The output of the linear operator whose bias this addition holds, if it is one."""
    for value in node.inputs if node.op == "add" else ():
        above = None if value is None else value.producer
        if above is not None and above.op in LINEAR_OPS and above.input(1) is not None:
            weight = above.inputs[1].weight if above.inputs[1] is not None else None
            if weight is not None:
                slot = bias_slot(above, channels(above, weight.shape)[1])
                if not isinstance(slot, Refusal) and slot.holder is node:
                    return above.output
    return None


def _into_consumers(node: Node, affine: Affine, env: Env) -> Plan | Refusal:
    """Walk down from the output of ``node``: every path must end in an operator that absorbs the map."""
    absorbed: list[Absorbed] = []
    path: list[Node] = []
    todo = [(node.output, affine)]
    while todo:
        value, map_ = todo.pop()
        if value.is_output:
            return Refusal(f"{value.name} is an output of the graph", why=Why.GRAPH_OUTPUT)
        if id(value) in env.captured:
            return Refusal(f"{value.name} is read by a subgraph", why=Why.CAPTURED)
        for user, position in value.uses:
            if user.op == "shape_of":
                continue
            path.append(user)
            if position != 0:
                return Refusal(f"{user.name} reads it as operand {position}", user.name)
            if user.op in LINEAR_OPS:
                new = absorb_before(user, map_)
                if isinstance(new, Refusal):
                    return new
                absorbed.append(new)
                continue
            moved = travel.forward(user, map_)
            if isinstance(moved, Refusal):
                return moved
            todo.append((user.output, moved))
    if not absorbed:
        return Refusal("nothing reads it")
    return _checked("behind", absorbed, path)


def _checked(side: str, absorbed: list[Absorbed], path: list[Node]) -> Plan | Refusal:
    """The plan, if every new weight fits its stored dtype; nothing has been written yet."""
    for new in absorbed:
        if not new.fits():
            return Refusal(f"the folded weight of {new.node.name} does not fit its dtype", new.node.name, Why.RANGE)
    return side, absorbed, [*path, *(new.slot.holder for new in absorbed if new.slot.holder is not new.node)]


AFFINE_RULES: list[Rule] = [FoldNorm()]
