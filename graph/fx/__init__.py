"""FX front end: an nn.Module or ExportedProgram as a canonical Graph over a functional ATen fx graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.export import ExportedProgram

from ..ir import Node, Value
from .clean import clean
from .edit import FXEdits
from .extract import extract
from .functional import Pure
from .modes import graph_module
from .module import write_back
from .ops import known
from .record import CannotRecord, Recorded
from .run import interpret
from .tensors import from_numpy, to_numpy
from .trace import capture, describe


def load_torch(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    static: bool = False,
) -> FXGraph:
    """The canonical graph of a PyTorch model; the model itself is not touched and its tensors are not copied.

    Args:
        model: a module (traced in eval mode whatever its flags) or an ExportedProgram.
        example_inputs: tensor, tuple of arguments, dict of keyword arguments, or (tuple, dict); nested containers
            are fine. Sizes matter, values do not. May be left out for an ExportedProgram.
        dynamic_batch: leave dim 0 of the inputs symbolic where the model allows it (noted in ``graph.notes`` if not).
        dynamic_shapes: torch.export's own specification, instead of ``dynamic_batch``.
        static: record one call on meta tensors instead, where the model allows it: cheap, all sizes constant.

    Raises TraceError naming the line of the user's model where it cannot be captured.
    """
    if static and isinstance(model, nn.Module) and example_inputs is not None:
        try:
            return _recorded(model, example_inputs)
        except CannotRecord:  # the model reads tensor data or does what only torch.export can follow
            return load_torch(model, example_inputs, dynamic_batch=dynamic_batch, dynamic_shapes=dynamic_shapes)
    found = capture(model, example_inputs, dynamic_batch=dynamic_batch, dynamic_shapes=dynamic_shapes)
    assert found.program is not None
    pure = Pure(found.program)
    clean(pure.graph, known)
    return FXGraph(found, pure)


def _recorded(model: nn.Module, example_inputs: Any) -> FXGraph:
    found = describe(model, example_inputs)
    try:
        recorded = Recorded(found, compiling=False)
        found.as_run = True
    except CannotRecord:  # it reads tensor data, unless it believes that it is traced
        recorded = Recorded(found, compiling=True)
    clean(recorded.graph, known)
    return FXGraph(found, recorded)


class FXGraph(FXEdits):
    """A PyTorch model as a canonical graph; see FXView for what it holds and FXEdits for how it changes."""

    kind = "fx"

    def clone(self) -> FXGraph:
        """A structural copy; tensors are shared and replaced, never modified, by edits of either."""
        return FXGraph(self.source, None, like=self)

    def holds(self, node: Node) -> bool:
        return self._node_of.get(node.native) is node

    def is_read(self, value: Value) -> bool:
        return bool(value.uses) or value.is_output or (value.native is not None and bool(value.native.users))

    def extract(self, nodes: Sequence[Node], *, readers: bool = False) -> FXGraph:
        return extract(self, nodes, readers)

    def other_sizes(self) -> dict[str, tuple[int, ...]]:
        if not any(isinstance(d, str) for v in self.inputs for d in v.shape or ()):
            return {}
        twin = self.clone()
        twin.set_hints(**{symbol: size + 1 for symbol, size in self.sizes.items()})
        return {v.name: v.hint for v in twin.inputs if v.hint is not None}

    def bind(self, batch: Any) -> dict[str, np.ndarray]:
        """One call's arguments as {graph input name: array}; see Graph.bind."""
        return {k: to_numpy(v, k) for k, v in self.bind_tensors(batch).items()}

    def run(
        self, inputs: dict[str, Any], taps: Sequence[str] = (), grad: bool = False
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Execute the graph: ``inputs`` by graph input name; returns (outputs, {tapped value name: tensor}).

        Without ``grad`` nothing is recorded for autograd. Raises ConstraintError naming a missing input or tap.
        """
        return interpret(self, inputs, taps, grad)

    def to_graph_module(self) -> fx.GraphModule:
        """The graph as an executable module in eval mode, same call signature and outputs as the model."""
        return graph_module(self)

    def to_model(self) -> nn.Module:
        """The caller's own module class where it can express the edits, else a GraphModule (``notes`` says why)."""
        return write_back(self)


__all__ = ["FXGraph", "from_numpy", "load_torch", "to_numpy"]
