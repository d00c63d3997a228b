"""Recovery without training: closed-form correction of what pruning left."""

from typing import TYPE_CHECKING, Any

from .recover_pass import Recover, recover_graph

if TYPE_CHECKING:
    from .synthetic import synthetic_inputs

__all__ = ["Recover", "recover_graph", "synthetic_inputs"]


def __getattr__(name: str) -> Any:
    """``synthetic_inputs`` brings torch along: loaded when first asked for."""
    if name == "synthetic_inputs":
        from .synthetic import synthetic_inputs

        return synthetic_inputs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
