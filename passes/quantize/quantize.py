"""The pass: calibrate ranges, choose integers, insert Q/DQ where the target's spec wants them."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

from pydantic import Field

from ...graph.errors import ConfigError, ConstraintError
from ...graph.ir import Graph, Node
from ..base import Context, Contract, Decision, Needs, Outcome, Pass
from .insert import Inserter
from .numerics import QuantParams, range_params
from .placement import Placement, place
from .ranges import RangeEstimator, collect_ranges, estimator
from .rounding import rounding
from .spec import BackendSpec


class Quantize(Pass):
    """Post-training quantization to int8, in the form that the target runs in integers.

    Every quantized tensor x becomes ``s * (clip(rint(x / s) + z) - z)``. Weights are symmetric per output channel,
    activations get one scale each from calibration, biases sit on the accumulator's scale. Where pairs go is the
    target's matter (its spec); the graph stays a float graph with Q/DQ nodes, equal in numbers to the integer one up to
    the backend's own rounding of accumulators.
    """

    name: ClassVar[str] = "quantize"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    needs: ClassVar[Needs] = Needs.CALIBRATION
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    establishes: ClassVar[frozenset[str]] = frozenset({"quantized"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"float"})

    target: str = "onnxruntime-cpu"
    """Backend that will run the model: its spec says where Q/DQ go."""
    calibration: Any = Field(default=None, exclude=True, repr=False)
    """Batches of typical inputs; the run's own when absent. A few hundred samples do."""
    ranges: Literal["minmax", "mean", "percentile", "mse", "entropy", "l2", "sparse"] = "minmax"
    """How activation ranges are chosen: all that was seen, the mean of the batches' extremes, or a percentile."""
    percentile: float = Field(default=99.99, gt=50, le=100)
    """Share of elements inside the range, in percent, for ranges=percentile."""
    rounding: Literal["nearest"] = "nearest"
    """How weights become integers."""
    ignore: tuple[str, ...] = ()
    """Nodes, module paths or weights that stay in float; ``*`` and ``?`` are wildcards."""
    spec: BackendSpec | None = None
    """A spec to use instead of the target's own."""

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        spec = self.spec or self._spec(ctx)
        placement = place(graph, spec, self._ignored(graph))
        if not placement.weights:
            raise ConstraintError(
                "there is nothing to quantize for this target",
                node=spec.name,
                expected="a conv or linear layer with a stored float32 weight",
                found="; ".join(sorted({f"{d.subject}: {d.reason}" for d in placement.decisions})[:3]) or "none",
            )
        ranges = estimator(self.ranges, **({"percentile": self.percentile} if self.ranges == "percentile" else {}))
        params, seen = self._calibrate(graph, ctx, placement, ranges, spec)
        inserter = Inserter(graph, spec, rounding(self.rounding))
        warnings = _unfolded(graph, placement)
        inserter.write(placement, params)
        graph.refresh()
        decisions = [*warnings, *self._decisions(placement, inserter.facts), *placement.decisions]
        details = {
            "target": spec.name,
            "ranges": self.ranges,
            "batches": seen,
            "quantized": len(placement.quantized),
            "weights": len(placement.weights),
            "points": len(placement.points),
            "layers": inserter.facts,
        }
        return Outcome(decisions=decisions, details=details)

    def _spec(self, ctx: Context) -> BackendSpec:
        found = ctx.backends(self.target).spec
        if not isinstance(found, BackendSpec):
            raise ConfigError("this backend has no quantization spec", node=self.target, expected="a BackendSpec")
        return found

    def _ignored(self, graph: Graph) -> set[str]:
        found: set[str] = set()
        for pattern in self.ignore:
            hits = {n.name for n in graph.nodes if any(_matches(name, pattern) for name in _names(n))}
            if not hits:
                known = sorted({name for n in graph.nodes for name in _names(n)})
                close = difflib.get_close_matches(pattern, known, n=1, cutoff=0.4)
                raise ConstraintError(
                    "an ignore pattern matches nothing",
                    value=pattern,
                    expected="a node, module path or weight name",
                    hint=f"did you mean {close[0]!r}?" if close else "`foldline inspect MODEL` lists the names",
                )
            found |= hits
        return found

    def _calibrate(
        self, graph: Graph, ctx: Context, placement: Placement, ranges: RangeEstimator, spec: BackendSpec
    ) -> tuple[dict[str, QuantParams], int]:
        statistics, seen = collect_ranges(graph, self.batches(ctx), placement.sources, ranges, progress=ctx.progress)
        params = {
            root: range_params(*ranges.bounds(statistic, spec.activations), spec.activations)
            for root, statistic in statistics.items()
        }
        return params, seen

    def _decisions(self, placement: Placement, facts: dict[str, dict[str, Any]]) -> list[Decision]:
        found = []
        for name, rule in placement.quantized.items():
            if rule.role == "anchor":
                data = facts[name]
                reason = f"integer kernel; weight {data['weight']} at {data['weight_sqnr_db']:.1f} dB"
                found.append(Decision(name, "quantized", reason, data))
            elif rule.role == "join":
                found.append(Decision(name, "quantized", "all operands are quantized and so is its result"))
            else:
                found.append(Decision(name, "quantized", "moves quantized elements on with the same scale"))
        return found


def _names(node: Node) -> list[str]:
    weights = [name for v in node.inputs if v is not None and v.weight is not None for name in v.weight.aliases]
    own = [v.weight.name for v in node.inputs if v is not None and v.weight is not None]
    return [name for name in (node.name, node.scope, *own, *weights) if name]


def _matches(name: str, pattern: str) -> bool:
    """Glob match of the whole name, or of a module path that contains it (``head`` takes ``head.weight``)."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _unfolded(graph: Graph, placement: Placement) -> list[Decision]:
    found = []
    for node in graph.nodes:
        x = node.inputs[0] if node.op == "batch_norm" and node.inputs else None
        if x is not None and x.producer is not None and x.producer.name in placement.quantized:
            reason = f"it stands unfolded after {x.producer.name}: that costs accuracy and a float pass; run Fold first"
            found.append(Decision(node.name, "warned", reason))
    return found
