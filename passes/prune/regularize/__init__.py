"""Training that drives axis groups towards zero, so that cutting them afterwards costs little."""

from typing import TYPE_CHECKING, Any

from .absorb import Cut, absorb_removed

if TYPE_CHECKING:
    from .hooks import Regularizer, regularize

__all__ = ["Cut", "Regularizer", "absorb_removed", "regularize"]


def __getattr__(name: str) -> Any:
    """The hooks bring torch along: loaded when first asked for."""
    if name in ("Regularizer", "regularize"):
        from . import hooks

        return getattr(hooks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
