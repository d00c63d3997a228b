"""Affine maps of a whole block learned together, by the squared error of the block's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .affine import near_square
from .boundary import Boundary
from .common import Scaler, Site
from .flat import Flat, FlatTransform
from .grids import Formats
from .hadamard import random_orthogonal
from .network import Env, Network

if TYPE_CHECKING:
    from torch import Tensor

CHECKED = 4
"""Batches on which the steps are compared."""


@dataclass(eq=False)
class _Map:
    """What is learned at one boundary."""

    left: Tensor
    right: Tensor
    log: Tensor
    where: Tensor

    @property
    def variables(self) -> list[Tensor]:
        return [v for v in (self.left, self.right, self.log) if v.requires_grad]

    def state(self) -> list[Tensor]:
        return [v.detach().clone() for v in (self.left, self.right, self.log)]

    def condition(self) -> float:
        return float(torch.linalg.cond(self.left.detach()) * torch.linalg.cond(self.right.detach()))

    def turn(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        left, right, s = self.left, self.right, self.log.exp()[self.where]
        back_left, back_right = torch.linalg.inv(left), torch.linalg.inv(right)

        def apply(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            cube = (x / s).reshape(*x.shape[:-1], len(left), len(right))
            made = (left.T @ cube @ right).reshape(x.shape)
            other = back_left @ (w * s).reshape(-1, len(left), len(right)) @ back_right.T
            return made, other.reshape(w.shape)

        return apply


def learn_blocks(
    sites: Sequence[Site], options: FlatTransform, scaler: Scaler, formats: Formats, batches: Any, seed: int
) -> dict[str, Flat]:
    """The maps of all sites by the name of their boundary; where a block errs no less with maps, none of its.

    Block after block on what the float network gives to it, as FlatQuant calibrates: the quantized block's output
    (every residual, product of queries and keys and nonlinearity in it) is held to the float block's. One batch a step;
    of the steps looked at the best is kept, the start included. Errors are relative to the output's power.
    """
    net = Network(scaler.graph, [s.boundary for s in sites], formats)
    envs = net.bind(batches)
    known = {site.boundary: site for site in sites}
    fixed: dict[Boundary, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {}
    seen: set[Boundary] = set()
    found: dict[str, Flat] = {}
    for region in net.regions():
        inside = list(dict.fromkeys(net.sites[name].boundary for name in region.sites))
        starts = [dict(env) for env in envs]
        with torch.no_grad():
            for env in envs:
                net.execute(region.calls, env)
        maps = {b: _start(known[b], scaler, seed) for b in inside if b not in seen and _splits(b)}
        seen.update(inside)
        if maps:
            wanted = [[env[k] for k in region.exits if _is_float(env[k])] for env in envs]
            kept = [k for k in region.exits if _is_float(envs[0][k])]
            learned = _block(net, region.calls, kept, starts, wanted, maps, fixed, options)
            for boundary, flat in learned.items():
                found[boundary.name] = flat
                fixed[boundary] = _fixed(maps[boundary], flat)
        for env in envs:
            for i in region.calls:
                for key in net.runner.dead(i):
                    env.pop(key, None)
    return found


def _block(
    net: Network,
    calls: range,
    exits: list[Any],
    starts: list[Env],
    wanted: list[list[Tensor]],
    maps: Mapping[Boundary, _Map],
    fixed: Mapping[Boundary, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]],
    options: FlatTransform,
) -> dict[Boundary, Flat]:
    def error(i: int, use: bool) -> Tensor:
        env = dict(starts[i])
        net.execute(calls, env, {**fixed, **({b: m.turn() for b, m in maps.items()} if use else {})})
        parts = [
            (env[k] - w).square().mean() / w.square().mean().clamp(min=1e-12)
            for k, w in zip(exits, wanted[i], strict=True)
        ]
        return torch.stack(parts).sum()

    def check(use: bool = True) -> float:
        with torch.no_grad():
            return float(np.mean([float(error(i, use)) for i in range(min(CHECKED, len(starts)))]))

    before = check(False)
    optimizer = torch.optim.Adam([v for m in maps.values() for v in m.variables], lr=options.rate)
    best, kept = check(), {b: m.state() for b, m in maps.items()}
    every = max(1, options.steps // 8)
    for step in range(1, options.steps + 1):
        optimizer.param_groups[0]["lr"] = options.rate * min(1.0, 2 * (1 - (step - 1) / options.steps))
        optimizer.zero_grad()
        error((step - 1) % len(starts), True).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % every and step != options.steps:
            continue
        if (now := check()) < best and all(m.condition() <= options.condition for m in maps.values()):
            best, kept = now, {b: m.state() for b, m in maps.items()}
    if best >= before:
        return {}
    result = {}
    for boundary, (left, right, log) in kept.items():
        factors = np.exp(log.double().numpy())[maps[boundary].where.numpy()]
        result[boundary] = Flat(left.double().numpy(), right.double().numpy(), factors, (1.0, 1.0), before, best)
    return result


def _start(site: Site, scaler: Scaler, seed: int) -> _Map:
    """A random orthogonal map, as for a site on its own."""
    rng = np.random.default_rng(seed)
    classes, refused = scaler.probe(site.boundary)
    left, right = (
        torch.from_numpy(random_orthogonal(n, rng)).float().requires_grad_() for n in near_square(site.boundary.size)
    )
    where = torch.arange(site.boundary.size) if classes is None else torch.from_numpy(classes)
    return _Map(left, right, torch.zeros(int(where.max()) + 1, requires_grad=refused is None), where)


def _fixed(made: _Map, flat: Flat) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    log = torch.zeros_like(made.log)
    log[made.where] = torch.from_numpy(np.log(flat.factors)).float()
    left, right = (torch.from_numpy(m).float() for m in (flat.left, flat.right))
    return _Map(left, right, log, made.where).turn()


def _splits(boundary: Boundary) -> bool:
    return boundary.size >= 4 and near_square(boundary.size)[0] > 1


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
