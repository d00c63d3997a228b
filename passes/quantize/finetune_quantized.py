"""The pass: weight-only quantization whose codebooks, scales and codes are trained on the task (PV-tuning)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from pydantic import Field

from ...graph.errors import ConfigError
from ...graph.ir import Graph
from ..base import Context, Needs
from .formats.lookup import LookupEncoded
from .formats.protocol import Encoded
from .weight_only import WeightOnly
from .weight_sites import WeightSite


class FinetuneQuantized(WeightOnly):
    """Quantize weights, then train what the codes stand for and the codes themselves, in turns.

    "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression". Every number stays one that its format
    represents, all the way. Formats with a codebook of their own (kmeans) train it; formats with scales train these.
    """

    name: ClassVar[str] = "finetune_quantized"

    data: Any = Field(default=None, exclude=True, repr=False)
    """Examples, pairs (model inputs, target); they are held in memory, and every step sees all of them."""
    loss: str | Callable[[Any, Any], Any] = "cross_entropy"
    """``cross_entropy``, ``mse``, or a function (output, target) -> scalar."""
    rounds: int = Field(default=10, ge=1)
    """Turns, each of gradient steps on codebooks and scales and of one change of codes."""
    steps: int = Field(default=10, ge=0)
    """Gradient steps per turn."""
    rate: float = Field(default=0.02, gt=0)
    """Step size, relative to the deviation of a codebook and to each scale."""
    share: float = Field(default=0.02, ge=0, le=1)
    """Codes that one turn may change, as a share of all; 0: none, codebooks and scales only."""

    def requirement(self) -> Needs:
        return Needs.TRAINING

    def tuned(
        self, graph: Graph, ctx: Context, sites: Sequence[WeightSite], encoded: dict[str, Encoded]
    ) -> tuple[dict[str, Encoded], dict[str, Any]]:
        from ..gradients import examples
        from .pv import PVOptions, PVTuner

        chosen: dict[str, LookupEncoded] = {name: e for name, e in encoded.items() if isinstance(e, LookupEncoded)}
        if not chosen:
            raise ConfigError(
                "this format cannot be trained", node="format", expected="kmeans, int, nf4 or power", found=self.format
            )
        batches = None if self.data is not None else self.batches(ctx)
        data = list(examples(graph, self.data, batches, ctx.progress))
        options = PVOptions(self.rounds, self.steps, self.rate, self.share)
        tuner = PVTuner(graph, chosen, data, self.loss, options, ctx.seed)
        tuned: dict[str, Encoded] = dict(encoded)
        for name, found in tuner.run().items():
            tuned[name] = found
        return tuned, {"loss": tuner.history}
