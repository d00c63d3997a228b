"""What initialisations look at: gradients and first updates of chosen weights, singular vectors of layers' inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ...graph.errors import ConfigError, ConstraintError
from ...graph.fx.tensors import from_numpy, to_numpy
from ...graph.fx.trace import normalize_call
from ..allocate import Level, allocate
from .places import TRANSPOSED, Place

OVERSAMPLING = 32
"""Directions kept beyond four times the rank, so that truncating the stream hardly turns the leading ones."""


class IncrementalSVD:
    """Leading right singular vectors of a stream of rows, in bounded memory.

    Each update decomposes what is kept on top of the new rows ("Incremental learning for robust visual tracking"'s
    sequential Karhunen-Loeve update without a mean). Exact while no more than ``keep`` directions have been seen.

    Attributes:
        values: singular values, descending; vectors: [keep, columns], rows orthonormal; total: sum of squares seen.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.count = 0
        self.total = 0.0
        self.values = np.zeros(0)
        self.vectors: np.ndarray | None = None

    def update(self, x: np.ndarray) -> None:
        """Take rows [n, columns]."""
        x = np.asarray(x, dtype=np.float64)
        self.count += len(x)
        self.total += float((x * x).sum())
        if len(x) > x.shape[1]:
            x = np.asarray(np.linalg.qr(x, mode="r"))
        known = [] if self.vectors is None else [self.values[:, None] * self.vectors]
        _, s, vt = np.linalg.svd(np.concatenate([*known, x]), full_matrices=False)
        self.values, self.vectors = s[: self.keep], vt[: self.keep]

    def energy(self) -> np.ndarray:
        """Share of the sum of squares that each direction explains."""
        return self.values**2 / self.total if self.total else np.zeros_like(self.values)


def gather(
    model: nn.Module,
    places: Sequence[Place],
    what: str,
    batches: Sequence[Any],
    loss: Callable[[Any, Any], Any] | None,
    step: float,
) -> dict[str, dict[str, np.ndarray]]:
    """Evidence by target name: ``"gradient"``, ``"update"`` (both stored layout) or ``"inputs"`` with ``"energy"``.

    The model runs in eval mode and is left as it was.

    Raises:
        ConfigError: no batches, or no loss where gradients are asked for.
        ConstraintError: the inputs of such a layer cannot be gathered.
    """
    if not batches:
        raise ConfigError("the calibration data is empty", node="calibration", expected="at least one batch")
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        if what == "inputs":
            return _inputs(model, places, batches)
        if loss is None:
            raise ConfigError("this initialisation needs a loss", node="loss", expected="a function (output, batch)")
        gradients = _gradients(model, places, batches, loss)
    finally:
        for m, flag in modes:
            m.training = flag
    if what == "gradient":
        return {name: {"gradient": g} for name, g in gradients.items()}
    # The first step of AdamW: its momenta are the gradient and its square, so that only the sign is left.
    return {name: {"update": -step * np.sign(g)} for name, g in gradients.items()}


def _call(model: nn.Module, batch: Any) -> Any:
    args, kwargs = normalize_call(batch)
    args, kwargs = pytree.tree_map_only(np.ndarray, from_numpy, (args, kwargs))
    return model(*args, **kwargs)


def _gradients(
    model: nn.Module, places: Sequence[Place], batches: Sequence[Any], loss: Callable[[Any, Any], Any]
) -> dict[str, np.ndarray]:
    """Mean gradient of the loss over the batches, by target name, float64."""
    wanted = {place.name: place.layer._parameters[place.weight] for place in places}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    sums: dict[str, np.ndarray] = {}
    try:
        for p in model.parameters():
            p.requires_grad_(False)
        for w in wanted.values():
            assert w is not None
            w.requires_grad_(True)
        names, leaves = list(wanted), [w for w in wanted.values() if w is not None]
        for batch in batches:
            with torch.enable_grad():
                value = loss(_call(model, batch), batch)
            for name, g in zip(names, torch.autograd.grad(value, leaves, allow_unused=True), strict=True):
                if g is None:
                    raise ConstraintError("the loss does not depend on this weight", node=name)
                sums[name] = sums.get(name, 0.0) + to_numpy(g).astype(np.float64) / len(batches)
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    return sums


def _inputs(model: nn.Module, places: Sequence[Place], batches: Sequence[Any]) -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, IncrementalSVD] = {}
    handles = []
    for place in places:
        rank = int(place.options.get("rank", 8))
        svd = found[place.name] = IncrementalSVD(4 * rank + OVERSAMPLING)
        handles.append(place.layer.register_forward_pre_hook(_watch(place, svd), with_kwargs=True))
    try:
        with torch.no_grad():
            for batch in batches:
                _call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name, svd in found.items() if svd.vectors is None]
    if missing:
        raise ConstraintError(
            "no input of this layer was seen", node=missing[0], hint="it is not called as a module: exclude it"
        )
    return {name: {"inputs": _vectors(svd), "energy": svd.energy()} for name, svd in found.items()}


def _vectors(svd: IncrementalSVD) -> np.ndarray:
    assert svd.vectors is not None
    return svd.vectors


def _watch(place: Place, svd: IncrementalSVD) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        svd.update(to_numpy(rows_of_input(layer, x, place)))

    return hook


def rows_of_input(layer: nn.Module, x: torch.Tensor, place: Place) -> torch.Tensor:
    """What the layer's weight as a matrix multiplies, as rows [n, in * kernel].

    Raises:
        ConstraintError: a layer whose input is no such matrix (transposed or grouped convolution, embedding).
    """
    weight = layer._parameters[place.weight]
    assert weight is not None
    g = place.view.geometry(tuple(weight.shape))
    if isinstance(layer, nn.Conv2d) and layer.groups == 1 and not isinstance(layer.padding, str):
        patches = F.unfold(x.float(), layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return patches.transpose(1, 2).reshape(-1, g.columns)
    if g.kernel or isinstance(layer, (nn.Embedding, *TRANSPOSED)) or not x.is_floating_point():
        raise ConstraintError(
            "the inputs of this layer have no singular vectors that fit its weight",
            node=place.name,
            expected="a linear layer or an ungrouped 2-d convolution",
            found=type(layer).__name__,
            hint="leave it out of targets",
        )
    return x.float().reshape(-1, g.columns)


def allocate_ranks(places: Sequence[Place], evidence: Mapping[str, Mapping[str, np.ndarray]], rank: int) -> list[Place]:
    """The places with ranks that explain the most of their inputs' variance for ``rank * len(places)`` in sum.

    Places that get no rank are left out.
    """
    items = {}
    for place in places:
        energy = np.asarray(evidence[place.name]["energy"])
        kept = np.concatenate([[0.0], np.cumsum(energy)])
        items[place.name] = [Level(k, 1 - float(kept[k])) for k in range(len(kept))]
    chosen = allocate(items, rank * len(places)).levels
    return [replace(p, options={**p.options, "rank": chosen[p.name]}) for p in places if chosen[p.name]]
