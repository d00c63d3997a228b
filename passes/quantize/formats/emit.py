"""Packed codes in a graph: unpacked by tables, with nodes that both front ends spell, shared tables stored once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ....graph.ir import Graph, Node, Value
from .layout import Layout
from .packing import byte_table, planes
from .scales import Scales, e4m3_table, power_table


@dataclass
class Emitter:
    """Inserts dequantization nodes at the start of one graph, one after another.

    A byte is unpacked by one Gather of a table of 256 rows, which costs no operator newer than opset 13 and gives the
    same numbers in every runtime.

    Attributes:
        last: the node inserted last.
        bytes: of everything stored so far.
    """

    graph: Graph
    scope: str = ""
    last: Node | None = None
    bytes: int = 0
    _shared: dict[str, Value] = field(default_factory=dict)

    def node(
        self, op: str, inputs: Sequence[Value | None], attrs: dict[str, Any] | None = None, name: str = ""
    ) -> Value:
        """Insert one node behind the ones before."""
        first = next(v for v in inputs if v is not None)
        named = name or f"{first.name}_{op}"
        made = self.graph.insert(op, inputs, attrs or {}, name=named, after=self.last, scope=self.scope)
        self.last = made
        return made.output

    def store(self, name: str, data: np.ndarray) -> Value:
        """A stored tensor."""
        self.bytes += data.nbytes
        return self.graph.add_weight(name, np.ascontiguousarray(data).reshape(data.shape))

    def shared(self, name: str, data: np.ndarray) -> Value:
        """A stored tensor that all weights share under this name."""
        if name not in self._shared:
            self._shared[name] = self.store(name, data)
        return self._shared[name]

    def table(self, data: np.ndarray, name: str) -> Value:
        """A table of numbers; one named without a weight's name is shared."""
        if name.endswith("_table"):
            return self.store(name, data)
        return self.shared(f"foldline_{name}_table", data)

    def codes(self, packed: Sequence[np.ndarray], bits: int, count: int, name: str) -> Value:
        """int32 [..., count] from planes of packed codes [..., bytes]."""
        total, shift = None, 0
        for i, (plane, width) in enumerate(zip(packed, planes(bits), strict=True)):
            stored = self.store(name if len(packed) == 1 else f"{name}_{i}", plane)
            part = self.cast(stored, "int32")
            if width < 8:
                per = 8 // width
                # The plane's place in the code is part of the table, so that planes only need adding.
                table = byte_table(width).astype(np.int32) << shift
                table = table.astype(np.uint8) if shift + width <= 8 else table
                label = f"foldline_unpack_{width}bit" + (f"_at_{shift}" if shift else "")
                part = self.cast(self.take(self.shared(label, table), part), "int32")
                part = self.reshape(part, (*plane.shape[:-1], plane.shape[-1] * per))
                if plane.shape[-1] * per != count:
                    part = self.cut(part, plane.ndim - 1, count)
            elif shift:
                part = self.node("mul", [part, self.shared(f"foldline_two_to_{shift}", np.array([2**shift], np.int32))])
            total = part if total is None else self.node("add", [total, part])
            shift += width
        assert total is not None
        return total

    def scales(self, scales: Scales, name: str) -> Value:
        """float32 [rows, blocks]."""
        stored = self.store(name, scales.stored)
        if scales.kind == "float32":
            return stored
        if scales.kind == "float16":
            return self.cast(stored, "float32")
        table = ("e8m0", power_table()) if scales.kind == "e8m0" else ("e4m3", e4m3_table())
        found = self.take(self.shared(f"foldline_{table[0]}_table", table[1]), self.cast(stored, "int32"))
        if scales.kind == "e4m3":
            found = self.mul(found, self.store(f"{name}_factor", np.asarray([scales.tensor], np.float32)))
        return found

    # ---- single operators ----------------------------------------------------------------------------------------
    def take(self, table: Value, indices: Value) -> Value:
        return self.node("gather", [table, indices], {"axis": 0}, f"{indices.name}_lookup")

    def cast(self, x: Value, dtype: str) -> Value:
        return x if x.dtype == dtype else self.node("cast", [x], {"dtype": dtype})

    def reshape(self, x: Value, shape: tuple[int, ...]) -> Value:
        return x if x.hint == tuple(shape) else self.node("reshape", [x], {"shape": list(shape)})

    def cut(self, x: Value, axis: int, stop: int) -> Value:
        return self.node("slice", [x], {"axes": [axis], "starts": [0], "ends": [stop], "steps": [1]})

    def mul(self, a: Value, b: Value) -> Value:
        return self.node("mul", [a, b])

    def add(self, a: Value, b: Value) -> Value:
        return self.node("add", [a, b])

    def sub(self, a: Value, b: Value) -> Value:
        return self.node("sub", [a, b])

    def finish(self, x: Value, layout: Layout, columns: int) -> Value:
        """[rows, (blocks, block) of ``columns``] back to the weight's shape."""
        if columns != layout.columns:
            x = self.cut(self.reshape(x, (layout.rows, columns)), 1, layout.columns)
        x = self.reshape(x, layout.moved)
        if layout.permutation != tuple(range(len(layout.shape))):
            x = self.node("transpose", [x], {"perm": list(layout.permutation)})
        return x
