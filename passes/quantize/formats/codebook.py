"""Codebooks of a tensor's own: k-means of its numbers, or of groups of consecutive numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ....graph.errors import ConfigError
from .layout import Layout
from .lookup import LookupEncoded, join, nearest_vectors
from .protocol import blocks_of, checked_importance
from .scales import ScaleKind, store

SAMPLE = 1 << 16
"""Groups that k-means of vectors looks at; all of them are assigned at the end."""


@dataclass(frozen=True)
class Codebook:
    """2**bits entries of ``step`` numbers each, found by (weighted) k-means; bits / step bits per weight.

    Attributes:
        bits: of a code, 1 to 12.
        step: consecutive columns that one code stands for; must divide the columns (and the block).
        block: columns that share a scale where ``scaled``; 0: a row.
        scaled: divide each block by its largest magnitude first.
        rounds: of k-means.
        table: a codebook to use instead of finding one, [2**bits] or [2**bits, step].
    """

    bits: int = 4
    step: int = 1
    block: int = 0
    scaled: bool = False
    scale: ScaleKind = "float16"
    rounds: int = 25
    seed: int = 0
    table: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 12:
            raise ConfigError("codebooks have codes of 1 to 12 bits", node="bits", found=self.bits)
        if self.step < 1 or self.block % self.step:
            raise ConfigError(
                "a block holds whole groups", node="step", expected="a divisor of the block", found=self.step
            )

    @property
    def name(self) -> str:
        return f"codebook{self.bits}x{self.step}"

    def fit(self, weight: np.ndarray, axis: int = 0, importance: np.ndarray | None = None) -> LookupEncoded:
        layout = Layout(weight.shape, axis)
        matrix = layout.matrix(weight)
        return self.prepared(matrix, importance).fit_matrix(matrix, layout, importance)

    def prepared(self, matrix: np.ndarray, importance: np.ndarray | None = None) -> Codebook:
        """With the codebook found."""
        if self.table is not None:
            return self
        if matrix.shape[1] % self.step:
            raise ConfigError(
                "groups of columns must divide the columns", node="step", expected=f"a divisor of {matrix.shape[1]}",
                found=self.step,
            )  # fmt: skip
        scaled = self._scaled(matrix)
        cost = np.broadcast_to(checked_importance(importance, matrix.shape[1]), matrix.shape)
        if self.step == 1:
            table = kmeans_numbers(scaled.ravel(), cost.ravel(), 2**self.bits, self.rounds)
        else:
            groups = scaled.reshape(-1, self.step)
            weights = cost.reshape(-1, self.step).mean(1)
            table = kmeans_vectors(groups, weights, 2**self.bits, self.rounds, self.seed)
        return replace(self, table=table.astype(np.float32))

    def _scales(self, matrix: np.ndarray) -> np.ndarray:
        return np.abs(blocks_of(matrix, self.block)).max(2)

    def _scaled(self, matrix: np.ndarray) -> np.ndarray:
        if not self.scaled:
            return matrix
        numbers = store(self._scales(matrix), self.scale).numbers()
        width = self.block or matrix.shape[1]
        return matrix / np.repeat(numbers, width, axis=1)[:, : matrix.shape[1]]

    def fit_matrix(self, matrix: np.ndarray, layout: Layout, importance: np.ndarray | None = None) -> LookupEncoded:
        assert self.table is not None
        scales = store(self._scales(matrix), self.scale) if self.scaled else None
        codes = np.zeros((layout.rows, 0), np.uint8)
        block = self.block if self.scaled else 0
        found = LookupEncoded(layout, codes, self.bits, self.table, scales, None, block)
        return found.with_codes(found.nearest(matrix, 0))

    def join(self, parts: Sequence[LookupEncoded], layout: Layout) -> LookupEncoded:
        return join(parts, layout, self.block if self.scaled else 0)


def kmeans_numbers(values: np.ndarray, weights: np.ndarray, count: int, rounds: int) -> np.ndarray:
    """Ascending centres of numbers: Lloyd's iteration on the sorted data, started at quantiles; exact sums, no seed."""
    order = np.argsort(values, kind="stable")
    x, w = values[order].astype(np.float64), weights[order].astype(np.float64)
    below, moment = np.concatenate([[0], np.cumsum(w)]), np.concatenate([[0], np.cumsum(w * x)])
    at = np.searchsorted(below, (np.arange(count) + 0.5) / count * below[-1])
    centres = x[np.clip(at, 0, len(x) - 1)]
    for _ in range(rounds):
        edges = np.searchsorted(x, (centres[1:] + centres[:-1]) / 2)
        bounds = np.concatenate([[0], edges, [len(x)]])
        mass, total = np.diff(below[bounds]), np.diff(moment[bounds])
        new = np.where(mass > 0, total / np.where(mass > 0, mass, 1), centres)
        if np.array_equal(new, centres):
            break
        centres = new
    return centres


def kmeans_vectors(groups: np.ndarray, weights: np.ndarray, count: int, rounds: int, seed: int) -> np.ndarray:
    """Centres [count, step] of ``groups`` [n, step]; a centre that nothing is nearest to moves to the worst group."""
    rng = np.random.default_rng(seed)
    if len(groups) > SAMPLE:
        picked = rng.choice(len(groups), SAMPLE, replace=False)
        groups, weights = groups[picked], weights[picked]
    groups, weights = np.asarray(groups, np.float32), weights.astype(np.float64)
    centres = _spread_out(groups, weights, count, rng)
    for _ in range(rounds):
        codes = nearest_vectors(groups, centres)[:, 0].astype(np.int64)
        mass = np.bincount(codes, weights, minlength=count)
        sums = np.stack([np.bincount(codes, weights * g, minlength=count) for g in groups.T.astype(np.float64)], axis=1)
        new = np.where(mass[:, None] > 0, sums / np.maximum(mass, 1e-30)[:, None], centres).astype(np.float32)
        empty = np.flatnonzero(mass == 0)
        if len(empty):
            off = np.square(groups - centres[codes]).sum(1) * weights
            worst = np.argsort(-off, kind="stable")[: len(empty)]
            new[empty[: len(worst)]] = groups[worst]
        if np.array_equal(new, centres):
            break
        centres = new
    return centres


def _spread_out(groups: np.ndarray, weights: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Starting centres: in a few rounds, groups drawn with the chance of their distance to the centres so far.

    "Scalable K-Means++" draws many at a time; here as many in all as there are to be centres.
    """
    count_drawn, rounds = min(count, len(groups)), 8
    distance = np.square(groups).sum(1).astype(np.float64)
    centres = np.zeros((0, groups.shape[1]), np.float32)
    for turn in range(rounds):
        wanted = count_drawn * (turn + 1) // rounds - len(centres)
        if wanted <= 0:
            continue
        chance = distance * weights + 1e-12 * max(float(distance.max(initial=0)), 1e-30)
        new = groups[rng.choice(len(groups), wanted, replace=False, p=chance / chance.sum())]
        centres = np.concatenate([centres, new])
        nearest = new[nearest_vectors(groups, new)[:, 0].astype(np.int64)]
        distance = (
            np.minimum(distance, np.square(groups - nearest).sum(1)) if turn else np.square(groups - nearest).sum(1)
        )
    return np.concatenate([centres, np.zeros((count - len(centres), groups.shape[1]), np.float32)])
