"""inplace=True: put the weights and attributes of a resulting nn.Module into the caller's module."""

from __future__ import annotations

import sys
from typing import Any

from ..graph.errors import ConstraintError

OWN = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"})


def is_module(model: Any) -> bool:
    """Whether this is an nn.Module (torch is not imported to find out)."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def put(target: Any, source: Any) -> Any:
    """Make ``target`` compute what ``source`` computes, and return it.

    Parameter objects of ``target`` stay the same objects with new data (an optimizer keeps them; a gradient of
    another shape is dropped), so ``target`` and ``source`` share storage afterwards. Submodules whose class changed
    are replaced. Hooks and the training mode of ``target`` stay.

    Raises:
        ConstraintError: the class of the module itself changed, so its ``forward`` is not the caller's any more.
    """
    if type(target) is not type(source):
        raise ConstraintError(
            "the passes changed the program of the module, so the result cannot be put in place",
            node=type(target).__name__,
            expected=f"a module of class {type(target).__name__}",
            found=type(source).__name__,
            hint="use result.model, or leave out inplace=True",
        )
    _merge(target, source)
    return target


def _merge(target: Any, source: Any) -> None:
    for name, new in source._modules.items():
        old = target._modules.get(name)
        if old is None or new is None or type(old) is not type(new):
            target._modules[name] = new
        elif old is not new:
            _merge(old, new)
    for name in [n for n in target._modules if n not in source._modules]:
        del target._modules[name]
    for name, new in source._parameters.items():
        old = target._parameters.get(name)
        if old is None or new is None:
            target._parameters[name] = new
        elif old is not new:
            if old.shape != new.shape:
                old.grad = None
            old.data = new.data
            old.requires_grad_(new.requires_grad)
    for name in [n for n in target._parameters if n not in source._parameters]:
        del target._parameters[name]
    target._buffers.clear()
    target._buffers.update(source._buffers)
    target._non_persistent_buffers_set = set(source._non_persistent_buffers_set)
    for key, value in source.__dict__.items():
        if key not in OWN and not _is_hook(key):
            target.__dict__[key] = value


def _is_hook(key: str) -> bool:
    return key.startswith("_") and ("hook" in key or key == "_compiled_call_impl" or key == "_is_full_backward_hook")
