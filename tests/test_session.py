"""Pruning by hand: scores, previews, undo, the same result as the pass; and why any axis was kept, frozen or cut."""

from __future__ import annotations

from typing import Any

import foldline as fl
import numpy as np
import pytest
import torch
from foldline import passes as P
from foldline.graph.errors import ConfigError, ConstraintError
from support.frontends import exported
from support.toys import toy

FRONTS = ["fx", "onnx"]


def given(front: str, name: str = "residual_cnn") -> tuple[Any, Any]:
    model, x = toy(name)
    return (model, x) if front == "fx" else (exported(model, x), x)


def totals(cost: Any) -> tuple[int, int, int]:
    return cost.parameters, cost.bytes, cost.macs


def outputs(model: Any, x: Any) -> np.ndarray:
    graph = fl.load(model, x)
    return np.asarray(fl.run_graph(graph, graph.bind(x))[0][0])


@pytest.mark.parametrize("front", FRONTS)
def test_choices_cost_and_result(front: str) -> None:
    model, x = given(front)
    session = fl.PruneSession(model, x)
    before = totals(session.cost())
    assert before == totals(fl.cost(fl.load(model, x)))
    choice = max(session, key=lambda c: c.size)
    assert choice.scores is not None and choice.scores.shape == (choice.size,) and choice.members
    lowest = int(np.argmin(choice.scores))
    promised = totals(session.preview(choice.name, ratio=0.5))
    assert totals(session.cost()) == before and promised[2] < before[2]

    session.drop(choice.name, count=1)
    assert set(range(choice.size)) - set(session[choice.name].kept) == {lowest}
    session.drop(choice.name, [int(session[choice.name].kept[0])])
    assert len(session[choice.name].kept) == choice.size - 2
    session.drop(choice.name, ratio=0.5)
    assert totals(session.cost()) == totals(session.preview(choice.name, keep=session[choice.name].kept))
    assert choice.name in str(session) and f"{len(session[choice.name].kept)}/{choice.size}" in str(session)

    original = outputs(model, x)
    result = session.apply()
    assert totals(fl.cost(result.graph)) == totals(session.cost())
    assert result.plan.to_json() == session.plan().to_json()
    assert result.report.passes[0].details["identity"]["relative_error"] < 1e-4
    assert type(result.model) is type(model) or front == "onnx"
    again = fl.apply_plan(model, session.plan(), x)
    assert np.allclose(outputs(result.model, x), outputs(again, x), atol=1e-6)
    assert np.array_equal(outputs(model, x), original)


@pytest.mark.parametrize("front", FRONTS)
def test_undo_restore_and_every_group(front: str) -> None:
    model, x = given(front)
    session = fl.PruneSession(model, x, atoms="outer")
    start = totals(session.cost())
    names = [c.name for c in session]
    assert len(names) == len(session) > 1
    for name in names:
        session.drop(name, ratio=0.5)
    everything = totals(session.cost())
    result = P.prune(model, x, ratio=0.5)
    assert totals(fl.cost(result.graph)) == everything
    assert result.plan.to_json() == session.plan().to_json()
    session.undo().restore(names[0])
    assert len(session[names[0]].kept) == session[names[0]].size
    assert len(session[names[-1]].kept) == session[names[-1]].size
    session.undo()
    for _ in names[:-1]:
        session.undo()
    assert totals(session.cost()) == start
    with pytest.raises(ConstraintError, match="nothing to undo"):
        session.undo()
    with pytest.raises(ConstraintError, match="nothing was chosen"):
        session.apply()


@pytest.mark.parametrize("front", FRONTS)
def test_bad_choices_change_nothing(front: str) -> None:
    model, x = given(front)
    session = fl.PruneSession(model, x)
    name = next(iter(session)).name
    size = session[name].size
    frozen = next(g for g in session.groups if not g.can("select"))
    cases = [
        (lambda: session.keep(name, []), "would vanish"),
        (lambda: session.drop(name, range(size)), "would vanish"),
        (lambda: session.drop(name, count=size), "would vanish"),
        (lambda: session.drop(name, ratio=1.0), "out of range"),
        (lambda: session.keep(name, [size]), "out of range"),
        (lambda: session.drop(name, [-1]), "out of range"),
        (lambda: session.drop(name), "exactly one"),
        (lambda: session.keep("nothing", [0]), "no such axis group"),
        (lambda: session.keep(frozen.name, [0]), "cannot be cut"),
        (lambda: fl.PruneSession(model, x, ignore=["nothing*"]), "matches nothing"),
    ]
    for act, message in cases:
        with pytest.raises(ConstraintError, match=message):
            act()
    assert not session.plan()
    with pytest.raises(ConstraintError) as caught:
        session.keep(frozen.name, [0])
    assert caught.value.found and caught.value.found in f"frozen: {frozen.why()}"
    with pytest.raises(ConfigError, match="criterion"):
        fl.PruneSession(model, x, criterion="l3")


def test_in_place_and_criteria() -> None:
    model, x = given("fx")
    session = fl.PruneSession(model, x, criterion=lambda g, _: np.arange(g.size), ignore=["stem*"])
    name = next(c.name for c in session if c.size > 3)
    session.drop(name, count=2)
    assert session[name].kept == tuple(range(2, session[name].size))
    with pytest.raises(ConstraintError, match="cannot be cut") as caught:
        session.keep("stem.0.weight:0", [0])
    assert "ignored" in str(caught.value.found)
    result = session.apply(inplace=True)
    assert result.model is model
    weight, axis = name.rsplit(":", 1)
    assert dict(model.named_parameters())[weight].shape[int(axis)] == session[name].size - 2
    assert model(*x).shape


def test_heads_by_hand() -> None:
    model, x = toy("grouped_query_rope")
    session = fl.PruneSession(model, x)
    found = next(c for c in session if c.kind in ("heads", "kv_groups"))
    result = session.drop(found.name, count=1).apply()
    assert result.model(*x).shape == model(*x).shape
    assert len(session[found.name].kept) == found.size - 1


# ---- why ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("front", FRONTS)
def test_every_axis_is_explained_before_and_after(front: str) -> None:
    model, x = given(front)
    graph = fl.load(model, x)
    groups = fl.axis_groups(graph)
    cut = next(g for g in groups if g.can("select") and g.size > 3)
    frozen = next(g for g in groups if not g.can("select") and g.size > 1)
    spared = [g for g in groups if g.can("select") and g is not cut][-1]
    pattern = spared.members[0].weight.name
    result = P.prune(model, x, ratio=0.5, ignore=[pattern])
    for g in groups:
        for m in g.members:
            said = groups.explain(m.weight.name, m.axis)
            assert m.label in said and g.name in said
            assert ("select: free" in said) if g.can("select") else (f"frozen: {g.why()}" in said)
    assert f"kept {cut.size // 2} of {cut.size} by l2" in result.report.explain(cut.name)
    assert f"frozen: {frozen.why()}" in result.report.explain(frozen.name)
    assert f"ignored by {pattern!r}" in result.report.explain(pattern)
    for g, word in ((cut, "cut"), (frozen, "kept"), (spared, "kept")):
        for m in g.members:
            text = result.report.explain(m.weight.name)
            assert f": {word}, because" in text, (m.label, text)
    m = cut.members[0]
    assert f"axis {m.axis} keeps {cut.size // 2} of {cut.size}" in result.report.explain(m.weight.name)
    with pytest.raises(ConstraintError, match="knows this name"):
        result.report.explain("nothing.at.all")
    with pytest.raises(ConstraintError, match="no such layer"):
        groups.explain("nothing.at.all")


@pytest.mark.parametrize("front", FRONTS)
def test_a_session_explains_its_choices(front: str) -> None:
    model, x = given(front)
    session = fl.PruneSession(model, x)
    choice = next(c for c in session if c.size > 3)
    session.drop(choice.name, ratio=0.5)
    weight = choice.members[0].rsplit("[", 1)[0]
    assert f"{choice.name}: keeps {choice.size // 2} of {choice.size} here" in session.explain(weight)
    frozen = next(g for g in session.groups if not g.can("select") and g.size > 1)
    assert f"kept: frozen: {frozen.why()}" in session.explain(frozen.name)
    text = session.apply().report.explain(weight)
    assert "by the plan" in text


def test_layers_explain_module_paths() -> None:
    model, x = toy("residual_cnn")
    result = P.prune(model, x, ratio=0.5)
    text = result.report.explain("a1.0")
    assert "a1.0.weight" in text and "cut" in text
    assert torch.is_tensor(result.model(*x))


def test_groups_are_known_by_any_member() -> None:
    model, x = toy("residual_cnn")
    g = next(g for g in fl.axis_groups(fl.load(model, x)) if "short.0.weight[0]" in [m.label for m in g.members])
    names = [f"{m.weight.name}:{m.axis}" for m in g.members]
    assert len(names) > 2
    for name in names:
        plan = P.prune(model, x, ratio=0.5, ignore=[name]).plan
        assert plan.weights and 0 not in plan.axes("short.0.weight")
