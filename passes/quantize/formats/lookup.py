"""Numbers from a table, scaled per block: integers of 2 to 8 bits, NF4, MXFP4, NVFP4, power exponents, codebooks.

A code stands for ``(table[code] - zero point) * scale``, computed in float32 in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from .layout import Layout
from .packing import pack, packed_bytes
from .protocol import spread
from .scales import Scales

if TYPE_CHECKING:
    from ....graph.ir import Value
    from .emit import Emitter


@dataclass(frozen=True)
class LookupEncoded:
    """A weight whose codes index a table.

    Attributes:
        bits: of a code.
        table: float32 [2**bits] or, for groups of columns, [2**bits, step].
        scales: [rows, blocks]; None: the table holds the numbers themselves.
        zeros: zero points [rows, blocks], codes of the same width; None: 0.
        block: columns that share a scale; 0: a row.
        shared: name of a table that is the same for all weights ("": a table of its own).
        first: smallest code that is used.
    """

    layout: Layout
    codes: np.ndarray
    bits: int
    table: np.ndarray
    scales: Scales | None = None
    zeros: np.ndarray | None = None
    block: int = 0
    shared: str = ""
    first: int = 0

    @property
    def step(self) -> int:
        return 1 if self.table.ndim == 1 else self.table.shape[1]

    @property
    def nbytes(self) -> int:
        rows, count = self.padded().shape
        found = packed_bytes(rows, count, self.bits)
        found += 0 if self.shared else self.table.size * 4
        found += 0 if self.scales is None else self.scales.nbytes
        return found + (0 if self.zeros is None else packed_bytes(rows, self.zeros.shape[1], self.bits))

    def padded(self) -> np.ndarray:
        """Codes filled up to whole blocks, as they are stored."""
        if not self.block or (missing := -(self.codes.shape[1] * self.step) % self.block // self.step) == 0:
            return self.codes
        return np.pad(self.codes, ((0, 0), (0, missing)))

    def packed(self) -> list[np.ndarray]:
        """The stored planes of the codes, uint8."""
        return pack(self.padded(), self.bits)

    def decode(self) -> np.ndarray:
        return self.layout.tensor(self.values(self.codes, 0)[:, : self.layout.columns])

    def values(self, codes: np.ndarray, start: int) -> np.ndarray:
        found = self.table[codes].reshape(codes.shape[0], -1)
        if self.zeros is not None:
            found = found - spread(self.zeros.astype(np.float32), self.block, start, found.shape[1])
        if self.scales is not None:
            found = found * spread(self.scales.numbers(), self.block, start, found.shape[1])
        return np.asarray(found, np.float32)

    def nearest(self, values: np.ndarray, start: int) -> np.ndarray:
        scaled = np.asarray(values, np.float32)
        if self.scales is not None:
            scaled = scaled / spread(self.scales.numbers(), self.block, start, values.shape[1])
        if self.table.ndim == 2:
            return nearest_vectors(scaled, self.table)
        if self.zeros is not None:
            zero = spread(self.zeros.astype(np.float32), self.block, start, values.shape[1])
            return np.clip(np.rint(scaled) + zero, 0, len(self.table) - 1).astype(np.uint8)
        return nearest_numbers(scaled, self.table, self.first)

    def with_codes(self, codes: np.ndarray) -> LookupEncoded:
        return replace(self, codes=codes)

    def write(self, emitter: Emitter, name: str) -> Value:
        codes = emitter.codes(self.packed(), self.bits, self.padded().shape[1], f"{name}_codes")
        if self.shared.startswith(("int", "uint")):  # a table of integers is a cast
            values = emitter.cast(codes, "float32")
            if self.table[0]:
                values = emitter.add(values, emitter.shared(f"foldline_{self.shared}_low", self.table[:1]))
        else:
            values = emitter.take(emitter.table(self.table, self.shared or f"{name}_table"), codes)
        count = -(-self.layout.columns // self.block) if self.block else 1
        width = self.block or self.layout.columns
        if self.scales is not None or self.zeros is not None or self.step > 1:
            values = emitter.reshape(values, (self.layout.rows, count, width))
        if self.zeros is not None:
            zero = emitter.codes(pack(self.zeros, self.bits), self.bits, self.zeros.shape[1], f"{name}_zeros")
            values = emitter.sub(values, emitter.reshape(emitter.cast(zero, "float32"), (self.layout.rows, count, 1)))
        if self.scales is not None:
            scale = emitter.scales(self.scales, f"{name}_scales")
            values = emitter.mul(values, emitter.reshape(scale, (self.layout.rows, count, 1)))
        return emitter.finish(values, self.layout, count * width)


def join(parts: Sequence[LookupEncoded], layout: Layout, block: int) -> LookupEncoded:
    """Consecutive columns as one weight: scales side by side where they belong to blocks, else those of the first."""
    first = parts[0]
    codes = np.concatenate([p.codes for p in parts], axis=1)
    scales, zeros = first.scales, first.zeros
    if block and scales is not None:
        stored = [p.scales.stored for p in parts if p.scales is not None]
        scales = replace(scales, stored=np.concatenate(stored, axis=1))
        zeros = None if zeros is None else np.concatenate([p.zeros for p in parts if p.zeros is not None], axis=1)
    return replace(first, layout=layout, codes=codes, scales=scales, zeros=zeros, block=block)


def nearest_numbers(values: np.ndarray, table: np.ndarray, first: int = 0) -> np.ndarray:
    """Codes (from ``first`` on) of the table's numbers nearest to ``values``.

    A tie goes to the even code; of codes for one number the first is taken.
    """
    numbers, codes = np.unique(table[first:], return_index=True)
    codes = codes + first
    middle = (numbers[1:].astype(np.float64) + numbers[:-1]) / 2
    place = np.searchsorted(middle, values, side="left")
    even = codes % 2 == 0
    if len(middle):
        at = np.minimum(place, len(middle) - 1)
        tie = (middle[at] == values) & (place < len(middle)) & ~even[at] & even[at + 1]
        place = place + tie
    return codes[place].astype(np.uint8 if len(table) <= 256 else np.uint16)


def nearest_vectors(values: np.ndarray, table: np.ndarray, chunk: int = 1 << 22) -> np.ndarray:
    """Codes [rows, n / step] of the table's rows nearest to consecutive groups of ``step`` columns."""
    step = table.shape[1]
    groups = values.reshape(-1, step)
    norms = np.square(table).sum(1) / 2
    found = np.empty(len(groups), np.uint8 if len(table) <= 256 else np.uint16)
    size = max(1, chunk // len(table))
    for start in range(0, len(groups), size):
        part = groups[start : start + size]
        found[start : start + size] = np.argmin(norms - part @ table.T, axis=1)
    return found.reshape(values.shape[0], -1)
