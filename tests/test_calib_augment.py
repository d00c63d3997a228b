"""CalibAugment: without steps nothing changes, bit for bit; learned transforms lower the error on the originals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from foldline import Pipeline
from foldline import passes as P
from foldline.graph.errors import ConstraintError
from foldline.passes.base import Context
from foldline.passes.quantize.correct.calib_augment import CalibAugment, _Bilevel
from support.small_nets import Mlp, conv_net, graph_of


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_identity_is_plain_quantization_bit_for_bit(front: str) -> None:
    model, batches = conv_net()
    graph = graph_of(model, batches[0], front)
    options: dict[str, Any] = {"calibration": batches, "verify": False}
    plain = Pipeline([P.Quantize(ranges="mse")]).run(graph, batches[0], **options).graph
    same = Pipeline([P.CalibAugment(steps=0), P.Quantize(ranges="mse")]).run(graph, batches[0], **options).graph
    assert sorted(plain.weights) == sorted(same.weights)
    for name, weight in plain.weights.items():
        assert weight.numpy().tobytes() == same.weights[name].numpy().tobytes()
    learned = _Bilevel(graph, list(graph.inputs), CalibAugment())
    bound = graph.bind(batches[0])
    for name, x in learned.transformed(bound).items():
        np.testing.assert_array_equal(x, bound[name])  # the transform starts as the identity


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_both_levels_learn_and_the_passes_after_it_see_more_batches(front: str) -> None:
    model, batches = conv_net()
    graph = graph_of(model, batches[0], front)
    state = {n: w.numpy().tobytes() for n, w in graph.weights.items()}
    found = []
    for _ in range(2):
        ctx = Context(calibration=batches[:2])
        outcome = CalibAugment(steps=12, bits=3).apply(graph, ctx)
        assert outcome.details["last_loss"] < outcome.details["first_loss"]
        assert len(ctx.calibration) == 4
        (name,) = ctx.calibration[0]
        np.testing.assert_array_equal(ctx.calibration[0][name], batches[0].numpy())
        change = np.abs(ctx.calibration[2][name] - batches[0].numpy()).mean() / batches[0].numpy().std()
        assert 0.01 < change < 1
        found.append(ctx.calibration[2][name])
    np.testing.assert_array_equal(found[0], found[1])
    assert state == {n: w.numpy().tobytes() for n, w in graph.weights.items()}
    run = Pipeline([CalibAugment(steps=2), P.Quantize()]).run(graph, batches[0], calibration=batches[:2], verify=False)
    assert run.report.passes[-1].details["batches"] == 4


def test_the_outer_gradient_goes_through_the_inner_step() -> None:
    """Against finite differences: the outer error as a function of one number of the transform."""
    model, batches = conv_net()
    graph = graph_of(model.double(), batches[0].double(), "fx")
    options = CalibAugment(steps=1, bits=3, preserve=0.0, margin=0.0)
    bound = graph.bind(batches[0].double())

    def outer(value: float) -> tuple[float, float]:
        learned = _Bilevel(graph, list(graph.inputs), options)
        theta = next(iter(learned.theta.values()))
        for name in theta:
            theta[name] = theta[name].detach().double().requires_grad_()
        theta["shift"].data[1] = value
        loss = learned.step(bound)
        return loss, float(theta["shift"].grad[1, 0, 0])

    h = 1e-4
    slope = (outer(0.3 + h)[0] - outer(0.3 - h)[0]) / (2 * h)
    assert outer(0.3)[1] == pytest.approx(slope, rel=0.05, abs=1e-7)


def test_models_without_images_are_refused() -> None:
    import torch

    tokens = torch.randint(0, 80, (2, 5))
    with pytest.raises(ConstraintError, match="no images"):
        CalibAugment().apply(graph_of(Mlp().eval(), tokens, "fx"), Context(calibration=[tokens]))
