"""Building a module from a configuration to look at it: parameters without data, and which entries were read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import get_ident
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .config_entries import is_config, sizes_of
from .walk import modules_of, tensors_of


def built_from(kind: type[nn.Module], config: Any, generation: Any = None) -> nn.Module | None:
    """A module of this class from a configuration: parameters on the meta device, buffers with data; None if it fails.

    Nothing is drawn from the caller's random state. ``generation``: what the module holds as transformers' defaults of
    text generation, which take as long to make as the layers of a small model.
    """
    try:
        with torch.random.fork_rng(devices=[]), _parameters_on_meta(), _uninitialised(), _generating(generation):
            return kind(config)
    except Exception:  # user code: a width that is no multiple of the heads, a class with other arguments
        return None


def all_sizes(m: nn.Module) -> dict[tuple[str, str], Any]:
    return {(path, key): _plain(value) for path, s in modules_of(m) for key, value in sizes_of(s)}


def shapes_of(m: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in tensors_of(m)}


def apart(wanted: tuple[int, ...], have: tuple[int, ...] | None) -> int:
    if have is None or len(have) != len(wanted):
        return len(wanted) + 1
    return sum(w != h for w, h in zip(wanted, have, strict=True))


def _plain(value: Any) -> Any:
    return value if isinstance(value, int) else tuple(value)


@contextmanager
def entries_read(config: Any) -> Iterator[set[str]]:
    """Names of the attributes that are read meanwhile, of any configuration of these classes."""
    read: set[str] = set()
    classes = {type(config), *(type(v) for v in vars(config).values() if is_config(v))}
    kinds = [c for c in classes if not any(c is not d and issubclass(c, d) for d in classes)]
    before = {kind: vars(kind).get("__getattribute__") for kind in kinds}

    def watched(original: Any) -> Any:
        def get(self: Any, name: str) -> Any:
            read.add(name)
            return original(self, name)

        return get

    for kind in kinds:
        kind.__getattribute__ = watched(kind.__getattribute__)  # type: ignore[method-assign]
    try:
        yield read
    finally:
        for kind in kinds:  # transformers lets an entry go by a second name
            aliases = getattr(kind, "attribute_map", None) or {}
            read |= {aliases[name] for name in read if name in aliases}
        for kind, own in before.items():
            if own is None:
                del kind.__getattribute__
            else:
                kind.__getattribute__ = own  # type: ignore[method-assign]


def _uninitialised() -> AbstractContextManager[Any]:
    """transformers' own context in which parameters get no random values, where it has one."""
    library = sys.modules.get("transformers.initialization")
    skip = getattr(library, "no_init_weights", None)
    return nullcontext() if skip is None else skip()


@contextmanager
def _generating(like: Any) -> Iterator[None]:
    """transformers' models made inside hold ``like`` instead of defaults of generation of their own."""
    library = sys.modules.get("transformers.generation.configuration_utils")
    kind = getattr(library, "GenerationConfig", None)
    if kind is None or not isinstance(like, kind) or "from_model_config" not in vars(kind):
        yield
        return
    original = vars(kind)["from_model_config"]
    kind.from_model_config = lambda config: like
    try:
        yield
    finally:
        kind.from_model_config = original


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without data and buffers with it: cheap, and tables can be compared.

    By torch's own hook: patching nn.Module would make Python look up the methods of its thousands of subclasses anew.
    """

    thread = get_ident()

    def without_data(_: nn.Module, name: str, param: nn.Parameter) -> Any:
        if param.is_meta or get_ident() != thread:
            return None
        return nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)

    hook: Any = without_data  # torch's annotation says that it returns nothing; what it returns takes the place
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()
