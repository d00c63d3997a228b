"""A walk of an affine map through the graph: forwards to all readers, or backwards to what makes a value, to the sinks.

The walk changes nothing. It collects the edits of the constants that absorb the map, and every node it passed or relied
on: together these are the window of the rewrite.
"""

from __future__ import annotations

from ...graph.ir import Node, Value
from ...graph.ops.carry import PICKING
from ...graph.ops.table import get_rule
from ..rewrite import Env
from . import sinks, travel
from .affine import Affine, Refusal, Why
from .edits import Edits
from .operands import FLOATS

LONGEST = 48
"""Operators that one walk passes at most; this keeps many walks through one long graph linear in its size."""


class Walk:
    """One attempt to absorb a map.

    Attributes:
        edits: the changes found so far.
        window: every node passed, changed or relied on, in the order of the walk.
    """

    def __init__(self, env: Env, *, arithmetic: bool = True) -> None:
        """``arithmetic``: also let constants that are added or multiplied further down take the map."""
        self.env = env
        self.arithmetic = arithmetic
        self.edits = Edits()
        self.window: dict[Node, None] = {}
        self.steps = 0

    # ---- backwards -----------------------------------------------------------------------------------------------
    def up(self, reader: Node, position: int, affine: Affine) -> Refusal | None:
        """Let ``reader`` read, at ``position``, its operand under ``affine``; None if that could be arranged."""
        if affine.identity:
            return None
        value = reader.inputs[position]
        assert value is not None
        if value.is_const:
            return sinks.into_constant(self.edits, reader, position, affine)
        producer = value.producer
        if producer is None:
            return Refusal(f"{value.name} is an input of the graph", why=Why.GRAPH_INPUT)
        if (blocked := self._private(value, reader, position, affine)) is not None:
            return blocked
        if (blocked := self._step(producer)) is not None:
            return blocked
        if producer.op in sinks.UP:
            return sinks.UP[producer.op](self, producer, affine)
        first = producer.inputs[0] if producer.inputs else None
        shared = producer.op in PICKING and first is not None and not first.is_const and len(_data_uses(first)) > 1
        ways = travel.up(producer, value.index, affine, shared)
        if isinstance(ways, Refusal):
            return ways
        refusal: Refusal | None = None
        for maps in ways:
            mark, seen = self.edits.mark(), list(self.window)
            refusal = None
            for k, moved in maps:
                refusal = self.up(producer, k, moved)
                if refusal is not None:
                    break
            if refusal is None:
                return None
            self.edits.undo(mark)
            self.window = dict.fromkeys(seen)
        return refusal

    def _private(self, value: Value, reader: Node, position: int, affine: Affine) -> Refusal | None:
        """Why a value may not change under ``reader``: somebody else sees a part of it that the map changes."""
        if value.is_output:
            return Refusal(f"{value.name} is an output of the graph", why=Why.GRAPH_OUTPUT)
        if id(value) in self.env.captured:
            return Refusal(f"{value.name} is read by a subgraph", why=Why.CAPTURED)
        for user, k in value.uses:
            if user is reader and k == position:
                continue
            if user.op != "shape_of" and not self._blind(user, k, affine):
                return Refusal(f"{value.name} has a second consumer, {user.name}", user.name, Why.SECOND_CONSUMER)
            self.window[user] = None
        return None

    def _blind(self, user: Node, position: int, affine: Affine) -> bool:
        """Whether a reader sees nothing of the map: it picks where the map is the identity, or nobody reads it.

        (A float that is made and not read is no size either, so that attributes computed at run time do not read it.)
        """

        def read(v: Value) -> bool:
            return bool(v.uses) or v.is_output or id(v) in self.env.captured

        if all(v.dtype in FLOATS and not read(v) for v in user.outputs):
            return bool(user.outputs) and get_rule(user.op) is not None
        if user.op not in ("slice", "select", "gather", "split", "unbind"):
            return False
        maps = travel.down(user, position, affine)
        if isinstance(maps, Refusal):
            return False
        return all(m.identity or not read(user.outputs[k]) for k, m in maps)

    # ---- forwards ------------------------------------------------------------------------------------------------
    def down(self, value: Value, affine: Affine) -> Refusal | None:
        """Let every reader of ``value`` do what ``affine`` did to it; None if that could be arranged."""
        if affine.identity:
            return None
        if value.is_output:
            return Refusal(f"{value.name} is an output of the graph", why=Why.GRAPH_OUTPUT)
        if id(value) in self.env.captured:
            return Refusal(f"{value.name} is read by a subgraph", why=Why.CAPTURED)
        readers = _data_uses(value)
        if not readers:
            return Refusal("nothing reads it")
        for user, _ in value.uses:
            self.window[user] = None
        seen: set[Node] = set()
        for user, position in readers:
            if user in seen:
                return Refusal(f"{user.name} reads it twice", user.name, Why.COMMUTE)
            seen.add(user)
            if (blocked := self._into(user, position, affine)) is not None:
                return blocked
        return None

    def _into(self, user: Node, position: int, affine: Affine) -> Refusal | None:
        if (blocked := self._step(user)) is not None:
            return blocked
        if user.op in sinks.DOWN and (self.arithmetic or user.op not in sinks.ARITHMETIC):
            left = sinks.DOWN[user.op](self, user, position, affine)
            if isinstance(left, Refusal):
                return left
            if left is None:
                return None
            affine = left
            if affine.identity:
                return None
        maps = travel.down(user, position, affine)
        if isinstance(maps, Refusal):
            return maps
        for k, moved in maps:
            output = user.outputs[k]
            if output.uses or output.is_output or id(output) in self.env.captured:
                if (blocked := self.down(output, moved)) is not None:
                    return blocked
        return None

    def _step(self, node: Node) -> Refusal | None:
        self.window[node] = None
        self.steps += 1
        if self.steps > LONGEST:
            return Refusal(f"the map would have to pass more than {LONGEST} operators", node.name, Why.SIZE)
        return None


def _data_uses(value: Value) -> list[tuple[Node, int]]:
    """The uses that read numbers: a size read from a value does not change with its numbers."""
    return [(user, position) for user, position in value.uses if user.op != "shape_of"]
