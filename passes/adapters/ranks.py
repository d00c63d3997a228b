"""Ranks of inserted adapters: importance, budgets, growth and compaction, with the optimizer's state kept."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ...graph.errors import ConfigError, ConstraintError
from .attach import ADAPTED, WeightAdapter, adapted_layers, reclass, weight_adapters


def rank_of(adapter: WeightAdapter) -> int:
    """The rank of an adapter, from its tensors.

    Raises:
        ConstraintError: its kind has no ranks.
    """
    for name, axis in adapter.kind.ranks.items():
        return adapter.tensors()[name].shape[axis]
    raise ConstraintError("this kind of adapter has no ranks", node=adapter.kind_name)


def ranks(model: nn.Module) -> dict[str, int]:
    """Rank of every adapter that has one, by its path in the model."""
    return {path: rank_of(a) for path, a in weight_adapters(model).items() if a.kind.ranks}


def _resize(adapter: WeightAdapter, name: str, change: Any, optimizer: torch.optim.Optimizer | None) -> None:
    """Apply ``change(tensor, is_state)`` to one tensor and to the optimizer's state of it.

    The parameter becomes a new object: graphs that autograd still holds keep the old one, with its shape.
    """
    old = adapter.tensors()[name]
    data = change(old.detach(), False)
    if not isinstance(old, nn.Parameter):
        adapter._buffers[name] = data
        return
    new = nn.Parameter(data, requires_grad=old.requires_grad)
    adapter._parameters[name] = new
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if old in optimizer.state:
        state = optimizer.state.pop(old)
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape == old.shape:
                state[key] = change(value, True)
        optimizer.state[new] = state


def keep_ranks(
    model: nn.Module, kept: Mapping[str, Sequence[int] | np.ndarray], optimizer: torch.optim.Optimizer | None = None
) -> dict[str, int]:
    """Keep only the given ranks of the given adapters, in place; those left without a rank are taken out.

    Args:
        kept: adapter path -> indices.
        optimizer: its state is cut in the same way, and it goes on with the new parameters.

    Returns:
        The ranks that are left, by adapter path.
    """
    known = weight_adapters(model)
    for path, indices in kept.items():
        if path not in known:
            raise ConfigError("there is no such adapter", node=path, expected=", ".join(known), found=path)
        adapter, index = known[path], torch.as_tensor(np.asarray(indices, dtype=np.int64))
        for name, axis in adapter.kind.ranks.items():
            for full in (name, f"{name}_start"):
                if full in adapter.tensors():
                    _resize(adapter, full, _selected(axis, index), optimizer)
        if not len(index):
            _remove(model, adapter, optimizer)
    return ranks(model)


def _selected(axis: int, index: torch.Tensor) -> Any:
    return lambda t, is_state: t.index_select(axis, index.to(t.device))


def _remove(model: nn.Module, adapter: WeightAdapter, optimizer: torch.optim.Optimizer | None) -> None:
    for _, layer, adapted in list(adapted_layers(model)):
        for key in [k for k in adapted if layer._modules.get(k) is adapter]:
            del layer.__dict__[ADAPTED][key], layer._modules[key]
            reclass(layer)
    gone = {id(p) for p in adapter.parameters()}
    for group in optimizer.param_groups if optimizer is not None else ():
        group["params"] = [p for p in group["params"] if id(p) not in gone]


def compact_rank(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
    """Drop every rank whose gate is exactly zero, in place: the function stays ("Sparse Low-rank Adaptation").

    Returns:
        The ranks that are left, by adapter path.
    """
    kept = {}
    for path, adapter in weight_adapters(model).items():
        t = adapter.tensors()
        if "gate" in t and "gate" in adapter.kind.ranks:
            kept[path] = torch.nonzero(t["gate"]).reshape(-1).cpu().numpy()
    return keep_ranks(model, kept, optimizer)


def grow_rank(
    model: nn.Module, extra: Mapping[str, int], optimizer: torch.optim.Optimizer | None = None, *, seed: int = 0
) -> dict[str, int]:
    """Add ranks in place without changing the function: the new gate, or the new columns of B, are zero.

    Args:
        extra: adapter path -> how many ranks more.
        optimizer: its state is extended with zeros; what it knows of the old ranks stays. It goes on with the new
            parameter objects.

    Returns:
        The ranks afterwards, by adapter path.
    """
    known = weight_adapters(model)
    for path, count in extra.items():
        if path not in known:
            raise ConfigError("there is no such adapter", node=path, expected=", ".join(known), found=path)
        adapter = known[path]
        axes, tensors = adapter.kind.ranks, adapter.tensors()
        if any(f"{name}_start" in tensors for name in axes):
            raise ConstraintError("an adapter with a fixed start product cannot grow", node=path, hint="init='zero'")
        quiet = "gate" if "gate" in axes else next((n for n in ("B", "left", "v") if n in axes), None)
        if count < 1 or quiet is None:
            raise ConstraintError("this adapter cannot grow", node=path, expected="ranks, and count >= 1", found=count)
        for name, axis in axes.items():
            rng = torch.Generator().manual_seed(zlib.crc32(f"{seed} {path} {name} {rank_of(adapter)}".encode()))
            _resize(adapter, name, _extended(axis, count, name == quiet, rng), optimizer)
    return ranks(model)


def _extended(axis: int, count: int, zeros: bool, rng: torch.Generator) -> Any:
    def change(t: torch.Tensor, is_state: bool) -> torch.Tensor:
        shape = list(t.shape)
        shape[axis] = count
        if zeros or is_state:
            new = t.new_zeros(shape)
        else:
            inner = t.numel() // max(t.shape[axis], 1)
            bound = (3 / max(inner, 1)) ** 0.5
            new = ((torch.rand(shape, generator=rng) * 2 - 1) * bound).to(t)
        return torch.cat([t, new], axis)

    return change


# ---- importance ------------------------------------------------------------------------------------------------------
class RankImportance:
    """Smoothed importance of every rank of every adapter: sensitivity |w dL/dw| times its uncertainty.

    "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning". Call :meth:`update` between ``backward`` and the
    optimizer's step.

    Args:
        model: with adapters; smoothing, uncertainty: the decay rates beta_1 and beta_2.
    """

    def __init__(self, model: nn.Module, smoothing: float = 0.85, uncertainty: float = 0.85) -> None:
        self.model, self.beta1, self.beta2 = model, smoothing, uncertainty
        self._mean: dict[tuple[str, str], torch.Tensor] = {}
        self._spread: dict[tuple[str, str], torch.Tensor] = {}

    def update(self) -> None:
        """Take the gradients there are."""
        for path, adapter in weight_adapters(self.model).items():
            for name in adapter.kind.ranks:
                p = adapter.tensors()[name]
                if p.grad is None:
                    continue
                now = (p.detach() * p.grad).abs()
                key = (path, name)
                if key not in self._mean or self._mean[key].shape != now.shape:
                    self._mean[key], self._spread[key] = torch.zeros_like(now), torch.zeros_like(now)
                self._mean[key] = self.beta1 * self._mean[key] + (1 - self.beta1) * now
                moved = (now - self._mean[key]).abs()
                self._spread[key] = self.beta2 * self._spread[key] + (1 - self.beta2) * moved

    def scores(self) -> dict[str, np.ndarray]:
        """Per adapter one score per rank: the gate's, plus the means over its row of A and its column of B."""
        found = {}
        for path, adapter in weight_adapters(self.model).items():
            total = np.zeros(rank_of(adapter)) if adapter.kind.ranks else None
            for name, axis in adapter.kind.ranks.items():
                if (path, name) in self._mean and total is not None:
                    score = (self._mean[path, name] * self._spread[path, name]).movedim(axis, 0)
                    total = total + score.reshape(len(total), -1).mean(1).double().cpu().numpy()
            if total is not None:
                found[path] = total
        return found


def allocate_budget(scores: Mapping[str, np.ndarray], budget: int) -> dict[str, np.ndarray]:
    """The ``budget`` ranks of the highest scores over all adapters: adapter path -> kept indices, ascending.

    Ties go to the adapter that comes first, and to its lower index.

    Raises:
        ConstraintError: there are fewer ranks than that.
    """
    flat = [(-float(s), i, k) for i, path in enumerate(scores) for k, s in enumerate(scores[path])]
    if not 0 <= budget <= len(flat):
        raise ConstraintError("the budget of ranks is out of range", node="budget", expected=len(flat), found=budget)
    kept: dict[str, list[int]] = {path: [] for path in scores}
    names = list(scores)
    for _, i, k in sorted(flat)[:budget]:
        kept[names[i]].append(k)
    return {path: np.array(sorted(ks), dtype=np.int64) for path, ks in kept.items()}


def mask_ranks(model: nn.Module, kept: Mapping[str, np.ndarray]) -> None:
    """Set the gates of all ranks that are not kept to zero; they may come back in training ("AdaLoRA")."""
    for path, adapter in weight_adapters(model).items():
        if path in kept:
            if "gate" not in adapter.kind.ranks:
                raise ConstraintError("this kind of adapter has no gates", node=path, found=adapter.kind_name)
            gate = adapter.tensors()["gate"]
            mask = torch.zeros_like(gate)
            mask[torch.as_tensor(kept[path])] = 1
            with torch.no_grad():
                gate.mul_(mask)


def budget_at(step: int, first: int, last: int, warmup: int, steps: int, final: int) -> int:
    """AdaLoRA's budget of ranks: ``first`` for ``warmup`` steps, a cubic descent, ``last`` for the ``final`` steps."""
    if step < warmup:
        return first
    if step >= steps - final:
        return last
    left = 1 - (step - warmup) / max(steps - final - warmup, 1)
    return int(round(last + (first - last) * left**3))


def adapter_importance(model: nn.Module, how: Literal["sensitivity", "frobenius"] = "frobenius") -> dict[str, float]:
    """One number per adapter, for growth.

    ``"frobenius"``: the update's Frobenius norm over the square root of its size ("TriAdaptLoRA"); ``"sensitivity"``:
    mean |w dL/dw| of the trained tensors ("IncreLoRA").
    """
    found = {}
    for path, adapter in weight_adapters(model).items():
        if how == "sensitivity":
            parts = [(p.detach() * p.grad).abs().mean() for p in adapter.parameters() if p.grad is not None]
            found[path] = float(torch.stack(parts).mean()) if parts else 0.0
        elif adapter.kind.delta is not None:
            delta = adapter.kind.delta(adapter.tensors(), adapter.geometry, adapter.options).detach()
            found[path] = float(delta.norm()) / delta.numel() ** 0.5
        else:
            raise ConstraintError("this kind of adapter has no additive update", node=path, found=adapter.kind_name)
    return found


def most_important(importance: Mapping[str, float], count: int) -> dict[str, int]:
    """One more rank for each of the ``count`` most important adapters: what :func:`grow_rank` takes."""
    ordered = sorted(importance, key=lambda path: -importance[path])
    return dict.fromkeys(ordered[:count], 1)
