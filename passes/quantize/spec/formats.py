"""TensorFormat: the stored type of a class of tensors, the integers it uses, and what shares one scale."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from ....graph.errors import ConfigError

STRICT = ConfigDict(extra="forbid")

Granularity: TypeAlias = Literal["tensor", "out_channel", "in_channel", "block"]
TypeName: TypeAlias = Literal[
    "int8", "uint8", "int16", "uint16", "int32", "int4", "uint4", "int2", "uint2",
    "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn",
]  # fmt: skip
ScaleName: TypeAlias = Literal["float32", "float16", "bfloat16", "float8_e8m0fnu", "float8_e4m3fn"]

LIMITS: dict[str, tuple[int, int]] = {
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int16": (-32768, 32767),
    "uint16": (0, 65535),
    "int32": (-(2**31), 2**31 - 1),
    "int4": (-8, 7),
    "uint4": (0, 15),
    "int2": (-2, 1),
    "uint2": (0, 3),
}
"""Integer type -> smallest and largest value."""

FLOAT_LIMITS: dict[str, float] = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "float4_e2m1fn": 6.0}
"""Floating type -> largest finite value."""

BITS: dict[str, int] = {
    "int8": 8, "uint8": 8, "int16": 16, "uint16": 16, "int32": 32, "int4": 4, "uint4": 4, "int2": 2, "uint2": 2,
    "float8_e4m3fn": 8, "float8_e5m2": 8, "float4_e2m1fn": 4,
}  # fmt: skip
"""Stored bits of one element."""


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of that name; ml_dtypes gives those that numpy has not."""
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))


@dataclass(frozen=True, config=STRICT)
class TensorFormat:
    """How a class of tensors is stored.

    Attributes:
        dtype: stored type, by its numpy or ml_dtypes name.
        symmetric: the zero point is the middle (0; 128 for uint8) and the range reaches equally far on both sides;
            else the range seen, with zero exactly representable. Floating types are symmetric always.
        granularity: what shares one scale: the whole ``tensor``; an index of the weight's ``out_channel`` or
            ``in_channel`` axis; or a ``block`` of consecutive input channels of one output channel.
        block: input channels in a block (``granularity="block"``), else 0.
        range: the integers used where they are fewer than the type holds, both ends included: (-64, 63) for 7-bit
            weights, (0, 15) for 4-bit activations held in uint8, (-127, 127) to leave -128 out. For floating types
            the largest value used, as (-m, m).
        scale_dtype: stored type of the scales. They are rounded to it before anything is quantized with them.

    Raises:
        ConfigError: the fields contradict each other.
    """

    dtype: TypeName
    symmetric: bool = False
    granularity: Granularity = "tensor"
    block: int = 0
    range: tuple[float, float] | None = None
    scale_dtype: ScaleName = "float32"

    def __post_init__(self) -> None:
        if (self.granularity == "block") != (self.block > 0) or self.block < 0:
            raise _problem("a block size goes with granularity 'block', and only with it", "block", self.block)
        if self.range is None:
            return
        low, high = self.range
        least, most = _limits(self.dtype)
        if not least <= low < high <= most:
            raise _problem(f"the range lies within {least} .. {most}", "range", self.range)
        if self.is_float and low != -high:
            raise _problem("the range of a floating type is (-m, m)", "range", self.range)
        if not self.is_float and (low != int(low) or high != int(high)):
            raise _problem("the range of an integer type holds integers", "range", self.range)

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOAT_LIMITS

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest stored value that is used (ints for integer types)."""
        if self.range is None:
            return _limits(self.dtype)
        return self.range if self.is_float else (int(self.range[0]), int(self.range[1]))

    @property
    def centre(self) -> int:
        """The zero point of a symmetric tensor: 0, or the middle of an unsigned range (128, 8, 2)."""
        low, high = self.limits
        return 0 if low < 0 else int(low + high + 1) // 2

    @property
    def bits(self) -> float:
        """Bits that one element's value takes: log2 of the number of integers used, rounded up to a whole number."""
        low, high = self.limits
        return BITS[self.dtype] if self.is_float else int(high - low).bit_length()

    @property
    def stored_bits(self) -> int:
        """Bits that one element takes in a file."""
        return BITS[self.dtype]


def _limits(dtype: str) -> tuple[float, float]:
    return LIMITS[dtype] if dtype in LIMITS else (-FLOAT_LIMITS[dtype], FLOAT_LIMITS[dtype])


def _problem(expected: str, key: str, found: Any) -> ConfigError:
    return ConfigError("invalid tensor format", node=key, expected=expected, found=repr(found))
