"""Linears over one input become one and a split; hidden layers over one input become one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from foldline import passes as P
from foldline.graph.ir import Graph
from foldline.graph.load import load
from foldline.passes.base import Context, Contract, Outcome
from foldline.passes.fold.parallel_linears import FuseParallelLinears
from support.frontends import exported
from support.timm_models import transformers
from support.toys_base import fill
from test_branches import FRONT_ENDS, ops, same
from torch import Tensor, nn


def graph(model: nn.Module, x: Tensor, front: str) -> Graph:
    model = fill(model).eval()
    return load(model, (x,)) if front == "fx" else load(exported(model, (x,)))


def fuse(before: Graph, **options: int) -> tuple[Graph, Outcome]:
    after = before.clone()
    outcome = FuseParallelLinears(**options).apply(after, Context())
    return after, outcome


class Attention(nn.Module):
    """Separate projections; of k and v the bias is missing, as in Whisper."""

    def __init__(self, biases: tuple[bool, bool, bool]) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, n, bias=b) for n, b in zip((8, 8, 6), biases, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1)
        return weights @ self.v(x)


@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8)])
@pytest.mark.parametrize("biases", [(True, True, True), (True, False, True), (False, False, False)])
def test_projections_become_one(front: str, shape: tuple[int, ...], biases: tuple[bool, bool, bool]) -> None:
    x = torch.randn(shape)
    before = graph(Attention(biases), x, front)
    after, outcome = fuse(before)
    same(before, after, {before.inputs[0].name: x.numpy()})
    assert ops(after).count("linear") == 1 and ops(after).count("split") == 1, outcome.decisions
    assert len(after.nodes) <= len(before.nodes)
    sizes = next(n.attrs["sizes"] for n in after.nodes if n.op == "split")
    assert list(sizes) == [8, 8, 6]


class Convolutions(nn.Module):
    """An inception block's 1x1 convolutions, and one that is not alike."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 5, 1, bias=False), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x).relu(), self.b(x), self.c(x)], 1)


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_convolutions_of_one_kernel_become_one(front: str) -> None:
    x = torch.randn(2, 4, 5, 6)
    before = graph(Convolutions(), x, front)
    after, _ = fuse(before)
    same(before, after, {before.inputs[0].name: x.numpy()})
    assert ops(after).count("conv") == 2 and ops(after).count("split") == 1


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).relu() * self.b(x).tanh()


def test_tied_weights_stay_tied() -> None:
    x = torch.randn(3, 6)
    before = graph(Tied(), x, "fx")
    after, outcome = fuse(before)
    assert ops(after) == ops(before)
    assert any("tied" in d.reason for d in outcome.decisions)


class Boosted(nn.Module):
    """Small networks added up, as gradient boosting trains them."""

    def __init__(self, terms: int, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(6, 4) for _ in range(terms))
        self.second = nn.ModuleList(nn.Linear(4, 3) for _ in range(terms))
        self.activation = activation or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(3)
        for t, (a, b) in enumerate(zip(self.first, self.second, strict=True)):
            term = b(self.activation(a(x))) * (0.5 / (t + 1))
            total = term if t == 0 else total + term
        return total


@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Sigmoid(), nn.LeakyReLU(0.2)])
def test_boosted_networks_become_one_network(front: str, activation: nn.Module) -> None:
    x = torch.randn(5, 6)
    before = graph(Boosted(6, activation), x, front)
    after, outcome = fuse(before)
    same(before, after, {before.inputs[0].name: x.numpy()})
    assert ops(after).count("linear") == 2, outcome.decisions
    assert len(after.nodes) == 3 and len(before.nodes) >= 20
    hidden = next(n for n in after.nodes if n.op == "linear")
    assert hidden.output.hint == (5, 24)


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_the_first_terms_alone_are_the_network_stopped_early(front: str) -> None:
    x = torch.randn(5, 6)
    model = Boosted(6)
    before = graph(model, x, front)
    after, _ = fuse(before, keep=2)
    short = Boosted(2)
    short.load_state_dict({k: v for k, v in model.state_dict().items() if int(k.split(".")[1]) < 2})
    got = after.run({before.inputs[0].name: x.numpy()}, [])[0][0]  # type: ignore[attr-defined]
    np.testing.assert_allclose(np.asarray(got), short(x).detach().numpy(), rtol=1e-5, atol=1e-6)
    assert FuseParallelLinears(keep=2).promise() == Contract.APPROXIMATE
    assert FuseParallelLinears().promise() == Contract.EXACT


class MixedActivations(Boosted):
    """Terms of two activations: two wide layers remain, and a term that is no network."""

    def forward(self, x: Tensor) -> Tensor:
        total = x[:, :3]
        for t, (a, b) in enumerate(zip(self.first, self.second, strict=True)):
            y = a(x)
            total = total - b(y.relu() if t % 2 else y.tanh())
        return total


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_each_activation_has_its_own_layer(front: str) -> None:
    x = torch.randn(5, 6)
    before = graph(MixedActivations(4), x, front)
    after, _ = fuse(before)
    same(before, after, {before.inputs[0].name: x.numpy()})
    # the two hidden layers read one value: they are one product and a split
    assert ops(after).count("linear") == 3 and ops(after).count("split") == 1


def test_it_is_a_pass_like_any_other() -> None:
    x = torch.randn(2, 5, 8)
    model = fill(Attention((True, True, True))).eval()
    result = P.fuse_parallel_linears(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(list(model.parameters())) == 6


@pytest.mark.slow
def test_real_transformers() -> None:
    """q, k and v of BERT become one product per layer, on both front ends."""
    hub = transformers()
    config = hub.BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    model = hub.BertModel(config).eval()
    ids = torch.randint(0, 1000, (2, 16))
    for front in FRONT_ENDS:
        before = load(model, (ids,)) if front == "fx" else load(exported(model, (ids,)))
        after, _ = fuse(before)
        inputs = {before.inputs[0].name: ids.numpy()}
        same(before, after, inputs)
        assert ops(before).count("linear") - ops(after).count("linear") == 4
