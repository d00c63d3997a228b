"""The digits example: its checkpoint is as good as said, its pipeline is the same in Python, YAML and the README."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import foldline as fl
import numpy as np
import pytest
import yaml
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "digits"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra: demo)")
    monkeypatch.syspath_prepend(str(FOLDER))
    import demo

    yield demo
    for name in ("demo", "digits"):
        sys.modules.pop(name, None)


def test_the_committed_checkpoint_is_small_and_accurate(demo: Any) -> None:
    import digits

    assert demo.CHECKPOINT.stat().st_size < 1_000_000
    assert digits.accuracy(demo.trained_model()) >= 0.975


def test_the_pipeline_is_the_same_in_python_yaml_and_readme(demo: Any) -> None:
    from_file = fl.Pipeline.from_file(FOLDER / "pipeline.yaml")
    assert demo.pipeline().to_dict() == from_file.to_dict()
    block = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert block is not None
    assert fl.Pipeline.from_dict(yaml.safe_load(block[1])).to_dict() == from_file.to_dict()


@pytest.mark.slow
def test_both_roads_end_within_a_point(demo: Any, tmp_path: Path) -> None:
    model, example = demo.trained_model(), demo.load_digits("test")[0][:64]
    roads = {"PyTorch": model, "ONNX": demo.export(model, example, tmp_path / "digits.onnx")}
    for road, source in roads.items():
        table = Table("from", "model", "accuracy", "size", "MACs", "latency")
        assert demo.run(road, source, example, tmp_path, table) <= demo.ALLOWED_DROP
        folder = tmp_path / road.lower()
        assert (folder / "folded" / "report.html").stat().st_size > 1000
        sizes = [(folder / name / "artifact.onnx").stat().st_size for name in ("trained", "folded")]
        assert sizes[1] < sizes[0] / 3
        macs = float(table.columns[4]._cells[1].split()[0]) / float(table.columns[4]._cells[0].split()[0])
        assert np.isclose(macs, 0.5, atol=0.04)
