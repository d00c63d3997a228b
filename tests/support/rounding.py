"""Rounding jobs for tests: a graph, its placement, grids of any width, made the way Quantize makes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from foldline.backends import get
from foldline.graph.ir import Graph
from foldline.passes.quantize.numerics import grid, range_params
from foldline.passes.quantize.placement import place
from foldline.passes.quantize.ranges import weight_bounds
from foldline.passes.quantize.rounding import RoundingJob
from foldline.passes.quantize.rounding.simulate import Hooks, Simulation, use
from foldline.passes.quantize.spec import TensorFormat
from foldline.passes.recover.runner import bound


def job(
    graph: Graph,
    batches: list[Any],
    method: str = "nearest",
    *,
    weight_bits: int = 4,
    activation_bits: int = 8,
    form: TensorFormat | None = None,
    target: str = "inductor-cpu",
    **options: Any,
) -> RoundingJob:
    """A job with min-max ranges; ``form`` overrides the weights' format."""
    spec = get(target).spec
    placement = place(graph, spec, set())
    low, high = -(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1) - 1
    wide = form or TensorFormat("int8", symmetric=True, granularity="out_channel", range=(low, high))
    narrow = TensorFormat("uint8", range=(0, 2**activation_bits - 1))
    seen: dict[str, list[np.ndarray]] = {name: [] for name in placement.points}
    for batch in bound(graph, batches):
        for name, x in graph.run(batch, list(seen))[1].items():
            seen[name].append(np.asarray(x.detach() if isinstance(x, torch.Tensor) else x))
    ranges = {name: (min(x.min() for x in xs), max(x.max() for x in xs)) for name, xs in seen.items()}
    params = {}
    for name, point in placement.points.items():
        tied = [ranges[other] for other, p in placement.points.items() if p.root == point.root]
        params[name] = range_params(float(min(r[0] for r in tied)), float(max(r[1] for r in tied)), narrow)
    weight_params = {}
    for site in placement.weights:
        site.form = wide
        least, most, along = weight_bounds(site.weight.numpy(), wide, site.axis, site.in_axis, "minmax")
        weight_params[site.node.name] = grid(least, most, wide, along, wide.block)
    return RoundingJob(graph, placement, params, weight_params, spec, batches, method, options)


def outputs(job: RoundingJob, found: dict[str, Any], batch: Any) -> tuple[np.ndarray, np.ndarray]:
    """The first output of the float network and of the quantized one that a result stands for."""
    params = dict(job.params)
    for rounded in found.values():
        params |= rounded.points
    sim = Simulation(replace(job, params=params))
    hooks = Hooks({}, {}, sim.quantizers(sim.activations))
    for site in sim.sites.values():
        use(hooks, site, found[site.name])
    results = []
    with torch.no_grad():
        for h in (None, hooks):
            env = sim.envs(bound(sim.graph, [batch]))[0]
            sim.execute(range(sim.length), env, h)
            results.append(sim.value(sim.graph.outputs[0], env).numpy())
    return results[0], results[1]


def mse(job: RoundingJob, found: dict[str, Any], batch: Any) -> float:
    """Squared error of the quantized output relative to the float one's power."""
    f, q = outputs(job, found, batch)
    return float(np.square(f - q).sum() / np.square(f).sum())
