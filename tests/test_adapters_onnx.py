"""Adapters in ONNX graphs: branches of nodes that preserve the function, run, and fold into the weights again."""

from __future__ import annotations

from typing import Any

import foldline as fl
import numpy as np
import onnx
import pytest
import torch
from foldline import passes as P
from foldline.passes.adapters import Entry, NotFoldable, View, kind_of
from foldline.passes.adapters.adapter import merged_weight
from support.frontends import exported
from torch import nn

X = np.random.default_rng(0).standard_normal((2, 3, 12, 12)).astype(np.float32)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)
        self.back = nn.ConvTranspose2d(12, 6, 3, stride=2, groups=3, output_padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.grouped(torch.relu(self.depthwise(self.conv(x))))
        return self.head(self.back(h).mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return exported(Net().eval(), (torch.from_numpy(X),))


def run(model: Any, **more: np.ndarray) -> np.ndarray:
    graph = fl.load(model)
    names = [v.name for v in graph.inputs]
    inputs = {name: more.get(name.rpartition(".")[2], X) for name in names}
    return np.asarray(graph.run(inputs)[0][0])  # type: ignore[attr-defined]


def moved(model: Any, which: tuple[str, ...] = ()) -> Any:
    """Every tensor of the adapters changed, or those of these names."""
    graph, rng = fl.load(model).clone(), np.random.default_rng(1)
    for name, weight in list(graph.weights.items()):
        if ".adapter" in name and (not which or name.endswith(which)):
            data = weight.numpy()
            graph.set_weight(weight, (data + 0.3 * rng.standard_normal(data.shape)).astype(data.dtype))
    return graph.to_model()


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.float64) - b).max() / np.abs(b).max())


@pytest.mark.parametrize(
    "kind", ["lora", "gated_lora", "adalora", "triangular_lora", "concept_lora", "xs", "ia3", "ssf"]
)
def test_branches_are_the_identity_at_first_and_fold_when_trained(kind: str, model: onnx.ModelProto) -> None:
    before = model.SerializeToString()
    rank = {"rank": 2} if "rank" in kind_of(kind).defaults else {}
    result = P.insert_adapter(model, kind=kind, options=rank)
    assert isinstance(result.model, onnx.ModelProto) and model.SerializeToString() == before
    onnx.checker.check_model(result.model)
    assert relative(run(result.model), run(model)) < 1e-6
    tuned = moved(result.model)
    want = run(tuned)
    assert relative(want, run(model)) > 1e-2
    folded = P.fold(tuned).model
    assert relative(run(folded), want) < 1e-5
    assert len(folded.graph.node) <= len(model.graph.node) + (3 if kind not in ("ia3", "ssf") else 0)
    assert [i.name for i in folded.graph.input] == [i.name for i in model.graph.input]


@pytest.mark.parametrize("target", ["conv", "depthwise", "grouped", "back", "head"])
def test_a_branch_is_the_merged_weight(target: str, model: onnx.ModelProto) -> None:
    """The registry's formula and the nodes say the same, for every kind of convolution."""
    options = {"rank": 2, "scale": 0.5}
    start = P.insert_adapter(model, kind="gated_lora", targets=[target], options=options).model
    tuned = moved(start, (".B", ".gate"))
    graph = fl.load(tuned)
    stored = {k: graph.weight(f"{target}.adapter.{k}").numpy() for k in ("A", "B", "gate")}
    a, b = stored["A"], stored["B"]
    if target == "back":
        a = a[: a.shape[0] // 3].swapaxes(0, 1)
    a, b = (a.T, b.T) if target == "head" else (a[:2].reshape(2, -1), b.reshape(b.shape[0], -1))
    view = View(target == "back", getattr(Net().get_submodule(target), "groups", 1))
    entry = Entry(f"{target}.weight", "gated_lora", {"A": a, "B": b, "gate": stored["gate"]}, options, view)
    base = fl.load(model).clone()
    new, _ = merged_weight(base.weight(f"{target}.weight").numpy(), None, entry)
    base.set_weight(base.weight(f"{target}.weight"), new.astype(np.float32))
    assert relative(run(base.to_model()), run(tuned)) < 1e-5 < relative(run(tuned), run(model))


def test_gates_that_come_with_the_call_are_inputs_and_do_not_fold(model: onnx.ModelProto) -> None:
    options = {"count": 2, "dynamic": True}
    result = P.insert_adapter(model, kind="concept_lora", targets=["conv"], options=options, verify=False)
    tuned = moved(result.model)
    names = [i.name for i in tuned.graph.input]
    assert len(names) == 2 and names[1].endswith("gate")
    off, one = run(tuned, gate=np.zeros(2, np.float32)), run(tuned, gate=np.array([1, 0], np.float32))
    two = run(tuned, gate=np.array([0, 1], np.float32))
    assert relative(off, run(model)) < 1e-6 and relative(one, off) > 1e-3 and relative(one, two) > 1e-3
    folded = P.fold(tuned).model
    assert [i.name for i in folded.graph.input] == names
    assert (
        relative(run(folded, gate=np.array([0.5, 2], np.float32)), run(tuned, gate=np.array([0.5, 2], np.float32)))
        < 1e-5
    )


def test_an_adapter_trained_in_torch_merges_into_the_exported_file() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2)).eval()
    tuned = P.insert_adapter(net, kind="dora", rank=2).model
    with torch.no_grad():
        for p in tuned.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    adapter, file = P.adapter_of(tuned), exported(net, (torch.from_numpy(X),))
    merged = P.merge_adapter(file, adapter)
    with torch.no_grad():
        want = tuned(torch.from_numpy(X)).numpy()
    assert relative(run(merged.model), want) < 1e-5 and len(merged.model.graph.node) == len(file.graph.node)
    back = {t.name: onnx.numpy_helper.to_array(t) for t in merged.unmerge().graph.initializer}
    assert all(np.array_equal(back[t.name], onnx.numpy_helper.to_array(t)) for t in file.graph.initializer)
    with pytest.raises(fl.ConstraintError, match="already"):
        P.merge_adapter(merged.model, adapter)
    with pytest.raises(fl.ConstraintError, match="P.Fold"):
        P.merge_adapter(file)


def test_weights_that_an_exporter_transposed_and_renamed_are_found_by_their_layer() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)).eval()
    x = torch.randn(2, 3, 6)
    file = exported(net, (x,))
    assert "2.weight" not in {t.name for t in file.graph.initializer}
    tuned = P.insert_adapter(net, kind="dora", rank=2, options={"per": "in"}).model
    with torch.no_grad():
        for p in tuned.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
        want = tuned(x).numpy()
    merged = P.merge_adapter(file, P.adapter_of(tuned))
    feed = {file.graph.input[0].name: x.numpy()}
    assert relative(np.asarray(fl.load(merged.model).run(feed)[0][0]), want) < 1e-5  # type: ignore[attr-defined]
    back = {t.name: onnx.numpy_helper.to_array(t) for t in merged.unmerge().graph.initializer}
    assert all(np.array_equal(back[t.name], onnx.numpy_helper.to_array(t)) for t in file.graph.initializer)
    with pytest.raises(fl.ConstraintError, match="already"):
        P.merge_adapter(merged.model, P.adapter_of(tuned))
    with torch.no_grad():
        net[3].weight.copy_(net[2].weight)  # equal tensors are stored once
    twice = exported(net, (x,))
    assert len(twice.graph.initializer) < len(file.graph.initializer)
    only = P.insert_adapter(net, kind="lora", rank=2, targets=["2"]).model
    with pytest.raises(fl.ConstraintError, match="another layer"):
        P.merge_adapter(twice, P.adapter_of(only))


def test_bad_input_is_refused_by_name(model: onnx.ModelProto) -> None:
    with pytest.raises(fl.ConstraintError, match="no branch"):
        P.insert_adapter(model, kind="dora")
    with pytest.raises(fl.ConfigError, match="no weight"):
        P.insert_adapter(model, kind="lora", targets=["nothing"])
    with pytest.raises(fl.ConstraintError, match="start product"):
        P.insert_adapter(model, kind="lora", init="svd", options={"rank": 2}, targets=["conv"])
    with pytest.raises(NotFoldable):
        P.merge_adapter(model, P.Adapter([Entry("head.weight", "bottleneck", {}, {})]))


def test_bottlenecks_behind_linear_ops() -> None:
    torch.manual_seed(0)
    file = exported(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval(), (torch.randn(3, 6),))
    result = P.insert_adapter(file, kind="bottleneck", options={"rank": 3, "activation": "gelu"})
    x = {result.graph.inputs[0].name: np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)}
    before, after = (np.asarray(fl.load(m).run(x)[0][0]) for m in (file, moved(result.model)))  # type: ignore[attr-defined]
    assert result.report.passes[0].comparison["ok"] and relative(after, before) > 1e-2
