"""The ONNX front end: ONNXGraph, a canonical view over an onnx_ir model that stays the single source of truth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from ..garbage import undisturbed
from ..ir import Graph, Node, Value, Weight
from . import copying as onnx_copying
from . import edit as onnx_edit
from . import extract as onnx_extract
from . import load as onnx_load
from . import native as onnx_native
from . import place as onnx_place
from . import reading as onnx_reading
from . import sizes as onnx_sizes
from . import weights as onnx_weights
from .names import Loader, storage_key
from .ops import Canon, canonicalize
from .run import Session
from .shapes import Info, ShapeTable

UNKNOWN = Info(None, None, None, "")
SESSIONS = 4
LITERAL = 4096
"""Tensors that feed attributes are literals up to this many elements."""


class ONNXGraph(Graph):
    """A model in ONNX as canonical nodes.

    ``model`` is the native graph: every edit changes it first and then re-reads what it touched, so the two cannot
    disagree. Names of nodes and values are those of the file (a node without a name gets one in the view only).
    """

    kind = "onnx"
    _stale = False

    def __init__(self, model: ir.Model, *, form: str = "ir", table: ShapeTable | None = None) -> None:
        super().__init__()
        self.model = model
        self.form = form
        self.source: Path | None = None
        self.table = table if table is not None else ShapeTable(model)
        if table is None:
            self.table.load()
        self.name = model.graph.name or "graph"
        self.view: dict[ir.Value, Value] = {}
        self.canon: dict[Node, Canon] = {}
        self.by_native: dict[ir.Node, Node] = {}
        self.settled: dict[ir.Node, None] = {}
        self.carriers: dict[Weight, list[ir.Value]] = {}
        self.dirty: set[ir.Node] = set()
        self.moved: set[ir.Value] = set()
        self.idle: list[ir.Value] = []
        self.baked = False
        self._sessions: dict[tuple[str, ...], Session] = {}
        self._tied: dict[Any, Weight] = {}
        self.taken: set[str] = set()
        self.numbers: dict[str, int] = {}  # the next number to try behind a name that is taken
        self.resync()
        self.notes += self.table.notes

    @property
    def nodes(self) -> list[Node]:
        """The nodes in topological order; the list is made anew when it is asked for after an edit."""
        if self._stale:
            known = self.by_native
            self.nodes = [known[n] for n in self.model.graph if n in known]
        return self._nodes

    @nodes.setter
    def nodes(self, nodes: list[Node]) -> None:
        self._nodes, self._stale = nodes, False

    def reorder(self) -> None:
        """Nodes came or went."""
        self._stale = True

    # ---- the view ------------------------------------------------------------------------------------------
    def resync(self) -> None:
        """Read the whole native graph again; objects that stand for the same native thing are kept."""
        onnx_reading.resync(self)

    def settled_value(self, native: ir.Value) -> Value:
        """The view of a size that is the same in every run: a literal."""
        value = self.value_of(native)
        value.literal, value.producer = self.table.elements[native].a, None
        return value

    def read(self, node: Node, canon: Canon) -> None:
        """Bring the view of one node in line with its native form; ``uses`` are the caller's business."""
        native: ir.Node = node.native
        inputs = native.inputs
        self.canon[node] = canon
        node.op, node.attrs = canon.op, dict(canon.attrs)
        node.inputs = operands = []
        for i in canon.operands:
            operand = None if i is None else inputs[i]
            operands.append(None if operand is None else self.operand_of(operand))
        node.outputs = made = []
        for output in native.outputs:
            if output.name:
                value = self.value_of(output)
                value.literal = None
                made.append(value)
        feeds = [inputs[i] for i in canon.sizes] if canon.sizes else ()
        node.dynamic = [self.value_of(v) for v in feeds if v is not None and not self._fixed(v)]
        node.captured = [self.operand_of(v) for v in onnx_native.captures(native, self.model.graph)]

    def _fixed(self, native: ir.Value) -> bool:
        return onnx_native.constant_tensor(native) is not None or native.producer() in self.settled

    def reread(self, node: Node) -> None:
        """Read one node again after its native form changed, and repair the uses of its operands."""
        for i, value in enumerate(node.inputs):
            if value is not None:
                value.uses.discard((node, i))
        self.read(node, canonicalize(node.native, self.table))
        for i, value in enumerate(node.inputs):
            if value is not None:
                value.uses.append((node, i))
        for i, value in enumerate(node.outputs):
            value.producer, value.index = node, i

    def value_of(self, native: ir.Value) -> Value:
        """The view of a native value, made on first sight, with the shape the table knows now."""
        shape, hint, _, dtype = self.table.info.get(native, UNKNOWN)
        value = self.view.get(native)
        if value is None:
            name = native.name or ""
            value = self.view[native] = Value(name, shape, hint, dtype, native=native)
            if name:
                self.values[name] = value
        else:
            value.shape, value.hint, value.dtype = shape, hint, dtype
        return value

    def operand_of(self, native: ir.Value) -> Value:
        tensor = onnx_native.constant_tensor(native)
        return self.value_of(native) if tensor is None else self.constant_of(native, tensor, operand=True)

    def constant_of(self, native: ir.Value, tensor: ir.TensorProtocol, *, operand: bool) -> Value:
        """View of a stored value: a Weight if it is an operand, a literal if it is a scalar or feeds attributes."""
        value = self.value_of(native)
        if value.weight is not None and value.shape:  # a tensor that is an operand already
            value.literal = None
            return value
        scalar = len(tensor.shape) == 0
        is_float = tensor.dtype.is_floating_point()
        value.literal = None
        if scalar or (not operand and value.weight is None and tensor.size <= LITERAL):
            value.literal = tensor.numpy()
        if value.weight is None and (
            (operand and not scalar) or value.literal is None or (scalar and is_float and native.is_initializer())
        ):
            value.weight = self._weight(native, value, tensor)
        return value

    def _weight(self, native: ir.Value, value: Value, tensor: ir.TensorProtocol) -> Weight:
        key = storage_key(native)
        weight = self._tied.get(key)
        if weight is not None and weight in self.carriers and storage_key(self.carriers[weight][0]) == key:
            if native not in self.carriers[weight]:
                self.carriers[weight].append(native)
            weight.aliases = tuple(v.name or "" for v in self.carriers[weight])
            return weight
        kind = onnx_load.kind_of(native, tensor)
        weight = Weight(
            value.name, onnx_native.tensor_shape(tensor), value.dtype, kind, Loader(native), (value.name,),
            value, kind == "parameter" and tensor.dtype.is_floating_point(),
        )  # fmt: skip
        self._tied[key] = weight
        self.carriers[weight] = [native]
        return weight

    # ---- edits ---------------------------------------------------------------------------------------------
    def touch(self) -> None:
        self._sessions.clear()

    def set_weight(self, weight: Weight, data: np.ndarray) -> None:
        onnx_weights.set_weight(self, weight, data)

    def slice_weight(self, weight: Weight, kept: dict[int, np.ndarray]) -> None:
        onnx_weights.slice_weight(self, weight, kept)

    def add_weight(self, name: str, data: np.ndarray, *, trainable: bool = False) -> Value:
        return onnx_weights.add_weight(self, name, data, trainable=trainable)

    def set_attr(self, node: Node, **attrs: Any) -> None:
        onnx_edit.set_attr(self, node, attrs)

    def set_input(self, node: Node, position: int, value: Value | None) -> None:
        onnx_edit.set_input(self, node, position, value)

    def replace_uses(self, old: Value, new: Value, *, except_nodes: Iterable[Node] = ()) -> None:
        onnx_edit.replace_uses(self, old, new, except_nodes)

    def insert(
        self,
        op: str,
        inputs: Sequence[Value | None],
        attrs: dict[str, Any] | None = None,
        *,
        name: str,
        after: Node | None = None,
        scope: str = "",
    ) -> Node:
        return onnx_edit.insert(self, op, inputs, attrs or {}, name=name, after=after, scope=scope)

    def erase(self, node: Node) -> None:
        onnx_edit.erase(self, node)

    def holds(self, node: Node) -> bool:
        return node in self.canon

    def is_read(self, value: Value) -> bool:
        if value.uses or value.is_output:
            return True
        stack: list[ir.Value] = [] if value.native is None else [value.native]
        seen: set[ir.Node] = set()
        while stack:  # a size computation that the view shows as a number is alive while somebody reads that number
            native = stack.pop()
            if onnx_native.is_used(native, self.settled):
                return True
            users = {use.node for use in native.uses()} - seen
            seen |= users
            stack += [made for user in users for made in user.outputs]
        return False

    def extract(self, nodes: Sequence[Node], *, readers: bool = False) -> ONNXGraph:
        return onnx_extract.extract(self, nodes, readers)

    def other_sizes(self) -> dict[str, tuple[int, ...]]:
        found = {v.name or "": self.table.info[v] for v in self.model.graph.inputs}
        if any(i.b is None for i in found.values()) or all(i.a == i.b for i in found.values()):
            return {}
        return {name: i.b for name, i in found.items() if i.b is not None}

    def untie(self, weight: Weight) -> list[Weight]:
        """Give each use of a shared weight a copy of its own (exporters merge tensors that are merely equal)."""
        return onnx_weights.untie(self, [weight])[0]

    def separate_shared(self) -> int:
        shared = [
            w
            for w in self.weights.values()
            if len(w.shape) == 1 and w.size > 1 and w.dtype.startswith(("float", "bfloat"))
            if w.value is not None and len({n.name for n, _ in w.value.uses}) > 1
        ]
        return sum(len(group) - 1 for group in onnx_weights.untie(self, shared)) if shared else 0

    def refresh(self) -> None:
        onnx_place.drop_idle(self)
        if self.baked:
            onnx_sizes.drop_dead_sizes(self)
        self.settle()

    def settle(self) -> None:
        """Recompute shapes and view, removing nothing."""
        with undisturbed():
            self.table.update(self.dirty, self.moved)
            self.dirty, self.moved = set(), set()
            onnx_place.write_shapes(self)
            self.resync()
        self.touch()

    def clone(self) -> ONNXGraph:
        with undisturbed():
            return onnx_copying.clone(self)

    def inline(self) -> ONNXGraph:
        """A new graph in which calls of local functions are replaced by their bodies, so that rules see the ops."""
        from onnx_ir.passes.common import InlinePass

        other = ONNXGraph(InlinePass()(self.model.clone()).model, form=self.form)
        other.source = self.source
        return other

    def to_model(self) -> ir.Model | onnx.ModelProto:
        """A copy of the model as it is now: ModelProto if one came in, else onnx_ir.Model (sharing weight data)."""
        if self.dirty or self.moved or self.idle:
            self.refresh()
        if self.form == "proto":
            return onnx_native.serialize(self.model)
        return self.model.clone()

    # ---- running -------------------------------------------------------------------------------------------
    def bind(self, batch: Any) -> dict[str, np.ndarray]:
        return onnx_load.bind(batch, self.model.graph)

    def run(
        self, inputs: Mapping[str, np.ndarray], taps: Sequence[str] = ()
    ) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        """Run in ONNX Runtime (CPU, no graph rewrites): graph outputs in order, and the values named in ``taps``.

        Sessions are kept until the next edit. Raises ConstraintError for inputs that do not fit, OrtError
        (a BackendError) where the runtime fails.
        """
        if self.dirty or self.moved:
            self.settle()
        key = tuple(taps)
        if key not in self._sessions:
            while len(self._sessions) >= SESSIONS:
                self._sessions.pop(next(iter(self._sessions)))
            self._sessions[key] = Session(self.model, taps)
        return self._sessions[key].run(inputs)


def load_onnx(model: str | Path | onnx.ModelProto | ir.Model, example_inputs: Any = None) -> ONNXGraph:
    """Read an ONNX model; external data stays on disk and is memory-mapped, the caller's object is never changed.

    Args:
        model: path, ModelProto or onnx_ir.Model.
        example_inputs: what ``ONNXGraph.bind`` takes; their sizes become the hints of dynamic dimensions.

    Raises:
        ModelFileError: the file or its external data is missing, truncated or not ONNX.
        ConstraintError: the example inputs do not fit the model.
    """
    with undisturbed():
        native, form, source = onnx_load.read(model)
        sizes = None
        if example_inputs is not None:
            bound = onnx_load.bind(example_inputs, native.graph)
            sizes = {name: tuple(np.shape(x)) for name, x in bound.items()}
        table = ShapeTable(native, sizes)
        table.load()
        graph = ONNXGraph(native, form=form, table=table)
        graph.source = source
        return graph
