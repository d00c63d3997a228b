"""Runs a float graph and its quantized simulation side by side in torch, region by region, gradients included."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....graph.errors import ConstraintError
from ....graph.ir import Node, Value, Weight
from ...recover.runner import runner
from ..placement import WeightSite
from .activations import Activation
from .job import Rounded, RoundingJob

Env = dict[Hashable, Any]
Learned = dict[str, Tensor]
"""Name of a site's node -> the tensor to use instead of its weight (or its bias)."""


@dataclass
class Hooks:
    """What differs from the float network in one execution.

    Attributes:
        weights, biases: tensors to use instead of the stored ones, by name of the site's node.
        points: how a point's value is quantized, by the point's name; points that are absent stay float.
    """

    weights: Learned = field(default_factory=dict)
    biases: Learned = field(default_factory=dict)
    points: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)


@dataclass
class Site:
    """A weight site in the simulation's own graph: its node, where it is executed, where its bias is added."""

    name: str
    node: Node
    weight: Weight
    position: int
    weight_key: Hashable
    source: WeightSite
    bias: Weight | None = None
    bias_position: int = -1
    bias_key: Hashable = None


class Simulation:
    """The job's graph with an identity at every point, where Q/DQ will stand; calls are numbered in execution order.

    Attributes:
        points: position of an identity -> name of the point it stands for.
        sites: weight sites by the name of their node, in execution order.
        activations: the grid of every point, one object for all points that share a scale.
    """

    def __init__(self, job: RoundingJob) -> None:
        self.job = job
        self.graph = job.graph.clone()
        self._mark()
        self.runner = runner(self.graph)
        self.length = len(self.runner.order)
        self._place()

    # ---- building ------------------------------------------------------------------------------------------------
    def _mark(self) -> None:
        """Insert the identities exactly as Q/DQ pairs will be."""
        placed = self.job.placement
        nodes = {n.name: n for n in self.graph.nodes}
        self._markers: dict[str, Value] = {}
        for name, point in placed.points.items():
            value = self.graph.values[name]
            marker = self.graph.insert("identity", [value], name=f"{name}_point", after=value.producer)
            if point.all_uses:
                self.graph.replace_uses(value, marker.output, except_nodes=[marker])
            else:
                for node, position in point.readers:
                    self.graph.set_input(nodes[node.name], position, marker.output)
            self._markers[name] = marker.output

    def _place(self) -> None:
        self._writer = {
            key: i for i, call in enumerate(self.runner.order) for key in self.runner.calls[call][1]
        }  # fmt: skip
        self.points = {self._writer[self.runner.key(v)]: name for name, v in self._markers.items()}
        shared: dict[str, Activation] = {}
        self.activations: dict[str, Activation] = {}
        for name, point in self.job.placement.points.items():
            if point.root not in shared:
                shared[point.root] = Activation(self.job.params[name])
            self.activations[name] = shared[point.root]
        nodes = {n.name: n for n in self.graph.nodes}
        found = [self._site(source, nodes) for source in self.job.placement.weights]
        self.sites = {s.name: s for s in sorted(found, key=lambda s: s.position)}
        self._at: dict[int, list[Site]] = {}
        for site in self.sites.values():
            self._at.setdefault(site.position, []).append(site)
        self._bias_at: dict[int, list[Site]] = {}
        for site in self.sites.values():
            if site.bias is not None:
                self._bias_at.setdefault(site.bias_position, []).append(site)

    def _site(self, source: WeightSite, nodes: Mapping[str, Node]) -> Site:
        node = nodes[source.node.name]
        value = node.inputs[source.position]
        assert value is not None and value.weight is not None
        site = Site(
            node.name, node, value.weight, self._writer[self.runner.key(node.output)], self.runner.key(value), source
        )
        # A bias that is stored with the weight, or one that stays float beside it.
        at = source.bias_position if source.bias is not None else source.rule.bias if source.rule is not None else None
        where = source.bias_node if source.bias is not None else source.node
        adder = None if where is None or at is None else nodes[where.name]
        held = None if adder is None or at is None else adder.input(at)
        plain = node.attrs.get("beta", 1.0) == 1.0 and node.attrs.get("alpha", 1.0) == 1.0
        if held is not None and held.weight is not None and adder is not None and plain and len(held.uses) == 1:
            site.bias, site.bias_key = held.weight, self.runner.key(held)
            site.bias_position = self._writer[self.runner.key(adder.output)]
        return site

    # ---- running -------------------------------------------------------------------------------------------------
    def envs(self, batches: Iterable[dict[str, Any]]) -> list[Env]:
        """The tensors before the first call, one dictionary per batch."""
        return [self.runner.bind(b) for b in batches]

    def execute(self, positions: Sequence[int], env: Env, hooks: Hooks | None = None, *, free: bool = False) -> None:
        """Make these calls on one batch.

        Args:
            positions: in execution order.
            env: tensors by native key; results are added.
            hooks: None runs the float network.
            free: drop what nothing reads any more.
        """
        for i in positions:
            if hooks is not None and i in self.points:
                self._point(i, env, hooks)
            else:
                self._call(i, env, hooks)
            if free:
                for key in self.runner.dead(i):
                    env.pop(key, None)

    def _point(self, i: int, env: Env, hooks: Hooks) -> None:
        reads, writes = self.runner.calls[self.runner.order[i]]
        quantize = hooks.points.get(self.points[i])
        x = env[reads[0]]
        env[writes[0]] = x if quantize is None else quantize(x)

    def _call(self, i: int, env: Env, hooks: Hooks | None) -> None:
        borrowed = []
        if hooks is not None:
            for site in self._at.get(i, ()):
                if site.name in hooks.weights:
                    env[site.weight_key] = hooks.weights[site.name]
                    borrowed.append(site.weight_key)
            for site in self._bias_at.get(i, ()):
                if site.name in hooks.biases:
                    env[site.bias_key] = hooks.biases[site.name]
                    borrowed.append(site.bias_key)
        self.runner.call(i, env)
        for key in borrowed:
            env.pop(key, None)

    def value(self, value: Value, env: Env) -> Any:
        """The tensor of a value of ``graph`` in an environment."""
        return env[self.runner.key(value)]

    # ---- facts for regions ---------------------------------------------------------------------------------------
    def reads(self, i: int) -> list[Hashable]:
        return self.runner.calls[self.runner.order[i]][0]

    def writes(self, i: int) -> list[Hashable]:
        return self.runner.calls[self.runner.order[i]][1]

    def quantizers(self, names: Iterable[str]) -> dict[str, Callable[[Tensor], Tensor]]:
        """How the points of these names are quantized."""
        return {name: self.activations[name] for name in names}


def use(hooks: Hooks, site: Site, rounded: Rounded) -> None:
    """Let the quantized network run on a site's result."""
    real = np.array(rounded.params.dequantize(rounded.integers), np.float32)
    hooks.weights[site.name] = torch.from_numpy(real)
    if rounded.bias is not None:
        assert site.bias is not None
        hooks.biases[site.name] = torch.from_numpy(rounded.bias.reshape(site.bias.shape))


def tensor(weight: Weight) -> Tensor:
    """A weight as float32 with its own memory."""
    return torch.from_numpy(np.array(weight.numpy(), dtype=np.float32))


def checked(sim: Simulation, batches: list[dict[str, Any]], method: str) -> None:
    """Refuse to learn from nothing.

    Raises:
        ConstraintError: there is no batch.
    """
    if not batches:
        raise ConstraintError(
            f"rounding {method!r} needs calibration data",
            node=sim.graph.name,
            expected="at least one batch",
            found="none",
            hint="pass calibration=batches, or rounding='nearest'",
        )
