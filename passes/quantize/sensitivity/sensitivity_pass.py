"""Sensitivity: rank the layers of a float model by what quantizing their weights costs; nothing is changed."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from ....graph.errors import ConstraintError
from ....graph.ir import Graph
from ...base import Context, Contract, Decision, Needs, Outcome, Pass
from ..choices import narrowed
from ..spec import TensorFormat
from .layers import Layer, layers

STORED = ("int2", "int4", "int8", "int16")


class Sensitivity(Pass):
    """What each layer's quantized weights cost, at each width, everything else in float.

    ``measured``: the error at the outputs with one layer quantized at a time (what comes before it is computed once).
    ``pqi``: the post-quantization integral, dF_i = (w_q - w)_i * integral of dF/dw_i from w to w_q, all layers moving
    together; the elements sum to F(w_q) - F(w) (checked, in the details), which gradients at w cannot tell since w lies
    near a minimum. ``gradient`` and ``fisher``: the two guesses from w alone. The numbers are in
    ``report.details["layers"]``, {layer: {bits: loss}}: what ``MixedPrecision(sensitivity=...)`` takes. Source of the
    integral: "Identifying Sensitive Weights via Post-quantization Integral".

    Raises:
        ConstraintError: no layer stores a float weight, or the data is empty.
        UnsupportedOp: an ONNX operator has no torch implementation.
    """

    name: ClassVar[str] = "sensitivity"
    contract: ClassVar[Contract] = Contract.EXACT
    needs: ClassVar[Needs] = Needs.CALIBRATION
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    edits: ClassVar[bool] = False

    kind: Literal["measured", "pqi", "gradient", "fisher"] = "measured"
    """How it is found."""
    metric: Literal["sqnr", "kl"] = "sqnr"
    """For kind="measured": error energy over output energy, or KL divergence of the output distribution."""
    loss: Any = "cross_entropy"
    """For the other kinds: "cross_entropy", "mse" or a function (output, target) -> scalar."""
    bits: tuple[int, ...] = (2, 4, 8)
    """Widths."""
    granularity: Literal["tensor", "out_channel"] = "out_channel"
    """What shares a scale."""
    points: int = Field(default=32, ge=2)
    """Points of the integral."""
    data: Any = Field(default=None, exclude=True, repr=False)
    """Pairs (model inputs, target) for the kinds with a loss; without them targets are drawn from the model itself."""
    calibration: Any = Field(default=None, exclude=True, repr=False)
    """Batches of typical inputs; the run's own when absent."""

    def requirement(self) -> Needs:
        return Needs.NOTHING if self.data is not None and self.kind != "measured" else Needs.CALIBRATION

    def verified(self) -> bool:
        return False

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        found = layers(graph)
        if not found:
            raise ConstraintError("no layer stores a float weight", node=self.name)
        forms = {b: narrowed(TensorFormat("int8", True, self.granularity), b, STORED) for b in sorted(set(self.bits))}
        details: dict[str, Any] = {"kind": self.kind}
        if self.kind == "measured":
            losses = self._measured(graph, found, forms, ctx)
        else:
            losses = self._from_loss(graph, found, forms, ctx, details)
        details["layers"] = losses
        least = min(forms)
        ranked = sorted(losses, key=lambda n: -losses[n][least])
        scopes = {layer.name: layer.scope for layer in found}
        decisions = [
            Decision(n, "ranked", _reason(i, losses[n], self.kind), {"layer": scopes[n], "losses": losses[n]})
            for i, n in enumerate(ranked, 1)
        ]
        return Outcome(decisions=decisions, details=details)

    def _measured(
        self, graph: Graph, found: list[Layer], forms: dict[int, TensorFormat], ctx: Context
    ) -> dict[str, dict[int, float]]:
        from .measured import Trial, measure

        trials = []
        for layer in found:

            def change(bits: int, w: np.ndarray, layer: Layer = layer) -> np.ndarray:
                return layer.rounded(forms[bits]).astype(w.dtype, copy=False)

            trials.append(Trial(layer.name, layer.value, tuple(forms), change))
        return measure(graph, trials, self.batches(ctx), self.metric, ctx.progress)

    def _from_loss(
        self, graph: Graph, found: list[Layer], forms: dict[int, TensorFormat], ctx: Context, details: dict[str, Any]
    ) -> dict[str, dict[int, float]]:
        from ...gradients import examples
        from .integral import by_layer, local_scores, post_quantization_integral

        data = list(examples(graph, self.data, None if self.data is not None else self.batches(ctx)))
        losses: dict[str, dict[int, float]] = {layer.name: {} for layer in found}
        for bits, form in forms.items():
            rounded = {layer.weight.name: layer.rounded(form) for layer in found}
            if self.kind == "pqi":
                made = post_quantization_integral(
                    graph, rounded, data, self.loss, points=self.points, seed=ctx.seed, progress=ctx.progress
                )
                details.setdefault("sums", {})[bits] = {"integral": made.total, "change": made.change}
                scores = made.elements
            else:
                scores = local_scores(graph, rounded, data, self.loss, ctx.seed)[self.kind == "fisher"]
            for name, value in by_layer(scores, found).items():
                losses[name][bits] = value
        return losses


def _reason(place: int, losses: dict[int, float], kind: str) -> str:
    text = ", ".join(f"{bits} bits {value:.3g}" for bits, value in sorted(losses.items()))
    what = {"measured": "loss at the outputs", "pqi": "integrated loss change"}.get(kind, f"loss change by {kind}")
    return f"place {place} in sensitivity; {what}: {text}"
