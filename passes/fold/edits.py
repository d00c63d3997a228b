"""Changes of constant operands that were found and not yet made: computed in float64, cast once, undone if refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from ...graph.errors import ConstraintError
from ...graph.ir import Graph, Node, Value
from .affine import Refusal, Why, constant
from .operands import FLOATS

Change = Callable[[np.ndarray], np.ndarray]

BEHIND = -1
"""Position of a vector that is to be added behind a node which has no operand for it."""


@dataclass(eq=False)
class Edit:
    """A change of one operand.

    Attributes:
        node, position: the operand; :data:`BEHIND` for an addition behind the node.
        change: float64 to float64.
        default: what stands for an operand that is absent.
    """

    node: Node
    position: int
    change: Change
    default: np.ndarray | None = None


class Edits:
    """A journal of edits, in the order in which they act; ``undo`` takes back those since a ``mark``."""

    def __init__(self) -> None:
        self.journal: list[Edit] = []

    def mark(self) -> int:
        return len(self.journal)

    def undo(self, mark: int) -> None:
        del self.journal[mark:]

    def add(self, node: Node, position: int, change: Change, default: np.ndarray | None = None) -> None:
        self.journal.append(Edit(node, position, change, default))

    def current(self, node: Node, position: int, default: np.ndarray | None = None) -> np.ndarray | None:
        """An operand in float64 with all edits so far; None where it is computed at run time."""
        data = None if position == BEHIND else constant(node, position)
        if data is None and position != BEHIND and node.input(position) is not None:
            return None
        for edit in self.journal:
            if edit.node is node and edit.position == position:
                if data is None:
                    data = edit.default
                assert data is not None
                data = edit.change(data)
        return default if data is None else data

    def slots(self) -> list[tuple[Node, int]]:
        return list(dict.fromkeys((edit.node, edit.position) for edit in self.journal))

    def inserted(self) -> list[Node]:
        """Nodes behind which an addition will stand."""
        return [node for node, position in self.slots() if position == BEHIND]

    def created(self) -> list[Node]:
        """Nodes that get an operand they did not have."""
        return [n for n, position in self.slots() if position != BEHIND and n.input(position) is None]

    def finish(self) -> Finished | Refusal:
        """Everything computed and cast, if every number fits the dtype it is stored in."""
        cast: list[tuple[Node, int, np.ndarray]] = []
        for node, position in self.slots():
            exact = self.current(node, position)
            assert exact is not None
            dtype = stored_dtype(node, position)
            with np.errstate(over="ignore", invalid="ignore"):
                data = exact.astype(dtype)
            if not fits(exact, data):
                what = "the folded weight" if position else "the folded operand"
                return Refusal(f"{what} of {node.name} does not fit its dtype", node.name, Why.RANGE)
            cast.append((node, position, data))
        return Finished(cast)


@dataclass(eq=False)
class Finished:
    """Operands in the dtypes they are stored in, ready to be written."""

    operands: list[tuple[Node, int, np.ndarray]]

    def write(self, graph: Graph) -> list[Node]:
        """Write all; gives the nodes touched, additions made among them."""
        touched = []
        for node, position, data in self.operands:
            touched.append(node)
            if position == BEHIND:
                touched.append(_add_behind(graph, node, data))
            else:
                touched += _put(graph, node, position, data)
        return touched


_CHUNK = 1 << 16
"""Elements compared at a time: they stay in the processor's cache."""


def fits(exact: np.ndarray, cast: np.ndarray) -> bool:
    """Whether a cast array is finite and off by no more than the rounding of its dtype, taken as a whole."""
    wanted, found = exact.reshape(-1), cast.reshape(-1)
    error = power = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, wanted.size, _CHUNK):
            part = wanted[start : start + _CHUNK]
            off = found[start : start + _CHUNK].astype(np.float64)
            off -= part
            error += float(off @ off)
            power += float(part @ part)
    eps = float(ml_dtypes.finfo(cast.dtype).eps)
    return math.isfinite(error) and error <= (2 * eps) ** 2 * power


def stored_dtype(node: Node, position: int) -> np.dtype:
    """The dtype of an operand, or that of the node's output where there is none."""
    value = None if position == BEHIND else node.input(position)
    if value is not None and value.weight is not None:
        return value.weight.numpy().dtype
    name = node.output.dtype
    return np.dtype(getattr(ml_dtypes, name)) if name == "bfloat16" else np.dtype(name)


def alone(value: Value) -> bool:
    """Whether a stored value has one reader and one name, so that changing it changes nothing else."""
    weight = value.weight
    return weight is not None and len(value.uses) == 1 and len(weight.aliases) <= 1 and not value.is_output


def may_copy(node: Node, position: int) -> bool:
    """Whether an operand that others read too may be replaced by a changed copy: vectors may, matrices stay tied."""
    return node.op not in ("conv", "linear", "matmul", "einsum", "gather", "dequantize") or (
        position == 2 and node.op in ("conv", "linear")
    )


def changeable(node: Node, position: int) -> Refusal | None:
    """Why a constant operand may not change under ``node``; None where it may."""
    value = node.input(position)
    if value is None:
        return None
    if value.dtype not in FLOATS and value.weight is not None:
        return Refusal(f"{value.name} is stored as {value.dtype}", node.name, Why.DTYPE)
    if may_copy(node, position) or alone(value):
        return None
    weight = value.weight
    if weight is not None and len(weight.aliases) > 1:
        names = ", ".join(weight.aliases)
        return Refusal(f"the weight of {node.name} is tied under the names {names}", node.name, Why.TIED)
    return Refusal(f"the weight {value.name} is tied: another operator reads it too", node.name, Why.TIED)


def _put(graph: Graph, node: Node, position: int, data: np.ndarray) -> list[Node]:
    value = node.input(position)
    if value is not None and value.weight is not None and alone(value) and value.weight.shape == data.shape:
        graph.set_weight(value.weight, data)
        return []
    trainable = any(v is not None and v.weight is not None and v.weight.trainable for v in node.inputs)
    made = graph.add_weight(_name(node, position), data, trainable=trainable)
    graph.set_input(node, position, made)
    return []


def _name(node: Node, position: int) -> str:
    value = node.input(position)
    if value is not None and value.weight is not None:
        return value.weight.name
    first = node.input(1)
    known = None if first is None or first.weight is None else first.weight.name
    slot = {1: "weight", 2: "bias"}.get(position, f"operand{position}") if node.op not in ("add", "mul") else "constant"
    if known is not None and known.endswith("weight") and position != 1:
        return known.removesuffix("weight") + slot
    return f"{known or node.name}_{slot}"


def _add_behind(graph: Graph, node: Node, data: np.ndarray) -> Node:
    value = graph.add_weight(f"{node.name}_bias", data)
    added = graph.insert("add", [node.output, value], name=f"{node.name}_bias", after=node, scope=node.scope)
    graph.replace_uses(node.output, added.output, except_nodes=[added])
    return added


__all__ = ["BEHIND", "ConstraintError", "Edits", "Finished", "alone", "changeable", "fits"]
