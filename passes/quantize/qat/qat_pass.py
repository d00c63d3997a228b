"""The pass qat: fake quantization where the target wants Q/DQ, so that a plain training loop learns around it."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ....graph.errors import ConstraintError
from ....graph.ir import Graph
from ...base import Context, Contract, Decision, Needs, Outcome
from ..choices import Formats
from ..constants import store_computed
from ..quantize import Quantize, _unfolded
from .prepare import FakeQuantizer


class QuantizeAware(Quantize):
    """Quantization-aware training: the model as it will be in integers, trainable in plain PyTorch.

    Each value and weight that :class:`Quantize` would store as integers passes through
    ``s * (clip(rint(x / s) + z, low, high) - z)``, to the bit what Q/DQ give, with straight-through gradients. Scales
    start where calibration puts them; learned ones are parameters of the module ("Learned Step Size Quantization"),
    statistical ones follow the weight, factor * mean |w| / largest integer ("Oscillation-free Quantization for Low-bit
    Vision Transformers"). Train ``result.model``, with :class:`~foldline.passes.quantize.qat.freezing.WeightFreezing`
    against oscillation if need be, then ``P.freeze_quantized`` stores the integers. Fold first: a batch norm left
    unfolded is trained in eval mode. Embedding tables and biases train in float.
    """

    name: ClassVar[str] = "qat"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    needs: ClassVar[Needs] = Needs.CALIBRATION
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    establishes: ClassVar[frozenset[str]] = frozenset({"fake_quantized"})
    invalidates: ClassVar[frozenset[str]] = frozenset()

    rounding: Literal["nearest"] = "nearest"
    """Training rounds to the nearest integer."""
    weight_scales: Literal["learned", "statistical", "fixed"] = "learned"
    """How the scales of weights come about."""
    activation_scales: Literal["learned", "fixed"] = "learned"
    """Whether the scales of activations train."""
    factor: float = Field(default=2.0, gt=0)
    """Of statistical scales, in mean magnitudes of the weight."""

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        """See the class.

        Raises:
            ConstraintError: an ONNX graph, nothing to quantize, or a format that does not train.
        """
        if graph.kind != "fx":
            raise ConstraintError(
                "training needs a torch module", node=graph.name, found=graph.kind,
                hint="foldline.graph.onnx.as_torch.to_torch(graph) makes a trainable module of an ONNX graph",
            )  # fmt: skip
        spec = self.backend_spec(ctx)
        notes = store_computed(graph, spec)
        placement = self._place(graph, spec, ctx.float_nodes)
        placement.tables.clear()  # they are stored as integers when the training is over
        data = self._data(ctx, placement)
        formats = Formats(spec, placement)
        formats.bits(self.weight_bits, self.activation_bits)
        formats.patterns(graph, self.formats)
        chooser = self._bits()
        if chooser is not None:
            choice = chooser.choose(graph, placement, spec, list(data), seed=ctx.seed, progress=ctx.progress)
            formats.single(choice.formats)
        params, seen = self._activations(graph, ctx, placement, data, spec)
        writer = FakeQuantizer(graph, self.weight_scales, self.activation_scales, self.factor)
        warnings = _unfolded(graph, placement)
        writer.write(placement, params, self._weights(placement, params, spec))
        graph.refresh()
        details = {
            "target": spec.name,
            "batches": seen,
            "weights": len(placement.weights),
            "points": len(placement.points),
            "quantizers": writer.inserted,
        }
        quantizers = [
            Decision(q.get("weight") or q["value"], "fake-quantized", f"to {q['bits']} bits", q)
            for q in writer.inserted
        ]
        decisions = [*warnings, *notes, *quantizers, *placement.decisions]
        return Outcome(decisions=decisions, details=details)
