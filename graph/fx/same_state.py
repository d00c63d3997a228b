"""Whether two module trees hold the same state: then they compute the same, being of the same classes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

from .config_entries import is_config, sizes_of
from .walk import modules_of

Sizes = list[tuple[nn.Module, str, Any]]
"""Attributes to set: (module, name, value)."""

_WORTHLESS = frozenset(("training", "_is_hf_initialized"))
"""What may differ: the mode, and the mark that transformers' own initialisation has seen a module."""
_BY_NAME = frozenset(("_modules", "_parameters", "_buffers"))
_ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size))
_HOOKS = frozenset((dict, OrderedDict, set))
_MAX_DEPTH = 6
_MISSING = object()


def sizes_apart(mine: nn.Module, built: nn.Module) -> Sizes | None:
    """The integer attributes of ``mine`` that ``built`` has otherwise, where all other state is the same; else None.

    The same: modules of the same classes under the same names, parameters of the same names and shapes (their data is
    not looked at), equal buffers, equal attributes; attributes of kinds unknown here are never equal. Configurations
    are passed over: they are what differs.
    """
    found: Sizes = []
    left, right = dict(modules_of(mine)), dict(modules_of(built))
    if list(left) != list(right):
        return None
    same = {id(right[path]): m for path, m in left.items()}
    for path, m in left.items():
        if not _alike(m, right[path], same, found):
            return None
    return found


def _alike(m: nn.Module, other: nn.Module, same: Mapping[int, nn.Module], found: Sizes) -> bool:
    if type(m) is not type(other) or m._parameters.keys() != other._parameters.keys():
        return False
    for k, p in m._parameters.items():
        like = other._parameters[k]
        if (p is None) is not (like is None) or p is not None and p.shape != like.shape:  # type: ignore[union-attr]
            return False  # the dtype is that of what is loaded
    if not _equal(m._buffers, other._buffers, same):
        return False
    mine, theirs = vars(m), vars(other)
    sizes: dict[str, Any] | None = None
    for key, value in theirs.items():
        own = mine.get(key, _MISSING)
        if own is value or key in _WORTHLESS or key in _BY_NAME:
            continue
        kind = type(value)
        if type(own) is not kind:
            return False
        if kind in _HOOKS and not own and not value:
            continue
        if not _equal(own, value, same):
            sizes = dict(sizes_of(m)) if sizes is None else sizes
            if key not in sizes:
                return False
            found.append((m, key, value))
    return mine.keys() - theirs.keys() <= _WORTHLESS


def _shape(t: torch.Tensor | None) -> Any:
    return None if t is None else (t.shape, t.dtype)


def _equal(a: Any, b: Any, same: Mapping[int, nn.Module], depth: int = 0) -> bool:
    kind = type(b)
    if type(a) is not kind or depth > _MAX_DEPTH:
        return False
    if a is b:
        return True
    if kind in _ATOMS:
        return bool(a == b)
    if isinstance(b, nn.Module):
        return same.get(id(b)) is a
    if isinstance(b, torch.Tensor):
        return _shape(a) == _shape(b) and a.device == b.device and not b.is_meta and torch.equal(a, b)
    if kind in (list, tuple):
        return len(a) == len(b) and all(_equal(x, y, same, depth + 1) for x, y in zip(a, b, strict=True))
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], v, same, depth + 1) for k, v in b.items())
    if kind in (set, frozenset):
        return bool(a == b) and all(type(x) in _ATOMS for x in b)
    if is_config(b):
        return True
    if kind in (FunctionType, BuiltinFunctionType):
        return False  # the same function is the same object, above
    return False
