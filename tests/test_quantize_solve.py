"""The solver: regions by structure, residual skips, equal scales, hoisting, tables, weight-only, formats by name."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import foldline as fl
import numpy as np
import onnx
import pytest
import torch
from foldline import passes as P
from foldline.backends import get
from foldline.graph.errors import ConfigError, ConstraintError
from foldline.graph.fx import load_torch
from foldline.graph.ir import Graph
from foldline.graph.onnx import load_onnx
from foldline.graph.verify import compare
from foldline.passes.base import Context, Outcome
from foldline.passes.quantize import BackendSpec, Quantize, TensorFormat
from foldline.passes.quantize.placement import Placement, place
from foldline.passes.quantize.solve.regions import ATTENTION, MASK, SHAPE, forbidden
from foldline.passes.quantize.solve.union import Groups
from support.quantize_nets import Concat, Residual, encoder, images
from torch import nn

FOLDER = Path(__file__).resolve().parents[1] / "backends"
CPU = get("onnxruntime-cpu").spec
TRT = BackendSpec.from_yaml(FOLDER / "tensorrt/specs/tensorrt.yaml")
assert CPU is not None


def placed(model: nn.Module, x, spec: BackendSpec = CPU, **options) -> tuple[Graph, Placement]:
    graph = load_torch(model.eval(), x)
    return graph, place(graph, spec, set(), **options)


def quantized(graph: Graph, batches, **options) -> Outcome:
    return Quantize(**options).apply(graph, Context(calibration=batches, backends=get))


def scopes(graph: Graph, names) -> set[str]:
    return {graph.node(n).scope or graph.node(n).op for n in names}


# ---- regions ----------------------------------------------------------------------------------------------------
def test_an_attention_core_and_its_mask_are_found_by_structure() -> None:
    net, batches = encoder()
    graph = load_torch(net, batches[0])
    found = forbidden(graph, ("attention", "mask", "shape"))
    ops = {kind: sorted(graph.node(n).op for n, why in found.items() if why == kind) for kind in (ATTENTION, MASK)}
    assert ops[ATTENTION] == ["add", "div", "matmul", "matmul", "softmax"]
    assert "mul" in ops[MASK] and "cast" in ops[MASK]
    assert not any(graph.node(n).op in ("linear", "gather", "layer_norm") for n in found)
    assert forbidden(graph, ()) == {}


def test_a_classifiers_softmax_is_no_attention() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.Softmax(-1)).eval()
    graph = load_torch(net, torch.randn(2, 4))
    assert ATTENTION not in forbidden(graph, ("attention",)).values()


def test_fused_attention_and_arithmetic_on_sizes() -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, (1 - mask) * -1e9)

    graph = load_torch(Net().eval(), (torch.randn(2, 2, 5, 4), torch.ones(2, 1, 5, 5)))
    found = forbidden(graph, ("attention", "mask"))
    assert sorted(graph.node(n).op for n in found)[0] in ("mul", "neg", "rsub", "sub")
    assert {graph.node(n).op: why for n, why in found.items()}["sdpa"] == ATTENTION
    shapes = load_onnx(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["" : 19]>
            g (float[N, 4] x) => (float[N, 4] y)
            <float two = {2.0}>
            { s = Shape(x)  f = Cast<to = 1>(s)  h = Mul(f, two)  i = Cast<to = 7>(h)
              j = Div(i, i)  k = Mul(j, s)  y = Reshape(x, k) }"""
        )
    )
    assert SHAPE in forbidden(shapes, ("shape",)).values()
    assert "reshape" not in {shapes.node(n).op for n in forbidden(shapes, ("shape",))}


# ---- residual rule, equal scales, hoisting -----------------------------------------------------------------------
def test_the_skip_of_a_residual_is_quantized_and_the_branch_is_not() -> None:
    graph, plan = placed(Residual(), images()[0], TRT)
    adds = [n for n in graph.nodes if n.op == "add"]
    assert all(n.name in plan.quantized for n in adds)
    branch = [n.outputs[0].name for n in graph.nodes if n.scope in ("a2", "b2")]
    assert not set(branch) & set(plan.points)
    for add, skip in zip(adds, ("relu", "conv"), strict=True):
        readers = [p for p in plan.points.values() if any(node is add for node, _ in p.readers)]
        assert [p.value.producer.op for p in readers] == [skip]
    # The identity skip shares its pair with the convolution that reads it.
    first = next(p for p in plan.points.values() if any(node is adds[0] for node, _ in p.readers))
    assert {node.op for node, _ in first.readers} == {"conv", "add"}
    # Both operands of the second come from convolutions: the way behind fewer layers is the skip.
    short = next(p for p in plan.points.values() if any(node is adds[1] for node, _ in p.readers))
    assert short.value.producer.scope == "short"


def test_a_branch_that_somebody_else_reads_is_no_residual() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return self.b(y + torch.tanh(y))

    graph, plan = placed(Net(), images()[0], TRT)
    add = next(n for n in graph.nodes if n.op == "add")
    assert add.name not in plan.quantized
    assert any(d.subject == add.name and "nothing else reads" in d.reason for d in plan.decisions)


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_a_concatenation_has_one_scale_where_the_target_wants_it(front: str) -> None:
    model, batches = Concat().eval(), images()
    graph = load_torch(model, batches[0])
    if front == "onnx":
        program = torch.onnx.export(model, (batches[0],), dynamo=True, verbose=False)
        graph, batches = load_onnx(program.model_proto), [b.numpy() for b in batches]
    outcome = quantized(graph, batches, spec=TRT)
    concat = next(n for n in graph.nodes if n.op == "concat")
    groups = [g for g in outcome.details["scale_groups"] if concat.output.name in g["members"]]
    assert len(groups) == 1 and len(groups[0]["members"]) == 3
    assert any("one scale for operands and result" in why for why in groups[0]["because"])
    scales = [v.producer.inputs[1].const() for v in concat.inputs]
    scales.append(next(u for u, _ in concat.output.uses if u.op == "quantize").inputs[1].const())
    assert len({float(s) for s in scales}) == 1
    free = quantized(load_torch(model, images()[0]), images())
    assert not any(len(g["members"]) == 3 for g in free.details["scale_groups"])


def test_q_moves_up_across_rearrangement_but_not_past_a_reader_in_float() -> None:
    class Net(nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            self.shared, self.fc = shared, nn.Linear(12, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(x)
            y = self.fc(x.transpose(1, 2).reshape(2, 12))
            return y + x.sum() if self.shared else y

    spec = replace(CPU, hoist=True)
    graph, plan = placed(Net(False), torch.randn(2, 3, 4), spec)
    ops = [p.value.producer.op for p in plan.points.values()]
    assert ops == ["tanh", "transpose", "reshape"]
    assert len({p.root for p in plan.points.values()}) == 1
    assert plan.sources == {plan.points[next(iter(plan.points))].root: [next(iter(plan.points))]}
    _, plan = placed(Net(True), torch.randn(2, 3, 4), spec)
    assert next(p.value.producer.op for p in plan.points.values()) != "tanh"
    _, plan = placed(Net(False), torch.randn(2, 3, 4))
    assert len(plan.points) == 1


def test_groups_keep_the_first_name_as_root() -> None:
    groups = Groups("abcdef")
    assert groups.join("d", "b") and groups.join("e", "d") and not groups.join("e", "b")
    assert [groups.root(n) for n in "abcdef"] == ["a", "b", "c", "b", "b", "f"]


# ---- products, tables, weight-only, computed weights ---------------------------------------------------------------
def test_products_of_activations_are_quantized_on_request_only() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) @ self.b(x).transpose(-1, -2)

    x = torch.randn(2, 5, 4)
    graph, plan = placed(Net(), x)
    product = next(n.name for n in graph.nodes if n.op == "matmul")
    assert [d.reason for d in plan.decisions if d.subject == product] == [
        "products of two activations are quantized on request only (activation_products=True)"
    ]
    graph, plan = placed(Net(), x, products=True)
    assert product in plan.quantized
    readers = [p for p in plan.points.values() if any(n.name == product for n, _ in p.readers)]
    assert len(readers) == 2
    before, batches = load_torch(Net().eval(), x), [x]
    after = before.clone()
    quantized(after, batches, activation_products=True)
    assert 25 < next(iter(compare(before, after, [before.bind(x)]).outputs.values())).sqnr_db < 60


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_embeddings_are_looked_up_as_integers(front: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.fc = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
            self.fc.weight = self.words.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.tanh(self.words(ids)))

    torch.manual_seed(0)
    model, ids = Net().eval(), torch.randint(0, 50, (2, 6))

    def load() -> Graph:
        if front == "fx":
            return load_torch(model, ids)
        return load_onnx(torch.onnx.export(model, (ids,), dynamo=True, verbose=False).model_proto)

    before, graph = load(), load()
    outcome = quantized(graph, [ids])
    gather = next(n for n in graph.nodes if n.op == "gather")
    assert gather.inputs[0].dtype == gather.output.dtype == "int8"
    (dq,) = [u for u, _ in gather.output.uses]
    assert dq.op == "dequantize" and dq.attrs["axis"] == 2 and dq.inputs[1].hint == (8,)
    assert outcome.details["tables"] == 1
    assert 20 < next(iter(compare(before, graph, [before.bind(ids)]).outputs.values())).sqnr_db < 60
    kept = load()
    outcome = quantized(kept, [ids], embeddings=False)
    assert outcome.details["tables"] == 0 and next(n for n in kept.nodes if n.op == "gather").output.dtype == "float32"
    assert any("embeddings were to stay in float" in d.reason for d in outcome.decisions)


def test_weights_alone_in_blocks_need_no_calibration_and_raise_the_opset() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 17]>
        g (float[2, 128] x) => (float[2, 8] y) { y = MatMul(x, w) }"""
    )
    w = np.random.default_rng(0).standard_normal((128, 8)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    graph = load_onnx(model)
    spec = BackendSpec.from_yaml(FOLDER / "tensorrt/specs/tensorrt-int4.yaml")
    outcome = Quantize(spec=spec, formats={"*": {"weight": {"block": 64}}}).apply(graph, Context(backends=get))
    made = outcome.graph
    assert made is not None and made.to_model().opset_imports[""] == 21
    dq = next(n for n in made.nodes if n.op == "dequantize")
    assert dq.attrs["axis"] == 0 and dq.attrs["block"] == 64 and dq.inputs[1].hint == (2, 8)
    assert dq.inputs[0].dtype == "int4" and outcome.details["points"] == 0
    x = np.random.default_rng(1).standard_normal((2, 128)).astype(np.float32)
    (y,), _ = made.run({"x": x})
    blocks = w.reshape(2, 64, 8)
    scale = np.abs(blocks).max(1, keepdims=True) / 7
    np.testing.assert_allclose(y, x @ (np.rint(blocks / scale) * scale).reshape(128, 8), rtol=1e-4, atol=1e-4)
    # By name, in a pipeline, neither: K = 128 gets blocks of 64, since one block alone is not fused.
    result = fl.Pipeline([P.Quantize(target="tensorrt-int4")]).run(model, verify=False)
    node = next(n for n in result.model.graph if n.op_type == "DequantizeLinear")
    assert node.attributes["block_size"].as_int() == 64
    for options in ({"rounding": "gptq"}, {"target": "tensorrt"}):
        with pytest.raises(ConfigError, match="needs calibration data"):
            fl.Pipeline([P.Quantize(**{"target": "tensorrt-int4", **options})]).run(model, verify=False)


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_computed_weights_are_stored_first(front: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.s = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.rand(4, 1) + 0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, (self.w * self.s).t().contiguous().t())

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(3, 6)
    if front == "onnx":
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False, optimize=False)
        before, graph, x = load_onnx(program.model_proto), load_onnx(program.model_proto), x.numpy()
    else:
        before, graph = load_torch(model, x), load_torch(model, x)
    assert next(n for n in graph.nodes if n.op in ("linear", "matmul")).inputs[1].weight is None
    outcome = quantized(graph, [x])
    assert outcome.details["weights"] == 1
    assert 30 < next(iter(compare(before, graph, [before.bind(x)]).outputs.values())).sqnr_db < 60
    assert not any(n.op == "mul" for n in graph.nodes)


# ---- formats ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_bits_and_formats_by_name(front: str) -> None:
    model, batches = Residual().eval(), images()
    if front == "fx":
        graph = load_torch(model, batches[0])
    else:
        graph = load_onnx(torch.onnx.export(model, (batches[0],), dynamo=True, verbose=False).model_proto)
    formats = {
        "stem*": {"weight": 8, "activation": {"bits": 8}},
        "head*": {"weight": {"bits": 8, "granularity": "tensor"}},
    }
    outcome = quantized(graph, batches, weight_bits=4, activation_bits=5, formats=formats, weight_ranges="mse")
    layers = {d["weight"].split(".")[0]: d for d in outcome.details["layers"].values()}
    assert {k: v["weight_bits"] for k, v in layers.items()} == {
        "stem": 8, "a1": 4, "a2": 4, "b1": 4, "b2": 4, "short": 4, "head": 8,
    }  # fmt: skip
    for node in graph.nodes:
        if node.op not in ("conv", "linear"):
            continue
        dq = node.inputs[1].producer
        name = dq.inputs[0].weight.name.split(".")[0]
        values = dq.inputs[0].const()
        assert values.dtype == np.int8 and (name in ("stem", "head")) == (np.abs(values.astype(int)).max() > 8)
        assert (dq.inputs[1].hint == ()) == (name == "head")
    bits = sorted(a["bits"] for a in outcome.details["activations"].values())
    assert bits[-1] == 8 and set(bits[:-1]) == {5}


def test_a_pattern_of_formats_must_match_and_make_sense() -> None:
    model, batches = Residual().eval(), images()
    with pytest.raises(ConstraintError, match="matches nothing"):
        quantized(load_torch(model, batches[0]), batches, formats={"trunk": {"weight": 4}})
    with pytest.raises(ConfigError, match="weight and/or activation"):
        quantized(load_torch(model, batches[0]), batches, formats={"stem": 4})
    with pytest.raises(ConfigError, match="2 to 8"):
        quantized(load_torch(model, batches[0]), batches, weight_bits=12)


def test_inputs_and_outputs_can_have_formats_of_their_own() -> None:
    spec = replace(TRT, inputs=TensorFormat("uint8"), outputs=TensorFormat("int16", symmetric=True))
    graph, plan = placed(Residual(), images()[0], spec)
    forms = {("input" if p.value.is_input else "inner"): p.form for p in plan.points.values()}
    assert forms == {"input": TensorFormat("uint8"), "inner": TRT.activations}
    del graph


def test_float8_per_tensor_on_both_front_ends() -> None:
    spec = BackendSpec.from_yaml(FOLDER / "tensorrt/specs/tensorrt-fp8.yaml")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval(), torch.randn(4, 16)
    fx, before = load_torch(model, x), load_torch(model, x)
    quantized(fx, [x], spec=spec)
    onnx_ = load_onnx(torch.onnx.export(model, (x,), dynamo=True, verbose=False, opset_version=20).model_proto)
    quantized(onnx_, [x.numpy()], spec=spec)
    assert {n.attrs["dtype"] for n in fx.nodes if n.op == "quantize"} == {"float8_e4m3fn"}
    assert {v.dtype for n in onnx_.nodes if n.op == "dequantize" for v in n.inputs[:1]} == {"float8_e4m3fn"}
    exact, a = (np.asarray(g.run(g.bind(x))[0][0]) for g in (before, fx))
    b = np.asarray(onnx_.run(onnx_.bind(x.numpy()))[0][0])
    noise = np.square(a - exact).sum() / np.square(exact).sum()
    assert 1e-4 < noise < 1e-2
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_torch_graph_rounds_as_the_target_does() -> None:
    spec = BackendSpec.from_yaml(FOLDER / "cuda/specs/inductor-cpu.yaml")
    torch.manual_seed(0)
    x = torch.randn(64, 64)
    graph = load_torch(nn.Linear(64, 4).eval(), x)
    quantized(graph, [x], spec=spec)
    q = next(n for n in graph.nodes if n.op == "quantize")
    assert q.attrs["rounding"] == "reciprocal"
    scale, zero = (v.const() for v in q.inputs[1:3])
    ties = ((np.arange(-2048, 2048) + 0.5) / 16).round() / 2 * scale  # halves of steps
    data = np.resize(ties.astype(np.float32), (64, 64))
    _, tapped = graph.run({graph.inputs[0].name: data}, [q.output.name])
    found = np.asarray(tapped[q.output.name])
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers the operators
    theirs = torch.ops.quantized_decomposed.quantize_per_tensor(
        torch.from_numpy(data), float(scale), int(zero), 0, 255, torch.uint8
    )
    np.testing.assert_array_equal(found, theirs.numpy())
    divide = np.clip(np.rint(data / scale) + zero, 0, 255)
    assert found.shape == divide.shape
