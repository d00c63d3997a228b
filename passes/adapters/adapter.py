"""Adapter: trained tensors by target weight, as data: hashed against their base, saved and loaded as safetensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...graph.errors import ConstraintError, ModelFileError
from .kinds import AdapterKind, Geometry, NotFoldable, Options, Tensors, kind_of
from .view import View

FORMAT = "foldline-adapter-1"


@dataclass
class Entry:
    """One adapter on one weight.

    Attributes:
        target: name of the stored weight in the base model (``"blocks.0.attn.qkv.weight"``).
        kind: name of the adapter kind.
        tensors: its stored tensors, numpy, in the dtype they were trained in.
        options: the kind's options as plain data.
        view: how the layer stores the weight.
        bias: name of the stored bias, where the layer has one or the kind makes one.
        base: hash of the base weight (and bias) that it was trained on; None if unknown.
        aliases: every name of the target in the model it was trained in (tied weights have several), if known.
    """

    target: str
    kind: str
    tensors: dict[str, np.ndarray]
    options: dict[str, Any] = field(default_factory=dict)
    view: View = field(default_factory=View)
    bias: str | None = None
    base: str | None = None
    aliases: tuple[str, ...] = ()

    def definition(self) -> AdapterKind:
        """The kind itself."""
        return kind_of(self.kind)


@dataclass
class Adapter:
    """All entries of one adapter. Several entries may name one target: they apply in order, each on the last's result.

    Attributes:
        entries: in the order in which they apply.
        merged_into: fingerprints of base weights that it has been merged into, in this process.
    """

    entries: list[Entry]

    def targets(self) -> dict[str, list[Entry]]:
        """Entries by target weight, in order."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.target, []).append(entry)
        return found

    @property
    def foldable(self) -> bool:
        """Whether every entry merges into a weight."""
        return all(entry.definition().foldable for entry in self.entries)

    def count(self) -> int:
        """Elements of the trained tensors; tensors that several entries share count once."""
        seen: dict[int, int] = {}
        for entry in self.entries:
            fixed = entry.definition().fixed
            for name, data in entry.tensors.items():
                if name not in fixed and not name.endswith("_start"):
                    seen[id(data)] = data.size
        return sum(seen.values())

    def fingerprint(self) -> str:
        """Hash of everything that determines what the adapter does."""
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(json.dumps([entry.target, entry.kind, entry.options, entry.view.to_dict()]).encode())
            for name in sorted(entry.tensors):
                digest.update(f"{name} {tensor_hash(entry.tensors[name])}".encode())
        return digest.hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file; what is no tensor goes into its header. Shared tensors are stored once."""
        from safetensors.numpy import save_file

        tensors: dict[str, np.ndarray] = {}
        stored: dict[int, str] = {}
        header = []
        for i, entry in enumerate(self.entries):
            names = {}
            for name, data in entry.tensors.items():
                key = stored.setdefault(id(data), f"{i}.{entry.target}.{name}")
                names[name] = key
                tensors[key] = np.ascontiguousarray(data)
            header.append(
                {
                    "target": entry.target,
                    "kind": entry.kind,
                    "options": entry.options,
                    "view": entry.view.to_dict(),
                    "bias": entry.bias,
                    "base": entry.base,
                    "aliases": list(entry.aliases),
                    "tensors": names,
                }
            )
        path = Path(path)
        save_file(tensors, path, metadata={"format": FORMAT, "entries": json.dumps(header)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Adapter:
        """Read what :meth:`save` wrote.

        Raises:
            ModelFileError: the file is missing, damaged, or no adapter of foldline.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                meta = file.metadata() or {}
                if meta.get("format") != FORMAT:
                    raise ModelFileError(
                        "not an adapter file of foldline", node=str(path), expected=FORMAT, found=meta.get("format")
                    )
                keys = list(file.keys())
                data = {key: file.get_tensor(key) for key in keys}
        except (OSError, SafetensorError) as exc:
            raise ModelFileError("the adapter file cannot be read", node=str(path), found=str(exc)) from exc
        entries = []
        for item in json.loads(meta["entries"]):
            tensors = {name: data[key] for name, key in item["tensors"].items()}
            view = View.from_dict(item["view"])
            made = Entry(item["target"], item["kind"], tensors, item["options"], view, item["bias"], item["base"])
            made.aliases = tuple(item.get("aliases", ()))
            entries.append(made)
        return cls(entries)


def tensor_hash(data: np.ndarray) -> str:
    """SHA-256 of dtype, shape and bytes."""
    digest = hashlib.sha256(f"{data.dtype.name} {data.shape} ".encode())
    digest.update(np.ascontiguousarray(data).view(np.uint8).data if data.size else b"")
    return digest.hexdigest()


def base_hash(weight: np.ndarray, bias: np.ndarray | None = None) -> str:
    """Hash of the base that an adapter belongs to."""
    return tensor_hash(weight) + ("" if bias is None else ":" + tensor_hash(bias))


# ---- the formula in float64 ----------------------------------------------------------------------------------------
def merged_weight(weight: np.ndarray, bias: np.ndarray | None, entry: Entry) -> tuple[np.ndarray, np.ndarray | None]:
    """The new stored weight and bias, float64, in the layer's own layout.

    Args:
        weight, bias: stored, any float dtype.

    Raises:
        NotFoldable: the kind is no function of the weight alone.
        ConstraintError: shapes do not fit, or an option does not allow merging.
    """
    kind, view = entry.definition(), entry.view
    if not kind.foldable:
        raise NotFoldable(kind, entry.target)
    w = widened(np.asarray(weight))
    g = view.geometry(w.shape)
    t = evaluated(kind, entry.tensors, g, entry.options)
    if kind.checked is not None:
        kind.checked(t, entry.options)
    try:
        c = kind.new_weight(view.canonical(w), t, g, entry.options)
    except ValueError as exc:
        shapes = {name: tuple(data.shape) for name, data in entry.tensors.items()}
        raise ConstraintError(
            "the adapter's tensors do not fit the weight", node=entry.target, expected=f"for {g}", found=shapes
        ) from exc
    new = view.stored(c, w)
    if kind.bias is None:
        return new, None if bias is None else np.asarray(bias).astype(np.float64)
    b = np.zeros(view.rows_of(w.shape)) if bias is None else np.asarray(bias).astype(np.float64)
    changed = kind.bias(view.bias_rows(b), {**t, "base": view.canonical(w)}, entry.options)
    if bias is None and not np.any(changed):
        return new, None
    return new, view.stored_bias(changed, b)


def evaluated(kind: AdapterKind, tensors: Mapping[str, np.ndarray], g: Geometry, o: Options) -> Tensors:
    """The tensors as float64, with those that are made from a seed."""
    t = {name: np.asarray(data).astype(np.float64) for name, data in tensors.items()}
    if kind.derived is not None:
        t.update(kind.derived(g, o))
    return t


def cast_once(data: np.ndarray, dtype: Any, node: str | None = None) -> np.ndarray:
    """float64 to the stored dtype with one rounding (to nearest, ties to even).

    Casting float64 to a 16-bit type through float32 rounds twice; the intermediate is rounded to odd instead, which
    keeps the information that the second rounding needs.

    Raises:
        ConstraintError: a finite value overflows the dtype, or the data is not finite.
    """
    dtype = np.dtype(dtype)
    if dtype.name in ("float64", "float32", "float16"):
        with np.errstate(over="ignore"):
            new = data.astype(dtype)
        finite = bool(np.isfinite(new).all())
    elif dtype.name == "bfloat16":
        new = _to_bfloat16(data).view(dtype)
        finite = bool(((new.view(np.uint16) & _EXPONENT) != _EXPONENT).all())
    else:
        new = _to_odd(data).astype(dtype)
        finite = bool(np.isfinite(new.astype(np.float32)).all())
    if not finite:
        raise ConstraintError(
            "the merged weight is not finite in its dtype",
            node=node,
            expected=f"values within {dtype.name}",
            found=f"up to {np.abs(data).max():.3g}",
        )
    return new


_EXPONENT = np.uint16(0x7F80)
"""The exponent of a bfloat16; all ones in what is not finite."""
_CHUNK = 1 << 16
"""Elements converted at a time: they stay in the processor's cache."""


def widened(data: np.ndarray) -> np.ndarray:
    """As float64, exactly; bfloat16, whose bits are the upper half of a float32's, without a call per element."""
    if data.dtype.name != "bfloat16":
        return data.astype(np.float64)
    flat = np.ascontiguousarray(data).reshape(-1).view(np.uint16)
    made = np.empty(flat.size, np.float64)
    for start in range(0, flat.size, _CHUNK):
        bits = flat[start : start + _CHUNK].astype(np.uint32)
        bits <<= np.uint32(16)
        made[start : start + _CHUNK] = bits.view(np.float32)
    return made.reshape(data.shape)


def _to_bfloat16(data: np.ndarray) -> np.ndarray:
    """The bits, uint16, of the nearest bfloat16 (ties to even; NaN stays NaN).

    Rounding to float32 first changes the result only where that lands halfway between two bfloat16 and was inexact: all
    other float32 lie on the same side of every halfway point as what they came from. Those few are rounded to odd.
    """
    flat = np.ascontiguousarray(data).reshape(-1)
    made = np.empty(flat.size, np.uint16)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        with np.errstate(over="ignore"):
            near = part.astype(np.float32)
        bits = near.view(np.uint32)
        halfway = np.flatnonzero((bits & np.uint32(0xFFFF)) == 0x8000)
        if halfway.size:
            bits[halfway] = _to_odd(part[halfway]).view(np.uint32)
        lost = np.isnan(near)
        even = (bits >> np.uint32(16)) & np.uint32(1)
        even += np.uint32(0x7FFF)
        even += bits
        even >>= np.uint32(16)
        made[start : start + _CHUNK] = even
        if lost.any():
            made[start : start + _CHUNK][lost] = 0x7FC0
    return made.reshape(data.shape)


def _to_odd(data: np.ndarray) -> np.ndarray:
    """float32 towards zero, with the last bit set wherever something was cut off."""
    with np.errstate(over="ignore"):
        near = data.astype(np.float32)
    bits = near.view(np.uint32).copy()
    away = np.abs(near.astype(np.float64)) > np.abs(data)
    bits[away] -= 1
    inexact = bits.view(np.float32).astype(np.float64) != data
    bits[inexact] |= 1
    return bits.view(np.float32)
