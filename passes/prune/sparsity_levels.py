"""How many zeros each weight gets: uniform, ERK, LAMP, or by the measured distortion of the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...graph.errors import ConfigError
from ...graph.ir import Graph
from ..allocate import Level, Method, allocate
from ..base import Progress, no_progress
from .levels import Outputs

SPARSITIES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.96)
"""Levels measured around the whole network."""
STEP = 1.25
"""Factor between neighbouring densities around a reference, at first."""

Densities = Mapping[str, float]
"""Weight name -> share of its elements that stay."""


def weight_levels(
    graph: Graph, candidates: Mapping[str, Sequence[float]], outputs: Outputs, around: Densities | None = None
) -> dict[str, list[Level]]:
    """Per weight and density (elements kept, distortion) for :func:`~foldline.passes.allocate.allocate`.

    Only this weight is thinned to the density, by magnitude; the others are whole, or as in ``around``, and then the
    loss is the change against that. ("Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural
    Networks" measures around the whole network.)
    """
    reference = dict(around or {})
    base = outputs.distortion(thinned(graph, reference)) if reference else 0.0
    found: dict[str, list[Level]] = {}
    for name, densities in candidates.items():
        size, now = graph.weight(name).size, reference.get(name, 1.0)
        found[name] = [
            Level(
                float(round(d * size)),
                0.0 if d == now else outputs.distortion(thinned(graph, {**reference, name: d})) - base,
            )
            for d in densities
        ]
    return found


def allocate_sparsity(
    graph: Graph,
    names: Sequence[str],
    sparsity: float,
    outputs: Outputs,
    *,
    stages: int = 1,
    method: Method = "dp",
    progress: Progress = no_progress,
) -> dict[str, float]:
    """The density of each named weight under which all together have the share ``sparsity`` of zeros.

    One stage is the paper's method: distortions of single weights, measured around the whole network. Beyond about two
    thirds of zeros they no longer tell the joint distortion. Further stages start from the best, by joint distortion,
    of that allocation and the rules (:func:`uniform`, :func:`erk`, :func:`lamp`), measure densities around it, allocate
    anew, and keep what lowers the joint distortion; so on these inputs the result is no worse than any of them.

    Raises:
        ConfigError: the sparsity is not in (0, 1).
    """
    if not 0 < sparsity < 1:
        raise ConfigError("a sparsity lies between 0 and 1", node="sparsity", found=sparsity)
    sizes = {n: graph.weight(n).size for n in names}
    budget = (1 - sparsity) * sum(sizes.values())
    whole = {n: [1 - s for s in SPARSITIES if round((1 - s) * sizes[n])] for n in names}
    best = _allocated(graph, whole, outputs, None, budget, method)
    if stages == 1:
        return best
    starts = [best, *(rule(graph, names, sparsity) for rule in (uniform, erk, lamp))]
    losses = [outputs.distortion(thinned(graph, d)) for d in starts]
    best, least, step = starts[int(np.argmin(losses))], min(losses), STEP
    for _ in progress(range(stages - 1), "allocating sparsity"):
        near = {n: _near(d, step, sizes[n]) for n, d in best.items()}
        found = _allocated(graph, near, outputs, best, budget, method)
        loss = outputs.distortion(thinned(graph, found))
        if loss < least:
            best, least = found, loss
        else:
            step = step**0.5
    return best


def _near(density: float, step: float, size: int) -> list[float]:
    around = {min(density * step**k, 1.0) for k in (-2, -1, 0, 1, 2)}
    return sorted({round(d * size) / size for d in around if round(d * size)} | {density})


def _allocated(
    graph: Graph,
    candidates: Mapping[str, Sequence[float]],
    outputs: Outputs,
    around: Densities | None,
    budget: float,
    method: Method,
) -> dict[str, float]:
    levels = weight_levels(graph, candidates, outputs, around)
    least = sum(min(x.single for x in v) for v in levels.values())
    found = allocate(levels, max(budget, least), method=method)
    return {n: candidates[n][i] for n, i in found.levels.items()}


# ---- rules that look at shapes and weights alone -------------------------------------------------------------------
def uniform(graph: Graph, names: Sequence[str], sparsity: float) -> dict[str, float]:
    """The same density everywhere."""
    return dict.fromkeys(names, 1 - sparsity)


def erk(graph: Graph, names: Sequence[str], sparsity: float) -> dict[str, float]:
    """Erdos-Renyi-kernel: density in proportion to sum(dims) / prod(dims), at most 1, of the right total ("Rigging the
    Lottery: Making All Tickets Winners")."""
    shapes = {n: graph.weight(n).shape for n in names}
    sizes = {n: float(np.prod(s)) for n, s in shapes.items()}
    budget = (1 - sparsity) * sum(sizes.values())
    dense: set[str] = set()
    while True:
        raw = {n: sum(shapes[n]) / sizes[n] for n in names if n not in dense}
        scale = (budget - sum(sizes[n] for n in dense)) / sum(r * sizes[n] for n, r in raw.items())
        over = {n for n, r in raw.items() if scale * r > 1}
        if not over:
            return {n: 1.0 if n in dense else scale * raw[n] for n in names}
        dense |= over


def lamp(graph: Graph, names: Sequence[str], sparsity: float) -> dict[str, float]:
    """One bar for all squared weights over the sum of those of their layer that are not smaller ("Layer-adaptive
    Sparsity for the Magnitude-based Pruning")."""
    scores = {}
    for n in names:
        squares = np.sort(graph.weight(n).numpy().astype(np.float64).ravel() ** 2)
        scores[n] = squares / np.maximum(np.cumsum(squares[::-1])[::-1], 1e-300)
    every = np.sort(np.concatenate(list(scores.values())))
    bar = every[min(round(sparsity * len(every)), len(every) - 1)]
    return {n: float((s >= bar).mean()) for n, s in scores.items()}


def thinned(graph: Graph, densities: Densities) -> Graph:
    """A clone in which each named weight keeps that share of its elements, the largest; the others are zero."""
    clone = graph.clone()
    for name, density in densities.items():
        w = clone.weight(name)
        data = w.numpy().copy()
        flat = data.reshape(-1)
        order = np.argsort(np.abs(flat), kind="stable")
        flat[order[: len(flat) - round(density * len(flat))]] = 0
        clone.set_weight(w, data)
    return clone
