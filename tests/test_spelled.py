"""Calls written out by a rule, and weights that a call hands on as they are, in recorded graphs and when followed."""

from __future__ import annotations

import copy
from typing import Any

import foldline as fl
import pytest
import torch
from foldline import passes as P
from foldline.graph.fx.follow import follows
from torch import nn


class Gated(nn.Module):
    """A global response normalisation (Woo et al. 2023): its scale and shift enter through addcmul."""

    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)
        self.scale, self.shift = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        if self.value == 1.0:
            return self.b(torch.addcmul(self.shift, self.scale, x))
        return self.b(torch.addcmul(self.shift, self.scale, x, value=self.value))


class Looks(nn.Module):
    """Reads a buffer through a conversion to the type that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.arange(5))
        self.table, self.out = nn.Embedding(9, 6), nn.Linear(6, 3)
        self.other = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.rows if self.other else self.rows.to(torch.int64)
        return self.out(self.table(rows) + x)


def _tensors(graph: Any, twin: nn.Module) -> dict[str, torch.Tensor]:
    held = dict(twin.named_parameters()) | dict(twin.named_buffers())
    return {n: held.get(n, t) for n, t in graph.tensors.items()}


@pytest.mark.parametrize("value", [1.0, -0.5, 3])
@pytest.mark.parametrize("static", [True, False])
def test_addcmul_is_written_out_as_torch_does(value: float, static: bool) -> None:
    """Bit for bit torch's own reference; the kernel itself rounds product and sum once."""
    torch.manual_seed(0)
    model, x = Gated(value).eval(), torch.randn(3, 6)
    graph = fl.load(model, x, static=static)
    assert not [n for n in graph.nodes if "addcmul" in n.origin]
    with torch.no_grad():
        found = graph.run(graph.bind(x))[0][0]
        written_out = torch._refs.addcmul(model.shift, model.scale, model.a(x), value=value)
        assert torch.equal(found, model.b(written_out))
        torch.testing.assert_close(found, model(x))


@pytest.mark.parametrize("value", [1.0, -0.5])
def test_a_written_out_call_is_followed(value: float) -> None:
    model = Gated(value).eval()
    graph, twin = fl.load(model, torch.randn(3, 6), static=True), copy.deepcopy(model)
    assert follows(graph, twin, _tensors(graph, twin))
    twin.value = 2.0
    assert not follows(graph, twin, _tensors(graph, twin))
    other = copy.deepcopy(model)
    other.scale, other.shift = other.shift, other.scale
    held = {**_tensors(graph, other), "scale": other.shift, "shift": other.scale}  # each weight with its numbers
    assert not follows(graph, other, held)


def test_a_written_out_call_is_cut_as_any() -> None:
    torch.manual_seed(0)
    model, x = Gated().eval(), torch.randn(3, 6)
    result = P.prune(model, x, ratio=0.5)  # verified against the masked original
    assert isinstance(result.model, Gated) and result.model.scale.shape == (4,)


def test_half_precision_is_left_to_torch() -> None:
    """torch multiplies and adds in a wider type there."""
    torch.manual_seed(0)
    model, x = Gated().eval().to(torch.bfloat16), torch.randn(3, 6, dtype=torch.bfloat16)
    graph = fl.load(model, x, static=True)
    with torch.no_grad():
        torch.testing.assert_close(graph.run(graph.bind(x))[0][0], model(x))


def test_a_buffer_handed_on_as_it_is_is_followed() -> None:
    model = Looks().eval()
    graph, twin = fl.load(model, torch.randn(5, 6), static=True), copy.deepcopy(model)
    assert follows(graph, twin, _tensors(graph, twin))
    assert not any(name.startswith("_foldline") for name in vars(twin.rows))
    twin.rows = torch.arange(4, -1, -1)
    assert not follows(graph, twin, _tensors(graph, twin) | {"rows": model.rows})


class Parts(nn.Module):
    """Three parts of one projection, taken by one size or by a list of sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.size, self.dim = nn.Linear(6, 12), [4, 4, 4], 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.a(x).split(self.size, self.dim)
        return parts[0] * parts[1] + parts[2]


def test_pieces_of_one_size_are_the_listed_sizes() -> None:
    model = Parts().eval()
    graph, twin = fl.load(model, torch.randn(12, 6), static=True), copy.deepcopy(model)
    twin.size = 4
    assert follows(graph, twin, _tensors(graph, twin))
    twin.dim = 0
    assert not follows(graph, twin, _tensors(graph, twin))
