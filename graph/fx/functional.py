"""From an exported program to a pure fx graph: subgraphs inlined, in-place ops functional, assertions gone."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from ..errors import UnsupportedOp

aten = torch.ops.aten
Found = TypeVar("Found")
IN_PLACE = "_foldline_in_place"
"""In the meta of a node that was a call in place on its first argument: that call's target."""

_ASSERTS = {
    "aten._assert_tensor_metadata",
    "aten._assert_async",
    "aten._assert_scalar",
    "aten.sym_constrain_range",
    "aten.sym_constrain_range_for_size",
}
_MAY_RETURN_INPUT = {
    "aten.dropout",
    "aten.feature_dropout",
    "aten.alpha_dropout",
    "aten.feature_alpha_dropout",
    "aten.to",
    "aten.type_as",
    "aten.contiguous",
    "aten.reshape",
    "aten.pad",
    "aten.meshgrid",
    "aten.broadcast_tensors",
}


def by_identity(function: Callable[[Any], Found]) -> Callable[[Any], Found]:
    """Like functools.cache for operators, whose own hash is Python code: each is kept, so that its id stays its own."""
    table: dict[int, Found] = {}
    kept: list[Any] = []

    def look_up(target: Any) -> Found:
        try:
            return table[id(target)]
        except KeyError:
            kept.append(target)
            found = table[id(target)] = function(target)
            return found

    return look_up


@by_identity
def packet_of(target: Any) -> str:
    """The same of a call's target."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order.{target.name()}"
    module = getattr(target, "__module__", "") or ""
    return f"{module.lstrip('_')}.{getattr(target, '__name__', str(target))}"


def packet(node: fx.Node) -> str:
    """``"aten.conv2d"`` for an OpOverload, ``"operator.mul"`` or the like for a Python function."""
    return packet_of(node.target)


class Pure:
    """The functional graph of an exported program.

    Attributes:
        graph: fx graph with one placeholder per user input (in pytree order), ``get_attr`` nodes whose target is the
            state-dict name of a weight, functional calls, and one output node holding the flat user outputs.
        tensors: name -> (tensor, kind) of every lifted tensor that the graph uses.
        notes: what was given up on the way.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self.notes: list[str] = []
        self.tensors: dict[str, tuple[torch.Tensor, str]] = {}
        self.submodules: dict[str, torch.nn.Module] = {}
        graph = self._build(program)
        if not make_functional(graph):
            program = program.run_decompositions({})
            self.notes.append(
                "in-place operations on views, or autocast regions: batch norm and dropout are fixed in eval mode in "
                "the captured graph"
            )
            self.tensors, self.submodules = {}, {}
            graph = self._build(program)
            make_functional(graph)
        self.graph = graph
        self.in_spec, self.out_spec = program.call_spec.in_spec, program.call_spec.out_spec

    def _build(self, program: ExportedProgram) -> fx.Graph:
        signature = program.graph_signature
        new = fx.Graph()
        env: dict[fx.Node, Any] = {}
        specs = {s.arg.name: s for s in signature.input_specs if hasattr(s.arg, "name")}
        placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
        for node in placeholders:  # inputs first: fx wants them before everything else
            if specs[node.name].kind == InputKind.USER_INPUT:
                env[node] = new.placeholder(node.name)
                env[node].meta = dict(node.meta)
        for node in placeholders:
            spec = specs[node.name]
            if spec.kind == InputKind.USER_INPUT or not node.users:
                continue
            name = str(spec.target)
            store = program.state_dict if name in program.state_dict else program.constants
            tensor = store[name]
            made = new.get_attr(name)
            made.meta = dict(node.meta)
            env[node] = made
            if isinstance(tensor, torch.Tensor):
                kind = {InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer"}.get(spec.kind, "constant")
                self.tensors[name] = (tensor, kind)
        outputs = inline(new, program.graph_module, env, self.submodules)
        flat: list[Any] = []
        for value, spec in zip(outputs, signature.output_specs, strict=True):
            if spec.kind == OutputKind.USER_OUTPUT:
                flat.append(value)
            elif spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
                holder = self._holder(new, str(spec.target), program, env)
                made = new.call_function(aten.copy_.default, (holder, value))
                made.meta = {"val": holder.meta.get("val")}
        new.output(tuple(flat))
        return new

    def _holder(self, graph: fx.Graph, name: str, program: ExportedProgram, env: dict[fx.Node, Any]) -> fx.Node:
        for node in graph.nodes:
            if node.op in ("get_attr", "placeholder") and node.target == name:
                return node
        placeholder = next(
            n for n in program.graph.nodes if n.op == "placeholder" and program_target(program, n) == name
        )
        made = graph.get_attr(name)
        made.meta = dict(placeholder.meta)
        store = program.state_dict if name in program.state_dict else program.constants
        self.tensors[name] = (store[name], "buffer")
        env[placeholder] = made
        return made


def program_target(program: ExportedProgram, node: fx.Node) -> str | None:
    """State-dict name that a placeholder of an exported program stands for."""
    for spec in program.graph_signature.input_specs:
        if getattr(spec.arg, "name", None) == node.name:
            return spec.target
    return None


def inline(
    new: fx.Graph, gm: torch.nn.Module, env: dict[fx.Node, Any], submodules: dict[str, torch.nn.Module]
) -> list[Any]:
    """Copy the calls of ``gm.graph`` into ``new``; returns the mapped outputs. No-grad and autocast-off bodies open up.

    Bodies of control flow that stays (torch.cond) become ``get_attr`` nodes and land in ``submodules``.
    """
    results: list[Any] = []

    def held(n: fx.Node) -> Any:
        item = env[n]
        if isinstance(item, torch.nn.Module):
            name = f"body_{len(submodules)}"
            submodules[name] = item
            item = env[n] = new.get_attr(name)
        return item

    def get(x: Any) -> Any:
        return fx.node.map_arg(x, held)

    body_graph: fx.Graph = gm.graph  # type: ignore[assignment]
    for node in body_graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            out = node.args[0]
            results = [get(x) for x in (out if isinstance(out, (tuple, list)) else (out,))]
            continue
        if node.op == "get_attr":  # a subgraph; it is opened below or kept by ``held``
            sub = _attribute(gm, str(node.target))
            env[node] = sub
            if isinstance(sub, torch.Tensor):
                raise UnsupportedOp(
                    "a region of the model holds a tensor of its own",
                    node=str(node.target),
                    expected="tensors that enter a region (autocast, no_grad) as its operands",
                    hint="register the tensor as a buffer of the module",
                )
            continue
        name = packet(node)
        if name in _ASSERTS or name.endswith("_guards_fn"):
            continue
        if node.target is operator.getitem and isinstance(opened := env.get(node.all_input_nodes[0]), list):
            env[node] = opened[node.args[1]]  # type: ignore[index]
            continue
        body = _region(node, env)
        if body is not None:
            sub_gm, operands, no_grad = body
            inner = dict(
                zip([n for n in sub_gm.graph.nodes if n.op == "placeholder"], [get(a) for a in operands], strict=True)
            )
            values = inline(new, sub_gm, inner, submodules)
            env[node] = [_detached(new, v) if no_grad else v for v in values]
            continue
        made = new.create_node(node.op, node.target, get(node.args), get(node.kwargs), name=node.name)
        made.meta = dict(node.meta)
        env[node] = made
    return results


def _attribute(root: torch.nn.Module, path: str) -> Any:
    item: Any = root
    for part in path.split("."):
        item = getattr(item, part)
    return item


def _region(node: fx.Node, env: dict[fx.Node, Any]) -> tuple[Any, list[Any], bool] | None:
    """(body, operands, is no_grad) of a wrap_with_set_grad_enabled or a disabled autocast; None for anything else."""
    name = packet(node)
    if name == "higher_order.wrap_with_set_grad_enabled":
        return env[node.args[1]], list(node.args[2:]), not node.args[0]  # type: ignore[index]
    if name == "higher_order.wrap_with_autocast" and not node.args[2]:
        return env[node.args[4]], list(node.args[5:]), False  # type: ignore[index]
    return None


def _detached(graph: fx.Graph, value: Any) -> Any:
    """Gradients must not flow through what the model computed under no_grad, if the graph is trained later."""
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        return value
    made = graph.call_function(aten.detach.default, (value,))
    made.meta = dict(value.meta)
    return made


def _mutates(node: fx.Node) -> bool:
    return node.op == "call_function" and _writes(node.target)


@by_identity
def _writes(target: Any) -> bool:
    mutable = isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
    return mutable and not str(target).startswith("aten.copy_.")


def _functional_twin(target: torch._ops.OpOverload) -> Any:
    namespace, name = target._schema.name.split("::")
    base = name.replace("__i", "__") if name.startswith("__i") else name.rstrip("_")
    found = getattr(getattr(torch.ops, namespace), base, None)
    if found is None:
        return None
    overload = target._overloadname or "default"
    return getattr(found, overload, None)


def make_functional(graph: fx.Graph) -> bool:
    """Replace in-place calls by functional ones where nothing else can see the mutation; False if one remains."""
    if not any(_mutates(n) or packet(n) == "higher_order.wrap_with_autocast" for n in graph.nodes):
        return True
    order = {n: i for i, n in enumerate(graph.nodes)}
    classes: dict[fx.Node, set[fx.Node]] = {}
    for node in list(graph.nodes):
        if packet(node) == "higher_order.wrap_with_autocast":
            return False  # decomposition spells out the casts
        for source in _aliased_inputs(node):
            group = classes.setdefault(source, {source})
            group.add(node)
            classes[node] = group
        if not _mutates(node):
            continue
        written = [
            node.args[i]
            for i, a in enumerate(node.target._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write and i < len(node.args)
        ]
        twin = _functional_twin(node.target)
        if len(written) != 1 or twin is None or not isinstance(written[0], fx.Node):
            return False
        old = written[0]
        for member in classes.get(old, {old}):
            if member.op in ("placeholder", "get_attr"):
                return False
            if member is not old and any(order[u] > order[node] for u in member.users):
                return False
        if written[0] is node.args[0] and str(node.target._schema.name).endswith("_"):
            node.meta[IN_PLACE] = node.target
        node.target = twin
        for user in [u for u in old.users if order[u] > order[node]]:
            user.replace_input_with(old, node)
        classes.pop(old, None)
        classes.pop(node, None)
    return True


def _aliased_inputs(node: fx.Node) -> Sequence[fx.Node]:
    """Inputs whose storage an output of this (not mutating) call may share."""
    if node.op != "call_function" or not _may_alias(node.target):
        return ()
    return node.all_input_nodes


@by_identity
def _may_alias(target: Any) -> bool:
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return packet_of(target) in _MAY_RETURN_INPUT or any(r.alias_info is not None for r in target._schema.returns)


def has_effect(node: fx.Node) -> bool:
    """Must this call stay although nobody reads it (a buffer update)?"""
    return node.op == "call_function" and _is_mutable(node.target)


@by_identity
def _is_mutable(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
