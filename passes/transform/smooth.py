"""Smooth: activations' outlier channels are divided away into what makes them, by factors searched for each layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from ...graph.ir import Graph
from ..base import Context, Contract, Decision, Needs, Outcome, Pass
from .boundary import environment, find_boundaries
from .common import Scaler, Site, pooled, sites_of
from .grids import Formats, formats_of, layer_error
from .samples import Halves, Rows, sample

FLOOR = 1e-5
"""Smallest factor, relative to the largest."""


@dataclass(frozen=True)
class Found:
    """The factors of one site.

    Attributes:
        factors: [channels], positive, or None where no candidate beats leaving the site alone.
        alpha: the migration strength that gave them.
        before_db, after_db: signal to noise of the quantized layers' outputs on rows held out.
    """

    factors: np.ndarray | None
    alpha: float
    before_db: float
    after_db: float


class Smooth(Pass):
    """Migrate quantization difficulty from activations to weights, with the strength searched for every layer.

    Identity: ``(x / s) (s W) = x W`` per input channel. ``SmoothQuant: Accurate and Efficient Post-Training
    Quantization for Large Language Models`` takes ``s = max|x|^alpha / max|W|^(1 - alpha)`` with one alpha for the
    model; here every boundary (a value and the linear layers that read it) gets the alpha whose quantized output, under
    the target's formats on held-out samples, is nearest to the float one, or none. The division is folded into whatever
    makes the value: a norm's gain, a linear layer's rows (also through attention to the value projection, through relu,
    the linear branch of a gated unit), a constant product. Where nothing absorbs it the layer stays, with the reason,
    unless ``insert`` asks for a product.

    Exact up to float rounding. Rows are sampled without regard to the order of batches.
    """

    name: ClassVar[str] = "smooth"
    contract: ClassVar[Contract] = Contract.EXACT
    needs: ClassVar[Needs] = Needs.CALIBRATION
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    target: str | None = None
    """Backend whose formats the error is measured under; None: asymmetric activations, per-channel weights, 8 bits."""
    weight_bits: int | None = Field(None, ge=2, le=8)
    """Width of the weights, instead of the target's."""
    activation_bits: int | None = Field(None, ge=2, le=16)
    """Width of the activations, instead of the target's."""
    alphas: list[float] = Field(default_factory=lambda: [round(0.05 * i, 2) for i in range(21)], min_length=1)
    """Strengths tried for every layer; one entry sets it for all, whatever it gains (the published recipe)."""
    insert: bool = False
    """Insert a product where nothing before a layer absorbs the division (a residual reads the same value, a GELU)."""
    gain_db: float = Field(0.1, ge=0)
    """Least gain in signal to noise for which a layer is changed."""
    insert_gain_db: float = Field(1.0, ge=0)
    """Least gain for which a product is inserted."""
    rows: int = Field(512, ge=16)
    """Rows of activations kept per layer."""
    ignore: list[str] = Field(default_factory=list)
    """Glob patterns of layers to leave alone."""
    calibration: Any = Field(None, exclude=True)
    """Batches; those of the run if None."""

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        formats = formats_of(ctx, self.target, self.weight_bits, self.activation_bits)
        scaler = Scaler(graph, environment(graph, ctx))
        decisions: list[Decision] = []
        open_sites = []
        for site in sites_of(find_boundaries(graph), self.ignore):
            classes, refused = scaler.probe(site.boundary)
            if refused is not None and not self.insert:
                decisions.append(Decision(site.name, "kept", f"nothing before it takes the factors: {refused.reason}"))
            else:
                open_sites.append((site, classes, refused))
        places = {site.boundary.name: site.boundary.axis for site, _, _ in open_sites}
        rows = sample(graph, self.batches(ctx), places, Halves, self.rows, ctx.progress)
        folded = inserted = 0
        for site, classes, refused in ctx.progress(open_sites, "searching alpha"):
            fresh = sites_of([site.boundary], [])[0]  # an earlier boundary may have changed these weights
            found = search(fresh, rows[site.boundary.name], formats, self.alphas, classes)
            decision = self._put(scaler, fresh, found, refused is not None, refused.reason if refused else "")
            folded += decision.action == "smoothed" and refused is None
            inserted += decision.action == "smoothed" and refused is not None
            decisions.append(decision)
        graph.refresh()
        return Outcome(decisions=decisions, details={"folded": folded, "inserted": inserted, "sites": len(decisions)})

    def _put(self, scaler: Scaler, site: Site, found: Found, by_product: bool, why: str) -> Decision:
        data = {"alpha": found.alpha, "before_db": found.before_db, "after_db": found.after_db}
        least = self.insert_gain_db if by_product else -math.inf if len(self.alphas) == 1 else self.gain_db
        if found.factors is None or found.after_db - found.before_db < least:
            gained = max(found.after_db - found.before_db, 0.0)
            return Decision(site.name, "kept", f"the best alpha gains {gained:.2f} dB, less than {least}", data)
        done = (scaler.insert if by_product else scaler.fold)(site.boundary, found.factors)
        if not isinstance(done, list):
            return Decision(site.name, "kept", f"nothing takes the factors: {done.reason}", data)
        how = f"a product was inserted ({why})" if by_product else f"absorbed by {', '.join(done) or 'the readers'}"
        reason = f"alpha {found.alpha:g}: {found.before_db:.1f} -> {found.after_db:.1f} dB; {how}"
        return Decision(site.name, "smoothed", reason, data | {"into": done, "inserted": by_product})


def factors_of(peak: np.ndarray, weight_peak: np.ndarray, alpha: float) -> np.ndarray:
    """``peak^alpha / weight_peak^(1 - alpha)``, with geometric mean 1; channels that are always zero keep 1."""
    alive = (peak > 0) & (weight_peak > 0)
    made = np.ones(len(peak))
    made[alive] = peak[alive] ** alpha / weight_peak[alive] ** (1 - alpha)
    if alive.any():
        made[alive] = np.maximum(made[alive], made[alive].max() * FLOOR)
        made[alive] /= np.exp(np.log(made[alive]).mean())
    return made


def search(
    site: Site, halves: Halves, formats: Formats, alphas: list[float], classes: np.ndarray | None = None
) -> Found:
    """The factors with which the site's quantized layers err least on rows that they were not fitted to.

    For each strength, factors and range of one half of the samples are judged on the other half, both ways; the factors
    handed back are those of all samples. (Judged on the rows they come from, strengths near 1 look best: every channel
    then ends at its own largest value, and what the next sample has beyond it is clipped.)

    Args:
        classes: channels that must share a factor.
    """
    folds = halves.folds()
    rows = [judge.rows for _, judge in folds]
    references = [np.concatenate([x @ m.T for m in site.matrices], 1) for x in rows]
    power = float(sum(np.square(r).sum(dtype=np.float64) for r in references))
    weight_peak = pooled(site.weight_peak, classes)

    def factors(part: Rows, alpha: float) -> np.ndarray:
        return factors_of(pooled(part.peak.astype(np.float64), classes), weight_peak, alpha)

    def error(alpha: float | None) -> float:
        total = 0.0
        for (fit, _), x, reference in zip(folds, rows, references, strict=True):
            assert fit.low is not None and fit.high is not None
            f = np.float32(1) if alpha is None else factors(fit, alpha).astype(np.float32)
            made = formats.activations(x / f, fit.low / f, fit.high / f)
            total += layer_error(reference, made, [formats.weights(m * f) for m in site.matrices])
        return total

    before = error(None)
    strength, least = None, before
    for alpha in alphas:
        if (now := error(alpha)) < least or len(alphas) == 1:
            strength, least = alpha, now
    best = None if strength is None else factors(halves.whole, strength)
    return Found(best, strength or 0.0, _db(power, before), _db(power, least))


def _db(power: float, noise: float) -> float:
    return float(10 * np.log10(max(power, 1e-30) / max(noise, 1e-30)))
