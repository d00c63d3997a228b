"""Parallel linear branches over one input become one operator; merged equals unmerged, borders included."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from foldline.graph.execute import run_graph
from foldline.graph.ir import Graph
from foldline.graph.load import load
from foldline.passes.base import Context
from foldline.passes.fold import kernels
from foldline.passes.fold.branches import MergeBranches
from foldline.passes.fold.linear_rules import MergeChain, MergeFlattened
from foldline.passes.rewrite import Env, Log, Why, rewrite
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.frontends import exported
from support.linear_nets import CHANNELS, SIZE, Layer, Sum, as_onnx, conv, norm, per_channel
from support.timm_models import create
from support.toys_base import fill
from torch import Tensor, nn

RTOL = 1e-5
FRONT_ENDS = ("fx", "onnx")


def merge(graph: Graph, grow: bool = False, windows: bool = False) -> tuple[Graph, Log]:
    after = graph.clone()
    rules = [MergeBranches(grow), MergeChain(grow), MergeFlattened(grow)]
    log = rewrite(after, rules, Env(after, Context(), windows=windows))
    assert not windows or not [d for d in log.refused if d.data["why"] == Why.WINDOW], log.refused
    after.refresh()
    return after, log


def same(before: Graph, after: Graph, inputs: dict[str, np.ndarray]) -> None:
    for a, b in zip(run_graph(before, inputs)[0], run_graph(after, inputs)[0], strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(b, a, rtol=0, atol=RTOL * max(np.abs(a).max(), 1.0))


def graph_of(branches: list[list[Layer]], signs: list[int], front: str) -> Graph:
    if front == "onnx":
        return load(as_onnx(branches, signs))
    return load(Sum(branches, signs).eval(), (data(),))


def data() -> Tensor:
    return torch.randn(2, CHANNELS, *SIZE, generator=torch.Generator().manual_seed(1))


def check(
    branches: list[list[Layer]], front: str, signs: list[int] | None = None, grow: bool = False, windows: bool = False
) -> Graph:
    """Merge, compare the whole function, and look at what is stored: also what ONNX's own checker says."""
    before = graph_of(branches, signs or [1] * len(branches), front)
    after, _ = merge(before, grow, windows)
    name = before.inputs[0].name
    same(before, after, {name: data().numpy()})
    if front == "onnx":
        onnx.checker.check_model(after.to_model() if isinstance(after.to_model(), onnx.ModelProto) else _proto(after))
    return after


def _proto(graph: Graph) -> onnx.ModelProto:
    import onnx_ir

    return onnx_ir.to_proto(graph.to_model())


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


SAME3 = {"kernel": (3, 3), "pads": ((1, 1), (1, 1))}
C = CHANNELS


def repvgg() -> list[list[Layer]]:
    g = rng()
    return [[norm(g, C)], [conv(g, C, C), norm(g, C)], [conv(g, C, C, bias=False, **SAME3), norm(g, C)]]


def mobileone() -> list[list[Layer]]:
    g = rng()
    wide = [[conv(g, C, C, bias=False, groups=C, **SAME3), norm(g, C)] for _ in range(3)]
    return [[norm(g, C)], [conv(g, C, C, bias=False, groups=C), norm(g, C)], *wide]


def acnet() -> list[list[Layer]]:
    g = rng()
    return [
        [conv(g, C, 6, kernel=(1, 3), pads=((0, 0), (1, 1))), norm(g, 6)],
        [conv(g, C, 6, kernel=(3, 1), pads=((1, 1), (0, 0))), norm(g, 6)],
        [conv(g, C, 6, **SAME3), norm(g, 6)],
    ]


def strided() -> list[list[Layer]]:
    g = rng()
    s = {"stride": (2, 2)}
    return [
        [conv(g, C, 6, **s)],
        [conv(g, C, 6, **SAME3, **s)],
        [conv(g, C, 6, kernel=(5, 5), pads=((2, 2),) * 2, **s)],
    ]


def pooled() -> list[list[Layer]]:
    g = rng()
    pool = Layer("pool", kernel=(3, 3), pads=((1, 1), (1, 1)))
    return [[conv(g, C, C, **SAME3)], [pool, norm(g, C)], [conv(g, C, C, bias=False), pool]]


def scaled() -> list[list[Layer]]:
    g = rng()
    return [[], [per_channel(g, "scale", C)], [conv(g, C, C, groups=C, **SAME3), per_channel(g, "scale", C)]]


def low_rank() -> list[list[Layer]]:
    g = rng()
    return [[conv(g, C, 6)], [conv(g, C, 1, bias=False), conv(g, 1, 6, bias=False), per_channel(g, "scale", 6)]]


def dilated() -> list[list[Layer]]:
    g = rng()
    far = {"kernel": (3, 3), "pads": ((2, 2), (2, 2)), "dilation": (2, 2)}
    return [[conv(g, C, C, kernel=(5, 5), pads=((2, 2), (2, 2)))], [conv(g, C, C, **far)], [conv(g, C, C, **far)]]


def grouped() -> list[list[Layer]]:
    g = rng()
    return [[conv(g, C, 8, groups=2, **SAME3)], [conv(g, C, 8, groups=4)], [conv(g, C, 8, groups=2)]]


CASES = {f.__name__: f for f in (repvgg, mobileone, acnet, strided, pooled, scaled, low_rank, dilated, grouped)}


@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("case", CASES)
def test_branches_become_one_convolution(case: str, front: str) -> None:
    after = check(CASES[case](), front, windows=True)
    assert ops(after) == ["relu", "conv", "relu"]


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_the_host_grows_where_the_larger_kernel_is_tied(front: str) -> None:
    """The 1x1 kernel takes over the taps of the 3x3 one, its stated kernel size with them."""
    g = rng()
    wide = conv(g, C, C, bias=False, **SAME3)
    before = graph_of([[conv(g, C, C)], [wide]], [1, 1], front)
    weight = before.weight("b1_0_weight")
    other = next(n for n in before.nodes if n.op == "relu")
    made = before.insert("conv", [other.output, weight.value], dict(_attrs(before)), name="again", after=other)
    last = before.nodes[-1]
    added = before.insert("add", [last.output, made.output], name="last", after=last)
    before.replace_uses(last.output, added.output, except_nodes=[added])
    before.refresh()
    after, log = merge(before)
    same(before, after, {before.inputs[0].name: data().numpy()})
    assert log.applied and ops(after).count("conv") == 2


def _attrs(graph: Graph) -> dict[str, Any]:
    return next(n.attrs for n in graph.nodes if n.op == "conv" and n.attrs["padding"][0][0] == 1)


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_signs_of_a_sum_are_kept(front: str) -> None:
    """x + scale * (conv(x) - norm(x)), as FastViT's token mixer."""
    g = rng()
    branches = [[conv(g, C, C, groups=C, **SAME3)], [norm(g, C)], []]
    assert ops(check(branches, front, [1, -1, 1])) == ["relu", "conv", "relu"]
    assert ops(check(branches, front, [1, -1, -1])) == ["relu", "conv", "relu"]


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_asymmetric_padding_gets_zero_taps_only_where_torch_needs_them(front: str) -> None:
    """2x2 taps behind and a 3x3 kernel padded by one on each side reach differently far and still align at stride 2."""
    g = rng()
    branches = [
        [conv(g, C, 6, kernel=(3, 3), stride=(2, 2), pads=((1, 1), (1, 1)))],
        [conv(g, C, 6, kernel=(1, 1), stride=(2, 2))],
        [conv(g, C, 6, kernel=(2, 2), stride=(2, 2), pads=((0, 0), (0, 0)))],
    ]
    before = [branches[0], branches[1]]
    assert ops(check(before, front)) == ["relu", "conv", "relu"]


# ---- refusals ----------------------------------------------------------------------------------------------------
def refused(branches: list[list[Layer]], word: str, front: str = "onnx") -> None:
    before = graph_of(branches, [1] * len(branches), front)
    after, log = merge(before)
    same(before, after, {before.inputs[0].name: data().numpy()})
    assert ops(after) == ops(before)
    assert any(word in d.reason for d in log.refused), log.refused


def test_a_sum_that_would_cost_more_is_left() -> None:
    g = rng()
    deep = [conv(g, C, C, groups=C, kernel=(5, 5), pads=((2, 2), (2, 2)))]
    refused([deep, [conv(g, C, C)]], "multiply-accumulates")
    crossed = [
        [conv(g, C, C, kernel=(1, 3), pads=((0, 0), (1, 1)))],
        [conv(g, C, C, kernel=(3, 1), pads=((1, 1), (0, 0)))],
    ]
    refused(crossed, "multiply-accumulates")
    for front in FRONT_ENDS:
        assert ops(check(crossed, front, grow=True)) == ["relu", "conv", "relu"]


def test_a_bias_before_a_padded_pool_is_left() -> None:
    g = rng()
    pool = Layer("pool", kernel=(3, 3), pads=((1, 1), (1, 1)))
    refused([[conv(g, C, C, **SAME3)], [conv(g, C, C), pool]], "border")


def test_different_strides_do_not_meet() -> None:
    g = rng()
    before = [[conv(g, C, C, kernel=(3, 3), pads=((1, 1), (1, 1)))], [conv(g, C, C), Layer("pool", kernel=(1, 1))]]
    assert ops(check(before, "onnx")) == ["relu", "conv", "relu"]


class PoolWithoutBorder(nn.Module):
    """An average pool that divides by the number of inputs inside, beside a convolution."""

    def __init__(self, count: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=count)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.pool(x)


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_only_pools_that_count_their_padding_are_convolutions(front: str) -> None:
    for count in (True, False):
        model = fill(PoolWithoutBorder(count)).eval()
        before = load(model, (data(),)) if front == "fx" else load(exported(model, (data(),)))
        after, log = merge(before)
        same(before, after, {before.inputs[0].name: data().numpy()})
        assert ops(after) == (["conv"] if count else ops(before))
        assert count or any("border" in d.reason for d in log.refused)


class Seen(nn.Module):
    """A branch whose value somebody else reads, and one whose weight is used twice."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.a, self.b, self.tied = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), tied

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, z = self.a(x), self.b(x)
        return y + z, self.b(self.a(y.sigmoid()).sigmoid()) if self.tied else y.sigmoid()


@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("tied", [False, True])
def test_what_others_read_is_left(front: str, tied: bool) -> None:
    model = fill(Seen(tied)).eval()
    before = load(model, (data(),)) if front == "fx" else load(exported(model, (data(),)))
    after, log = merge(before)
    same(before, after, {before.inputs[0].name: data().numpy()})
    assert not log.applied and ops(after) == ops(before)


class Beside(nn.Module):
    """W x + s B A x on the last axis, three-dimensional, with and without biases."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.w = nn.Linear(6, 8, bias=bias)
        self.a, self.b = nn.Linear(6, 2, bias=False), nn.Linear(2, 8, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return (self.w(x) + self.b(self.a(x)) * 0.5).relu()


@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_low_rank_side_branch_joins_its_linear(front: str, shape: tuple[int, ...], bias: bool) -> None:
    x = torch.randn(shape)
    model = fill(Beside(bias)).eval()
    before = load(model, (x,)) if front == "fx" else load(exported(model, (x,)))
    after, _ = merge(before)
    same(before, after, {before.inputs[0].name: x.numpy()})
    assert ops(after).count("linear") == 1
    assert len(after.nodes) <= 3 and "mul" not in ops(after)


class Residual(nn.Module):
    """x + linear(x), and a term in between that has nothing to do with them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.a(x) + x.tanh()) - self.b(x)


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_terms_in_between_stay(front: str) -> None:
    x = torch.randn(2, 3, 6)
    model = fill(Residual()).eval()
    before = load(model, (x,)) if front == "fx" else load(exported(model, (x,)))
    after, _ = merge(before)
    same(before, after, {before.inputs[0].name: x.numpy()})
    assert ops(after).count("linear") == 1 and ops(after).count("tanh") == 1 and "sub" not in ops(after)


# ---- properties --------------------------------------------------------------------------------------------------
@st.composite
def layer_of(draw: Any, ins: int, outs: int, stride: tuple[int, int], reach: tuple[int, int], even: bool) -> Layer:
    """A random convolution (or pool) whose outputs have the size that ``stride`` and ``reach`` give."""
    seed = np.random.default_rng(draw(st.integers(0, 999)))
    kernel, dilation, pads = [], [], []
    for axis in (0, 1):
        k, d = draw(st.sampled_from([(k, d) for k in (1, 2, 3) for d in (1, 2) if _fits(k, d, reach[axis], even)]))
        total = reach[axis] + d * (k - 1)
        low = total // 2 if even else draw(st.integers(0, total))
        kernel.append(k), dilation.append(d), pads.append((low, total - low))
    window = {"kernel": tuple(kernel), "stride": stride, "pads": tuple(pads)}
    if ins == outs and dilation == [1, 1] and draw(st.integers(0, 3)) == 0:
        if all(2 * max(p) <= k for p, k in zip(pads, kernel, strict=True)):
            return Layer("pool", **window)
    groups = draw(st.sampled_from([g for g in (1, 2, 4) if ins % g == 0 and outs % g == 0]))
    return conv(seed, ins, outs, draw(st.booleans()), dilation=tuple(dilation), groups=groups, **window)


def _fits(kernel: int, dilation: int, reach: int, even: bool) -> bool:
    total = reach + dilation * (kernel - 1)
    return total >= 0 and (not even or total % 2 == 0)


def _alike(size: int, stride: int, reach: int, even: bool) -> list[int]:
    """Reaches that give as many outputs as ``reach`` does."""
    wanted = (size + reach - 1) // stride
    return [r for r in ((-2, 0, 2) if even else range(-2, 3)) if (size + r - 1) // stride == wanted]


@st.composite
def sums(draw: Any, even: bool) -> tuple[list[list[Layer]], list[int]]:
    """Branches over one input that end in tensors of one shape."""
    stride = (draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3])))
    outs = draw(st.sampled_from([4, 8]))
    usual = tuple(draw(st.sampled_from([0, 0, -2, 2] if even else [0, 0, -1, -2, 1])) for _ in stride)
    branches: list[list[Layer]] = []
    for _ in range(draw(st.integers(2, 4))):
        reach = tuple(draw(st.sampled_from(_alike(*axis, even))) for axis in zip(SIZE, stride, usual, strict=True))
        seed = np.random.default_rng(draw(st.integers(0, 999)))
        kind = draw(st.integers(0, 5))
        branch: list[Layer] = []
        if kind == 0 and outs == C and stride == (1, 1) and reach == (0, 0):
            branch = [] if draw(st.booleans()) else [norm(seed, C)]
        elif kind == 1:
            mid = draw(st.sampled_from([2, 4]))
            branch = [conv(seed, C, mid, draw(st.booleans())), draw(layer_of(mid, outs, stride, reach, even))]
        elif kind == 2:
            branch = [draw(layer_of(C, 4, stride, reach, even)), conv(seed, 4, outs, draw(st.booleans()))]
        else:
            branch = [draw(layer_of(C, outs, stride, reach, even))]
        for extra in draw(st.lists(st.sampled_from(["norm", "scale", "shift"]), max_size=1)):
            branch.append(norm(seed, outs) if extra == "norm" else per_channel(seed, extra, outs))
        branches.append(branch)
    return branches, [draw(st.sampled_from([1, 1, -1])) for _ in branches]


QUICK = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}


@settings(max_examples=80, derandomize=True, **QUICK)
@given(sums(even=False), st.booleans())
def test_random_sums_onnx(drawn: tuple[list[list[Layer]], list[int]], grow: bool) -> None:
    check(drawn[0], "onnx", drawn[1], grow)


@settings(max_examples=20, derandomize=True, **QUICK)
@given(sums(even=True), st.booleans())
def test_random_sums_fx(drawn: tuple[list[list[Layer]], list[int]], grow: bool) -> None:
    check(drawn[0], "fx", drawn[1], grow)


def test_a_wrong_tap_offset_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above is not blind: a kernel laid one tap aside fails it."""
    place = kernels._place

    def aside(kernel: kernels.Kernel, form: kernels.Form, into: np.ndarray, factor: float) -> None:
        before = into.copy()
        place(kernel, form, into, factor)
        if kernel.form.shape[2:] != form.shape[2:]:
            into[...] = before + np.roll(into - before, 1, axis=-1)

    monkeypatch.setattr(kernels, "_place", aside)
    with pytest.raises(AssertionError):
        check(repvgg(), "onnx")


def test_a_default_that_callers_may_override_is_no_constant() -> None:
    model = as_onnx(repvgg(), [1, 1, 1])
    name = "b2_0_weight"
    stored = next(t for t in model.graph.initializer if t.name == name)
    shape = list(stored.dims)
    model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    before = load(model)
    after, _ = merge(before)
    own = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for weight in (onnx.numpy_helper.to_array(stored), own):
        same(before, after, {"x": data().numpy(), name: weight})
    assert [v.name for v in after.inputs] == ["x", name] and ops(after).count("conv") == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_keep_their_dtype(dtype: torch.dtype) -> None:
    model, x = fill(PoolWithoutBorder(True)).eval().to(dtype), data().to(dtype)
    before = load(model, (x,))
    after, _ = merge(before)
    (weight,) = (w for w in after.weights.values() if len(w.shape) == 4)
    assert weight.dtype == str(dtype).removeprefix("torch.") and ops(after) == ["conv"]
    with torch.no_grad():
        got, exact = after.to_model()(x).double(), model.double()(x.double())
    assert float((got - exact).abs().max()) < 4 * torch.finfo(dtype).eps * float(exact.abs().max())


def test_a_weight_that_leaves_the_range_of_its_dtype_is_left() -> None:
    model = fill(PoolWithoutBorder(True)).eval().half()
    with torch.no_grad():
        model.conv.weight[0, 0, 1, 1] = torch.finfo(torch.float16).max
        model.pool = nn.Identity()
        x = torch.zeros(1, 4, 5, 5).half()
    double = nn.Sequential()
    double.add_module("twice", Twice(model.conv))
    before = load(double.eval(), (x,))
    after, log = merge(before)
    assert ops(after) == ops(before) and any("dtype" in d.reason for d in log.refused)


class Twice(nn.Module):
    """Two equal convolutions added: their sum is twice the weight."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.a, self.b = conv, copy.deepcopy(conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def test_a_long_sum_takes_no_recursion() -> None:
    g = rng()
    branches = [[conv(g, C, C, groups=C)] for _ in range(1500)]
    before = load(as_onnx(branches, [1] * len(branches)))
    after, _ = merge(before)
    assert ops(after) == ["relu", "conv", "relu"]


class Padded(nn.Module):
    """A branch whose padding is an op of its own, before a convolution without any."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.pad = nn.ConstantPad2d(1, value)
        self.a, self.b = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(self.pad(x)) + self.b(x)).relu()


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_a_zero_pad_is_part_of_a_branch(front: str) -> None:
    for value, left in ((0.0, ["conv", "relu"]), (0.5, ["pad", "conv", "conv", "add", "relu"])):
        model = fill(Padded(value)).eval()
        before = load(model, (data(),)) if front == "fx" else load(exported(model, (data(),)))
        after, log = merge(before)
        same(before, after, {before.inputs[0].name: data().numpy()})
        assert ops(after) == left, log.refused


# ---- real architectures ------------------------------------------------------------------------------------------
FUSED_NODES = {
    "mobileone_s0": 89,
    "repvgg_a2": 47,
    "fastvit_t8": 96,
    "ghostnetv3_100": 307,
    "repvit_m1": 198,
    "levit_128s": 299,
}
"""ONNX nodes of the exports of these models after their own fuse methods."""


@pytest.mark.slow
@pytest.mark.parametrize("name", FUSED_NODES)
def test_real_architectures_reach_their_own_fuse(name: str) -> None:
    """Folded from the plain export, and from the module: as few nodes as after the authors' fuse, or fewer."""
    from foldline import passes as P

    model = create(name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.normal_(0, 0.2, generator=generator)
    image = torch.randn(1, *model.default_cfg["input_size"], generator=generator)
    proto = exported(model, (image,))
    folded = P.fold(proto, verify=False).model
    onnx.checker.check_model(folded)
    before = load(proto)
    inputs = {before.inputs[0].name: image.numpy()}
    same(before, load(folded), inputs)
    assert len(folded.graph.node) <= FUSED_NODES[name]

    module = P.fold(model, (image,), verify=False).model.eval()
    again = exported(module, (image,))
    same(before, load(again), inputs)
    assert len(again.graph.node) <= FUSED_NODES[name]
