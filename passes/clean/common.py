"""What the clean-up rules share: letting a value stand for another, and what is provable about shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...graph.ir import Graph, Node, Value
from ..rewrite import Env, Refusal, Rewrite, Why

FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = tuple(f"{sign}int{bits}" for sign in ("u", "") for bits in (8, 16, 32, 64))


def stands_for(
    node: Node, value: Value, env: Env, reason: str, window: Sequence[Node] = (), action: str = "removed"
) -> Rewrite | Refusal:
    """Let every reader of the first output of ``node`` read ``value`` instead, if that is legal."""
    made = node.output
    blocked = replaceable(made, value, env)
    if blocked is not None:
        return blocked

    def apply(graph: Graph) -> None:
        graph.replace_uses(made, value)

    return Rewrite([node, *window], apply, action, reason)


def replaceable(made: Value, value: Value, env: Env) -> Refusal | None:
    """Why ``value`` cannot take the place of ``made`` for all its readers; None if it can."""
    if id(made) in env.captured:
        return Refusal(f"{made.name} is read by a subgraph", why=Why.CAPTURED)
    if made.is_output and (value.is_input or value.is_const or value.is_output or value.producer is None):
        what = "an input" if value.is_input else "another output" if value.is_output else "a constant"
        return Refusal(f"{made.name} is an output of the graph, and what stands for it is {what}", why=Why.GRAPH_OUTPUT)
    return None


def exactly(value: Value | None, number: float, env: Env) -> bool:
    """Whether a value is this number everywhere, in every run (NaN never is; -0.0 is 0)."""
    if value is None or not value.is_const:
        return False
    if value.weight is not None and (value.weight.size > 1 << 16 or env.graph.kind == "fx" and value.weight.trainable):
        return False  # what is large costs more to read than it saves; what is trained may change
    data = value.const()
    if data is None or data.dtype.kind not in "iufb" and data.dtype.name not in FLOATS:
        return False
    flat, wanted = data.reshape(-1), np.asarray(number, data.dtype)
    # most constants are another number in their first element already
    return bool(flat.size) and bool(flat[0] == wanted) and bool((flat == wanted).all())


def fits_into(small: Value | None, large: Value) -> bool:
    """Whether broadcasting ``small`` against ``large`` provably gives the shape of ``large``, in every run."""
    if small is None or small.shape is None or large.shape is None or len(small.shape) > len(large.shape):
        return False
    tail = large.shape[len(large.shape) - len(small.shape) :]
    return all(s == 1 or (isinstance(s, int) and s == d) for s, d in zip(small.shape, tail, strict=True))


def static(value: Value | None) -> tuple[int, ...] | None:
    """The shape, if every size is the same in every run."""
    if value is None or value.shape is None or not all(isinstance(d, int) for d in value.shape):
        return None
    return tuple(d for d in value.shape if isinstance(d, int))


def same_type(a: Value, b: Value) -> bool:
    """Same dtype, known, and same known rank."""
    return bool(a.dtype) and a.dtype == b.dtype and a.rank is not None and a.rank == b.rank


def opset(graph: Graph) -> int:
    """Version of the standard operators of an ONNX model; a high number for other graphs."""
    model: Any = getattr(graph, "model", None)
    if graph.kind != "onnx" or model is None:
        return 1 << 16
    imports = model.graph.opset_imports
    return int(imports.get("", 0) or imports.get("ai.onnx", 0))
