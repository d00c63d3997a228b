"""Pre-calibration: weights shrunk before quantization, so that their quantized distribution stays the float one."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from ....graph.errors import ConstraintError
from ....graph.ir import Graph
from ...base import Context, Contract, Decision, Needs, Outcome, Pass
from ..choices import narrowed
from ..numerics import QuantParams
from ..sensitivity.layers import Layer, layers
from ..spec import TensorFormat

FINE = 16
"""Bins per step of the nearest-rounding grid, on which distributions are compared."""
STRENGTHS = (0.0, *(4.0**-k for k in range(8, 0, -1)))
"""Strengths tried by "auto"."""
BENT = 0.005
"""How much further from one the quantized weights' multiple of the weights may be than without shrinkage."""
STORED = ("int2", "int4", "int8", "int16")


class PreCalibrate(Pass):
    """Shrink each weight as the adaptive lasso does: sign(w) max(|w| - l / |w|, 0), then quantize as usual.

    Small weights go to zero, large ones barely move, and the range narrows; l = strength * (largest |w| of the scale)^2
    for each scale. ``strength="auto"`` takes, per layer, the one with the least KL divergence of the quantized from the
    float distribution, 0 (nothing changes, bit for bit) among the candidates: it never rises, up to ties. Left out are
    those under which the quantized weights err more, or are a worse multiple of the weights, than without: a
    distribution says nothing about which weight became which, and at 2 bits its divergence alone picks shrinkages
    that ruin a language model. A quantized weight's density is each level's mass spread evenly over its cell, on bins
    of 1/16 step. Source of the shrinkage: "Rethinking Post-Training Quantization: Introducing a Statistical
    Pre-Calibration Approach" (there it also tells outliers, which are stored apart, from the core: that is
    ``split_dense_sparse``'s part here).

    Raises:
        ConstraintError: no layer stores a float weight.
    """

    name: ClassVar[str] = "pre_calibrate"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    needs: ClassVar[Needs] = Needs.NOTHING
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    strength: float | Literal["auto"] = "auto"
    """Strength of the shrinkage, relative to the square of the largest weight that shares a scale; 0: none."""
    bits: int = Field(default=4, ge=2, le=8)
    """Width that the weights will get."""
    granularity: Literal["tensor", "out_channel", "block"] = "out_channel"
    """What will share a scale."""
    block: int = Field(default=0, ge=0)
    """Input channels in a block."""
    ignore: tuple[str, ...] = ()
    """Node names left alone."""

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        form = narrowed(TensorFormat("int8", True, self.granularity, self.block), self.bits, STORED)
        found = [layer for layer in layers(graph) if not {n.name for n in layer.nodes} & set(self.ignore)]
        if not found:
            raise ConstraintError("no layer stores a float weight", node=self.name)
        decisions = []
        for layer in ctx.progress(found, "pre-calibrating"):
            decisions.append(self._one(graph, layer, form))
        changed = [d for d in decisions if d.action == "shrunk"]
        details: dict[str, Any] = {"shrunk": len(changed), "left": len(decisions) - len(changed), "bits": self.bits}
        return Outcome(decisions=decisions, details=details)

    def _one(self, graph: Graph, layer: Layer, form: TensorFormat) -> Decision:
        w = layer.data()
        peaks = _peaks(layer, w, form)
        before = after = divergence(layer, w, w, form)
        best = 0.0 if self.strength == "auto" else float(self.strength)
        if self.strength == "auto":
            most, off = rounding_error(layer, w, w, form)
            for strength in STRENGTHS[1:]:
                changed = shrunk(w, strength * peaks**2)
                trial = divergence(layer, w, changed, form)
                if trial < after:
                    error, bent = rounding_error(layer, w, changed, form)
                    if error <= most and bent <= off + BENT:
                        best, after = strength, trial
        elif best:
            after = divergence(layer, w, shrunk(w, best * peaks**2), form)
        data = {"layer": layer.scope, "strength": best, "kl_before": before, "kl_after": after}
        if not best:
            return Decision(layer.name, "left", f"no shrinkage brings its distribution nearer: KL {before:.4g}", data)
        dtype = layer.weight.numpy().dtype
        graph.set_weight(layer.weight, shrunk(w, best * peaks**2).astype(dtype))
        return Decision(layer.name, "shrunk", f"KL to the float distribution {before:.4g} -> {after:.4g}", data)


def shrunk(w: np.ndarray, threshold: np.ndarray | float) -> np.ndarray:
    """sign(w) max(|w| - threshold / |w|, 0) in float32; zeros stay zeros."""
    size = np.abs(w)
    with np.errstate(divide="ignore", invalid="ignore"):
        left = np.where(size > 0, size - threshold / size, 0.0)
    return np.asarray(np.sign(w) * np.maximum(left, 0), dtype=np.float32)


def _peaks(layer: Layer, w: np.ndarray, form: TensorFormat) -> np.ndarray:
    """The largest |w| that shares each weight's scale, of a shape that broadcasts against w."""
    params: QuantParams = layer.params(form)
    return np.asarray(params.spread(params.scale, w.shape) * form.limits[1], dtype=np.float32)


def divergence(layer: Layer, w: np.ndarray, changed: np.ndarray, form: TensorFormat) -> float:
    """KL of the quantized ``changed`` from the float weights ``w``, in nats, pooled over scales in units of steps.

    Both are densities on bins of 1/16 of the step that nearest rounding of ``w`` has.
    """
    base = _params_of(layer, w, form)
    step = base.spread(base.scale, w.shape)
    params = _params_of(layer, changed, form)
    wide = np.broadcast_to(params.spread(params.scale, w.shape), w.shape)
    level = params.apply(changed)
    span = form.limits[1] + 1.5
    edges = int(np.ceil(span * FINE))
    p = np.histogram(w / step, bins=2 * edges, range=(-edges / FINE, edges / FINE))[0] + 0.5
    # mass of each element spread evenly over its cell [level - wide / 2, level + wide / 2]: ends of a cumulative sum
    low, high = (level - wide / 2) / step * FINE + edges, (level + wide / 2) / step * FINE + edges
    q = _spread(low.ravel(), high.ravel(), 2 * edges) + 1e-12
    p, q = p / p.sum(), q / q.sum()
    return float((q * np.log(q / p)).sum())


def rounding_error(layer: Layer, w: np.ndarray, changed: np.ndarray, form: TensorFormat) -> tuple[float, float]:
    """What the quantized ``changed`` has as ``w``: squared error, and how far its part along ``w`` is from ``w``."""
    made = _params_of(layer, changed, form).apply(changed).astype(np.float64)
    power = max(float(np.square(w, dtype=np.float64).sum()), 1e-30)
    return float(np.square(made - w).sum()), abs(float((made * w).sum()) / power - 1)


def _params_of(layer: Layer, data: np.ndarray, form: TensorFormat) -> QuantParams:
    from ..numerics import weight_params

    return weight_params(data, layer.axis, form, in_axis=layer.in_axis)


def _spread(low: np.ndarray, high: np.ndarray, bins: int) -> np.ndarray:
    """Histogram of unit masses spread evenly over [low, high], in units of bins."""
    ramp = np.zeros(bins + 2)
    slope = np.zeros(bins + 2)
    rate = 1 / (high - low)
    # the cumulative distribution is piecewise linear: each end adds a change of slope, split between its bin's edges
    for at, sign in ((low, 1.0), (high, -1.0)):
        at = np.clip(at, 0, bins)
        index = np.floor(at).astype(np.int64)
        np.add.at(ramp, index, sign * rate * (index + 1 - at))
        np.add.at(slope, np.minimum(index + 1, bins + 1), sign * rate)
    return np.maximum(ramp + np.cumsum(slope), 0)[:bins]
