"""A model that reads data in Python is recorded as its user runs it where sizes alone say what it reads."""

from __future__ import annotations

import copy
import gc
from typing import Any

import foldline as fl
import pytest
import torch
from foldline import passes as P
from foldline.graph.fx.follow import follows
from torch import nn


class Reads(nn.Module):
    """Takes a branch by the data of a tensor, made in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.limit = how, 3
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)
        self.register_buffer("flag", torch.ones(3))

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        if self.how == "sizes":
            return torch.ones(n, device=x.device).sum() == self.limit
        if self.how == "chain":
            rows = torch.arange(n)
            return (torch.diff(rows, prepend=rows[:1] - 1) == 1).all() & (rows[-1].item() == 2)
        if self.how == "written":
            ones = torch.ones(n)
            ones[0].zero_()  # through a view
            return ones.all()
        if self.how == "input":
            return x.sum() > 0
        if self.how == "buffer":
            return self.flag.all()
        return torch.zeros(n).copy_(x[:, 0]).any()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return self.b(x.relu() if self.seen(x) else x.tanh())


def _tensors(graph: Any, twin: nn.Module) -> dict[str, torch.Tensor]:
    held = dict(twin.named_parameters()) | dict(twin.named_buffers())
    return {n: held.get(n, t) for n, t in graph.tensors.items()}


@pytest.mark.parametrize("how", ["sizes", "chain"])
def test_what_sizes_say_is_read_and_followed(how: str) -> None:
    torch.manual_seed(0)
    model, x = Reads(how).eval(), torch.randn(3, 6)
    graph = fl.load(model, x, static=True)
    assert graph.source.as_run
    assert [n.op for n in graph.nodes] == ["linear", "relu", "linear"]
    with torch.no_grad():
        assert torch.equal(graph.run(graph.bind(x))[0][0], model(x))
    twin = copy.deepcopy(model)
    assert follows(graph, twin, _tensors(graph, twin))
    result = P.prune(model, x, ratio=0.5)
    assert isinstance(result.model, Reads) and result.model.a.weight.shape == (4, 6)


def test_another_answer_is_another_program() -> None:
    model = Reads("sizes").eval()
    graph, twin = fl.load(model, torch.randn(3, 6), static=True), copy.deepcopy(model)
    twin.limit = 4
    assert not follows(graph, twin, _tensors(graph, twin))
    other = fl.load(twin, torch.randn(3, 6), static=True)
    assert [n.op for n in other.nodes] == ["linear", "tanh", "linear"]


@pytest.mark.parametrize("how", ["written", "input", "buffer", "copied"])
def test_what_hangs_on_more_than_sizes_is_not_answered(how: str) -> None:
    """Neither the recorder nor torch.export can say which branch other data would take."""
    model, x = Reads(how).eval(), torch.randn(3, 6)
    with pytest.raises(fl.FoldlineError):
        fl.load(model, x, static=True)


def test_a_read_after_a_write_is_not_followed() -> None:
    """The graph of the branch that is right by chance: the twin's own read cannot be answered."""
    model = Reads("sizes").eval()
    graph, twin = fl.load(model, torch.randn(3, 6), static=True), copy.deepcopy(model)
    for how in ("written", "input", "buffer", "copied"):
        twin.how = how
        assert not follows(graph, twin, _tensors(graph, twin))


class Views(nn.Module):
    """Its recorded tensors are views of each other, which Python's search for cycles does not look through."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return y.view(-1, 2, 4).transpose(1, 2)[:, 0] + y[:, :2]


def test_a_recorded_graph_goes_when_nobody_holds_it() -> None:
    def living() -> int:
        gc.collect()
        return sum(type(o) is torch.fx.Graph for o in gc.get_objects())

    model, x = Views().eval(), torch.randn(3, 6)
    P.prune(model, x, ratio=0.5, verify=False)
    before = living()
    for _ in range(3):
        P.prune(model, x, ratio=0.5, verify=False)
    assert living() == before
