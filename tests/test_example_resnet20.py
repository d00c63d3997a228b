"""The ResNet-20 example: prunes, fine-tunes in plain PyTorch, saves; on digits, and on CIFAR-10 where it is at hand."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.data import data_dir
from support.resnet_cifar import resnet20

FOLDER = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    import prune_resnet20

    yield prune_resnet20
    sys.modules.pop("prune_resnet20", None)


def test_the_network_is_the_one_of_the_checkpoints(example: Any) -> None:
    torch.manual_seed(0)
    ours, theirs, x = example.ResNet20().eval(), resnet20().eval(), torch.randn(2, 3, 32, 32)
    theirs.load_state_dict(ours.state_dict())
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_on_digits(example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra: demo)")
    monkeypatch.delenv("FOLDLINE_DATA", raising=False)
    found = example.main(["--images", "128", "--epochs", "1", "--out", str(tmp_path / "out")])
    assert abs(found["macs"] - 0.5) < 0.02
    assert (tmp_path / "out" / "plan.json").exists() and "gives it back" in capsys.readouterr().out


@pytest.mark.slow
def test_on_cifar10_fine_tuning_brings_the_accuracy_back(example: Any) -> None:
    found = example.main(["--data", str(data_dir()), "--images", "2000", "--epochs", "2"])
    assert found["base"] > 0.85 and found["tuned"] > found["pruned"] + 0.1 and abs(found["macs"] - 0.5) < 0.02
