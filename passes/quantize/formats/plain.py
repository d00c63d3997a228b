"""Numbers that ONNX and torch have a type for, one scale per row or block: float8 in both forms, int16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from ....graph.errors import ConfigError
from .layout import Layout
from .protocol import blocks_of, spread
from .scales import Scales, store

if TYPE_CHECKING:
    from ....graph.ir import Value
    from .emit import Emitter

LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int16": 32767.0}


@dataclass(frozen=True)
class PlainEncoded:
    """A weight cast to a narrower type after a division by its scale.

    Attributes:
        codes: of the stored type, [rows, columns].
    """

    layout: Layout
    codes: np.ndarray
    scales: Scales
    block: int = 0

    @property
    def step(self) -> int:
        return 1

    @property
    def nbytes(self) -> int:
        return self.padded().nbytes + self.scales.nbytes

    def padded(self) -> np.ndarray:
        """Codes filled up to whole blocks, as they are stored."""
        missing = -self.codes.shape[1] % self.block if self.block else 0
        found = np.zeros((self.codes.shape[0], self.codes.shape[1] + missing), self.codes.dtype)
        found[:, : self.codes.shape[1]] = self.codes
        return found

    def decode(self) -> np.ndarray:
        return self.layout.tensor(self.values(self.codes, 0))

    def values(self, codes: np.ndarray, start: int) -> np.ndarray:
        scale = spread(self.scales.numbers(), self.block, start, codes.shape[1])
        return np.asarray(codes.astype(np.float32) * scale, np.float32)

    def nearest(self, values: np.ndarray, start: int) -> np.ndarray:
        scaled = np.asarray(values, np.float32) / spread(self.scales.numbers(), self.block, start, values.shape[1])
        name = self.codes.dtype.name
        scaled = np.clip(scaled, -LARGEST[name], LARGEST[name])
        return (np.rint(scaled) if name == "int16" else scaled).astype(self.codes.dtype)

    def with_codes(self, codes: np.ndarray) -> PlainEncoded:
        return replace(self, codes=codes)

    def write(self, emitter: Emitter, name: str) -> Value:
        codes = self.padded()
        rows, columns = codes.shape
        count = columns // self.block if self.block else 1
        if codes.dtype == np.int16:
            numbers = emitter.cast(emitter.store(f"{name}_codes", codes), "float32")
        else:  # as bytes: a table gives the same numbers where the runtime or the opset has no float8
            bytes_ = emitter.cast(emitter.store(f"{name}_codes", codes.view(np.uint8)), "int32")
            numbers = emitter.take(emitter.table(byte_numbers(codes.dtype.name), codes.dtype.name), bytes_)
        scale = emitter.reshape(emitter.scales(self.scales, f"{name}_scales"), (rows, count, 1))
        numbers = emitter.reshape(numbers, (rows, count, columns // count))
        return emitter.finish(emitter.mul(numbers, scale), self.layout, columns)


def byte_numbers(dtype: str) -> np.ndarray:
    """float32 [256]: what each byte of a float8 type stands for (0 for those that are no finite number)."""
    found = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, dtype)).astype(np.float32)
    return np.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0)


@dataclass(frozen=True)
class Plain:
    """float8 e4m3, float8 e5m2 or int16, symmetric; the scale puts the largest magnitude on the type's largest number.

    Attributes:
        dtype: ``float8_e4m3fn``, ``float8_e5m2`` or ``int16``.
        block: columns that share a scale; 0: a row.
    """

    dtype: str = "float8_e4m3fn"
    block: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in LARGEST:
            raise ConfigError("unknown type", node="dtype", expected=", ".join(LARGEST), found=self.dtype)

    @property
    def name(self) -> str:
        return self.dtype

    @property
    def bits(self) -> int:
        return 16 if self.dtype == "int16" else 8

    def prepared(self, matrix: np.ndarray, importance: np.ndarray | None = None) -> Plain:
        return self

    def fit(self, weight: np.ndarray, axis: int = 0, importance: np.ndarray | None = None) -> PlainEncoded:
        layout = Layout(weight.shape, axis)
        return self.fit_matrix(layout.matrix(weight), layout, importance)

    def fit_matrix(self, matrix: np.ndarray, layout: Layout, importance: np.ndarray | None = None) -> PlainEncoded:
        stored = np.dtype(getattr(ml_dtypes, self.dtype)) if self.dtype != "int16" else np.dtype(np.int16)
        scales = store(np.abs(blocks_of(matrix, self.block)).max(2) / np.float32(LARGEST[self.dtype]), "float32")
        found = PlainEncoded(layout, np.zeros((layout.rows, 0), stored), scales, self.block)
        return found.with_codes(found.nearest(matrix, 0))

    def join(self, parts: Sequence[PlainEncoded], layout: Layout) -> PlainEncoded:
        codes = np.concatenate([p.codes for p in parts], axis=1)
        scales = parts[0].scales
        if self.block:
            scales = replace(scales, stored=np.concatenate([p.scales.stored for p in parts], axis=1))
        return PlainEncoded(layout, codes, scales, self.block)
