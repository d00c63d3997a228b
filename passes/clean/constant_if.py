"""Conditionals whose condition is a constant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ...graph.ir import Graph, Node
from ..rewrite import Env, Refusal, Rewrite, Rule, Why


class ConstantIf(Rule):
    """Put the branch that a constant condition takes in the place of the If (ONNX).

    Identity: ``if true then a else b = a``.
    Conditions: the condition is a stored tensor, or follows from sizes that are the same in every run.
    Refuses: an If with a result that another subgraph reads.
    """

    name: ClassVar[str] = "constant_if"
    ops: ClassVar[tuple[str, ...]] = ("if",)

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        if env.graph.kind != "onnx" or node.inputs[0] is None:
            return None
        condition = node.inputs[0].const()
        if condition is None or condition.size != 1:
            return None
        taken = bool(condition.reshape(-1)[0])
        from ...graph.onnx.branch import inline_branch, readable

        if not readable(node, taken) or any(id(v) in env.captured for v in node.outputs):
            return Refusal("its branch has inputs, or its result is read by a subgraph", why=Why.CAPTURED)

        def apply(graph: Graph) -> Sequence[Node]:
            made = inline_branch(graph, node, taken)  # type: ignore[arg-type]
            env.captured.update(id(v) for n in made for v in n.captured)
            return made

        return Rewrite([node], apply, "inlined", f"its condition is {'true' if taken else 'false'} in every run")


IF_RULES: list[Rule] = [ConstantIf()]
