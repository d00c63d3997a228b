"""Criterion and scope "auto", and made-up inputs where a choice needs some and none were given."""

from __future__ import annotations

from typing import Any

import foldline as fl
import pytest
import torch
from foldline import passes as P
from foldline.graph.errors import ConfigError
from foldline.passes.prune.automatic import MADE, STEPS
from foldline.passes.recover import synthetic_inputs
from support.data import accuracy, cifar10, trained_resnet
from torch import nn


def net(norms: bool = True) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Two convolutions with or without batch norms whose statistics differ from the fresh ones, and a head."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    norm = nn.BatchNorm2d if norms else (lambda _: nn.Identity())
    layers = [nn.Conv2d(3, 12, 3), norm(12), nn.ReLU(), nn.Conv2d(12, 12, 3), norm(12), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))
    for _ in range(5):
        model(torch.randn(16, 3, 8, 8))
    return model.eval(), (x,)


def actions(result: Any, name: str) -> list[Any]:
    return [d for d in result.report.passes[0].decisions if d.action == name]


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_without_data_auto_is_fisher_on_made_up_images_ranked_globally(front: str) -> None:
    model, x = net()
    given: Any = model
    if front == "onnx":  # as it is written before the exporter folds its batch norms
        program = torch.onnx.export(model, x, dynamo=True, optimize=False, verbose=False)
        assert program is not None
        given = program.model_proto
    made = synthetic_inputs(fl.load(given, x), MADE, examples=x, steps=STEPS, seed=0)
    auto = P.prune(given, x, criterion="auto", scope="auto", ratio=0.4)
    named = P.prune(given, x, criterion="fisher", scope="global", calibration=made, ratio=0.4)
    bare = P.prune(given, x, criterion="fisher", scope="global", ratio=0.4)
    assert auto.plan.weights == named.plan.weights == bare.plan.weights
    assert actions(auto, "made up") and actions(bare, "made up") and not actions(named, "made up")
    other = P.prune(given, x, ratio=0.4)
    assert other.plan.weights != auto.plan.weights and not actions(other, "made up")


def test_with_data_auto_measures_and_without_norms_it_looks_at_weights() -> None:
    model, x = net()
    auto = P.prune(model, x, criterion="auto", scope="auto", ratio=0.4, calibration=[x])
    named = P.prune(model, x, criterion="l2", scope="layerwise", ratio=0.4, calibration=[x])
    assert auto.plan.weights == named.plan.weights and not actions(auto, "made up")
    assert auto.report.passes[0].details["distortion"]["made_up_inputs"] is False
    plain, x = net(norms=False)
    assert (
        P.prune(plain, x, criterion="auto", scope="auto", ratio=0.4).plan.weights
        == P.prune(plain, x, ratio=0.4).plan.weights
    )
    with pytest.raises(ConfigError, match="data="):
        P.prune(plain, x, criterion="fisher", ratio=0.4)


def test_one_of_both_may_be_named_and_schedules_know_auto() -> None:
    model, x = net()
    half = P.prune(model, x, criterion="l1", scope="auto", ratio=0.4)
    assert half.plan.weights == P.prune(model, x, criterion="l1", scope="global", ratio=0.4).plan.weights
    assert not actions(half, "made up")  # l1 looks at weights alone
    steps = P.prune_iteratively(model, x, prune=P.Prune(criterion="auto", scope="auto", ratio=0.4), steps=2)
    assert fl.cost(steps.graph).parameters < fl.cost(fl.load(model, x)).parameters


def test_the_layerwise_scope_measures_on_shaped_images() -> None:
    model, x = net()
    made = synthetic_inputs(fl.load(model, x), 16, examples=x, steps=STEPS, seed=0)
    alone = P.prune(model, x, scope="layerwise", samples=16, ratio=0.4)
    named = P.prune(model, x, scope="layerwise", samples=16, ratio=0.4, calibration=made)
    assert alone.plan.weights == named.plan.weights
    assert alone.report.passes[0].details["distortion"]["made_up_inputs"] is True and actions(alone, "made up")


@pytest.mark.slow
def test_data_free_resnet20_keeps_its_accuracy_at_half_the_macs() -> None:
    """The road without data leads plain slicing by far at 50 %, where layer-wise distortions on noise broke it."""
    model = trained_resnet(20)
    images, labels = cifar10("test", 500)
    cut = P.Prune(criterion="auto", scope="auto", target=fl.macs(0.5))
    example = (images[:2],)
    sliced = accuracy(
        fl.Pipeline([P.Prune(target=fl.macs(0.5))]).run(model, example, verify=False).model, images, labels
    )
    found = {}
    for data in ("moments", "synthetic"):
        recover = P.Recover(data=data, samples=64, steps=30)
        result = fl.Pipeline([cut, recover]).run(model, example, verify=False)
        found[data] = accuracy(result.model, images, labels)
    assert found["synthetic"] > 0.68 and found["moments"] > 0.58 and min(found.values()) > sliced + 0.2, (found, sliced)
