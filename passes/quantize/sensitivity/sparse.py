"""Dense and sparse: few weights kept apart as they are, the rest quantized; how many in each layer follows the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ....graph.errors import ConfigError
from ....graph.ir import Graph
from ...base import Progress, no_progress
from ...gradients import Example, Loss
from ..numerics import QuantParams, weight_params
from ..spec import TensorFormat
from .integral import POINTS, post_quantization_integral
from .layers import Layer, layers

VALUE_BYTES = 2
"""Sparse values are float16."""


@dataclass
class DenseSparse:
    """One weight as integers plus a few elements of its own.

    Attributes:
        integers, params: of the dense part; elements that are kept apart are zero there.
        index: flat positions of the elements kept apart, ascending, int64.
        values: theirs, float16.
        outliers: how many of them were taken out before the scale was set; the others are significant ones.
    """

    integers: np.ndarray
    params: QuantParams
    index: np.ndarray
    values: np.ndarray
    outliers: int
    dense_bytes: float

    def numbers(self) -> np.ndarray:
        """What it stands for, float32."""
        w = self.params.dequantize(self.integers)
        w.reshape(-1)[self.index] = self.values.astype(np.float32)
        return w

    @property
    def index_bytes(self) -> int:
        """Bytes of one index: as many as the weight's size needs."""
        return 2 if self.integers.size <= 2**16 else 4

    @property
    def bytes(self) -> float:
        """Integers (packed), scales, values and indices."""
        return self.dense_bytes + len(self.index) * (VALUE_BYTES + self.index_bytes)


def split_dense_sparse(
    graph: Graph,
    form: TensorFormat,
    data: Sequence[Example],
    *,
    outliers: float = 0.005,
    significant: float = 0.005,
    steps: int = 4,
    loss: Loss = "cross_entropy",
    points: int = POINTS,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, DenseSparse]:
    """W = Q(dense) + outliers + significant, per weight name; shares are of all weights together.

    Outliers, largest in units of their scale group's standard deviation, are taken out first, so that the scales fit
    the rest. Significant ones are those whose rounding costs most by the post-quantization integral, taken out in
    ``steps`` rounds: after each the integral is taken anew with those already exact. One threshold over all layers
    makes the share of each layer follow its need. Source: "Identifying Sensitive Weights via Post-quantization
    Integral" (ReQuant).

    Cost: ``steps`` integrals of ``points`` forward and backward runs. Nothing is written into the graph; with
    ``graph.set_weight(graph.weight(name), split.numbers())`` it computes what the split stands for.

    Raises:
        ConfigError: a share is out of range. ConstraintError: there is no data.
    """
    if not 0 <= outliers < 0.5 or not 0 <= significant < 0.5 or steps < 1:
        raise ConfigError("shares lie in [0, 0.5)", node="split_dense_sparse", found=(outliers, significant, steps))
    found = layers(graph)
    whole = {x.weight.name: x.data() for x in found}
    size = sum(w.size for w in whole.values())
    apart = _outliers(found, whole, form, round(outliers * size))
    count = {n: int(mask.sum()) for n, mask in apart.items()}
    grids = {x.weight.name: _grid(x, whole[x.weight.name], apart[x.weight.name], form) for x in found}
    rounded = {n: grids[n].apply(np.where(apart[n], 0, w)) for n, w in whole.items()}
    wanted = round(significant * size)
    for step in range(steps if wanted else 0):
        now = {n: np.where(apart[n], w.astype(np.float16), rounded[n]).astype(np.float32) for n, w in whole.items()}
        made = post_quantization_integral(graph, now, data, loss, points=points, seed=seed, progress=progress)
        scores = {n: np.where(apart[n], 0.0, np.abs(e)) for n, e in made.elements.items()}
        share = wanted * (step + 1) // steps - wanted * step // steps
        apart = {n: apart[n] | mask for n, mask in _top(scores, share).items()}
    result = {}
    for layer in found:
        name, w = layer.weight.name, whole[layer.weight.name]
        index = np.flatnonzero(apart[name])
        integers = grids[name].quantize(np.where(apart[name], 0, w))
        values = w.reshape(-1)[index].astype(np.float16)
        result[name] = DenseSparse(integers, grids[name], index, values, count[name], layer.bytes(form))
    return result


def _grid(layer: Layer, w: np.ndarray, apart: np.ndarray, form: TensorFormat) -> QuantParams:
    return weight_params(np.where(apart, 0, w), layer.axis, form, in_axis=layer.in_axis)


def _outliers(
    found: list[Layer], whole: dict[str, np.ndarray], form: TensorFormat, count: int
) -> dict[str, np.ndarray]:
    """The largest elements, each measured by the deviation of those that share its scale."""
    scores = {}
    for layer in found:
        w = whole[layer.weight.name]
        if form.granularity == "tensor":
            spread = np.full_like(w, w.std())
        else:
            others = tuple(i for i in range(w.ndim) if i != layer.axis)
            spread = np.broadcast_to(w.std(axis=others, keepdims=True), w.shape)
        scores[layer.weight.name] = np.abs(w) / np.maximum(spread, 1e-30)
    return _top(scores, count)


def _top(scores: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Masks of the ``count`` largest positive scores over all arrays, ties by position."""
    masks = {n: np.zeros(s.shape, dtype=bool) for n, s in scores.items()}
    if not count:
        return masks
    every = np.concatenate([s.reshape(-1) for s in scores.values()])
    best = np.argsort(-every, kind="stable")[:count]
    best = np.sort(best[every[best] > 0])
    start = 0
    for name, s in scores.items():
        mine = best[(best >= start) & (best < start + s.size)] - start
        masks[name].reshape(-1)[mine] = True
        start += s.size
    return masks
