"""Weight norm, spectral norm, row equilibration and scaled weight standardization."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .kinds import Reparam, Start, out_of_range, register


def _others(w: Tensor, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(w.ndim) if i != axis)


# ---- w = g v / |v| ----------------------------------------------------------------------------------------------
class WeightNorm(nn.Module):
    """w = g v / norm(v), the norm over all axes but one. Trains (g, v)."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """g, v -> w, of v's shape."""
        return v * (g / torch.linalg.vector_norm(v, dim=_others(v, self.axis), keepdim=True))

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """(norms, w itself)."""
        return torch.linalg.vector_norm(w, dim=_others(w, self.axis), keepdim=True), w


def _weight_norm(start: Start) -> tuple[list[nn.Module], dict[str, Any]]:
    axis = start.axis if start.options["dim"] is None else int(start.options["dim"]) % start.weight.ndim
    norms = torch.linalg.vector_norm(start.weight, dim=_others(start.weight, axis))
    if not bool((norms > 0).all()):
        zeros = int((norms == 0).sum())
        raise out_of_range(start, "no slice of zeros", f"{zeros} of them", "prune them first, or leave this layer out")
    return [WeightNorm(axis)], {"axis": axis}


register(
    Reparam(
        "weight_norm",
        "Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural Networks",
        _weight_norm,
        defaults={"dim": None},
    )
)


# ---- w / sigma(w) -----------------------------------------------------------------------------------------------
class Scale(nn.Module):
    """w -> c w with a stored number or vector c, so that an insertion changes nothing."""

    c: Tensor

    def __init__(self, c: Tensor) -> None:
        super().__init__()
        self.register_buffer("c", c)

    def forward(self, w: Tensor) -> Tensor:
        """c w."""
        return w * self.c

    def right_inverse(self, w: Tensor) -> Tensor:
        """w / c."""
        return w / self.c


def _spectral_norm(start: Start) -> tuple[list[nn.Module], dict[str, Any]]:
    from torch.nn.utils.parametrizations import _SpectralNorm

    steps = int(start.options["n_power_iterations"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(start.rng.integers(2**31)))
        norm = _SpectralNorm(start.weight, steps, start.axis, float(start.options["eps"]))
    norm.eval()  # the stored vectors are used as they are until somebody trains
    made: list[nn.Module] = [norm]
    with torch.no_grad():
        at = int(start.weight.abs().argmax())
        sigma = (start.weight.reshape(-1)[at] / norm(start.weight).reshape(-1)[at]).detach()
    if start.options["keep"]:
        made.append(Scale(sigma.clone()))
    return made, {"sigma": float(sigma)}


register(
    Reparam(
        "spectral_norm",
        "Spectral Normalization for Generative Adversarial Networks",
        _spectral_norm,
        exact=lambda options: bool(options["keep"]),
        defaults={"n_power_iterations": 1, "eps": 1e-12, "keep": True},
    )
)


# ---- P w, P = diag(1 / |rows|) ------------------------------------------------------------------------------------
class RowEquilibration(nn.Module):
    """w -> P w with P = diag(1 / norm of each row): the conditioned weight of "Weight Conditioning"."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, w: Tensor) -> Tensor:
        """Every row divided by its norm."""
        return w / torch.linalg.vector_norm(w, dim=_others(w, self.axis), keepdim=True)

    def right_inverse(self, w: Tensor) -> Tensor:
        """The weight itself (its rows' norms are taken off it in ``forward``)."""
        return w


def _row_equilibration(start: Start) -> tuple[list[nn.Module], dict[str, Any]]:
    w, axis = start.weight, start.axis
    norms = torch.linalg.vector_norm(w, dim=_others(w, axis), keepdim=True)
    if not bool((norms > 0).all()):
        raise out_of_range(start, "no row of zeros", "one", "prune it first, or leave this layer out")
    made: list[nn.Module] = [RowEquilibration(axis)]
    if start.options["keep"]:
        made.append(_KeptRows(norms.detach().clone()))
    rows = w.detach().double().movedim(axis, 0).reshape(w.shape[axis], -1)
    before = float(torch.linalg.cond(rows))
    after = float(torch.linalg.cond(rows / rows.norm(dim=1, keepdim=True)))
    return made, {"cond_before": before, "cond_after": after}


class _KeptRows(Scale):
    """P^-1 behind the conditioned weight; ``right_inverse`` leaves the norms to the row equilibration before it."""

    def right_inverse(self, w: Tensor) -> Tensor:
        """The weight itself: dividing by the norms here and again in P would be the same twice."""
        return w


register(
    Reparam(
        "row_equilibration",
        "Weight Conditioning for Smooth Optimization of Neural Networks",
        _row_equilibration,
        exact=lambda options: bool(options["keep"]),
        defaults={"keep": True},
    )
)


# ---- gain (w - mean) / (std sqrt(fan_in)) ---------------------------------------------------------------------------
class ScaledStandardization(nn.Module):
    """w -> gain (w - mean) / sqrt(max(var fan_in, eps)) per output. The gain is a trained parameter here."""

    def __init__(self, gain: Tensor, axis: int, eps: float) -> None:
        super().__init__()
        self.gain, self.axis, self.eps = nn.Parameter(gain), axis, eps

    def forward(self, w: Tensor) -> Tensor:
        """The standardised weight."""
        dims = _others(w, self.axis)
        fan_in = w.numel() // w.shape[self.axis]
        var, mean = w.var(dims, keepdim=True, unbiased=False), w.mean(dims, keepdim=True)
        return self.gain * (w - mean) * torch.rsqrt(torch.clamp(var * fan_in, min=self.eps))

    def right_inverse(self, w: Tensor) -> Tensor:
        """The weight itself; what is lost is its mean."""
        return w


def _scaled_ws(start: Start) -> tuple[list[nn.Module], dict[str, Any]]:
    w, dims = start.weight.detach(), _others(start.weight, start.axis)
    fan_in = w.numel() // w.shape[start.axis]
    spread = torch.sqrt(torch.clamp(w.double().var(dims, keepdim=True, unbiased=False) * fan_in, min=1e-4))
    gain = spread if start.options["gain"] is None else torch.full_like(spread, float(start.options["gain"]))
    mean = float(w.mean(dims).abs().max()) * math.sqrt(fan_in)
    made = ScaledStandardization(gain.to(w.dtype), start.axis, float(start.options["eps"]))
    return [made], {"mean_removed": mean, "fan_in": fan_in}


register(
    Reparam(
        "scaled_ws",
        "Characterizing signal propagation to close the performance gap in unnormalized ResNets",
        _scaled_ws,
        exact=lambda options: False,
        defaults={"gain": None, "eps": 1e-4},
    )
)
