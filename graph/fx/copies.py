"""Copies of module trees in which every tensor is another one: copy.deepcopy, several times faster."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeAlias

import torch
from torch import nn

from .config_entries import is_config
from .walk import modules_of

Give: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""What a copy holds for a tensor; asked once per tensor."""

_DATA = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size)
_ATOMS = frozenset((*_DATA, type, FunctionType, BuiltinFunctionType))
_DICTS = frozenset((dict, OrderedDict))
_MAX_DEPTH = 4


def structural_copy(model: nn.Module, replace: Mapping[int, torch.Tensor] | None = None) -> nn.Module:
    """A deep copy of the module tree that shares its tensors, except where ``replace`` (by id) gives another one."""
    other = replace or {}
    return copied_with(model, lambda t: other.get(id(t), t))


def copied_with(model: nn.Module, give: Give) -> nn.Module:
    """A deep copy of the module tree that holds ``give(t)`` for every tensor t of it.

    Those are parameters, buffers, and tensors in attributes of modules and in plain containers there (at most four
    deep); objects of other classes are copied by copy.deepcopy, which meets the same tensors again by their identity.
    """
    copied: nn.Module = _Copier(model, give).copy(model)
    return copied


class _Copier:
    """One copy under way."""

    def __init__(self, root: nn.Module, give: Give) -> None:
        self.root, self.give = root, give
        self.memo: dict[int, Any] = {}
        self.met = False

    def copy(self, item: Any) -> Any:
        """The copy of anything that a module holds; the plain cases, which are nearly all there is, first."""
        kind: Any = type(item)
        if kind in _ATOMS:
            return item
        memo = self.memo
        known = memo.get(id(item))
        if known is not None:
            return known
        if kind in _DICTS:
            made: Any = kind()
            if not item:
                return made
            memo[id(item)] = made
            for k, v in item.items():
                if type(v) not in _ATOMS:
                    known = memo.get(id(v))
                    v = self.copy(v) if known is None else known
                made[k if type(k) is str else self.copy(k)] = v
            return made
        if isinstance(item, torch.Tensor):
            made = memo[id(item)] = self.give(item)
            return made
        if isinstance(item, nn.Module) and _plain(kind):
            made = kind.__new__(kind)
            memo[id(item)] = made
            state = item.__dict__.copy()  # what its __getstate__ gives
            state.pop("_compiled_call_impl", None)
            for k, v in state.items():
                held = type(v)
                if held not in _ATOMS:
                    state[k] = held() if held in _DICTS and not v else self.copy(v)
            if kind.__setstate__ is nn.Module.__setstate__:
                made.__dict__.update(state)  # what it adds to states of old files is there already
            else:
                made.__setstate__(state)
            return made
        if kind in (tuple, set) and all([type(v) in _ATOMS for v in item]):
            return item if kind is tuple else set(item)
        if kind is tuple:
            parts = [self.copy(v) for v in item]
            if id(item) not in memo:  # it may hold itself, by way of a list
                memo[id(item)] = item if all([a is b for a, b in zip(parts, item, strict=True)]) else tuple(parts)
            return memo[id(item)]
        if isinstance(item, Enum):
            return item
        if kind is list:
            made = []
            memo[id(item)] = made
            made.extend([self.copy(v) for v in item])
            return made
        if not self.met and not is_config(item):
            self.met = True  # it may hold whatever the tree holds, and copy.deepcopy asks nobody
            for _, m in modules_of(self.root):
                for name, held in m.__dict__.items():
                    if name != "_modules":
                        self._meet(held)
        return copy.deepcopy(item, memo)

    def _meet(self, item: Any, depth: int = 0) -> None:
        """Give the tensors of a container."""
        if type(item) in _ATOMS:
            return
        if isinstance(item, torch.Tensor):
            if id(item) not in self.memo:
                self.memo[id(item)] = self.give(item)
        elif depth < _MAX_DEPTH and isinstance(item, (list, tuple, set)):
            for x in item:
                self._meet(x, depth + 1)
        elif depth < _MAX_DEPTH and isinstance(item, dict):
            for x in item.values():
                self._meet(x, depth + 1)


@cache
def _plain(kind: type) -> bool:
    """Does copying an object of this class mean copying its ``__dict__``?"""
    return (
        not hasattr(kind, "__deepcopy__")
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and kind.__getstate__ in (object.__getstate__, getattr(nn.Module, "__getstate__", None))  # type: ignore[attr-defined]
        and not any("__slots__" in c.__dict__ for c in kind.__mro__)
    )
