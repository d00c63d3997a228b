"""onnx_ir without sympy until an expression of symbolic sizes is read: a third of the time and memory of a small fold.

onnx_ir imports sympy for the arithmetic of symbolic dimensions, which most models never need: sympy is half a second of
imports and some 35 MiB. Here a module stands for it that is executed when an attribute of it is first asked for.
(``importlib.util.LazyLoader`` would not do: it takes any look at ``__file__`` for a use, and ``inspect`` looks at that
of all modules.)
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from threading import RLock
from types import ModuleType
from typing import Any

PUT_OFF = ("sympy", "onnx_ir._symbolic_shapes")
"""sympy, and the module of onnx_ir that uses it as soon as it is imported."""

_LOCK = RLock()


class _Later(ModuleType):
    """A module that was found and not executed yet."""

    def __getattr__(self, name: str) -> Any:
        with _LOCK:  # another thread waits until the module is complete
            loader = self.__dict__.pop("_loader", None)
            if loader is not None:
                spec = self.__spec__
                assert spec is not None
                self.__loader__ = spec.loader = loader
                if spec.submodule_search_locations is not None:
                    self.__path__ = spec.submodule_search_locations
                loader.exec_module(self)
                self.__class__ = ModuleType  # type: ignore[assignment]
            if name in self.__dict__:
                return self.__dict__[name]
        return ModuleType.__getattribute__(self, name)  # a __getattr__ of the module's own, or the usual error


class _Loader(Loader):
    """Makes such a module; ``real`` is the loader that will execute it."""

    def __init__(self, real: Loader) -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Later(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__.pop("__path__", None)  # so that importing a submodule executes it first
        module.__dict__["_loader"] = self.real


class _Finder:
    """Finds the modules of :data:`PUT_OFF`, where sympy is installed, and no others."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in PUT_OFF else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def import_onnx_ir() -> None:
    """Import onnx_ir that way; nothing changes where it, or sympy, is imported already."""
    if "onnx_ir" in sys.modules:
        return
    sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
    try:
        importlib.import_module("onnx_ir")
    finally:
        sys.meta_path.remove(_Finder)  # type: ignore[arg-type]
