"""Formats of weights: how numbers become codes of few bits, what the codes stand for, how a graph holds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ....graph.errors import ConfigError
from .binary import BinaryCoded, BinaryEncoded, lut_matmul
from .codebook import Codebook
from .compensate import compensated
from .emit import Emitter
from .grids import Float4, Integers, NormalFloat
from .layout import Layout
from .lookup import LookupEncoded
from .plain import Plain, PlainEncoded
from .power import PowerExponent, product_table
from .protocol import Encoded, Format

FORMATS: dict[str, Callable[..., Any]] = {
    "int": Integers,
    "nf4": NormalFloat,
    "mxfp4": lambda **o: Float4(kind="mxfp4", **o),
    "nvfp4": lambda **o: Float4(kind="nvfp4", **o),
    "fp8": lambda **o: Plain(dtype="float8_e4m3fn", **o),
    "fp8_e5m2": lambda **o: Plain(dtype="float8_e5m2", **o),
    "int16": lambda **o: Plain(dtype="int16", **o),
    "power": PowerExponent,
    "bcq": BinaryCoded,
    "kmeans": Codebook,
}
"""Name -> what makes the format from its options. Add one here and it is an option of the pass."""


def format_of(name: str, **options: Any) -> Format:
    """The format of that name with those options.

    Raises:
        ConfigError: there is no such format, or it has no such option.
    """
    if name not in FORMATS:
        raise ConfigError("unknown weight format", node="format", expected=", ".join(FORMATS), found=name)
    try:
        found: Format = FORMATS[name](**options)
    except TypeError as exc:
        raise ConfigError(
            f"the format {name!r} has no such option: {exc}", node="format", found=sorted(options)
        ) from exc
    return found


__all__ = [
    "FORMATS",
    "BinaryCoded",
    "BinaryEncoded",
    "Codebook",
    "Emitter",
    "Encoded",
    "Float4",
    "Format",
    "Integers",
    "Layout",
    "LookupEncoded",
    "NormalFloat",
    "Plain",
    "PlainEncoded",
    "PowerExponent",
    "compensated",
    "format_of",
    "lut_matmul",
    "product_table",
]
