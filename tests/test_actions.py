"""The three identities on every toy, from both front ends: select = masked original, permute and scale = original."""

from __future__ import annotations

import numpy as np
import pytest
from foldline.graph.actions import mask, permute, scale, select
from foldline.graph.execute import run_graph, synthesize_inputs
from foldline.graph.groups import AxisGroup, AxisGroups, axis_groups
from foldline.graph.ir import Graph
from support.frontends import FRONT_ENDS, toy_graph
from support.toys import TOYS

pytestmark = pytest.mark.parametrize("front", FRONT_ENDS)
RNG = np.random.default_rng(0)


def outputs(graph: Graph, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [np.asarray(o, dtype=np.float64) for o in run_graph(graph, inputs)[0]]


def assert_same(a: list[np.ndarray], b: list[np.ndarray], tolerance: float = 2e-5) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        assert np.isfinite(x).all()
        assert np.abs(x - y).max() <= tolerance * max(np.abs(x).max(), 1e-6)


def some_indices(groups: AxisGroups, seed: int, only: AxisGroup | None = None) -> dict[AxisGroup, np.ndarray]:
    """About 60% of every selectable, exact group (or of one)."""
    rng = np.random.default_rng(seed)
    kept = {}
    for g in groups:
        if g.can("select") and g.exact and (only is None or g is only):
            n = max(1, round(0.6 * g.size))
            kept[g] = np.sort(rng.permutation(g.size)[:n])
    return kept


@pytest.mark.parametrize("name", sorted(TOYS))
def test_select_equals_masked(name: str, front: str) -> None:
    graph = toy_graph(name, front)
    groups = axis_groups(graph)
    kept = some_indices(groups, 1)
    if not kept:
        assert all(g.why("select") or not g.exact for g in groups), "nothing selectable and no reason given"
        return
    inputs = synthesize_inputs(graph, 3)
    expected = outputs(mask(groups, kept), inputs)
    before = sum(w.size for w in graph.weights.values())
    plan = select(groups, kept)
    assert plan and sum(w.size for w in graph.weights.values()) < before
    assert_same(expected, outputs(graph, inputs))
    assert axis_groups(graph) is not None


@pytest.mark.parametrize("name", sorted(TOYS))
def test_select_each_group_alone(name: str, front: str) -> None:
    probe = axis_groups(toy_graph(name, front))
    inputs = synthesize_inputs(probe.graph, 5)
    names = [g.name for g in probe if g.can("select") and g.exact]
    for at, g in enumerate(names[:4]):
        graph = toy_graph(name, front)
        groups = axis_groups(graph)
        kept = some_indices(groups, at, groups[g])
        expected = outputs(mask(groups, kept), inputs)
        select(groups, kept)
        assert_same(expected, outputs(graph, inputs))


@pytest.mark.parametrize("name", sorted(TOYS))
def test_permute_keeps_the_function(name: str, front: str) -> None:
    graph = toy_graph(name, front)
    inputs = synthesize_inputs(graph, 7)
    expected = outputs(graph, inputs)
    groups = axis_groups(graph)
    rng = np.random.default_rng(11)
    permute(groups, {g: rng.permutation(g.size) for g in groups if g.can("permute")})
    assert_same(expected, outputs(graph, inputs), 1e-4)


@pytest.mark.parametrize("name", sorted(TOYS))
def test_scale_keeps_the_function(name: str, front: str) -> None:
    graph = toy_graph(name, front)
    inputs = synthesize_inputs(graph, 13)
    expected = outputs(graph, inputs)
    groups = axis_groups(graph)
    rng = np.random.default_rng(17)
    scale(groups, {g: np.exp(rng.normal(0, 0.5, g.size)) for g in groups if g.can("scale")})
    assert_same(expected, outputs(graph, inputs), 1e-4)
