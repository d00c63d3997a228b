"""Operator semantics, one file per family; importing this package fills the one table for both front ends."""

from . import attention, elementwise, linear, misc, movement, norms, recurrent, reduce, shaping, spatial
from .table import OpRule, get_rule, known_ops, register, rule

__all__ = [
    "OpRule",
    "attention",
    "elementwise",
    "get_rule",
    "known_ops",
    "linear",
    "misc",
    "movement",
    "norms",
    "recurrent",
    "reduce",
    "register",
    "rule",
    "shaping",
    "spatial",
]
