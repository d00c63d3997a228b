"""Lowering for ONNX Runtime: residual sums stay apart from the layer norms behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from foldline.backends import get
from foldline.graph.fx import load_torch
from foldline.graph.onnx import load_onnx
from foldline.passes.base import Context
from foldline.passes.quantize import Quantize

CPU = get("onnxruntime-cpu")


class Residual(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16), torch.nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(x + self.a(x)))


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_sums_before_layer_norms_stay_apart(front: str, tmp_path: Path) -> None:
    """A default session would fuse both into the slower SkipLayerNormalization; the numbers stay the same."""
    import onnxruntime as ort

    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    model = Residual().eval()
    float_file = tmp_path / "float.onnx"
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(str(float_file))
    graph = load_torch(model, x) if front == "fx" else load_onnx(str(float_file))
    Quantize().apply(graph, Context(calibration=[x], backends=get))
    path = tmp_path / "quantized.onnx"
    CPU.lower(graph, x, path=path)
    ops = {node.op_type for node in onnx.load(path).graph.node}
    assert "Sum" in ops

    def made(file: Any, off: list[str]) -> tuple[set[str], np.ndarray]:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 3
        session = ort.InferenceSession(str(file), options, ["CPUExecutionProvider"], disabled_optimizers=off)
        kinds = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
        return kinds, session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]

    kinds, y = made(path, [])
    assert "SkipLayerNormalization" not in kinds and "Sum" in kinds
    plain = onnx.load(path)
    for node in plain.graph.node:
        node.op_type = "Add" if node.op_type == "Sum" else node.op_type
    onnx.save(plain, tmp_path / "plain.onnx")
    fused, _ = made(tmp_path / "plain.onnx", [])
    assert "SkipLayerNormalization" in fused
    assert np.array_equal(made(tmp_path / "plain.onnx", ["SkipLayerNormFusion"])[1], y)
    CPU.lower(load_onnx(str(float_file)), x, path=tmp_path / "float_lowered.onnx")
    assert "Sum" not in {node.op_type for node in onnx.load(tmp_path / "float_lowered.onnx").graph.node}
