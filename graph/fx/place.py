"""Homes in the module tree for tensors that passes added: a missing bias, a weight that was computed before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from .view import FXView

_SLOTS = {1: "weight", 2: "bias"}


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
            if slot == "weight" and not _stores_weight(layer):
                raise NotExpressible(f"the weight {name!r} is computed by {scope or 'the model'} in its own way")
            if slot == "weight" or layer.bias is None:
                setattr(layer, slot, nn.Parameter(tensor.detach(), requires_grad=trainable))
                return
    raise NotExpressible(f"the added tensor {name!r} has no place in the module")


def _stores_weight(layer: nn.Module) -> bool:
    """Make ``weight`` a plain parameter: parametrizations and the older hooks of weight and spectral norm go."""
    if parametrize.is_parametrized(layer, "weight"):
        shared = type(
            layer
        )  # a copy shares torch's made-up class with the caller's layer: removal would break that one
        layer.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    for remove in (nn.utils.remove_weight_norm, nn.utils.remove_spectral_norm):
        try:
            remove(layer)
        except ValueError:  # torch's way to say that there is none
            continue
    return isinstance(layer._parameters.get("weight"), nn.Parameter)
