"""The clean-up rules: what a user expects of a graph optimizer, and nothing that changes a number."""

from __future__ import annotations

from ..rewrite import Rule
from .constant_folding import FOLDING_RULES
from .constant_if import IF_RULES
from .fixed_casts import CAST_RULES
from .gemm import GEMM_RULES
from .identities import IDENTITY_RULES
from .inverse_pairs import PAIR_RULES
from .pads import PAD_RULES
from .sequences import SEQUENCE_RULES
from .sweeps import SWEEP_RULES

CLEAN_RULES: list[Rule] = [
    *SWEEP_RULES,
    *CAST_RULES,
    *FOLDING_RULES,
    *IF_RULES,
    *IDENTITY_RULES,
    *PAIR_RULES,
    *PAD_RULES,
    *GEMM_RULES,
    *SEQUENCE_RULES,
]

__all__ = ["CLEAN_RULES"]
