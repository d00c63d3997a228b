"""GraphModule of an FXGraph: state-dict names of the original model, working train()/eval(), and pickling."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

if TYPE_CHECKING:
    from .fx import FXGraph


def graph_module(graph: FXGraph) -> fx.GraphModule:
    """The current graph as a GraphModule in eval mode that shares the graph's tensors."""
    native = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.fx.nodes:
        env[node] = native.node_copy(node, lambda n: env[n])
        env[node].meta = dict(node.meta)
    native.eliminate_dead_code(lambda n: n.op in ("placeholder", "output") or _has_effect(n))
    native.set_codegen(_PyTreeCodeGen(_PyTreeInfo(graph.argument_names(), graph.in_spec, graph.out_spec)))
    used = {str(n.target) for n in native.nodes if n.op == "get_attr"}
    module = fx.GraphModule({name: graph.tensors[name] for name in sorted(used)}, native, graph.name)
    module.eval()
    return module


def _has_effect(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


__all__ = ["copy", "graph_module", "nn", "Any"]
