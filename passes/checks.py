"""Checks around a pass: graph invariants, and the numbers before and after on example and synthesised inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..graph.errors import ConstraintError, FoldlineError, VerificationError
from ..graph.ir import Graph
from ..graph.load import load
from ..graph.verify import Comparison, OutputComparison, compare, difference
from .layers import layer_errors

RTOL = {"float64": 1e-5, "float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}
"""Bound of EXACT checks by the narrowest float in the graph: the binding 1e-5, about five roundings for the halves."""


class Inputs:
    """What a run is checked on: the caller's example inputs (else a calibration batch) and some made up from the seed.

    Attributes:
        arrays: one dictionary per input, as ``run_graph`` takes.
        names: what each is: ``"example"``, ``"calibration"``, ``"synthesised"``.
        notes: what could not be made up, and why.

    Raises:
        VerificationError: there is nothing to check on.
    """

    def __init__(self, graph: Graph, example_inputs: Any, seed: int, calibration: Any = None) -> None:
        from ..graph.execute import synthesize_inputs

        self.arrays: list[dict[str, np.ndarray]] = []
        self.names: list[str] = []
        self.notes: list[str] = []
        if example_inputs is not None:
            self.arrays.append(graph.bind(example_inputs))
            self.names.append("example")
        elif isinstance(calibration, Sequence) and len(calibration):
            self.arrays.append(graph.bind(calibration[0]))
            self.names.append("calibration")
        try:
            self.arrays.append(synthesize_inputs(graph, seed))
            self.names.append("synthesised")
        except FoldlineError as exc:
            if not self.arrays:
                raise VerificationError(
                    f"there is nothing to verify on: no example inputs, and none can be made up ({exc.message})",
                    node=exc.node,
                    value=exc.value,
                    hint="pass example_inputs, or verify=False",
                ) from exc
            self.notes.append(f"checked on the {self.names[0]} inputs only: none can be made up ({exc.message})")

    def choose(self, exact: bool) -> tuple[list[dict[str, np.ndarray]], list[str]]:
        """All inputs for EXACT checks; for error measures the real ones alone, where there are any.

        Made-up inputs lie outside what a quantizer was calibrated for, so their error would say little.
        """
        if exact or self.names == ["synthesised"]:
            return self.arrays, list(self.names)
        return self.arrays[:1], self.names[:1]


@dataclass
class Measurement:
    """A comparison as data, the names of the inputs it was made on, or why there is none; errors per layer."""

    comparison: dict[str, Any] | None = None
    on: list[str] = field(default_factory=list)
    why_not: str = ""
    layers: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""


def default_rtol(graph: Graph) -> float:
    """The bound of EXACT checks for the narrowest float that the graph computes in."""
    return max((RTOL[v.dtype] for v in graph.values.values() if v.dtype in RTOL and not v.is_const), default=1e-5)


def measure(before: Graph, after: Graph, inputs: Inputs, *, exact: bool, rtol: float | None) -> Measurement:
    """Run both graphs and compare.

    Raises:
        VerificationError: ``exact``, and the outputs differ by more than ``rtol``; names the first diverging value.
    """
    # Without a promise there is no bound, and no search for the first value that exceeds it.
    bound = math.inf if not exact else default_rtol(before) if rtol is None else rtol
    arrays, names = inputs.choose(exact)
    found = compare(before, after, arrays, bound)
    if exact and not found.ok:
        raise diverged(
            found,
            after,
            bound,
            "the function changed, and this pass promises that it does not",
            "a bug of the pass, unless the model is ill-conditioned: verify=False or rtol=... runs it anyway",
        )
    measured = Measurement(found.to_dict(), names)
    if not exact:
        try:
            measured.layers = layer_errors(before, after, arrays[0])
        except FoldlineError as exc:
            measured.note = f"errors per layer could not be measured: {exc.message}"
    return measured


def diverged(found: Comparison, after: Graph, bound: float, message: str, hint: str | None = None) -> VerificationError:
    """The error that tells of the first diverging value of a comparison that is not ok."""
    outputs = found.outputs.values()
    worst = max(outputs, key=lambda o: (bool(o.note), o.max_rel))
    value = found.first_divergence or worst.name
    producer = after.values[value].producer if value in after.values else None
    return VerificationError(
        message,
        node=producer.name if producer is not None else None,
        value=f"{value} (the first that differs); output {worst.name}",
        expected=f"max |a - b| / max |a| <= {bound:g}",
        found=worst.note or f"{worst.max_rel:.3g} (max |a - b| = {worst.max_abs:.3g}, SQNR {worst.sqnr_db:.1f} dB)",
        hint=hint,
    )


def compare_arrays(names: Sequence[str], before: Sequence[Any], after: Sequence[Any]) -> dict[str, Any]:
    """Errors of one call's outputs, in the form of ``Comparison.to_dict()`` (``ok``: shapes agree).

    Args:
        names: of the outputs; before, after: the arrays, in the same order.
    """
    found = Comparison(True, math.inf)
    for name, one, two in zip(names, before, after, strict=True):
        a, b = np.asarray(one, dtype=np.float64), np.asarray(two, dtype=np.float64)
        if a.shape != b.shape:
            found.ok = False
            found.outputs[name] = OutputComparison(
                name, -math.inf, 0.0, math.inf, math.inf, None, f"shape {a.shape} became {b.shape}"
            )
            continue
        max_abs, max_rel, note = difference(a, b)
        noise, signal, norm = float(((a - b) ** 2).sum()), float((a**2).sum()), float(np.linalg.norm(b))
        sqnr = math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal > 0 else -math.inf
        cosine = float((a * b).sum()) / (math.sqrt(signal) * norm) if signal > 0 and norm > 0 else float(noise == 0)
        top1 = float((a.argmax(-1) == b.argmax(-1)).mean()) if a.ndim and a.shape[-1] > 1 and a.size else None
        found.outputs[name] = OutputComparison(name, sqnr, cosine, max_abs, max_rel, top1, note)
    return found.to_dict()


def check_graph(graph: Graph) -> None:
    """The invariants of Graph (see its docstring), after a pass.

    Raises:
        ConstraintError: one is broken; names node and value.
    """
    for problem in _problems(graph):
        raise problem


def _problems(graph: Graph) -> Iterator[ConstraintError]:
    seen_nodes: set[str] = set()
    made = {id(v) for v in graph.values.values() if v.producer is None}
    uses = {(id(v), id(n), i) for v in graph.values.values() for n, i in v.uses}
    for node in graph.nodes:
        if node.name in seen_nodes:
            yield _broken("two nodes have one name", node.name)
        seen_nodes.add(node.name)
        for i, v in enumerate(node.inputs):
            if v is None:
                continue
            if graph.values.get(v.name) is not v:
                yield _broken("an operand is not a value of the graph", node.name, v.name)
            if id(v) not in made:
                yield _broken("an operand is used before it is made", node.name, v.name)
            if (id(v), id(node), i) not in uses:
                yield _broken("a value does not know one of its uses", node.name, v.name)
        for v in node.outputs:
            if v.producer is not node:
                yield _broken("a value does not know its producer", node.name, v.name)
            made.add(id(v))
    for v in graph.outputs:
        if id(v) not in made:
            yield _broken("a graph output is made by no node", None, v.name)
        if not v.is_output:
            yield _broken("a graph output is not marked as one", None, v.name)
    for name, weight in graph.weights.items():
        if weight.value is not None and weight.value.weight is not weight:
            yield _broken("a weight and its value do not belong together", name, weight.value.name)


def _broken(what: str, node: str | None, value: str | None = None) -> ConstraintError:
    return ConstraintError(f"the pass left a broken graph: {what}", node=node, value=value, hint="report this as a bug")


def verify(
    before: Any, after: Any, example_inputs: Any = None, *, seed: int = 0, rtol: float | None = None
) -> Comparison:
    """Check that two models compute the same function on the example inputs and on made-up ones.

    Args:
        before, after: anything ``fl.load`` takes; they may be of different kinds if their inputs have one set of names.
        example_inputs: one call's arguments; modules need them.
        seed: of the inputs that are made up.
        rtol: bound on ``max |a - b| / max |a|`` per output; 1e-5 for fp32, wider for half precision, if None.

    Raises:
        VerificationError: they differ; names the first diverging value, expected and found.
    """
    one, two = load(before, example_inputs), load(after, example_inputs)
    inputs = Inputs(one, example_inputs, seed)
    bound = default_rtol(one) if rtol is None else rtol
    found = compare(one, two, inputs.arrays, bound)
    if not found.ok:
        raise diverged(found, two, bound, "the two models do not compute the same function")
    return found
