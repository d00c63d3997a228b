"""Canonical reading of native ONNX nodes: the rule registry and what a rule may ask about a node."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir

from . import native
from .eval import EVALUATED
from .shapes import ShapeTable


@dataclass(frozen=True)
class Canon:
    """One native node in canonical terms.

    Attributes:
        op: canonical op.
        operands: native input position of each canonical operand, None where an optional one is absent.
        attrs: canonical attributes.
        sizes: native input positions that feed attributes.
    """

    op: str
    operands: tuple[int | None, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[int, ...] = ()


class Native:
    """What a rule may ask: attributes, constants, sizes and shapes of one native node."""

    def __init__(self, node: ir.Node, table: ShapeTable) -> None:
        self.node = node
        self.table = table

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        imports = self.table.model.graph.opset_imports
        return imports.get("", 0) or imports.get("ai.onnx", 0)

    def attr(self, name: str, default: Any = None) -> Any:
        return native.attribute(self.node, name, default)

    def value(self, i: int) -> ir.Value | None:
        inputs = self.node.inputs
        return inputs[i] if i < len(inputs) else None

    def has(self, i: int) -> bool:
        return self.value(i) is not None

    def used(self, i: int) -> bool:
        """Whether output i exists and anything reads it."""
        outputs = self.node.outputs
        return i < len(outputs) and bool(outputs[i].name) and (bool(outputs[i].uses()) or outputs[i].is_graph_output())

    def every(self, limit: int | None = None) -> tuple[int | None, ...]:
        """Positions of all operands (of the first ``limit``), trailing absent ones dropped."""
        return _every(self.node, limit)

    def hint(self, i: int = 0) -> tuple[int, ...] | None:
        value = self.value(i)
        info = None if value is None else self.table.info.get(value)
        return None if info is None else info.a

    def out(self, i: int = 0) -> tuple[int, ...] | None:
        info = self.table.info.get(self.node.outputs[i])
        return None if info is None else info.a

    def rank(self, i: int = 0) -> int | None:
        value = self.value(i)
        info = None if value is None else self.table.info.get(value)
        if info is None:
            return None
        return None if info.shape is None else len(info.shape)

    def static(self, i: int, axis: int) -> int | None:
        """Size of an axis of input i where it is the same in every run."""
        value = self.value(i)
        info = None if value is None else self.table.info.get(value)
        size = None if info is None or info.shape is None else info.shape[axis]
        return size if isinstance(size, int) else None

    def dtype(self, i: int = 0) -> str:
        value = self.value(i)
        info = None if value is None else self.table.info.get(value)
        return "" if info is None else info.dtype

    def is_const(self, i: int) -> bool:
        value = self.value(i)
        return value is not None and native.constant_tensor(value) is not None

    def const(self, i: int) -> np.ndarray | None:
        """A small operand that is the same in every run, computed or stored."""
        value = self.value(i)
        elements = None if value is None else self.table.elements.get(value)
        return elements.a if elements is not None and elements.all_known else None

    def ints(self, i: int) -> list[int | None] | None:
        """Elements of a size operand, None where dynamic; None if even their number is unknown."""
        value = self.value(i)
        elements = None if value is None else self.table.elements.get(value)
        if elements is not None:
            return elements.ints()
        shape = self.hint(i)
        if shape is None or len(shape) > 1:
            return None
        return [None] * (shape[0] if shape else 1)

    def hints(self, i: int) -> list[int] | None:
        """Concrete elements of a size operand under the hints."""
        value = self.value(i)
        elements = None if value is None else self.table.elements.get(value)
        return None if elements is None else [int(x) for x in elements.a.ravel()]

    def axes_operand(self, name: str, i: int) -> list[int] | None:
        """A list of known ints that is attribute ``name`` in old opsets and input i in new ones; None if absent."""
        if self.attr(name) is not None:
            return [int(a) for a in self.attr(name)]
        data = self.const(i)
        return None if data is None else [int(a) for a in data.ravel()]

    def sizes(self, *positions: int) -> tuple[int, ...]:
        return tuple(i for i in positions if self.has(i))


Rule = Callable[[Native], Canon | None]
RULES: dict[str, Rule] = {}
PLAIN: dict[str, str] = {}
"""Native op -> canonical op with the same operands and no attributes: what most nodes of most models are."""


def rule(*op_types: str) -> Callable[[Rule], Rule]:
    """Register the reading of native op types of the default domain; a rule returns None for "opaque"."""

    def register(function: Rule) -> Rule:
        for op_type in op_types:
            RULES[op_type] = function
        return function

    return register


def axis_of(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def axes_of(axes: Iterable[int], rank: int) -> list[int]:
    return [axis_of(int(a), rank) for a in axes]


@cache
def _complete() -> None:
    """Let the modules that hold the rules register them."""
    from . import contrib, ops_data, ops_math, ops_nn  # noqa: F401


@cache
def _plain(op: str, operands: tuple[int | None, ...]) -> Canon:
    """One object for all nodes that read alike."""
    return Canon(op, operands)


def _every(node: ir.Node, limit: int | None = None) -> tuple[int | None, ...]:
    inputs = node.inputs[:limit]
    if None not in inputs:
        return tuple(range(len(inputs)))
    found: list[int | None] = [i if v is not None else None for i, v in enumerate(inputs)]
    while found and found[-1] is None:
        found.pop()
    return tuple(found)


def canonicalize(node: ir.Node, table: ShapeTable) -> Canon:
    """The canonical form of a native node. Total: what no rule knows is "opaque"."""
    _complete()
    op_type, domain, functions = node.op_type, node.domain, table.model.functions
    found = None
    if not functions or node.op_identifier() not in functions:
        if domain in native.STANDARD_DOMAINS:
            if op_type in EVALUATED and computes_sizes(node, table):
                return _plain("scalar", _every(node))
            if op_type in PLAIN:
                return _plain(PLAIN[op_type], _every(node))
            if op_type in RULES:
                found = RULES[op_type](Native(node, table))
        elif (name := f"{domain}::{op_type}") in RULES:
            found = RULES[name](Native(node, table))
    return found if found is not None else _plain("opaque", _every(node))


def computes_sizes(node: ir.Node, table: ShapeTable) -> bool:
    """Arithmetic on sizes: all operands descend from Shape or are constants, and the result is a short list."""
    if node.op_type not in EVALUATED or node.op_type == "Range":
        return False
    elements = table.elements
    out = elements.get(node.outputs[0])
    if out is not None:
        integer = np.issubdtype(out.a.dtype, np.integer) or node.op_type not in ("Expand", "ConstantOfShape", "Tile")
        return out.sized and out.a.ndim <= 1 and out.a.size <= 64 and integer
    sized = False
    rest = []
    for value in node.inputs:
        known = elements.get(value) if value is not None else None
        if known is not None and known.sized:
            sized = True
        elif value is not None:
            rest.append(value)
    if not sized:
        return False
    info = table.info.get(node.outputs[0])
    small = info is not None and info.a is not None and len(info.a) <= 1 and prod(info.a) <= 64
    return small and all(native.constant_tensor(v) is not None for v in rest)
