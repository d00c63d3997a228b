"""Substitutions as data: which call takes the place of which nodes, with which arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ...graph.ir import Node, Value

COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """What the substitution depends on.

    Attributes:
        dtype: of float matrix products and of what the operators give.
        sparse24: put 2:4 weights on the sparse tensor cores (16-bit types only).
        two_pass_softmax: use the two-pass softmax.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    sparse24: bool = False
    two_pass_softmax: bool = False

    @property
    def compute(self) -> torch.dtype:
        return COMPUTE[self.dtype]


@dataclass(frozen=True)
class Operand:
    """A value of the graph as an argument: cast to a type, or uint8 shifted by 128 into int8."""

    value: Value
    dtype: torch.dtype | None = None
    shift: bool = False


@dataclass(frozen=True)
class Substitution:
    """One call that takes the place of a few nodes.

    Attributes:
        node: the matrix product (or softmax) it stands for.
        result: the value that it replaces.
        op: name in ``torch.ops.foldline``.
        args: in the operator's order: operands, stored tensors, plain data.
        native: whether the call's result has the type of ``result`` already (else it is cast back).
        about: one line for reports.
        covers: names of further nodes whose work it does.
        item: which of several results it is.
    """

    node: Node
    result: Value
    op: str
    args: tuple[Any, ...]
    native: bool
    about: str
    covers: tuple[str, ...] = ()
    item: int | None = None


@dataclass
class Plan:
    """Substitutions in the order of the graph; ``left`` says why a quantized product stays as it is."""

    substitutions: list[Substitution] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    @property
    def covered(self) -> set[str]:
        """Names of the nodes replaced."""
        return {name for s in self.substitutions for name in (s.node.name, *s.covers)}
