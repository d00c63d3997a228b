"""The graph view that both front ends implement: Graph, Node, Value, Weight, and the edits passes may make."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias

import numpy as np

from .errors import ConstraintError

Dim: TypeAlias = int | str
"""One dimension of a shape: a number, or a symbol (``"batch"``, ``"s0"``) where the model is dynamic."""


@dataclass(eq=False)
class Weight:
    """A stored tensor: parameter, buffer or constant. Tied weights are one Weight with several names.

    Attributes:
        name: canonical name (state_dict name or initializer name).
        shape, dtype: of the stored tensor; dtype is a numpy-style name (``"float32"``, ``"bfloat16"``, ``"int64"``).
        kind: ``"parameter"``, ``"buffer"`` or ``"constant"`` (a tensor baked into the graph).
        aliases: every name under which the same storage is reachable, ``name`` included.
        value: the graph value that carries it.
        trainable: ``requires_grad`` of a parameter; False elsewhere.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    load: Callable[[], Any] = field(repr=False)
    aliases: tuple[str, ...] = ()
    value: Value | None = field(default=None, repr=False)
    trainable: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def numpy(self) -> np.ndarray:
        """The data as numpy (ml_dtypes for bfloat16 and float8), without a copy where the storage allows it.

        Read-only by convention: change weights with :meth:`Graph.set_weight`.
        """
        return self.load()


class Uses(dict[tuple["Node", int], None]):
    """The (node, input position) pairs that read a value, in order; each once. Adding and removing cost O(1).

    Iterating goes over a copy, so that the value may be rewired meanwhile. (A dict whose values mean nothing: length,
    truth and membership are asked so often that a layer of Python round one would show.)
    """

    __slots__ = ()

    def append(self, use: tuple[Node, int]) -> None:
        """Add a pair at the end (once)."""
        self[use] = None

    def discard(self, use: tuple[Node, int]) -> None:
        """Remove a pair, if it is there."""
        self.pop(use, None)

    def __iter__(self) -> Iterator[tuple[Node, int]]:
        return iter(tuple(self.keys()))

    def __getitem__(self, index: int) -> tuple[Node, int]:  # type: ignore[override]
        return tuple(self)[index] if index else next(iter(self.keys()))

    def __repr__(self) -> str:
        return f"Uses({[(node.name, i) for node, i in self]})"


@dataclass(eq=False)
class Value:
    """One edge of the graph: a tensor that a node makes, an input, or a weight.

    Attributes:
        shape: symbolic shape, or None when the rank is unknown.
        hint: the same shape with every symbol replaced by one concrete size (consistent in the whole graph).
        uses: (node, input position) pairs, one for every use.
    """

    name: str
    shape: tuple[Dim, ...] | None
    hint: tuple[int, ...] | None
    dtype: str
    producer: Node | None = field(default=None, repr=False)
    index: int = 0
    uses: Uses = field(default_factory=Uses, repr=False)
    weight: Weight | None = field(default=None, repr=False)
    is_input: bool = False
    is_output: bool = False
    literal: np.ndarray | None = field(default=None, repr=False)
    native: Any = field(default=None, repr=False)

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)

    def const(self) -> np.ndarray | None:
        """The data if this value is the same in every run (a weight or a literal), else None."""
        if self.literal is not None:
            return self.literal
        return None if self.weight is None else self.weight.numpy()

    @property
    def is_const(self) -> bool:
        return self.literal is not None or self.weight is not None


@dataclass(eq=False)
class Node:
    """One operation in canonical terms (docs/ops.md lists every op with its inputs and attributes).

    Attributes:
        op: canonical op name, or ``"opaque"`` where no canonical op fits; ``origin`` then tells the native name.
        inputs: tensor operands in canonical order; None where an optional one is absent.
        attrs: canonical attributes (plain Python data). A size that is computed at run time is None.
        dynamic: values that feed attributes at run time (sizes computed from shapes), not tensor operands.
        scope: module path of the layer that made the node ("" when unknown).
        origin: native operator, e.g. ``"aten.conv2d.default"`` or ``"Conv"``.
        location: source line of the user's model, where known.
        captured: outer values that subgraphs of this node (If/Loop/Scan bodies) read.
    """

    name: str
    op: str
    inputs: list[Value | None]
    outputs: list[Value]
    attrs: dict[str, Any] = field(default_factory=dict)
    dynamic: list[Value] = field(default_factory=list, repr=False)
    scope: str = ""
    origin: str = ""
    location: str = ""
    captured: list[Value] = field(default_factory=list, repr=False)
    native: Any = field(default=None, repr=False)

    @property
    def output(self) -> Value:
        return self.outputs[0]

    def input(self, i: int) -> Value | None:
        """Operand i, or None where it is absent."""
        return self.inputs[i] if i < len(self.inputs) else None


class Graph(abc.ABC):
    """A model as a list of canonical nodes over values, editable, and written back to what it came from.

    Invariants: ``nodes`` is topologically ordered; names of nodes and of values are unique; every value in
    ``node.inputs`` knows that use; all edits go through the methods below, which keep view and native graph equal.
    """

    kind: str = ""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.values: dict[str, Value] = {}
        self.weights: dict[str, Weight] = {}
        self.name: str = "graph"
        self.notes: list[str] = []

    # ---- reading -------------------------------------------------------------------------------------------
    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def node(self, name: str) -> Node:
        """The node of that name. Raises ConstraintError naming the nearest one."""
        for n in self.nodes:
            if n.name == name:
                return n
        raise ConstraintError("no such node", node=name, hint="list the names with `foldline inspect MODEL`")

    def weight(self, name: str) -> Weight:
        """The weight of that name or alias. Raises ConstraintError if there is none."""
        if name in self.weights:
            return self.weights[name]
        for w in self.weights.values():
            if name in w.aliases:
                return w
        raise ConstraintError("no such weight", node=name, hint="list the names with `foldline inspect MODEL`")

    def holds(self, node: Node) -> bool:
        """Whether this very node is part of the graph (False once it was erased)."""
        return any(n is node for n in self.nodes)

    def is_read(self, value: Value) -> bool:
        """Whether anything needs a value: a node, an attribute computed at run time, a subgraph, the caller."""
        if value.uses or value.is_output:
            return True
        return any(v is value for n in self.nodes for v in (*n.dynamic, *n.captured))

    def extract(self, nodes: Sequence[Node], *, readers: bool = False) -> Graph:
        """A small graph of its own that holds copies of these nodes, under the same names.

        What they read from outside becomes an input (constants stay constants, their data is shared; sizes that are
        computed at run time bring the nodes that compute them); what others read becomes an output. Shapes, hints
        and symbolic sizes are kept.

        Args:
            nodes: any nodes of this graph.
            readers: let an identity stand between a value that others read and the output, so that in the copy too
                the value is no graph output unless it is one here.

        Raises:
            ConstraintError: a node is not part of this graph, or the front end cannot cut graphs.
        """
        raise ConstraintError("this kind of graph cannot be cut", node=self.name, found=type(self).__name__)

    def other_sizes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all inputs under another choice for the symbolic sizes; {} where nothing is symbolic."""
        return {}

    # ---- edits: each keeps view and native graph equal -------------------------------------------------------
    @abc.abstractmethod
    def set_weight(self, weight: Weight, data: np.ndarray) -> None:
        """Replace the data of a weight (all its aliases); its shape may change, its dtype follows ``data``."""

    @abc.abstractmethod
    def slice_weight(self, weight: Weight, kept: dict[int, np.ndarray]) -> None:
        """Keep the given indices (in the given order) on each given axis, one gather per axis."""

    @abc.abstractmethod
    def add_weight(self, name: str, data: np.ndarray, *, trainable: bool = False) -> Value:
        """Add a stored tensor (name made unique) and return its value."""

    @abc.abstractmethod
    def set_attr(self, node: Node, **attrs: Any) -> None:
        """Change canonical attributes of a node, shape constants among them; entries that were None stay dynamic."""

    @abc.abstractmethod
    def set_input(self, node: Node, position: int, value: Value | None) -> None:
        """Rewire one operand (None drops an optional one; position may be the first absent optional operand)."""

    @abc.abstractmethod
    def replace_uses(self, old: Value, new: Value, *, except_nodes: Iterable[Node] = ()) -> None:
        """Let every use of ``old`` read ``new``; a graph output keeps its name."""

    @abc.abstractmethod
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
        """Insert a node of a canonical op (of one output, or a split) right after ``after`` (None: at the start)."""

    @abc.abstractmethod
    def erase(self, node: Node) -> None:
        """Remove a node whose outputs have no use (ConstraintError otherwise); weights left unused go too."""

    @abc.abstractmethod
    def refresh(self) -> None:
        """Recompute shapes and hints of all values after edits."""

    @abc.abstractmethod
    def clone(self) -> Graph:
        """A structural copy that shares weight data; edits of either do not show in the other."""

    @abc.abstractmethod
    def to_model(self) -> Any:
        """The model in the form it came in (fx: nn.Module; onnx: onnx_ir.Model or ModelProto)."""

    def separate_shared(self) -> int:
        """Give vectors that several nodes share copies of their own; returns how many were made.

        Exporters store equal tensors once (two zero biases of one length), which would tie layers that have nothing
        to do with each other. Only where sharing is an accident of the format: FX keeps its modules' parameters.
        """
        return 0

    def is_persistent(self, name: str) -> bool:
        """Whether a checkpoint of the model holds this name (a state dict leaves some buffers out)."""
        return True

    @abc.abstractmethod
    def bind(self, batch: Any) -> dict[str, np.ndarray]:
        """One call's arguments as {graph input name: array}.

        ``batch`` is what the user passes to the model: one array or tensor, a tuple of positional arguments, a
        dict of keyword arguments (FX) or of input names (ONNX), or a pair ``(tuple, dict)`` of both. Nested
        containers follow the model's signature. Raises ConstraintError naming a missing or extra input.
        """

    @property
    def user_class(self) -> bool:
        """Whether the model comes back as a class of the user's, unless a rewrite changes more than its layers."""
        return False

    # ---- helpers for front ends ------------------------------------------------------------------------------
    def _link(self) -> None:
        """Recompute ``uses`` and ``producer`` of every value from the node list."""
        for known in self.values.values():
            known.uses = Uses()
        for n in self.nodes:
            for i, v in enumerate(n.inputs):
                if v is not None:
                    v.uses[n, i] = None
            for i, made in enumerate(n.outputs):
                made.producer, made.index = n, i
