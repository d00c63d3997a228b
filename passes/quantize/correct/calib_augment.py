"""Calibration augmentation: a learned change of the calibration images, judged on the images as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from ....graph.errors import ConstraintError
from ....graph.execute import batches_of
from ....graph.ir import Graph, Value
from ...base import Context, Contract, Decision, Needs, Outcome, Pass
from ..choices import narrowed
from ..sensitivity.layers import layers
from ..spec import TensorFormat

if TYPE_CHECKING:
    from torch import Tensor

    from ...recover.runner import Runner

STORED = ("int2", "int4", "int8", "int16")


class CalibAugment(Pass):
    """Add learned variants of few calibration images for the passes after it: less overfitting in reconstruction.

    Bi-level: weights rounded to ``bits`` get offsets d (straight-through), trained on transformed images T(x) to give
    the float network's outputs there; T is trained so that after each such step the error on the images as they are
    falls, d(theta) = gradient of L(x; d - rate * dL(T(x); d)/dd), through the step. T is x + mix(x) + blur(x) + shift,
    a channel mixing, a 3x3 kernel per channel and a shift, all zero at the start; penalties keep the float network's
    outputs on T(x) near those on x, and T(x) at least ``margin`` away from x. The run's calibration then holds the
    images and their transforms. ``steps=0`` leaves it as it is, bit for bit. A pass with ``calibration`` of its own
    does not see them. Source: "MetaAug: Meta-Data Augmentation for Post-Training Quantization" (its transform is a
    UNet; this one is a few dozen numbers).

    Raises:
        ConstraintError: no input is an image [N, C, H, W], or no layer stores a float weight.
        UnsupportedOp: an ONNX operator has no torch implementation.
    """

    name: ClassVar[str] = "calib_augment"
    contract: ClassVar[Contract] = Contract.EXACT
    needs: ClassVar[Needs] = Needs.CALIBRATION
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    edits: ClassVar[bool] = False

    steps: int = Field(default=40, ge=0)
    """Steps of the outer level, one batch each; 0: nothing is learned, nothing is added."""
    bits: int = Field(default=4, ge=2, le=8)
    """Width of the weights that will be chosen on these images."""
    rate: float = Field(default=0.02, gt=0)
    """Learning rate of the transform (Adam)."""
    inner_rate: float = Field(default=0.05, gt=0)
    """Length of an inner step: offsets move by this share of a quantization step, root mean square per layer."""
    margin: float = Field(default=0.1, ge=0)
    """Least mean change of an image, in its own standard deviations, that costs nothing."""
    preserve: float = Field(default=1.0, ge=0)
    """Weight of keeping the float network's outputs on T(x) near those on x."""
    calibration: Any = Field(default=None, exclude=True, repr=False)
    """Batches of typical inputs; the run's own when absent."""

    def verified(self) -> bool:
        return False

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        given = self.batches(ctx)
        if not self.steps:
            return Outcome(details={"steps": 0, "added": 0})
        batches = [dict(b) for b in batches_of(graph, given)]
        images = [v for v in graph.inputs if v.rank == 4 and v.dtype.startswith("float")]
        if not images or not batches:
            raise ConstraintError(
                "there are no images to transform", node=self.name, expected="a float input [N, C, H, W] and a batch",
                found=[(v.name, v.hint) for v in graph.inputs],
            )  # fmt: skip
        learned = _Bilevel(graph, images, self)
        losses = [learned.step(batches[i % len(batches)]) for i in ctx.progress(range(self.steps), "augmenting")]
        made = [learned.transformed(b) for b in batches]
        ctx.calibration = [*batches, *made]
        moved = float(
            np.mean([np.abs(m[v.name] - b[v.name]).mean() for m, b in zip(made, batches, strict=True) for v in images])
        )
        details = {"steps": self.steps, "added": len(made), "first_loss": losses[0], "last_loss": losses[-1]}
        reason = f"{len(made)} transformed batches added, mean change {moved:.3g}"
        return Outcome(decisions=[Decision(v.name, "augmented", reason) for v in images], details=details)


class _Bilevel:
    """The transform, the offsets of the rounded weights, and one step of both levels."""

    def __init__(self, graph: Graph, images: list[Value], options: CalibAugment) -> None:
        import torch

        from ...recover.layers import LINEAR
        from ...recover.runner import runner

        self.options, self.images = options, images
        self.run: Runner = runner(graph, LINEAR)
        self.theta = {v.name: _identity(int(v.hint[1]) if v.hint else 3) for v in images}
        leaves = [t for parts in self.theta.values() for t in parts.values()]
        self.adam = torch.optim.Adam(leaves, lr=options.rate)
        form = narrowed(TensorFormat("int8", True, "out_channel"), options.bits, STORED)
        self.whole: dict[Any, Tensor] = {}
        self.rounded: dict[Any, Tensor] = {}
        self.step_size: dict[Any, float] = {}
        self.offsets: dict[Any, Tensor] = {}
        for layer in layers(graph):
            key = self.run.key(layer.value)
            self.whole[key] = self.run.stored[key]
            self.rounded[key] = torch.from_numpy(layer.rounded(form)).to(self.whole[key].dtype)
            self.step_size[key] = float(np.mean(layer.params(form).scale))
            self.offsets[key] = torch.zeros_like(self.rounded[key])
        if not self.whole:
            raise ConstraintError("no layer stores a float weight", node="calib_augment")

    def transform(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        import torch
        import torch.nn.functional as F

        found: dict[str, Any] = dict(batch)
        for v in self.images:
            x = torch.as_tensor(np.array(batch[v.name]))
            t = self.theta[v.name]
            mixed = torch.einsum("nchw,dc->ndhw", x, t["mix"])
            found[v.name] = x + mixed + F.conv2d(x, t["blur"], padding=1, groups=x.shape[1]) + t["shift"]
        return found

    def transformed(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch with its images transformed, as arrays of their dtype."""
        import torch

        with torch.no_grad():
            made = self.transform(batch)
        return {n: a.numpy().astype(batch[n].dtype) if isinstance(a, torch.Tensor) else a for n, a in made.items()}

    def outputs(self, batch: Mapping[str, Any], weights: Mapping[Any, Tensor]) -> list[Tensor]:
        self.run.stored.update(weights)
        self.run.start([dict(batch)])
        self.run.advance(len(self.run.order))
        outputs = [v for v in self.run.graph.outputs if v.dtype.startswith("float") and not v.is_const]
        return [self.run.envs[0][self.run.key(v)] for v in outputs]

    def step(self, batch: Mapping[str, np.ndarray]) -> float:
        """One inner step on T(x), one outer step on x; returns the outer error before the update."""
        import torch

        with torch.enable_grad():
            with torch.no_grad():
                wanted = self.outputs(batch, self.whole)
            changed = self.transform(batch)
            target = self.outputs(changed, self.whole)
            offsets = {k: d.clone().requires_grad_() for k, d in self.offsets.items()}
            inner = _error(target, self.outputs(changed, {k: self.rounded[k] + d for k, d in offsets.items()}))
            slopes = torch.autograd.grad(inner, list(offsets.values()), create_graph=True)
            moved = {}
            for (key, d), g in zip(offsets.items(), slopes, strict=True):
                length = self.options.inner_rate * self.step_size[key]
                moved[key] = d - length * g / g.square().mean().sqrt().clamp_min(1e-12)
            outer = _error(wanted, self.outputs(batch, {k: self.rounded[k] + d for k, d in moved.items()}))
            loss = outer + self.options.preserve * _error(wanted, target) + self._too_near(batch, changed)
            self.adam.zero_grad()
            loss.backward()
            self.adam.step()
        limit = {k: 0.5 * s for k, s in self.step_size.items()}  # as far as rounding itself could move a weight
        self.offsets = {k: d.detach().clamp(-limit[k], limit[k]) for k, d in moved.items()}
        self.run.stored.update(self.whole)
        return float(outer.detach())

    def _too_near(self, batch: Mapping[str, np.ndarray], changed: Mapping[str, Any]) -> Any:
        total: Any = 0.0
        for v in self.images:
            x = changed[v.name].new_tensor(np.array(batch[v.name]))
            distance = (changed[v.name] - x).abs().mean() / x.std().clamp_min(1e-12)
            total = total + (self.options.margin - distance).clamp_min(0)
        return total


def _identity(channels: int) -> dict[str, Tensor]:
    import torch

    parts = {
        "mix": torch.zeros(channels, channels),
        "blur": torch.zeros(channels, 1, 3, 3),
        "shift": torch.zeros(channels, 1, 1),
    }
    return {name: t.requires_grad_() for name, t in parts.items()}


def _error(wanted: list[Tensor], now: list[Tensor]) -> Tensor:
    """Squared error over squared outputs, summed over outputs."""
    terms = [
        (a - b).square().sum() / a.detach().square().sum().clamp_min(1e-12) for a, b in zip(wanted, now, strict=True)
    ]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
