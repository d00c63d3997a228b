"""OpPlacement: how one canonical op takes part in quantization, operand by operand, and under which conditions."""

from __future__ import annotations

from dataclasses import field
from math import prod
from typing import Any, Literal, TypeAlias

from pydantic.dataclasses import dataclass

from ....graph.errors import ConfigError
from ....graph.ir import Node
from .attention import packed_attention
from .formats import STRICT, TensorFormat

Role: TypeAlias = Literal["anchor", "join", "residual", "carry", "table", "weight_only", "float"]

FACTS = frozenset(
    "rank weight_rank float_operands in_channels out_channels kernel depthwise spatial packed_attention".split()
)
"""What a condition may ask of a node beside its attributes."""


@dataclass(frozen=True, config=STRICT)
class OpPlacement:
    """How one canonical op takes part.

    Attributes:
        role: ``anchor`` computes in integers and asks for quantized operands; ``join`` follows when all its operands
            are quantized anyway and its result is wanted quantized (add, concat, ...); ``residual`` is an addition
            fused into the anchor before it: the other operand is quantized, the anchor's result is not; ``carry``
            moves elements without changing them, so Q/DQ commute with it and the result takes the operand's scale
            (max pool, reshape, ...); ``table`` looks rows up in a stored weight (embeddings), which are dequantized
            after the look-up; ``weight_only`` stores the weight as integers and computes in float; ``float`` stays as
            it is.
        data: operand positions that are activations; None means all operands.
        weight: operand position of the stored weight (anchors, tables); None for an anchor that has none.
        bias: operand position of the bias, if it has one.
        bias_dtype: ``int32`` (scale = scale of x times scale of the weight) or ``float32`` (left alone).
        bias_add: an addition of one constant per output channel right behind the op counts as its bias.
        output: whether the result must carry a Q: ``required`` (then everybody reads the quantized result, no reader
            passes the Q by), ``optional`` (only where a consumer asks for it) or ``forbidden`` (only an anchor that
            reads it may ask; a join may not).
        activations: ops that may stand between the op and the Q on its result, fused by the backend.
        behind: ops whose result a ``residual`` is fused into.
        same_scale: operands and result of a join share one scale.
        asks: a join asks for its operands whenever its result is asked for, instead of waiting for them. With one
            scale that is Q moved up across it, which costs no accuracy.
        optional: only where the user asks for products of two activations to be quantized.
        data_format, weight_format: formats for this op where they are not the target's own.
        when: conditions on the node, all of which must hold. A name and what it must be: a value, a list of values, or
            a mapping with any of ``min``, ``max``, ``multiple_of``. Names are canonical attributes and: ``rank`` (of
            operand 0), ``weight_rank``, ``float_operands`` (activations among the operands, the others being
            constants), ``in_channels``, ``out_channels``, ``kernel`` (elements of a convolution's window),
            ``depthwise``, ``spatial`` (a reduction over exactly the axes behind the second), ``packed_attention`` (the
            result is cut into query, key and value).
        reason: why, where it is worth telling the user (``float``).
    """

    role: Role
    data: tuple[int, ...] | None = (0,)
    weight: int | None = None
    bias: int | None = None
    bias_dtype: Literal["int32", "float32"] = "float32"
    bias_add: bool = False
    output: Literal["required", "optional", "forbidden"] = "optional"
    activations: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()
    same_scale: bool = False
    asks: bool = False
    optional: bool = False
    data_format: TensorFormat | None = None
    weight_format: TensorFormat | None = None
    when: dict[str, Any] = field(default_factory=dict)
    reason: str = ""

    def __post_init__(self) -> None:
        needs_weight = self.role in ("table", "weight_only")
        if needs_weight and self.weight is None:
            raise ConfigError(
                f"a rule of role {self.role} names the weight's position", node="weight", expected="0, 1..."
            )
        if self.role == "residual" and not self.behind:
            raise ConfigError("a residual rule names the ops it is fused behind", node="behind", expected="e.g. [conv]")
        for key, wanted in self.when.items():
            if isinstance(wanted, dict) and (not wanted or set(wanted) - {"min", "max", "multiple_of"}):
                raise ConfigError(
                    "a condition is a value, a list, or a mapping", node=f"when.{key}",
                    expected="min, max, multiple_of", found=", ".join(map(str, wanted)) or "nothing",
                )  # fmt: skip
            for name, bound in wanted.items() if isinstance(wanted, dict) else ():
                number = isinstance(bound, (int, float)) and not isinstance(bound, bool)
                if not number or (name == "multiple_of" and not (isinstance(bound, int) and bound >= 1)):
                    raise ConfigError(
                        "a bound is a number, and a multiple of a whole one", node=f"when.{key}.{name}",
                        expected="1 or more" if name == "multiple_of" else "a number", found=repr(bound),
                    )  # fmt: skip

    def unmet(self, node: Node) -> str | None:
        """The first condition of ``when`` that the node does not meet, in words; None if it meets all."""
        for key, wanted in self.when.items():
            found = self._fact(node, key)
            if not _holds(found, wanted):
                return f"{key} is {found}, the target wants {_words(wanted)}"
        return None

    def _fact(self, node: Node, key: str) -> Any:
        x = node.input(0)
        w = node.input(self.weight) if self.weight is not None else None
        shape = None if w is None or w.hint is None else w.hint
        if key == "rank":
            return None if x is None else x.rank
        if key == "float_operands":
            return sum(v is not None and not v.is_const for v in node.inputs)
        if key == "weight_rank":
            return None if shape is None else len(shape)
        if key in ("in_channels", "out_channels"):
            return None if shape is None else channels(node, shape)[key == "out_channels"]
        if key == "kernel":
            return None if shape is None else prod(shape[2:])
        if key == "depthwise":
            groups = node.attrs.get("groups", 1)
            return shape is not None and groups > 1 and groups == channels(node, shape)[0]
        if key == "spatial":  # a reduction over exactly the axes behind the second
            return x is not None and x.rank is not None and sorted(node.attrs.get("axes") or ()) == [*range(2, x.rank)]
        if key == "packed_attention":
            return packed_attention(node)
        return node.attrs.get(key)


def output_axis(node: Node) -> int:
    """The weight axis that indexes output channels (of an embedding table: the features)."""
    if node.op == "conv":
        return 1 if node.attrs.get("transposed") else 0
    if node.op == "gather":
        return 1
    if node.op == "matmul":
        w = node.inputs[1]
        return (w.rank or 2) - 1 if w is not None else 1
    return 1 if node.attrs.get("transposed_weight") else 0


def input_axis(node: Node) -> int:
    """The weight axis that indexes input channels, along which a product sums (of a table: its rows)."""
    if node.op == "matmul":
        return output_axis(node) - 1
    return 1 - output_axis(node)


def channels(node: Node, shape: tuple[int, ...]) -> tuple[int, int]:
    """Input and output channels of a node with a weight of that shape, all groups together."""
    groups = int(node.attrs.get("groups", 1)) if node.op == "conv" else 1
    inner, outer = shape[input_axis(node)], shape[output_axis(node)]
    return (inner, outer * groups) if node.attrs.get("transposed") else (inner * groups, outer)


def _holds(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, (list, tuple)):
        return found in wanted
    if not isinstance(wanted, dict):
        return bool(found == wanted)
    return (
        isinstance(found, (int, float))
        and found >= wanted.get("min", found)
        and found <= wanted.get("max", found)
        and found % wanted.get("multiple_of", 1) == 0
    )


def _words(wanted: Any) -> str:
    if isinstance(wanted, (list, tuple)):
        return " or ".join(map(str, wanted))
    if isinstance(wanted, dict):
        named = {"min": "at least", "max": "at most", "multiple_of": "a multiple of"}
        return " and ".join(f"{named[key]} {value}" for key, value in wanted.items())
    return str(wanted)
