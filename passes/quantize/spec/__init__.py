"""What a backend wants quantized, and how: formats of tensors and the declarative spec of a target."""

from .backend_spec import BackendSpec, OpPlacement
from .formats import TensorFormat

__all__ = ["BackendSpec", "OpPlacement", "TensorFormat"]
