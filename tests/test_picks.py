"""Gathers of one action: index tensors are made once, and what lies outside the tensor is refused."""

from __future__ import annotations

import foldline as fl
import numpy as np
import pytest
import torch
from foldline.graph.fx.picks import Picks
from torch import nn


def test_one_array_makes_one_index_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *a, **k: made.append(1) or original(*a, **k))
    picks, wanted = Picks(), np.array([3, 0, 2])
    a, b = torch.arange(12.0).reshape(4, 3), torch.arange(8.0).reshape(2, 4)
    assert torch.equal(picks.gather(a, 0, wanted, "a"), a[[3, 0, 2]])
    assert torch.equal(picks.gather(b, 1, wanted, "b"), b[:, [3, 0, 2]])
    assert torch.equal(picks.gather(b, -1, np.array([], dtype=np.int64), "b"), b[:, :0])
    assert len(made) == 2
    picks.forget()
    picks.gather(a, 0, wanted, "a")
    assert len(made) == 3


def test_outside_is_refused_by_name() -> None:
    picks, t = Picks(), torch.zeros(4, 3)
    for axis, wanted, found in [(1, [3], "index out of range"), (0, [-1], "index out of range"), (2, [0], "no such")]:
        with pytest.raises(fl.ConstraintError, match=found) as told:
            picks.gather(t, axis, np.array(wanted), "layer.weight")
        assert told.value.node == "layer.weight"


def test_an_array_that_changes_meanwhile_is_what_it_was_when_given() -> None:
    layer = nn.Linear(4, 6)
    graph = fl.load(layer, torch.ones(2, 4))
    wanted = np.array([0, 1, 2])
    graph.slice_weight(graph.weight("weight"), {0: wanted})
    wanted[:] = [3, 4, 5]
    graph.slice_weight(graph.weight("bias"), {0: wanted})
    graph.refresh()
    assert torch.equal(graph.tensors["weight"], layer.weight[:3]) and torch.equal(graph.tensors["bias"], layer.bias[3:])
    assert graph.kept["weight"][0].tolist() == [0, 1, 2]


class Halved(nn.Module):
    """A number beside a tensor takes the dtype of that tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (self.scale * 0.5 + 2).sum()


def test_a_new_dtype_reaches_the_numbers_beside_it() -> None:
    graph = fl.load(Halved(), torch.ones(2, 4))
    weight = next(w for w in graph.weights.values() if w.name == "scale")
    before = {str(v.literal.dtype) for n in graph.nodes for v in n.inputs if v is not None and v.literal is not None}
    graph.set_weight(weight, np.ones(4, dtype=np.float16))
    graph.refresh()
    numbers = [v.literal.dtype for n in graph.nodes for v in n.inputs if v is not None and v.literal is not None]
    assert before == {"float32"} and {str(d) for d in numbers} == {"float16"}
