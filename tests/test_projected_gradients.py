"""Projected gradients: nothing lost at full rank, the states low-rank below it, and training still works."""

from __future__ import annotations

import copy

import pytest
import torch
from foldline.graph.errors import ConfigError, ConstraintError
from foldline.passes.adapters.projection import ProjectedGradients
from torch import nn


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 12))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(64, 24, generator=g)
    return x, torch.tanh(x[:, :12] * 2)


def train(model: nn.Module, optimizer: object, steps: int) -> float:
    x, y = data()
    loss = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()  # type: ignore[attr-defined]
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()  # type: ignore[attr-defined]
    return float(loss.detach())


def test_one_less_than_full_rank_on_a_gradient_of_that_rank_is_plain_sgd() -> None:
    # a gradient has at most as many directions as there are samples
    plain, low = net(), net()
    x, y = data()
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    projected = ProjectedGradients(low.parameters(), lambda p: torch.optim.SGD(p, lr=0.1), rank=5, every=1)
    for _ in range(3):
        for model, optimizer in ((plain, reference), (low, projected)):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x[:5]), y[:5]).backward()
            optimizer.step()
    for a, b in zip(plain.parameters(), low.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert len(projected.projected) == 2


def test_states_are_low_rank_and_training_comes_close() -> None:
    plain, low = net(), net()
    reference = torch.optim.Adam(plain.parameters(), lr=0.01)
    projected = ProjectedGradients(low.parameters(), lambda p: torch.optim.Adam(p, lr=0.01), rank=4, every=10)
    before = train(copy.deepcopy(low), torch.optim.SGD(low.parameters(), lr=0), 1)
    full, part = train(plain, reference, 150), train(low, projected, 150)
    assert full < part < before / 3
    states = sum(v.numel() * 4 for s in reference.state.values() for v in s.values() if v.ndim)
    assert projected.state_bytes() < states / 2
    assert {tuple(q.proxy.shape) for q in projected.projected} == {(40, 4), (4, 40)}


def test_vectors_and_matrices_without_gradients_are_left_to_the_optimizer() -> None:
    model = net()
    projected = ProjectedGradients(model.parameters(), lambda p: torch.optim.SGD(p, lr=0.1), rank=3)
    before = model[0].weight.clone()
    model[0].weight.requires_grad_(False)
    x, y = data()
    nn.functional.mse_loss(model(x), y).backward()
    bias = model[2].bias.clone()
    projected.step()
    assert torch.equal(model[0].weight, before) and not torch.equal(model[2].bias, bias)


def test_bad_numbers_are_refused() -> None:
    model = net()
    with pytest.raises(ConfigError, match="rank"):
        ProjectedGradients(model.parameters(), lambda p: torch.optim.SGD(p, lr=0.1), rank=0)
    with pytest.raises(ConstraintError, match="weight decay"):
        ProjectedGradients(model.parameters(), lambda p: torch.optim.AdamW(p, lr=0.1), rank=2)
