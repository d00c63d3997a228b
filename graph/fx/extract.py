"""Cutting a window out of an FXGraph: a small graph of its own with the same names, sizes and tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..errors import ConstraintError
from ..ir import Node
from .trace import Capture

if TYPE_CHECKING:
    from . import FXGraph


@dataclass
class Cut:
    """A cut as :class:`~.view.FXView` adopts it: an fx graph, the tensors it reads, the form of a call."""

    graph: fx.Graph
    in_spec: Any
    out_spec: Any
    tensors: dict[str, tuple[torch.Tensor, str]]
    submodules: dict[str, nn.Module]
    notes: list[str] = field(default_factory=list)


def extract(like: FXGraph, nodes: Sequence[Node], readers: bool) -> FXGraph:
    """See ``Graph.extract``."""
    natives = _natives(like, nodes)
    inside = set(natives)
    outer = list(dict.fromkeys(i for n in natives for i in n.all_input_nodes if i not in inside))
    stored, free = [n for n in outer if n.op == "get_attr"], [n for n in outer if n.op != "get_attr"]
    graph, env = fx.Graph(), {}
    for node in free:
        env[node] = graph.placeholder(node.name)
        env[node].meta = {"val": node.meta.get("val")}
    for node in [*stored, *natives]:
        env[node] = graph.node_copy(node, lambda n: env[n])
        env[node].meta = dict(node.meta)
    asked = {n.native for n in nodes}
    results = [n for n in natives if n in like._value_of and any(u not in inside for u in n.users)]
    results = [n for n in results if not _is_size(n) or any(i in asked for i in n.all_input_nodes) or n in asked]
    ends = [_end(graph, like, env[n], n) if readers else env[n] for n in results]
    graph.output(tuple(ends))
    names = [str(n.target) for n in stored]
    cut = Cut(
        graph,
        pytree.tree_structure(((0,) * len(free), {})),
        pytree.tree_structure((0,) * len(ends)),
        {n: (like.tensors[n], like.kinds[n]) for n in names if n in like.tensors},
        {n: like.submodules[n] for n in names if n in like.submodules},
    )
    made = type(like)(
        Capture(None, None, (), {}, sizes=dict(like.sizes)),
        cut,
        names={env[n]: v.name for n, v in like._value_of.items() if n in env},
    )
    made.mode, made.name = like.mode, like.name
    for native, twin in env.items():
        if native in like._node_of and twin in made._node_of:
            old, new = like._node_of[native], made._node_of[twin]
            new.name, new.scope = old.name, old.scope
    return made


def _natives(like: FXGraph, nodes: Sequence[Node]) -> list[fx.Node]:
    """The calls of the nodes, the items taken from their results, and the size computations they rest on; in order."""
    stack: list[fx.Node] = []
    for node in nodes:
        if not like.holds(node):
            raise ConstraintError("the node is not part of this graph", node=node.name)
        stack.append(node.native)
    found: set[fx.Node] = set()
    while stack:
        native = stack.pop()
        if native in found:
            continue
        found.add(native)
        sources = [i for i in native.all_input_nodes if i.op == "call_function"]
        stack += [i for i in sources if _is_size(i) or like._is_getitem(native)]
        users = [u for u in native.users if u.op == "call_function"]
        stack += [u for u in users if like._is_getitem(u) or (_is_size(u) and not _is_size(native))]
    return sorted(found)


def _is_size(node: fx.Node) -> bool:
    """A call whose result is a number, not a tensor."""
    return isinstance(node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def _end(graph: fx.Graph, like: FXGraph, made: fx.Node, old: fx.Node) -> fx.Node:
    """An identity that reads a result, where that is no output of the whole graph."""
    if like._value_of[old].is_output or not isinstance(old.meta.get("val"), torch.Tensor):
        return made
    end = graph.create_node("call_function", torch.ops.aten.alias.default, (made,), {}, name=f"{made.name}_read")
    end.meta = {"val": made.meta["val"]}
    return end
