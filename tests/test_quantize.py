"""Quantize: numerics bit for bit, placement by the spec with its reasons, the same on torch and on ONNX."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from foldline.backends import get
from foldline.graph.errors import ConfigError, ConstraintError
from foldline.graph.fx import load_torch
from foldline.graph.onnx import load_onnx
from foldline.graph.verify import compare
from foldline.passes.base import Context
from foldline.passes.quantize import BackendSpec, Quantize, TensorFormat
from foldline.passes.quantize.numerics import bias_params, least_weight_scale, range_params, sqnr_db, weight_params
from foldline.passes.quantize.placement import place
from torch import nn

UINT8, INT8 = TensorFormat("uint8"), TensorFormat("int8", symmetric=True, granularity="out_channel")
SPEC = get("onnxruntime-cpu").spec
assert SPEC is not None


class Block(nn.Module):
    """A residual block, a pool, a convolution, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 6, 3, stride=2)
        self.fc1, self.fc2 = nn.Linear(6 * 9, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.conv(x) + x)
        x = self.last(nn.functional.max_pool2d(x, 2))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def block() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    return Block().eval(), [torch.randn(4, 3, 14, 14) for _ in range(3)]


_EXPORTS: dict[str, onnx.ModelProto] = {}


def exported(model: nn.Module, x: torch.Tensor) -> onnx.ModelProto:
    """The model in ONNX with a dynamic batch; exports take seconds, so the same weights are exported once."""
    key = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    if key not in _EXPORTS:
        _EXPORTS[key] = _export(model, x)
    copy = onnx.ModelProto()
    copy.CopyFrom(_EXPORTS[key])
    return copy


def _export(model: nn.Module, x: torch.Tensor) -> onnx.ModelProto:
    program = torch.onnx.export(
        model, (x,), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    return program.model_proto


def loaded(front: str):
    model, batches = block()
    return load_torch(model, batches[0]) if front == "fx" else load_onnx(exported(model, batches[0]))


def quantized(graph, batches, **options):
    context = Context(calibration=batches, backends=get)
    outcome = Quantize(**options).apply(graph, context)
    return outcome


# ---- numerics ---------------------------------------------------------------------------------------------------
def ort_q(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    kind = "uint8" if zero.dtype == np.uint8 else "int8"
    dims = "" if scale.ndim == 0 else f"[{scale.size}]"
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 19]>
        g (float[N, M] x, float{dims} s, {kind}{dims} z) => ({kind}[N, M] q, float[N, M] d)
        {{ q = QuantizeLinear<axis = {axis}>(x, s, z)  d = DequantizeLinear<axis = {axis}>(q, s, z) }}"""
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    q, d = session.run(None, {"x": x, "s": scale, "z": zero})
    return q, d


@pytest.mark.parametrize(("low", "high"), [(-1.3, 2.9), (0.0, 6.0), (-4.0, -1.0), (0.0, 0.0), (-1e-30, 1e30)])
def test_activations_quantize_as_onnxruntime_does(low: float, high: float) -> None:
    p = range_params(low, high, UINT8)
    x = np.random.default_rng(0).uniform(low - 1, high + 1, (64, 65)).astype(np.float32)
    x[0] = (np.arange(65) - 32) * p.scale / 2  # ties
    q, d = ort_q(x, p.scale, p.zero_point)
    np.testing.assert_array_equal(p.quantize(x), q)
    np.testing.assert_array_equal(p.dequantize(q), d)
    assert p.dequantize(p.quantize(np.zeros((1, 1), np.float32))) == 0


@pytest.mark.parametrize(("low", "high"), [(-1.3, 2.9), (0.0, 6.0), (-4.0, -1.0), (-7.0, 0.01)])
def test_the_range_is_covered_to_half_a_step(low: float, high: float) -> None:
    p = range_params(low, high, UINT8)
    x = np.linspace(min(low, 0), max(high, 0), 1001, dtype=np.float32)
    # The zero point is rounded too, so up to half a step is clipped at one end.
    assert np.abs(p.dequantize(p.quantize(x)) - x).max() <= p.scale * (0.5 + 1e-3)
    assert np.unique(p.quantize(x)).size >= 255


def test_weights_quantize_per_channel_as_onnxruntime_does() -> None:
    w = np.random.default_rng(0).standard_normal((6, 10)).astype(np.float32)
    w[2] = 0
    for axis in (0, 1):
        p = weight_params(w, axis, INT8)
        q, d = ort_q(w, p.scale, p.zero_point, axis)
        np.testing.assert_array_equal(p.quantize(w), q)
        np.testing.assert_array_equal(p.dequantize(q), d)
        assert p.scale.shape == (w.shape[axis],) and np.abs(q).max() == 127
        assert (np.abs(d - w).max(1 - axis) <= p.scale / 2 * (1 + 1e-6)).all()


def test_bias_fits_into_int32_even_where_the_weights_vanish() -> None:
    x = range_params(0, 1e-3, UINT8)
    w = np.stack([np.full(4, 1e-12), np.ones(4)]).astype(np.float32)
    bias = np.array([5.0, -3.0], np.float32)
    p = weight_params(w, 0, INT8, least_weight_scale(bias, x))
    b = bias_params(x, p, 2)
    np.testing.assert_allclose(b.dequantize(b.quantize(bias)), bias, rtol=1e-6)
    assert np.abs(b.quantize(bias).astype(np.int64)).max() < 2**31 - 1


def test_sqnr() -> None:
    a = np.array([3.0, 4.0])
    assert sqnr_db(a, a) == np.inf
    assert sqnr_db(a, 1.1 * a) == pytest.approx(20)


# ---- spec -------------------------------------------------------------------------------------------------------
def test_spec_survives_its_yaml_form(tmp_path) -> None:
    import yaml

    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(SPEC.to_dict()))
    assert BackendSpec.from_yaml(path) == SPEC


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"activations": {"dtype": "int7"}}, "activations.dtype"),
        ({"ops": {"conv": {"role": "ancor"}}}, "ops.conv.0.role"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_wrong_spec_names_its_key(change, key) -> None:
    with pytest.raises(ConfigError, match=key):
        BackendSpec.from_dict({**SPEC.to_dict(), **change})


# ---- placement --------------------------------------------------------------------------------------------------
def test_placement_on_a_residual_network() -> None:
    model, batches = block()
    graph = load_torch(model, batches[0])
    plan = place(graph, SPEC, set())
    ops = sorted(graph.node(name).op for name in plan.quantized)
    assert ops == ["add", "conv", "conv", "conv", "linear", "linear", "max_pool", "reshape"]
    by_op = {p.value.producer.op if p.value.producer else "input": p for p in plan.points.values()}
    # Input, both relus of the trunk (not the conv and the add under them), the inner conv, the pool, the last conv,
    # its flattened form, the relu of the MLP; the results of the linear layers stay float.
    assert sorted(p.value.producer.op if p.value.producer else "input" for p in plan.points.values()) == sorted(
        ["input", "relu", "conv", "relu", "max_pool", "conv", "reshape", "relu"]
    )
    # The pool and the reshape move elements: they share the scale of what they read.
    assert by_op["max_pool"].root == by_op["max_pool"].value.producer.inputs[0].name
    assert by_op["reshape"].root == by_op["reshape"].value.producer.inputs[0].name
    assert set(plan.sources) == {p.root for p in plan.points.values()} and len(plan.sources) == 6
    assert [s.axis for s in plan.weights] == [0, 0, 0, 0, 0]


def test_a_join_needs_operands_and_a_taker() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            half = self.a(x) + torch.tanh(x)
            return self.b(half) + half

    x = torch.randn(2, 3, 4, 4)
    graph = load_torch(Net().eval(), x)
    outcome = quantized(graph, [x])
    reasons = {d.subject: d.reason for d in outcome.decisions if d.action == "kept in float"}
    adds = [n.name for n in graph.nodes if n.op == "add"]
    assert "stays in float" in reasons[adds[0]]
    assert "no quantized op reads" in reasons[adds[1]]


def test_ignored_nodes_stay_float_and_a_pattern_must_match() -> None:
    model, batches = block()
    graph = load_torch(model, batches[0])
    outcome = quantized(graph, batches, ignore=("stem", "fc*"))
    kept = [d for d in outcome.decisions if d.reason == "it is on the ignore list"]
    assert len(kept) == 3
    assert outcome.details["weights"] == 2
    with pytest.raises(ConstraintError, match=r"matches nothing[\s\S]*fc1"):
        quantized(load_torch(model, batches[0]), batches, ignore=("fc_1",))


def test_a_model_without_weights_is_refused() -> None:
    graph = load_torch(nn.ReLU().eval(), torch.randn(2, 3))
    with pytest.raises(ConstraintError, match="nothing to quantize"):
        quantized(graph, [torch.randn(2, 3)])


def test_calibration_is_asked_for() -> None:
    model, batches = block()
    with pytest.raises(ConfigError, match="needs calibration data"):
        Quantize().apply(load_torch(model, batches[0]), Context(backends=get))


def test_an_unfolded_batch_norm_is_warned_about() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 4, 4)
    outcome = quantized(load_torch(net, x), [x])
    assert [d.action for d in outcome.decisions if "Fold" in d.reason] == ["warned"]


# ---- the graph that comes out ------------------------------------------------------------------------------------
@pytest.mark.parametrize("front", ["fx", "onnx"])
@pytest.mark.parametrize("ranges", ["minmax", "mean", "percentile"])
def test_the_quantized_graph_is_close_and_its_facts_are_true(front: str, ranges: str) -> None:
    model, batches = block()
    load = (
        (lambda: load_torch(model, batches[0])) if front == "fx" else (lambda: load_onnx(exported(model, batches[0])))
    )
    before, graph = load(), load()
    outcome = quantized(graph, batches, ranges=ranges)
    inputs = [before.bind(b) for b in batches]
    out = next(iter(compare(before, graph, inputs).outputs.values()))
    assert (20 if ranges == "mean" else 25) < out.sqnr_db < 60  # the mean over samples clips more
    ops = [n.op for n in graph.nodes]
    assert ops.count("quantize") == outcome.details["points"] == 8
    # One per pair, one per weight and one per bias.
    assert ops.count("dequantize") == 8 + 5 + 5
    for node in graph.nodes:
        if node.op in ("conv", "linear"):
            assert all(v is None or v.producer.op == "dequantize" for v in node.inputs)
            assert node.inputs[1].producer.inputs[0].dtype == "int8"
            assert node.inputs[0].producer.inputs[0].dtype == "uint8"
            assert node.inputs[2].producer.inputs[0].dtype == "int32"
    for data in outcome.details["layers"].values():
        assert data["weight_sqnr_db"] > 35


def test_torch_and_onnx_get_the_same_scales() -> None:
    model, batches = block()
    fx, onnx_ = load_torch(model, batches[0]), load_onnx(exported(model, batches[0]))
    first, second = quantized(fx, batches).details["layers"], quantized(onnx_, batches).details["layers"]
    mine = sorted((d["weight"], d["input_zero_point"], d["weight_axis"]) for d in first.values())
    theirs = sorted((d["weight"], d["input_zero_point"], d["weight_axis"]) for d in second.values())
    assert mine == theirs
    scales = [sorted((d["weight"], d["input_scale"]) for d in side.values()) for side in (first, second)]
    for (a, x), (b, y) in zip(*scales, strict=True):
        assert a == b and x == pytest.approx(y, rel=1e-5)
    inputs = batches[0].numpy()
    (a,), _ = fx.run({fx.inputs[0].name: inputs})
    (b,), _ = onnx_.run({onnx_.inputs[0].name: inputs})
    assert sqnr_db(np.asarray(a), np.asarray(b)) > 35  # an activation on a tie may fall to either side


def test_the_same_bytes_come_out_twice_in_any_batch_order() -> None:
    model, batches = block()
    one, two = load_onnx(exported(model, batches[0])), load_onnx(exported(model, batches[0]))
    quantized(one, batches, ranges="percentile")
    quantized(two, batches[::-1], ranges="percentile")
    assert sorted(one.weights) == sorted(two.weights)
    for name in one.weights:
        np.testing.assert_array_equal(one.weights[name].numpy(), two.weights[name].numpy())


def test_the_callers_model_is_untouched() -> None:
    model, batches = block()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    quantized(load_torch(model, batches[0]).clone(), batches)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_an_addition_behind_a_product_is_its_bias() -> None:
    graph = load_onnx(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["" : 19]>
            g (float[2, 3, 2] x) => (float[2, 3, 2] y)
            <float[2, 2] w = {1.0, 0.5, -0.25, 1.0}, float[2] b = {0.5, -0.5}>
            { h = MatMul(x, w)  y = Add(h, b) }"""
        )
    )
    quantized(graph, [np.random.default_rng(0).standard_normal((2, 3, 2)).astype(np.float32)])
    add = next(n for n in graph.nodes if n.op == "add")
    assert next(v for v in add.inputs if v.producer.op == "dequantize").producer.inputs[0].dtype == "int32"
    linear = next(n for n in graph.nodes if n.op == "linear" or n.op == "matmul")
    assert linear.inputs[1].producer.attrs["axis"] == 1
