"""Copying a canonical view of an fx graph: nothing is read anew, tensors are shared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from ..ir import Node, Value

if TYPE_CHECKING:
    from .view import FXView


def copy_view(graph: FXView, like: FXView) -> None:
    """Make a new view a structural copy of another; tensors are shared."""
    graph.fx = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in like.fx.nodes:
        env[node] = graph.fx.node_copy(node, lambda n: env[n])
        env[node].meta = dict(node.meta)
    graph.tensors, graph.kinds = dict(like.tensors), dict(like.kinds)
    graph.submodules = dict(like.submodules)
    graph.alias_names, graph.changed = dict(like.alias_names), set(like.changed)
    graph.sizes, graph.notes, graph.name = dict(like.sizes), list(like.notes), like.name
    graph.in_spec, graph.out_spec, graph.mode = like.in_spec, like.out_spec, like.mode
    _copy_nodes(graph, like, env)
    graph._seen_used = set(like._seen_used)
    graph._dirty = {env[n] for n in like._dirty if n in env}
    graph.pristine, graph.originals, graph.loaded_names = like.pristine, like.originals, like.loaded_names
    graph.given = set(like.given)
    graph.kept, graph.rewritten = {n: dict(axes) for n, axes in like.kept.items()}, like.rewritten


def _copy_nodes(graph: FXView, like: FXView, env: dict[fx.Node, fx.Node]) -> None:
    """The canonical nodes and values over the copied fx graph; nothing is read anew."""
    twins: dict[int, Value] = {}
    for v in [*like.values.values(), *like._value_of.values()]:
        if id(v) in twins:
            continue
        native = None if v.native is None else env[v.native]
        twin = Value(v.name, v.shape, v.hint, v.dtype, index=v.index, literal=v.literal, native=native)
        twin.is_input, twin.is_output = v.is_input, v.is_output
        twins[id(v)] = twin
    for v in like._value_of.values():
        graph._value_of[env[v.native]] = twins[id(v)]
    graph.values = {name: twins[id(v)] for name, v in like.values.items()}
    graph.inputs, graph.outputs = [twins[id(v)] for v in like.inputs], [twins[id(v)] for v in like.outputs]
    for name, w in like.weights.items():
        value = twins[id(w.value)]
        graph.weights[name] = graph._weight(name, value, w.shape, w.dtype, w.trainable)

    def twin_of(v: Value | None) -> Value | None:
        return None if v is None else twins[id(v)]

    for n in like.nodes:
        outputs = [twins[id(v)] for v in n.outputs]
        made = Node(n.name, n.op, [twin_of(v) for v in n.inputs], outputs, dict(n.attrs))
        made.dynamic, made.captured = [twins[id(v)] for v in n.dynamic], [twins[id(v)] for v in n.captured]
        made.scope, made.origin, made.location, made.native = n.scope, n.origin, n.location, env[n.native]
        graph._node_of[made.native] = made
        graph.nodes.append(made)
    graph._relink()
