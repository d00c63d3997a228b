"""Clean-up of a pure fx graph: composite calls without canonical form decomposed, clutter and dead code removed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from .functional import has_effect, make_functional, packet
from .shortcuts import shortcut
from .spelled import rule_of

aten = torch.ops.aten
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def clean(graph: fx.Graph, known: Callable[[fx.Node], bool]) -> None:
    """Remove clutter: unknown composites decomposed, full slices and double getitems gone, dead code out."""
    unknown = [node for node in graph.nodes if node.op == "call_function" and not known(node)]
    for node in unknown:
        if node.users or has_effect(node):
            decompose(graph, node, known)
    if unknown:
        make_functional(graph)  # decompositions of torch write into their own temporaries
    seen: dict[tuple[fx.Node, Any], fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is operator.getitem:
            first = seen.setdefault((node.args[0], node.args[1]), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)
        elif node.target is aten.slice.Tensor and is_full_slice(node.args):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif packet(node) in ("aten.view", "aten.reshape", "aten._unsafe_view") and len(node.args) > 1:
            _infer_composite_size(node)
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output") and not has_effect(node):
            graph.erase_node(node)


def is_full_slice(args: Sequence[Any]) -> bool:
    """Whether the arguments of aten.slice.Tensor ask for all there is."""
    start = args[2] if len(args) > 2 else None
    end = args[3] if len(args) > 3 else None
    step = args[4] if len(args) > 4 else 1
    return bool(start in (None, 0) and (end is None or (isinstance(end, int) and end >= 2**62)) and step == 1)


def idle_copies(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Calls of ``contiguous`` on what already is so, each with its operand: torch hands that back without a call."""
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target is aten.contiguous.default:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            val = source.meta.get("val")
            layout = node.kwargs.get("memory_format", torch.contiguous_format)
            if isinstance(val, torch.Tensor) and val.is_contiguous(memory_format=layout):  # type: ignore[arg-type]
                found[node] = found.get(source, source)
    return found


def _infer_composite_size(node: fx.Node) -> None:
    """A size like ``batch * heads`` hides a constant in arithmetic: write -1 where it is the only such size."""
    sizes = node.args[1]
    if not isinstance(sizes, (list, tuple)) or any(isinstance(s, int) and s == -1 for s in sizes):
        return
    composite = [i for i, s in enumerate(sizes) if isinstance(s, fx.Node) and s.target is not aten.sym_size.int]
    if len(composite) == 1:
        node.update_arg(1, [-1 if i == composite[0] else s for i, s in enumerate(sizes)])


def _var_mean(x: torch.Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    return aten.var.correction(x, dim, correction=correction, keepdim=keepdim), aten.mean.dim(x, dim, keepdim)


def _std_mean(x: torch.Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    return aten.std.correction(x, dim, correction=correction, keepdim=keepdim), aten.mean.dim(x, dim, keepdim)


_OWN_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.var_mean.correction: _var_mean,
    aten.std_mean.correction: _std_mean,
}


def decompose(graph: fx.Graph, node: fx.Node, known: Callable[[fx.Node], bool], depth: int = 0) -> None:
    """Open up a call without canonical form through its own or the core decomposition; leave it where there is none."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or depth > 4 or _spell(graph, node):
        return
    if target.has_kernel_for_dispatch_key(_COMPOSITE):
        function: Callable[..., Any] = target.decompose
    else:
        table = _core_decompositions()
        if target in _OWN_DECOMPOSITIONS:
            function = _OWN_DECOMPOSITIONS[target]
        elif target in table:
            function = table[target]
        else:
            return
    flat, spec = torch.utils._pytree.tree_flatten((node.args, node.kwargs))
    slots = [i for i, x in enumerate(flat) if isinstance(x, fx.Node)]

    def call(*values: Any) -> Any:
        full = list(flat)
        for i, v in zip(slots, values, strict=True):
            full[i] = v
        args, kwargs = torch.utils._pytree.tree_unflatten(full, spec)
        out = function(*args, **kwargs)
        return tuple(out) if isinstance(out, (tuple, list)) else out

    examples = [flat[i].meta.get("val") for i in slots]
    if any(v is None for v in examples):
        return
    try:
        body = make_fx(call, tracing_mode="real")(*examples)
    except Exception:  # no decomposition for these arguments: the call stays whole (and becomes opaque)
        return
    if any(n.op == "get_attr" for n in body.graph.nodes):
        return
    recorded = not _has_fake(examples)
    env: dict[fx.Node, Any] = {}
    made: list[fx.Node] = []
    value: Any = None
    with graph.inserting_before(node):
        feed = iter([flat[i] for i in slots])
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                env[inner] = next(feed)
            elif inner.op == "output":
                value = fx.node.map_arg(inner.args[0], lambda n: env[n])
            else:
                new = graph.node_copy(inner, lambda n: env[n])
                val = inner.meta.get("val")
                new.meta = {**node.meta, "val": _on_meta(val) if recorded else val}
                env[inner] = new
                made.append(new)
    if isinstance(value, (tuple, list)):
        for user in list(node.users):
            user.replace_all_uses_with(value[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(value)
    graph.erase_node(node)
    for new in made:
        if not known(new):
            decompose(graph, new, known, depth + 1)


def _spell(graph: fx.Graph, node: fx.Node) -> bool:
    """Write a call out by a rule of :mod:`.spelled`, if one fits."""
    rule = rule_of(node.target)
    values = [n.meta.get("val") for n in node.all_input_nodes]
    if rule is None or not all(isinstance(v, torch.Tensor) for v in values):
        return False
    recorded = not _has_fake(values)

    def see(item: Any) -> Any:
        return item.meta["val"]

    def do(target: Any, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        given = fx.node.map_arg(args, see)
        val = shortcut(target, given, {}) if recorded else None  # type: ignore[arg-type]
        made.meta = {**node.meta, "val": target(*given) if val is None else val}  # type: ignore[misc]
        return made

    with graph.inserting_before(node):
        value = rule(do, see, *node.args, **node.kwargs)
    if value is None:
        return False
    node.replace_all_uses_with(value)
    graph.erase_node(node)
    return True


@cache
def _core_decompositions() -> Any:
    """torch builds the table anew each time, by looking at every operator: seconds."""
    return torch._decomp.core_aten_decompositions()


def _has_fake(values: list[Any]) -> bool:
    return any(isinstance(v, torch._subclasses.FakeTensor) for v in values)


def _on_meta(val: Any) -> Any:
    """A fake value as the plain meta tensors that recorded graphs hold."""
    if isinstance(val, torch.Tensor):
        return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device="meta")
    return type(val)([_on_meta(v) for v in val]) if isinstance(val, (list, tuple)) else val
