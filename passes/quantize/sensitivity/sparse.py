"""Dense and sparse: few weights kept apart as they are, the rest quantized; how many in each layer follows the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ....graph.errors import ConfigError, ConstraintError
from ....graph.ir import Graph
from ...base import Progress, no_progress
from ...gradients import Example, Loss
from ..numerics import QuantParams, weight_params
from ..spec import TensorFormat
from .integral import POINTS, post_quantization_integral
from .layers import Layer, layers

if TYPE_CHECKING:
    from ..archive import Archive

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

    Cost: ``steps`` integrals of ``points`` forward and backward runs. Nothing is written into the graph;
    :func:`store_dense_sparse` makes a file of the result and a graph that computes what it stands for.

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


def store_dense_sparse(graph: Graph, split: Mapping[str, DenseSparse]) -> Archive:
    """Put what the split stands for into the graph's weights, and everything that it stores into an archive.

    In the archive a split weight is its integers, entropy-coded, their scales, and positions and float16 values of the
    elements apart (codec ``sparse``); other weights are stored as they are. ``read_archive(file).tensors()`` gives the
    graph's weights back, bit for bit. No runtime at hand multiplies with such a pair: ONNX Runtime has no sparse
    operand for MatMul or Conv on the CPU, and a dense part with a ScatterND behind it is folded into a float weight
    when the file is loaded, so that a graph of these operators would be no smaller in memory. The archive is therefore
    the form in which the split saves bytes; the graph stays one of float weights.

    Raises:
        ConstraintError: a weight is split in blocks (a step per output channel or in all can be stored).
    """
    from ..archive import Archive

    archive = Archive()
    for name, made in split.items():
        if made.params.block or np.ndim(made.params.scale) > 1:
            raise ConstraintError(
                "a weight with a scale per block cannot be stored as dense and sparse", value=name,
                expected="granularity tensor or out_channel", found=f"blocks of {made.params.block}",
            )  # fmt: skip
        graph.set_weight(graph.weight(name), made.numbers())
    for name, weight in graph.weights.items():
        data = weight.numpy()
        if name not in split:
            archive.add_raw(name, data)
            continue
        made = split[name]
        axis = 0 if made.params.axis is None else made.params.axis
        shape = [-1 if i == axis else 1 for i in range(data.ndim)]
        zero = np.asarray(made.params.zero_point).astype(np.int64).reshape(shape)
        integers = made.integers.astype(np.int64) - zero
        archive.add_sparse(name, data, integers, made.params.scale, axis, made.index, made.values)
    return archive


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
