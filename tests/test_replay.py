"""The proof by calls: a replay agrees only with a module that makes the recorded calls on the recorded weights."""

from __future__ import annotations

import copy
from typing import Any

import foldline as fl
import pytest
import torch
from foldline import passes as P
from foldline.graph.fx.follow import follows
from foldline.graph.fx.replay import replays
from torch import nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.b = nn.Conv2d(8, 8, 3)
        self.c = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)
        self.slope, self.swap, self.width = 0.1, False, 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.leaky_relu(self.a(x), self.slope)
        first, second = (self.c, self.b) if self.swap else (self.b, self.c)
        x = second(first(x).add_(1.0))
        if x.shape[1] != self.width:
            x = x * 2
        return self.head(x.mean((2, 3)) + torch.full((1,), 0.5))


def _both(change: dict[str, Any]) -> tuple[Any, nn.Module]:
    model = Net().train()
    graph = fl.load(model, torch.randn(2, 3, 12, 12), static=True)
    twin = copy.deepcopy(model)
    for key, value in change.items():
        setattr(twin, key, value)
    return graph, twin


def _tensors(graph: Any, twin: nn.Module) -> dict[str, torch.Tensor]:
    held = dict(twin.named_parameters())
    return {n: held.get(n, t) for n, t in graph.tensors.items()}


def test_the_same_module_replays_and_stays_as_it_was() -> None:
    graph, twin = _both({})
    before = {n: t.clone() for n, t in twin.state_dict().items()}
    assert replays(graph, twin, _tensors(graph, twin))
    assert twin.training and twin.a.training
    assert all(torch.equal(t, before[n]) for n, t in twin.state_dict().items())
    assert not any(hasattr(p, "_foldline_meta") or hasattr(p, "_foldline_node") for p in twin.parameters())


@pytest.mark.parametrize("change", [{"slope": 0.2}, {"swap": True}, {"width": 6}, {"head": nn.Linear(8, 4)}])
def test_another_constant_weight_or_branch_does_not(change: dict[str, Any]) -> None:
    graph, twin = _both({})
    tensors = _tensors(graph, twin)
    for key, value in change.items():
        setattr(twin, key, value)
    assert not replays(graph, twin, tensors)


def test_a_size_in_code_is_not_passed_over() -> None:
    """``width`` is code's own: after the cut the forward would take the other branch, so it must be patched."""
    model = Net().eval()
    x = torch.randn(2, 3, 12, 12)
    pruned = P.prune(model, x, ratio=0.5, verify=False).model
    masked_channels = pruned.c.weight.shape[0]
    assert masked_channels == 4
    graph = fl.load(pruned, x, static=True)
    with torch.no_grad():
        out = torch.from_numpy(graph.run(graph.bind(x))[0][0].numpy())
        torch.testing.assert_close(pruned(x), out)
    assert getattr(pruned, "width", 4) == 4 or isinstance(pruned, torch.fx.GraphModule)


def test_torch_is_left_without_traces_of_the_recording() -> None:
    key = torch._C.DispatchKey.PreDispatch
    fl.load(Net(), torch.randn(2, 3, 12, 12), static=True)
    assert key not in torch.ops.aten.conv2d.default._dispatch_cache
    with pytest.raises(Exception):  # noqa: B017  (whatever the module raises)
        fl.load(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(5, 5)), torch.randn(2, 3, 12, 12), static=True)
    assert key not in torch.ops.aten.conv2d.default._dispatch_cache


class Overwrites(nn.Module):
    """Reads a view after its source was passed through relu, which may be in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.in_place, self.late, self.spare = False, False, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        seen = y.view(-1)
        if self.spare:
            torch.zeros(3).sum(), y.exp(), y[:]
        z = torch.relu_(y) if self.in_place else torch.relu(y)
        return z.view(-1) if self.late else z.view(-1) + seen


def _overwriting(recorded: dict[str, bool], run: dict[str, bool]) -> tuple[Any, nn.Module]:
    model = Overwrites().eval()
    for key, value in recorded.items():
        setattr(model, key, value)
    graph = fl.load(model, torch.randn(2, 6), static=True)
    twin = copy.deepcopy(model)
    for key, value in run.items():
        setattr(twin, key, value)
    return graph, twin


@pytest.mark.parametrize(
    ("recorded", "run", "same"),
    [
        ({}, {}, True),
        ({}, {"in_place": True}, False),  # the view sees what was written
        ({"in_place": True, "late": True}, {}, True),
        ({}, {"spare": True}, True),  # calls whose results nobody reads
        ({}, {"late": True}, False),
    ],
)
def test_following_tells_writes_and_calls_that_nobody_reads(
    recorded: dict[str, bool], run: dict[str, bool], same: bool
) -> None:
    graph, twin = _overwriting(recorded, run)
    assert follows(graph, twin, _tensors(graph, twin)) is same
    assert bool(replays(graph, twin, _tensors(graph, twin))) is same


def test_following_takes_calls_in_place_as_recorded() -> None:
    graph, twin = _both({})
    twin.eval()
    assert follows(graph, twin, _tensors(graph, twin))
    twin.slope = 0.2  # type: ignore[assignment]
    assert not follows(graph, twin, _tensors(graph, twin))


class Heads(nn.Module):
    """Attention over windows: three heads, of which one is left, beside a shift of three that has to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 3
        self.qkv = nn.Linear(12, 36)
        self.out = nn.Linear(12, 12)
        self.register_buffer("index", torch.arange(49) % 13)
        self.bias = nn.Parameter(torch.randn(13, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.bias[self.index].view(7, 7, -1).permute(2, 0, 1).contiguous()
        weight = (q @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1)
        return self.out((weight @ v).transpose(1, 2).reshape(b, n, -1))


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_chans, self.shift = 3, (3, 3)
        self.embed, self.inner, self.head = nn.Linear(3, 12), Heads(), nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.roll(self.embed(x), self.shift[0], 1)
        return self.head(self.inner(x).mean(1))


def test_one_head_left_of_as_many_as_a_shift_is_proved_by_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one head, ``contiguous`` has nothing to do and torch makes no call; the shift of 3 is no number of heads."""
    torch.manual_seed(0)
    monkeypatch.setattr("foldline.graph.fx.module.Check.__call__", lambda check, twin: "not asked by running")
    monkeypatch.setattr("foldline.graph.fx.module._exported", lambda graph, reason: pytest.fail(reason))
    model, x = Shifted().eval(), torch.randn(2, 7, 3)
    pruned = P.prune(model, x, ratio=0.67, atoms=["heads"], verify=False)
    assert type(pruned.model) is Shifted and pruned.model.inner.num_heads == 1
    assert pruned.model.shift == (3, 3) and pruned.model.in_chans == 3
    assert pruned.model.inner.bias.shape == (13, 1)
    masked = fl.load(pruned.model, x, static=True)
    with torch.no_grad():
        torch.testing.assert_close(pruned.model(x), torch.from_numpy(masked.run(masked.bind(x))[0][0].numpy()))
