"""PreCalibrate: strength 0 changes no bit; "auto" never raises the divergence of the quantized distribution."""

from __future__ import annotations

import numpy as np
import pytest
from foldline import Pipeline
from foldline import passes as P
from foldline.graph.errors import ConstraintError
from foldline.passes.base import Context
from foldline.passes.quantize.choices import narrowed
from foldline.passes.quantize.correct.pre_calibrate import _spread, divergence, shrunk
from foldline.passes.quantize.sensitivity.layers import layers
from support.quantized import WEIGHTS
from support.small_nets import conv_net, graph_of
from torch import nn


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_strength_zero_is_plain_rounding_bit_for_bit(front: str) -> None:
    model, batches = conv_net()
    graph = graph_of(model, batches[0], front)
    plain = Pipeline([P.Quantize(weight_bits=4)]).run(graph, batches[0], calibration=batches, verify=False).graph
    pipe = Pipeline([P.PreCalibrate(strength=0.0), P.Quantize(weight_bits=4)])
    same = pipe.run(graph, batches[0], calibration=batches, verify=False).graph
    assert sorted(plain.weights) == sorted(same.weights)
    for name, weight in plain.weights.items():
        assert weight.numpy().tobytes() == same.weights[name].numpy().tobytes()


def heavy_tailed() -> nn.Module:
    """Layers whose weights have heavy tails, as trained ones do."""
    model, _ = conv_net()
    rng = np.random.default_rng(0)
    for p in model.parameters():
        if p.dim() > 1:
            p.data.copy_(p.data.new_tensor(rng.standard_t(3, tuple(p.shape)) * 0.1))
    return model


@pytest.mark.parametrize("bits", [3, 4])
def test_auto_brings_each_layer_nearer_or_leaves_it(bits: int) -> None:
    _, batches = conv_net()
    graph = graph_of(heavy_tailed(), batches[0], "fx")
    before = {layer.weight.name: layer.data().copy() for layer in layers(graph)}
    form = narrowed(WEIGHTS, bits)
    outcome = P.PreCalibrate(bits=bits).apply(graph, Context())
    assert any(d.action == "shrunk" for d in outcome.decisions)
    for layer, decision in zip(layers(graph), outcome.decisions, strict=True):
        w = before[layer.weight.name]
        after = divergence(layer, w, layer.data(), form)
        assert after == pytest.approx(decision.data["kl_after"], rel=1e-6)
        if decision.action == "shrunk":
            assert after < divergence(layer, w, w, form)
            assert (np.abs(layer.data()) <= np.abs(w)).all() and (layer.data() * w >= 0).all()
        else:
            np.testing.assert_array_equal(layer.data(), w)


def test_the_formula_by_hand() -> None:
    w = np.array([2.0, -0.5, 0.1, 0.0, -1.0], dtype=np.float32)
    np.testing.assert_allclose(shrunk(w, 0.25), [1.875, 0.0, 0.0, 0.0, -0.75], atol=1e-7)
    np.testing.assert_allclose(_spread(np.array([1.25, 3.0]), np.array([2.75, 4.0]), 5), [0, 0.5, 0.5, 1, 0])


def test_nothing_to_shrink() -> None:
    _, batches = conv_net()
    with pytest.raises(ConstraintError, match="no layer stores"):
        P.PreCalibrate().apply(graph_of(nn.ReLU(), batches[0], "fx"), Context())
