"""While adapters train: penalties to add to the loss, the proximal step of gates, vectors frozen for a while."""

from __future__ import annotations

import torch
from torch import nn

from .attach import WeightAdapter, weight_adapters


def penalty(model: nn.Module) -> torch.Tensor:
    """The sum of the kinds' own penalties (orthogonality of singular vectors or of groups), a scalar with gradients.

    Zero where no adapter's kind has one.
    """
    total = torch.zeros(())
    for adapter in weight_adapters(model).values():
        if adapter.kind.penalty is not None:
            total = total + adapter.kind.penalty(adapter.tensors()).to(total.device)
    return total


def shrink_gates(model: nn.Module, amount: float) -> int:
    """One proximal step after the optimizer's: g = sign(g) max(|g| - amount, 0); returns how many gates are zero.

    "Sparse Low-rank Adaptation of Pre-trained Language Models": amount is learning rate times lambda.
    """
    zero = 0
    with torch.no_grad():
        for adapter in weight_adapters(model).values():
            gate = adapter.tensors().get("gate")
            if gate is not None and "gate" not in adapter.kind.fixed:
                gate.copy_(gate.sign() * (gate.abs() - amount).clamp(min=0))
                zero += int((gate == 0).sum())
    return zero


def freeze_most_moved(model: nn.Module, count: int) -> list[str]:
    """Freeze the ``count`` trained vectors that have moved most since insertion, thaw all others; their names.

    "VectorFit": a vector that runs ahead is held, so that the others catch up. Strength is the mean |v - v_start|.
    """
    moved: list[tuple[float, str, nn.Parameter]] = []
    for path, adapter in weight_adapters(model).items():
        for name, p in adapter.named_parameters(recurse=False):
            if p.ndim == 1:
                moved.append((float((p.detach() - _start(adapter, name)).abs().mean()), f"{path}.{name}", p))
    moved.sort(key=lambda item: (-item[0], item[1]))
    for i, (_, _, p) in enumerate(moved):
        p.requires_grad_(i >= count)
        if i < count:
            p.grad = None
    return [name for _, name, _ in moved[:count]]


def _start(adapter: WeightAdapter, name: str) -> torch.Tensor:
    start = adapter.tensors().get(f"{name}_start")
    return torch.zeros(()) if start is None else start
