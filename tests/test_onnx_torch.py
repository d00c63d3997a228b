"""ONNX graphs as trainable modules: same numbers as ONNX Runtime, gradients, train mode, the way back."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from foldline.graph.errors import ConstraintError, FoldlineError, UnsupportedOp
from foldline.graph.execute import to_numpy
from foldline.graph.onnx import ONNXGraph, load_onnx
from foldline.graph.onnx.as_torch import to_torch, write_back
from onnx import numpy_helper
from support.timm_models import define_torchvision_operators
from torch import nn


def exported(
    module: nn.Module, args: tuple[Any, ...], opset: int = 18, dynamic: Any = None, **options: Any
) -> ONNXGraph:
    program = torch.onnx.export(
        module.eval(), args, dynamo=True, opset_version=opset, dynamic_shapes=dynamic, verbose=False, **options
    )
    assert program is not None
    buffer = io.BytesIO()
    program.save(buffer)
    return load_onnx(onnx.load_from_string(buffer.getvalue()))


class Block(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.down = nn.Conv2d(i, o, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.down(x))


def resnet() -> nn.Module:
    return nn.Sequential(Block(3, 8), Block(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def bert() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    define_torchvision_operators()
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, return_dict=False,
    )  # fmt: skip
    return transformers.BertModel(config), (torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.int64))


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        define_torchvision_operators()
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=16,
        )  # fmt: skip
        self.model = transformers.LlamaForCausalLM(config)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False, return_dict=False)[0]


def case(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    if name == "resnet":
        return resnet(), (torch.randn(2, 3, 16, 16),)
    if name == "transformer":
        return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu"), (torch.randn(2, 5, 16),)
    if name == "lstm":
        return nn.LSTM(6, 7, batch_first=True, bidirectional=True), (torch.randn(2, 5, 6),)
    if name == "bert":
        return bert()
    return Llama(), (torch.randint(0, 50, (2, 9)),)


@pytest.mark.parametrize(
    ("name", "opset"), [("resnet", 18), ("transformer", 23), ("lstm", 18), ("bert", 18), ("llama", 18)]
)
def test_equals_onnxruntime_and_trains(name: str, opset: int) -> None:
    module, args = case(name)
    graph = exported(module, args, opset)
    twin = to_torch(graph)
    feeds = graph.bind(args)
    expected = graph.run(feeds)[0]
    found = twin(*args)
    for a, b in zip(found if isinstance(found, tuple) else (found,), expected, strict=True):
        assert np.allclose(to_numpy(a), b, rtol=1e-4, atol=1e-5)
    loss = sum(t.square().sum() for t in (found if isinstance(found, tuple) else (found,)))
    loss.backward()
    trained = [p for p in twin.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(trained) >= 0.8 * len(list(twin.parameters()))
    assert {n for n, _ in twin.named_parameters()} <= set(twin.weight_names)
    assert all(p.ndim for p in twin.parameters()), "exponents and epsilons are not trained"


def batch_normed() -> ONNXGraph:
    """A conv and a batch norm that the exporter has not folded."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[n, 3, 6, 6] x) => (float[n, 4, 6, 6] y)'
        " { h = Conv<pads = [1,1,1,1]>(x, w) y = BatchNormalization(h, s, b, m, v) }"
    )
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 3, 3, 3), "s": (4,), "b": (4,), "m": (4,), "v": (4,)}
    for name, shape in shapes.items():
        data = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(np.abs(data) if name == "v" else data, name))
    return load_onnx(model)


def test_train_mode_is_that_of_torch() -> None:
    """Batch statistics normalise, running ones move exactly as nn.BatchNorm2d moves them."""
    graph = batch_normed()
    twin = to_torch(graph).train()
    conv, norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
    with torch.no_grad():
        for tensor, name in (
            (conv.weight, "w"),
            (norm.weight, "s"),
            (norm.bias, "b"),
            (norm.running_mean, "m"),
            (norm.running_var, "v"),
        ):
            tensor.copy_(torch.tensor(graph.weight(name).numpy()))
    x = torch.randn(5, 3, 6, 6)
    assert torch.allclose(twin(x), norm(conv(x)), atol=1e-5)
    assert torch.allclose(twin.m, norm.running_mean, atol=1e-6) and torch.allclose(twin.v, norm.running_var, atol=1e-6)
    assert {n for n, _ in twin.named_parameters()} == {"w", "s", "b"}
    twin.eval()
    write_back(twin, graph)
    assert np.allclose(graph.run({"x": x.numpy()})[0][0], twin(x).detach().numpy(), atol=1e-5)


def test_training_reaches_the_file() -> None:
    graph = batch_normed()
    before = graph.run({"x": np.ones((2, 3, 6, 6), np.float32)})[0][0]
    twin = to_torch(graph).train()
    optimizer = torch.optim.SGD(twin.parameters(), 0.05)
    torch.manual_seed(0)
    x, target = torch.randn(16, 3, 6, 6), torch.randn(16, 4, 6, 6)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (twin(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert np.array_equal(graph.run({"x": np.ones((2, 3, 6, 6), np.float32)})[0][0], before), (
        "the graph is untouched so far"
    )
    write_back(twin.eval(), graph)
    assert np.allclose(graph.run({"x": x.numpy()})[0][0], twin(x).detach().numpy(), atol=1e-4)


def test_untouched_weights_come_back_bit_for_bit() -> None:
    graph = batch_normed()
    before = graph.to_model()
    write_back(to_torch(graph), graph)
    assert graph.to_model() == before


def test_shared_statistics_are_untied_first() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[n, 2] x) => (float[n, 2] y)'
        " <float[2] one = {1, 1}, float[2] z = {0, 0}>"
        " { h = BatchNormalization(x, one, z, z, one) y = BatchNormalization(h, one, z, z, one) }"
    )
    graph = load_onnx(model)
    twin = to_torch(graph).train()
    twin(torch.randn(8, 2) * 5 + 3)
    write_back(twin, graph)
    first, second = (n for n in graph if n.op == "batch_norm")
    a, b = (n.inputs[3].const() for n in (first, second))
    assert np.abs(a).max() > 0.1 and np.abs(b).max() < 0.01


def test_copies_and_pickles() -> None:
    twin = to_torch(batch_normed())
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(copy.deepcopy(twin)(x), twin(x))
    assert torch.equal(pickle.loads(pickle.dumps(twin))(x), twin(x))
    assert torch.equal(twin({"x": x}), twin(x=x))
    with pytest.raises(ConstraintError, match="missing"):
        twin()


def test_quantized_graph_passes_gradients_straight_through() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[n, 4] x) => (float[n, 3] y)'
        " <float s = {0.1}, uint8 z = {100}>"
        " { q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = MatMul(d, w) }"
    )
    model.graph.initializer.append(
        numpy_helper.from_array(np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32), "w")
    )
    graph = load_onnx(model)
    twin = to_torch(graph)
    x = torch.randn(6, 4, requires_grad=True)
    y = twin(x)
    assert np.allclose(graph.run({"x": x.detach().numpy()})[0][0], y.detach().numpy(), atol=1e-6)
    y.sum().backward()
    assert x.grad is not None and torch.allclose(x.grad[0], twin.w.sum(1))


def test_control_flow() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (int64 n, float[2] x) => (float[2] y, float[k, 2] all) {
        go = Constant<value = bool {1}>()
        y, all = Loop(n, go, x)<body = b (int64 i, bool c, float[2] s) => (bool d, float[2] t, float[2] u)
            { d = Identity(c) t = Mul(s, w) u = Identity(t) }> }"""
    )
    model.graph.initializer.append(numpy_helper.from_array(np.float32([2, 3]), "w"))
    graph = load_onnx(model)
    twin = to_torch(graph)
    y, rows = twin(n=torch.tensor(3), x=torch.ones(2))
    expected = graph.run({"n": np.asarray(3), "x": np.ones(2, np.float32)})[0]
    assert np.array_equal(y.detach(), expected[0]) and np.array_equal(rows.detach(), expected[1])
    y.sum().backward()
    assert twin.w.grad.tolist() == [12, 27]


def test_functions_are_inlined() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "mine" : 1]>
        g (float[batch, 3] x) => (float[batch, 3] y) { h = mine.twice(x) y = Relu(h) }
        <domain: "mine", opset_import: ["" : 17]> twice (a) => (b) { b = Add(a, a) }"""
    )
    x = torch.randn(2, 3)
    assert torch.equal(to_torch(load_onnx(model))(x), torch.relu(2 * x))


def test_unsupported_names_the_node() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[3, 3] x) => (float y) { [odd] y = Det(x) }'
    )
    with pytest.raises(UnsupportedOp, match="odd"):
        to_torch(load_onnx(model))


RANDOM = ("training_dropout", "bernoulli", "random")


def test_node_tests_of_onnx(capsys: pytest.CaptureFixture[str]) -> None:
    """Every node test whose operators and types are claimed must agree with onnx's own reference."""
    from foldline.graph.onnx.as_torch import _tensor
    from onnx.backend.test.case.node import collect_testcases

    def array(x: Any) -> np.ndarray:
        return numpy_helper.to_array(x) if isinstance(x, onnx.TensorProto) else np.asarray(x)

    with np.errstate(all="ignore"):
        cases = [c for c in collect_testcases(None) if c.model is not None]
    passed, refused, wrong = 0, 0, []
    for found in cases[::3]:
        if any(word in found.name for word in RANDOM):
            continue
        try:
            twin = to_torch(load_onnx(found.model))
            for inputs, outputs in found.data_sets:
                with torch.no_grad():
                    made = twin({n: _tensor(array(x)) for n, x in zip(twin.input_names, inputs, strict=False)})
                for a, b in zip(made if isinstance(made, tuple) else (made,), outputs, strict=True):
                    a, b = to_numpy(a), array(b)
                    assert (a.dtype, a.shape) == (b.dtype, b.shape)
                    step = {"bfloat16": 2**-6, "float16": 2**-9}.get(b.dtype.name, 1e-3)
                    a, b = (v if v.dtype.kind == "b" else v.astype(np.float64) for v in (a, b))
                    np.testing.assert_allclose(a, b, rtol=step, atol=max(found.atol, step / 10), equal_nan=True)
            passed += 1
        except UnsupportedOp:
            refused += 1
        except (AssertionError, FoldlineError) as error:
            wrong.append((found.name, str(error)[:200]))
    with capsys.disabled():
        print(f"\nonnx node tests in torch: {passed} agree, {refused} refused as unsupported, {len(wrong)} wrong")
    assert not wrong, wrong
    assert passed > 400
