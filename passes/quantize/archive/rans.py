"""An entropy coder for integers: interleaved range ANS, vectorised over its lanes; lossless, within 1 % of the entropy.

"Asymmetric numeral systems: entropy coding combining speed of Huffman coding with compression rate of arithmetic
coding"; interleaving as in "Interleaved entropy coders". Symbol k of the stream belongs to lane k mod lanes.
"""

from __future__ import annotations

import numpy as np

from ....graph.errors import ModelFileError

PRECISION = 15
"""Frequencies are multiples of 2**-15."""
LOWEST = 1 << 16
"""States lie in [2**16, 2**32); a word of 16 bits moves in or out at a time."""
PER_LANE = 4096
"""Symbols that one lane is worth: its final state costs 4 bytes."""
MOST_LANES = 4096


def lanes_for(count: int) -> int:
    """How many lanes a stream of that many symbols gets."""
    return int(min(max(count // PER_LANE, 1), MOST_LANES))


def frequencies(counts: np.ndarray) -> np.ndarray:
    """Counts scaled to sum to 2**15, at least 1 where there is any; uint32.

    Raises:
        ModelFileError: there are more distinct symbols than that.
    """
    present = counts > 0
    total = 1 << PRECISION
    if present.sum() > total:
        raise ModelFileError(
            "too many distinct codes for the coder", expected=f"at most {total}", found=int(present.sum())
        )
    exact = counts.astype(np.float64) * total / max(counts.sum(), 1)
    found = np.where(present, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    while (missing := total - int(found.sum())) != 0:
        if missing > 0:  # to those that were rounded down most
            gain = np.where(present, exact - found, -np.inf)
            found[np.argsort(-gain, kind="stable")[:missing]] += 1
        else:  # from the largest, which notice it least
            order = np.argsort(-found, kind="stable")[: max(1, min(-missing, int((found > 1).sum())))]
            found[order[found[order] > 1]] -= 1
    return found.astype(np.uint32)


def entropy_bits(counts: np.ndarray) -> float:
    """Bits of a stream with these counts under the best static code: -sum c log2(c / n)."""
    c = counts[counts > 0].astype(np.float64)
    return float(-(c * np.log2(c / c.sum())).sum()) if len(c) else 0.0


def encode(symbols: np.ndarray, freq: np.ndarray) -> bytes:
    """A stream of symbols 0 .. len(freq) - 1 as bytes: the lanes' final states, then words of 16 bits."""
    count, lanes = len(symbols), lanes_for(len(symbols))
    f, start = freq.astype(np.uint64), np.concatenate([[0], np.cumsum(freq)[:-1]]).astype(np.uint64)
    state = np.full(lanes, LOWEST, np.uint64)
    words: list[np.ndarray] = []
    steps = -(-count // lanes)
    for step in range(steps - 1, -1, -1):
        part = symbols[step * lanes : (step + 1) * lanes]
        n = len(part)
        x, fs = state[:n], f[part]
        full = x >= fs << np.uint64(32 - PRECISION)
        words.append((x[full] & np.uint64(0xFFFF)).astype("<u2"))
        x = np.where(full, x >> np.uint64(16), x)
        state[:n] = (x // fs << np.uint64(PRECISION)) + x % fs + start[part]
    body = np.concatenate(words[::-1]) if words else np.zeros(0, "<u2")
    return state.astype("<u4").tobytes() + body.tobytes()


def decode(data: bytes, count: int, freq: np.ndarray) -> np.ndarray:
    """The inverse of :func:`encode`, int64 [count].

    Raises:
        ModelFileError: the bytes end too early, or are not what :func:`encode` made.
    """
    lanes = lanes_for(count)
    if len(data) < 4 * lanes:
        raise ModelFileError("a coded tensor is truncated", expected=f"{4 * lanes} bytes of states", found=len(data))
    state = np.frombuffer(data, "<u4", lanes).astype(np.uint64)
    words = np.frombuffer(data, "<u2", (len(data) - 4 * lanes) // 2, 4 * lanes).astype(np.uint64)
    f, start = freq.astype(np.uint64), np.concatenate([[0], np.cumsum(freq)[:-1]]).astype(np.uint64)
    slots = np.repeat(np.arange(len(freq)), freq)
    found, at = np.empty(count, np.int64), 0
    mask = np.uint64((1 << PRECISION) - 1)
    for first in range(0, count, lanes):
        n = min(lanes, count - first)
        x = state[:n]
        low = x & mask
        part = slots[low]
        found[first : first + n] = part
        x = f[part] * (x >> np.uint64(PRECISION)) + low - start[part]
        empty = np.flatnonzero(x < LOWEST)
        if at + len(empty) > len(words):
            raise ModelFileError("a coded tensor is truncated", found=f"{len(words)} words")
        x[empty] = x[empty] << np.uint64(16) | words[at : at + len(empty)]
        at += len(empty)
        state[:n] = x
    if (state != LOWEST).any() or at != len(words):
        raise ModelFileError("a coded tensor is damaged", hint="its words do not lead back to the first state")
    return found
