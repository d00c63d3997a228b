"""Purity and equality of fx calls."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Any

import torch
from torch import fx

from ..ir import Graph, Node

SCALAR = ("_operator", "operator", "math", "builtins")
"""Modules whose functions only compute sizes."""


@cache
def is_pure_call(target: Any) -> bool:
    """Whether a call's target is a function of its operands: nothing written, nothing drawn at random."""
    if isinstance(target, torch._ops.OpOverload):
        drawn = torch.Tag.nondeterministic_seeded in target.tags
        return target.namespace in ("aten", "prims") and not target._schema.is_mutable and not drawn
    return not isinstance(target, torch._ops.HigherOrderOperator) and getattr(target, "__module__", "") in SCALAR


def is_pure(node: Node, graph: Graph) -> bool:
    """See :func:`foldline.graph.purity.is_pure`. Dropout counts as not pure: the model may be trained again."""
    trains = node.op == "identity" and node.attrs.get("fn") in ("dropout", "detach")
    return not trains and is_pure_call(node.native.target)


def signature(node: Node) -> Hashable | None:
    """See :func:`foldline.graph.purity.signature`."""
    call: fx.Node = node.native
    args = fx.node.map_arg((call.args, call.kwargs), lambda n: f"<{id(n):x}>")  # equal where it is the same fx node
    try:
        return (call.target, repr(args))
    except Exception:  # a user's object in the arguments whose repr fails: not comparable
        return None
