"""Folded equals unfolded, on both front ends, and a fold that would be wrong is refused with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from foldline import passes as P
from foldline.graph.errors import FoldlineError
from foldline.graph.execute import run_graph
from foldline.graph.ir import Graph
from foldline.graph.load import load
from foldline.passes.base import Context, Decision
from foldline.passes.fold import Fold
from onnx import TensorProto, helper, numpy_helper
from support.toys import TOYS
from support.toys_base import fill
from torch import Tensor, nn

RTOL = 1e-5


def fold(graph: Graph) -> tuple[Graph, list[Decision]]:
    """A folded clone and what was decided about the norms."""
    after = graph.clone()
    outcome = Fold().apply(after, Context())
    named = {node.name for node in graph.nodes if node.op == "batch_norm"}
    return after, [d for d in outcome.decisions if d.action in ("folded", "refused") and d.subject in named]


def assert_same(before: Graph, after: Graph, inputs: dict[str, np.ndarray]) -> None:
    for a, b in zip(run_graph(before, inputs)[0], run_graph(after, inputs)[0], strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(b, a, rtol=0, atol=RTOL * np.abs(a).max())


def norms(graph: Graph) -> int:
    return sum(node.op == "batch_norm" for node in graph.nodes)


def check_torch(model: nn.Module, *args: Tensor, left: int = 0) -> list[Decision]:
    """Fold, compare, and count the batch norms that are left; gives the decisions."""
    before = load(model, args)
    after, decisions = fold(before)
    assert_same(before, after, before.bind(args))
    assert norms(after) == left, decisions
    with torch.no_grad():
        want, got = model(*args), after.to_model()(*args)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=RTOL * float(want.abs().max()))
    return decisions


def bn(channels: int, dims: int = 2) -> nn.Module:
    return {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims](channels)


def seq(*layers: nn.Module) -> nn.Module:
    return fill(nn.Sequential(*layers))


AFTER: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "conv": lambda: (seq(nn.Conv2d(3, 6, 3, padding=1, bias=False), bn(6)), (2, 3, 7, 7)),
    "conv with bias": lambda: (seq(nn.Conv2d(3, 6, 3, stride=2, dilation=2, padding=2), bn(6)), (2, 3, 9, 9)),
    "conv1d": lambda: (seq(nn.Conv1d(3, 6, 3, padding=1), bn(6, 1)), (2, 3, 7)),
    "conv3d": lambda: (seq(nn.Conv3d(2, 4, 3, padding=1), bn(4, 3)), (2, 2, 5, 5, 5)),
    "grouped": lambda: (seq(nn.Conv2d(6, 8, 3, padding=1, groups=2), bn(8)), (2, 6, 5, 5)),
    "depthwise": lambda: (seq(nn.Conv2d(6, 12, 3, padding=1, groups=6, bias=False), bn(12)), (2, 6, 5, 5)),
    "transposed": lambda: (seq(nn.ConvTranspose2d(3, 6, 3, stride=2, output_padding=1), bn(6)), (2, 3, 5, 5)),
    "transposed grouped": lambda: (seq(nn.ConvTranspose2d(6, 4, 3, padding=1, groups=2), bn(4)), (2, 6, 5, 5)),
    "transposed depthwise": lambda: (
        seq(nn.ConvTranspose2d(6, 12, 2, stride=2, groups=6, bias=False), bn(12)),
        (2, 6, 5, 5),
    ),
    "square": lambda: (seq(nn.Conv2d(5, 5, 3, padding=1), bn(5)), (2, 5, 5, 5)),
    "linear": lambda: (seq(nn.Linear(5, 7), bn(7, 1)), (3, 5)),
    "linear without bias": lambda: (seq(nn.Linear(5, 5, bias=False), bn(5, 1)), (5, 5)),
    "two norms": lambda: (seq(nn.Conv2d(3, 6, 3), bn(6), bn(6)), (2, 3, 7, 7)),
    "no affine": lambda: (seq(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False, eps=1e-2)), (2, 3, 7, 7)),
    "identity between": lambda: (seq(nn.Conv2d(3, 6, 3), nn.Dropout(0.5), bn(6)), (2, 3, 7, 7)),
    "pool between": lambda: (seq(nn.Conv2d(3, 6, 3, padding=1), nn.AvgPool2d(2), bn(6)), (2, 3, 8, 8)),
}

BEFORE: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "conv": lambda: (seq(bn(3), nn.Conv2d(3, 6, 3, stride=2)), (2, 3, 7, 7)),
    "conv without bias": lambda: (seq(bn(3), nn.Conv2d(3, 6, 1, bias=False)), (2, 3, 7, 7)),
    "grouped": lambda: (seq(bn(6), nn.Conv2d(6, 8, 3, groups=2)), (2, 6, 5, 5)),
    "depthwise": lambda: (seq(bn(6), nn.Conv2d(6, 12, 3, groups=6, bias=False)), (2, 6, 5, 5)),
    "transposed 1x1": lambda: (seq(bn(6), nn.ConvTranspose2d(6, 4, 1, groups=2)), (2, 6, 5, 5)),
    "linear": lambda: (seq(bn(5, 1), nn.Linear(5, 7)), (3, 5)),
    "flatten": lambda: (seq(bn(3), nn.Flatten(), nn.Linear(3 * 20, 7)), (2, 3, 4, 5)),
    "global pool": lambda: (seq(bn(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 7)), (2, 3, 4, 5)),
    "reflect padding": lambda: (seq(bn(3), nn.ReflectionPad2d(1), nn.Conv2d(3, 6, 3)), (2, 3, 5, 5)),
}


@pytest.mark.parametrize("kind", AFTER)
def test_norm_after_a_linear_op_is_folded(kind: str) -> None:
    model, shape = AFTER[kind]()
    decisions = check_torch(model, torch.randn(shape))
    assert all(d.action == "folded" and d.data["side"] == "before" for d in decisions)


@pytest.mark.parametrize("kind", BEFORE)
def test_norm_before_a_linear_op_is_folded(kind: str) -> None:
    model, shape = BEFORE[kind]()
    (decision,) = check_torch(model, torch.randn(shape))
    assert decision.action == "folded" and decision.data["side"] == "behind"


class Branches(nn.Module):
    """Several models side by side, so that one export covers them all."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        return tuple(model(x) for model, x in zip(self.models, args, strict=True))


@pytest.mark.parametrize("kinds", [AFTER, BEFORE], ids=["after", "before"])
def test_onnx_folds_the_same_kinds(kinds: dict[str, Any]) -> None:
    built = [make() for make in kinds.values()]
    args = tuple(torch.randn(shape) for _, shape in built)
    model = Branches([m for m, _ in built]).eval()
    program = torch.onnx.export(model, args, dynamo=True, optimize=False, verbose=False)
    before = load(program.model_proto)
    assert norms(before) >= len(kinds)
    after, decisions = fold(before)
    refused = [d for d in decisions if d.action == "refused"]
    assert not refused
    names = [v.name for v in before.inputs]
    assert_same(before, after, dict(zip(names, (a.numpy() for a in args), strict=True)))
    onnx.checker.check_model(load(program.model_proto).to_model())


def test_negative_and_zero_gammas_are_exact() -> None:
    model = seq(nn.Conv2d(3, 6, 3, padding=1), bn(6))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([-1.5, 0.0, 2.0, -0.1, 0.7, -3.0]))
    check_torch(model, torch.randn(2, 3, 6, 6))


def test_the_callers_model_is_untouched() -> None:
    model = seq(nn.Conv2d(3, 6, 3), bn(6))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    check_torch(model, torch.randn(2, 3, 6, 6))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


# ---- the padding rule ------------------------------------------------------------------------------------------
def test_a_shift_before_a_padded_conv_is_refused() -> None:
    (decision,) = check_torch(seq(bn(3), nn.Conv2d(3, 6, 3, padding=1)), torch.randn(2, 3, 6, 6), left=1)
    assert decision.action == "refused" and "border" in decision.reason


def test_a_pure_scale_before_a_padded_conv_is_folded() -> None:
    model = seq(bn(3), nn.Conv2d(3, 6, 3, padding=1))
    with torch.no_grad():
        model[0].running_mean.zero_()
        model[0].bias.zero_()
    (decision,) = check_torch(model, torch.randn(2, 3, 6, 6))
    assert decision.action == "folded"


def test_a_shift_before_a_zero_pad_or_a_transposed_conv_is_refused() -> None:
    padded = seq(bn(3), nn.ZeroPad2d(1), nn.Conv2d(3, 6, 3))
    (decision,) = check_torch(padded, torch.randn(2, 3, 6, 6), left=1)
    assert "border" in decision.reason
    (decision,) = check_torch(seq(bn(3), nn.ConvTranspose2d(3, 6, 3)), torch.randn(2, 3, 6, 6), left=1)
    assert "transposed" in decision.reason


def test_average_pool_that_counts_its_padding_lets_no_shift_pass() -> None:
    model = seq(bn(3), nn.AvgPool2d(3, 1, padding=1), nn.Conv2d(3, 6, 1))
    (decision,) = check_torch(model, torch.randn(2, 3, 6, 6), left=1)
    assert decision.action == "refused"


def test_max_pool_lets_only_positive_scales_pass() -> None:
    model = seq(bn(3), nn.MaxPool2d(2), nn.Conv2d(3, 6, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 0.5, -2.0]))
    (decision,) = check_torch(model, torch.randn(2, 3, 6, 6), left=1)
    assert "positive" in decision.reason
    with torch.no_grad():
        model[0].weight.abs_()
    check_torch(model, torch.randn(2, 3, 6, 6))


# ---- traps -----------------------------------------------------------------------------------------------------
class SharedConv(nn.Module):
    """One conv called twice, a norm behind the first call only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.norm(self.conv(x))))


def test_a_conv_called_twice_is_not_changed() -> None:
    (decision,) = check_torch(fill(SharedConv()), torch.randn(2, 4, 5, 5), left=1)
    assert decision.action == "refused" and "tied" in decision.reason


def test_a_conv_norm_pair_called_twice_is_not_changed() -> None:
    model, args = TOYS["shared_module"]()
    decisions = check_torch(model, *args, left=2)
    assert [d.action for d in decisions] == ["refused", "refused"]


@pytest.mark.parametrize("length", [4, 7])
def test_linear_and_norm_on_three_axes_do_not_mix(length: int) -> None:
    """Linear writes the last axis, BatchNorm1d reads axis 1, whether or not both have the same length."""
    model = seq(nn.Linear(5, length), nn.BatchNorm1d(4))
    (decision,) = check_torch(model, torch.randn(2, 4, 5), left=1)
    assert decision.action == "refused" and "axis 1" in decision.reason and "axis 2" in decision.reason


def test_norm_before_a_linear_on_another_axis_is_refused() -> None:
    (decision,) = check_torch(seq(bn(5), nn.Linear(5, 5)), torch.randn(2, 5, 5, 5), left=1)
    assert decision.action == "refused" and "axis" in decision.reason


class FlatNorm(nn.Module):
    """LeViT's linear and norm: the norm sees [N * L, C], so that both act on the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.norm(y.flatten(0, 1)).reshape_as(y)


def test_a_norm_behind_flattened_rows_is_folded() -> None:
    check_torch(fill(FlatNorm()), torch.randn(2, 4, 5))


class CutNorm(nn.Module):
    """The reshape cuts the channels: [N, 8] as [N, 4, 2] has the length of the norm on another axis."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 8), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x).reshape(-1, 4, 2))


def test_a_reshape_that_cuts_the_channels_repeats_the_map() -> None:
    (decision,) = check_torch(fill(CutNorm()), torch.randn(4, 5))
    assert decision.data["side"] == "before"


class MixedNorm(CutNorm):
    """[N, 8] as [N / 2, 4, 4]: the norm's axis is half of the rows' and the channels' making."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x).reshape(2, 4, 4))


def test_a_reshape_that_mixes_rows_into_the_channels_lets_nothing_pass() -> None:
    (decision,) = check_torch(fill(MixedNorm()), torch.randn(4, 5), left=1)
    assert "does not pass reshape" in decision.reason


class SecondConsumer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.norm(y), F.relu(y)


class InnerOutput(SecondConsumer):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.norm(y), y


@pytest.mark.parametrize(("cls", "word"), [(SecondConsumer, "second consumer"), (InnerOutput, "output of the graph")])
def test_a_value_that_somebody_else_sees_is_not_changed(cls: type[nn.Module], word: str) -> None:
    args = (torch.randn(2, 3, 5, 5),)
    before = load(fill(cls()), args)
    after, (decision,) = fold(before)
    assert_same(before, after, before.bind(args))
    assert norms(after) == 1 and decision.action == "refused" and word in decision.reason


class TwoReaders(nn.Module):
    """A norm read by two convolutions, behind a relu."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=padding), nn.Conv2d(3, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(F.relu(x))
        return self.a(y).mean((2, 3)).sum(1, keepdim=True) + self.b(y).mean((2, 3))


def test_all_readers_of_a_norm_absorb_it_or_none() -> None:
    (decision,) = check_torch(fill(TwoReaders(0)), torch.randn(2, 3, 6, 6))
    assert sorted(decision.data["bias"].values()) == ["updated", "updated"]
    check_torch(fill(TwoReaders(1)), torch.randn(2, 3, 6, 6), left=1)


def test_a_relu_in_between_is_named() -> None:
    model = seq(nn.Conv2d(3, 4, 1), nn.ReLU(), bn(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
    (decision,) = check_torch(model, torch.randn(2, 3, 5, 5), left=1)
    assert decision.reason.count("does not commute with relu") == 2


class RuntimeBias(nn.Module):
    """A convolution whose bias is computed from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, b: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.conv.weight, b.tanh()))


class RuntimeStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor, mean: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), mean, torch.ones(4), training=False)


def test_a_bias_computed_at_run_time_is_refused() -> None:
    (decision,) = check_torch(fill(RuntimeBias()), torch.randn(2, 3, 5, 5), torch.randn(4), left=1)
    assert "bias" in decision.reason and "run time" in decision.reason


def test_statistics_computed_at_run_time_are_refused() -> None:
    (decision,) = check_torch(fill(RuntimeStatistics()), torch.randn(2, 3, 5, 5), torch.randn(4), left=1)
    assert "mean is not a constant" in decision.reason


class PlainProduct(nn.Module):
    """A matrix product with a parameter, a vector added behind it, and a norm."""

    def __init__(self, added: bool) -> None:
        super().__init__()
        self.matrix, self.norm = nn.Parameter(torch.zeros(5, 7)), nn.BatchNorm1d(7)
        self.vector = nn.Parameter(torch.zeros(7)) if added else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.matrix
        return self.norm(y if self.vector is None else y + self.vector)


@pytest.mark.parametrize("added", [True, False])
def test_a_plain_matrix_product_absorbs_a_norm(added: bool) -> None:
    check_torch(fill(PlainProduct(added)), torch.randn(3, 5))


class TiedBias(nn.Module):
    """Two convolutions share one bias; only one has a norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.b.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.norm(self.a(x))))


def test_a_tied_bias_is_untied_not_overwritten() -> None:
    (decision,) = check_torch(fill(TiedBias()), torch.randn(2, 3, 5, 5))
    assert list(decision.data["bias"].values()) == ["untied"]


# ---- ONNX only -------------------------------------------------------------------------------------------------
def onnx_model(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], **shapes: list[int]) -> onnx.ModelProto:
    def info(name: str, shape: list[int] | None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    initializers = [numpy_helper.from_array(data.astype(np.float32), name) for name, data in weights.items()]
    inputs = [info(name, shape) for name, shape in shapes.items()]
    graph = helper.make_graph(nodes, "g", inputs, [info("y", None)], initializers)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])


def statistics(channels: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        "s": rng.normal(size=channels),
        "o": rng.normal(size=channels),
        "m": rng.normal(size=channels),
        "v": rng.uniform(0.5, 2, size=channels),
    }


GEMMS: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[int, ...] | None]] = {
    "transB": ({"transB": 1}, (7, 5), (7,)),
    "alpha and beta": ({"alpha": 0.5, "beta": 3.0}, (5, 7), (1, 7)),
    "scalar bias": ({"beta": 2.0}, (5, 7), (1,)),
    "no bias": ({"alpha": -2.0, "beta": 0.5}, (5, 7), None),
}


@pytest.mark.parametrize("after", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("kind", GEMMS)
def test_gemm_with_its_attributes(kind: str, after: bool) -> None:
    attrs, shape, bias = GEMMS[kind]
    rng = np.random.default_rng(4)
    weights = {"w": rng.normal(size=shape), **statistics(7 if after else 5)}
    if bias is not None:
        weights["b"] = rng.normal(size=bias)
    operands = ["w", *(["b"] if bias is not None else [])]
    norm, first, last = ["s", "o", "m", "v"], ("x", "h"), ("h", "y")
    (gi, go), (ni, no) = (first, last) if after else (last, first)
    nodes = [
        helper.make_node("Gemm", [gi, *operands], [go], "gemm", **attrs),
        helper.make_node("BatchNormalization", [ni, *norm], [no], "norm"),
    ]
    before = load(onnx_model(nodes if after else nodes[::-1], weights, x=[3, 5]))
    folded, decisions = fold(before)
    assert [d.action for d in decisions] == ["folded"], decisions
    assert_same(before, folded, {"x": rng.normal(size=(3, 5)).astype(np.float32)})
    assert norms(folded) == 0


def test_matmul_takes_a_bias() -> None:
    rng = np.random.default_rng(5)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "matmul"),
        helper.make_node("BatchNormalization", ["h", "s", "o", "m", "v"], ["y"], "norm"),
    ]
    before = load(onnx_model(nodes, {"w": rng.normal(size=(5, 7)), **statistics(7)}, x=[3, 5]))
    after, (decision,) = fold(before)
    assert decision.action == "folded" and decision.data["bias"] == {"matmul": "created"}
    assert_same(before, after, {"x": rng.normal(size=(3, 5)).astype(np.float32)})


@pytest.mark.parametrize("after", [True, False], ids=["after", "before"])
def test_a_bias_added_behind_a_matmul_is_its_bias(after: bool) -> None:
    rng = np.random.default_rng(8)
    weights = {"w": rng.normal(size=(5, 5)), "b": rng.normal(size=(1, 5)), **statistics(5)}
    product = [
        helper.make_node("MatMul", ["x", "w"], ["p"], "matmul"),
        helper.make_node("Add", ["b", "p"], ["h"], "add"),
    ]
    norm = helper.make_node("BatchNormalization", ["h", "s", "o", "m", "v"], ["y"], "norm")
    if not after:
        norm.input[0], norm.output[0], product[0].input[0], product[1].output[0] = "x", "h", "h", "y"
    before = load(onnx_model([*product, norm] if after else [norm, *product], weights, x=[3, 5]))
    folded, (decision,) = fold(before)
    assert decision.action == "folded" and set(decision.data["bias"].values()) == {"updated"}
    assert [node.op for node in folded.nodes] == ["linear"]  # the clean-up rules make product and bias one Gemm
    assert_same(before, folded, {"x": rng.normal(size=(3, 5)).astype(np.float32)})


def test_operands_computed_from_constants_are_stored_and_their_nodes_go() -> None:
    """What exporters write for a convolution without bias: zeros cast and expanded to the weight's first size."""
    rng = np.random.default_rng(9)
    nodes = [
        helper.make_node("Shape", ["w"], ["n"], "size", start=0, end=1),
        helper.make_node("CastLike", ["zero", "x"], ["z"], "cast"),
        helper.make_node("Expand", ["z", "n"], ["b"], "zeros"),
        helper.make_node("Conv", ["x", "w", "b"], ["h"], "conv"),
        helper.make_node("BatchNormalization", ["h", "s", "o", "m", "v"], ["y"], "norm"),
    ]
    weights = {"w": rng.normal(size=(4, 3, 1, 1)), "zero": np.zeros(()), **statistics(4)}
    before = load(onnx_model(nodes, weights, x=[2, 3, 5, 5]))
    after, (decision,) = fold(before)
    assert decision.action == "folded"
    assert [node.op for node in after.nodes] == ["conv"]
    assert_same(before, after, {"x": rng.normal(size=(2, 3, 5, 5)).astype(np.float32)})


def test_training_mode_is_refused() -> None:
    rng = np.random.default_rng(6)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], "conv"),
        helper.make_node("BatchNormalization", ["h", "s", "o", "m", "v"], ["y", "", ""], "norm", training_mode=1),
    ]
    nodes[1].output[1:] = ["m2", "v2"]
    before = load(onnx_model(nodes, {"w": rng.normal(size=(4, 3, 1, 1)), **statistics(4)}, x=[2, 3, 5, 5]))
    _, (decision,) = fold(before)
    assert decision.action == "refused" and "training" in decision.reason


def test_an_initializer_that_two_nodes_read_is_refused() -> None:
    rng = np.random.default_rng(7)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], "conv"),
        helper.make_node("BatchNormalization", ["h", "s", "o", "m", "v"], ["n"], "norm"),
        helper.make_node("Relu", ["n"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "w"], ["y"], "conv2"),
    ]
    weights = {"w": rng.normal(size=(3, 3, 1, 1)), **statistics(3)}
    before = load(onnx_model(nodes, weights, x=[2, 3, 5, 5]))
    after, (decision,) = fold(before)
    assert decision.action == "refused" and "tied" in decision.reason
    assert_same(before, after, {"x": rng.normal(size=(2, 3, 5, 5)).astype(np.float32)})


def test_a_variance_that_gives_no_finite_scale_is_refused() -> None:
    stats = statistics(4)
    stats["v"][2] = -1.0
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], "conv"),
        helper.make_node("BatchNormalization", ["h", "s", "o", "m", "v"], ["y"], "norm"),
    ]
    before = load(onnx_model(nodes, {"w": np.ones((4, 3, 1, 1)), **stats}, x=[2, 3, 5, 5]))
    _, (decision,) = fold(before)
    assert decision.action == "refused" and "finite" in decision.reason


# ---- whole models ----------------------------------------------------------------------------------------------
FOLDABLE = {"plain_cnn": 0, "residual_cnn": 0, "res2_net": 0, "inverted_residual": 0, "norm_mlp": 0, "dense_concat": 4}


@pytest.mark.parametrize("name", FOLDABLE)
def test_whole_models_keep_their_function(name: str) -> None:
    model, args = TOYS[name]()
    decisions = check_torch(model, *args, left=FOLDABLE[name])
    assert all(d.reason for d in decisions)


def test_an_unknown_option_is_an_error() -> None:
    with pytest.raises(FoldlineError):
        Fold(unknown=1)


class Gated(nn.Module):
    """A batch norm between layers, a scale in the program, and twins that tidying would merge."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.gated = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), gated
        self.gate = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return y * self.gate if self.gated else torch.tanh(y) + torch.tanh(y)


@pytest.mark.parametrize("gated", [True, False])
def test_a_module_keeps_its_class_where_only_tidying_would_cost_it(gated: bool) -> None:
    model, x = fill(Gated(gated)), torch.randn(2, 3, 6, 6)
    free, kept = P.fold(model, (x,)), P.fold(model, (x,), keep_class=True)
    assert type(kept.model) is Gated and norms(kept.graph) == 0
    assert (type(free.model) is Gated) == (not gated)
    for result in (free, kept):
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-5)
    before = model(x).detach()
    assert P.fold(model, (x,), inplace=True).model is model and isinstance(model.norm, nn.Identity)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
