"""Rotate: an orthogonal matrix acts on the indices of a group, wherever they are made and wherever they are read.

With row vectors a value's slab x becomes x R. What makes it is multiplied by R along that axis, and so is what
contracts it, since ``(x R)(w R)^T = x w^T``: the function stays. Every operator on the way must commute with any mixing
of the indices: rearrangements, sums of values that both carry them, products with numbers that do not tell them apart,
normalizations by their mean square (with one gain for all). What tells one index from another (a nonlinearity, a gain,
a rotary embedding) forbids it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .errors import ConstraintError
from .groups import AxisGroup, AxisGroups
from .ir import Node, Value, Weight
from .ops.carry import moves
from .space import Atom, Leaf, Space, Sum, atoms, norm

ORTHOGONAL = 1e-5
"""Largest entry of R R^T - I that counts as orthogonal."""


@dataclass(frozen=True)
class Freedom:
    """What may be done to a group's indices.

    Attributes:
        reason: why no rotation is legal; "" where one is.
        node: the operator in the way.
        ones: only rotations that leave the vector of ones where it is (a mean is subtracted: layer norms).
        norms: the normalizations over these indices (where one is spelled out, the mean of its squares).
        products: products of two activations that contract them (queries with keys).
    """

    reason: str = ""
    node: str = ""
    ones: bool = False
    norms: tuple[Node, ...] = ()
    products: tuple[Node, ...] = ()


class _Blocked(Exception):
    pass


def freedom(groups: AxisGroups, group: AxisGroup) -> Freedom:
    """Whether a rotation of the group's indices is legal, and if not, why."""
    if not group.can("permute"):
        return Freedom(group.why("permute"))
    walk = _Check(groups, group)
    try:
        walk.run()
    except _Blocked as blocked:
        return Freedom(str(blocked), walk.at)
    return Freedom("", "", walk.ones, tuple(walk.norms), tuple(walk.products))


def rotate(groups: AxisGroups, rotations: Mapping[AxisGroup, np.ndarray]) -> None:
    """Multiply each group's indices by an orthogonal matrix [size, size] (new index j is ``sum_i old_i R[i, j]``).

    Exact up to the rounding of the stored dtype: the arithmetic is float64, cast once.

    Raises:
        ConstraintError: a matrix is not orthogonal, or has to keep the ones and does not; the group may not be rotated.
    """
    matrices: dict[Atom, np.ndarray] = {}
    for group, matrix in rotations.items():
        found = freedom(groups, group)
        if found.reason:
            raise ConstraintError(
                "this axis group cannot be rotated", node=found.node or group.name, found=found.reason
            )
        r = np.asarray(matrix, np.float64)
        if r.shape != (group.size, group.size) or off_orthogonal(r) > ORTHOGONAL:
            raise ConstraintError(
                "not an orthogonal matrix of the group's size", node=group.name, expected=(group.size, group.size)
            )
        if found.ones and np.abs(r.sum(0) - 1).max() > ORTHOGONAL:
            raise ConstraintError(
                "a mean over these indices is subtracted, so the rotation must keep the vector of ones",
                node=group.name,
                hint="turn the layer norms into RMS norms first",
            )
        matrices[group.atom] = r
    transform(groups, matrices, (1, -1))


def transform(groups: AxisGroups, matrices: Mapping[Atom, np.ndarray], exponents: tuple[int, ...]) -> None:
    """Multiply weights along the axes that make (exponent 1) or contract (-1) the atoms by the atoms' matrices."""
    done: dict[tuple[Weight, int], Space] = {}
    for role in groups.analysis.roles:
        if role.exponent in exponents and any(a in matrices for a in atoms(role.space)):
            done.setdefault((role.weight, role.axis), role.space)
    changed: dict[Weight, np.ndarray] = {}
    for (weight, axis), space in done.items():
        data = changed.get(weight)
        data = weight.numpy().astype(np.float64) if data is None else data
        moved = np.moveaxis(data, axis, 0)
        mixed = _mix(moved.reshape(len(moved), -1), norm(space), matrices)
        changed[weight] = np.moveaxis(mixed.reshape(moved.shape), 0, axis)
    for weight, data in changed.items():
        groups.graph.set_weight(weight, np.ascontiguousarray(data.astype(weight.numpy().dtype)))


def off_orthogonal(matrix: np.ndarray) -> float:
    """Largest entry of ``R R^T - I`` in magnitude."""
    return float(np.abs(matrix @ matrix.T - np.eye(len(matrix))).max())


def _mix(data: np.ndarray, e: Space, matrices: Mapping[Atom, np.ndarray]) -> np.ndarray:
    """[n, rest] with the matrices of the space's atoms applied along n."""
    if isinstance(e, Leaf):
        r = matrices.get(e.atom)
        if r is None:
            return data
        r = r if e.perm is None else r[np.ix_(e.perm, e.perm)]
        return np.asarray(r.T @ data)
    if isinstance(e, Sum):
        cuts = np.cumsum([t.size for t in e.terms])[:-1]
        return np.concatenate([_mix(p, t, matrices) for p, t in zip(np.split(data, cuts), e.terms, strict=True)])
    sizes = [f.size for f in e.factors]
    made = data.reshape(*sizes, -1)
    for axis, f in enumerate(e.factors):
        moved = np.moveaxis(made, axis, 0)
        made = np.moveaxis(_mix(moved.reshape(len(moved), -1), f, matrices).reshape(moved.shape), 0, axis)
    return made.reshape(data.shape)


class _Check:
    """The walk over all operators that touch one atom."""

    def __init__(self, groups: AxisGroups, group: AxisGroup) -> None:
        self.an, self.group, self.atom = groups.analysis, group, group.atom
        self.ones = False
        self.norms: list[Node] = []
        self.products: list[Node] = []
        self.at = ""
        self.spread: dict[Value, list[int]] = {}

    def axes(self, v: Value | None) -> list[int]:
        """The axes of a value that mention the atom."""
        if v is None or v not in self.an.spaces:
            return []
        if v not in self.spread:
            self.spread[v] = [i for i, e in enumerate(self.an.spaces[v]) if e.size > 1 and self.atom in atoms(e)]
        return self.spread[v]

    def run(self) -> None:
        exponents: dict[tuple[Weight, int], set[int]] = {}
        for role in self.an.roles:
            if self.atom in atoms(role.space):
                exponents.setdefault((role.weight, role.axis), set()).add(role.exponent)
        for member in self.group.members:
            if not exponents.get((member.weight, member.axis)):
                raise _Blocked(f"{member.label} takes part in a way that is not linear")
            if member.stat:
                raise _Blocked(f"{member.label} is a statistic per index")
        for node in self.an.graph.nodes:
            if any(self.axes(v) for v in (*node.inputs, *node.outputs)):
                self.at = node.name
                self.visit(node)
        self.at = ""

    def visit(self, node: Node) -> None:
        op = node.op
        if moves(op) or op in ("identity", "neg", "cast", "shape_of", "scalar"):
            if op == "cast" and not node.output.dtype.startswith(("float", "bfloat")):
                raise _Blocked("cast to an integer type")
            return
        if op not in _CHECKS:
            raise _Blocked(f"{op} does not commute with a rotation")
        _CHECKS[op](self, node)

    # ---- elementwise ---------------------------------------------------------------------------------------------
    def _sum(self, node: Node) -> None:
        rank = node.output.rank or 0
        for axis in self.axes(node.output):
            for v in node.inputs:
                own = -1 if v is None else axis - (rank - (v.rank or 0))
                if v is not None and own not in self.axes(v) and not _zero(v):
                    raise _Blocked(f"{node.op} with {v.name}, which is the same for all indices")

    def _product(self, node: Node) -> None:
        carrying = [k for k, v in enumerate(node.inputs) if self.axes(v)]
        if node.op == "mul" and len(carrying) == 2 and node.inputs[0] is node.inputs[1]:
            return self._square(node)
        rank = node.output.rank or 0
        for axis in self.axes(node.output):
            own = [
                k for k, v in enumerate(node.inputs) if v is not None and axis - (rank - (v.rank or 0)) in self.axes(v)
            ]
            moving = [k for k in own if not self._even(node.inputs[k])]
            if len(moving) > 1:
                names = " and ".join(v.name for v in node.inputs if v is not None)
                raise _Blocked(f"{names} are multiplied index by index (a gain, a gate or a rotary embedding)")
            if node.op == "div" and 1 in moving:
                raise _Blocked("a divisor carries the axis")

    def _even(self, v: Value | None) -> bool:
        """A constant that is the same for all indices of the atom."""
        data = None if v is None else v.const()
        return data is not None and data.size > 0 and bool((data == data.reshape(-1)[0]).all())

    def _square(self, node: Node) -> None:
        """Squares that are only summed over all the indices: the sum is the squared length."""
        if node.op == "pow":
            power = None if node.input(1) is None else node.inputs[1].const()  # type: ignore[union-attr]
            if power is None or power.size != 1 or float(power.reshape(-1)[0]) != 2.0:
                raise _Blocked("a power other than 2")
        for user, _ in node.output.uses:
            if user.op not in ("mean", "sum"):
                raise _Blocked(f"squares are read by {user.name}")

    def _reduction(self, node: Node) -> None:
        x = node.inputs[0]
        assert x is not None and x.rank is not None
        axes = {a % x.rank for a in node.attrs.get("axes") or range(x.rank)}
        if not axes & set(self.axes(x)):
            return
        made = x.producer
        squares = made is not None and made.op in ("pow", "square", "mul")
        if node.op == "norm":
            squares = node.attrs.get("p", 2) == 2
        if not squares or not self._whole(x, axes):
            raise _Blocked(f"{node.op} over the indices")
        if made is not None and made.op == "mul" and made.inputs[0] is not made.inputs[1]:
            raise _Blocked(f"{node.op} over the indices")
        self.norms.append(node)

    def _whole(self, x: Value, axes: set[int]) -> bool:
        """Whether these axes are the atom and nothing else."""
        spaces = [norm(self.an.spaces[x][a]) for a in axes]
        return len(axes) == 1 and isinstance(spaces[0], Leaf) and spaces[0].atom is self.atom

    # ---- contractions ----------------------------------------------------------------------------------------------
    def _linear(self, node: Node) -> None:
        x, weight = node.inputs[0], node.inputs[1]
        assert x is not None and weight is not None and x.rank is not None
        if any(a != x.rank - 1 for a in self.axes(x)) and node.input(2) is not None:
            raise _Blocked("a bias is added to every row")
        if not self.an.is_const(weight) and self.axes(weight):
            raise _Blocked("its weight is computed")

    def _conv(self, node: Node) -> None:
        if node.attrs.get("groups", 1) != 1:
            raise _Blocked("a grouped convolution tells channels apart")
        if any(a != 1 for a in (*self.axes(node.inputs[0]), *self.axes(node.output))):
            raise _Blocked("not the channels of a convolution")

    def _matmul(self, node: Node) -> None:
        a, b = node.inputs
        assert a is not None and b is not None
        ra, rb = a.rank or 0, b.rank or 0
        for v, rank, other, other_rank in ((a, ra, b, rb), (b, rb, a, ra)):
            for axis in self.axes(v):
                if axis < rank - 2 and rank > 2:
                    own = axis - (rank - other_rank)
                    if 0 <= own < other_rank - 2 and (other.hint or ())[own] > 1:
                        raise _Blocked("a batch axis of a matrix product")
        if ra - 1 in self.axes(a) and not self.an.is_const(a) and not self.an.is_const(b):
            self.products.append(node)

    def _einsum(self, node: Node) -> None:
        left, right = node.attrs["equation"].replace(" ", "").split("->")
        terms = left.split(",")
        for term, v in zip(terms, node.inputs, strict=True):
            for axis in self.axes(v):
                label = term[axis]
                shared = sum(label in other for other in terms)
                if (shared > 1) == (label in right):
                    raise _Blocked(f"einsum's axis {label} is no plain contraction")
                if shared > 1 and not any(self.an.is_const(o) for o in node.inputs):
                    self.products.append(node)

    def _sdpa(self, node: Node) -> None:
        for k, v in enumerate(node.inputs):
            if v is not None and any(k > 2 or a != (v.rank or 0) - 1 for a in self.axes(v)):
                raise _Blocked("softmax tells heads and positions apart")
        if self.axes(node.inputs[0]):
            self.products.append(node)

    # ---- norms -------------------------------------------------------------------------------------------------------
    def _norm(self, node: Node) -> None:
        x = node.inputs[0]
        assert x is not None and x.rank is not None
        axes = {a % x.rank for a in node.attrs.get("axes") or ()}
        if not self._whole(x, axes) or not set(self.axes(x)) <= axes:
            raise _Blocked("a normalization over other indices too, or along other axes")
        gain, bias = node.input(1), node.input(2)
        if gain is not None and not self._even(gain):
            raise _Blocked(f"{node.name} has a gain per index: fold it into what reads it first")
        if bias is not None and not _zero(bias) and node.op == "layer_norm":
            raise _Blocked(f"{node.name} has a bias per index: fold it into what reads it first")
        self.norms.append(node)
        self.ones = self.ones or node.op == "layer_norm"

    def _pool(self, node: Node) -> None:
        if any(a != 1 for a in self.axes(node.inputs[0])):
            raise _Blocked("a pool slides over the axis")


_CHECKS: dict[str, Callable[[_Check, Node], None]] = {
    **dict.fromkeys(("add", "sub", "addn"), _Check._sum),
    **dict.fromkeys(("mul", "div"), _Check._product),
    **dict.fromkeys(("pow", "square"), _Check._square),
    **dict.fromkeys(("mean", "sum", "norm"), _Check._reduction),
    **dict.fromkeys(("rms_norm", "layer_norm", "lp_normalize"), _Check._norm),
    **dict.fromkeys(("avg_pool", "adaptive_avg_pool"), _Check._pool),
    "linear": _Check._linear,
    "conv": _Check._conv,
    "matmul": _Check._matmul,
    "einsum": _Check._einsum,
    "sdpa": _Check._sdpa,
}
"""Operator -> what it demands of a rotation; raises where it demands too much."""


def _zero(v: Value) -> bool:
    data = v.const()
    return data is not None and not np.asarray(data, np.float64).any()
