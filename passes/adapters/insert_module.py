"""Inserting adapters of any kind into a copy of an nn.Module; the base is frozen, the adapters are parameters."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ...graph.errors import ConfigError, ConstraintError, FoldlineError
from ...graph.fx.tensors import to_numpy
from .attach import WeightAdapter, attach
from .kinds import AdapterKind, Start
from .outputs import attach_output, attach_prefix
from .patterns import matches
from .places import NORMS, Place, by_default, find_places

Evidence = Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Inserted:
    """One adapter that was inserted: where, under which name, how many elements it trains."""

    target: str
    name: str
    trainable: int
    options: dict[str, Any]


def places_for(model: nn.Module, kind: AdapterKind, targets: Any, exclude: Sequence[str]) -> list[Place]:
    """The weights that adapters of this kind go on; scale-shift also takes norms."""
    if kind.name == "ssf":
        return find_places(model, targets, exclude, lambda m: by_default(m) or isinstance(m, NORMS))
    return find_places(model, targets, exclude)


def insert(
    model: nn.Module,
    kind: AdapterKind,
    places: Sequence[Place],
    options: Mapping[str, Any],
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    evidence: Evidence | None = None,
    name: str = "adapter",
    train: Sequence[str] = (),
) -> list[Inserted]:
    """Insert into ``model`` itself (give a copy), with the weights of ``places`` found in it.

    Args:
        options: for every place, before those of its own pattern.
        dtype: of the adapters' tensors; that of the weight if None.
        evidence: by target name, see ``kinds.Start``.
        name: of the submodule: ``<weight>_<name>``.
        train: patterns of parameters of the base that stay trainable.

    Raises:
        ConfigError, ConstraintError: an option is unknown, or does not fit a weight (which is named).
    """
    for path, p in model.named_parameters():
        p.requires_grad_(any(matches(t, path.rpartition(".")[0], path) for t in train))
    found: list[Inserted] = []
    shared: dict[tuple[Any, ...], nn.Parameter] = {}
    for place in places:
        try:
            found.append(_insert_one(model, kind, place, options, seed, dtype, evidence or {}, name, shared))
        except FoldlineError as exc:
            if exc.node in (None, "rank", "block", "size", "terms", "sizes"):
                exc.node = place.name if exc.node is None else f"{exc.node} of {place.name}"
                exc.args = (exc._render(),)
            raise
    return found


def _insert_one(
    model: nn.Module,
    kind: AdapterKind,
    place: Place,
    options: Mapping[str, Any],
    seed: int,
    dtype: torch.dtype | None,
    evidence: Evidence,
    name: str,
    shared: dict[tuple[Any, ...], nn.Parameter],
) -> Inserted:
    chosen = kind.options({**options, **place.options})
    stored = place.layer._parameters[place.weight]
    assert stored is not None
    if not stored.is_floating_point():
        raise ConstraintError("an adapter needs a floating weight", node=place.name, found=str(stored.dtype))
    if getattr(place.layer, "max_norm", None) is not None:
        raise ConstraintError("this embedding renormalises its weight in place", node=place.name, found="max_norm")
    stream = zlib.crc32(f"{place.name}{place.view.rows or ''}".encode())
    if "seed" in chosen and "seed" not in {**options, **place.options}:
        chosen["seed"] = zlib.crc32(f"{seed} {stream}".encode()) >> 1
    start = _start(place, kind, chosen, stored, np.random.Generator(np.random.Philox(key=[seed, stream])), evidence)
    tensors = kind.init(start)
    kept_dtype = stored.dtype if dtype is None else dtype
    reuse = {}
    for key in chosen.get("share", ()):
        if key not in tensors:
            raise ConfigError("no such tensor to share", node="share", expected=", ".join(tensors), found=key)
        mark = (key, tensors[key].shape, kept_dtype)
        if mark in shared:
            reuse[key] = shared[mark]
    made: nn.Module
    if kind.site == "attention":
        key, made = attach_prefix(model, place, kind, chosen, tensors, kept_dtype, name)
    elif kind.site == "output":
        key, made = attach_output(place, kind, chosen, tensors, kept_dtype, reuse, name)
    else:
        key, made = _attach_weight(place, kind, chosen, tensors, kept_dtype, tuple(stored.shape), reuse, name)
    made.to(stored.device)
    for mark_key in chosen.get("share", ()):
        shared.setdefault((mark_key, tensors[mark_key].shape, kept_dtype), getattr(made, mark_key))
    trainable = sum(p.numel() for k, p in made.named_parameters() if k not in reuse)
    return Inserted(place.name, f"{place.path}.{key}" if place.path else key, trainable, chosen)


def _attach_weight(
    place: Place,
    kind: AdapterKind,
    options: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    reuse: Mapping[str, nn.Parameter],
    name: str,
) -> tuple[str, WeightAdapter]:
    """One adapter in every layer that holds the weight."""
    if kind.bias is not None and place.bias is None and kind.name != "ia3":
        raise ConstraintError(
            f"an adapter of kind {kind.name!r} needs a layer that can have a bias",
            node=place.name,
            found=type(place.layer).__name__,
        )
    made = WeightAdapter(kind, options, place.view, tensors, dtype, shape, reuse)
    keys = [
        attach(layer, weight, place.bias if layer is place.layer else None, made, name)
        for layer, weight in place.holders
    ]
    return keys[0], made


def _start(
    place: Place,
    kind: AdapterKind,
    options: Mapping[str, Any],
    stored: torch.Tensor,
    rng: np.random.Generator,
    evidence: Evidence,
) -> Start:
    view = place.view
    weight = view.canonical(to_numpy(stored, place.name).astype(np.float64))
    offset = place.layer._parameters.get(place.bias) if place.bias else None
    bias = None if offset is None else view.bias_rows(to_numpy(offset).astype(np.float64))
    given: dict[str, np.ndarray] = {}
    for what, data in evidence.get(place.name, {}).items():
        given[what] = data if what in ("inputs", "energy") else view.canonical(np.asarray(data, dtype=np.float64))
    g = view.geometry(tuple(stored.shape))
    return Start(weight.reshape(g.shape) if weight.ndim > 1 else weight, bias, g, options, rng, given)
