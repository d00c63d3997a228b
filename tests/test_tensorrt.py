"""Lowering for TensorRT: legal files from both front ends, engines where the builder is, and what runs without."""

from __future__ import annotations

import stat
from pathlib import Path

import foldline as fl
import numpy as np
import onnx
import pytest
import torch
from foldline import passes as P
from foldline.backends import get, names
from foldline.backends.tensorrt import engine as engines
from foldline.backends.tensorrt.engine import EngineOptions, Layer, build, library
from foldline.backends.tensorrt.script import trtexec
from foldline.graph.errors import BackendError, ConfigError, ConstraintError
from foldline.passes.quantize.numerics import sqnr_db
from support.data import cifar10, trained_resnet
from support.trt_cases import CONV, CONV_IN, U8, W, conv_constants, mm_constants, model, qd
from test_quantize import block, exported

BUILDER = pytest.mark.skipif(library() is None, reason="no TensorRT: pip install foldline[tensorrt-oracle]")
GPU = torch.cuda.is_available()


def good(**changes) -> onnx.ModelProto:
    return model(CONV_IN + qd("x", "xd") + W + CONV, conv_constants(**changes))


def test_names_and_specs() -> None:
    assert {"tensorrt", "tensorrt-rtx", "tensorrt-fp8", "tensorrt-int4"} <= set(names())
    assert get("tensorrt-rtx").name == "tensorrt"
    for name in ("tensorrt", "tensorrt-fp8", "tensorrt-int4"):
        assert get(name).spec is not None
    with pytest.raises(ConfigError, match="unknown option"):
        fl.check(good(), "tensorrt", vnni=True)


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-fp8"])
def test_what_has_no_integer_kernel_is_not_quantized(target: str) -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.ConvTranspose2d(16, 16, 2, 2)
    ).eval()
    x = torch.randn(1, 16, 8, 8)
    result = P.quantize(exported(net, x), target=target, calibration=[x])
    assert fl.check(result.model, target) == []
    said = {d.action: d.reason for d in result.report.passes[-1].decisions}
    assert "transposed" in said["kept in float"] and "quantized" in said


def test_an_obstacle_is_told_before_a_spec_s_general_words() -> None:
    class Computed(torch.nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.conv2d(x, w)

    x, w = torch.randn(1, 4, 8, 8), torch.randn(4, 4, 3, 3)
    for target in ("onnxruntime-cpu", "tensorrt", "inductor-cpu", "cuda"):
        with pytest.raises(ConstraintError) as caught:
            P.quantize(Computed(), (x, w), target=target, calibration=[(x, w)])
        words = "no integer convolution" if target == "cuda" else "its weight is computed, not stored"
        assert words in str(caught.value)


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_quantized_graphs_become_legal_files(front: str, tmp_path: Path) -> None:
    net, batches = block()
    given = net if front == "fx" else exported(net, batches[0])
    pipe = fl.Pipeline([P.Fold(), P.Quantize(target="tensorrt", calibration=batches)])
    result = pipe.run(given, batches[0], verify=False)
    graph = fl.load(result.model, batches[0])
    path = tmp_path / "m.onnx"
    artifact = get("tensorrt").lower(graph, batches[0], path=path, engine=False)
    onnx.checker.check_model(str(path))
    assert fl.check(path, "tensorrt") == []
    expected = np.asarray(graph.run({graph.inputs[0].name: batches[0].numpy()})[0][0])
    assert artifact.simulated and sqnr_db(expected, artifact.run(batches[0])[0]) > 60
    assert sqnr_db(net(batches[0]).detach().numpy(), artifact.run(batches[0])[0]) > 20
    script = path.with_suffix(".build.sh")
    assert script.stat().st_mode & stat.S_IXUSR and "trtexec --onnx=m.onnx --stronglyTyped" in script.read_text()
    assert str(tmp_path) not in script.read_text()
    assert any("no GPU" in note for note in artifact.notes) != GPU
    with pytest.raises(BackendError, match="GPU"):
        artifact.benchmark(runs=1)
    with pytest.raises(BackendError, match="no engine"):
        artifact.profile()
    assert "build" in artifact.facts()


def test_exact_fixes_are_applied_and_others_asked_for() -> None:
    text = (
        CONV_IN + qd("x", "xd") + W + " bd = DequantizeLinear<axis=0>(bq, sb, zb)\n" + CONV.replace("wd, b", "wd, bd")
    )
    bias = {"bq": np.ones(16, np.int32), "sb": np.full(16, 0.001, np.float32), "zb": np.zeros(16, np.int32)}
    artifact = get("tensorrt").lower(fl.load(model(text, conv_constants(**bias))), engine=False)
    assert artifact.notes[0] == "bias stored in float: bd" and fl.check(artifact.path, "tensorrt") == []
    with pytest.raises(BackendError, match=r"zero point other than 0(.|\n)*fl.fix"):
        get("tensorrt").lower(fl.load(good(zx=U8(7))), engine=False)
    with pytest.raises(BackendError, match="compute capability"):
        get("tensorrt").lower(fl.load(_fp8()), engine=False, capability=80)


def _fp8() -> onnx.ModelProto:
    from support.trt_cases import E4, MM, MM_IN, MM_W

    weights = np.random.default_rng(0).normal(size=(32, 16)).astype(E4)
    numbers = mm_constants(zx=np.array(0, E4), w=weights, zw=np.zeros(16, E4))
    return model(MM_IN + qd("x", "xd") + MM_W + MM, numbers)


def test_the_command_line_holds_profiles_and_limits(tmp_path: Path) -> None:
    shapes = {"x": ((1, 3, 8, 8), (4, 3, 8, 8), (16, 3, 8, 8))}
    options = EngineOptions(profiles=shapes, workspace=2**30, timing_cache=tmp_path / "t.cache")
    line = trtexec(Path("a b.onnx"), options)
    assert "--minShapes=x:1x3x8x8 --optShapes=x:4x3x8x8 --maxShapes=x:16x3x8x8" in line
    assert "--memPoolSize=workspace:1024M" in line and "'--onnx=a b.onnx'" in line
    assert str(tmp_path) not in trtexec(Path("m.onnx"), options, folder=True)


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "LIBRARIES", ("no_such_tensorrt",))
    with pytest.raises(BackendError, match="no TensorRT is installed"):
        build(["m.onnx"])
    with pytest.raises(BackendError, match="not installed"):
        library("no_such_tensorrt")
    with pytest.raises(ConfigError, match="compute capability"):
        monkeypatch.undo()
        build(["m.onnx"], EngineOptions(library="json", capability=9))
    graph = fl.load(good())
    with pytest.raises(BackendError, match="torch_tensorrt"):
        get("tensorrt").lower(graph, via="torch_tensorrt")


def test_precision_needs_both_operands() -> None:
    def layer(inputs: tuple[str, ...], constants: tuple[str, ...] = (), kind: str = "gemm") -> str:
        return Layer("l", kind, inputs, constants, ("Float",), ()).precision

    assert layer(("Int8",), ("Int8", "Float")) == "int8" and layer(("Int8", "Int8")) == "int8"
    assert layer(("FP8",), ("FP8",)) == "fp8" and layer(("Int8",), ("Float",)) == "float"
    assert layer(("Int8", "Float"), ("Int8", "Float")) == "int8", "a residual is read too"
    only = Layer("l", "runtime_fusion", ("Float",), ("Int4", "Float"), ("Float",), ())
    assert only.label == "float, int4 weights" and only.precision == "float"
    assert layer(("Float", "Int8")) == "float" and layer(("Int8",), ("Int8",), "runtime_fusion") == "float"


@BUILDER
def test_an_engine_is_built_without_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    cache = tmp_path / "t.cache"
    artifact = get("tensorrt").lower(fl.load(good()), path=path, engine=True, timing_cache=cache)
    assert artifact.engine_path is not None and artifact.engine_path.stat().st_size == artifact.profile().bytes > 1000
    assert artifact.profile().products == {"y": "int8"} and artifact.profile().counts == {"int8": 1}
    assert cache.exists() and "engine" in artifact.facts()
    text = (CONV_IN + qd("x", "xd") + W + CONV).replace("[1,16", "[n,16")
    free = fl.load(model(text, conv_constants()))
    shapes = {"x": ((1, 16, 8, 8), (2, 16, 8, 8), (4, 16, 8, 8))}
    dynamic = get("tensorrt").lower(free, engine=True, profiles=shapes)
    assert dynamic.report is not None and dynamic.report.built and dynamic.report.inputs[0]["shape"] == [-1, 16, 8, 8]


@BUILDER
def test_a_refusal_names_the_node(tmp_path: Path) -> None:
    onnx.save(good(zx=U8(7)), tmp_path / "m.onnx")
    (report,) = build([tmp_path / "m.onnx"])
    assert not report.parsed and report.errors[0][1] == "QuantizeLinear" and "zero point" in report.errors[0][2]
    assert report.to_dict()["built"] is False


@pytest.mark.slow
@BUILDER
def test_int4_weights_are_dequantized_inside_the_product() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(256, 384), torch.nn.ReLU(), torch.nn.Linear(384, 128)).eval()
    x = torch.randn(4, 256)
    given = exported(net, x)
    pipe = fl.Pipeline([P.Quantize(target="tensorrt-int4", calibration=[x]), P.Lower("tensorrt-int4")])
    artifact = pipe.run(given).artifact
    assert artifact.profile().counts == {"float, int4 weights": 2}
    assert sqnr_db(net(x).detach().numpy(), artifact.run(x)[0]) > 12


@pytest.mark.slow
@pytest.mark.data
@BUILDER
@pytest.mark.parametrize(("target", "kind", "least"), [("tensorrt", "int8", 26), ("tensorrt-fp8", "fp8", 20)])
def test_resnet_20_computes_in_8_bits_and_stays_accurate(target: str, kind: str, least: float) -> None:
    net, (images, _) = trained_resnet(20), cifar10("train", 64)
    net = net.eval()
    pipe = fl.Pipeline(
        [P.Fold(), P.Quantize(target=target, calibration=[images[:32], images[32:]]), P.Lower("tensorrt")], name="trt"
    )
    given = exported(net, images[:2])
    result = pipe.run(given, verify=False)
    counts = result.artifact.profile().counts
    assert counts[kind] >= 19 and counts.get("float", 0) <= 1
    details = result.report.passes[-1].details if hasattr(result.report, "passes") else {}
    assert not details or details["artifact"]["engine"]["counts"] == counts
    x, _ = cifar10("test", 64)
    assert sqnr_db(net(x).detach().numpy(), result.artifact.run(x.numpy())[0]) > least
    artifact_again = get(target).lower(fl.load(result.model), engine=False)
    assert fl.check(artifact_again.path, target) == []
