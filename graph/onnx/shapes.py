"""Shapes of an ONNX graph: the symbolic one and two concrete ones per value, by one forward walk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ..errors import ConstraintError
from ..ir import Dim
from . import native
from .doubt import doubted
from .eval import EVALUATED, LIMIT, Elements, evaluate
from .node_infer import Memo, infer_node

Sizes = tuple[int, ...]
BATCH = 7
PRIMES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)
IMAGE = {3: 224, 4: 224, 5: 32}
SIZED = EVALUATED | {"Shape", "Size"}
"""Operators whose results may be known as numbers."""


class Info(NamedTuple):
    """What is known about one value: symbolic shape, concrete shape in both worlds, dtype name ("" if unknown)."""

    shape: tuple[Dim, ...] | None
    a: Sizes | None
    b: Sizes | None
    dtype: str


class ShapeTable:
    """Shapes, hints and small known tensors of every value of the main graph.

    World ``a`` gives the hints. World ``b`` uses other sizes for the dynamic dimensions; a dimension that is equal in
    both is static, one that is not gets the symbol whose sizes it has (or a new symbol).
    """

    def __init__(self, model: ir.Model, sizes: Mapping[str, Sizes] | None = None) -> None:
        self.model = model
        self.symbols: dict[str, tuple[int, int]] = {}
        self.names: dict[tuple[int, int], str] = {}
        self.info: dict[ir.Value, Info] = {}
        self.elements: dict[ir.Value, Elements] = {}
        self.notes: list[str] = []
        self.declared: set[str] = set()
        self._resolved: dict[str, tuple[int, int] | None] = {}
        self.memo: Memo = {}
        self._seed(sizes or {})

    # ---- inputs --------------------------------------------------------------------------------------------
    def _seed(self, sizes: Mapping[str, Sizes]) -> None:
        primes = iter(PRIMES * 64)
        pending: list[tuple[ir.Value, list[str | int]]] = []
        for value in self.model.graph.inputs:
            if value.shape is None:
                given = sizes.get(value.name or "")
                if given is not None:
                    pending.append((value, [f"{value.name}.{i}" for i in range(len(given))]))
                    for i, size in enumerate(given):
                        self._bind(f"{value.name}.{i}", int(size), value)
                continue
            dims: list[str | int] = [
                d if isinstance(d, int) else (d.value or f"{value.name}.{i}") for i, d in enumerate(value.shape)
            ]
            self.declared |= {d.value for d in value.shape if not isinstance(d, int) and d.value}
            given_shape = sizes.get(value.name or "")
            if given_shape is not None:
                if len(given_shape) != len(dims):
                    raise ConstraintError(
                        "example input has the wrong rank", value=value.name, expected=dims, found=tuple(given_shape)
                    )
                for i, (d, size) in enumerate(zip(dims, given_shape, strict=True)):
                    if isinstance(d, str):
                        self._bind(d, int(size), value)
                    elif d != size:
                        raise ConstraintError(
                            f"example input does not fit the declared size of axis {i}",
                            value=value.name, expected=dims, found=tuple(given_shape),
                        )  # fmt: skip
            pending.append((value, dims))
        for value, dims in pending:
            default = self.model.graph.initializers.get(value.name or "")
            if default is not None and default.const_value is not None:
                self._default_sizes(dims, native.tensor_shape(default.const_value))
            for i, d in enumerate(dims):
                if isinstance(d, int) or d in self.symbols:
                    continue
                image = (
                    i >= 2 and isinstance(dims[1], int) and value.dtype is not None and value.dtype.is_floating_point()
                )
                if i == 0:
                    self.symbols[d] = (BATCH, BATCH - 2)
                elif image and len(dims) in IMAGE:
                    self.symbols[d] = (IMAGE[len(dims)], IMAGE[len(dims)] + 32)
                else:
                    p = next(primes)
                    self.symbols[d] = (p, p + 2)
        for symbol, pair in self.symbols.items():
            self.names.setdefault(pair, symbol)
        for value, dims in pending:
            a, b = ([d if isinstance(d, int) else self.symbols[d][w] for d in dims] for w in (0, 1))
            self.info[value] = Info(tuple(dims), tuple(a), tuple(b), native.dtype_name(value.dtype))
        for value in self.model.graph.inputs:
            self.info.setdefault(value, Info(None, None, None, native.dtype_name(value.dtype)))

    def _bind(self, symbol: str, size: int, value: ir.Value) -> None:
        old = self.symbols.get(symbol)
        if old is not None and old[0] != size:
            raise ConstraintError(
                f"example inputs give two sizes to the dimension '{symbol}'",
                value=value.name, expected=old[0], found=size,
            )  # fmt: skip
        self.symbols[symbol] = (size, size + 2)

    def _default_sizes(self, dims: list[str | int], sizes: Sizes) -> None:
        for d, size in zip(dims, sizes, strict=False):
            if isinstance(d, str):
                self.symbols.setdefault(d, (size, size + 2))

    # ---- the walk ------------------------------------------------------------------------------------------
    def load(self) -> None:
        """First walk: shapes stored in the file are used where they resolve, the others are inferred."""
        self._constants()
        missing = [node for node in self.model.graph if not self.visit(node, stored=True)]
        self._complete(missing)

    def update(self, dirty: Iterable[ir.Node], changed: Iterable[ir.Value]) -> None:
        """Walk again after edits: recomputes ``dirty`` nodes and everything behind a value whose shape changed."""
        dirty, moved = set(dirty), set(changed)
        moved |= self._constants()
        missing: list[ir.Node] = []
        for node in self.model.graph:
            new = any(o not in self.info for o in node.outputs)
            if not new and node not in dirty and not any(v in moved for v in node.inputs if v is not None):
                continue
            before = [(self.info.get(o), self.elements.get(o)) for o in node.outputs]
            if not self.visit(node, stored=False):
                missing.append(node)
            for o, (info, elements) in zip(node.outputs, before, strict=True):
                if self.info.get(o) != info or not _same(self.elements.get(o), elements):
                    moved.add(o)
        self._complete(missing)

    def _constants(self) -> set[ir.Value]:
        values = [v for v in self.model.graph.initializers.values() if not v.is_graph_input()]
        values += [n.outputs[0] for n in self.model.graph if native.is_constant_node(n)]
        return {value for value in values if self.constant(value)}

    def constant(self, value: ir.Value) -> bool:
        """Record a stored value; True if its shape or its (small) data changed."""
        tensor = native.constant_tensor(value)
        if tensor is None:
            return False
        shape = native.tensor_shape(tensor)
        info = Info(shape, shape, shape, native.dtype_name(tensor.dtype))
        small = prod(shape) <= LIMIT and tensor.dtype != ir.DataType.STRING
        elements = Elements.constant(np.asarray(tensor.numpy())) if small else None
        changed = self.info.get(value) != info or not _same(self.elements.get(value), elements)
        self.info[value] = info
        self._keep(value, elements)
        return changed

    def _keep(self, value: ir.Value, elements: Elements | None) -> None:
        if elements is None:
            self.elements.pop(value, None)
        else:
            self.elements[value] = elements

    def visit(self, node: ir.Node, *, stored: bool) -> bool:
        """Shapes of the outputs of one node; False if some stay unknown."""
        if native.is_constant_node(node):
            return True
        for output in node.outputs:
            if output in self.elements:
                del self.elements[output]
        evaluated = self._evaluate(node)
        if evaluated is not None:
            for output, e in zip(node.outputs, evaluated, strict=False):
                self.elements[output] = e
                shape = tuple(e.a.shape)
                self.info[output] = Info(shape, shape, shape, str(e.a.dtype))
            return True
        if stored and all([self._stored(o) for o in node.outputs if o.name]):
            return True
        return self._infer(node)

    def _evaluate(self, node: ir.Node) -> list[Elements] | None:
        op_type = node.op_type
        if op_type not in SIZED or node.domain not in native.STANDARD_DOMAINS:
            return None
        if self.model.functions and node.op_identifier() in self.model.functions:
            return None
        if op_type in ("Shape", "Size"):
            info = self.info.get(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None
            if info is None or info.a is None or info.b is None or info.shape is None:
                return None
            start, end = native.attribute(node, "start", 0), native.attribute(node, "end", None)
            window = slice(start, end) if node.op_type == "Shape" else slice(None)
            a, b = np.asarray(info.a[window], np.int64), np.asarray(info.b[window], np.int64)
            known = np.asarray([isinstance(d, int) for d in info.shape[window]], bool)
            if node.op_type == "Size":
                a, b = (np.asarray(np.prod(x, dtype=np.int64)) for x in (a, b))
                known = np.asarray(known.all())
            return [Elements(a, b, known, True)]
        inputs: list[Elements | None] = []
        for value in node.inputs:
            operand = None if value is None else self.elements.get(value)
            if operand is None and value is not None:
                return None
            inputs.append(operand)
        if not inputs:
            return None
        attrs = {name: native.attribute(node, name) for name in node.attributes}
        attrs["#outputs"] = len(node.outputs)
        if node.op_type == "Cast":
            dtype = ir.DataType(attrs["to"])
            if dtype == ir.DataType.STRING:
                return None
            attrs["#dtype"] = dtype.numpy()
        if node.op_type == "ConstantOfShape" and "value" in attrs:
            attrs["value"] = attrs["value"].numpy().ravel()[0]
        return evaluate(node.op_type, attrs, inputs)

    def _stored(self, value: ir.Value) -> bool:
        """Use the shape in the file if each of its dimensions is a number or follows from the known symbols."""
        if value.shape is None or value.dtype is None:
            return False
        pairs = [(d, d) if isinstance(d, int) else self._resolve(d) for d in value.shape]
        if any(p is None for p in pairs):
            return False
        shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
        a, b = (tuple(p[w] for p in pairs if p is not None) for w in (0, 1))
        self.info[value] = Info(shape, a, b, native.dtype_name(value.dtype))
        return True

    def _resolve(self, dim: ir.SymbolicDim) -> tuple[int, int] | None:
        if not dim.value:
            return None
        key = dim.value
        if key not in self._resolved:
            if key in self.symbols:
                self._resolved[key] = self.symbols[key]
            else:
                try:
                    pair = [dim.evaluate({s: p[w] for s, p in self.symbols.items()}) for w in (0, 1)]
                except (ValueError, TypeError, SyntaxError):
                    pair = [dim, dim]
                ok = isinstance(pair[0], int) and isinstance(pair[1], int)
                self._resolved[key] = (int(pair[0]), int(pair[1])) if ok else None  # type: ignore[arg-type]
                if ok:
                    self.names.setdefault((int(pair[0]), int(pair[1])), key)  # type: ignore[arg-type]
        return self._resolved[key]

    def moved_to(self, model: ir.Model, pairs: Mapping[ir.Value, ir.Value]) -> ShapeTable:
        """The same knowledge about a clone of the model; ``pairs`` maps old values to new ones."""
        other = ShapeTable.__new__(ShapeTable)
        other.model = model
        other.symbols, other.names, other.notes = dict(self.symbols), dict(self.names), list(self.notes)
        other.info = {new: self.info[v] for v, new in pairs.items() if v in self.info}
        other.elements = {new: self.elements[v] for v, new in pairs.items() if v in self.elements}
        other.declared, other._resolved, other.memo = set(self.declared), dict(self._resolved), self.memo
        return other

    # ---- inference -----------------------------------------------------------------------------------------
    def _infer(self, node: ir.Node) -> bool:
        a = infer_node(self, node, 0)
        static = True
        for value in node.inputs:
            if value is None:
                continue
            info, known = self.info.get(value), self.elements.get(value)
            if info is None or info.a != info.b or (known is not None and not known.all_known):
                static = False
                break
        b = a if static else infer_node(self, node, 1)
        done = True
        for i, output in enumerate(node.outputs):
            if not output.name:
                continue
            shape_a, dtype = a.get(i, (None, ""))
            shape_b = b.get(i, (None, ""))[0] if static else doubted(self, node, shape_a, b.get(i, (None, ""))[0])
            dtype = dtype or native.dtype_name(output.dtype if output.type is not None else None)
            self.set(output, shape_a, shape_b, dtype)
            done = done and (shape_a is not None or not isinstance(output.type, (ir.TensorType, type(None))))
        return done

    def set(self, value: ir.Value, a: Sizes | None, b: Sizes | None, dtype: str) -> None:
        """Record concrete shapes; the symbolic one follows from where the two worlds differ."""
        if a is None:
            stored = None if value.shape is None else tuple(
                d if isinstance(d, int) else (d.value or f"{value.name}.{i}") for i, d in enumerate(value.shape)
            )  # fmt: skip
            self.info[value] = Info(stored, None, None, dtype)
            return
        if a == b:
            self.info[value] = Info(tuple(a), a, b, dtype)
            return
        if b is None or len(b) != len(a):
            b = tuple(-1 for _ in a)
        dims = [x if x == y else self._symbol(value, i, x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
        self.info[value] = Info(tuple(dims), a, None if -1 in b else b, dtype)

    def _symbol(self, value: ir.Value, axis: int, a: int, b: int) -> str:
        if b < 0:
            return f"{value.name}.{axis}"
        return self.names.setdefault((a, b), f"{value.name}.{axis}")

    def _complete(self, missing: list[ir.Node]) -> None:
        """Whole-model inference, then one real run, for what single nodes could not tell."""
        from .infer import from_run, from_whole_model

        for source in (from_whole_model, from_run):
            if not any(self._lacking(n) for n in missing):
                return
            found = source(self)
            for node in self.model.graph:
                if not self._lacking(node):
                    continue
                if self.visit(node, stored=False) and not self._lacking(node):
                    continue
                for output in node.outputs:
                    if output.name in found and self.info.get(output, Info(None, None, None, "")).a is None:
                        self.set(output, *found[output.name])

    def _lacking(self, node: ir.Node) -> bool:
        return any(
            o.name
            and self.info.get(o, Info(None, None, None, "")).a is None
            and isinstance(o.type, (ir.TensorType, type(None)))
            for o in node.outputs
        )


def _same(x: Elements | None, y: Elements | None) -> bool:
    if x is None or y is None:
        return x is y
    return all(np.array_equal(getattr(x, f), getattr(y, f)) for f in ("a", "b", "known"))
