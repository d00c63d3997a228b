"""A linear operator merges with the one before it; merged equals unmerged, borders included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from foldline.graph.ir import Graph
from foldline.graph.load import load
from foldline.passes.fold import kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from support.frontends import exported
from support.linear_nets import CHANNELS, Layer, conv, norm, per_channel
from support.toys_base import fill
from test_branches import FRONT_ENDS, QUICK, SAME3, check, graph_of, layer_of, merge, ops, refused, same
from torch import Tensor, nn

C = CHANNELS


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def pointwise_then_wide() -> list[Layer]:
    g = rng()
    return [conv(g, C, 8, bias=False), conv(g, 8, 6, **SAME3)]


def wide_then_pointwise() -> list[Layer]:
    g = rng()
    return [conv(g, C, 8, **SAME3), conv(g, 8, 6)]


def biased_then_valid() -> list[Layer]:
    g = rng()
    return [conv(g, C, 8), conv(g, 8, 6, kernel=(3, 2))]


def strided_both() -> list[Layer]:
    g = rng()
    return [conv(g, C, 16, kernel=(1, 2), stride=(1, 2)), conv(g, 16, 4, kernel=(2, 1), stride=(2, 1))]


def grouped_both() -> list[Layer]:
    g = rng()
    return [conv(g, C, 8, groups=2, **SAME3), conv(g, 8, 4, groups=2)]


def with_a_norm_between() -> list[Layer]:
    g = rng()
    return [conv(g, C, 8, **SAME3), norm(g, 8), per_channel(g, "scale", 8), conv(g, 8, 6)]


def three() -> list[Layer]:
    g = rng()
    return [conv(g, C, 8), conv(g, 8, 8), conv(g, 8, 6)]


CASES = {
    f.__name__: f
    for f in (
        pointwise_then_wide, wide_then_pointwise, biased_then_valid, strided_both, grouped_both, with_a_norm_between,
        three,
    )
}  # fmt: skip


@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("case", CASES)
def test_a_chain_becomes_one_convolution(case: str, front: str) -> None:
    assert ops(check([CASES[case]()], front)) == ["relu", "conv", "relu"]


def test_a_bias_before_zero_padding_is_left() -> None:
    g = rng()
    refused([[conv(g, C, 8), conv(g, 8, 6, **SAME3)]], "border")


def test_several_taps_before_zero_padding_are_left() -> None:
    g = rng()
    refused([[conv(g, C, 8, bias=False, **SAME3), conv(g, 8, 2, **SAME3)]], "border")


def test_a_product_larger_than_its_factors_is_left_unless_it_may_grow() -> None:
    g = rng()
    narrow = [conv(g, C, 1, bias=False), conv(g, 1, 6)]
    refused([narrow], "multiply-accumulates")
    for front in FRONT_ENDS:
        assert ops(check([narrow], front, grow=True)) == ["relu", "conv", "relu"]
    separable = [conv(g, C, C, groups=C, **SAME3), conv(g, C, 6)]
    refused([separable], "multiply-accumulates")


class Linears(nn.Module):
    def __init__(self, first: bool, second: bool, tied: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 20, bias=first), nn.Linear(20, 6, bias=second)
        self.tied = tied

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        return self.b(torch.relu(y) @ torch.ones(6, 20)) if self.tied else torch.relu(y)


@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5)])
@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_linear_after_linear(front: str, shape: tuple[int, ...], biases: tuple[bool, bool]) -> None:
    x = torch.randn(shape)
    before = graph(Linears(*biases), x, front)
    after, _ = merge(before)
    same(before, after, {before.inputs[0].name: x.numpy()})
    assert ops(after).count("linear") == 1 and len(after.nodes) <= 3


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_a_tied_weight_is_left(front: str) -> None:
    x = torch.randn(3, 5)
    before = graph(Linears(True, True, tied=True), x, front)
    after, log = merge(before)
    same(before, after, {before.inputs[0].name: x.numpy()})
    assert not log.applied and any("tied" in d.reason for d in log.refused)


def graph(model: nn.Module, x: Tensor, front: str) -> Graph:
    model = fill(model).eval()
    return load(model, (x,)) if front == "fx" else load(exported(model, (x,)))


class Flat(nn.Module):
    """A convolution, flattened, and a linear on all of it."""

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, channels, **options)
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(1))


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_a_convolution_joins_the_linear_that_reads_all_of_it(front: str) -> None:
    x = torch.randn(2, 4, 6, 5)
    for options in ({"kernel_size": 3, "padding": 1}, {"kernel_size": (3, 2), "stride": (2, 1), "groups": 2}):
        model = Flat(16, **options)
        model(x)
        before = graph(model, x, front)
        after, log = merge(before)
        same(before, after, {before.inputs[0].name: x.numpy()})
        assert ops(after) == ["reshape", "linear"], log.refused
    model = Flat(2, kernel_size=3, padding=1)
    model(x)
    before = graph(model, x, front)
    after, log = merge(before)
    assert ops(after) == ops(before)


# ---- properties --------------------------------------------------------------------------------------------------
@st.composite
def chains(draw: Any, even: bool) -> list[Layer]:
    layers: list[Layer] = []
    ins, sizes = C, [7, 9]
    for _ in range(draw(st.integers(2, 3))):
        seed = np.random.default_rng(draw(st.integers(0, 999)))
        outs = draw(st.sampled_from([4, 8]))
        stride = (draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3])))
        reach = tuple(max(draw(st.sampled_from([0, 0, -2])), 2 - size) for size in sizes)
        if even and any(r % 2 for r in reach):
            reach = (0, 0)
        layers.append(draw(layer_of(ins, outs, stride, reach, even)))
        sizes = [(size + r - 1) // s + 1 for size, r, s in zip(sizes, reach, stride, strict=True)]
        ins = ins if layers[-1].kind == "pool" else outs
        if draw(st.booleans()):
            layers.append(norm(seed, ins) if draw(st.booleans()) else per_channel(seed, "scale", ins))
    return layers


@settings(max_examples=80, derandomize=True, **QUICK)
@given(chains(even=False), st.booleans())
def test_random_chains_onnx(drawn: list[Layer], grow: bool) -> None:
    check([drawn], "onnx", grow=grow)


@settings(max_examples=20, derandomize=True, **QUICK)
@given(chains(even=True), st.booleans())
def test_random_chains_fx(drawn: list[Layer], grow: bool) -> None:
    check([drawn], "fx", grow=grow)


def test_a_wrong_tap_of_a_chain_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above is not blind: taps in the wrong order fail it."""
    chained = kernels._chained

    def turned(outer: kernels.Kernel, inner: kernels.Kernel, form: kernels.Form) -> np.ndarray:
        return np.ascontiguousarray(chained(outer, inner, form)[..., ::-1])

    monkeypatch.setattr(kernels, "_chained", turned)
    with pytest.raises(AssertionError):
        check([strided_both()], "onnx")


def test_reading_a_chain_needs_no_numbers_where_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    g = rng()
    before = graph_of([[conv(g, C, 1, bias=False), conv(g, 1, 6)]], [1], "onnx")
    for weight in before.weights.values():
        if len(weight.shape) > 1:
            monkeypatch.setattr(weight, "load", lambda: pytest.fail("a weight was read"))
    from foldline.passes.base import Context
    from foldline.passes.fold.linear_rules import MergeChain
    from foldline.passes.rewrite import Env, rewrite

    log = rewrite(before, [MergeChain()], Env(before, Context()))
    assert log.refused and not log.applied
