"""Diagnose: where a quantized model loses, layer by layer and point by point, with the numbers that say why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from ...graph.ir import Graph, Node, Value
from ..base import Context, Contract, Decision, Needs, Outcome, Pass
from .correct.sites import Site, float_reference, sites
from .diagnose_numbers import ErrorSums, Spread, stored_grid

if TYPE_CHECKING:
    from .correct.walk import PairWalk


class Diagnose(Pass):
    """Compare a quantized model with the float one along the whole graph; nothing is changed.

    Per layer: SQNR of its stored weight, of its quantized input alone (the float input through the grid), and of its
    output in the running model (all errors so far). Per point (Q/DQ pair): SQNR of the pair alone and of what has
    accumulated, the share of elements clipped, and the share of the grid that is used. Histograms of weights and
    activations, with the grid. Optionally the sensitivity ranking: what each layer's rounding alone costs at the
    outputs, everything else in float. All of it is in ``report.details`` (``quantization``) and on the HTML page;
    layers with something to say get a decision, so that ``report.explain(name)`` tells it.

    Memory: the live values of both models for the samples at once.

    Raises:
        ConfigError: no float model is known.
        ConstraintError: the data is empty. UnsupportedOp: an ONNX operator has no torch implementation.
    """

    name: ClassVar[str] = "diagnose"
    contract: ClassVar[Contract] = Contract.EXACT
    needs: ClassVar[Needs] = Needs.CALIBRATION
    requires: ClassVar[frozenset[str]] = frozenset({"quantized"})
    edits: ClassVar[bool] = False

    samples: int = Field(default=32, ge=1)
    """Calibration samples that both models are run on."""
    sensitivity: Literal["none", "sqnr", "kl"] = "sqnr"
    """Rank layers by what their rounding alone costs at the outputs; "none": leave that out."""
    histograms: bool = True
    """Collect histograms (64 bins per tensor)."""
    calibration: Any = Field(default=None, exclude=True, repr=False)
    """Batches of typical inputs; the run's own when absent."""
    reference: Any = Field(default=None, exclude=True, repr=False)
    """The float model (anything fl.load takes, or a graph), where P.Quantize ran elsewhere."""

    def verified(self) -> bool:
        return False

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        from .bits.mixed import first_samples
        from .correct.walk import PairWalk

        reference = float_reference(ctx, self.reference, self.name)
        batches = first_samples(graph, list(self.batches(ctx)), self.samples)
        layers = sites(graph, reference)
        walk = PairWalk(graph, reference, batches)
        points, outputs = self._walk(walk, graph, reference, layers, ctx)
        found = [self._layer(site, outputs.get(site.node.name), points) for site in layers]
        ranking = self._ranking(reference, layers, batches, ctx) if self.sensitivity != "none" else {}
        for item in found:
            item["sensitivity_db"] = ranking.get(item["name"])
        details = {"quantization": {"layers": found, "points": list(points.values()), "sensitivity": self.sensitivity}}
        return Outcome(decisions=_said(found, list(points.values())), details=details)

    def _walk(
        self, walk: PairWalk, graph: Graph, reference: Graph, layers: list[Site], ctx: Context
    ) -> tuple[dict[str, dict[str, Any]], dict[str, ErrorSums]]:
        """Points in order, {value name: facts}, and the error of each layer's output."""
        twins = {n.name: n for n in reference.nodes}
        pairs_at: dict[str, list[Node]] = {}
        points: dict[str, dict[str, Any]] = {}
        for node in graph.nodes:
            x = quantized_value(node, reference)
            if x is None:
                continue
            if x.is_input:
                self._point(walk, node, points)
            elif x.producer is not None:
                pairs_at.setdefault(x.producer.name, []).append(node)
        by_name = {s.node.name: s for s in layers}
        wanted = [
            (n, twins[n.name]) for n in graph.nodes if n.name in twins and (n.name in pairs_at or n.name in by_name)
        ]
        outputs: dict[str, ErrorSums] = {}
        for node, twin in walk.visit(wanted, ctx.progress):
            both = walk.outputs(node, twin)
            if node.name in by_name and both is not None:
                outputs[node.name] = ErrorSums.of(*both)
            for quantize in pairs_at.get(node.name, ()):
                self._point(walk, quantize, points)
        return points, outputs

    def _point(self, walk: PairWalk, quantize: Node, points: dict[str, dict[str, Any]]) -> None:
        x = quantized_value(quantize, walk.reference)
        assert x is not None
        grid = stored_grid(quantize)
        there = walk.there.values(walk.reference.values[x.name])
        here = walk.here.values(x)
        if grid is None or there is None or here is None:
            return
        spread = Spread(grid, self.histograms)
        alone = ErrorSums()
        for tensor in there:
            data = tensor.float().numpy()
            rounded = grid.apply(data)
            alone.add(data, rounded)
            spread.add(data)
        reader = next((n for v in [quantize.output] for n, _ in v.uses), quantize)
        scope = quantize.scope or next((n.scope for n, _ in reader.output.uses), "")
        points[x.name] = {
            "name": x.name,
            "layer": scope or x.name,
            "own_db": alone.decibel,
            "accumulated_db": ErrorSums.of(there, here).decibel,
            **spread.facts(),
        }

    def _layer(self, site: Site, output: ErrorSums | None, points: dict[str, dict[str, Any]]) -> dict[str, Any]:
        grid = stored_grid(site.dequantize, site.stored.numpy())
        w = np.asarray(site.weight.numpy(), dtype=np.float32)
        error = ErrorSums()
        error.add(w, site.quantized())
        x = site.twin.inputs[1 - site.position if site.node.op == "matmul" else 0]
        into = points.get(x.name) if x is not None else None
        spread = Spread(grid, self.histograms)
        spread.add(w)
        return {
            "name": site.node.name,
            "layer": site.scope,
            "op": site.node.op,
            "weight": site.weight.name,
            "weight_db": error.decibel,
            "input": None if x is None else x.name,
            "input_db": None if into is None else into["own_db"],
            "output_db": None if output is None else output.decibel,
            **{f"weight_{k}": v for k, v in spread.facts().items()},
        }

    def _ranking(
        self, reference: Graph, layers: list[Site], batches: list[dict[str, np.ndarray]], ctx: Context
    ) -> dict[str, float | None]:
        """SQNR in dB of the outputs with only this layer's weight quantized (or -10 log10 of the KL divergence)."""
        from .sensitivity.measured import Trial, measure

        trials = []
        for site in layers:
            value = site.weight.value
            assert value is not None

            def change(_: int, w: np.ndarray, site: Site = site) -> np.ndarray:
                return site.quantized().astype(w.dtype, copy=False)

            trials.append(Trial(site.node.name, value, (0,), change))
        metric: Any = self.sensitivity
        found = measure(reference, trials, batches, metric, ctx.progress)
        return {n: None if losses[0] <= 0 else -10 * float(np.log10(losses[0])) for n, losses in found.items()}


def quantized_value(node: Node, reference: Graph) -> Value | None:
    """The float model's value that a quantize node takes, through a clip to its levels; None for other nodes."""
    x = node.inputs[0] if node.op == "quantize" and node.inputs else None
    if x is not None and x.name not in reference.values and x.producer is not None and x.producer.op == "clip":
        x = x.producer.inputs[0]
    return None if x is None or x.is_const or x.name not in reference.values else x


CLIPPED = 0.01
"""Share of clipped elements from which a point is worth a word."""
UNUSED = 0.25
"""Share of the grid in use below which a point is worth a word."""


def _said(layers: list[dict[str, Any]], points: list[dict[str, Any]]) -> list[Decision]:
    """The most sensitive layers, the largest drops along the graph, and points whose grid fits badly."""
    found = []
    ranked = sorted((x for x in layers if x["sensitivity_db"] is not None), key=lambda x: x["sensitivity_db"])
    for i, item in enumerate(ranked[:5], 1):
        reason = f"number {i} in sensitivity: its rounding alone leaves the outputs {item['sensitivity_db']:.1f} dB"
        found.append(Decision(item["name"], "ranked", reason, {"layer": item["layer"], "weight_db": item["weight_db"]}))
    for item in points:
        if item["clipped"] >= CLIPPED:
            reason = f"{item['clipped']:.1%} of its elements are clipped: ranges that cover more may do better"
            found.append(Decision(item["name"], "clips", reason, {"layer": item["layer"], "own_db": item["own_db"]}))
        elif item["used"] < UNUSED:
            reason = (
                f"only {item['used']:.0%} of its grid is used on this data: outliers, or a scale shared with others"
            )
            found.append(
                Decision(item["name"], "wastes range", reason, {"layer": item["layer"], "own_db": item["own_db"]})
            )
    return found
