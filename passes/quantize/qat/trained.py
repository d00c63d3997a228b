"""What training left in the fake-quantize nodes of a graph, read back as grids; and the graph without those nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ....graph.errors import ConstraintError
from ....graph.execute import to_numpy
from ....graph.ir import Graph, Node, Value
from ..numerics import QuantParams
from ..spec.formats import numpy_dtype

if TYPE_CHECKING:
    from ....graph.fx import FXGraph


@dataclass(frozen=True)
class Grid:
    """Scale, zero point, axis and integers that a fake-quantize node uses."""

    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None
    low: int
    high: int

    def params(self, dtype: str, name: str) -> QuantParams:
        """The same grid stored as ``dtype``. Raises ConstraintError if that type does not hold these integers."""
        stored = numpy_dtype(dtype)
        zero = np.broadcast_to(self.zero_point, self.scale.shape).astype(stored)
        found = QuantParams(self.scale, zero, self.axis)
        least, most = found.limits
        if not least <= self.low < self.high <= most:
            raise ConstraintError(
                "the target stores other integers than were trained", node=name, expected=f"{least} .. {most}",
                found=f"{self.low} .. {self.high}", hint="freeze for the target that the model was trained for",
            )  # fmt: skip
        return QuantParams(self.scale, zero, self.axis, 0, self.low, self.high)


@dataclass
class Trained:
    """Grids by name of the value or of the weight that was fake-quantized."""

    values: dict[str, Grid] = field(default_factory=dict)
    weights: dict[str, Grid] = field(default_factory=dict)


def take_out(graph: Graph) -> Trained:
    """Read the grids of all fake-quantize nodes and remove the nodes: the graph then computes in float.

    Raises:
        ConstraintError: there is none; a scale depends on the input; or one value is quantized in two ways.
    """
    found = Trained()
    nodes = [n for n in graph.nodes if n.op == "fake_quantize"]
    if not nodes:
        raise ConstraintError(
            "nothing in this model is fake-quantized", node=graph.name, expected="the trained model of P.qat(...)"
        )
    taken = [(node.inputs[0], _grid(graph, node), node.name) for node in nodes]
    for node in nodes:
        x = node.inputs[0]
        assert x is not None
        graph.replace_uses(node.output, x)
        graph.erase(node)
    _sweep(graph)
    for value, grid, label in taken:  # only now: a value that became a graph output has taken its name
        assert value is not None
        store, name = (found.values, value.name) if value.weight is None else (found.weights, value.weight.name)
        if name in store and not _same(store[name], grid):
            raise ConstraintError("one tensor is fake-quantized in two ways", node=label, value=name)
        store[name] = grid
    return found


def _same(a: Grid, b: Grid) -> bool:
    return (a.axis, a.low, a.high) == (b.axis, b.low, b.high) and all(
        np.array_equal(p, q) for p, q in ((a.scale, b.scale), (a.zero_point, b.zero_point))
    )


def _grid(graph: Graph, node: Node) -> Grid:
    scale = np.asarray(_constant(graph, node, node.input(1)), np.float32)
    if node.origin.startswith("foldline"):
        from ....graph.fx.fake_quantize import SMALLEST

        scale = np.maximum(np.abs(scale), np.float32(SMALLEST))
    zero = np.zeros((), np.int64) if node.input(2) is None else np.asarray(_constant(graph, node, node.input(2)))
    if not np.isfinite(scale).all() or not (scale > 0).all():
        raise ConstraintError(
            "a trained scale is not positive and finite", node=node.name, found=str(scale.reshape(-1)[:4]),
            hint="lower the learning rate of the scales, or clip gradients",
        )  # fmt: skip
    axis = node.attrs.get("axis") if scale.ndim else None
    return Grid(scale, zero.astype(np.int64), axis, int(node.attrs["quant_min"]), int(node.attrs["quant_max"]))


def _constant(graph: Graph, node: Node, value: Value | None) -> np.ndarray:
    """A value that depends on weights only, in the dtypes and with the calls of the model itself."""
    known: dict[int, Any] = {}

    def compute(v: Value | None) -> None:
        if v is None or v.is_const or id(v) in known:
            return
        if v.producer is None or graph.kind != "fx":
            raise ConstraintError(
                "a scale depends on the model's input", node=node.name, value=v.name,
                expected="a parameter or a statistic of the weight", hint="dynamic quantization does not freeze",
            )  # fmt: skip
        for operand in v.producer.inputs:
            compute(operand)
        for made, result in zip(v.producer.outputs, _single(graph).run(v.producer, known, widen=False), strict=True):
            known[id(made)] = result

    if value is None:
        raise ConstraintError(
            "the scale is written into the call, not stored", node=node.name, expected="a parameter or buffer"
        )
    compute(value)
    found = value.const()
    return to_numpy(known[id(value)]) if found is None else found


def _single(graph: Graph) -> Any:
    from ....graph.fx.single import Single

    fx_graph: FXGraph = graph  # type: ignore[assignment]
    return Single(fx_graph)


def _sweep(graph: Graph) -> None:
    """Remove what computed statistics of weights for the scales and is read by nobody now."""
    for node in reversed(list(graph.nodes)):
        statistic = node.op in ("abs", "mean", "mul")
        if statistic and not any(graph.is_read(v) for v in node.outputs):
            graph.erase(node)
