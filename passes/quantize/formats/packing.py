"""Codes of a few bits as bytes and back, vectorised: any width from 1 to 16, as planes of 1, 2, 4 and 8 bits.

A width that is no power of two is cut into planes (3 = 2 + 1, 12 = 8 + 4), lowest bits first, so that a byte never
holds part of a code of its plane and a graph unpacks a plane with one table of 256 rows.
"""

from __future__ import annotations

import numpy as np

from ....graph.errors import ConfigError

PLANES = (8, 4, 2, 1)


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a code, lowest bits first. Raises ConfigError outside 1 to 16 bits."""
    if not 1 <= bits <= 16:
        raise ConfigError("codes have 1 to 16 bits", node="bits", found=bits)
    found, left = [], bits
    for width in PLANES:
        while left >= width:
            found.append(width)
            left -= width
    return tuple(found)


def pack(codes: np.ndarray, bits: int) -> list[np.ndarray]:
    """Codes [..., n] in 0 .. 2**bits - 1 as one uint8 array [..., ceil(n * width / 8)] per plane.

    Inside a byte the first code sits in the lowest bits; the last byte is filled up with zeros.
    """
    found, shift = [], 0
    for width in planes(bits):
        part = ((codes.astype(np.uint16) >> shift) & (2**width - 1)).astype(np.uint8)
        shift += width
        per = 8 // width
        if missing := -part.shape[-1] % per:
            part = np.concatenate([part, np.zeros((*part.shape[:-1], missing), np.uint8)], axis=-1)
        grouped = part.reshape(*part.shape[:-1], part.shape[-1] // per, per)
        packed = grouped[..., 0].copy()
        for i in range(1, per):
            packed |= grouped[..., i] << np.uint8(i * width)
        found.append(packed)
    return found


def unpack(packed: list[np.ndarray], bits: int, count: int) -> np.ndarray:
    """The inverse of :func:`pack`: ``count`` codes along the last axis, uint8 (uint16 above 8 bits)."""
    dtype = np.uint8 if bits <= 8 else np.uint16
    codes, shift = None, 0
    for plane, width in zip(packed, planes(bits), strict=True):
        part = byte_table(width)[plane].reshape(*plane.shape[:-1], -1)[..., :count].astype(dtype) << dtype(shift)
        codes = part if codes is None else codes | part
        shift += width
    assert codes is not None
    return codes


def byte_table(width: int) -> np.ndarray:
    """uint8 [256, 8 // width]: the codes of that width which each byte holds."""
    shifts = np.arange(8 // width, dtype=np.uint8) * np.uint8(width)
    found: np.ndarray = (np.arange(256, dtype=np.uint8)[:, None] >> shifts) & np.uint8(2**width - 1)
    return found


def packed_bytes(rows: int, count: int, bits: int) -> int:
    """Bytes that ``rows`` rows of ``count`` codes take."""
    return sum(rows * -(-count * width // 8) for width in planes(bits))
