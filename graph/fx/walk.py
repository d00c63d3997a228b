"""Module trees as lists: what ``named_modules`` and ``named_parameters`` yield, without their nested generators."""

from __future__ import annotations

import torch
from torch import nn


def modules_of(root: nn.Module, *, repeated: bool = False) -> list[tuple[str, nn.Module]]:
    """(path, module) of every module, parents first; one that occurs twice once, unless ``repeated``."""
    found: list[tuple[str, nn.Module]] = [("", root)]
    _visit("", root._modules, found, None if repeated else {id(root)})
    return found


def _visit(
    prefix: str, children: dict[str, nn.Module | None], found: list[tuple[str, nn.Module]], seen: set[int] | None
) -> None:
    """Append what lies below. No closure: one that calls itself is a cycle, and would keep the modules it found."""
    for name, child in children.items():
        if child is None:
            continue
        if seen is not None:
            if id(child) in seen:
                continue
            seen.add(id(child))
        path = prefix + name
        found.append((path, child))
        if inner := child._modules:
            _visit(path + ".", inner, found, seen)


def tensors_of(root: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """(state-dict name, tensor) of all parameters, then of all buffers; tied ones under each of their names."""
    modules = modules_of(root, repeated=True)
    found: list[tuple[str, torch.Tensor]] = []
    for kind in ("_parameters", "_buffers"):
        for path, m in modules:
            held = m.__dict__[kind]
            if held:
                prefix = f"{path}." if path else ""
                found += [(prefix + name, t) for name, t in held.items() if t is not None]
    return found


def calls_forward_only(m: nn.Module) -> bool:
    """Whether calling this module means calling its forward: no hooks, nothing compiled."""
    held = m.__dict__
    hooked = held["_forward_pre_hooks"] or held["_forward_hooks"] or held["_backward_hooks"]
    return not hooked and not held.get("_backward_pre_hooks") and m._compiled_call_impl is None
