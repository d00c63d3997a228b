"""The data of one region: what enters it in float and quantized, what should leave it, drawn in batches of samples."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .regions import Region
from .simulate import Env, Simulation


@dataclass
class Picked:
    """Some samples: entries in float and quantized, wanted exits, and what the rest of the network needs."""

    floats: Env
    quants: Env
    wanted: dict[Hashable, Tensor]
    rest: Env
    size: int
    at: list[tuple[int, Tensor | None]]

    def env(self, drop: float, draw: torch.Generator | None) -> Env:
        """Entries for one execution; a share ``drop`` of the elements is float."""
        found: Env = dict(self.quants)
        if drop and draw is not None:
            for key, x in self.floats.items():
                q = found[key]
                if isinstance(x, Tensor) and x.is_floating_point() and x is not q:
                    found[key] = torch.where(torch.rand(x.shape, generator=draw) < drop, x, q)
        return found

    def outputs(self, per_batch: list[list[Tensor]]) -> list[Tensor]:
        """The same samples of tensors that are kept per calibration batch."""
        parts = [[t if i is None else t[i] for t in per_batch[b]] for b, i in self.at]
        return [torch.cat(ts) if len(ts) > 1 else ts[0] for ts in zip(*parts, strict=True)]


@dataclass
class Samples:
    """All samples of a region.

    Attributes:
        mixes: whether samples may be drawn across calibration batches: the region treats them independently along
            the first axis. Otherwise whole calibration batches are drawn.
    """

    region: Region
    floats: list[Env]
    quants: list[Env]
    wanted: list[dict[Hashable, Tensor]]
    rests: list[Env]
    sizes: list[int]
    mixes: bool

    @staticmethod
    def of(sim: Simulation, region: Region, floats: list[Env], quants: list[Env]) -> Samples:
        """Read the environments of both networks, the float one's after the region, the other's before it."""
        wanted = [{k: env[k] for k in region.exits if isinstance(env[k], Tensor)} for env in floats]
        wanted = [{k: t for k, t in w.items() if t.is_floating_point()} for w in wanted]
        later = {key for i in range(region.last, sim.length) for key in sim.reads(i)}
        rests = [{k: v for k, v in env.items() if k in later} for env in floats]
        sizes = [next((t.shape[0] for t in w.values() if t.dim()), 1) for w in wanted]
        entries = [[{k: env[k] for k in region.entries} for env in envs] for envs in (floats, quants)]
        found = Samples(region, entries[0], entries[1], wanted, rests, sizes, True)
        found.mixes = found._independent(sim)
        return found

    def _independent(self, sim: Simulation) -> bool:
        """Whether half of two batches gives what it gave within them."""
        if any(size < 1 for size in self.sizes) or sum(self.sizes) < 2:
            return False
        for env, size in zip(self.floats, self.sizes, strict=True):
            for key, x in env.items():
                own = isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == size
                first = self.floats[0][key]
                if not own and not (torch.equal(x, first) if isinstance(x, Tensor) else x == first):
                    return False
        picked = self._mixed(self._spread_picks(min(3, sum(self.sizes))))
        try:
            env = dict(picked.floats)
            sim.execute(self.region.calls, env)
        except Exception:
            return False
        for key, y in picked.wanted.items():
            z = env[key]
            if z.shape != y.shape or not torch.allclose(z, y, rtol=1e-3, atol=1e-4 * float(y.abs().max() or 1)):
                return False
        return True

    def _spread_picks(self, count: int) -> Tensor:
        return torch.linspace(0, sum(self.sizes) - 1, count).long()

    def draw(self, count: int, draw: torch.Generator) -> Picked:
        """``count`` samples at random, or one calibration batch."""
        if not self.mixes:
            return self._whole(int(torch.randint(len(self.sizes), (1,), generator=draw)))
        return self._mixed(torch.randint(sum(self.sizes), (count,), generator=draw))

    def all(self, count: int) -> Iterator[Picked]:
        """Every sample once."""
        if not self.mixes:
            yield from (self._whole(i) for i in range(len(self.sizes)))
            return
        for part in torch.arange(sum(self.sizes)).split(count):
            yield self._mixed(part)

    def _whole(self, i: int) -> Picked:
        return Picked(self.floats[i], self.quants[i], self.wanted[i], self.rests[i], self.sizes[i], [(i, None)])

    def _mixed(self, picks: Tensor) -> Picked:
        picks, _ = picks.sort()
        at: list[tuple[int, Tensor | None]] = []
        start = 0
        for i, size in enumerate(self.sizes):
            inside = picks[(picks >= start) & (picks < start + size)] - start
            if len(inside):
                at.append((i, inside))
            start += size

        def gathered(envs: list[Any]) -> dict[Hashable, Any]:
            found = {}
            for key, first in envs[0].items():
                own = isinstance(first, Tensor) and first.dim() > 0 and first.shape[0] == self.sizes[0]
                found[key] = torch.cat([envs[i][key][inside] for i, inside in at]) if own else first
            return found

        return Picked(
            gathered(self.floats), gathered(self.quants), gathered(self.wanted), gathered(self.rests), len(picks), at
        )
