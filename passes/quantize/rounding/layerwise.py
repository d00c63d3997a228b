"""Layer by layer: every layer's squared output error as a quadratic in its weight, solved by GPTQ or by gradients.

The error over all calibration rows depends on them through moments alone, |Y - X W^T|^2 = tr (W - W*) H (W - W*)^T +
constant with H = X^T X and W* the least-squares weight: no step looks at the data again, whatever their number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...recover.layers import LinearOp, linear_op
from ...recover.runner import bound
from ...recover.solve import Normal, solve
from ..numerics import QuantParams
from .gptq import MatrixGrid, Quadratic, descend, gptq, scale_factor
from .grid import Grid, is_integer
from .job import Rounded, RoundingJob
from .matrix import full, moments, rows, unrows
from .nearest import nearest
from .options import GPTQOptions, LayerOptions, LearnedOptions, options
from .regions import Region, layers
from .simulate import Env, Hooks, Simulation, Site, checked, tensor, use
from .variables import variable

PER_COLUMN = 8
"""Rows drawn at least per column of a Hessian, where there are so many."""


@dataclass
class Layer:
    """One layer to be rounded, with what its inputs and wanted outputs say."""

    site: Site
    op: LinearOp
    grid: Grid
    weight: Tensor
    bias: Tensor | None
    normal: Normal
    problem: Quadratic
    centred: bool

    def matrix_grid(self, scale: Tensor | None = None) -> MatrixGrid:
        shape = tuple(self.weight.shape)
        s = self.grid.scale if scale is None else scale
        alpha = self.op.node.attrs.get("alpha", 1.0) if self.op.node.op == "linear" else 1.0
        return MatrixGrid(
            full(self.op, s * alpha, shape).contiguous(), full(self.op, self.grid.zero, shape).contiguous(),
            self.grid.low, self.grid.high,
        )  # fmt: skip

    def shift(self, w: Tensor) -> Tensor:
        """What the bias must become for the mean output to be right, [G * O]."""
        n = max(self.normal.rows, 1)
        drift = (self.normal.y - (w.double() @ self.normal.x[:, :, None])[:, :, 0]) / n
        assert self.bias is not None
        return self.bias + drift.reshape(-1).float()

    def error(self, w: Tensor) -> float:
        """Mean squared output error relative to the wanted outputs' power (variance, with a bias to take up means)."""
        xx, xy, yy = self.normal.moments(self.centred)
        d = w.double()
        found = yy.sum() - 2 * (xy.transpose(1, 2) * d).sum() + ((d @ xx) * d).sum()
        return max(float(found), 0.0) / (float(yy.sum()) or 1.0)


Solver = Callable[[Layer], tuple[Tensor, Tensor, dict[str, Any]]]
"""(stored integers, spread scale, facts) of a layer, both of the weight's shape."""


def walk_layers(job: RoundingJob, chosen: LayerOptions, solver: Solver, label: str) -> dict[str, Rounded]:
    """Round every site in execution order, each on what the quantized network before it gives.

    Memory: the live values of both networks for the samples used, and one layer's moments.
    """
    sim = Simulation(job)
    checked(sim, job.batches, job.method)
    fed = first_samples(bound(sim.graph, job.batches), chosen.samples)
    hooks = Hooks({}, {}, sim.quantizers(sim.activations))
    floats, quants = sim.envs(fed), sim.envs(fed)
    walk, found = LayerWalk(sim, chosen, solver), {}
    with torch.no_grad():
        for region in job.progress(layers(sim), label):
            found.update(walk.region(region, floats, quants, hooks))
            for env in (*floats, *quants):
                for i in region.calls:
                    for key in sim.runner.dead(i):
                        env.pop(key, None)
    return {name: found[name] for name in (s.node.name for s in job.placement.weights)}


class LayerWalk:
    """Goes through a region with both networks and rounds the sites that it meets."""

    def __init__(self, sim: Simulation, chosen: LayerOptions, solver: Solver | None = None) -> None:
        self.sim, self.chosen = sim, chosen
        assert solver is not None or isinstance(chosen, GPTQOptions)
        self.solver = solve_gptq(chosen) if solver is None else solver  # type: ignore[arg-type]
        self._tied: dict[str, tuple[QuantParams, Rounded]] = {}

    def region(self, region: Region, floats: list[Env], quants: list[Env], hooks: Hooks) -> dict[str, Rounded]:
        """Both lists of environments hold all values of the region afterwards; ``hooks`` gets the sites' results."""
        found: dict[str, Rounded] = {}
        done = region.first
        for site in sorted((self.sim.sites[name] for name in region.sites), key=lambda s: s.position):
            for env in floats:
                self.sim.execute(range(done, site.position + 1), env)
            for env in quants:
                self.sim.execute(range(done, site.position), env, hooks)
            found[site.name] = self._rounded(site, floats, quants)
            use(hooks, site, found[site.name])
            for env in quants:
                self.sim.execute(range(site.position, site.position + 1), env, hooks)
            done = site.position + 1
        for env in floats:
            self.sim.execute(range(done, region.last), env)
        for env in quants:
            self.sim.execute(range(done, region.last), env, hooks)
        return found

    def _rounded(self, site: Site, floats: list[Env], quants: list[Env]) -> Rounded:
        """A weight that several sites read is rounded once, for the first of them, and stored once."""
        params = self.sim.job.weight_params[site.name]
        first = self._tied.get(site.weight.name)
        if first is not None and first[0].scale.tobytes() == params.scale.tobytes():
            return replace(first[1], bias=None, details={"tied": True})
        found = _solved(self.sim, site, self.chosen, self.solver, floats, quants)
        self._tied[site.weight.name] = (params, found)
        return found


def _solved(
    sim: Simulation, site: Site, chosen: LayerOptions, solver: Solver, floats: list[Any], quants: list[Any]
) -> Rounded:
    params = sim.job.weight_params[site.name]
    op = linear_op(site.node, shared=True)
    problem = op if isinstance(op, str) else None if is_integer(params) else f"{params.dtype} is no grid of integers"
    if problem is not None:
        weight = site.weight.numpy().astype(np.float32, copy=False)
        return Rounded(nearest(weight, params), params, details={"rounding": "nearest", "reason": problem})
    assert isinstance(op, LinearOp)
    layer = _layer(sim, site, op, chosen, floats, quants)
    q, scale, facts = solver(layer)
    grid = layer.grid
    # The integers were chosen for float32 scales; stored ones may be coarser.
    new = grid.params if scale is grid.scale else grid.rescaled(scale)
    stored = grid.stored(q)
    w = rows(op, torch.from_numpy(np.array(new.dequantize(stored), np.float32)))
    plain = grid.integers(layer.weight)
    before, after = layer.error(rows(op, grid.real(plain))), layer.error(w)
    if not after <= before:
        w, stored, new, after = rows(op, grid.real(plain)), grid.stored(plain), grid.params, before
    facts = {"mse_nearest": before, "mse": after, "rows": layer.normal.rows, **facts}
    bias = layer.shift(w).numpy() if layer.centred else None
    return Rounded(stored, new, bias, details=facts)


def _layer(
    sim: Simulation, site: Site, op: LinearOp, chosen: LayerOptions, floats: list[Any], quants: list[Any]
) -> Layer:
    weight = tensor(site.weight)
    grid = Grid.of(sim.job.weight_params[site.name], tuple(weight.shape))
    bias = None if site.bias is None else tensor(site.bias).reshape(-1)
    centred = chosen.bias and bias is not None
    inputs = [sim.value(op.data, env) for env in quants]
    if chosen.inputs == "float":
        own = sim.activations.get(site.source.x.name, lambda x: x)
        inputs = [own(sim.value(op.data, env)) for env in floats]
    wanted = [sim.value(site.node.output, env) for env in floats]
    matrix = rows(op, weight).double()
    # A bias that is added by a later node is no part of this node's output.
    inside = bias if site.bias_position == site.position else None
    limit = max(chosen.rows, PER_COLUMN * matrix.shape[2])
    folds = moments(op, inputs, wanted, inside, limit, sim.job.seed)
    normal = folds[0] + folds[1]
    xx, _, _ = normal.moments(centred)
    target = matrix
    if chosen.asymmetry:
        # What the layer should be on these inputs, as far as one half of the samples tells about the other.
        target = matrix + chosen.asymmetry * (solve(folds, matrix, "auto", centred).matrix - matrix)
    return Layer(site, op, grid, weight, bias, normal, Quadratic(xx, target), centred)


def first_samples(batches: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """Whole batches from the first on, as long as they hold no more than ``limit`` samples; one at least."""
    found: list[dict[str, Any]] = []
    count = 0
    for batch in batches:
        sizes = [a.shape[0] for a in batch.values() if getattr(a, "ndim", 0)]
        count += max(sizes, default=1)
        if found and count > limit:
            break
        found.append(batch)
    return found


SHRINKS = tuple(1.0 - 0.03 * i for i in range(24))
"""Factors tried for a searched weight scale."""


def searched_scale(layer: Layer) -> Tensor:
    """Spread scale such that rounding to nearest loses least, inputs weighted by their mean square."""
    power = layer.problem.hessian.diagonal(dim1=1, dim2=2).float()[:, None, :].clamp_min(1e-12)
    importance = unrows(layer.op, power.expand(layer.problem.target.shape), tuple(layer.weight.shape))
    w = unrows(layer.op, layer.problem.target.float(), tuple(layer.weight.shape))
    grid, best = layer.grid, layer.grid.scale.clone()
    least: Tensor | None = None
    for shrink in SHRINKS:
        scale = grid.scale * shrink
        error = (grid.real(grid.integers(w, scale), scale) - w).square() * importance
        loss = grid.reduce(error)
        if least is None:
            least = loss
            continue
        better = loss < least
        best, least = torch.where(better, scale, best), torch.minimum(loss, least)
    return best


def solve_gptq(chosen: GPTQOptions | LearnedOptions) -> Solver:
    """GPTQ, coordinate descent, and scales refitted in between."""
    sweeps = chosen.sweeps if isinstance(chosen, GPTQOptions) else 3
    order = chosen.act_order if isinstance(chosen, GPTQOptions) else True
    columns = chosen.columns if isinstance(chosen, GPTQOptions) else 128

    def solver(layer: Layer) -> tuple[Tensor, Tensor, dict[str, Any]]:
        shape = tuple(layer.weight.shape)
        scale = searched_scale(layer) if chosen.scales == "search" else layer.grid.scale
        for turn in range(2 if chosen.scales == "search" and per_channel(layer) else 1):
            grid = layer.matrix_grid(scale)
            if turn == 0:
                q = gptq(layer.problem, grid, act_order=order, columns=columns, damping=chosen.damping)
            q = descend(layer.problem, grid, q, sweeps)
            if chosen.scales == "search" and per_channel(layer):
                factor = scale_factor(layer.problem, grid, q).clamp(0.7, 1.4)
                wide = factor[..., None].expand(q.shape)
                moved = scale * unrows(layer.op, wide, shape)
                scale = layer.grid.reduce(moved) / layer.grid.reduce(torch.ones(shape))
        return unrows(layer.op, q, shape), scale, {}

    return solver


def per_channel(layer: Layer) -> bool:
    """Whether every output channel has one scale of its own."""
    p = layer.grid.params
    return p.axis is not None and not p.block and p.axis % layer.weight.dim() == layer.site.source.axis


def solve_learned(kind: str, chosen: LearnedOptions, seed: int) -> Solver:
    """Gradient descent on the quadratic with one of the method's variables."""

    def solver(layer: Layer) -> tuple[Tensor, Tensor, dict[str, Any]]:
        base, start = layer.grid, None
        if chosen.start == "gptq" and kind in ("adaround", "adaquant"):
            q, scale, _ = solve_gptq(chosen)(layer)
            start = q
        else:
            scale = searched_scale(layer) if chosen.scales == "search" else base.scale
        grid = Grid(base.params, base.shape, scale, base.zero, base.low, base.high)
        v = variable(kind, layer.weight, grid, start, chosen.scales == "search", chosen.rank, seed)
        initial = v.integers()
        hessian, target = layer.problem.hessian.float(), layer.problem.target.float()
        unit = float(layer.problem.error(rows(layer.op, v.hard()).double()).sum()) or 1.0
        with torch.enable_grad():
            optimizer = torch.optim.Adam(v.groups(chosen.rate))
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(chosen.steps, 1))
            for step in range(chosen.steps):
                d = rows(layer.op, v.soft()) - target
                loss = ((d @ hessian) * d).sum() / unit
                extra = v.penalty(step / chosen.steps)
                optimizer.zero_grad()
                (loss if extra is None else loss + extra).backward()
                optimizer.step()
                schedule.step()
        q, scale = v.integers(), v.scale.detach()
        if float(layer.problem.error(rows(layer.op, v.hard()).double()).sum()) > unit:
            q, scale = initial, grid.scale  # never worse than where it began
        moved = int((q != initial).sum())
        return q, scale if v.learn_scale or scale is not base.scale else base.scale, {
            "learned": v.count(), "moved": moved,
        }  # fmt: skip

    return solver


def round_gptq(job: RoundingJob) -> dict[str, Rounded]:
    """GPTQ on every layer."""
    chosen = options(GPTQOptions, job.options, job.method)
    return walk_layers(job, chosen, solve_gptq(chosen), "rounding (gptq)")


def round_learned(job: RoundingJob) -> dict[str, Rounded]:
    """AdaRound, AdaQuant, FlexRound or LRQ on every layer, as the job's method says."""
    chosen = options(LearnedOptions, job.options, job.method)
    return walk_layers(job, chosen, solve_learned(job.method, chosen, job.seed), f"rounding ({job.method})")
