"""The reference executor against ONNX Runtime: every kernel and whole graphs, bit for bit, ties included."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from foldline.backends import get
from foldline.graph.errors import ConstraintError
from foldline.graph.fx import load_torch
from foldline.graph.onnx import load_onnx
from foldline.passes.base import Context
from foldline.passes.quantize import Quantize, reference
from foldline.passes.quantize.numerics import sqnr_db
from foldline.passes.quantize.reference import kernels as k
from foldline.passes.quantize.reference.arithmetic import fma
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from support.data import cifar10, trained_resnet
from torch import nn

CPU = get("onnxruntime-cpu")
TYPES = {np.dtype(np.uint8): TensorProto.UINT8, np.dtype(np.int8): TensorProto.INT8}
f32 = np.float32


def runtime(op: str, feeds: dict, constants: dict, order: list[str], out: int, **attributes) -> np.ndarray:
    """One operator of ONNX Runtime's own; ``order`` lists its operands."""
    standard = op in ("QLinearConv", "QLinearMatMul")
    node = helper.make_node(op, order, ["out"], domain="" if standard else "com.microsoft", **attributes)
    inputs = [helper.make_tensor_value_info(n, TYPES[x.dtype], x.shape) for n, x in feeds.items()]
    stored = [numpy_helper.from_array(np.asarray(x), n) for n, x in constants.items()]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("out", out, None)], stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def integers(rng, shape, dtype) -> np.ndarray:
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max + 1, shape).astype(dtype)


def tensor(rng, shape, dtype, scale: float | None = None) -> k.Quantized:
    chosen = rng.uniform(0.01, 0.1) if scale is None else scale
    return k.Quantized(integers(rng, shape, dtype), np.array(chosen, f32), np.asarray(integers(rng, (), dtype)))


def result_grid(rng, dtype, unit: float, trial: int) -> k.Grid:
    """A result's grid: random, or one where sums fall on ties (scales in a ratio of half integers)."""
    scale = unit * rng.integers(1, 40) / 2 if trial % 2 else rng.uniform(0.02, 0.3)
    return k.Grid(np.array(scale, f32), np.asarray(integers(rng, (), dtype)))


# ---- arithmetic ----
FLOATS = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=300, deadline=None)
@given(FLOATS, FLOATS, FLOATS)
def test_fma_rounds_once(a: float, b: float, c: float) -> None:
    from fractions import Fraction

    exact = Fraction(a) * Fraction(b) + Fraction(c)
    found = float(fma(f32(a), f32(b), f32(c)))
    near = [found, float(np.nextafter(f32(found), f32(np.inf))), float(np.nextafter(f32(found), f32(-np.inf)))]
    assert abs(Fraction(found) - exact) == min(abs(Fraction(n) - exact) for n in near if np.isfinite(n))


def test_fma_where_two_roundings_differ_from_one() -> None:
    # a * b = 1 + 2**-11 + 2**-24 (a tie in float32) plus less than float64 shows: up, not to even.
    a, b, c = f32(1 + 2**-12), f32(1 + 2**-12), f32(2.0**-70)
    assert float(fma(a, b, c)) == 1 + 2**-11 + 2**-23 and float(f32(float(a) * float(b) + float(c))) == 1 + 2**-11


# ---- kernels ----
@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("op", ["QLinearAdd", "QLinearMul"])
def test_additions_and_products_of_activations(op: str, dtype) -> None:
    rng = np.random.default_rng(0)
    formula = k.qlinear_add if op == "QLinearAdd" else k.qlinear_mul
    for trial in range(20):
        unit = 2.0 ** -rng.integers(2, 8)
        a = tensor(rng, (3, 5, 41), dtype, unit if trial % 2 else None)
        b = tensor(rng, (3, 5, 41), dtype, unit / 2 if trial % 2 else None)
        y = result_grid(rng, dtype, unit if op == "QLinearAdd" else unit**2, trial)
        constants = {"as": a.scale, "az": a.zero, "bs": b.scale, "bz": b.zero, "ys": y.scale, "yz": y.zero}
        names = ["a", "as", "az", "b", "bs", "bz", "ys", "yz"]
        found = runtime(op, {"a": a.data, "b": b.data}, constants, names, TYPES[np.dtype(dtype)])
        np.testing.assert_array_equal(formula(a, b, y), found)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("op", ["QLinearAdd", "QLinearMul"])
@pytest.mark.parametrize(
    "shapes",
    [((1,), (4, 90)), ((4, 90), (1,)), ((2, 3, 1), (1, 3, 40)), ((2, 8, 1, 1), (2, 8, 5, 5)), ((2, 8, 5, 5), (8, 1, 1)),
     ((40,), (2, 3, 40)), ((2, 3, 1, 1), (1, 3, 1, 1)), ((1, 1, 1, 1), (2, 3, 1, 1))],
    ids=str,
)  # fmt: skip
def test_broadcast_operands_on_ties(shapes, op: str, dtype) -> None:
    rng = np.random.default_rng(2)
    formula = k.qlinear_add if op == "QLinearAdd" else k.qlinear_mul
    for _ in range(20):
        a, b = (tensor(rng, shape, dtype, 2.0 ** -rng.integers(2, 8)) for shape in shapes)
        unit = a.scale * b.scale if op == "QLinearMul" else a.scale
        y = k.Grid(np.array(unit * 2 * rng.integers(1, 33), f32), np.asarray(integers(rng, (), dtype)))
        constants = {"as": a.scale, "az": a.zero, "bs": b.scale, "bz": b.zero, "ys": y.scale, "yz": y.zero}
        names = ["a", "as", "az", "b", "bs", "bz", "ys", "yz"]
        found = runtime(op, {"a": a.data, "b": b.data}, constants, names, TYPES[np.dtype(dtype)])
        np.testing.assert_array_equal(formula(a, b, y), found)


CONVS = [
    # channels in, out, groups, kernel, stride, padding, dilation
    (3, 8, 1, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    (8, 6, 2, (3, 1), (2, 1), ((1, 0), (0, 2)), (1, 1)),
    (16, 16, 16, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    (4, 8, 4, (5, 5), (2, 2), ((2, 2), (2, 2)), (1, 1)),
    (6, 4, 1, (3, 3), (1, 1), ((2, 2), (2, 2)), (2, 2)),
    (70, 5, 1, (3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1)),
    (64, 32, 1, (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1)),
]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("case", CONVS, ids=lambda c: "x".join(map(str, (*c[:3], *c[3]))))
@pytest.mark.parametrize("biased", [True, False])
def test_convolutions(case, dtype, biased: bool) -> None:
    into, out, groups, kernel, stride, padding, dilation = case
    rng = np.random.default_rng(1)
    for trial in range(4):
        x = tensor(rng, (2, into, 9, 8), dtype)
        per_channel = trial < 3
        scale = rng.uniform(0.001, 0.02, out).astype(f32) if per_channel else np.array(0.01, f32)
        w = k.Quantized(integers(rng, (out, into // groups, *kernel), np.int8), scale, np.zeros(scale.shape, np.int8))
        y = result_grid(rng, dtype, float(x.scale * scale.reshape(-1)[0]), trial)
        y = k.Grid(y.scale * f32(10), y.zero)
        bias = rng.integers(-4000, 4000, out).astype(np.int32) if biased else None
        found = runtime(
            "QLinearConv",
            {"x": x.data},
            {"xs": x.scale, "xz": x.zero, "w": w.data, "ws": w.scale, "wz": w.zero, "ys": y.scale, "yz": y.zero}
            | ({} if bias is None else {"b": bias}),
            ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", *(["b"] if biased else [])],
            TYPES[np.dtype(dtype)],
            strides=list(stride),
            pads=[p[0] for p in padding] + [p[1] for p in padding],
            dilations=list(dilation),
            group=groups,
        )
        mine = k.qlinear_conv(x, w, bias, y, stride=stride, padding=padding, dilation=dilation, groups=groups)
        np.testing.assert_array_equal(mine, found)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("weight", [np.int8, np.uint8])
def test_matrix_products(dtype, weight) -> None:
    if dtype is np.int8 and weight is np.uint8:
        pytest.skip("the runtime has no such kernel")
    rng = np.random.default_rng(2)
    for trial in range(12):
        rows, inner, columns = (int(n) for n in rng.integers(1, 90, 3))
        if trial == 0:
            inner = 1500  # beyond what float32 would accumulate exactly
        x = tensor(rng, (rows, inner), dtype)
        scale = rng.uniform(0.001, 0.02, columns).astype(f32)
        zero = np.full(columns, 0 if weight is np.int8 else 128, weight)
        w = k.Quantized(integers(rng, (inner, columns), weight), scale, zero)
        y = result_grid(rng, dtype, float(x.scale * scale[0]), trial)
        bias = rng.integers(-4000, 4000, columns).astype(np.int32)
        fixed = {"xs": x.scale, "xz": x.zero, "w": w.data, "ws": w.scale, "wz": w.zero}
        result = {"ys": y.scale, "yz": y.zero}
        kind = TYPES[np.dtype(dtype)]
        names = ["x", "xs", "xz", "w", "ws", "wz"]
        found = runtime("QLinearMatMul", {"x": x.data}, fixed | result, [*names, "ys", "yz"], kind)
        np.testing.assert_array_equal(k.qlinear_matmul(x, w, y), found)
        found = runtime("QGemm", {"x": x.data}, fixed | result | {"b": bias}, [*names, "b", "ys", "yz"], kind)
        np.testing.assert_array_equal(k.qlinear_matmul(x, w, y, bias), found)
        found = runtime("QGemm", {"x": x.data}, fixed | {"b": bias}, [*names, "b"], TensorProto.FLOAT)
        np.testing.assert_array_equal(k.qgemm_float(x, w, bias), found)
        names = ["x", "w", "xs", "ws", "xz", "wz"]
        found = runtime("MatMulIntegerToFloat", {"x": x.data}, fixed, names, TensorProto.FLOAT)
        np.testing.assert_array_equal(k.qgemm_float(x, w), found)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_pools(dtype) -> None:
    rng = np.random.default_rng(3)
    kind = TYPES[np.dtype(dtype)]
    for trial in range(12):
        x = tensor(rng, (2, 300, 3, 2), dtype)
        y = result_grid(rng, dtype, float(x.scale) / 6, trial)
        fixed = {"xs": x.scale, "xz": x.zero, "ys": y.scale, "yz": y.zero}
        names = ["x", "xs", "xz", "ys", "yz"]
        found = runtime("QLinearGlobalAveragePool", {"x": x.data}, fixed, names, kind)
        np.testing.assert_array_equal(k.qlinear_global_average_pool(x, y), found)
        x = k.Quantized(integers(rng, (1, 3, 17, 16), dtype), x.scale, x.zero)
        for padding, counted in (((0, 0, 0, 0), 0), ((1, 1, 1, 1), 0), ((1, 0, 1, 1), 1)):
            found = runtime(
                "QLinearAveragePool", {"x": x.data}, fixed, names, kind,
                kernel_shape=[2, 3], strides=[2, 1], pads=list(padding), count_include_pad=counted,
            )  # fmt: skip
            pairs = ((padding[0], padding[2]), (padding[1], padding[3]))
            mine = k.qlinear_average_pool(
                x, y, kernel=(2, 3), stride=(2, 1), padding=pairs, count_include_pad=bool(counted)
            )
            np.testing.assert_array_equal(mine, found)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_concatenations_and_tables(dtype) -> None:
    rng = np.random.default_rng(4)
    kind = TYPES[np.dtype(dtype)]
    info = np.iinfo(dtype)
    keys = np.arange(info.min, info.max + 1).astype(dtype).reshape(1, -1)
    for trial in range(20):
        unit = 2.0 ** -rng.integers(2, 8)
        parts = [k.Quantized(keys, np.array(unit, f32), np.asarray(integers(rng, (), dtype))) for _ in range(2)]
        y = result_grid(rng, dtype, unit, trial)
        if trial % 5 == 0:
            parts[1] = k.Quantized(keys, y.scale, y.zero)
        named = {f"{c}{i}": v for i, p in enumerate(parts) for c, v in (("s", p.scale), ("z", p.zero))}
        found = runtime(
            "QLinearConcat", {"x0": keys, "x1": keys}, named | {"ys": y.scale, "yz": y.zero},
            ["ys", "yz", "x0", "s0", "z0", "x1", "s1", "z1"], kind, axis=1,
        )  # fmt: skip
        np.testing.assert_array_equal(k.qlinear_concat(parts, y, 1), found)
        x = parts[0]
        fixed = {"xs": x.scale, "xz": x.zero, "ys": y.scale, "yz": y.zero}
        names = ["x", "xs", "xz", "ys", "yz"]
        found = runtime("QLinearLeakyRelu", {"x": keys}, fixed, names, kind, alpha=0.25)
        np.testing.assert_array_equal(k.table(x, y, lambda v: k.leaky_relu(v, 0.25))[0], found)
        fixed["ys"] = np.array(1 / 256 if trial % 2 else rng.uniform(0.002, 0.01), f32)
        found = runtime("QLinearSigmoid", {"x": keys}, fixed, names, kind)
        np.testing.assert_array_equal(k.table(x, k.Grid(fixed["ys"], y.zero), k.sigmoid)[0], found)


# ---- whole graphs ----
class Mixed(nn.Module):
    """Residual addition, depthwise and grouped convolutions, gate, leaky relu, concat, both average pools, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 16, 1, groups=4)
        self.gate = nn.Conv2d(16, 16, 1)
        self.left, self.right = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 3, padding=1)
        self.after, self.head = nn.Conv2d(16, 20, 3, stride=2), nn.Linear(20, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.grouped(torch.nn.functional.relu6(self.depthwise(x))) + x)
        x = x * torch.sigmoid(self.gate(x))
        x = torch.cat([nn.functional.leaky_relu(self.left(x), 0.1), self.right(x)], 1)
        x = self.after(nn.functional.avg_pool2d(x, 3, stride=2, padding=1))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def exported(model: nn.Module, x: torch.Tensor) -> onnx.ModelProto:
    return torch.onnx.export(model, (x,), dynamo=True, verbose=False).model_proto


def quantized(graph, batches, **options):
    Quantize(**options).apply(graph, Context(calibration=batches, backends=get))
    return graph


INTEGER = ("QLinear", "QGemm", "MatMulIntegerToFloat")


def fused(profile) -> dict[str, int]:
    return {op: n for op, n in profile.counts.items() if op.startswith(INTEGER)}


@pytest.mark.parametrize(("front", "ranges"), [("fx", "mse"), ("onnx", "minmax")])
def test_a_graph_of_every_kernel_is_reproduced(front: str, ranges: str) -> None:
    torch.manual_seed(0)
    net, x = Mixed().eval(), torch.randn(3, 3, 18, 18)
    graph = quantized(load_torch(net, x) if front == "fx" else load_onnx(exported(net, x)), [x], ranges=ranges)
    artifact = CPU.lower(graph, x, threads=1)
    executor = reference.Executor(graph)
    assert Counter(kernel.op for kernel in executor.kernels.values()) == fused(artifact.profile())
    found = executor.run({graph.inputs[0].name: x.numpy()})[0]
    np.testing.assert_array_equal(found, artifact.run(x)[0])
    assert fused(artifact.profile())["QLinearGlobalAveragePool"] == 1  # torch's exporter wrote a ReduceMean
    assert sqnr_db(net(x).detach().numpy(), found) > 15


class Gated(nn.Module):
    """The gates of EfficientNet and MobileNetV3: SiLU and hard-swish behind convolutions, squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3, groups=12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.last, self.head = nn.Conv2d(12, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.silu(self.mid(nn.functional.hardswish(self.stem(x))))
        gate = self.excite(nn.functional.silu(self.squeeze(x.mean((2, 3), keepdim=True))))
        x = x * nn.functional.hardsigmoid(gate)
        return self.head(nn.functional.hardswish(self.last(x)))


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_gates_run_in_integers_from_both_front_ends(front: str) -> None:
    torch.manual_seed(0)
    net, x = Gated().eval(), 3 * torch.randn(2, 3, 12, 12)
    graph = quantized(load_torch(net, x) if front == "fx" else load_onnx(exported(net, x)), [x])
    artifact = CPU.lower(graph, x, threads=1)
    counts = artifact.profile().counts
    executor = reference.Executor(graph)
    assert Counter(kernel.op for kernel in executor.kernels.values()) == fused(artifact.profile())
    assert counts["QLinearSigmoid"] == 2 and counts["QLinearMul"] == 5 and counts["QLinearAdd"] == 3
    assert counts["QLinearConv"] == 6 and counts["QLinearGlobalAveragePool"] == 1
    assert counts["QuantizeLinear"] == counts["DequantizeLinear"] == 1
    np.testing.assert_array_equal(executor.run({graph.inputs[0].name: x.numpy()})[0], artifact.run(x)[0])
    assert sqnr_db(net(x).detach().numpy(), artifact.run(x)[0]) > 20


class Encoder(nn.Module):
    """A transformer layer: attention in float, four linear layers that become integer products."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


def test_the_integer_products_of_a_transformer_are_reproduced_from_what_the_runtime_feeds_them(tmp_path) -> None:
    """Between them the runtime fuses float operators in its own way, so each product is checked on its own inputs."""
    torch.manual_seed(0)
    net, x = nn.Sequential(Encoder(), Encoder()).eval(), torch.randn(2, 9, 32)
    program = torch.onnx.export(net, (x,), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    graph = quantized(load_onnx(program.model_proto), [x])
    artifact = CPU.lower(graph, x, threads=1, path=tmp_path / "m.onnx")
    executor = reference.Executor(graph)
    assert Counter(kernel.op for kernel in executor.kernels.values()) == fused(artifact.profile())
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(str(artifact.path), options, providers=["CPUExecutionProvider"])
    model = onnx.load(tmp_path / "optimized.onnx")
    products = [n for n in model.graph.node if n.op_type == "MatMulIntegerToFloat"]
    assert len(products) == 8
    inner = {name for n in products for name in (n.input[0], n.output[0])}
    known = {v.name for v in model.graph.output}
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in sorted(inner - known))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    values = dict(zip(names, session.run(None, {session.get_inputs()[0].name: x.numpy()}), strict=True))
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in products:
        a, w, a_scale, w_scale, a_zero, w_zero = (stored.get(n, values.get(n)) for n in node.input[:6])
        left, right = k.Quantized(a, a_scale.reshape(()), a_zero.reshape(())), k.Quantized(w, w_scale, w_zero)
        np.testing.assert_array_equal(k.qgemm_float(left, right), values[node.output[0]])
    # As a whole: float operators computed one by one differ in last bits, which may move an integer by one.
    assert sqnr_db(artifact.run(x)[0], executor.run({graph.inputs[0].name: x.numpy()})[0]) > 35


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_linear_layers_with_float_results(front: str, rank: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 24, bias=False), nn.Linear(24, 5)).eval()
    x = torch.randn(*(4, 6)[: rank - 1], 24)
    graph = quantized(load_torch(net, x) if front == "fx" else load_onnx(exported(net, x)), [x])
    artifact = CPU.lower(graph, x, threads=1)
    executor = reference.Executor(graph)
    assert Counter(kernel.op for kernel in executor.kernels.values()) == fused(artifact.profile())
    np.testing.assert_array_equal(executor.run({graph.inputs[0].name: x.numpy()})[0], artifact.run(x)[0])


def test_a_missing_input_is_named() -> None:
    graph = load_torch(nn.ReLU().eval(), torch.randn(2, 3))
    with pytest.raises(ConstraintError, match="a graph input is missing"):
        reference.run(graph, {})


@pytest.mark.data
@pytest.mark.parametrize("front", [pytest.param("fx", marks=pytest.mark.slow), "onnx"])
def test_resnet20_with_real_weights_is_reproduced_to_the_last_bit(front: str) -> None:
    from foldline import Pipeline
    from foldline.passes import Fold

    calibration, _ = cifar10("train", 64)
    images, _ = cifar10("test", 20)
    model = trained_resnet(20)
    source = model if front == "fx" else exported(model, images)
    result = Pipeline([Fold(), Quantize()]).run(
        source, calibration[:20], calibration=[calibration[:20], calibration[20:40]]
    )
    graph = load_torch(result.model, images) if front == "fx" else load_onnx(result.model)
    artifact = CPU.lower(graph, threads=1)
    executor = reference.Executor(graph)
    assert Counter(kernel.op for kernel in executor.kernels.values()) == fused(artifact.profile())
    assert sum(kernel.op == "QLinearConv" for kernel in executor.kernels.values()) == 19
    assert "DequantizeLinear" not in artifact.profile().counts  # the shortcuts' pads run on integers too
    np.testing.assert_array_equal(executor.run({graph.inputs[0].name: images.numpy()})[0], artifact.run(images)[0])
