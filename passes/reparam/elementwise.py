"""Weight compander: a bounded elementwise function of a trained tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .kinds import Reparam, Start, out_of_range, register


class Compander(nn.Module):
    """w = a atan(v / b): bounded by a pi / 2, steep at zero for small b."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, v: Tensor) -> Tensor:
        """v -> w."""
        return self.a * torch.atan(v / self.b)

    def right_inverse(self, w: Tensor) -> Tensor:
        """v = b tan(w / a), computed in float64."""
        return (self.b * torch.tan(w.double() / self.a)).to(w.dtype)


def _compander(start: Start) -> tuple[list[nn.Module], dict[str, Any]]:
    top = float(start.weight.detach().abs().max())
    a = float(start.options["a"]) if start.options["a"] is not None else max(top, 1e-12) * 2 / math.pi * 1.25
    if top >= a * math.pi / 2:
        raise out_of_range(start, f"|w| < a pi / 2 = {a * math.pi / 2:.4g}", f"{top:.4g}", "a larger a, or a=None")
    b = float(start.options["b"]) if start.options["b"] is not None else a
    return [Compander(a, b)], {"a": a, "b": b, "largest": top}


register(
    Reparam(
        "compander",
        "Weight Compander: A Simple Weight Reparameterization for Regularization",
        _compander,
        defaults={"a": None, "b": None},
    )
)
