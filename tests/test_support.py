"""The shared test helpers do what they say: toys run and are seeded, the trained ResNets reach their accuracy."""

from __future__ import annotations

import pytest
import torch
from support.data import accuracy, cifar10, data_dir, trained_resnet
from support.toys import TOYS


@pytest.mark.parametrize("name", sorted(TOYS))
def test_toy_is_seeded_and_runs_in_eval_mode(name: str) -> None:
    (one, args), (two, same) = TOYS[name](), TOYS[name]()
    assert not one.training
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(args, same, strict=True))
    with torch.no_grad():
        out, again = one(*args), two(*same)
    out, again = (out, again) if isinstance(out, torch.Tensor) else (out[0], again[0])
    assert torch.equal(out, again)
    assert torch.isfinite(out).all() and float(out.std()) > 1e-3


@pytest.mark.data
def test_trained_resnet20_reaches_its_accuracy() -> None:
    data_dir()
    images, labels = cifar10("test", 1000)
    assert labels[:20].tolist() == [*range(10), *range(10)]
    assert images.shape == (1000, 3, 32, 32)
    assert accuracy(trained_resnet(20), images, labels) == pytest.approx(0.88, abs=0.03)
