"""Pruning quantized models: integers, scales, zero points, biases are cut along; masked equals sliced, also in ORT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import foldline as fl
import numpy as np
import onnx
import pytest
import torch
from foldline import passes as P
from foldline.graph.actions import mask, select
from foldline.graph.errors import ConstraintError
from foldline.graph.groups import axis_groups
from foldline.graph.quantized import dequantizer, real, zero_points
from foldline.passes.prune.importance import importance
from support.frontends import exported
from support.toys import toy

ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxruntime.quantization", reason="onnxruntime's quantizer is not installed")

NAMES = ["residual_cnn", "norm_mlp", "dense_concat", "separate_qkv", "grouped_convs", "squeeze_excite"]


def run(model: Any, x: np.ndarray) -> list[np.ndarray]:
    """One call in ONNX Runtime without its optimisations, which may requantize differently for other shapes."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = model if isinstance(model, (bytes, str)) else model.SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})


def quantized(name: str, folder: Path, per_channel: bool, weights: str = "QInt8") -> tuple[Path, np.ndarray]:
    """A toy quantized by ONNX Runtime's own tool, in QDQ format, as a file."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    model, x = toy(name)
    proto = exported(model, x)
    key, batch = proto.graph.input[0].name, x[0].numpy()

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter([{key: batch}])

        def get_next(self) -> Any:
            return next(self.left, None)

    onnx.save(proto, str(folder / "float.onnx"))
    quantize_static(
        str(folder / "float.onnx"),
        str(folder / "qdq.onnx"),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=per_channel,
        activation_type=QuantType.QUInt8,
        weight_type=getattr(QuantType, weights),
    )
    return folder / "qdq.onnx", batch


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_files_quantized_by_onnxruntime(name: str, per_channel: bool, tmp_path: Path) -> None:
    path, x = quantized(name, tmp_path, per_channel)
    before = path.read_bytes()
    result = P.prune(path, ratio=0.5)
    assert path.read_bytes() == before
    identity = result.report.passes[0].details["identity"]
    assert identity["checked"] and identity["relative_error"] < 1e-5
    assert result.report.after.bytes < result.report.before.bytes
    fl.save(result.model, tmp_path / "small.onnx")
    onnx.checker.check_model(str(tmp_path / "small.onnx"), full_check=True)
    assert [o.shape for o in run(str(tmp_path / "small.onnx"), x)] == [o.shape for o in run(str(path), x)]
    integers = [w for w in result.graph.weights.values() if dequantizer(w) is not None]
    cut = {n for n in result.plan.weights if n in {w.name for w in integers}}
    assert cut
    for w in integers:
        node = dequantizer(w)
        for parameter in node.inputs[1:]:
            data = parameter.const()
            assert data.size == 1 or data.shape == (w.shape[node.attrs["axis"]],)
    if per_channel:
        assert any(n.endswith("scale") for n in result.plan.weights)
        assert any(n.endswith("zero_point") for n in result.plan.weights)


@pytest.mark.parametrize("weights", ["QInt8", "QUInt8"])
def test_masked_equals_sliced_in_onnxruntime(weights: str, tmp_path: Path) -> None:
    path, x = quantized("residual_cnn", tmp_path, False, weights)
    graph = fl.load(path)
    groups = axis_groups(graph)
    rng = np.random.default_rng(0)
    kept = {g: np.sort(rng.permutation(g.size)[: g.size // 2]) for g in groups if g.can("select") and g.exact}
    points = [zero_points(w) for w in graph.weights.values() if w.dtype in ("int8", "uint8") and dequantizer(w)]
    assert len(points) > 4 and all((p != 0).all() == (weights == "QUInt8") for p in points)
    fl.save(mask(groups, kept), tmp_path / "masked.onnx")
    select(groups, kept)
    fl.save(graph, tmp_path / "sliced.onnx")
    masked, sliced = (run(str(tmp_path / f"{n}.onnx"), x)[0] for n in ("masked", "sliced"))
    assert np.abs(masked - run(str(path), x)[0]).max() > 1e-3
    assert np.array_equal(masked, sliced)


def test_integers_are_scored_by_what_they_stand_for(tmp_path: Path) -> None:
    path, _ = quantized("residual_cnn", tmp_path, True)
    floating = axis_groups(fl.load(tmp_path / "float.onnx"))
    integer = axis_groups(fl.load(path))
    pairs = 0
    for g in floating:
        if not g.can("select"):
            continue
        labels = {m.label.replace(".weight[", ".weight_quantized[") for m in g.members}
        same = next(h for h in integer if labels & {m.label for m in h.members})
        for criterion in ("l2", "l1", "fpgm"):
            a = importance(floating, [g], criterion, 0)[g]
            b = importance(integer, [same], criterion, 0)[same]
            assert np.allclose(a, b, rtol=0.03), criterion
        pairs += 1
    assert pairs > 2
    w = next(w for w in integer.graph.weights.values() if w.name == "a1.0.weight_quantized")
    original = floating.graph.weight("a1.0.weight").numpy()
    assert np.abs(real(w) - original).max() < np.abs(original).max() / 120
    assert np.abs(real(w)).max() < 10 < np.abs(w.numpy().astype(int)).max()


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_pruning_after_quantize_in_one_pipeline(front: str, tmp_path: Path) -> None:
    model, x = toy("residual_cnn")
    given = model if front == "fx" else exported(model, x)
    pipe = fl.Pipeline([P.Fold(), P.Quantize(target="onnxruntime-cpu"), P.Prune(ratio=0.5)])
    result = pipe.run(given, x, calibration=[x])
    assert result.report.passes[2].details["identity"]["relative_error"] < 1e-5
    counts = [r.after.parameters for r in result.report.passes]
    assert counts[2] < 0.6 * counts[1]
    if front == "onnx":
        fl.save(result.model, tmp_path / "small.onnx")
        assert run(str(tmp_path / "small.onnx"), x[0].numpy())[0].shape == (2, 5)
        again = P.prune(tmp_path / "small.onnx", ratio=0.3)
        assert again.report.after.parameters < counts[2]
    else:
        with torch.no_grad():
            assert result.model(*x).shape == (2, 5)
    other = fl.Pipeline([P.Fold(), P.Prune(ratio=0.5), P.Quantize(target="onnxruntime-cpu")])
    first = other.run(given, x, calibration=[x])
    shapes = sorted(w.shape for w in first.graph.weights.values() if len(w.shape) > 1)
    assert shapes == sorted(w.shape for w in result.graph.weights.values() if len(w.shape) > 1)


def test_criteria_that_need_floating_weights_say_so(tmp_path: Path) -> None:
    path, x = quantized("residual_cnn", tmp_path, True)
    before = path.read_bytes()
    with pytest.raises(ConstraintError, match="quantized") as caught:
        P.prune(path, criterion="taylor", ratio=0.5, data=[(x, np.zeros(len(x), dtype=np.int64))])
    assert "before" in str(caught.value.hint) and path.read_bytes() == before


def test_a_plan_and_a_session_on_a_quantized_file(tmp_path: Path) -> None:
    path, _ = quantized("norm_mlp", tmp_path, True)
    session = fl.PruneSession(path)
    first = next(iter(session)).name
    result = session.drop(first, ratio=0.5).apply()
    fl.save(result.model, tmp_path / "a.onnx")
    fl.save(fl.apply_plan(path, result.plan), tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert result.plan.check(path) == {first: len(session[first].kept)}
