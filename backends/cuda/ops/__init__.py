"""Operators that the cuda backend adds to torch, as ``torch.ops.foldline.*``. Importing this registers them."""

from .binary import binary_linear, decode_binary, pack_signs
from .fp8 import fp8_linear
from .int4 import int4_linear, pack_int4, unpack_int4
from .int8 import int8_linear
from .kronecker import kronecker_quantize
from .softmax import two_pass_softmax
from .sparse24 import compress24, prune24, sparse24_linear, violations

__all__ = [
    "binary_linear",
    "compress24",
    "decode_binary",
    "fp8_linear",
    "int4_linear",
    "int8_linear",
    "kronecker_quantize",
    "pack_int4",
    "pack_signs",
    "prune24",
    "sparse24_linear",
    "two_pass_softmax",
    "unpack_int4",
    "violations",
]
