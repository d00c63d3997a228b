"""The cheap capture: a recorded call gives the groups and the pruned model that torch.export gives."""

from __future__ import annotations

from typing import Any

import foldline as fl
import numpy as np
import pytest
import torch
from foldline import passes as P
from foldline.graph.actions import apply_plan, permute
from foldline.graph.errors import ConstraintError
from foldline.graph.groups import AxisGroups
from support.toys import TOYS, toy
from torch import nn


def described(groups: AxisGroups) -> set[Any]:
    """Every group as where it occurs and what may be done to it."""
    return {
        (
            g.name,
            g.size,
            g.nested,
            g.exact,
            tuple(g.can(a) for a in ("select", "permute", "scale")),
            tuple(sorted((m.weight.name, m.axis, m.role) for m in g.members)),
        )
        for g in groups
    }


def is_recorded(graph: Any) -> bool:
    return graph.mode is None


@pytest.mark.parametrize("name", sorted(TOYS))
def test_groups_equal_those_of_the_exported_graph(name: str) -> None:
    model, inputs = toy(name)
    graph = fl.load(model, inputs, static=True)
    assert is_recorded(graph)
    assert described(fl.axis_groups(graph)) == described(fl.axis_groups(fl.load(model, inputs)))


@pytest.mark.parametrize("name", sorted(TOYS))
def test_pruned_model_equals_that_of_the_exported_graph(name: str) -> None:
    model, inputs = toy(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        result = P.prune(model, inputs, ratio=0.4, verify=False)
    except ConstraintError as error:
        assert "nothing was pruned" in str(error)
        return
    assert is_recorded(result.graph)
    other = apply_plan(model, result.plan, inputs)
    with torch.no_grad():
        got, want = result.model(*inputs), other(*inputs)
        doubled = [torch.cat([x, x]) for x in inputs]
        leaves = torch.utils._pytree.tree_leaves
        for a, b in zip(leaves(got), leaves(want), strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(leaves(result.model(*doubled)), leaves(other(*doubled)), strict=True):
            torch.testing.assert_close(a, b)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_verify_runs_on_the_recorded_graph() -> None:
    model, inputs = toy("residual_cnn")
    result = P.prune(model, inputs, ratio=0.4)
    assert is_recorded(result.graph)
    assert result.report.passes[0].details["identity"]["relative_error"] < 1e-5


class Writes(nn.Module):
    """Writes into a view of what it computed: torch.export can spell that out, a recorder cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x).relu()
        h[:, 0].mul_(2)
        return self.b(h)


def test_what_cannot_be_recorded_is_exported() -> None:
    graph = fl.load(Writes().eval(), (torch.randn(2, 6),), static=True)
    assert not is_recorded(graph)
    assert len(fl.axis_groups(graph)) >= 1


class Baked(nn.Module):
    """A size in the code: only a traced graph can express the pruned model."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x).reshape(x.shape[0], 2, 6).relu()
        return self.b(h.reshape(x.shape[0], 12))


def test_a_class_that_cannot_express_the_cut_is_exported_after_all() -> None:
    torch.manual_seed(0)
    model, x = Baked().eval(), torch.randn(2, 6)
    result = P.prune(model, (x,), ratio=0.5, verify=True)
    assert isinstance(result.model, torch.fx.GraphModule)
    assert any("GraphModule" in n for n in result.graph.notes)
    kept = result.plan.weights["a.weight"][0]
    with torch.no_grad():
        hidden = model.a(x).relu()[:, kept]
        want = hidden @ model.b.weight[:, kept].T + model.b.bias
        torch.testing.assert_close(result.model(x), want)
        assert result.model(torch.randn(5, 6)).shape == (5, 3)


def test_only_selections_can_leave_the_class_of_a_recorded_call() -> None:
    model, x = Baked().eval(), torch.randn(2, 6)
    graph = fl.load(model, (x,), static=True)
    groups = fl.axis_groups(graph)
    permute(groups, {g: np.arange(g.size)[::-1] for g in groups if g.can("permute")})
    fl.axis_groups(graph)
    torch.testing.assert_close(graph.to_model()(x), model(x))  # a permutation changes no size: the class still fits
    graph.insert("relu", [graph.outputs[0]], name="extra", after=graph.nodes[-1])
    graph.replace_uses(graph.outputs[0], graph.nodes[-1].output)
    with pytest.raises(ConstraintError, match="static=True"):
        graph.to_model()


def test_the_model_is_left_as_it_was() -> None:
    model, inputs = toy("residual_cnn")
    model.train()
    keys = {n: set(m.__dict__) for n, m in model.named_modules()}
    P.prune(model, inputs, ratio=0.4, verify=False)
    assert model.training and all(m.training for m in model.modules())
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Caches(nn.Module):
    """Keeps a result of its weights by device, as some attention biases are kept in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gain = nn.Linear(6, 8), nn.Linear(8, 3), nn.Parameter(torch.rand(8) + 0.5)
        self.cache: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key = str(x.device)
        if key not in self.cache:
            self.cache[key] = self.gain * 2
        return self.b(self.a(x) * self.cache[key])


def test_what_a_module_cached_before_is_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> nn.Module:
        raise AssertionError("no export is needed for this")

    monkeypatch.setattr("foldline.graph.fx.module._exported", refuse)
    torch.manual_seed(0)
    model, x = Caches().eval(), torch.randn(2, 6)
    with torch.no_grad():
        model(x)
        result = P.prune(model, (x,), ratio=0.5, verify=True)
        assert type(result.model) is Caches and result.model(x).shape == (2, 3)
        kept = result.plan.weights["a.weight"][0]
        hidden = (model.a(x) * model.cache["cpu"])[:, kept]
        torch.testing.assert_close(result.model(x), hidden @ model.b.weight[:, kept].T + model.b.bias)
    assert set(model.cache) == {"cpu"} and len(model.cache["cpu"]) == 8


def test_the_modules_that_a_call_makes_for_itself_die_with_it() -> None:
    """Without a search for cycles: the stand-in on meta tensors and what a configuration builds are a model each."""
    import gc

    from support.timm_models import transformers

    library = transformers()
    config = library.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=50
    )
    model = library.BertForSequenceClassification(config).eval()
    call = {"input_ids": torch.randint(2, 50, (2, 6))}
    P.prune(model, call, ratio=0.5, verify=False)
    gc.collect()

    def layers() -> int:
        return sum(issubclass(type(x), nn.Module) for x in gc.get_objects())

    before = layers()
    gc.disable()
    try:
        result = P.prune(model, call, ratio=0.5, verify=False)
        assert layers() - before == sum(1 for _ in result.model.modules())
    finally:
        gc.enable()
