"""The loss of each layer at each width, by the method asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ....graph.execute import run_graph
from ....graph.ir import Graph
from ...base import Progress
from ..numerics import range_params, weight_params
from ..placement import Placement, WeightSite
from ..spec import TensorFormat

if TYPE_CHECKING:
    from ..sensitivity.measured import Trial

Method = Literal["sqnr", "kl", "pqi", "fisher", "weights"]
Losses = dict[str, dict[int, float]]


def rounded(site: WeightSite, form: TensorFormat) -> np.ndarray:
    """The site's weight rounded to the nearest points of its grid, float32."""
    weight = site.weight.numpy().astype(np.float32, copy=False)
    return weight_params(weight, site.axis, form, in_axis=site.in_axis).apply(weight)


def losses_of_weights(
    graph: Graph,
    sites: Sequence[WeightSite],
    forms: Mapping[str, Mapping[int, TensorFormat]],
    batches: list[Any],
    method: Method,
    seed: int,
    progress: Progress,
) -> Losses:
    """{node of the site: {bits: loss}}; see :class:`~.mixed.MixedPrecision` for the methods.

    No labels are needed: "pqi" integrates the KL divergence from the float model's own output distribution along the
    path on which all layers go to the same width together; "fisher" squares gradients of -log p of a class drawn from
    that distribution.
    """
    if method in ("sqnr", "kl"):
        from ..sensitivity.measured import measure

        return measure(graph, weight_trials(sites, forms), batches, method, progress)  # type: ignore[arg-type]
    if method == "weights":
        return {s.node.name: {b: _relative(s, f) for b, f in forms[s.node.name].items()} for s in sites}
    return _by_gradients(graph, sites, forms, batches, method, seed, progress)


def _relative(site: WeightSite, form: TensorFormat) -> float:
    weight = site.weight.numpy().astype(np.float64)
    return float(np.square(rounded(site, form) - weight).sum() / max(np.square(weight).sum(), 1e-300))


def _by_gradients(
    graph: Graph,
    sites: Sequence[WeightSite],
    forms: Mapping[str, Mapping[int, TensorFormat]],
    batches: list[Any],
    method: Method,
    seed: int,
    progress: Progress,
) -> Losses:
    from ...gradients import Example, examples
    from ..sensitivity.integral import local_scores, post_quantization_integral

    data = list(examples(graph, None, batches))
    if method == "pqi":
        data = [Example(e.inputs, _distribution(graph, e.inputs)) for e in data]
    found: Losses = {s.node.name: {} for s in sites}
    for bits in sorted({b for widths in forms.values() for b in widths}):
        mine = [s for s in sites if bits in forms[s.node.name]]
        changed = {s.weight.name: rounded(s, forms[s.node.name][bits]) for s in mine}
        if method == "fisher":
            scores = local_scores(graph, changed, data, seed=seed)[1]
        else:
            scores = post_quantization_integral(graph, changed, data, seed=seed, progress=progress).elements
        for site in mine:
            found[site.node.name][bits] = max(float(scores[site.weight.name].sum()), 0.0)
    return found


def _distribution(graph: Graph, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Softmax of the first output over its class axis (the last of three, else axis 1)."""
    logits = run_graph(graph, inputs)[0][0].astype(np.float64)
    axis = 2 if logits.ndim == 3 else 1
    p = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return np.asarray(p / p.sum(axis=axis, keepdims=True), dtype=np.float32)


def losses_of_points(
    graph: Graph,
    placement: Placement,
    forms: Mapping[str, Mapping[int, TensorFormat]],
    batches: list[Any],
    metric: Literal["sqnr", "kl"],
    progress: Progress,
) -> Losses:
    """{root: {bits: loss}}, summed over the points that share the root's scale; ranges are each batch's extremes."""
    if not forms:
        return {}
    from ..sensitivity.measured import measure

    return summed(placement, forms, measure(graph, point_trials(placement, forms), batches, metric, progress))


def weight_trials(sites: Sequence[WeightSite], forms: Mapping[str, Mapping[int, TensorFormat]]) -> list[Trial]:
    """The sites' weights, by node name, rounded to each width."""
    from ..sensitivity.measured import Trial

    trials = []
    for site in sites:
        value = site.weight.value
        assert value is not None

        def change(bits: int, weight: np.ndarray, site: WeightSite = site) -> np.ndarray:
            return rounded(site, forms[site.node.name][bits]).astype(weight.dtype, copy=False)

        trials.append(Trial(site.node.name, value, tuple(forms[site.node.name]), change))
    return trials


def point_trials(placement: Placement, forms: Mapping[str, Mapping[int, TensorFormat]]) -> list[Trial]:
    """The points, by name, whose root has ``forms``; ranges are each batch's extremes."""
    from ..sensitivity.measured import Trial

    trials = []
    for name, point in placement.points.items():
        widths = forms.get(point.root)
        if widths is None:
            continue

        def change(bits: int, x: np.ndarray, widths: Mapping[int, TensorFormat] = widths) -> np.ndarray:
            return range_params(float(x.min()), float(x.max()), widths[bits]).apply(x)

        trials.append(Trial(name, point.value, tuple(widths), change))
    return trials


def summed(placement: Placement, forms: Mapping[str, Mapping[int, TensorFormat]], losses: Losses) -> Losses:
    """Losses by point as losses by root."""
    found: Losses = {root: {} for root in forms}
    for name, widths in losses.items():
        mine = found[placement.points[name].root]
        for bits, loss in widths.items():
            mine[bits] = mine.get(bits, 0.0) + loss
    return found
