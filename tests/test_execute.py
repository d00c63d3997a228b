"""Running graphs with taps, and inputs that are legal for what consumes them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from foldline.graph.errors import ConstraintError
from foldline.graph.execute import run_graph, synthesize_inputs, to_numpy
from foldline.graph.fx import load_torch
from foldline.graph.onnx import load_onnx
from torch import nn


def model(text: str):
    return load_onnx(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]>\n{text}'))


TINY = "g (float[n, 3] x) => (float[n, 3] y) <float[3] w = {1.0, 2.0, 3.0}> { h = Mul(x, w)  y = Relu(h) }"


def test_runs_onnx_with_taps_on_inner_values_weights_and_inputs() -> None:
    graph = model(TINY)
    x = np.array([[-1, 1, 2]], np.float32)
    outputs, taps = run_graph(graph, {"x": x}, ["h", "w", "x"])
    np.testing.assert_array_equal(outputs[0], [[0, 2, 6]])
    np.testing.assert_array_equal(taps["h"], [[-1, 2, 6]])
    np.testing.assert_array_equal(taps["w"], [1, 2, 3])
    np.testing.assert_array_equal(taps["x"], x)


def test_runs_torch_and_gives_numpy() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    x = torch.randn(2, 4)
    graph = load_torch(net, x)
    first = graph.nodes[0].output.name
    outputs, taps = run_graph(graph, {graph.inputs[0].name: x.numpy()}, [first])
    assert isinstance(outputs[0], np.ndarray)
    np.testing.assert_allclose(outputs[0], net(x).detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(np.maximum(taps[first], 0), outputs[0])


def test_wrong_names_are_refused() -> None:
    graph = model(TINY)
    with pytest.raises(ConstraintError, match=r"do not match[\s\S]*expected: x"):
        run_graph(graph, {"z": np.zeros((1, 3), np.float32)})
    with pytest.raises(ConstraintError, match="no such value"):
        run_graph(graph, {"x": np.zeros((1, 3), np.float32)}, ["nothing"])


def test_bfloat16_keeps_its_values() -> None:
    t = torch.tensor([1.5, -2.25], dtype=torch.bfloat16)
    assert to_numpy(t).dtype.name == "bfloat16"
    np.testing.assert_array_equal(to_numpy(t).astype(np.float32), t.float().numpy())


def test_same_seed_same_inputs() -> None:
    graph = model(TINY)
    one, two, three = (synthesize_inputs(graph, seed)["x"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, two)
    assert (one != three).all()


def test_indices_stay_inside_what_they_index_through_casts_and_offsets() -> None:
    graph = model(
        """g (int32[2, 64] ids, int64[2, 64] positions) => (float[2, 64, 2] y)
        <float[7, 2] table = {0,0,0,0,0,0,0,0,0,0,0,0,0,0}, float[9, 2] places = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0},
         int64 two = {2}>
        { wide = Cast<to = 7>(ids)  a = Gather(table, wide)
          later = Add(positions, two)  b = Gather(places, later)  y = Add(a, b) }"""
    )
    found = synthesize_inputs(graph)
    assert found["ids"].dtype == np.int32 and set(np.unique(found["ids"])) == set(range(7))
    assert set(np.unique(found["positions"])) == set(range(7))
    run_graph(graph, found)


def test_masks_are_prefixes_with_something_on_both_sides() -> None:
    graph = model(
        """g (float[3, 8] x, int64[3, 8] mask, bool[3, 8] hide) => (float[3, 8] y)
        <int64 zero = {0}, float low = {-1e9}>
        { m = Equal(mask, zero)  a = Where(m, low, x)  b = Where(hide, low, a)  y = Softmax<axis = -1>(b) }"""
    )
    found = synthesize_inputs(graph)
    for name in ("mask", "hide"):
        rows = found[name].astype(int)
        assert (np.diff(rows, axis=-1) <= 0).all(), "ones come first"
        assert rows[:, 0].all()
    assert found["mask"][0].all() and not found["mask"][1:].all()
    assert not found["hide"].all(1).any()


def test_free_booleans_are_random() -> None:
    graph = model("g (bool[40, 40] a) => (float[40, 40] y) { y = Cast<to = 1>(a) }")
    assert 0.4 < synthesize_inputs(graph)["a"].mean() < 0.6


def test_an_input_that_sets_a_size_is_not_guessed() -> None:
    graph = model("g (float[6] x, int64[2] shape) => (float[p, q] y) { y = Reshape(x, shape) }")
    with pytest.raises(ConstraintError, match=r"sets a size[\s\S]*value: shape"):
        synthesize_inputs(graph)


def test_a_transformer_gets_legal_inputs_from_torch_too() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            scores = (x @ x.transpose(1, 2)).masked_fill(mask[:, None] == 0, -1e9)
            return scores.softmax(-1) @ x

    net = Net().eval()
    graph = load_torch(net, (torch.zeros(2, 6, dtype=torch.int64), torch.ones(2, 6, dtype=torch.int64)))
    found = synthesize_inputs(graph)
    ids, mask = (found[v.name] for v in graph.inputs)
    assert ids.max() <= 10 and ids.max() > 1
    assert set(np.unique(mask)) == {0, 1}
    (y,), _ = run_graph(graph, found)
    assert np.isfinite(y).all()
