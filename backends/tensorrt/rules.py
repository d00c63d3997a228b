"""All rules for TensorRT, errors first."""

from __future__ import annotations

from ..rules.rule import Rule
from .rules_file import RULES as REFUSED
from .rules_numbers import RULES as NUMBERS
from .rules_speed import RULES as SLOW
from .rules_stored import RULES as STORED

RULES: tuple[Rule, ...] = (*NUMBERS, *STORED, *REFUSED, *SLOW)
