"""Searching widths by training: noise of a quantizer's size in front of weights, mixed over widths, made discrete."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ....graph.errors import ConfigError, ConstraintError
from .costs import bit_operations

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class QuantNoise(nn.Module):
    """w plus uniform noise that stands for its rounding, mixed over widths by softmax(logits).

    A width of b bits has the step max|w| / (2^(b-1) - 1) and adds U(-step / 2, step / 2), of variance step^2 / 12. In
    eval mode, or with ``scale`` 0, w passes unchanged. Differentiable everywhere, unlike rounding, so that widths and
    weights are trained together. Source: "QuantNAS for super resolution: searching for efficient quantization-friendly
    architectures against quantization noise".

    Attributes:
        logits: one per width, trained.
        scale: of the noise; 1 is that of the quantizer.
    """

    def __init__(self, widths: Sequence[int], scale: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        if not widths or min(widths) < 2:
            raise ConfigError("widths are numbers of bits from 2 on", node="widths", found=tuple(widths))
        self.widths = tuple(widths)
        self.scale = scale
        self.logits = nn.Parameter(torch.zeros(len(self.widths)))
        self._draw = torch.Generator().manual_seed(seed)

    def steps(self, w: Tensor) -> list[Tensor]:
        """The step of each width."""
        peak = w.detach().abs().max()
        return [peak / (2 ** (b - 1) - 1) for b in self.widths]

    def forward(self, w: Tensor) -> Tensor:
        if not self.training or not self.scale:
            return w
        shares = self.logits.softmax(0)
        for share, step in zip(shares, self.steps(w), strict=True):
            noise = torch.rand(w.shape, generator=self._draw).to(w) - 0.5
            w = w + share * (self.scale * step * noise)
        return w

    def expected_bits(self) -> Tensor:
        """Mean width under the mixture; differentiable."""
        widths = torch.tensor(self.widths, dtype=self.logits.dtype, device=self.logits.device)
        return (self.logits.softmax(0) * widths).sum()

    def entropy(self) -> Tensor:
        """Of the mixture, in nats: 0 once it has settled on one width."""
        logp = self.logits.log_softmax(0)
        return -(logp.exp() * logp).sum()


def insert_quant_noise(
    model: nn.Module, widths: Sequence[int] | Mapping[str, Sequence[int]], scale: float = 1.0, seed: int = 0
) -> dict[str, QuantNoise]:
    """Put noise in front of the weight of every convolution and linear layer, in place: {layer name: its noise}.

    Args:
        widths: for all layers, or by layer name (others are left alone).

    Raises:
        ConfigError: a name is no convolution or linear layer. ConstraintError: the model has none.
    """
    named = {n: m for n, m in model.named_modules() if isinstance(m, LAYERS)}
    wishes = dict(widths) if isinstance(widths, Mapping) else dict.fromkeys(named, tuple(widths))
    unknown = sorted(set(wishes) - set(named))
    if unknown:
        raise ConfigError("no such layer", node=unknown[0], expected=", ".join(named), found=unknown[0])
    if not wishes:
        raise ConstraintError("there is no layer to add noise to", node=type(model).__name__)
    found = {}
    for i, (name, choices) in enumerate(wishes.items()):
        found[name] = QuantNoise(choices, scale, seed + i)
        parametrize.register_parametrization(named[name], "weight", found[name])
    return found


def noises(model: nn.Module) -> dict[str, QuantNoise]:
    """The noises in a model by layer name."""
    return {
        name: part
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module, "weight")
        for part in module.parametrizations["weight"]  # type: ignore[union-attr, index]
        if isinstance(part, QuantNoise)
    }


def expected_bit_operations(model: nn.Module, macs: Mapping[str, int], activation_bits: float = 8) -> Tensor:
    """Sum over layers of MACs x expected weight bits x activation bits: a differentiable cost to train against."""
    found = noises(model)
    terms = [bit_operations(macs[n], 1, activation_bits) * x.expected_bits() for n, x in found.items()]
    return torch.stack(terms).sum()


def settle(model: nn.Module) -> Tensor:
    """Mean entropy of the mixtures over log(number of widths), in [0, 1]: the term that drives each to one width."""
    terms = [x.entropy() / math.log(max(len(x.widths), 2)) for x in noises(model).values()]
    return torch.stack(terms).mean()


def discretise(model: nn.Module) -> dict[str, dict[str, int]]:
    """Take the likeliest width of every layer and the noise out, in place; weights are the trained ones.

    Returns:
        ``{layer: {"weight": bits}}``, which ``P.Quantize(formats=...)`` takes. Ties go to fewer bits.
    """
    modules = dict(model.named_modules())
    found = {}
    for name, noise in noises(model).items():
        best = max(zip(noise.logits.tolist(), noise.widths, strict=True), key=lambda pair: (pair[0], -pair[1]))[1]
        found[name] = {"weight": int(best)}
        noise.eval()
        parametrize.remove_parametrizations(modules[name], "weight", leave_parametrized=True)
    return found
