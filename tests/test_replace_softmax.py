"""ReplaceSoftmax: the same function without overflow, or StableMax; softmax collapse is found, gradients projected."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foldline import passes as P
from foldline.graph.execute import run_graph
from foldline.passes.base import Context, Contract
from support.digits_nets import digits, lenet
from support.frontends import FRONT_ENDS, load, toy_graph
from torch import nn


class Function(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def rows(scale: float = 1.0) -> torch.Tensor:
    return torch.randn(6, 9, generator=torch.Generator().manual_seed(0)) * scale


def s(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x >= 0, x + 1, 1 / (1 - x))


@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("logs", [False, True])
def test_stablemax_is_the_formula_and_keeps_the_largest(logs: bool, front: str) -> None:
    for scale in (1.0, 1e4):
        x = rows(scale)
        function = (lambda v: torch.log_softmax(v, -1)) if logs else (lambda v: torch.softmax(v, -1))
        graph = load(Function(function).eval(), (x,), front)
        outcome = P.ReplaceSoftmax().apply(graph, Context())
        assert outcome.details["replaced"] == 1
        y = run_graph(graph, graph.bind(x))[0][0]
        wanted = s(x.double()) / s(x.double()).sum(-1, keepdim=True)
        np.testing.assert_allclose(y, (wanted.log() if logs else wanted).numpy(), rtol=2e-5, atol=1e-6)
        assert np.isfinite(y).all() and (y.argmax(-1) == x.argmax(-1).numpy()).all()


def test_a_classifiers_answers_stay() -> None:
    _, _, x, _ = digits()
    model = nn.Sequential(lenet(), nn.Softmax(-1)).eval()
    result = P.replace_softmax(model, (x[:64],), verify=False)
    with torch.no_grad():
        assert (result.model(x).argmax(1) == model(x).argmax(1)).all()
        assert not torch.allclose(result.model(x), model(x), atol=1e-2)


def test_where_tells_attention_from_outputs() -> None:
    def count(**options: str) -> int:
        graph = toy_graph("vision_transformer", "onnx")
        return int(P.ReplaceSoftmax(**options).apply(graph, Context()).details["replaced"])

    assert (count(), count(where="attention"), count(where="all")) == (0, 2, 2)


STABLE = {
    "quotient": (lambda v: v.exp() / v.exp().sum(-1, keepdim=True), "softmax"),
    "log of softmax": (lambda v: torch.softmax(v, -1).log(), "log_softmax"),
    "log of sum": (lambda v: v.exp().sum(-1).log(), "amax"),
    "log of kept sum": (lambda v: v.exp().sum(-1, keepdim=True).log(), "amax"),
}


@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("name", STABLE)
def test_the_same_function_without_overflow(name: str, front: str) -> None:
    function, op = STABLE[name]
    if name == "quotient":

        def function(v: torch.Tensor) -> torch.Tensor:
            e = v.exp()
            return e / e.sum(-1, keepdim=True)

    x = rows()
    graph = load(Function(function).eval(), (x,), front)
    outcome = P.ReplaceSoftmax(form="stable").apply(graph, Context())
    assert outcome.details["replaced"] == 1 and any(n.op == op for n in graph.nodes)
    assert P.ReplaceSoftmax(form="stable").promise() is Contract.EXACT
    np.testing.assert_allclose(run_graph(graph, graph.bind(x))[0][0], function(x).numpy(), rtol=1e-5, atol=1e-6)
    large = run_graph(graph, graph.bind(rows(1e4)))[0][0]
    wanted = function(rows()) if name == "quotient" else None
    assert np.isfinite(large).all() and (wanted is None or large.shape == wanted.shape)
    again = P.ReplaceSoftmax(form="stable").apply(graph, Context())
    assert again.details["replaced"] == 0  # nothing is left to mend


def test_half_precision_computes_in_float32() -> None:
    x = rows(8.0).half()
    graph = load(Function(lambda v: torch.softmax(v, -1)), (x,), "fx")
    P.ReplaceSoftmax(form="stable").apply(graph, Context())
    assert [n.op for n in graph.nodes] == ["cast", "softmax", "cast"]
    y = run_graph(graph, graph.bind(x))[0][0]
    assert y.dtype == np.float16 and np.abs(y - torch.softmax(x.double(), -1).numpy()).max() < 1e-3


# ---- training --------------------------------------------------------------------------------------------------------
def test_collapse_is_found_and_stablemax_does_not_collapse() -> None:
    z, y = rows(), torch.arange(6)
    z[range(6), y] += 200.0
    assert float(F.cross_entropy(z, y)) == 0
    found = P.softmax_collapse(z, y)
    assert found.share == 1 and found.found is (found.exact < 1) and "exactly zero" in str(P.softmax_collapse(z / 8, y))
    assert not P.softmax_collapse(rows(), y).found and "no softmax collapse" in str(P.softmax_collapse(rows(), y))
    z = z.clone().requires_grad_()
    loss = -(s(z) / s(z).sum(1, keepdim=True))[range(6), y].log().mean()
    loss.backward()
    assert float(loss.detach()) > 0 and float(z.grad.abs().sum()) > 0
    wrong = torch.zeros(1, 9)
    wrong[0, 3] = 500.0
    assert P.softmax_collapse(wrong, torch.tensor([0])).share == 0  # a wrong answer has a gradient


def test_float32_loses_what_float64_keeps() -> None:
    z = torch.zeros(4, 5)
    z[:, 0] = 20.0  # 4 e^-20 is under half an ulp of 1 in float32, not in float64
    found = P.softmax_collapse(z, torch.zeros(4, dtype=torch.int64))
    assert (found.share, found.exact, found.found) == (1.0, 0.0, True)


def test_gradients_are_perpendicular_to_the_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(16, 6), torch.randint(0, 3, (16,))
    F.cross_entropy(model(x), y).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    handles = P.perpendicular_gradients(model)
    F.cross_entropy(model(x), y).backward()
    for p, g in zip(model.parameters(), plain, strict=True):
        along = (p * g).sum() / (p * p).sum()
        assert abs(float((p.detach() * p.grad).sum())) < 1e-6 and torch.allclose(p.grad, g - along * p, atol=1e-6)
    for handle in handles:
        handle.remove()
    for p in model.parameters():
        p.grad = None
    F.cross_entropy(model(x), y).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))
