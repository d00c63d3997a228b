"""The pass Fold: everything that can be absorbed into the weights is, the graph is tidied, and the rest is refused."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from typing import ClassVar, Literal

from ...graph.ir import Graph, Node, Value
from ..base import Context, Contract, Decision, Needs, Outcome, Pass
from ..clean import CLEAN_RULES
from ..rewrite import Env, Rule, rewrite
from ..rewrite.choice import chosen
from . import travel
from .absorb import Absorbed, absorb_after, absorb_before, write
from .affine import Affine, Refusal, affine_of
from .constants import materialize
from .operands import LINEAR_OPS, bias_slot, channels

Plan = tuple[str, list[Absorbed]]


class Fold(Pass):
    """Fold batch norms (eval mode) into the convolutions and linears before or behind them.

    Identity: a batch norm with constant statistics is ``A(x) = scale * x + shift`` per channel, and
    ``A(W x + b) = (scale W) x + (scale b + shift)``, ``W A(x) + b = (W scale) x + (b + W shift)``. All arithmetic is
    float64, cast once to the stored dtype. The operator before is tried first, then all operators behind. A fold is
    refused, with the reason, where it would be wrong: a second consumer, a graph output in between, training mode, a
    tied weight, statistics or a bias computed at run time, a zero-padded border under a shift, an operator in between
    that does not commute.
    """

    name: ClassVar[str] = "fold"
    contract: ClassVar[Contract] = Contract.EXACT
    needs: ClassVar[Needs] = Needs.NOTHING
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    establishes: ClassVar[frozenset[str]] = frozenset({"folded"})

    clean: bool = True
    """Also run the clean-up rules (constant folding, identities, common subexpressions, ...)."""
    verify: Literal["window", "model", "off"] = "model"
    """What is checked: "model" compares the whole model before and after; "window" also runs every rewrite alone, on a
    small graph cut out round it, and leaves it undone where the numbers differ; "off" checks nothing."""
    rules: list[str] | None = None
    """Only the rules of these names; all if None."""
    disable: list[str] = []
    """Names of rules not to run."""

    def prepare(self, ctx: Context) -> None:
        """Every name in ``rules`` and ``disable`` must be a rule's."""
        chosen(self._all_rules(), self.rules, self.disable, self.name)

    def _all_rules(self) -> list[Rule]:
        return [*fold_rules(), *(CLEAN_RULES if self.clean else [])]

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        """Fold what can be folded, in topological order; the graph's function stays the same to float tolerance."""
        decisions = materialize(graph, ctx)
        stored = len(decisions)
        captured = {id(v) for node in graph.nodes for v in node.captured}
        norms = [node for node in graph.nodes if node.op == "batch_norm"]
        for node in ctx.progress(norms, "folding"):
            decisions.append(self._fold(graph, node, captured))
        folded = sum(d.action == "folded" for d in decisions)
        if folded or stored:
            graph.refresh()
        refused = len(norms) - folded
        rules = chosen(self._all_rules(), self.rules, self.disable, self.name)
        log = rewrite(graph, rules, Env(graph, ctx))
        if log.applied:
            graph.refresh()
        decisions += log.decisions
        folded += sum(d.action == "folded" for d in log.applied)
        stored += sum(d.action == "stored" for d in log.applied)
        details = {"folded": folded, "refused": refused + len(log.refused), "stored": stored}
        return Outcome(decisions=decisions, details=details)

    def _fold(self, graph: Graph, node: Node, captured: set[int]) -> Decision:
        affine = affine_of(node)
        if isinstance(affine, Refusal):
            return _refused(node, affine.reason)
        source = node.inputs[0]
        assert source is not None
        plan = _into_producer(source, node, affine, captured)
        if isinstance(plan, Refusal):
            behind = _into_consumers(node, affine, captured)
            if isinstance(behind, Refusal):
                return _refused(node, f"before it: {plan.reason}; behind it: {behind.reason}")
            plan = behind
        side, absorbed = plan
        biases = {new.node.name: write(graph, new) for new in absorbed}
        source = node.inputs[0]  # an addition may now stand behind the operator
        assert source is not None
        graph.replace_uses(node.output, source)
        graph.erase(node)
        into = ", ".join(biases)
        reason = f"absorbed by {into}, which stands {side} it"
        return Decision(node.name, "folded", reason, {"scope": node.scope, "side": side, "bias": biases})


def fold_rules() -> list[Rule]:
    """All rules of the fold family, in the order in which they are tried at a node."""
    families = ((".constants", "CONSTANT_RULES"), (".affine_rules", "AFFINE_RULES"), (".linear_rules", "LINEAR_RULES"))
    found: list[Rule] = []
    for module, name in families:
        if importlib.util.find_spec(module, __package__) is not None:
            found += getattr(importlib.import_module(module, __package__), name, [])
    return found


def _refused(node: Node, reason: str) -> Decision:
    return Decision(node.name, "refused", reason, {"scope": node.scope})


def _into_producer(value: Value, reader: Node, affine: Affine, captured: set[int]) -> Plan | Refusal:
    """Walk up from ``value`` to the operator that absorbs a map acting on it."""
    while True:
        if (blocked := _shared(value, reader, captured)) is not None:
            return blocked
        producer = value.producer
        if producer is None:
            return Refusal(f"{value.name} is an input" if value.is_input else f"{value.name} is a constant")
        if producer.op in LINEAR_OPS:
            new = absorb_after(producer, affine)
            return new if isinstance(new, Refusal) else _checked("before", [new])
        if (biased := _biased(producer)) is not None:
            value, reader = biased, producer
            continue
        moved = travel.backward(producer, affine)
        if isinstance(moved, Refusal):
            return moved
        above = producer.inputs[0]
        assert above is not None
        value, reader, affine = above, producer, moved


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


def _into_consumers(node: Node, affine: Affine, captured: set[int]) -> Plan | Refusal:
    """Walk down from the output of ``node``: every path must end in an operator that absorbs the map."""
    absorbed: list[Absorbed] = []
    paths = [(node.output, affine)]
    while paths:
        value, map_ = paths.pop()
        if value.is_output:
            return Refusal(f"{value.name} is an output of the graph")
        if id(value) in captured:
            return Refusal(f"{value.name} is read by a subgraph")
        users = list(_data_uses(value))
        for user, position in users:
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
            paths.append((user.output, moved))
    if not absorbed:
        return Refusal("nothing reads it")
    return _checked("behind", absorbed)


def _data_uses(value: Value) -> Iterable[tuple[Node, int]]:
    """The uses that read numbers: a size read from a value does not change with its numbers."""
    return [(user, position) for user, position in value.uses if user.op != "shape_of"]


def _shared(value: Value, reader: Node, captured: set[int]) -> Refusal | None:
    """Why a value may not change: somebody besides ``reader`` sees it."""
    if value.is_output:
        return Refusal(f"{value.name} is an output of the graph")
    if id(value) in captured:
        return Refusal(f"{value.name} is read by a subgraph")
    others = [user.name for user, _ in _data_uses(value) if user is not reader]
    if others:
        return Refusal(f"{value.name} has a second consumer, {others[0]}", others[0])
    return None


def _checked(side: str, absorbed: list[Absorbed]) -> Plan | Refusal:
    """The plan, if every new weight fits its stored dtype; nothing has been written yet."""
    for new in absorbed:
        if not new.fits():
            return Refusal(f"the folded weight of {new.node.name} does not fit its dtype", new.node.name)
    return side, absorbed
