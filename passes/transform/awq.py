"""AwqScale: weight channels that meet large activations are scaled up before the weights are rounded."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from ...graph.ir import Graph
from ..base import Context, Contract, Decision, Needs, Outcome, Pass
from ..quantize.formats.cost import Cost
from .boundary import environment, find_boundaries
from .common import Scaler, Site, pooled, sites_of
from .grids import Formats, formats_of, layer_error
from .samples import Rows, sample


class AwqScale(Pass):
    """Activation-aware weight scaling for weight-only quantization.

    Identity: ``(x / s) (s W) = x W`` per input channel. ``AWQ: Activation-aware Weight Quantization for LLM
    Compression and Acceleration`` takes ``s = mean|x|^a`` with ``a`` from a grid, by the error of the rounded layer's
    output; here also ``mean|x|^a / max|W|^b``. Exact up to float rounding.

    ``clip`` also searches, for every output channel and block, how far the weights are cut off before rounding, by the
    error of the block's part of the output on the calibration rows; that changes the function (approximate). Errors are
    those of the format that ``bits``, ``block`` and ``symmetric`` describe: give the same to the pass that rounds.
    """

    name: ClassVar[str] = "awq_scale"
    contract: ClassVar[Contract] = Contract.EXACT
    needs: ClassVar[Needs] = Needs.CALIBRATION
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    bits: int = Field(4, ge=2, le=8)
    """Width of the weights."""
    block: int = Field(0, ge=0)
    """Input channels that share a weight scale; 0: one scale per output channel."""
    symmetric: bool = False
    """Weights will be rounded without zero points."""
    grid: int = Field(20, ge=1)
    """Steps of the search over the exponent of the activations."""
    weight_exponents: list[float] = Field(default_factory=lambda: [0.0, 0.5], min_length=1)
    """Exponents b tried for the weights' own ranges."""
    clip: bool = False
    """Search cut-offs of the weights too."""
    clip_least: float = Field(0.5, gt=0, le=1)
    """Smallest cut-off tried, as a share of the largest magnitude."""
    clip_gain: bool = True
    """Scale what was cut off so that the rounded weights' outputs keep their gain: a cut alone makes them smaller."""
    insert: bool = False
    """Insert a product where nothing before a layer absorbs the factors."""
    rows: int = Field(512, ge=16)
    """Rows of activations kept per layer."""
    ignore: list[str] = Field(default_factory=list)
    """Glob patterns of layers to leave alone."""
    calibration: Any = Field(None, exclude=True)
    """Batches; those of the run if None."""

    def promise(self) -> Contract:
        return Contract.APPROXIMATE if self.clip else Contract.EXACT

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        formats = formats_of(ctx, None, self.bits, 16, self.block, symmetric=self.symmetric)
        scaler = Scaler(graph, environment(graph, ctx))
        sites = sites_of(find_boundaries(graph), self.ignore)
        places = {site.boundary.name: site.boundary.axis for site in sites}
        rows = sample(graph, self.batches(ctx), places, Rows, self.rows, ctx.progress)
        decisions = []
        for site in ctx.progress(sites, "searching scales"):
            fresh, seen = sites_of([site.boundary], [])[0], rows[site.boundary.name]
            classes, refused = scaler.probe(site.boundary)
            if refused is None or self.insert:
                decision, factors = self._scale(scaler, fresh, seen, formats, classes, refused is not None)
            else:
                reason = f"nothing before it takes the factors: {refused.reason}"
                decision, factors = Decision(fresh.name, "kept", reason), None
            decisions.append(decision)
            if self.clip:
                decisions += self._clip(graph, site, seen, formats, factors)
        graph.refresh()
        scaled = sum(d.action == "scaled" for d in decisions)
        return Outcome(decisions=decisions, details={"scaled": scaled, "sites": len(sites)})

    def _scale(
        self, scaler: Scaler, site: Site, rows: Rows, formats: Formats, classes: np.ndarray | None, product: bool
    ) -> tuple[Decision, np.ndarray | None]:
        factors, exponents, before, after = self._search(site, rows, formats, classes)
        data = {"exponents": exponents, "error_before": before, "error_after": after}
        if factors is None:
            return Decision(site.name, "kept", "no scale lowers the error", data), None
        done = (scaler.insert if product else scaler.fold)(site.boundary, factors)
        if not isinstance(done, list):
            return Decision(site.name, "kept", f"nothing takes the factors: {done.reason}", data), None
        how = "a product was inserted" if product else f"absorbed by {', '.join(done)}"
        reason = f"error {before:.4g} -> {after:.4g} of the output's power; {how}"
        return Decision(site.name, "scaled", reason, data | {"into": done, "inserted": product}), factors

    def _search(
        self, site: Site, rows: Rows, formats: Formats, classes: np.ndarray | None
    ) -> tuple[np.ndarray | None, tuple[float, float], float, float]:
        x = rows.rows
        reference = np.concatenate([x @ m.T for m in site.matrices], 1)
        power = max(float(np.square(reference).sum(dtype=np.float64)), 1e-30)
        before = layer_error(reference, x, [formats.weights(m) for m in site.matrices])
        mean, peak = pooled(rows.mean_magnitude, classes), pooled(site.weight_peak, classes)
        alive = (mean > 0) & (peak > 0)
        best, at, least = None, (0.0, 0.0), before
        for b in self.weight_exponents:
            for step in range(self.grid + 1):
                a = step / self.grid
                s = np.ones(len(mean))
                s[alive] = np.maximum(mean[alive] ** a / peak[alive] ** b, 1e-4)
                s[alive] /= np.exp(np.log(s[alive]).mean())
                f = s.astype(np.float32)
                now = layer_error(reference, x / f, [formats.weights(m * f) for m in site.matrices])
                if now < least:
                    best, at, least = s, (a, b), now
        return best, at, before / power, least / power

    def _clip(
        self, graph: Graph, site: Site, rows: Rows, formats: Formats, factors: np.ndarray | None
    ) -> list[Decision]:
        """Cut the weights of every output channel (and block) where the rounded layer errs least."""
        decisions = []
        x = rows.rows if factors is None else rows.rows / factors.astype(np.float32)
        fresh = sites_of([site.boundary], [])[0]
        for (node, _), matrix in zip(fresh.boundary.readers, fresh.matrices, strict=True):
            weight = None if node.input(1) is None else node.inputs[1].weight  # type: ignore[union-attr]
            if weight is None or len(weight.shape) != 2:
                continue
            cut, share = best_clip(
                x, matrix.astype(np.float32), formats, self.clip_least, self.block, gain=self.clip_gain
            )
            graph.set_weight(
                weight, np.ascontiguousarray(cut if weight.shape == cut.shape and not _turned(node) else cut.T)
            )
            data = {"mean_share": share}
            decisions.append(Decision(weight.name, "clipped", f"to {share:.2f} of the range on average", data))
        return decisions


def _turned(node: Any) -> bool:
    return node.op == "matmul" or bool(node.attrs.get("transposed_weight"))


def best_clip(
    x: np.ndarray,
    matrix: np.ndarray,
    formats: Formats,
    least: float,
    block: int,
    steps: int = 10,
    *,
    gain: bool = False,
) -> tuple[np.ndarray, float]:
    """The weight [out, in] cut at the best share of each (output channel, block)'s range, and the mean share.

    Errors are measured on the partial outputs of a block, ``x_block @ (Q(W) - W)_block``; no cut is one of the
    candidates, so that no block errs more than without.

    Args:
        gain: multiply each candidate so that the rounded block's outputs have no error along the block's own.
    """
    out, size = matrix.shape
    width = block or size
    starts = range(0, size, width)
    cut, shares = matrix.copy(), []
    for start in starts:
        part, rows = matrix[:, start : start + width], x[:, start : start + width]
        cost = Cost.of(rows.astype(np.float64).T @ rows, part.shape[1], 0)
        first = formats.weights(part) - part
        best, chosen, error = part.copy(), np.ones(out), cost.inner(first, first)[:, 0]
        low, high = np.minimum(part.min(1, keepdims=True), 0), np.maximum(part.max(1, keepdims=True), 0)
        if formats.weight.symmetric:
            low, high = np.minimum(low, -high), np.maximum(high, -low)
        for share in np.linspace(1.0, least, steps, endpoint=True, dtype=np.float32):
            clipped = np.clip(part, low * share, high * share)
            made = formats.weights(clipped)
            if gain:
                factors = cost.gain(made, part).astype(np.float32)
                clipped = clipped * factors
                made = formats.weights(clipped)
            off = made - part
            now = cost.inner(off, off)[:, 0]
            better = now < error
            best[better], chosen[better], error[better] = clipped[better], share, now[better]
        cut[:, start : start + width] = best
        shares.append(chosen.mean())
    return cut, float(np.mean(shares))
