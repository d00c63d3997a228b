"""Patterns that choose weights for adapters, by name, and the part of a fused weight that they mean."""

from __future__ import annotations

import fnmatch
import re

from ...graph.errors import ConstraintError

PART = re.compile(r"^(?P<name>.*?)\[(?P<a>\d*)(?P<how>[:/])(?P<b>\d*)\]$")
"""``qkv[0:64]``: outputs 0 to 63; ``qkv[1/3]``: the second of three equal parts."""


def matches(pattern: str, path: str, name: str) -> bool:
    """Whether a pattern names the layer ``path``, a module around it, or its weight ``name``."""
    return f".{pattern}." in f".{name}." or any(fnmatch.fnmatchcase(whole, pattern) for whole in (path, name))


def split_part(pattern: str) -> tuple[str, re.Match[str] | None]:
    """The pattern without its part, and the part."""
    match = PART.match(pattern)
    return (match["name"], match) if match else (pattern, None)


def rows_of(part: re.Match[str], rows: int, name: str) -> tuple[int, int]:
    """[start, stop) of the part among ``rows`` outputs.

    Raises:
        ConstraintError: it does not lie within them, or n does not divide them.
    """
    a, b = int(part["a"] or 0), int(part["b"] or (rows if part["how"] == ":" else 0))
    if part["how"] == "/":
        if not b or a >= b or rows % b:
            raise ConstraintError(
                "the part does not exist", node=name, expected=f"i/n, n dividing {rows}", found=part[0]
            )
        a, b = a * (rows // b), (a + 1) * (rows // b)
    if not 0 <= a < b <= rows:
        raise ConstraintError(
            "the part lies outside the weight", node=name, expected=f"within 0..{rows}", found=part[0]
        )
    return a, b
