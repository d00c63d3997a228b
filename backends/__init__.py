"""Where a model runs: backends by name."""

from .base import Artifact, Backend, Diagnostic, get, names

__all__ = ["Artifact", "Backend", "Diagnostic", "get", "names"]
