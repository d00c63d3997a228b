"""load_pruned: a fresh process builds the unpruned model and gets the pruned one, checked, without a pass or trace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import foldline as fl
import pytest
import torch
from foldline import passes as P
from foldline.graph.errors import ConfigError, ConstraintError, ModelFileError
from support.frontends import exported
from support.toys import TOYS, toy
from torch import nn

NETS = '''"""Models that a fresh process builds with their original sizes."""
import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim=16, heads=4):
        super().__init__()
        self.heads, self.width = heads, dim // heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, n, self.heads * self.width))


class Net(nn.Module):
    """Tied weights, an attention with its own sizes, an LSTM, a batch norm, a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 16)
        self.attention = Attention()
        self.lstm = nn.LSTM(16, 12, batch_first=True)
        self.back = nn.Linear(12, 16)
        self.conv = nn.Conv1d(16, 24, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm1d(24)
        self.down = nn.Conv1d(24, 16, 1)
        self.out = nn.Linear(16, 13, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("gate", torch.linspace(0.5, 1, 24).view(24, 1), persistent=False)

    def forward(self, ids):
        h = self.embed(ids)
        h = h + self.attention(h)
        h = h + self.back(self.lstm(h)[0])
        c = torch.relu(self.bn(self.conv(h.transpose(1, 2)))) * self.gate
        return self.out(h + self.down(c).transpose(1, 2))


class Fixed(nn.Module):
    """A width written into its forward: pruning it gives a graph."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)).view(-1, 8))


def make(seed=0):
    torch.manual_seed(seed)
    return Net().eval(), (torch.arange(10).view(2, 5),)


def fixed(seed=0):
    torch.manual_seed(seed)
    return Fixed().eval(), (torch.linspace(-1, 1, 18).view(3, 6),)
'''

FRESH = """
import sys, time, torch, foldline as fl, prunednets
torch.set_num_threads(int(sys.argv[3]))
model, x = getattr(prunednets, sys.argv[1])(seed=5)
start = time.perf_counter()
small = fl.load_pruned(model, "out", *([x] if sys.argv[2] == "x" else []))
seconds = time.perf_counter() - start
loaded = [m for m in sys.modules if m.startswith("foldline.passes.prune") or m.startswith("foldline.graph.analysis")]
graph = isinstance(small, torch.fx.GraphModule)
torch.save((small(*x), graph, loaded, seconds, model(*x), small.state_dict()), "found.pt")
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "prunednets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import prunednets

    yield prunednets
    sys.modules.pop("prunednets", None)


@pytest.mark.parametrize("name", ["make", "fixed"])
def test_a_fresh_process_loads_the_pruned_model(nets: Any, tmp_path: Path, name: str) -> None:
    model, x = getattr(nets, name)()
    result = P.prune(model, x, ratio=0.5)
    result.save("out")
    assert isinstance(result.model, torch.fx.GraphModule) == (name == "fixed")
    threads = str(torch.get_num_threads())  # sums over other numbers of threads are rounded otherwise
    call = [sys.executable, "-c", FRESH, name, "-" if name == "make" else "x", threads]
    subprocess.run(call, check=True, cwd=tmp_path)
    found, graph, loaded, seconds, unpruned, state = torch.load(tmp_path / "found.pt")
    held = result.model.state_dict()
    assert list(state) == list(held) and all(torch.equal(state[n], t) for n, t in held.items())
    assert torch.equal(found, result.model(*x))
    assert graph == (name == "fixed")
    if name == "make":
        assert not loaded or all("analysis" in m for m in loaded), loaded
        assert seconds < 5
    assert torch.equal(unpruned, getattr(nets, name)(seed=5)[0](*x))


def test_ties_flags_and_sizes_come_back(nets: Any) -> None:
    model, x = nets.make()
    model.back.weight.requires_grad_(False)
    result = P.prune(model, x, ratio=0.5)
    result.save("out")
    fresh, _ = nets.make(3)
    fresh.back.weight.requires_grad_(False)
    small = fl.load_pruned(fresh, "out")
    assert small.out.weight is small.embed.weight and not small.back.weight.requires_grad
    assert small.attention.heads == result.model.attention.heads < 4
    assert small.lstm.hidden_size == result.model.lstm.hidden_size == 6
    assert small.gate.shape == (12, 1) and torch.equal(small.gate, result.model.gate)
    assert all(a.data_ptr() != b.data_ptr() for a in small.parameters() for b in fresh.parameters())
    assert fresh.attention.heads == 4 and fresh.out.weight.shape == (13, 16)
    small.train()(*x).sum().backward()
    assert repr(small) == repr(result.model)


def test_a_model_pruned_in_place_and_folded_ones(nets: Any) -> None:
    model, x = nets.make()
    with torch.no_grad():
        model.bn.running_mean.uniform_(-1, 1)
    result = fl.Pipeline([P.Fold(), P.Prune(ratio=0.5)]).run(model, x, inplace=True)
    result.save("out")
    small = fl.load_pruned(nets.make(2)[0], "out")
    assert isinstance(small.bn, nn.Identity) and small.conv.bias is not None
    assert torch.equal(small(*x), model(*x))


def test_the_first_mismatch_is_named(nets: Any, tmp_path: Path) -> None:
    model, x = nets.make()
    P.prune(model, x, ratio=0.5).save("out")
    other, _ = nets.make()
    other.conv = nn.Conv1d(16, 20, 3, padding=1, bias=False)
    with pytest.raises(ConstraintError, match="other sizes") as caught:
        fl.load_pruned(other, "out")
    assert caught.value.node == "conv.weight"
    other, _ = nets.make()
    other.bn = nn.GroupNorm(2, 24)
    with pytest.raises(ConstraintError, match="not the one that was pruned") as caught:
        fl.load_pruned(other, "out")
    assert caught.value.node == "bn" and caught.value.expected == "BatchNorm1d"
    other, _ = nets.make()
    other.extra = nn.Linear(2, 2)
    with pytest.raises(ConstraintError, match="lack one") as caught:
        fl.load_pruned(other, "out")
    assert caught.value.node == "extra.weight"
    with pytest.raises(ConstraintError, match="not the one") as caught:
        fl.load_pruned(nets.fixed()[0], "out")
    with pytest.raises(ConfigError, match="no saved module"):
        fl.load_pruned(model, tmp_path)
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    plan["weights"]["conv.weight"]["0"] = [1, 2]
    (tmp_path / "out" / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ConstraintError, match="does not fit") as caught:
        fl.load_pruned(nets.make()[0], "out")
    assert caught.value.node == "conv.weight"
    (tmp_path / "out" / "structure.json").write_text("{}")
    with pytest.raises(ModelFileError, match="structure"):
        fl.load_pruned(nets.make()[0], "out")


def test_graphs_need_example_inputs_and_onnx_needs_nothing(nets: Any, tmp_path: Path) -> None:
    model, x = nets.fixed()
    P.prune(model, x, ratio=0.5).save("out")
    with pytest.raises(ConfigError, match="applied again"):
        fl.load_pruned(nets.fixed(1)[0], "out")
    P.prune(exported(model, x), x, ratio=0.5).save("onnx")
    with pytest.raises(ConfigError, match="no saved module") as caught:
        fl.load_pruned(model, "onnx")
    assert "fl.load" in str(caught.value.hint)
    assert fl.load(tmp_path / "onnx" / "model.onnx").kind == "onnx"


@pytest.mark.parametrize("name", sorted(TOYS))
def test_every_toy_comes_back(name: str, tmp_path: Path) -> None:
    model, x = toy(name)
    try:
        result = P.prune(model, x, ratio=0.5, verify=False)
    except ConstraintError:
        pytest.skip("nothing to prune")
    with torch.no_grad():
        expected = result.model(*x)
    (result.save(tmp_path / "out") / "model.pt").unlink(missing_ok=True)
    fresh, _ = toy(name)
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
        found = fl.load_pruned(fresh, tmp_path / "out", x)(*x)
    first = [t for t in torch.utils._pytree.tree_leaves(expected) if isinstance(t, torch.Tensor)]
    second = [t for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, torch.Tensor)]
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
