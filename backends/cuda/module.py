"""The module that is compiled: an FX graph with flat inputs and outputs, its substitutions made, on one device."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...graph.errors import BackendError
from .substitution import Operand, Plan

if TYPE_CHECKING:
    from ...graph.fx import FXGraph


def flat_module(graph: FXGraph) -> fx.GraphModule:
    """The graph as a module that takes its input tensors by position and gives a tuple of its outputs.

    Raises:
        BackendError: a size or a number that is an argument is used (a package takes tensors only).
    """
    module = graph.to_graph_module()
    native = module.graph
    native.set_codegen(fx.graph.CodeGen())
    kept = {v.native.name for v in graph.inputs if v.native is not None}
    sizes = [v for v in graph.inputs if v.native is not None and not isinstance(v.native.meta["val"], torch.Tensor)]
    for node in list(native.nodes):
        if node.op != "placeholder":
            continue
        if node.name not in kept:
            node.replace_all_uses_with(None)  # type: ignore[arg-type]
            native.erase_node(node)
        node.args = ()
    if sizes:
        raise BackendError(
            "a package takes tensors only", node=graph.name, value=sizes[0].name, found="a number as an argument",
            hint="close over the number in a wrapper module",
        )  # fmt: skip
    output = next(n for n in reversed(native.nodes) if n.op == "output")
    named = {n.name: n for n in native.nodes}
    output.args = (tuple(named[v.native.name] for v in graph.outputs),)
    module.recompile()
    return module


def substitute(module: fx.GraphModule, found: Plan) -> None:
    """Carry out a plan on the module of the same graph; weights that nothing reads any more are dropped."""
    from . import ops  # noqa: F401  (registers the operators)

    native = module.graph
    named = {n.name: n for n in native.nodes}
    original = set(named)
    for s in found.substitutions:
        target = named[s.result.native.name]
        overload = getattr(torch.ops.foldline, s.op).default
        with native.inserting_before(target):
            args = tuple(_argument(module, named, f"{s.node.name}_{s.op}_{i}", a) for i, a in enumerate(s.args))
            made = native.call_function(overload, args)
            if s.item is not None:
                made = native.call_function(operator.getitem, (made, s.item))
            if not s.native:
                made = native.call_function(torch.ops.aten.to.dtype, (made, _dtype(s.result.dtype)))
        written = [made]
        while written:  # times are told under the node that these calls stand for
            call = written.pop()
            if call.op == "call_function" and call.name not in original and "stands_for" not in call.meta:
                call.meta["stands_for"] = s.node.name
                written += call.all_input_nodes
        target.replace_all_uses_with(made)
        named[target.name] = made
    native.eliminate_dead_code()
    module.delete_all_unused_submodules()
    used = {str(n.target) for n in native.nodes if n.op == "get_attr"}
    for name in [n for n, _ in (*module.named_parameters(), *module.named_buffers()) if n not in used]:
        owner, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(owner), leaf)
    module.recompile()


def _argument(module: fx.GraphModule, named: dict[str, fx.Node], name: str, item: Any) -> Any:
    native = module.graph
    if isinstance(item, torch.Tensor):
        return stored(module, name, item)
    if not isinstance(item, Operand):
        return item
    node: fx.Node = named[item.value.native.name]
    if item.shift:
        wide = native.call_function(torch.ops.aten.to.dtype, (node, torch.int16))
        moved = native.call_function(torch.ops.aten.sub.Tensor, (wide, 128))
        return native.call_function(torch.ops.aten.to.dtype, (moved, torch.int8))
    if item.dtype is not None and _dtype(item.value.dtype) != item.dtype:
        return native.call_function(torch.ops.aten.to.dtype, (node, item.dtype))
    return node


def stored(module: fx.GraphModule, name: str, tensor: torch.Tensor) -> fx.Node:
    """A get_attr node (at the insertion point) of a new buffer."""
    unique = "".join(c if c.isalnum() else "_" for c in name)
    while hasattr(module, unique):
        unique += "_"
    module.register_buffer(unique, tensor.contiguous())
    return module.graph.get_attr(unique)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found
