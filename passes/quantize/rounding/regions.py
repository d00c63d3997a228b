"""Cuts a network into regions to reconstruct: residual blocks, transformer layers, found from the graph alone."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from math import prod

from .simulate import Simulation


@dataclass
class Region:
    """Consecutive calls, with what they read from before and what others read of them.

    Attributes:
        first, last: positions ``first`` to ``last - 1`` of the execution order.
        sites, points: names of the weight sites and of the points inside.
        entries: keys read that earlier calls made (or graph inputs); exits: keys that later calls or the caller read.
    """

    first: int
    last: int
    sites: list[str] = field(default_factory=list)
    points: list[str] = field(default_factory=list)
    entries: list[Hashable] = field(default_factory=list)
    exits: list[Hashable] = field(default_factory=list)

    @property
    def calls(self) -> range:
        return range(self.first, self.last)


def blocks(sim: Simulation, most: int = 16) -> list[Region]:
    """Regions of one entry and one exit between which nothing but one tensor passes.

    A cut lies where exactly one tensor that depends on a quantized weight is alive: at the end of a residual branch,
    that is, and between the layers of a plain chain. Masks and position codes, which depend on no weight, may pass.
    Calls without weights and points that keep the size (an activation, a norm) go with the region before them.

    Args:
        sim: the network.
        most: regions with more weight sites (nets that are one tangle: U-Nets, dense blocks) are cut after each site.
    """
    pieces = _pieces(sim)
    bounds: list[tuple[int, int]] = []
    sites_at = {s.position for s in sim.sites.values()}
    for first, last in pieces:
        sited = bool(bounds) and any(i in sites_at for i in range(*bounds[-1]))
        busy = any(i in sites_at or i in sim.points for i in range(first, last))
        if bounds and (not sited or (not busy and _keeps_size(sim, first, last))):
            bounds[-1] = (bounds[-1][0], last)
        else:
            bounds.append((first, last))
    split: list[tuple[int, int]] = []
    for first, last in bounds:
        inner = [i for i in range(first, last) if i in sites_at]
        split += _cut(first, last, inner) if len(inner) > most else [(first, last)]
    return _described(sim, split)


def layers(sim: Simulation) -> list[Region]:
    """One region per weight site: it ends with the site's call."""
    at = sorted({s.position for s in sim.sites.values()})
    return _described(sim, _cut(0, sim.length, at))


def merged(sim: Simulation, regions: list[Region], count: int) -> list[Region]:
    """Every ``count`` neighbours as one region."""
    groups = [regions[i : i + count] for i in range(0, len(regions), count)]
    return _described(sim, [(g[0].first, g[-1].last) for g in groups])


def _cut(first: int, last: int, sites: list[int]) -> list[tuple[int, int]]:
    """The positions in parts of which each ends with a site; what follows the last site goes with it."""
    edges = [first, *(i + 1 for i in sites[:-1]), last]
    return list(zip(edges, edges[1:], strict=False))


def _pieces(sim: Simulation) -> list[tuple[int, int]]:
    """The finest cuts: after each position where one dependent tensor at most is alive."""
    sites_at = {s.position for s in sim.sites.values()}
    values = {sim.runner.key(v): v for v in sim.graph.values.values() if not v.is_const}
    last_read = {key: i for i in range(sim.length) for key in sim.reads(i)}
    last_read.update({sim.runner.key(v): sim.length for v in sim.graph.outputs})
    depends: set[Hashable] = set()
    alive: set[Hashable] = set()
    edges = [0]
    for i in range(sim.length):
        if i in sites_at or any(key in depends for key in sim.reads(i)):
            for key in sim.writes(i):
                v = values.get(key)
                if v is None or v.dtype.startswith(("float", "bfloat")):
                    depends.add(key)
                    alive.add(key)
        alive = {key for key in alive if last_read.get(key, -1) > i}
        if len(alive) <= 1 and depends:
            edges.append(i + 1)
    if edges[-1] != sim.length:
        edges.append(sim.length)
    return list(zip(edges, edges[1:], strict=False))


def _keeps_size(sim: Simulation, first: int, last: int) -> bool:
    """Whether the piece gives a tensor as large as the one it takes."""
    sizes = {sim.runner.key(v): prod(v.hint) for v in sim.graph.values.values() if v.hint is not None}
    written = {key for i in range(first, last) for key in sim.writes(i)}
    taken = [sizes.get(key, 0) for i in range(first, last) for key in sim.reads(i) if key not in written]
    given = [sizes.get(key, 0) for key in sim.writes(last - 1)]
    return bool(taken and given) and max(taken) == max(given)


def _described(sim: Simulation, bounds: list[tuple[int, int]]) -> list[Region]:
    readers: dict[Hashable, int] = {key: i for i in range(sim.length) for key in sim.reads(i)}
    readers.update({sim.runner.key(v): sim.length for v in sim.graph.outputs})
    stored = sim.runner.stored
    found = []
    for first, last in bounds:
        region = Region(first, last)
        region.sites = [s.name for s in sim.sites.values() if first <= s.position < last]
        region.points = [name for i, name in sim.points.items() if first <= i < last]
        written = {key: None for i in region.calls for key in sim.writes(i)}
        read = {key: None for i in region.calls for key in sim.reads(i)}
        region.entries = [key for key in read if key not in written and key not in stored]
        region.exits = [key for key in written if readers.get(key, -1) >= last]
        found.append(region)
    return found
