"""How passes find a backend by name: through a resolver that the outer room injects, so that they know none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..graph.errors import ConfigError

if TYPE_CHECKING:
    from .base import BackendLike

_resolver: Callable[[str], Any] | None = None


def set_resolver(resolver: Callable[[str], Any]) -> None:
    """Tell passes how to find a backend by name; the package's public face does so."""
    global _resolver
    _resolver = resolver


def backend(name: str) -> BackendLike:
    """The backend of that name.

    Raises:
        ConfigError: no resolver was injected, or there is no such backend.
    """
    if _resolver is None:
        raise ConfigError("no backend resolver was given", node=name, hint="import foldline, which gives one")
    found: BackendLike = _resolver(name)
    return found
