"""Two moves in a row that are one move or none: transposes, reshapes, casts, squeezes, slices, pads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from ...graph.ir import Graph, Node, Value
from ..rewrite import Env, Refusal, Rewrite, Rule, Why
from .common import FLOATS, INTEGERS, opset, same_type, stands_for, static

RESHAPING = ("reshape", "squeeze", "unsqueeze")


def rewired(node: Node, x: Value, reason: str, window: Sequence[Node], **attrs: Any) -> Rewrite:
    """Let ``node`` read ``x``, under other attributes."""

    def apply(graph: Graph) -> Sequence[Node]:
        graph.set_input(node, 0, x)
        if attrs:
            graph.set_attr(node, **attrs)
        return [node]

    return Rewrite([node, *window], apply, "merged", reason)


def replaced(
    node: Node, op: str, x: Value, attrs: dict[str, Any], reason: str, window: Sequence[Node], env: Env
) -> Rewrite | Refusal:
    """Put a new node of ``op`` over ``x`` in the place of ``node``."""
    if id(node.output) in env.captured:
        return Refusal(f"{node.output.name} is read by a subgraph", why=Why.CAPTURED)

    def apply(graph: Graph) -> Sequence[Node]:
        made = graph.insert(op, [x], attrs, name=f"{node.name}_merged", after=node, scope=node.scope)
        graph.replace_uses(node.output, made.output)
        return [made]

    return Rewrite([node, *window], apply, "merged", reason)


class TransposePair(Rule):
    """Merge a transpose of a transpose.

    Identity: ``transpose(transpose(x, p), q) = transpose(x, [p[i] for i in q])``; nothing is left where that is the
    identity permutation.
    Conditions: both permutations are known. Other readers of the first transpose keep it.
    Refuses: as no_op does where nothing is left.
    """

    name: ClassVar[str] = "transpose_pair"
    ops: ClassVar[tuple[str, ...]] = ("transpose",)

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        first = _before(node, ("transpose",))
        if first is None:
            return None
        x, inner, outer = first.inputs[0], first.attrs["perm"], node.attrs["perm"]
        if x is None or len(inner) != len(outer):
            return None
        perm = [inner[i] for i in outer]
        if perm == list(range(len(perm))):
            return stands_for(node, x, env, "two transposes cancel", [first])
        return rewired(node, x, "two transposes are one", [first], perm=perm)


class ReshapePair(Rule):
    """A reshape does not see the reshapes before it.

    Identity: ``reshape(reshape(x, a), b) = reshape(x, b)``, for squeeze, unsqueeze and flatten in the place of the
    first one too; nothing is left where x has the final shape.
    Conditions: of the final shape at most one size depends on the input, and none is 0 (it is then inferred from the
    number of elements); no size of it is computed at run time.
    Refuses: as no_op does where nothing is left.
    """

    name: ClassVar[str] = "reshape_pair"
    ops: ClassVar[tuple[str, ...]] = RESHAPING

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        first = _before(node, RESHAPING)
        made = node.output
        if first is None or first.inputs[0] is None or made.shape is None or node.dynamic:
            return None
        x = first.inputs[0]
        if static(x) is not None and static(x) == static(made):
            return stands_for(node, x, env, "two reshapes cancel", [first])
        if node.op != "reshape":
            axes, before = node.attrs["axes"], first.attrs.get("axes")
            if {first.op, node.op} == {"squeeze", "unsqueeze"} and axes == before and _squeezes_ones(node, first):
                return stands_for(node, x, env, f"{first.op} and {node.op} cancel", [first])
            return None
        shape = [d if isinstance(d, int) else None for d in made.shape]
        if opset(env.graph) < 5:  # the shape was an attribute
            return None
        if shape.count(None) > 1 or 0 in shape or (x.shape is not None and 0 in x.shape) or x.is_const:
            return None
        if env.graph.kind == "fx" and None not in shape and static(x) is None:
            return None  # torch would fix the size that x leaves open
        return replaced(node, "reshape", x, {"shape": shape}, "a reshape of a reshape", [first], env)


def _squeezes_ones(node: Node, first: Node) -> bool:
    """Whether the squeeze of the pair provably removes axes of length 1 that it names."""
    squeeze = node if node.op == "squeeze" else first
    x = squeeze.inputs[0]
    if x is None or x.shape is None:
        return False
    return all(x.shape[axis] == 1 for axis in squeeze.attrs["axes"])


class CastPair(Rule):
    """Merge a cast of a lossless cast.

    Identity: if every number of dtype A has an exact image in dtype B, ``cast(cast(x: A, B), C) = cast(x, C)``;
    nothing is left where C is A.
    Conditions: A to B is lossless (bool to anything, integers to wider integers or to floats with enough digits,
    floats to wider floats), and C is A, or a float and A is one, or A to C is lossless too.
    Refuses: everything else: a cast through a narrower dtype rounds or wraps, and that is meant.
    """

    name: ClassVar[str] = "cast_pair"
    ops: ClassVar[tuple[str, ...]] = ("cast",)

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        first = _before(node, ("cast",))
        if first is None or first.inputs[0] is None:
            return None
        x = first.inputs[0]
        a, b, c = x.dtype, first.output.dtype, node.output.dtype
        if not lossless(a, b):
            return Refusal(f"the cast from {a} to {b} loses digits or range", first.name, Why.DTYPE)
        if c == a:
            return stands_for(node, x, env, f"{a} to {b} and back", [first])
        if (a in FLOATS and c in FLOATS) or lossless(a, c):
            return rewired(node, x, f"the cast from {a} to {b} changes no number", [first])
        return None


DIGITS = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}
WIDER = {"float16": ("float32", "float64"), "bfloat16": ("float32", "float64"), "float32": ("float64",)}


def lossless(source: str, target: str) -> bool:
    """Whether every number of one dtype has an exact image in the other."""
    if source == target:
        return source in (*FLOATS, *INTEGERS, "bool")
    if source == "bool":
        return target in (*FLOATS, *INTEGERS)
    if source in INTEGERS:
        unsigned, bits = source.startswith("u"), int(source.lstrip("uint"))
        if target in FLOATS:
            return bits - (not unsigned) <= DIGITS[target]  # -2**(bits - 1) is a power of two
        if target not in INTEGERS:
            return False
        wide = int(target.lstrip("uint"))
        return wide > bits and (unsigned or not target.startswith("u"))
    return target in WIDER.get(source, ())


class SlicePair(Rule):
    """Merge a slice of a slice along the same axes.

    Identity: ``x[a:b][c:d] = x[a + c : min(b, a + d)]`` on every axis (all bounds non-negative, steps 1).
    Conditions: both name the same axes in the same order with bounds that are known and count from the start.
    Refuses: bounds that count from the end of an axis of unknown length, other steps.
    """

    name: ClassVar[str] = "slice_pair"
    ops: ClassVar[tuple[str, ...]] = ("slice",)

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        first = _before(node, ("slice",))
        if first is None or first.inputs[0] is None or node.dynamic or first.dynamic:
            return None
        inner, outer = first.attrs, node.attrs
        if inner["axes"] != outer["axes"] or len(set(inner["axes"])) != len(inner["axes"]):
            return None
        if first.inputs[0].is_const or opset(env.graph) < 10:  # the bounds were attributes
            return None
        starts: list[int] = []
        ends: list[int | None] = []
        for (a, b, s), (c, d, t) in zip(_bounds(inner), _bounds(outer), strict=True):
            if s != 1 or t != 1 or a is None or c is None or min(a, c, b or 0, d or 0) < 0:
                return Refusal("bounds that count from the end, or steps", first.name, Why.SHAPE)
            starts.append(a + c)
            ends.append(b if d is None else a + d if b is None else min(b, a + d))
        attrs = {"axes": list(outer["axes"]), "starts": starts, "ends": ends, "steps": [1] * len(starts)}
        if env.graph.kind == "fx":
            return rewired(node, first.inputs[0], "a slice of a slice", [first], starts=starts, ends=ends)
        return replaced(node, "slice", first.inputs[0], attrs, "a slice of a slice", [first], env)


def _bounds(attrs: dict[str, Any]) -> list[tuple[Any, Any, Any]]:
    return list(zip(attrs["starts"], attrs["ends"], attrs["steps"], strict=True))


class PadPair(Rule):
    """Merge a constant pad of a constant pad.

    Identity: ``pad(pad(x, p, v), q, v) = pad(x, p + q, v)``.
    Conditions: mode constant, the same value, all amounts known and none negative (a negative one crops).
    Refuses: other modes and values.
    """

    name: ClassVar[str] = "pad_pair"
    ops: ClassVar[tuple[str, ...]] = ("pad",)

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        first = _before(node, ("pad",))
        if first is None or first.inputs[0] is None or first.inputs[0].is_const or opset(env.graph) < 11:
            return None
        if not (plain_pad(first) and plain_pad(node)) or first.attrs["value"] != node.attrs["value"]:
            return Refusal("modes, values or amounts that do not add up", first.name, Why.OTHER)
        both = zip(first.attrs["pads"], node.attrs["pads"], strict=True)
        pads = [(a + c, b + d) for (a, b), (c, d) in both]
        if env.graph.kind == "fx":
            return rewired(node, first.inputs[0], "a pad of a pad", [first], pads=pads)
        attrs = {"pads": pads, "mode": "constant", "value": node.attrs["value"]}
        return replaced(node, "pad", first.inputs[0], attrs, "a pad of a pad", [first], env)


def plain_pad(node: Node) -> bool:
    """A constant pad by known amounts, none of which crops, with a known value."""
    a = node.attrs
    amounts = [n for pair in a["pads"] for n in pair]
    plain = a.get("mode", "constant") == "constant" and a.get("value") is not None and not node.dynamic
    return plain and all(n is not None and n >= 0 for n in amounts)


class ConcatOfSplit(Rule):
    """Remove a concat that puts the parts of a split together again.

    Identity: ``concat(split(x, axis), axis) = x``.
    Conditions: all parts of one split, each once, in order, along the same axis; dtype and rank of x are known.
    Refuses: as no_op does.
    """

    name: ClassVar[str] = "concat_of_split"
    ops: ClassVar[tuple[str, ...]] = ("concat",)

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        first = _before(node, ("split",))
        if first is None or first.inputs[0] is None or first.attrs["axis"] != node.attrs["axis"]:
            return None
        if len(first.outputs) != len(first.attrs["sizes"]) or len(node.inputs) != len(first.outputs):
            return None
        if any(v is not part for v, part in zip(node.inputs, first.outputs, strict=True)):
            return None
        if not same_type(first.inputs[0], node.output):
            return None
        return stands_for(node, first.inputs[0], env, "all parts of a split, in order", [first])


class SplitOfConcat(Rule):
    """Remove a split that takes a concat apart again.

    Identity: ``split(concat(a, b, ...), axis) = a, b, ...`` where every part is as long as its operand.
    Conditions: the lengths of the operands along the axis are known and are the sizes of the split, in order; the
    concat may have other readers.
    Refuses: a part that is a graph output or read by a subgraph.
    """

    name: ClassVar[str] = "split_of_concat"
    ops: ClassVar[tuple[str, ...]] = ("split",)

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        first = _before(node, ("concat",))
        if first is None or first.attrs["axis"] != node.attrs["axis"] or len(first.inputs) != len(node.outputs):
            return None
        axis = node.attrs["axis"]
        lengths = [None if v is None or v.shape is None else v.shape[axis] for v in first.inputs]
        if lengths != list(node.attrs["sizes"]) or not all(isinstance(n, int) for n in lengths):
            return None
        for made in node.outputs:
            if made.is_output or id(made) in env.captured:
                return Refusal(f"{made.name} is an output, or read by a subgraph", why=Why.GRAPH_OUTPUT)
        pairs = [(made, v) for made, v in zip(node.outputs, first.inputs, strict=True) if v is not None]
        if not all(same_type(made, v) for made, v in pairs):
            return None

        def apply(graph: Graph) -> None:
            for made, value in pairs:
                graph.replace_uses(made, value)

        return Rewrite([node, first], apply, "removed", "takes a concat apart again")


def _before(node: Node, ops: Sequence[str]) -> Node | None:
    """What makes operand 0, if it is one of these ops."""
    x = node.input(0)
    first = None if x is None else x.producer
    return first if first is not None and first.op in ops else None


class SizeOfReshape(Rule):
    """Write a reshape whose target is computed at run time as one by a constant target (ONNX).

    Identity: ``reshape(x, [a, n, b]) = reshape(x, [a, -1, b])`` where a and b are known and n is whatever is left.
    Conditions: of the target exactly one size depends on the input, the others are known and not 0.
    Refuses: two such sizes. The nodes that computed the target go if nothing else reads them.
    """

    name: ClassVar[str] = "size_of_reshape"
    ops: ClassVar[tuple[str, ...]] = ("reshape",)

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        shape, x = node.attrs.get("shape"), node.inputs[0]
        if not node.dynamic or shape is None or x is None or env.graph.kind != "onnx" or opset(env.graph) < 5:
            return None
        if shape.count(None) != 1 or 0 in shape or x.shape is None or 0 in x.shape:
            return Refusal("more than one size of the target depends on the input", why=Why.SHAPE)
        return replaced(
            node, "reshape", x, {"shape": list(shape)}, "its one open size follows from the others", [], env
        )


PAIR_RULES: list[Rule] = [
    TransposePair(), ReshapePair(), CastPair(), SlicePair(), PadPair(), ConcatOfSplit(), SplitOfConcat(),
    SizeOfReshape(),
]  # fmt: skip

__all__ = ["PAIR_RULES", "lossless", "plain_pad"]
