"""Homes in the module tree for tensors that passes added: a missing bias, a weight that was computed before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from .view import FXView

_SLOTS = {1: "weight", 2: "bias"}
_PLAIN = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class NotExpressible(Exception):
    """The edits cannot be written into the module tree."""


def place(graph: FXView, twin: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Register an added weight where the layer that reads it keeps such a tensor. Raises NotExpressible."""
    value = graph.weights[name].value
    assert value is not None
    homes = {(n.scope, _SLOTS.get(i)) for n, i in value.uses if n.op in ("conv", "linear")}
    if len(homes) == 1 and all(n.op in ("conv", "linear") for n, _ in value.uses):
        scope, slot = homes.pop()
        layer = twin.get_submodule(scope) if scope else twin
        if slot is not None and isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)):
            trainable = any(p.requires_grad for p in layer.parameters())
            if slot == "weight" and not _stores(layer, "weight"):
                raise NotExpressible(f"the weight {name!r} is computed by {scope or 'the model'} in its own way")
            if slot == "weight" or layer.bias is None:
                setattr(layer, slot, nn.Parameter(tensor.detach(), requires_grad=trainable))
                return
    home, _, slot = name.rpartition(".")
    try:
        layer = twin.get_submodule(home)
    except AttributeError:
        raise NotExpressible(f"the added tensor {name!r} has no place in the module") from None
    if slot in layer._parameters or not _stores(layer, slot):
        raise NotExpressible(f"the added tensor {name!r} has no place in the module")
    old = layer._parameters[slot]
    assert old is not None
    setattr(layer, slot, nn.Parameter(tensor.detach(), requires_grad=old.requires_grad))


def _stores(layer: nn.Module, slot: str) -> bool:
    """Make ``slot`` a plain parameter: parametrizations and the older hooks of weight and spectral norm go."""
    if parametrize.is_parametrized(layer, slot):
        shared = type(
            layer
        )  # a copy shares torch's made-up class with the caller's layer: removal would break that one
        layer.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
        parametrize.remove_parametrizations(layer, slot, leave_parametrized=True)
    for remove in (nn.utils.remove_weight_norm, nn.utils.remove_spectral_norm):
        try:
            remove(layer, slot)
        except ValueError:  # torch's way to say that there is none
            continue
    return isinstance(layer._parameters.get(slot), nn.Parameter)


def simplify(graph: FXView, twin: nn.Module) -> None:
    """Give layers whose own arithmetic on the weight was folded away torch's own class back, in place.

    A subclass of a torch layer that standardises, masks or adds to its weight in ``forward`` is left with one call in
    the graph: the convolution or matrix product. That is what the plain class computes.
    """
    left: dict[str, list[str]] = {}
    for node in graph.nodes:
        left.setdefault(node.scope, []).append(node.op)
    before: dict[str, int] = {}
    for record in graph.pristine.values():
        before[record.scope] = before.get(record.scope, 0) + 1
    for scope, count in before.items():
        if count < 2 or left.get(scope) not in (["conv"], ["linear"]):
            continue
        try:
            layer = twin.get_submodule(scope)
        except AttributeError:  # a scope that names no module of the tree
            continue
        plain = next((kind for kind in type(layer).__mro__ if kind in _PLAIN), None)
        if plain is None or type(layer) is plain or not isinstance(layer._parameters.get("weight"), nn.Parameter):
            continue
        if layer._modules or layer._forward_hooks or layer._forward_pre_hooks:
            continue
        layer.__class__ = plain
        for held in (layer._parameters, layer._buffers):
            for name in [n for n in held if n not in ("weight", "bias")]:
                del held[name]
