"""Binary-coded weights: sums of signed scales, powers of two if wished, so that a product is shifts, adds and lookups.

``W ~ sum_i alpha_i b_i`` with b_i in {-1, +1} and one alpha_i per plane, row and block of columns ("ShiftAddLLM:
Accelerating Pretrained LLMs via Post-Training Multiplication-Less Reparameterization").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ....graph.errors import ConfigError
from .layout import Layout
from .packing import byte_table, pack, packed_bytes
from .protocol import blocks_of, checked_importance
from .scales import Scales, store

if TYPE_CHECKING:
    from ....graph.ir import Value
    from .emit import Emitter


@dataclass(frozen=True)
class BinaryEncoded:
    """A weight as planes of signs.

    Attributes:
        bits: number of planes.
        codes: uint8 [rows, columns]; bit i is set where plane i has +1.
        scales: of all planes, [bits * rows, blocks], plane after plane; kind e8m0 where they are powers of two.
        block: columns that share scales; 0: a row.
    """

    layout: Layout
    codes: np.ndarray
    bits: int
    scales: Scales
    block: int = 0

    @property
    def step(self) -> int:
        return 1

    @property
    def nbytes(self) -> int:
        return self.bits * packed_bytes(self.layout.rows, self._width(), 1) + self.scales.nbytes

    def _width(self) -> int:
        columns = self.codes.shape[1]
        return -(-columns // self.block) * self.block if self.block else columns

    def alphas(self) -> np.ndarray:
        """float32 [bits, rows, blocks]."""
        return self.scales.numbers().reshape(self.bits, self.layout.rows, -1)

    def _spread(self, start: int, count: int) -> np.ndarray:
        alphas = self.alphas()
        if not self.block or alphas.shape[2] == 1:
            return alphas[:, :, :1]
        return alphas[:, :, np.arange(start, start + count) // self.block]

    def decode(self) -> np.ndarray:
        return self.layout.tensor(self.values(self.codes, 0))

    def values(self, codes: np.ndarray, start: int) -> np.ndarray:
        alphas = self._spread(start, codes.shape[1])
        total = np.zeros(codes.shape, np.float32)
        for i in range(self.bits):
            total = total + np.where((codes >> i) & 1, alphas[i], -alphas[i])
        return total

    def nearest(self, values: np.ndarray, start: int) -> np.ndarray:
        alphas = np.broadcast_to(self._spread(start, values.shape[1]), (self.bits, *values.shape))
        flat = alphas.reshape(self.bits, -1).T.astype(np.float64)
        return _assign(np.asarray(values, np.float64).reshape(-1, 1), flat).reshape(values.shape)

    def with_codes(self, codes: np.ndarray) -> BinaryEncoded:
        return replace(self, codes=codes)

    def packed(self) -> np.ndarray:
        """uint8 [bits, rows, bytes]: the signs of every plane, eight columns a byte, whole blocks."""
        missing = self._width() - self.codes.shape[1]
        codes = np.pad(self.codes, ((0, 0), (0, missing)))
        return np.stack([pack((codes >> i) & 1, 1)[0] for i in range(self.bits)])

    def write(self, emitter: Emitter, name: str) -> Value:
        rows, width = self.layout.rows, self._width()
        blocks = width // self.block if self.block else 1
        scale = emitter.scales(self.scales, f"{name}_scales")
        scale = emitter.reshape(scale, (self.bits, rows, blocks, 1))
        planes = emitter.cast(emitter.store(f"{name}_signs", self.packed()), "int32")
        signs = emitter.take(emitter.table(sign_table(), "signs"), planes)
        bytes_ = -(-width // 8)
        signs = emitter.reshape(signs, (self.bits, rows, bytes_ * 8))
        if bytes_ * 8 != width:
            signs = emitter.cut(signs, 2, width)
        terms = emitter.mul(emitter.reshape(signs, (self.bits, rows, blocks, width // blocks)), scale)
        total = None
        for i in range(self.bits):  # one after another: the order of the sum is part of the numbers
            one = emitter.node("select", [terms], {"axis": 0, "index": i}, f"{name}_plane_{i}")
            total = one if total is None else emitter.add(total, one)
        assert total is not None
        return emitter.finish(total, self.layout, width)


def sign_table() -> np.ndarray:
    """float32 [256, 8]: the signs that each byte of a plane stands for."""
    return byte_table(1).astype(np.float32) * 2 - 1


@dataclass(frozen=True)
class BinaryCoded:
    """Greedy planes, refined by alternating least squares after each; the error never rises on the way.

    With ``powers`` every step of the alternation keeps to powers of two: the scales tried are those next to the least
    squares solution, and the signs are chosen for the rounded scales. (Rounding once at the end is much worse.)

    Attributes:
        bits: planes, 1 to 4.
        block: columns that share scales; 0: a row.
        powers: scales are powers of two; else float32.
        rounds: alternations after each plane; 0: greedy only.
    """

    bits: int = 3
    block: int = 32
    powers: bool = True
    rounds: int = 6

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 4:
            raise ConfigError("binary codes have 1 to 4 planes", node="bits", found=self.bits)

    @property
    def name(self) -> str:
        return f"bcq{self.bits}"

    def prepared(self, matrix: np.ndarray, importance: np.ndarray | None = None) -> BinaryCoded:
        return self

    def fit(self, weight: np.ndarray, axis: int = 0, importance: np.ndarray | None = None) -> BinaryEncoded:
        layout = Layout(weight.shape, axis)
        return self.fit_matrix(layout.matrix(weight), layout, importance)

    def fit_matrix(self, matrix: np.ndarray, layout: Layout, importance: np.ndarray | None = None) -> BinaryEncoded:
        """Scales of every block, then signs."""
        rows, columns = matrix.shape
        cost = np.broadcast_to(checked_importance(importance, columns), matrix.shape)
        values, weights = (blocks_of(m, self.block) for m in (np.asarray(matrix, np.float64), cost))
        shape = values.shape
        values, weights = values.reshape(-1, shape[2]), weights.reshape(-1, shape[2])
        alphas = np.concatenate(
            [
                self._fit(values[i : i + 8192], weights[i : i + 8192])  # in portions that fit the cache
                for i in range(0, len(values), 8192)
            ]
        )
        stored = alphas.T.reshape(self.bits * rows, shape[1]).astype(np.float32)
        scales = store(stored, "e8m0" if self.powers else "float32")
        if not self.powers:
            scales = Scales("float32", stored)
        found = BinaryEncoded(layout, np.zeros(matrix.shape, np.uint8), self.bits, scales, self.block)
        return found.with_codes(found.nearest(matrix, 0))

    def join(self, parts: Sequence[BinaryEncoded], layout: Layout) -> BinaryEncoded:
        codes = np.concatenate([p.codes for p in parts], axis=1)
        scales = parts[0].scales
        if self.block:
            scales = replace(scales, stored=np.concatenate([p.scales.stored for p in parts], axis=1))
        return BinaryEncoded(layout, codes, self.bits, scales, self.block)

    def _fit(self, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Scales [groups, bits] of ``values`` [groups, n], each scale positive.

        Refining after every plane mostly ends lower; refining the greedy planes once at the end cannot end above them:
        each group takes the better of the two.
        """
        stepwise = self._planes(values, weights, self.rounds)
        if not self.rounds or self.bits == 1:
            return stepwise
        at_end = self._refined(values, weights, self._planes(values, weights, 0))
        off = [_error(values, weights, alphas) for alphas in (stepwise, at_end)]
        return np.where((off[0] <= off[1])[:, None], stepwise, at_end)

    def _planes(self, values: np.ndarray, weights: np.ndarray, rounds: int) -> np.ndarray:
        alphas = np.zeros((len(values), 0))
        residual = values
        for _ in range(self.bits):
            new = self._greedy(residual, weights)
            alphas = np.concatenate([alphas, new[:, None]], axis=1)
            if rounds:
                alphas = self._refined(values, weights, alphas)
                residual = values - _nearest_sums(values, alphas)
            else:  # as greed goes: the signs of earlier planes stay
                residual = residual - np.where(residual > 0, 1.0, -1.0) * new[:, None]
        return alphas

    def _refined(self, values: np.ndarray, weights: np.ndarray, alphas: np.ndarray) -> np.ndarray:
        for _ in range(self.rounds):
            better = self._least_squares(values, weights, alphas)
            if np.array_equal(better, alphas):
                break
            alphas = better
        return alphas

    def _greedy(self, residual: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The best single scale for the signs of what is left: the mean magnitude, or the better power next to it."""
        total = weights.sum(1)
        mean = (weights * np.abs(residual)).sum(1) / np.maximum(total, 1e-30)
        if not self.powers:
            return np.maximum(mean, 1e-30)
        low = _power_below(mean)
        # The error is a parabola around the mean: the nearer power is the better one.
        return np.where(mean - low <= 2 * low - mean, low, 2 * low)

    def _least_squares(self, values: np.ndarray, weights: np.ndarray, alphas: np.ndarray) -> np.ndarray:
        """Scales for the signs that are nearest under ``alphas``; where none is better, ``alphas`` themselves."""
        count = alphas.shape[1]
        signs = _signs(_assign(values, alphas), count)
        moment = np.einsum("gqn,gn,gpn->gqp", signs, weights, signs, optimize=True)
        wanted = np.einsum("gqn,gn->gq", signs, weights * values)
        ridge = 1e-6 * np.maximum(moment[:, 0, 0], 1e-30)[:, None, None] * np.eye(count)
        exact = np.linalg.solve(moment + ridge, wanted[:, :, None])[:, :, 0]

        def error(tried: np.ndarray) -> np.ndarray:
            return np.einsum("gq,gqp,gp->g", tried, moment, tried) - 2 * np.einsum("gq,gq->g", tried, wanted)

        if self.powers:
            low, sign = _power_below(np.abs(exact)), np.where(exact < 0, -1.0, 1.0)
            choices = [sign * low * _pattern(k, count) for k in range(2**count)]
        else:
            choices = [exact]
        best, least = alphas, error(alphas) - 1e-12 * np.abs(values).sum(1)
        for tried in choices:
            new = error(tried)
            best, least = np.where((new < least)[:, None], tried, best), np.minimum(new, least)
        magnitude = np.abs(best)  # a negative scale is a positive one under the opposite signs
        return np.maximum(magnitude, 2.0**-126 if self.powers else 1e-30)


def _power_below(x: np.ndarray) -> np.ndarray:
    """The largest power of two that is not above x."""
    return np.exp2(np.clip(np.frexp(np.maximum(x, 2.0**-120))[1] - 1.0, -120, 120))


def _pattern(k: int, count: int) -> np.ndarray:
    return np.array([2.0 if (k >> i) & 1 else 1.0 for i in range(count)])


def _signs(codes: np.ndarray, bits: int) -> np.ndarray:
    """[groups, bits, n] of -1 and 1."""
    return np.stack([((codes >> i) & 1) * 2.0 - 1.0 for i in range(bits)], axis=1)


def _nearest_sums(values: np.ndarray, alphas: np.ndarray) -> np.ndarray:
    """[groups, n]: the sums of signed scales nearest to the values."""
    return np.einsum("gqn,gq->gn", _signs(_assign(values, alphas), alphas.shape[1]), alphas)


def _error(values: np.ndarray, weights: np.ndarray, alphas: np.ndarray) -> np.ndarray:
    """Weighted squared error of every group."""
    found: np.ndarray = (weights * np.square(values - _nearest_sums(values, alphas))).sum(1)
    return found


def _assign(values: np.ndarray, alphas: np.ndarray) -> np.ndarray:
    """Codes [groups, n] of the sums nearest to ``values`` [groups, n] under ``alphas`` [groups, bits]."""
    bits = alphas.shape[1]
    patterns = np.arange(2**bits)
    signs = ((patterns[:, None] >> np.arange(bits)) & 1) * 2.0 - 1.0
    levels = alphas @ signs.T
    order = np.argsort(levels, axis=1, kind="stable")
    ascending = np.take_along_axis(levels, order, axis=1)
    place = np.zeros(values.shape, np.int64)
    for k in range(2**bits - 1):
        place += values > ((ascending[:, k] + ascending[:, k + 1]) / 2)[:, None]
    return np.take_along_axis(order, place, axis=1).astype(np.uint8)


def lut_matmul(x: np.ndarray, encoded: BinaryEncoded) -> np.ndarray:
    """``x @ W.T`` for x [T, columns] without a multiplication by a weight: one table of 256 sums per 8 inputs.

    For each byte of signs the sum of +-x is looked up; what is left is one scaling (a shift, for powers of two) per
    row, plane and block. Blocks must be multiples of 8 columns.

    Raises:
        ConfigError: the blocks are not.
    """
    width, rows = encoded._width(), encoded.layout.rows
    block = encoded.block or -(-width // 8) * 8
    if block % 8:
        raise ConfigError("lookup of 8 inputs needs blocks of a multiple of 8", node="block", found=encoded.block)
    whole = -(-width // 8) * 8
    padded = np.zeros((len(x), whole), np.float32)
    padded[:, : x.shape[1]] = x
    sums = padded.reshape(len(x), whole // 8, 8) @ sign_table().T  # [T, bytes, 256]
    alphas, signs = encoded.alphas(), encoded.packed()
    positions = np.arange(whole // 8)
    found = np.zeros((len(x), rows), np.float32)
    for i in range(encoded.bits):
        looked = sums[:, positions[None, :], signs[i]]  # [T, rows, bytes]
        per_block = looked.reshape(len(x), rows, -1, block // 8).sum(3)
        found += np.einsum("trb,rb->tr", per_block, alphas[i])
    return found
