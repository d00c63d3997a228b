"""The ONNX Runtime backend: lowering both kinds of graph, what it fuses, its rules, real accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from foldline.backends import Diagnostic, get, names
from foldline.backends.base import Artifact
from foldline.backends.check import check
from foldline.backends.onnxruntime.session import provider_choices
from foldline.graph.errors import BackendError, ConfigError, ConstraintError, ModelFileError
from foldline.graph.fx import load_torch
from foldline.graph.onnx import load_onnx
from foldline.graph.verify import difference
from foldline.passes.base import Context
from foldline.passes.quantize import Quantize, reference
from foldline.passes.quantize.numerics import sqnr_db
from support.data import accuracy, cifar10, trained_resnet
from support.toys import toy
from test_quantize import block, exported
from torch import nn

CPU = get("onnxruntime-cpu")


def quantize(graph, batches, **options):
    Quantize(**options).apply(graph, Context(calibration=batches, backends=get))
    return graph


def test_names_and_aliases() -> None:
    assert get("onnxruntime").name == "onnxruntime-cpu" and "onnxruntime-cuda" in names()
    with pytest.raises(ConfigError, match="did you mean 'onnxruntime-cpu'"):
        get("onnxruntime-cpus")


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_float_graphs_run_as_they_are_with_any_batch(front: str, tmp_path) -> None:
    model, batches = block()
    graph = load_torch(model, batches[0]) if front == "fx" else load_onnx(exported(model, batches[0]))
    artifact = CPU.lower(graph, batches[0], path=tmp_path / "m.onnx")
    assert artifact.path == tmp_path / "m.onnx" and artifact.path.exists()
    assert artifact.output_names == [v.name for v in graph.outputs]
    for count in (1, 3):
        x = torch.randn(count, 3, 14, 14)
        (y,) = artifact.run(x)
        assert difference(model(x).detach().numpy(), y)[1] < 1e-5
        np.testing.assert_array_equal(artifact.run({artifact.input_names[0]: x.numpy()})[0], y)
    onnx.checker.check_model(str(artifact.path))
    assert onnx.load(artifact.path).ir_version <= 10


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_quantized_graphs_become_integer_kernels_with_the_numbers_of_the_graph(front: str) -> None:
    model, batches = block()
    graph = load_torch(model, batches[0]) if front == "fx" else load_onnx(exported(model, batches[0]))
    quantize(graph, batches)
    assert CPU.check(graph) == []
    artifact = CPU.lower(graph, batches[0])
    profile = artifact.profile()
    assert profile.counts["QLinearConv"] == 3 and profile.counts["QGemm"] == 2 and profile.counts["QLinearAdd"] == 1
    assert profile.float_matrix == []
    simulated = np.asarray(graph.run({graph.inputs[0].name: batches[0].numpy()})[0][0])
    # Integer accumulation rounds once where the simulation rounds often: a tie may fall to the other side.
    assert sqnr_db(simulated, artifact.run(batches[0])[0]) > 35
    assert sqnr_db(model(batches[0]).detach().numpy(), artifact.run(batches[0])[0]) > 25


def test_times_per_kernel_tell_what_runs() -> None:
    model, batches = block()
    graph = quantize(load_onnx(exported(model, batches[0])), batches)
    artifact = CPU.lower(graph, batches[0], threads=1, entries={"session.intra_op.allow_spinning": "0"})
    assert artifact.profile().times == [] and artifact.profile().by_op() == {}
    profile = artifact.profile(runs=3)
    assert {op for _, op, _ in profile.times} == set(profile.counts)
    assert len(profile.times) == sum(profile.counts.values()) and all(ms >= 0 for _, _, ms in profile.times)
    by_op = profile.by_op()
    assert list(by_op.values()) == sorted(by_op.values(), reverse=True)
    assert sum(by_op.values()) == pytest.approx(sum(ms for _, _, ms in profile.times))


def test_options_of_providers_that_are_not_used_are_refused() -> None:
    model, batches = block()
    with pytest.raises(BackendError, match="not used"):
        CPU.lower(load_onnx(exported(model, batches[0])), provider_options={"cuda": {"device_id": 0}})


def test_provider_defaults_give_way_to_the_users(tmp_path) -> None:
    names = ["TensorrtExecutionProvider", "CPUExecutionProvider"]
    chosen = dict(provider_choices(names, {"tensorrt": {"trt_fp16_enable": False}}, tmp_path))
    assert chosen["TensorrtExecutionProvider"]["trt_int8_enable"] is True
    assert chosen["TensorrtExecutionProvider"]["trt_fp16_enable"] is False
    assert chosen["TensorrtExecutionProvider"]["trt_engine_cache_path"] == str(tmp_path)
    assert chosen["CPUExecutionProvider"] == {}


def means(axes: str, keep: int) -> onnx.ModelProto:
    weight = ", ".join("1.0" if i % 5 == 0 else "-0.5" for i in range(12))
    return onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        g (float[n, 4, 6, 6] x) => (float[n, 3, 1, 1] y) <float[3, 4, 1, 1] w = {{{weight}}}, int64[2] a = {{{axes}}}>
        {{ c = Conv(x, w)  m = ReduceMean<keepdims = {keep}>(c, a)  y = Identity(m) }}"""
    )


@pytest.mark.parametrize(("axes", "fits"), [("2, 3", True), ("-1, -2", True), ("1, 2", False)])
def test_spatial_means_run_as_global_pools(axes: str, fits: bool) -> None:
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)
    model = means(axes, 1)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "c"
    model.graph.output[0].type.tensor_type.shape.dim[3].dim_param = "w"
    graph = load_onnx(model)
    artifact = CPU.lower(graph, x)
    assert ("GlobalAveragePool" in artifact.profile().counts) is fits
    expected = np.asarray(graph.run({"x": x})[0][0])
    np.testing.assert_allclose(artifact.run(x)[0], expected, rtol=1e-5, atol=1e-6)
    assert "ReduceMean" in {n.origin for n in graph.nodes}  # the graph itself stays as it is


class Padded(torch.nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.a, self.b, self.value = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(6, 4, 1), value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.nn.functional.pad(self.a(x), (1, 2, 0, 1, 1, 1), value=self.value))


@pytest.mark.parametrize(("value", "fits"), [(0.0, True), (1.0, False)])
def test_zeros_are_padded_as_integers(value: float, fits: bool) -> None:
    torch.manual_seed(0)
    net, x = Padded(value).eval(), torch.randn(2, 3, 6, 6)
    graph = quantize(load_onnx(torch.onnx.export(net, (x,), dynamo=True, verbose=False).model_proto), [x])
    artifact = CPU.lower(graph, x)
    counts = artifact.profile().counts
    assert counts["QLinearConv"] == 2 and counts["Pad"] == 1
    assert (counts["DequantizeLinear"] == 1) is fits  # that of the result alone
    # The same bits as the file before the rewrite, where that runs in integers around the pad too.
    expected = np.asarray(graph.run({"x": x.numpy()})[0][0])
    assert sqnr_db(expected, artifact.run(x)[0]) > 35
    executor = reference.Executor(graph)
    np.testing.assert_array_equal(executor.run({"x": x.numpy()})[0], artifact.run(x)[0])


def test_a_result_with_float_readers_still_leaves_through_q_alone() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.a(x)
            return torch.tanh(y) + self.b(y), y

    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    net = Net().eval()
    graph = quantize(load_torch(net, x), [x])
    assert CPU.check(graph) == []
    artifact = CPU.lower(graph, x)
    assert artifact.profile().counts["QLinearConv"] == 2
    for expected, found in zip(net(x), artifact.run(x), strict=True):
        assert sqnr_db(expected.detach().numpy(), found) > 30


@pytest.mark.parametrize("dynamic", [True, False])
def test_square_three_dimensional_linear_layers_are_integer_and_right(dynamic: bool) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU(), torch.nn.Linear(16, 16)).eval()
    x = torch.randn(2, 5, 16)
    shapes = ({0: torch.export.Dim.DYNAMIC},) if dynamic else None
    program = torch.onnx.export(net, (x,), dynamo=True, verbose=False, dynamic_shapes=shapes)
    for graph in (load_torch(net, x), load_onnx(program.model_proto)):
        quantize(graph, [x])
        artifact = CPU.lower(graph)
        assert artifact.profile().float_matrix == []
        assert sqnr_db(net(x).detach().numpy(), artifact.run(x)[0]) > 30


def test_the_same_graph_gives_the_same_bytes(tmp_path) -> None:
    model, batches = block()
    files = []
    for i in range(2):
        graph = quantize(load_torch(model, batches[0]), batches)
        files.append(CPU.lower(graph, path=tmp_path / f"{i}.onnx").path.read_bytes())
    assert files[0] == files[1]
    assert str(tmp_path).encode() not in files[0] and b".py" not in files[0]


def test_inputs_are_checked() -> None:
    model, batches = block()
    artifact = CPU.lower(load_onnx(exported(model, batches[0])))
    with pytest.raises(ConstraintError, match="do not match"):
        artifact.run({"nope": batches[0]})
    with pytest.raises(ConstraintError, match="too many"):
        artifact.run((batches[0], batches[0]))
    with pytest.raises(BackendError, match="ONNX Runtime refused"):
        artifact.run(torch.randn(1, 3, 14))


def test_a_missing_provider_is_named() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has the CUDA provider")
    model, batches = block()
    with pytest.raises(BackendError, match="lacks the provider"):
        get("onnxruntime-cuda").lower(load_onnx(exported(model, batches[0])))


def test_benchmark_alternates_and_compares() -> None:
    order: list[str] = []

    class Fake(Artifact):
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, inputs):
            order.append(self.name)
            return []

        def example(self):
            return {}

    found = Fake("a").benchmark(runs=3, warmup=1, against=Fake("b"))
    assert order == ["a", "b"] * 4
    assert found["runs"] == 3 and found["against"]["runs"] == 3 and found["ratio"] > 0
    with pytest.raises(ConfigError):
        Fake("a").benchmark(runs=0)


# ---- rules: each on a file that breaks it, and none on one that does not ---------------------------------------------
def conv_file(
    act: str = "uint8",
    weight: str = "int8",
    axis: int = 0,
    output_q: bool = True,
    leak: bool = False,
    zero: bool = True,
    bias: str = "int32",
    input_q: bool = True,
) -> onnx.ModelProto:
    z = "" if not zero else ", az"
    tail = "yq = QuantizeLinear(c, s{z})  y = DequantizeLinear(yq, s{z})" if output_q else "y = Identity(c)"
    head = "xq = QuantizeLinear(x, s{z})  xd = DequantizeLinear(xq, s{z})" if input_q else "xd = Identity(x)"
    leaked, more = ("l = Tanh(c)", ", float[1, 2, 4, 4] l") if leak else ("", "")
    scaled = "bd = DequantizeLinear<axis = 0>(b, bs, bz)" if bias == "int32" else "bd = Identity(bf)"
    text = f"""<ir_version: 10, opset_import: ["" : 19]>
    g (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y{more})
    <float s = {{0.5}}, {act} az = {{0}}, {weight}[2, 2, 1, 1] w = {{1, 2, 3, 4}}, float[2] ws = {{0.5, 0.25}},
     {weight}[2] wz = {{0, 0}}, int32[2] b = {{3, 4}}, float[2] bs = {{0.25, 0.125}}, int32[2] bz = {{0, 0}},
     float[2] bf = {{1.0, 2.0}}>
    {{ {head} wd = DequantizeLinear<axis = {axis}>(w, ws, wz)  {scaled}  c = Conv(xd, wd, bd)  {leaked}  {tail} }}"""
    return onnx.parser.parse_model(text.replace("{z}", z))


@pytest.mark.parametrize(
    ("change", "rule", "severity"),
    [
        ({"weight": "uint8"}, "weight-type", "warning"),
        ({"axis": 1}, "weight-axis", "error"),
        ({"output_q": False}, "output-q", "warning"),
        ({"leak": True}, "fan-out", "warning"),
        ({"zero": False}, "zero-point", "info"),
        ({"input_q": False}, "input-q", "warning"),
    ],
)
def test_each_rule_speaks_where_it_should(change, rule: str, severity: str) -> None:
    found = check(conv_file(**change), "onnxruntime-cpu")
    assert {d.rule for d in found} == {rule}
    assert {d.severity for d in found} == {severity}
    assert all(d.node and d.fix for d in found)


@pytest.mark.parametrize("change", [{}, {"act": "int8"}, {"bias": "float32"}])
def test_no_rule_speaks_on_what_becomes_an_integer_kernel(change) -> None:
    assert check(conv_file(**change), "onnxruntime-cpu") == []


def test_a_wrong_bias_scale_is_named() -> None:
    model = conv_file()
    scale = next(t for t in model.graph.initializer if t.name == "bs")
    scale.CopyFrom(onnx.numpy_helper.from_array(np.array([0.25, 0.25], np.float32), "bs"))
    assert [d.rule for d in check(model, "onnxruntime-cpu")] == ["bias-scale-conv"]


def test_a_broken_file_is_an_error_and_a_missing_one_raises(tmp_path) -> None:
    model = conv_file()
    model.graph.node[0].op_type = "NoSuchOp"
    found = check(model, "onnxruntime-cpu")
    assert [(d.rule, d.severity) for d in found] == [("onnx", "error")] and "NoSuchOp" in found[0].message
    with pytest.raises(ModelFileError):
        check(tmp_path / "none.onnx", "onnxruntime-cpu")
    assert "warning [r] n: m (f)" == str(Diagnostic("r", "warning", "n", "m", "f"))


# ---- real data ----------------------------------------------------------------------------------------------------
@pytest.mark.data
def test_resnet20_in_int8_is_accurate_and_fused() -> None:
    model = trained_resnet(20)
    calibration, _ = cifar10("train", 256)
    images, labels = cifar10("test", 1000)
    batches = list(calibration.split(64))
    float_model = exported(model, batches[0])
    before = CPU.lower(load_onnx(float_model), threads=1)
    artifact = CPU.lower(quantize(load_onnx(float_model), batches), threads=1)
    profile = artifact.profile()
    assert profile.counts["QLinearConv"] == 19 and profile.counts["QGemm"] == 1
    assert profile.float_matrix == []
    expected, found = before.run(images)[0], artifact.run(images)[0]
    assert sqnr_db(expected, found) >= 28
    right = float((found.argmax(1) == labels.numpy()).mean())
    assert abs(right - accuracy(model, images, labels)) <= 0.003


# ---- exports that need care ------------------------------------------------------------------------------------------
def test_float_weights_of_transposed_convolutions_stay_float(tmp_path) -> None:
    """ONNX Runtime would quantize this weight, whose channels differ a thousandfold, with one scale."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        net[1].weight.mul_(torch.logspace(-3, 0.5, 8)[None, :, None, None])
    x = torch.randn(2, 3, 12, 12)
    graph = load_torch(net, x)
    Quantize(target="onnxruntime-cpu").apply(graph, Context(calibration=[x], backends=get))
    expected = np.asarray(graph.run({graph.inputs[0].name: x.numpy()})[0][0])
    for path in (None, tmp_path / "m.onnx"):
        artifact = CPU.lower(graph, x, path=path)
        assert sqnr_db(expected, artifact.run(x)[0]) > 60
        assert {op for _, op in artifact.profile().float_matrix} == {"ConvTranspose"}
    plain = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    assert sqnr_db(expected, plain.run(None, {plain.get_inputs()[0].name: x.numpy()})[0]) < 50


def test_output_names_that_inner_values_have_too_stay_the_graphs() -> None:
    model, inputs = toy("pixel_shuffle")
    graph = load_torch(model, inputs)
    name = graph.outputs[0].name
    first = graph.nodes[0].output
    twin = graph.insert(
        "mul", [first, graph.add_weight("gain", np.array(2.0, np.float32))], name="twin", after=first.producer
    )
    graph.replace_uses(first, twin.output, except_nodes=[twin])
    graph.refresh()
    artifact = CPU.lower(graph, inputs)
    assert artifact.output_names == [name]
    (expected,), _ = graph.run(graph.bind(inputs))
    assert difference(np.asarray(expected), artifact.run(graph.bind(inputs))[0])[1] < 1e-5


def test_a_dimension_that_cannot_stay_dynamic_is_noted() -> None:
    model, inputs = toy("gru")
    graph = load_torch(model, inputs)
    artifact = CPU.lower(graph, inputs)
    feeds = graph.bind(inputs)
    (expected,), _ = graph.run(feeds)
    assert difference(np.asarray(expected), artifact.run(feeds)[0])[1] < 1e-5
    fixed = [v.name for v in artifact.session.get_inputs() if all(isinstance(d, int) for d in v.shape)]
    assert bool(fixed) == bool(artifact.notes)


def test_an_artifact_takes_nested_calls_like_the_model() -> None:
    class Nested(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)

        def forward(self, batch: dict[str, torch.Tensor], *, scale: torch.Tensor) -> dict[str, Any]:
            y = torch.relu(self.a(batch["x"])) * scale
            return {"out": self.b(y), "extra": (y, batch["x"] + 1)}

    model = Nested().eval()
    call = (({"x": torch.randn(3, 4)},), {"scale": torch.rand(1, 1)})
    artifact = CPU.lower(load_torch(model, call))
    expected = model(*call[0], **call[1])
    flat = [expected["out"], *expected["extra"]]
    for found, want in zip(artifact.run(call), flat, strict=True):
        assert np.allclose(found, want.detach().numpy(), atol=1e-5)
