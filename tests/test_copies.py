"""Copies of module trees: the structure of copy.deepcopy, every tensor another one, given once."""

from __future__ import annotations

import copy
from collections import OrderedDict
from enum import Enum
from typing import Any

import pytest
import torch
from foldline.graph.fx.copies import copied_with, structural_copy
from foldline.graph.fx.walk import modules_of
from torch import nn


class Note:
    """An object of the user's own that knows tensors."""

    def __init__(self, **held: Any) -> None:
        self.__dict__.update(held)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(3, 4)
        self.second.weight = self.first.weight
        self.twice = self.first
        self.register_buffer("table", torch.arange(4.0))
        self.plain = torch.ones(2)
        self.cache = {"a": [torch.zeros(1), (self.table, 3)], 5: {torch.float32}}
        self.sizes = (3, 4)
        self.names = OrderedDict(x=1)
        self.note = Note(weight=self.second.bias, layer=self.second, inner=[self.plain])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(x) + self.first(x) + self.table


def test_every_tensor_is_asked_for_once_and_held_everywhere() -> None:
    net, asked = Net(), []

    def give(t: torch.Tensor) -> torch.Tensor:
        asked.append(id(t))
        made = t.detach().clone()
        return nn.Parameter(made) if isinstance(t, nn.Parameter) else made

    twin: Any = copied_with(net, give)
    assert len(asked) == len(set(asked)) == 6  # a weight, two biases, the buffer, the plain one, that of the cache
    assert twin.second.weight is twin.first.weight and twin.twice is twin.first
    assert (
        twin.cache["a"][1][0] is twin.table and twin.cache[5] == {torch.float32} and twin.cache[5] is not net.cache[5]
    )  # type: ignore[index]
    assert twin.note.weight is twin.second.bias and twin.note.layer is twin.second and twin.note.inner[0] is twin.plain
    assert type(twin.names) is OrderedDict and twin.names == net.names and twin.names is not net.names
    x = torch.randn(2, 3)
    assert torch.equal(twin(x), net(x))
    twin.table += 1
    twin.cache["a"].append(1)
    assert net.table[0] == 0 and len(net.cache["a"]) == 2  # type: ignore[arg-type]


class Early(nn.Module):
    """What it notes belongs to a layer that comes after it in its parent."""

    def __init__(self, bias: nn.Parameter) -> None:
        super().__init__()
        self.note = Note(bias=bias)


def test_an_object_that_knows_a_later_tensor_knows_the_copy() -> None:
    late = nn.Linear(2, 2)
    net = nn.Sequential(Early(late.bias), late)
    other = {id(late.bias): nn.Parameter(torch.ones(2))}
    twin: Any = structural_copy(net, other)
    assert twin[1].bias is other[id(late.bias)] and twin[0].note.bias is twin[1].bias
    assert twin[1].weight is late.weight  # shared where nothing else is given


@pytest.mark.parametrize("repeated", [False, True])
def test_walks_list_what_torch_lists(repeated: bool) -> None:
    net = Net()
    want = [(n, id(m)) for n, m in net.named_modules(remove_duplicate=not repeated)]
    assert [(n, id(m)) for n, m in modules_of(net, repeated=repeated)] == want


def test_what_forward_needs_survives_as_in_deepcopy() -> None:
    net = nn.LSTM(3, 4, num_layers=2).eval()
    twin, like = structural_copy(net), copy.deepcopy(net)
    assert vars(twin).keys() == vars(like).keys()
    x = torch.randn(5, 2, 3)
    assert torch.equal(twin(x)[0], net(x)[0])


def test_what_holds_nothing_to_copy_is_shared_and_tuples_are_copied_where_they_must_be() -> None:
    class Kind(Enum):
        ONE = 1

    net = nn.ReLU()
    inner: list[Any] = [1]
    inner.append((inner, "itself"))
    plain = ((7, 7), ("a", (2,)))
    net.act, net.kind, net.plain = torch._C._nn.gelu, Kind.ONE, plain  # type: ignore[assignment]
    net.deep, net.loop = (plain, [torch.ones(1)], {"k": (torch.ones(2),)}), inner  # type: ignore[assignment]
    copied, wanted = structural_copy(net), copy.deepcopy(net)
    for twin in (copied, wanted):
        assert twin.act is net.act and twin.kind is Kind.ONE and twin.plain is plain
        assert twin.deep is not net.deep and twin.deep[0] is plain and twin.deep[1] is not net.deep[1]
        assert twin.loop is not inner and twin.loop[1][0] is twin.loop
    assert copied.deep[1][0] is net.deep[1][0] and copied.deep[2]["k"][0] is net.deep[2]["k"][0]
