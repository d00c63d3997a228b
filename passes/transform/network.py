"""The whole network in torch with its linear layers quantized as they will be; gradients reach every map on the way."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from ...graph.groups import AxisGroups
from ...graph.ir import Graph, Node, Weight
from ...graph.space import Atom, Leaf, Space, Sum, atoms, norm
from ..fold.operands import inputs_first
from ..recover.runner import bound, runner
from .boundary import Boundary
from .common import matches
from .grids import Formats
from .learning import fake_quantize

if TYPE_CHECKING:
    from torch import Tensor

    from ..quantize.rounding.regions import Region

Env = dict[Hashable, Any]
Maps = Mapping[Boundary, Callable[["Tensor", "Tensor"], tuple["Tensor", "Tensor"]]]
"""What happens at a boundary before rounding: (operand [.., in], weight [out, in]) -> both in the new basis."""


@dataclass(eq=False)
class Layer:
    """A linear operator that reads a boundary.

    Attributes:
        position: of its call; ``turned``: the weight is stored as [in, out].
        exact: its operand stays in float.
    """

    node: Node
    boundary: Boundary
    position: int
    operand: Hashable
    weight: Weight
    weight_key: Hashable
    turned: bool
    exact: bool = False

    @property
    def name(self) -> str:
        return self.node.name


@dataclass
class Network:
    """A graph that is executed call by call, in float or with the layers at the boundaries quantized.

    Attributes:
        points: none (for the search of regions, which looks for them).
        sites: the layers by name.
    """

    graph: Graph
    boundaries: Sequence[Boundary]
    formats: Formats
    float_inputs: Sequence[str] = ()
    points: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.runner = runner(self.graph)
        self.length = len(self.runner.order)
        writer = {key: i for i in range(self.length) for key in self.writes(i)}
        self.sites: dict[str, Layer] = {}
        self._at: dict[int, Layer] = {}
        for boundary in self.boundaries:
            for node, x in boundary.readers:
                value = node.inputs[1]
                assert value is not None and value.weight is not None
                layer = Layer(
                    node, boundary, writer[self.runner.key(node.output)], self.runner.key(x), value.weight,
                    self.runner.key(value), node.op == "matmul" or bool(inputs_first(node)),
                    matches(node, self.float_inputs),
                )  # fmt: skip
                self.sites[node.name] = self._at[layer.position] = layer
        self._keys: dict[str, list[Hashable]] = {}
        for value in self.graph.values.values():
            if value.weight is not None:
                self._keys.setdefault(value.weight.name, []).append(self.runner.key(value))

    # ---- running -------------------------------------------------------------------------------------------------
    def bind(self, batches: Iterable[Any]) -> list[Env]:
        """The tensors before the first call, one dictionary per batch."""
        return [self.runner.bind(b) for b in bound(self.graph, batches)]

    def weight(self, layer: Layer, weights: Mapping[Weight, Tensor]) -> Tensor:
        """[out, in] as it is in float."""
        held = weights.get(layer.weight)
        data = torch.from_numpy(layer.weight.numpy().astype("float32")) if held is None else held
        return data.T if layer.turned else data

    def execute(
        self,
        positions: Iterable[int],
        env: Env,
        maps: Maps | None = None,
        weights: Mapping[Weight, Tensor] | None = None,
        *,
        free: bool = False,
    ) -> None:
        """Make these calls on one batch.

        Args:
            maps: None runs the layers in float; else they are quantized, those whose boundary has a map behind it.
            weights: instead of the stored ones, before any map.
            free: drop what nothing reads any more.
        """
        weights = weights or {}
        held = {key: w for weight, w in weights.items() for key in self._keys[weight.name]}
        env.update(held)
        for i in positions:
            layer = self._at.get(i)
            if layer is None or maps is None:
                self.runner.call(i, env)
            else:
                self._quantized(layer, env, maps, weights)
            if free:
                for key in self.runner.dead(i):
                    env.pop(key, None)
        for key in held:
            env.pop(key, None)

    def _quantized(self, layer: Layer, env: Env, maps: Maps, weights: Mapping[Weight, Tensor]) -> None:
        x, w = env[layer.operand], self.weight(layer, weights)
        there = env.get(layer.weight_key)
        turn = maps.get(layer.boundary)
        made_x, made_w = (x, w) if turn is None else turn(x, w)
        if not layer.exact:
            made_x = fake_quantize(made_x, self.formats.activation, per_row=self.formats.per_token)
        made_w = fake_quantize(made_w, self.formats.weight, per_row=True)
        env[layer.operand], env[layer.weight_key] = made_x, made_w.T if layer.turned else made_w
        self.runner.call(layer.position, env)
        env[layer.operand] = x
        if there is None:
            env.pop(layer.weight_key)
        else:
            env[layer.weight_key] = there

    def outputs(self, env: Env) -> list[Tensor]:
        """The floating outputs after the last call."""
        found = [env[self.runner.key(v)] for v in self.graph.outputs]
        return [v for v in found if isinstance(v, torch.Tensor) and v.is_floating_point()]

    # ---- what the search of regions asks -------------------------------------------------------------------------
    def reads(self, i: int) -> list[Hashable]:
        return self.runner.calls[self.runner.order[i]][0]

    def writes(self, i: int) -> list[Hashable]:
        return self.runner.calls[self.runner.order[i]][1]

    def regions(self) -> list[Region]:
        """The network's blocks: between two of them one tensor passes, masks and position codes aside."""
        from ..quantize.rounding.regions import blocks

        return blocks(cast(Any, self))


def turned(groups: AxisGroups, matrices: Mapping[Atom, Tensor]) -> dict[Weight, Tensor]:
    """The weights that a rotation of these atoms changes, as ``graph.rotate`` changes them, with gradients."""
    done: dict[tuple[Weight, int], Space] = {}
    for role in groups.analysis.roles:
        if role.exponent in (1, -1) and any(a in matrices for a in atoms(role.space)):
            done.setdefault((role.weight, role.axis), role.space)
    changed: dict[Weight, Tensor] = {}
    for (weight, axis), space in done.items():
        data = changed.get(weight)
        data = torch.from_numpy(weight.numpy().astype("float32")) if data is None else data
        moved = data.movedim(axis, 0)
        mixed = _mix(moved.reshape(len(moved), -1), norm(space), matrices)
        changed[weight] = mixed.reshape(moved.shape).movedim(0, axis)
    return changed


def _mix(data: Tensor, e: Space, matrices: Mapping[Atom, Tensor]) -> Tensor:
    """[n, rest] with the matrices of the space's atoms applied along n."""
    if isinstance(e, Leaf):
        r = matrices.get(e.atom)
        if r is None:
            return data
        if e.perm is not None:
            order = torch.as_tensor(e.perm)
            r = r[order][:, order]
        return r.T @ data
    if isinstance(e, Sum):
        parts = data.split([t.size for t in e.terms])
        return torch.cat([_mix(p, t, matrices) for p, t in zip(parts, e.terms, strict=True)])
    made = data.reshape(*(f.size for f in e.factors), -1)
    for axis, f in enumerate(e.factors):
        moved = made.movedim(axis, 0)
        made = _mix(moved.reshape(len(moved), -1), f, matrices).reshape(moved.shape).movedim(0, axis)
    return made.reshape(data.shape)
