"""PV-tuning: codes and what they stand for trained in turns, without a straight-through buffer.

"PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression": a P step trains the continuous parameters
(codebook, scales) by gradients; a V step changes a few codes, those that the linearised loss says help most. Here a V
step is kept only if the loss over the data falls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...graph.errors import ConfigError
from ...graph.ir import Graph
from ..gradients import Differentiable, Example, Loss, losses_of, recorded
from .formats.layout import Layout
from .formats.lookup import LookupEncoded
from .formats.scales import Scales


@dataclass
class PVOptions:
    """How long and how far.

    Attributes:
        rounds: turns of P and V.
        steps: gradient steps of a P turn.
        rate: of Adam in a P turn, relative to the deviation of the codebook (and to each scale).
        share: of the codes that a V step may change; halved while it does not help. 0: codebooks only.
    """

    rounds: int = 10
    steps: int = 10
    rate: float = 0.02
    share: float = 0.02


class _Trained:
    """One encoded weight in torch: its continuous parameters, and the dense weight they make."""

    def __init__(self, name: str, encoded: LookupEncoded, rate: float) -> None:
        self.name, self.encoded, self.layout = name, encoded, encoded.layout
        self.parameters: list[Tensor] = []
        self.groups: list[dict[str, Any]] = []
        self.table = torch.from_numpy(encoded.table.copy())
        if not encoded.shared:
            self._learn(self.table, rate * float(encoded.table.std()))
        self.log_scale: Tensor | None = None
        if encoded.scales is not None:
            self.log_scale = torch.from_numpy(np.log(encoded.scales.numbers()))
            if encoded.scales.kind in ("float32", "float16"):
                self._learn(self.log_scale, rate)
        if not self.groups:
            raise ConfigError("this format has nothing to train", node=name, expected="a codebook or scales of its own")

    def _learn(self, tensor: Tensor, rate: float) -> None:
        tensor.requires_grad_()
        self.parameters.append(tensor)
        self.groups.append({"params": [tensor], "lr": max(rate, 1e-12)})

    def _spread(self, blocks: Tensor) -> Tensor:
        width, block = self.layout.columns, self.encoded.block
        return blocks[:, torch.arange(width) // block] if block and blocks.shape[1] > 1 else blocks[:, :1]

    def matrix(self) -> Tensor:
        """[rows, columns] with gradients to the continuous parameters."""
        found = self.table[torch.from_numpy(self.encoded.codes.astype(np.int64))].flatten(1)[:, : self.layout.columns]
        if self.encoded.zeros is not None:
            found = found - self._spread(torch.from_numpy(self.encoded.zeros.astype(np.float32)))
        return found if self.log_scale is None else found * self._spread(self.log_scale.exp())

    def tensor(self) -> Tensor:
        """In the weight's shape."""
        return self.matrix().reshape(self.layout.moved).permute(self.layout.permutation)

    def current(self) -> LookupEncoded:
        """The encoded weight with the parameters as they are."""
        table = self.table.detach().numpy().copy()
        scales = self.encoded.scales
        if scales is not None and self.log_scale is not None and self.log_scale.requires_grad:
            stored = np.exp(self.log_scale.detach().numpy())
            scales = Scales(scales.kind, stored.astype(scales.stored.dtype), scales.tensor)
        return replace(self.encoded, table=table, scales=scales)


class PVTuner:
    """Trains encoded weights of one graph on examples.

    Args:
        graph: the float graph; it is only read.
        encoded: weight name -> its encoding, with a codebook or scales of its own.
        data: examples, all of which every step sees.
        loss: as everywhere in this package.
    """

    def __init__(
        self,
        graph: Graph,
        encoded: dict[str, LookupEncoded],
        data: Sequence[Example],
        loss: Loss,
        options: PVOptions,
        seed: int = 0,
    ) -> None:
        self.function = Differentiable(graph, encoded)
        self.weights = {name: _Trained(name, e, options.rate) for name, e in encoded.items()}
        self.data, self.loss, self.options, self.seed = list(data), loss, options, seed
        self.history: list[float] = []

    @recorded
    def run(self) -> dict[str, LookupEncoded]:
        """Train; ``history`` then holds the loss at the start and after every turn that was kept."""
        self.history = [self._measure()]
        share = self.options.share
        for _ in range(self.options.rounds):
            self._p_turn()
            if share > 0:
                share = self._v_turn(share)
        return {name: w.current() for name, w in self.weights.items()}

    def _gradients(self) -> tuple[float, dict[str, Tensor]]:
        """The mean loss over the data and its gradient by each dense weight."""
        total, found = 0.0, {name: torch.zeros_like(leaf) for name, leaf in self.function.leaves.items()}
        for example in self.data:
            outputs, _ = self.function(example.inputs)
            loss = losses_of(outputs[0], example, self.loss, self.seed).mean() / len(self.data)
            for name, grad in zip(found, torch.autograd.grad(loss, list(self.function.leaves.values())), strict=True):
                found[name] += grad
            total += float(loss.detach())
        return total, found

    def _put(self) -> None:
        with torch.no_grad():
            for name, w in self.weights.items():
                self.function.leaves[name].copy_(w.tensor())

    def _measure(self) -> float:
        self._put()
        with torch.no_grad():
            found = 0.0
            for example in self.data:
                outputs, _ = self.function(example.inputs)
                found += float(losses_of(outputs[0], example, self.loss, self.seed).mean()) / len(self.data)
            return found

    def _p_turn(self) -> None:
        """Adam on codebooks and scales; what was best over the data is kept."""
        optimizer = torch.optim.Adam([g for w in self.weights.values() for g in w.groups])
        best, kept = self.history[-1], self._snapshot()
        for _ in range(self.options.steps):
            self._put()
            value, grads = self._gradients()
            if value < best:
                best, kept = value, self._snapshot()
            optimizer.zero_grad(set_to_none=True)
            for name, w in self.weights.items():
                w.tensor().backward(grads[name])
            optimizer.step()
        value = self._measure()
        if value < best:
            best, kept = value, self._snapshot()
        self._restore(kept)
        self.history.append(best)

    def _snapshot(self) -> list[Tensor]:
        return [p.detach().clone() for w in self.weights.values() for p in w.parameters]

    def _restore(self, kept: list[Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip((p for w in self.weights.values() for p in w.parameters), kept, strict=True):
                p.copy_(value)

    def _v_turn(self, share: float) -> float:
        """Change the codes for which the linearised loss falls most; returns the share to begin with next time."""
        self._put()
        _, grads = self._gradients()
        plans = {name: best_changes(w.current(), grads[name].detach().numpy()) for name, w in self.weights.items()}
        gains = np.concatenate([gain.ravel() for _, gain in plans.values()])
        before = {name: w.encoded for name, w in self.weights.items()}
        for _ in range(4):
            count = max(1, int(share * gains.size))
            bar = max(float(np.partition(gains, -count)[-count]), 0.0)
            for name, (codes, gain) in plans.items():
                old = before[name]
                changed = np.where((gain >= bar) & (gain > 0), codes, old.codes).astype(old.codes.dtype)
                self.weights[name].encoded = old.with_codes(changed)
            value = self._measure()
            if value < self.history[-1]:
                self.history.append(value)
                return min(share * 2, self.options.share)
            share /= 2
        for name, old in before.items():
            self.weights[name].encoded = old
        self._put()
        return share


def best_changes(encoded: LookupEncoded, grad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every code the one nearest to where a gradient step leads, and what the linearised loss gains by it.

    The step is as long, per weight, as its codebook entries lie apart: a code then moves to a neighbour at most where
    the gradient is usual, and further only where it is large.

    Returns:
        Codes of the same shape, and gains (positive: the loss falls), 0 where the code stays.
    """
    matrix = Layout(encoded.layout.shape, encoded.layout.axis).matrix(grad)
    now = encoded.values(encoded.codes, 0)[:, : matrix.shape[1]]
    apart = (
        np.sqrt(np.square(now - now.mean()).mean()) / max(len(np.unique(encoded.codes)) ** (1 / encoded.step), 2) * 2
    )
    length = np.sqrt(np.square(matrix).mean()) or 1.0
    codes = encoded.nearest((now - matrix * np.float32(apart / length)).astype(np.float32), 0)
    moved = encoded.values(codes, 0)[:, : matrix.shape[1]] - now
    gain = -(matrix * moved).reshape(matrix.shape[0], -1, encoded.step).sum(2)
    return codes, np.where(codes != encoded.codes, gain, 0.0)
