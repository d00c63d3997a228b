"""Softmax collapse in training: finding it in logits, and gradients that do not merely scale the weights up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Collapse:
    """What softmax cross-entropy does to a batch in floating point.

    Attributes:
        share: of the samples whose loss is exactly zero, so that they give no gradient.
        exact: of the samples whose loss would be zero in float64 too; the rest is lost to the dtype alone.
        dtype: that the logits are in.
    """

    share: float
    exact: float
    dtype: str

    @property
    def found(self) -> bool:
        """Whether rounding alone took the gradient of some samples away."""
        return self.share > self.exact

    def __str__(self) -> str:
        if not self.found:
            return f"no softmax collapse in {self.dtype}"
        return (
            f"softmax collapse: the loss of {100 * self.share:.0f} % of the samples is exactly zero in {self.dtype}, "
            f"of {100 * self.exact:.0f} % in float64; use P.ReplaceSoftmax, a wider dtype or perpendicular_gradients"
        )


def softmax_collapse(logits: Tensor, labels: Tensor) -> Collapse:
    """How many samples' cross-entropy is exactly zero because all other exponentials vanish beside the label's.

    ``sum_k e^(z_k - z_y) == 1`` in the dtype of the logits: then the loss is 0 and so is its gradient, however wrong
    the direction of the weights is. Source: "Grokking at the Edge of Numerical Stability".

    Args:
        logits: float [N, classes], in the dtype in which the loss is computed.
        labels: int64 [N].
    """

    def zero(z: Tensor) -> float:
        shifted = z - z.amax(1, keepdim=True)
        own = shifted.gather(1, labels[:, None])[:, 0]
        return float(((shifted.exp().sum(1) == own.exp()) & (own == 0)).double().mean())

    return Collapse(zero(logits), zero(logits.double()), str(logits.dtype).removeprefix("torch."))


def perpendicular_gradients(module: nn.Module) -> list[RemovableHandle]:
    """Take from every weight's gradient its part along the weight: ``g - (<w, g> / <w, w>) w``.

    That part only scales the logits up once every sample is right, which ends in a collapse. The hooks act whenever a
    gradient has been accumulated; remove them with their handles. (The source's perpGrad.)
    """
    import torch

    def project(w: Tensor) -> None:
        if w.grad is None:
            return
        with torch.no_grad():
            power = (w * w).sum()
            if power > 0:
                w.grad -= (w * w.grad).sum() / power * w

    return [p.register_post_accumulate_grad_hook(project) for p in module.parameters() if p.requires_grad]
