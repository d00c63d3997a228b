"""What is computed from parameters alone is stored: both front ends, both encodings, one rounding, nothing guessed."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from foldline.graph.execute import run_graph
from foldline.graph.ir import Graph
from foldline.graph.load import load
from foldline.passes.base import Context, Decision
from foldline.passes.fold.constants import materialize
from foldline.passes.fold.evaluate64 import cast_once, evaluate64
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn.utils import parametrizations as P
from torch.nn.utils import parametrize


def stored(graph: Graph) -> tuple[Graph, list[Decision]]:
    after = graph.clone()
    decisions = materialize(after, Context())
    after.refresh()
    return after, decisions


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def same(before: Graph, after: Graph, inputs: dict[str, np.ndarray], rtol: float = 1e-6) -> None:
    for a, b in zip(run_graph(before, inputs)[0], run_graph(after, inputs)[0], strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(b.astype(np.float64), a.astype(np.float64), rtol=0, atol=rtol * np.abs(a).max())


def export(model: nn.Module, *args: Tensor) -> onnx.ModelProto:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model.eval(), args, dynamo=True, optimize=False, verbose=False)
    assert program is not None
    return program.model_proto


def old_weight_norm(layer: nn.Module, dim: int | None = 0, name: str = "weight") -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer, name, dim=dim)


class Standardised(nn.Conv2d):
    """Scaled weight standardization with a gain, as normaliser-free networks have it."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        scale = torch.sqrt(w.var((1, 2, 3), keepdim=True, unbiased=False) * w[0].numel() + 1e-4)
        return self._conv_forward(x, self.gain * (w - w.mean((1, 2, 3), keepdim=True)) / scale, self.bias)


class Map(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, w: Tensor) -> Tensor:
        return self.function(w)


def parametrized(layer: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Map(function))
    return layer


IMAGE, ROW = (2, 3, 6, 6), (2, 3)
KINDS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "weight norm": lambda: (P.weight_norm(nn.Conv2d(3, 4, 3)), IMAGE),
    "weight norm, axis 1": lambda: (P.weight_norm(nn.ConvTranspose2d(3, 4, 3), dim=1), IMAGE),
    "weight norm, last axis": lambda: (P.weight_norm(nn.Linear(3, 4), dim=-1), ROW),
    "weight norm, hooks": lambda: (old_weight_norm(nn.Conv2d(3, 4, 3)), IMAGE),
    "weight norm, hooks, axis 1": lambda: (old_weight_norm(nn.ConvTranspose2d(3, 4, 3), 1), IMAGE),
    "weight norm, hooks, whole": lambda: (old_weight_norm(nn.Linear(3, 4), None), ROW),
    "spectral norm": lambda: (P.spectral_norm(nn.Conv2d(3, 4, 3)), IMAGE),
    "spectral norm, transposed": lambda: (P.spectral_norm(nn.ConvTranspose2d(3, 4, 3)), IMAGE),
    "spectral norm, hooks": lambda: (nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), IMAGE),
    "spectral norm, hooks, transposed": lambda: (nn.utils.spectral_norm(nn.ConvTranspose2d(3, 4, 3)), IMAGE),
    "standardised": lambda: (Standardised(3, 4, 3), IMAGE),
    "compander": lambda: (parametrized(nn.Linear(3, 4), lambda v: 2 * torch.atan(v / 1.5)), ROW),
    "equilibrated": lambda: (parametrized(nn.Linear(3, 4), lambda w: w / w.norm(dim=1, keepdim=True)), ROW),
    "symmetric": lambda: (parametrized(nn.Linear(3, 3), lambda w: w.triu() + w.triu(1).T), ROW),
}
ORTHOGONAL: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "householder": lambda: (P.orthogonal(nn.Linear(3, 5), orthogonal_map="householder"), ROW),
    "householder without base": lambda: (P.orthogonal(nn.Linear(3, 5), use_trivialization=False), ROW),
    "matrix exponential": lambda: (P.orthogonal(nn.Linear(3, 3), orthogonal_map="matrix_exp"), ROW),
    "cayley": lambda: (P.orthogonal(nn.Linear(3, 3), orthogonal_map="cayley"), ROW),
}


@pytest.mark.parametrize("kind", [*KINDS, *ORTHOGONAL])
def test_a_parametrized_layer_becomes_the_plain_one(kind: str) -> None:
    torch.manual_seed(0)
    layer, shape = (KINDS | ORTHOGONAL)[kind]()
    model, x = nn.Sequential(layer, nn.ReLU()).eval(), torch.randn(shape)
    before = load(model, (x,))
    after, decisions = stored(before)
    assert ops(after) in (["conv", "relu"], ["linear", "relu"])
    assert [d.action for d in decisions] == ["stored"]
    assert set(after.weights) == {"0.weight", "0.bias"} and after.weights["0.weight"].trainable
    same(before, after, before.bind((x,)))
    plain = after.to_model()
    assert type(plain) is nn.Sequential and type(plain[0]) in (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    assert set(plain.state_dict()) == {"0.weight", "0.bias"}
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(plain(x), want, rtol=0, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_files_of_them_hold_one_weight(kind: str) -> None:
    torch.manual_seed(0)
    layer, shape = KINDS[kind]()
    x = torch.randn(shape)
    before = load(export(nn.Sequential(layer, nn.ReLU()), x))
    after, _ = stored(before)
    assert ops(after) in (["conv", "relu"], ["linear", "relu"]), ops(after)
    assert not any(w.endswith(("_g", "_v", "_orig")) or "original" in w for w in after.weights)
    assert "0.weight" in after.weights
    same(before, after, {before.inputs[0].name: x.numpy()})
    onnx.checker.check_model(after.to_model())


def test_a_recurrent_layer_keeps_its_class() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 4)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        old_weight_norm(lstm, name=name)
    x = torch.randn(5, 1, 3)
    before = load(lstm.eval(), (x,))
    after, _ = stored(before)
    plain = after.to_model()
    assert type(plain) is nn.LSTM and set(plain.state_dict()) == set(nn.LSTM(3, 4).state_dict())
    with torch.no_grad():
        torch.testing.assert_close(plain(x)[0], lstm(x)[0])


def test_spectral_norm_uses_the_stored_vectors_not_the_true_value() -> None:
    torch.manual_seed(0)
    layer = P.spectral_norm(nn.Linear(40, 30), n_power_iterations=1).eval()
    inner = layer.parametrizations.weight[0]
    with torch.no_grad():
        inner._u.copy_(F.normalize(torch.randn(30), dim=0))  # far from converged
        inner._v.copy_(F.normalize(torch.randn(40), dim=0))
    w = layer.parametrizations.weight.original.detach().double()
    sigma = float(inner._u.double() @ w @ inner._v.double())
    assert abs(sigma) < 0.5 * float(torch.linalg.matrix_norm(w, 2))
    u = inner._u.clone()
    after, _ = stored(load(layer, (torch.randn(2, 40),)))
    want = cast_once((w / sigma).numpy(), "float32")
    np.testing.assert_array_equal(after.weights["weight"].numpy(), want)
    assert torch.equal(inner._u, u)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_arithmetic_is_float64_and_the_rounding_one(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    layer = P.weight_norm(nn.Linear(64, 32)).to(dtype).eval()
    g, v = (
        p.detach().double() for p in (layer.parametrizations.weight.original0, layer.parametrizations.weight.original1)
    )
    want = (v * (g / v.norm(dim=1, keepdim=True))).numpy()
    after, _ = stored(load(layer, (torch.randn(2, 64, dtype=dtype),)))
    got = after.weights["weight"].numpy()
    np.testing.assert_array_equal(got, cast_once(want, str(dtype).removeprefix("torch.")))
    torch_error = np.abs(layer.weight.detach().double().numpy() - want).sum()
    error = np.abs(got.astype(np.float64) - want).sum()
    assert error < torch_error if dtype is torch.float32 else error <= torch_error


def test_rounding_to_bfloat16_happens_once() -> None:
    import ml_dtypes

    base = 1.0 + 2.0**-8  # the tie between two bfloat16 neighbours
    x = np.array([base + 2.0**-40, base - 2.0**-40, base, -base - 2.0**-40, 0.0, 1e-40, 3.4e38, np.inf])
    got = cast_once(x, "bfloat16").astype(np.float64)
    near = np.array([1 + 2.0**-7, 1.0, 1.0, -1 - 2.0**-7])
    np.testing.assert_array_equal(got[:4], near)
    assert got[4] == 0 and np.isinf(got[7])
    assert x.astype(ml_dtypes.bfloat16).astype(np.float64)[0] != near[0], "numpy itself rounds twice"


# ---- soundness -------------------------------------------------------------------------------------------------
class Shared(nn.Module):
    """v is also read as it is: it must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.v.tanh()), self.v)


def test_a_source_that_somebody_else_reads_stays() -> None:
    model, x = Shared().eval(), torch.randn(2, 4)
    for before in (load(model, (x,)), load(export(model, x))):
        after, _ = stored(before)
        assert ops(after) == ["linear", "linear"] and len(after.weights) == 2
        np.testing.assert_array_equal(after.weights["v"].numpy(), model.v.detach().numpy())
        same(before, after, {before.inputs[0].name: x.numpy()})


class Trunk(nn.Module):
    """A generator whose hidden layer feeds many heads: evaluated once."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.seed_vector = nn.Parameter(torch.randn(1, 6))
        self.trunk = nn.Linear(6, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 9) for _ in range(heads))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.trunk(self.seed_vector))
        for head in self.heads:
            x = torch.tanh(F.linear(x, head(hidden).reshape(3, 3)))
        return x


def test_generated_weights_with_a_bound_code() -> None:
    torch.manual_seed(0)
    model, x = Trunk(4).eval(), torch.randn(2, 3)
    for before in (load(model, (x,)), load(export(model, x))):
        after, decisions = stored(before)
        assert ops(after) == ["linear", "tanh"] * 4
        assert [d.action for d in decisions] == ["stored"] and len(decisions[0].data["values"]) == 4
        same(before, after, {before.inputs[0].name: x.numpy()})


def node(op: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=f"n_{output}", **attributes)


def proto(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], outputs: list[str] | None = None
) -> onnx.ModelProto:
    made = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs or ["y"]]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])], made,
        [numpy_helper.from_array(v, n) for n, v in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


W = np.arange(16, dtype=np.float32).reshape(4, 4) / 7 - 1


def test_random_weights_are_left_random() -> None:
    noise = node("RandomNormalLike", ["w"], "noise", seed=1.0)
    model = proto([noise, node("Add", ["w", "noise"], "v"), node("MatMul", ["x", "v"], "y")], {"w": W})
    after, decisions = stored(load(model))
    assert not decisions and len(after.nodes) == 3


def test_quantized_weights_stay_quantized() -> None:
    scale, q = np.float32(0.1), np.ones((4, 4), np.int8)
    dequantize = node("DequantizeLinear", ["q", "s"], "w")
    model = proto([dequantize, node("MatMul", ["x", "w"], "y")], {"q": q, "s": scale})
    after, decisions = stored(load(model))
    assert not decisions and len(after.nodes) == 2


def test_a_small_file_does_not_grow_to_a_large_one() -> None:
    big = np.array([8192, 8192], np.int64)
    nodes = [node("Sin", ["c"], "s"), node("Expand", ["s", "big"], "w"), node("Slice", ["w", "o", "f"], "p")]
    nodes.append(node("MatMul", ["x", "p"], "y"))
    weights = {"c": np.ones((1, 1), np.float32), "big": big, "o": np.array([0, 0]), "f": np.array([4, 4])}
    before = load(proto([*nodes[:2], node("ReduceSum", ["w"], "t", keepdims=0), node("Mul", ["x", "t"], "y")], weights))
    after, decisions = stored(before)
    assert [d.action for d in decisions] == ["stored"]  # the sum itself is small
    model = proto([*nodes[:2], node("Gemm", ["x", "w"], "y")], weights)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 8192
    after, decisions = stored(load(model))
    assert [(d.action, d.data["why"]) for d in decisions] == [("refused", "size guard")]
    assert len(after.nodes) == 3 and sum(w.size for w in after.weights.values()) < 10


def test_outputs_keep_their_names() -> None:
    model = proto([node("Neg", ["w"], "c"), node("MatMul", ["x", "c"], "y")], {"w": W}, ["y", "c"])
    before = load(model)
    after, _ = stored(before)
    assert [v.name for v in after.outputs] == ["y", "c"]
    again, decisions = stored(after)
    assert not decisions, "a fixed point"
    same(before, again, {"x": np.ones((2, 4), np.float32)})


def test_overridable_initializers_are_not_constants() -> None:
    model = proto([node("Neg", ["w"], "c"), node("MatMul", ["x", "c"], "y")], {"w": W})
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 4]))
    after, decisions = stored(load(model))
    assert not decisions and len(after.nodes) == 2


def test_a_comparison_falls_as_in_the_model() -> None:
    """0.1 + 0.2 equals 0.3 in float32 and not in float64: the mask must be the model's."""
    tenths = {"a": np.float32([0.1] * 4), "b": np.float32([0.2] * 4), "t": np.float32([0.1]) + np.float32([0.2])}
    nodes = [node("Add", ["a", "b"], "s"), node("Equal", ["s", "t"], "e"), node("Cast", ["e"], "m", to=1)]
    model = proto([*nodes, node("Mul", ["x", "m"], "y")], tenths)
    before = load(model)
    after, _ = stored(before)
    assert ops(after) == ["mul"]
    np.testing.assert_array_equal(run_graph(after, {"x": np.ones((1, 4), np.float32)})[0][0], np.ones((1, 4)))


def test_rounding_in_the_middle_is_kept() -> None:
    w = (W * 1.0001).astype(np.float32)
    nodes = [node("Cast", ["w"], "h", to=10), node("Cast", ["h"], "f", to=1), node("Mul", ["f", "f"], "q")]
    model = proto([*nodes, node("MatMul", ["x", "q"], "y")], {"w": w})
    after, _ = stored(load(model))
    want = np.square(w.astype(np.float16).astype(np.float64)).astype(np.float32)
    (weight,) = after.weights.values()
    np.testing.assert_array_equal(weight.numpy(), want)


def test_a_value_beyond_the_dtype_is_computed_as_the_model_does() -> None:
    w = np.full((4, 4), 1e38, np.float32)
    nodes = [node("Mul", ["w", "w"], "s"), node("Div", ["one", "s"], "q"), node("MatMul", ["x", "s"], "y")]
    graph = load(proto([nodes[0], nodes[2]], {"w": w}))
    found = evaluate64(graph, [graph.values["s"]])["s"]
    assert np.isinf(found).all() and found.dtype == np.float32


def test_captured_values_stay() -> None:
    inner = helper.make_graph(
        [node("Add", ["x", "c"], "inside")], "b", [], [helper.make_tensor_value_info("inside", TensorProto.FLOAT, None)]
    )
    other = helper.make_graph(
        [node("Sub", ["x", "c"], "outside")],
        "b",
        [],
        [helper.make_tensor_value_info("outside", TensorProto.FLOAT, None)],
    )
    nodes = [node("Neg", ["w"], "c"), node("ReduceSum", ["x"], "s", keepdims=0), node("Greater", ["s", "z"], "p")]
    nodes.append(node("If", ["p"], "y", then_branch=inner, else_branch=other))
    before = load(proto(nodes, {"w": W, "z": np.float32(0)}))
    after, _ = stored(before)
    same(before, after, {"x": np.ones((4, 4), np.float32)})


def test_many_constant_subgraphs_take_linear_time() -> None:
    import time

    def seconds(count: int) -> float:
        nodes, weights, last = [], {}, "x"
        for i in range(count):
            nodes += [
                node("Neg", [f"w{i}"], f"n{i}"),
                node("Exp", [f"n{i}"], f"e{i}"),
                node("Mul", [last, f"e{i}"], f"y{i}"),
            ]
            weights[f"w{i}"], last = np.full(4, 0.1 + i % 7, np.float32), f"y{i}"
        nodes[-1].output[0] = "y"
        graph = load(proto(nodes, weights))
        start = time.process_time()
        after, decisions = stored(graph)
        assert len(decisions) == count and len(after.nodes) == count
        return time.process_time() - start

    small = seconds(300)
    assert seconds(1200) < 8 * small + 1.0


@pytest.mark.parametrize("kind", ["weight norm", "spectral norm, hooks", "standardised", "householder", "cayley"])
def test_windows_of_constant_subgraphs_are_checked_alone(kind: str) -> None:
    from foldline.passes import Fold, Pipeline

    torch.manual_seed(0)
    layer, shape = (KINDS | ORTHOGONAL)[kind]()
    model = nn.Sequential(layer, nn.ReLU()).eval()
    result = Pipeline([Fold(verify="window")]).run(model, (torch.randn(shape),))
    assert [n.op for n in result.graph.nodes] in (["conv", "relu"], ["linear", "relu"])
    assert not [d for d in result.report.passes[0].decisions if d.action == "refused"]
