"""The engine: rules indexed by op, a work list run to a fixed point, every applied rewrite logged."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...graph.ir import Graph, Node, Value
from ..base import Decision
from .rule import ANY, Env, Refusal, Rewrite, Rule


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
    """Apply ``rules`` to ``graph`` until none of them finds anything; earlier rules go first at a node."""
    anywhere = [rule for rule in rules if ANY in rule.ops]
    index = {op: [r for r in rules if op in r.ops or ANY in r.ops] for rule in rules for op in rule.ops}
    log = Log()
    refusals: dict[tuple[str, str], Decision] = {}
    work = deque(node for node in graph.nodes if anywhere or node.op in index)
    queued = {id(node) for node in work}
    gone: set[int] = set()
    while work:
        node = work.popleft()
        queued.discard(id(node))
        if id(node) in gone:
            continue
        for rule in index.get(node.op, anywhere):
            found = rule.match(node, env)
            if isinstance(found, Refusal):
                data = {"rule": rule.name, "why": found.why.value, "scope": node.scope}
                refusals[rule.name, node.name] = Decision(node.name, "refused", found.reason, data)
            if not isinstance(found, Rewrite):
                continue
            refusals.pop((rule.name, node.name), None)
            before = list(_around(found.nodes))
            facts: dict[str, Any] = {"rule": rule.name, "scope": node.scope, "nodes": [n.name for n in found.nodes]}
            log.applied.append(Decision(node.name, found.action, found.reason, facts | found.data))
            again = [*before, *(found.apply(graph) or ())]
            gone |= erase_dead(graph, found.nodes)
            for other in again:
                if id(other) not in gone and id(other) not in queued and (anywhere or other.op in index):
                    work.append(other)
                    queued.add(id(other))
            break
    log.refused = list(refusals.values())
    return log


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
    alive = {id(node) for node in graph.nodes}
    while stack:
        node = stack.pop()
        if id(node) in gone or id(node) not in alive or any(v.uses or v.is_output for v in node.outputs):
            continue
        feeding: list[Value | None] = [*node.inputs, *node.dynamic]
        graph.erase(node)
        gone.add(id(node))
        stack += [v.producer for v in feeding if v is not None and v.producer is not None]
    return gone
