"""The pass: place, choose formats, calibrate ranges, round weights, insert Q/DQ where the target's spec wants them."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, PrivateAttr

from ...graph.errors import ConfigError, ConstraintError
from ...graph.ir import Graph
from ..base import Context, Contract, Decision, Needs, Outcome, Pass
from .choices import BitChooser, Formats, matches, names_of
from .constants import store_computed
from .gates import split_gates
from .insert import Inserter
from .numerics import QuantParams, grid, least_weight_scale, range_params
from .opset import at_opset
from .placement import Placement, WeightSite, place
from .ranges import RangeEstimator, collect_ranges, estimator, weight_bounds
from .reasons import decisions_of, scale_groups
from .rounding import METHODS, RoundingJob, round_weights
from .spec import BackendSpec
from .spec.files import load_spec


class Quantize(Pass):
    """Post-training quantization, in the form that the target runs in integers.

    Every quantized tensor x becomes ``s * (clip(rint(x / s) + z) - z)``. Where pairs go, in which types and with what
    sharing a scale, is read from the target's spec; ranges come from calibration, biases sit on the accumulator's
    scale where the target adds them in integers. The graph stays a float graph with Q/DQ nodes, equal in numbers to the
    integer one up to the backend's own rounding of accumulators.
    """

    name: ClassVar[str] = "quantize"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    needs: ClassVar[Needs] = Needs.CALIBRATION
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    establishes: ClassVar[frozenset[str]] = frozenset({"quantized"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"float"})

    target: str = "onnxruntime-cpu"
    """Backend that will run the model, or a YAML file with a spec: it says where Q/DQ go, and in which types."""
    calibration: Any = Field(default=None, exclude=True, repr=False)
    """Batches of typical inputs; the run's own when absent. A few hundred samples do."""
    ranges: Literal["minmax", "mean", "percentile", "mse", "entropy", "l2", "sparse"] = "minmax"
    """How activation ranges are chosen: all that was seen, the mean of the batches' extremes, or a percentile."""
    percentile: float = Field(default=99.99, gt=50, le=100)
    """Share of elements inside the range, in percent, for ranges=percentile."""
    range_options: dict[str, Any] = Field(default_factory=dict)
    """Further options of the range estimator."""
    weight_ranges: Literal["minmax", "mse"] = "minmax"
    """How the scales of weights are chosen: nothing is clipped, or least squared error."""
    rounding: str = "nearest"
    """How weights become integers: nearest, gptq, adaround, adaquant, flexround, lrq, reconstruct."""
    rounding_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the rounding method."""
    weight_bits: int | None = Field(default=None, ge=2, le=16)
    """Bits of weights; the target's own when absent. Held in its smallest type that has as many."""
    activation_bits: int | None = Field(default=None, ge=2, le=16)
    """Bits of activations, likewise."""
    formats: dict[str, Any] = Field(default_factory=dict)
    """Formats by name: pattern -> {weight: bits or fields of a format, activation: likewise}; later patterns win."""
    bits: Any = None
    """Bits per layer: MixedPrecision(...), or its options as a mapping."""
    ignore: tuple[str, ...] = ()
    """Nodes, module paths or weights that stay in float; ``*`` and ``?`` are wildcards."""
    embeddings: bool = True
    """Store embedding tables as integers too, where the target's spec has a rule for them."""
    activation_products: bool = False
    """Quantize products of two activations (attention) too, where the target's spec leaves that to the user."""
    sqnr: float | None = Field(default=None, gt=0, le=100)
    """Least signal-to-noise ratio of the outputs on the calibration data, in decibel: the layers that cost most noise
    per multiply-accumulate stay in float until it is kept (see ``sensitivity.exclude``)."""
    spec: BackendSpec | None = None
    """A spec to use instead of the target's own."""

    _by_weights: bool = PrivateAttr(default=False)

    def requirement(self) -> Needs:
        """Weights alone, rounded to the nearest, need no data (known once the target's spec is)."""
        return Needs.NOTHING if self._by_weights else self.needs

    def prepare(self, ctx: Context) -> None:
        """The target has a spec; the methods and their options exist."""
        spec = self.backend_spec(ctx)
        self._by_weights = not spec.quantizes_activations and not self._again()
        self._estimator()
        self._bits()
        if self.rounding not in METHODS:
            close = difflib.get_close_matches(self.rounding, METHODS, n=1)
            raise ConfigError(
                "unknown rounding",
                node="rounding",
                expected=", ".join(METHODS),
                found=self.rounding,
                hint=f"did you mean {close[0]!r}?" if close else None,
            )

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        """See the class.

        Raises:
            ConstraintError: there is nothing to quantize, a pattern matches nothing, or calibration met a value that
                is not finite. ConfigError: an option does not fit the target.
        """
        spec = self.backend_spec(ctx)
        notes = [*store_computed(graph, spec), *split_gates(graph, spec)]
        placement = self._place(graph, spec, ctx.float_nodes)
        data = self._data(ctx, placement)
        formats = Formats(spec, placement)
        formats.bits(self.weight_bits, self.activation_bits)
        formats.patterns(graph, self.formats)
        chooser = self._bits()
        chosen: dict[str, Any] = {}
        if chooser is not None:
            choice = chooser.choose(graph, placement, spec, list(data), seed=ctx.seed, progress=ctx.progress)
            formats.single(choice.formats)
            chosen = choice.details
        raised = at_opset(graph, spec, placement)
        if raised is not None:
            outcome = self.apply(raised, replace(ctx, calibration=data))
            outcome.graph = outcome.graph or raised
            return outcome
        params, seen = self._activations(graph, ctx, placement, data, spec)
        job = RoundingJob(
            graph=graph,
            placement=placement,
            params=params,
            weight_params=self._weights(placement, params, spec),
            spec=spec,
            batches=data if isinstance(data, list) else [],
            method=self.rounding,
            options=self.rounding_options,
            seed=ctx.seed,
            progress=ctx.progress,
        )
        rounded = round_weights(job)
        for made in rounded.values():
            params |= made.points
        if self.sqnr is not None:
            from .sensitivity.exclude import exclude

            found = exclude(job, rounded, self.sqnr)
            kept, reached = found.reasons(self.sqnr), found.sqnr_db
            if kept:
                outcome = self.apply(graph, replace(ctx, calibration=data, float_nodes=ctx.float_nodes | set(kept)))
                return _with_floats(outcome, kept, notes)
        rounded |= round_weights(
            replace(job, placement=Placement(weights=placement.tables), method="nearest", options={})
        )
        inserter = Inserter(graph, spec)
        warnings = _unfolded(graph, placement)
        inserter.write(placement, params, rounded)
        graph.refresh()
        details = {
            "target": spec.name,
            "release": spec.release,
            "ranges": self.ranges,
            "rounding": self.rounding,
            "batches": seen,
            "quantized": len(placement.quantized),
            "weights": len(placement.weights),
            "tables": len(placement.tables),
            "points": len(placement.points),
            "layers": inserter.facts,
            "activations": _grids(placement, params),
            "scale_groups": scale_groups(placement),
            **({"bits": chosen} if chosen else {}),
            **({} if self.sqnr is None else {"sqnr_db": reached}),
        }
        decisions = [*warnings, *notes, *decisions_of(placement, inserter.facts), *placement.decisions]
        return Outcome(decisions=decisions, details=details)

    def backend_spec(self, ctx: Context) -> BackendSpec:
        """The spec in force.

        Raises:
            ConfigError: the target has none, or its file is not valid.
        """
        if self.spec is not None:
            return self.spec
        if Path(self.target).suffix in (".yaml", ".yml"):
            return load_spec(Path(self.target), lambda name: _spec_of(ctx, name).to_dict())
        return _spec_of(ctx, self.target)

    def _place(self, graph: Graph, spec: BackendSpec, kept: Collection[str] = ()) -> Placement:
        placement = place(
            graph, spec, self._ignored(graph) | set(kept), products=self.activation_products, tables=self.embeddings
        )
        if not placement.weights and not placement.tables and not placement.points:
            raise ConstraintError(
                "there is nothing to quantize for this target",
                node=spec.name,
                expected="a conv or linear layer with a stored float32 weight",
                found="; ".join(sorted({f"{d.subject}: {d.reason}" for d in placement.decisions})[:3]) or "none",
            )
        return placement

    def _data(self, ctx: Context, placement: Placement) -> Iterable[Any]:
        """The batches: a list where they are read more than once, nothing where nothing reads them."""
        again = self._again()
        if not placement.points and not again:
            return []
        batches: Iterable[Any] = self.batches(ctx)
        return list(batches) if again and not isinstance(batches, list) else batches

    def _again(self) -> bool:
        """Whether something reads the data beside the ranges of activations."""
        return self.rounding != "nearest" or self.bits is not None or self.sqnr is not None

    def _estimator(self) -> RangeEstimator:
        options = {"percentile": self.percentile} if self.ranges == "percentile" else {}
        return estimator(self.ranges, **{**options, **self.range_options})

    def _bits(self) -> BitChooser | None:
        if not isinstance(self.bits, dict):
            chooser: BitChooser | None = self.bits
            return chooser
        from .bits import MixedPrecision

        return MixedPrecision(**self.bits)

    def _ignored(self, graph: Graph) -> set[str]:
        found: set[str] = set()
        for pattern in self.ignore:
            hits = {n.name for n in graph.nodes if any(matches(name, pattern) for name in names_of(n))}
            if not hits:
                known = sorted({name for n in graph.nodes for name in names_of(n)})
                close = difflib.get_close_matches(pattern, known, n=1, cutoff=0.4)
                raise ConstraintError(
                    "an ignore pattern matches nothing",
                    value=pattern,
                    expected="a node, module path or weight name",
                    hint=f"did you mean {close[0]!r}?" if close else "`foldline inspect MODEL` lists the names",
                )
            found |= hits
        return found

    def _activations(
        self, graph: Graph, ctx: Context, placement: Placement, data: Iterable[Any], spec: BackendSpec
    ) -> tuple[dict[str, QuantParams], int]:
        """Grid per point, and the number of batches read."""
        if not placement.points:
            return {}, 0
        ranges = self._estimator()
        statistics, seen = collect_ranges(graph, data, placement.sources, ranges, progress=ctx.progress)
        roots = {}
        for root, statistic in statistics.items():
            form = placement.points[root].form
            roots[root] = _by(spec, range_params(*ranges.bounds(statistic, form), form))
        return {name: roots[point.root] for name, point in placement.points.items()}, seen

    def _weights(
        self, placement: Placement, params: dict[str, QuantParams], spec: BackendSpec
    ) -> dict[str, QuantParams]:
        """Grid per weight site and table, by name of the node."""
        found = {}
        for site in (*placement.weights, *placement.tables):
            weight = site.weight.numpy().astype(np.float32, copy=False)
            low, high, along = weight_bounds(weight, site.form, site.axis, site.in_axis, self.weight_ranges)
            made = grid(low, high, site.form, along, site.form.block)
            found[site.node.name] = _by(spec, _wide_enough(site, made, params))
        return found


def _wide_enough(site: WeightSite, made: QuantParams, params: dict[str, QuantParams]) -> QuantParams:
    """The grid with scales that let an int32 bias fit its range."""
    if site.bias is None or site.x.name not in params:
        return made
    least = least_weight_scale(site.bias.numpy().astype(np.float32).reshape(-1), params[site.x.name])
    bound = least if made.axis == site.axis and not made.block else least.max()
    return replace(made, scale=np.maximum(made.scale, bound.astype(made.scale.dtype)))


def _with_floats(outcome: Outcome, kept: dict[str, str], notes: list[Decision]) -> Outcome:
    """The outcome of quantizing the rest, with the reason why some nodes stayed in float."""
    others = [d for d in outcome.decisions if d.subject not in kept]
    outcome.decisions = [*notes, *(Decision(n, "kept in float", why) for n, why in kept.items()), *others]
    floats = outcome.details.get("floats_for_sqnr", [])
    outcome.details["floats_for_sqnr"] = [*kept, *floats]
    return outcome


def _by(spec: BackendSpec, params: QuantParams) -> QuantParams:
    """The grid with the target's rounding rule."""
    return replace(params, rule=spec.rounding.scale, ties=spec.rounding.ties)


def _grids(placement: Placement, params: dict[str, QuantParams]) -> dict[str, dict[str, Any]]:
    """Scale, zero point and type per group of points, for the report."""
    return {
        root: {
            "scale": float(params[root].scale),
            "zero_point": float(params[root].zero_point),
            "dtype": params[root].dtype,
            "bits": placement.points[root].form.bits,
        }
        for root in placement.sources
    }


def _spec_of(ctx: Context, target: str) -> BackendSpec:
    found = ctx.backends(target).spec
    if not isinstance(found, BackendSpec):
        raise ConfigError("this backend has no quantization spec", node=target, expected="a BackendSpec")
    return found


def _unfolded(graph: Graph, placement: Placement) -> list[Decision]:
    found = []
    for node in graph.nodes:
        x = node.inputs[0] if node.op == "batch_norm" and node.inputs else None
        if x is not None and x.producer is not None and x.producer.name in placement.quantized:
            reason = f"it stands unfolded after {x.producer.name}: that costs accuracy and a float pass; run Fold first"
            found.append(Decision(node.name, "warned", reason))
    return found
