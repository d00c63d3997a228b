"""What a backend wants quantized, and how: formats of tensors and the declarative spec of a target."""

from .backend_spec import BackendSpec, ExportRules, RoundingArithmetic
from .formats import TensorFormat
from .op_rules import OpPlacement, channels, input_axis, output_axis

__all__ = [
    "BackendSpec",
    "ExportRules",
    "OpPlacement",
    "RoundingArithmetic",
    "TensorFormat",
    "channels",
    "input_axis",
    "output_axis",
]
