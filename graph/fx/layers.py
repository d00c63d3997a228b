"""Sizes that torch.nn layers keep as attributes, recomputed from their tensors and their graph nodes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from ..ir import Node
from .walk import modules_of

if TYPE_CHECKING:
    from .view import FXView

Nodes: TypeAlias = list[Node]
_UPDATES: list[tuple[tuple[type, ...], Callable[[Any, Nodes], None]]] = []


def _layer(*types: type) -> Callable[[Callable[[Any, Nodes], None]], Callable[[Any, Nodes], None]]:
    def register(update: Callable[[Any, Nodes], None]) -> Callable[[Any, Nodes], None]:
        _UPDATES.append((types, update))
        return update

    return register


def update_layers(graph: FXView, root: nn.Module) -> None:
    """Bring the size attributes of every torch.nn layer in ``root`` in line with its tensors and the graph."""
    by_scope: dict[str, Nodes] = {}
    for node in graph.nodes:
        by_scope.setdefault(node.scope, []).append(node)
    for path, module in modules_of(root):
        kind: Any = type(module)
        for update in _updates(kind):
            update(module, by_scope.get(path, []))


@cache
def _updates(kind: type) -> list[Callable[[Any, Nodes], None]]:
    return [update for types, update in _UPDATES if issubclass(kind, types)]


def handled(module: nn.Module) -> bool:
    """Are this layer's sizes kept by :func:`update_layers`? (MultiheadAttention's head count is not.)"""
    kind: Any = type(module)
    return bool(_updates(kind)) and not isinstance(module, nn.MultiheadAttention)


def _attr(nodes: Nodes, op: str, key: str) -> Any:
    return next((n.attrs[key] for n in nodes if n.op == op and n.attrs.get(key) is not None), None)


def _channels(nodes: Nodes, *ops: str) -> int | None:
    for n in nodes:
        if (
            n.op in ops
            and n.output.shape is not None
            and len(n.output.shape) > 1
            and isinstance(n.output.shape[1], int)
        ):
            return n.output.shape[1]
    return None


def _size(t: torch.Tensor | None, axis: int) -> int | None:
    return None if t is None else int(t.shape[axis])


def _put(module: nn.Module, name: str, value: Any) -> None:
    if value is not None and getattr(module, name, None) != value:
        setattr(module, name, value)


@_layer(nn.Linear)
def _linear(m: Any, nodes: Nodes) -> None:
    _put(m, "out_features", _size(m.weight, 0))
    _put(m, "in_features", _size(m.weight, 1))


@_layer(nn.modules.conv._ConvNd)
def _conv(m: Any, nodes: Nodes) -> None:
    groups = _attr(nodes, "conv", "groups")
    if isinstance(groups, int):
        _put(m, "groups", groups)
    first, second = int(m.weight.shape[0]), int(m.weight.shape[1]) * m.groups
    _put(m, "out_channels", second if m.transposed else first)
    _put(m, "in_channels", first if m.transposed else second)


@_layer(nn.modules.batchnorm._NormBase)
def _batch_norm(m: Any, nodes: Nodes) -> None:
    stored = m.weight if m.weight is not None else m.running_mean
    _put(m, "num_features", _size(stored, 0) or _channels(nodes, "batch_norm", "instance_norm"))


@_layer(nn.LayerNorm, nn.RMSNorm)
def _layer_norm(m: Any, nodes: Nodes) -> None:
    if m.weight is not None:
        _put(m, "normalized_shape", tuple(m.weight.shape))
        return
    shape = _attr(nodes, "layer_norm", "normalized_shape") or _attr(nodes, "rms_norm", "normalized_shape")
    if shape and all(isinstance(s, int) for s in shape):
        _put(m, "normalized_shape", tuple(shape))


@_layer(nn.GroupNorm)
def _group_norm(m: Any, nodes: Nodes) -> None:
    _put(m, "num_groups", _attr(nodes, "group_norm", "groups"))
    _put(m, "num_channels", _size(m.weight, 0) or _channels(nodes, "group_norm"))


@_layer(nn.Embedding, nn.EmbeddingBag)
def _embedding(m: Any, nodes: Nodes) -> None:
    _put(m, "num_embeddings", _size(m.weight, 0))
    _put(m, "embedding_dim", _size(m.weight, 1))


@_layer(nn.MultiheadAttention)
def _attention(m: Any, nodes: Nodes) -> None:
    query = m.in_proj_weight if m.in_proj_weight is not None else m.q_proj_weight
    _put(m, "embed_dim", _size(query, 1))
    if m._qkv_same_embed_dim:
        _put(m, "kdim", m.embed_dim)
        _put(m, "vdim", m.embed_dim)
    else:
        _put(m, "kdim", _size(m.k_proj_weight, 1))
        _put(m, "vdim", _size(m.v_proj_weight, 1))
    if m.embed_dim % m.num_heads == 0:
        _put(m, "head_dim", m.embed_dim // m.num_heads)


@_layer(nn.RNNBase)
def _recurrent(m: Any, nodes: Nodes) -> None:
    _put(m, "input_size", _size(m.weight_ih_l0, 1))
    if not m.proj_size:
        _put(m, "hidden_size", _size(m.weight_hh_l0, 1))


@_layer(nn.RNNCellBase)
def _cell(m: Any, nodes: Nodes) -> None:
    _put(m, "input_size", _size(m.weight_ih, 1))
    _put(m, "hidden_size", _size(m.weight_hh, 1))


@_layer(nn.PReLU)
def _prelu(m: Any, nodes: Nodes) -> None:
    _put(m, "num_parameters", _size(m.weight, 0))


@_layer(nn.Bilinear)
def _bilinear(m: Any, nodes: Nodes) -> None:
    for axis, name in enumerate(("out_features", "in1_features", "in2_features")):
        _put(m, name, _size(m.weight, axis))
