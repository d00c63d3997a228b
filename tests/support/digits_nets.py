"""Small networks trained on scikit-learn's digits in a few seconds, for tests that need an accuracy."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn


class LeNet(nn.Module):
    """LeNet's layout for images of 8 x 8: two convolutions with pools, three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 16, 3, padding=1)
        self.f1, self.f2, self.f3 = nn.Linear(64, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(torch.relu(self.c1(x)), 2)
        x = F.max_pool2d(torch.relu(self.c2(x)), 2).flatten(1)
        return self.f3(torch.relu(self.f2(torch.relu(self.f1(x)))))


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images [N, 1, 8, 8] in 0 .. 1 and labels to train on, then those held out; skips without scikit-learn."""
    found = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.tensor(found.data / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    y = torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1300], order[1300:]
    return x[train], y[train], x[test], y[test]


@cache
def lenet() -> LeNet:
    """The network, trained."""
    x, y, _, _ = digits()
    torch.manual_seed(0)
    model = LeNet()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    for step in range(400):
        rows = torch.randint(0, len(x), (128,), generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Share of held-out digits that are right."""
    _, _, x, y = digits()
    return float((model(x).argmax(1) == y).float().mean())
