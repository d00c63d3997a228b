"""What the scaling passes share: which boundaries they take, how a factor gets in, and the decisions they report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np

from ...graph.groups import AxisGroups, axis_groups
from ...graph.ir import Graph, Node, Value
from ...graph.ops.carry import align
from ..fold import sinks
from ..fold.affine import Affine
from ..fold.edits import BEHIND, Finished
from ..fold.walk import Walk
from ..rewrite import Env, Refusal
from .boundary import Boundary, input_axis, rescale, shared_channels, weight_matrix


def matches(node: Node, patterns: Sequence[str]) -> bool:
    """Whether a glob pattern fits the node's name, its module path (or one above it) or its weight's name."""
    weight = node.input(1)
    names = [node.name, node.scope, *(weight.weight.aliases if weight is not None and weight.weight else ())]
    if weight is not None and weight.weight is not None:
        names.append(weight.weight.name)
    return any(fnmatchcase(n, p) or fnmatchcase(n, f"{p}.*") for n in names if n for p in patterns)


def layer_name(node: Node) -> str:
    """How reports call a linear operator: its module path, or its weight's name without the last part."""
    weight = node.input(1)
    stored = "" if weight is None or weight.weight is None else weight.weight.name
    return node.scope or stored.removesuffix(".weight") or node.name


@dataclass(eq=False)
class Site:
    """A boundary with the matrices of its readers.

    Attributes:
        matrices: float [out, in] per reader.
    """

    boundary: Boundary
    matrices: list[np.ndarray] = field(default_factory=list)

    @property
    def name(self) -> str:
        return ", ".join(dict.fromkeys(layer_name(n) for n, _ in self.boundary.readers))

    @property
    def weight_peak(self) -> np.ndarray:
        """Largest magnitude of the readers' weights per input channel."""
        return np.max([np.abs(m).max(0) for m in self.matrices], axis=0).astype(np.float64)


def sites_of(boundaries: Sequence[Boundary], ignore: Sequence[str]) -> list[Site]:
    """The boundaries whose readers all have a stored float matrix and are not ignored."""
    found = []
    for boundary in boundaries:
        if any(matches(node, ignore) for node, _ in boundary.readers):
            continue
        matrices = [weight_matrix(node) for node, _ in boundary.readers]
        if all(m is not None and m.shape[1] == boundary.size for m in matrices):
            found.append(Site(boundary, [m for m in matrices if m is not None]))
    return found


class Scaler:
    """Puts factors at boundaries of one graph: folded where something before absorbs them, else by a product."""

    def __init__(self, graph: Graph, env: Env) -> None:
        self.graph, self.env = graph, env
        self._groups: AxisGroups | None = None

    def classes(self, boundary: Boundary) -> list[np.ndarray]:
        """Ways in which channels may have to share a factor (see ``shared_channels``)."""
        if self._groups is None:
            self._groups = axis_groups(self.graph)
        return shared_channels(self._groups, boundary)

    def probe(self, boundary: Boundary) -> tuple[np.ndarray | None, Refusal | None]:
        """(classes of channels that share a factor or None, why no factor can be folded or None)."""
        factors = 1.0 + np.arange(1, boundary.size + 1) / (boundary.size + 1)
        refused = rescale(self.env, boundary, factors)
        if isinstance(refused, Finished):
            return None, None
        for classes in self.classes(boundary):
            if isinstance(rescale(self.env, boundary, factors[classes]), Finished):
                return classes, None
        return None, refused

    def fold(self, boundary: Boundary, factors: np.ndarray) -> list[str] | Refusal:
        """Divide the boundary by ``factors`` in the weights; the names of what took it."""
        done = rescale(self.env, boundary, factors)
        if isinstance(done, Refusal):
            return done
        done.write(self.graph)
        readers = {node for node, _ in boundary.readers}
        return [node.name for node, position, _ in done.operands if node not in readers and position != BEHIND]

    def insert(self, boundary: Boundary, factors: np.ndarray) -> list[str] | Refusal:
        """Divide by ``factors`` in products before the readers, which multiply by them; the products' names."""
        walk = Walk(self.env)
        for node, x in boundary.readers:
            assert x.rank is not None
            axis = _axis(node, x)
            left = sinks.DOWN[node.op](walk, node, 0, Affine.along(axis, factors, np.zeros(len(factors)), x.rank))
            if left is not None:
                return left if isinstance(left, Refusal) else Refusal(f"{node.name} takes no factor", node.name)
        done = walk.edits.finish()
        if isinstance(done, Refusal):
            return done
        done.write(self.graph)
        made = []
        inverse = 1.0 / factors
        for x in dict.fromkeys(x for _, x in boundary.readers):
            users = [node for node, other in boundary.readers if other is x]
            made.append(self._product(x, _axis(users[0], x), inverse, users))
        return made

    def _product(self, x: Value, axis: int, inverse: np.ndarray, users: list[Node]) -> str:
        assert x.rank is not None
        vector = inverse.reshape(-1, *[1] * (x.rank - 1 - axis)).astype(np.float32)
        stored = self.graph.add_weight(f"{users[0].name}_smooth_scale", align(vector, vector.ndim))
        node = self.graph.insert(
            "mul", [x, stored], name=f"{users[0].name}_smooth", after=x.producer, scope=users[0].scope
        )
        for user in users:
            self.graph.set_input(user, 0, node.output)
        return node.name


def _axis(node: Node, x: Value) -> int:
    axis = input_axis(node)
    assert axis is not None and x.rank is not None
    return axis


def pooled(values: np.ndarray, classes: np.ndarray | None) -> np.ndarray:
    """The largest value of each class of channels, at every channel of the class."""
    if classes is None:
        return values
    most = np.full(int(classes.max()) + 1, -np.inf)
    np.maximum.at(most, classes, values)
    return np.asarray(most[classes])
