"""The engine: rules indexed by op, a work list run to a fixed point, every applied rewrite logged."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...graph.errors import ConstraintError
from ...graph.garbage import undisturbed
from ...graph.ir import Graph, Node, Value
from ..base import Decision
from .rule import ANY, Env, Refusal, Rewrite, Rule, Why
from .window import check_window

GROWTH = 50
"""Rewrites per node after which two rules are taken to undo each other for ever."""


@dataclass
class Log:
    """What a run of the engine did.

    Attributes:
        applied: one decision per rewrite, with ``data["rule"]`` and ``data["nodes"]``.
        refused: the last refusal of every (rule, node) that was never rewritten.
    """

    applied: list[Decision] = field(default_factory=list)
    refused: list[Decision] = field(default_factory=list)

    @property
    def decisions(self) -> list[Decision]:
        return [*self.applied, *self.refused]


def rewrite(graph: Graph, rules: Sequence[Rule], env: Env) -> Log:
    """Apply ``rules`` to ``graph`` until none of them finds anything; earlier rules go first at a node.

    A sweep visits every node and what each rewrite touched; the last sweep finds nothing. Two or three sweeps are
    usual, so that the cost is near-linear in the graph. Under
    ``env.windows`` a rewrite is first made on a small graph cut out round it and left undone where the numbers differ.
    The run ends early where ``env.ctx.fuel`` is used up.
    """
    with undisturbed():
        return _Run(graph, rules, env).run()


class _Run:
    """One run: the work list, what was logged, and which windows failed."""

    def __init__(self, graph: Graph, rules: Sequence[Rule], env: Env) -> None:
        self.graph, self.env = graph, env
        self.anywhere = [rule for rule in rules if ANY in rule.ops]
        self.index = {op: [r for r in rules if op in r.ops or ANY in r.ops] for rule in rules for op in rule.ops}
        self.log = Log()
        self.refusals: dict[tuple[str, str], Decision] = {}
        self.failed: set[tuple[str, tuple[str, ...]]] = set()
        self.limit = GROWTH * (len(graph.nodes) + 100)
        self.work: deque[Node] = deque()
        self.queued: set[int] = set()
        self._queue(graph.nodes)

    def rules(self, node: Node) -> list[Rule]:
        """The rules that look at this node."""
        return self.index.get(node.op, self.anywhere)

    def run(self) -> Log:
        fuel = self.env.ctx.fuel
        before = -1
        while len(self.log.applied) > before:
            before = len(self.log.applied)
            while self.work and (fuel is None or fuel.left):
                node = self.work.popleft()
                self.queued.discard(id(node))
                if self.graph.holds(node):
                    self._visit(node)
            if len(self.log.applied) > before:  # rules look further than one node: all are asked once more
                if any(d.data["why"] == Why.SHAPE.value for d in self.refusals.values()):
                    self.graph.refresh()  # a shape that stood in the way may be settled now
                self._queue(self.graph.nodes)
                self.env.look_again()
        alive = {node.name for node in self.graph.nodes}  # what another rule took away has nothing to explain
        window = Why.WINDOW.value
        self.log.refused = [d for d in self.refusals.values() if d.subject in alive or d.data["why"] == window]
        return self.log

    def _visit(self, node: Node) -> None:
        """Try the rules of one node in order; the first that finds something is applied, and ends the visit."""
        for rule in self.rules(node):
            found = rule.match(node, self.env)
            if isinstance(found, Rewrite) and self.env.windows:
                found = self._checked(rule, node, found)
            if isinstance(found, Refusal):
                data = {"rule": rule.name, "why": found.why.value, "scope": node.scope}
                self.refusals[rule.name, node.name] = Decision(node.name, "refused", found.reason, data | found.data)
            if isinstance(found, Rewrite):
                self._apply(rule, node, found)
                return

    def _checked(self, rule: Rule, node: Node, found: Rewrite) -> Rewrite | Refusal | None:
        """The rewrite, if its window agrees; None where the same window failed before."""
        key = rule.name, tuple(n.name for n in found.nodes)
        if key in self.failed:
            return None
        refusal = check_window(self.graph, rule, node, found, self.env)
        if refusal is None:
            return found
        self.failed.add(key)
        return refusal

    def _apply(self, rule: Rule, node: Node, found: Rewrite) -> None:
        self.refusals.pop((rule.name, node.name), None)
        facts: dict[str, Any] = {"rule": rule.name, "scope": node.scope, "nodes": [n.name for n in found.nodes]}
        decision = Decision(node.name, found.action, found.reason, facts | found.data)
        again = list(_around(found.nodes))
        if self.env.ctx.fuel is not None:
            self.env.ctx.fuel.take(decision)
        again += found.apply(self.graph) or ()
        self.env.follow(again)
        self.log.applied.append(decision)
        if len(self.log.applied) > self.limit:
            last = {str(d.data["rule"]) for d in self.log.applied[-100:]}
            raise ConstraintError(
                "the rewrites do not come to an end", node=node.name, found=", ".join(sorted(last)),
                hint="two of these rules undo each other: report it; `disable` leaves one out",
            )  # fmt: skip
        erase_dead(self.graph, found.nodes)
        self._queue(other for other in again if self.graph.holds(other))

    def _queue(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if id(node) not in self.queued and self.rules(node):
                self.work.append(node)
                self.queued.add(id(node))


def _around(nodes: Sequence[Node]) -> Iterable[Node]:
    """The window itself, what feeds it and what reads it, in that order."""
    yield from nodes
    for node in nodes:
        for value in node.inputs:
            if value is not None and value.producer is not None:
                yield value.producer
        for made in node.outputs:
            for user, _ in made.uses:
                yield user


def erase_dead(graph: Graph, nodes: Iterable[Node]) -> set[int]:
    """Erase those of ``nodes`` that nobody reads, and what then is read by nobody; ids of what went."""
    gone: set[int] = set()
    stack = [node for node in nodes]
    while stack:
        node = stack.pop()
        if not graph.holds(node) or any(graph.is_read(v) for v in node.outputs):
            continue
        feeding: list[Value | None] = [*node.inputs, *node.dynamic]
        graph.erase(node)
        gone.add(id(node))
        stack += [v.producer for v in feeding if v is not None and v.producer is not None]
    return gone
