"""Nodes that are not needed: nobody reads them, or another node computes the same."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import ClassVar

from ...graph.ir import Graph, Node
from ...graph.purity import is_pure, signature
from ..rewrite import ANY, Env, Refusal, Rewrite, Rule, Why


class DeadCode(Rule):
    """Remove nodes that nobody reads.

    Identity: what has no reader and no effect does not change the outputs.
    Conditions: no output of the node is read by a node, by a subgraph, by a size or by the caller; the operator is a
    standard one without effect.
    Refuses: random operators (the numbers that others draw would change), operators of other domains and calls of
    functions (they may have effects), buffer updates and layers in training mode.
    """

    name: ClassVar[str] = "dead_code"
    ops: ClassVar[tuple[str, ...]] = (ANY,)

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        if any(env.graph.is_read(value) for value in node.outputs):
            return None
        if not is_pure(env.graph, node):
            return Refusal("nobody reads it, but it may have an effect", why=Why.RANDOM)
        return Rewrite([node], lambda graph: None, "removed", "nobody reads it")


class CommonSubexpression(Rule):
    """Compute once what several nodes compute.

    Identity: two nodes of one operator, domain, version and equal attributes that read the same values give the same.
    Conditions: both are pure (no random numbers, no training mode, no effect, no graph of their own, no operator of
    another domain); all operands, the optional ones too, are the same values. The earlier node stays.
    Refuses: two graph outputs (each keeps its node); an output that a subgraph reads; in an nn.Module the only call
    of a layer (the layer would vanish).
    """

    name: ClassVar[str] = "common_subexpression"
    ops: ClassVar[tuple[str, ...]] = (ANY,)

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        graph = env.graph
        table = env.memo.get(self.name)
        if table is None:  # a run visits the nodes in order; a window is asked about one of them alone
            known = {} if graph.nodes[0] is node else self._first_of_each(graph)
            table = env.memo[self.name] = known
        key = signature(graph, node)
        if key is None:
            return None
        twin: Node = table.setdefault(key, node)
        if twin is node:
            return None
        if not graph.holds(twin) or signature(graph, twin) != key:
            table[key] = node
            return None
        order = self._order((twin, node), env)
        if order[twin] > order[node]:
            table[key], twin, node = node, node, twin
        return self._merge(node, twin, env)

    def _first_of_each(self, graph: Graph) -> dict[Hashable, Node]:
        found: dict[Hashable, Node] = {}
        for node in graph.nodes:
            key = signature(graph, node)
            if key is not None:
                found.setdefault(key, node)
        return found

    def _order(self, nodes: Sequence[Node], env: Env) -> dict[Node, int]:
        """Places in the order of the graph, which edits keep for what stays; counted anew for what they add."""
        order: dict[Node, int] = env.memo.get(f"{self.name} order", {})
        if any(node not in order for node in nodes):
            order = env.memo[f"{self.name} order"] = {n: i for i, n in enumerate(env.graph.nodes)}
        return order

    def _merge(self, node: Node, twin: Node, env: Env) -> Rewrite | Refusal | None:
        pairs = list(zip(node.outputs, twin.outputs, strict=True))
        for made, same in pairs:
            if made.is_output and same.is_output:
                return Refusal(
                    f"{made.name} and {same.name} are both outputs of the graph", twin.name, Why.GRAPH_OUTPUT
                )
            if id(made) in env.captured or id(same) in env.captured:
                return Refusal(f"{made.name} is read by a subgraph", twin.name, Why.CAPTURED)
        if env.graph.kind == "fx" and _alone_in_layer(node, env):
            return None

        def apply(graph: Graph) -> Sequence[Node]:
            readers = [user for made, _ in pairs for user, _ in made.uses]
            for made, same in pairs:
                if made.uses or made.is_output or graph.is_read(made):
                    graph.replace_uses(made, same)
            return readers

        return Rewrite([twin, node], apply, "merged", f"computes the same as {twin.name}", {"kept": twin.name})


def _alone_in_layer(node: Node, env: Env) -> bool:
    scopes: dict[str, int] | None = env.memo.get("nodes by scope")
    if scopes is None:
        scopes = env.memo["nodes by scope"] = {}
        for n in env.graph.nodes:
            scopes[n.scope] = scopes.get(n.scope, 0) + 1
    return bool(node.scope) and scopes.get(node.scope, 0) <= 1


SWEEP_RULES: list[Rule] = [DeadCode(), CommonSubexpression()]

__all__ = ["SWEEP_RULES", "CommonSubexpression", "DeadCode"]
