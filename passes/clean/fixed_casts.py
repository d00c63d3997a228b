"""Casts to the dtype of another value, which is known: the other value is no operand of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ...graph.ir import Graph, Node
from ..rewrite import Env, Refusal, Rewrite, Rule


class FixedCast(Rule):
    """Let a cast that asks another value for its dtype name the dtype itself.

    Identity: a value has one dtype in every run, so ``CastLike(x, y) = Cast(x, dtype of y)``.
    Conditions: both dtypes are known. What exporters write this way is mostly a constant cast like an activation, which
    then is computed from constants alone.
    Refuses: nothing.
    """

    name: ClassVar[str] = "fixed_cast"
    ops: ClassVar[tuple[str, ...]] = ("cast",)

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        x, dtype = node.inputs[0], node.attrs.get("dtype")
        if env.graph.kind != "onnx" or not node.dynamic or x is None or not dtype or dtype != node.output.dtype:
            return None

        def apply(graph: Graph) -> Sequence[Node]:
            plain = graph.insert("cast", [x], {"dtype": dtype}, name=node.name, after=node, scope=node.scope)
            graph.replace_uses(node.output, plain.output)
            return [plain]

        return Rewrite([node], apply, "simplified", f"the dtype asked for is {dtype} in every run")


CAST_RULES: list[Rule] = [FixedCast()]
