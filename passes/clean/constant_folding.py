"""Nodes all of whose operands are constants, computed once and stored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ...graph.errors import FoldlineError
from ...graph.evaluate import evaluate
from ...graph.execute import MOVES
from ...graph.ir import Graph, Node, Value
from ...graph.purity import is_pure
from ..rewrite import ANY, Env, Refusal, Rewrite, Rule, Why

KEPT = frozenset(("identity", "quantize", "dequantize", "fake_quantize", "if", "loop", "scan", "shape_of"))
"""Never folded: what gives an output its name, what carries a quantization worth keeping, what holds graphs."""

HALVES = ("float16", "bfloat16")

LARGEST = 64 << 20
"""Bytes of the largest tensor that is read or made: larger ones stay on disk, where they are."""


class ConstantFolding(Rule):
    """Compute what depends on constants alone, in the dtypes of the model, and store it.

    Identity: a deterministic operator over the same operands gives the same result in every run.
    Conditions: all operands are stored tensors or literals, and none is trained; the operator is a standard one (no
    random numbers, no training mode, no subgraph). It is computed as the runtime computes it, integers wrapping.
    Refuses: growth: what the result adds to the file beyond what the operands free may be ``free`` bytes a tensor and
    ``budget`` bytes a model (a 184-byte model stays one; a Reshape of a weight is free); tensors beyond 64 MiB. A
    quantize or dequantize of a weight stays, for it is the weight's format. Arithmetic in half precision stays, for
    runtimes keep more digits between its nodes than are stored (the rules of fold compute it in float64, once). On
    an nn.Module only graphs without a class to return to are folded.
    """

    name: ClassVar[str] = "constant_folding"
    ops: ClassVar[tuple[str, ...]] = (ANY,)

    def __init__(self, free: int = 64 << 10, budget: int = 1 << 20) -> None:
        self.free = free
        self.budget = budget

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        operands = [v for v in (*node.inputs, *node.dynamic) if v is not None]
        if node.op in KEPT or node.captured or not all(v.is_const for v in operands) or not node.outputs:
            return None
        if not is_pure(env.graph, node) or env.graph.user_class:
            return None
        if any(v.weight is not None and v.weight.trainable and env.graph.kind == "fx" for v in operands):
            return None
        if node in env.memo.setdefault("not evaluable", set()):
            return None
        if any(v.hint is None or not v.dtype or v.dtype == "string" for v in (*operands, *node.outputs)):
            return None
        if node.op not in MOVES and all(v.dtype in HALVES for v in (*operands, *node.outputs)):
            return Refusal("the runtime may keep more digits between nodes of half precision", why=Why.DTYPE)
        wanted = [v for v in node.outputs if env.graph.is_read(v)]
        if any(v.is_output or id(v) in env.captured for v in wanted):
            return None  # an output of the graph stays the result of a node
        spent: int = env.memo.get("folded bytes", 0)
        grown = sum(map(_bytes, wanted)) - _freed(operands, node)
        if (grown > self.free or spent + max(grown, 0) > self.budget) or max(
            map(_bytes, (*operands, *wanted))
        ) > LARGEST:
            text = (
                f"its result would be stored with {sum(map(_bytes, wanted))} bytes, {grown} more than what it replaces"
            )
            return Refusal(text, why=Why.SIZE)
        try:
            results = evaluate(env.graph, node)
        except FoldlineError as error:  # an operator or dtype that nothing here computes: it stays as it is
            env.memo["not evaluable"].add(node)
            return Refusal(f"it cannot be computed: {error.args[0] if error.args else error}"[:200], why=Why.OTHER)
        data = [results[v.index] for v in wanted]
        if any(d is None or d.dtype.name != v.dtype for d, v in zip(data, wanted, strict=True)):
            env.memo["not evaluable"].add(node)
            return Refusal("it computes another dtype than the graph declares", why=Why.DTYPE)

        def apply(graph: Graph) -> Sequence[Node]:
            env.memo["folded bytes"] = spent + max(grown, 0)
            readers = [user for value in wanted for user, _ in value.uses]
            for value, new in zip(wanted, data, strict=True):
                stored = graph.add_weight(value.name, np.asarray(new))
                graph.replace_uses(value, stored)
            return readers

        facts = {"values": [v.name for v in wanted], "grown": grown}
        return Rewrite([node], apply, "stored", "all its operands are constants", facts)


def _bytes(value: Value) -> int:
    digits = re.search(r"(\d+)", value.dtype)
    width = max(1, int(digits[1]) // 8) if digits else 1
    return int(np.prod(value.hint or (), dtype=np.int64)) * width


def _freed(operands: Sequence[Value], node: Node) -> int:
    """Bytes of the stored operands that nothing else reads."""
    alone = {id(v): v for v in operands if v.weight is not None and all(user is node for user, _ in v.uses)}
    return sum(_bytes(v) for v in alone.values() if not v.is_output)


FOLDING_RULES: list[Rule] = [ConstantFolding()]
