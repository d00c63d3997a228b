"""The container: tensors by name, each in the codec that fits it, with everything needed to restore them counted.

Layout: magic, length of the header, header (JSON, deflated), then the payload of every tensor one after another.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ....graph.errors import ModelFileError
from ..formats.packing import pack, planes, unpack
from . import rans

MAGIC = b"FLWZ1\n"


@dataclass
class Entry:
    """One tensor: what to restore, and how.

    Attributes:
        codec: ``raw`` (bytes), ``grid`` (integers times a step, entropy-coded), ``sparse`` (a grid, with some elements
            apart: their positions and float16 values behind it), ``vq`` (codes of a shared codebook times a scale).
        facts: what the codec needs besides the payload; plain data, part of the header.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    codec: str
    payload: bytes
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Archive:
    """Coded tensors. ``tensors()`` restores them; ``to_bytes()`` is the file.

    Attributes:
        codebooks: tables that entries refer to by name.
    """

    entries: list[Entry] = field(default_factory=list)
    codebooks: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of the file, header and all."""
        return len(self.to_bytes())

    def add_raw(self, name: str, data: np.ndarray) -> None:
        """A tensor as it is."""
        self.entries.append(Entry(name, data.shape, data.dtype.name, "raw", np.ascontiguousarray(data).tobytes()))

    def add_grid(self, name: str, data: np.ndarray, integers: np.ndarray, step: np.ndarray, axis: int) -> None:
        """``integers * step`` with one step in all or per index of ``axis``, float32; ``data`` gives the dtype."""
        payload, facts = _coded(integers, step, axis)
        self.entries.append(Entry(name, data.shape, data.dtype.name, "grid", payload, facts))

    def add_sparse(
        self,
        name: str,
        data: np.ndarray,
        integers: np.ndarray,
        step: np.ndarray,
        axis: int,
        index: np.ndarray,
        values: np.ndarray,
    ) -> None:
        """:meth:`add_grid`, except for the elements at the flat positions ``index``, which are ``values`` (float16)."""
        payload, facts = _coded(integers, step, axis)
        facts |= {"grid": len(payload), "apart": int(index.size)}
        payload += np.asarray(index, _index(integers.size)).tobytes() + np.asarray(values, "<f2").tobytes()
        self.entries.append(Entry(name, data.shape, data.dtype.name, "sparse", payload, facts))

    def add_vq(self, name: str, data: np.ndarray, codes: np.ndarray, scale: float, book: str, bits: int) -> None:
        """Groups of consecutive numbers as codes of a codebook, times a scale."""
        payload = b"".join(p.tobytes() for p in pack(codes.reshape(1, -1), bits))
        facts = {"scale": float(np.float32(scale)), "book": book, "bits": bits, "count": int(codes.size)}
        self.entries.append(Entry(name, data.shape, data.dtype.name, "vq", payload, facts))

    def tensors(self) -> dict[str, np.ndarray]:
        """All tensors under their names, in their shapes and dtypes."""
        return {e.name: self._restore(e) for e in self.entries}

    def integers(self, name: str) -> np.ndarray:
        """The integers of a tensor in codec ``grid`` or ``sparse``."""
        entry = next(e for e in self.entries if e.name == name and e.codec in ("grid", "sparse"))
        freq = np.asarray(entry.facts["freq"], np.uint32)
        count = int(np.prod(entry.shape, dtype=np.int64))
        symbols = rans.decode(entry.payload[4 * entry.facts["steps"] : entry.facts.get("grid")], count, freq)
        return (symbols + entry.facts["low"]).reshape(entry.shape)

    def _restore(self, entry: Entry) -> np.ndarray:
        dtype = _dtype(entry.dtype)
        if entry.codec == "raw":
            return np.frombuffer(entry.payload, dtype).reshape(entry.shape).copy()
        if entry.codec in ("grid", "sparse"):
            step = np.frombuffer(entry.payload, "<f4", entry.facts["steps"])
            shape = [-1 if i == entry.facts["axis"] else 1 for i in range(len(entry.shape))]
            numbers = self.integers(entry.name).astype(np.float32) * step.reshape(shape)
            if entry.codec == "sparse":
                at, count = entry.facts["grid"], entry.facts["apart"]
                index = np.frombuffer(entry.payload, _index(numbers.size), count, at)
                values = np.frombuffer(entry.payload, "<f2", count, at + index.nbytes)
                numbers.reshape(-1)[index] = values
            return numbers.astype(dtype)
        if entry.codec == "vq":
            book, facts = self.codebooks[entry.facts["book"]], entry.facts
            codes = unpack(_planes(entry.payload, facts["count"], facts["bits"]), facts["bits"], facts["count"])[0]
            size = int(np.prod(entry.shape, dtype=np.int64))
            numbers = book[codes].reshape(-1)[:size] * np.float32(facts["scale"])
            return numbers.reshape(entry.shape).astype(dtype)
        raise ModelFileError("unknown codec", node=entry.name, found=entry.codec)

    def to_bytes(self) -> bytes:
        """The whole file."""
        books = [{"name": k, "shape": v.shape} for k, v in self.codebooks.items()]
        tensors = [[e.name, list(e.shape), e.dtype, e.codec, len(e.payload), e.facts] for e in self.entries]
        header = zlib.compress(json.dumps({"books": books, "tensors": tensors}, separators=(",", ":")).encode(), 9)
        bodies = [np.asarray(v, "<f4").tobytes() for v in self.codebooks.values()] + [e.payload for e in self.entries]
        return b"".join([MAGIC, struct.pack("<I", len(header)), header, *bodies])

    def save(self, path: str | Path) -> Path:
        """Write the file and return its path."""
        Path(path).write_bytes(self.to_bytes())
        return Path(path)


def read_archive(source: str | Path | bytes) -> Archive:
    """An archive from its bytes or file.

    Raises:
        ModelFileError: it is none, or it is cut short.
    """
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    if not data.startswith(MAGIC):
        raise ModelFileError("not an archive of weights", expected=repr(MAGIC), found=repr(data[: len(MAGIC)]))
    start = len(MAGIC) + 4
    try:
        (length,) = struct.unpack_from("<I", data, len(MAGIC))
        header: Mapping[str, Any] = json.loads(zlib.decompress(data[start : start + length]))
    except (struct.error, zlib.error, ValueError) as exc:
        raise ModelFileError(f"the header of the archive cannot be read: {exc}") from exc
    at, archive = start + length, Archive()
    for book in header["books"]:
        size = int(np.prod(book["shape"]))
        archive.codebooks[book["name"]] = np.frombuffer(data, "<f4", size, at).reshape(book["shape"])
        at += 4 * size
    for name, shape, dtype, codec, length, facts in header["tensors"]:
        if at + length > len(data):
            raise ModelFileError("the archive is truncated", node=name, expected=at + length, found=len(data))
        archive.entries.append(Entry(name, tuple(shape), dtype, codec, data[at : at + length], facts))
        at += length
    return archive


def _coded(integers: np.ndarray, step: np.ndarray, axis: int) -> tuple[bytes, dict[str, Any]]:
    """Payload and facts of integers on a grid."""
    low = int(integers.min(initial=0))
    symbols = integers.astype(np.int64).ravel() - low
    freq = rans.frequencies(np.bincount(symbols))
    payload = np.asarray(step, "<f4").tobytes() + rans.encode(symbols, freq)
    return payload, {"low": low, "steps": int(np.size(step)), "axis": axis, "freq": freq.tolist()}


def _index(size: int) -> str:
    """Type of positions in a tensor of that many elements."""
    return "<u2" if size <= 2**16 else "<u4"


def _planes(payload: bytes, count: int, bits: int) -> list[np.ndarray]:
    found, at = [], 0
    for width in planes(bits):
        size = -(-count * width // 8)
        found.append(np.frombuffer(payload, np.uint8, size, at).reshape(1, -1))
        at += size
    return found


def _dtype(name: str) -> np.dtype[Any]:
    from ..spec.formats import numpy_dtype

    return numpy_dtype(name)
