"""A layer whose Python forward cannot express the edits becomes a GraphModule, while the modules around it stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import FoldlineError
from ..ir import Node
from .copies import structural_copy
from .layers import handled
from .modes import trainable_module

if TYPE_CHECKING:
    from .view import FXView

_SIZE_OPS = ("shape_of", "scalar")
Call = tuple[tuple[Any, ...], dict[str, Any]]


def culprit(error: BaseException, root: nn.Module) -> str | None:
    """Path of the innermost module of ``root`` whose own forward raised (torch.nn layers count for their parent)."""
    paths = {id(m): p for p, m in root.named_modules()}
    found: str | None = None
    frame = error.__traceback__
    while frame is not None:
        owner = frame.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in paths and not handled(owner):
            found = paths[id(owner)]
        frame = frame.tb_next
    return found


def replace_layers(
    graph: FXView, twin: nn.Module, path: str, call: Call, tensors: dict[str, torch.Tensor]
) -> list[str]:
    """Replace the module at ``path``, and edited ones of its class, by GraphModules; returns their paths.

    The calls are recorded on the caller's module (a copy in eval mode) with the arguments ``call``; each layer is
    traced by itself and receives the same tensors and sizes. An empty list: it cannot be done (a layer called several
    times, nodes inserted or erased inside it).
    """
    source = graph.source.module
    assert source is not None
    kind = type(source.get_submodule(path))
    paths = [p for p, m in source.named_modules() if p and type(m) is kind and _edited(graph, p)]
    paths = [p for p in paths if not any(p.startswith(f"{q}.") for q in paths)]
    calls = _record(source, paths, call)
    made: dict[str, nn.Module] = {}
    for p in paths:
        if len(calls[p]) != 1:
            return []
        try:
            made[p] = _traced(graph, twin, p, calls[p][0], tensors)
        except (FoldlineError, _Mismatch):
            return []
    for p, module in made.items():
        parent, _, leaf = p.rpartition(".")
        twin.get_submodule(parent)._modules[leaf] = module
    return paths


class _Mismatch(Exception):
    """A layer traced by itself has other nodes than in the whole model."""


def _inside(scope: str, path: str) -> bool:
    return scope == path or scope.startswith(f"{path}.")


def _edited(graph: FXView, path: str) -> bool:
    for n in graph.nodes:
        record = graph.pristine.get(n.name)
        if _inside(n.scope, path) and (record is None or record.attrs != n.attrs):
            return True
    return False


def _record(source: nn.Module, paths: list[str], call: Call) -> dict[str, list[Call]]:
    """Arguments of every call of the given submodules in one forward pass of the original model in eval mode."""
    model = structural_copy(source, {id(b): b.clone() for b in source.buffers()}).eval()  # a forward may write buffers
    calls: dict[str, list[Call]] = {p: [] for p in paths}
    for p in paths:

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], p: str = p) -> None:
            calls[p].append((args, kwargs))

        model.get_submodule(p).register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(*call[0], **call[1])
    return calls


def _traced(graph: FXView, twin: nn.Module, path: str, call: Call, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """The edited layer at ``path`` as a GraphModule that owns the tensors meant for it."""
    from . import load_torch

    source = graph.source.module
    assert source is not None
    layer = source.get_submodule(path)
    sub = load_torch(layer, call)
    old = [(name, r) for name, r in graph.pristine.items() if _inside(r.scope, path) and r.op not in _SIZE_OPS]
    new = [n for n in sub.nodes if n.op not in _SIZE_OPS]
    if [r.op for _, r in old] != [n.op for n in new]:
        raise _Mismatch
    live = {n.name: n for n in graph.nodes}
    owned: dict[str, torch.Tensor] = {}
    for name in list(sub.weights):
        full = f"{path}.{name}"
        holder = next((w for w in graph.weights.values() if full in w.aliases), None)
        if holder is not None:
            owned[name] = tensors[holder.name]
            sub.adopt_tensor(sub.weights[name], tensors[holder.name])
        else:
            owned[name] = sub.tensors[name].detach().clone()
    for (name, record), node in zip(old, new, strict=True):
        if name not in live:
            raise _Mismatch
        changed = {k: v for k, v in live[name].attrs.items() if v != record.attrs.get(k)}
        sub.set_attr(node, **{k: v for k, v in changed.items() if node.attrs.get(k) != v})
        _add_operands(sub, node, live[name], tensors, owned)
    current = dict(twin.get_submodule(path).state_dict(keep_vars=True))
    extra = {k: v for k, v in current.items() if not any(k in w.aliases for w in sub.weights.values())}
    module = trainable_module(sub, owned, extra)
    for key, value in vars(layer).items():  # what its parents may read
        if not hasattr(module, key) and isinstance(value, (bool, int, float, str, torch.dtype, type(None))):
            setattr(module, key, value)
    return module


def _add_operands(
    sub: Any, node: Node, edited: Node, tensors: dict[str, torch.Tensor], owned: dict[str, torch.Tensor]
) -> None:
    """Give the traced layer the weights that passes added as operands (a bias after a fold)."""
    for i, value in enumerate(edited.inputs):
        if value is not None and value.weight is not None and node.input(i) is None:
            tensor = tensors[value.weight.name]
            leaf = value.weight.name.removeprefix(f"{edited.scope.rpartition('.')[0]}.")
            added = sub.add_weight(leaf, tensor.detach(), trainable=isinstance(tensor, nn.Parameter))
            sub.set_input(node, i, added)
            owned[added.weight.name] = tensor
