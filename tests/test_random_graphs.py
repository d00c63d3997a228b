"""Property tests: on random graphs the three identities hold wherever an action is offered, on both front ends."""

from __future__ import annotations

import numpy as np
import pytest
from foldline.graph.actions import mask, permute, scale, select
from foldline.graph.execute import run_graph, synthesize_inputs
from foldline.graph.groups import axis_groups
from foldline.graph.ir import Graph
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.frontends import load
from support.random_nets import KINDS, random_net

COUNT = {"fx": 40, "onnx": 10}


def outputs(graph: Graph, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [np.asarray(o, dtype=np.float64) for o in run_graph(graph, inputs)[0]]


def close(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(
        x.shape == y.shape and np.abs(x - y).max() <= 2e-4 * max(np.abs(x).max(), 1e-3)
        for x, y in zip(a, b, strict=True)
    )


def check_identities(kinds: list[str], seed: int, front: str) -> None:
    module, inputs = random_net(kinds, seed)
    graph = load(module, inputs, front)
    rng = np.random.default_rng(seed)
    feeds = synthesize_inputs(graph, seed)
    original = outputs(graph, feeds)

    scaled = graph.clone()
    groups = axis_groups(scaled)
    scale(groups, {g: np.exp(rng.normal(0, 0.3, g.size)) for g in groups if g.can("scale")})
    assert close(original, outputs(scaled, feeds)), "scale changed the function"

    permuted = graph.clone()
    groups = axis_groups(permuted)
    permute(groups, {g: rng.permutation(g.size) for g in groups if g.can("permute")})
    assert close(original, outputs(permuted, feeds)), "permute changed the function"

    groups = axis_groups(graph)
    kept = {
        g: np.sort(rng.permutation(g.size)[: rng.integers(1, g.size + 1)])
        for g in groups
        if g.can("select") and g.exact
    }
    masked = outputs(mask(groups, kept), feeds)
    select(groups, kept)
    assert close(masked, outputs(graph, feeds)), "sliced is not masked"
    rest = axis_groups(graph)
    inexact = {g: np.arange(0, g.size, 2) for g in rest if g.can("select") and not g.exact}
    select(rest, inexact)
    assert [o.shape for o in outputs(graph, feeds)] == [o.shape for o in original]


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_identities_on_random_graphs(front: str) -> None:
    @settings(
        max_examples=COUNT[front],
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=7), st.integers(0, 2**16))
    def run(kinds: list[str], seed: int) -> None:
        check_identities(kinds, seed, front)

    run()
