"""Learned rounding as accepted: on ONNX Runtime, after 500 steps, over calibration sets, on trained networks."""

from __future__ import annotations

from functools import partial
from typing import Any

import foldline as fl
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from foldline import passes as P
from foldline.graph.fx import load_torch
from foldline.passes.quantize.rounding import round_weights
from support.data import cifar10, trained_resnet
from support.digits_vit import digits_vit
from support.frontends import load
from support.rounding import job, mse, outputs
from torch import nn


class Blocks(nn.Module):
    """A convolution, a residual block and a depthwise pair, ending in a convolution: the output is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(i, 12, 3, padding=1) for i in (3, 12, 12))
        self.deep, self.point = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.b(torch.relu(self.a(x))) + x)
        return torch.relu(self.point(torch.relu(self.deep(x))))


def on_onnx_runtime(
    graph: Any, batches: list[torch.Tensor], x: torch.Tensor, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """|ONNX Runtime - simulation| of the quantized output, in steps of it: pairs as written, and in integer kernels."""
    quantize = P.Quantize(target="onnxruntime-cpu", rounding="adaquant", weight_bits=4, **options)
    made = fl.Pipeline([quantize]).run(graph, batches[0], calibration=batches, verify=False)
    lowered = fl.Pipeline([P.Lower("onnxruntime", threads=1)]).run(made.graph, batches[0], verify=False)
    counts = lowered.artifact.profile()
    assert not counts.float_matrix and counts.counts.get("QLinearConv", 0) > 0  # it ran in integers
    (simulated,), _ = made.graph.run({v.name: x.numpy() for v in made.graph.inputs})
    last = [n for n in made.graph.nodes if n.op == "quantize"][-1]
    scale = float(last.inputs[1].weight.numpy())
    simulated = np.asarray(simulated.detach() if isinstance(simulated, torch.Tensor) else simulated)
    np.testing.assert_allclose(simulated / scale, np.rint(simulated / scale), atol=1e-3)
    plain = ort.SessionOptions()
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    file = ir.to_proto(lowered.artifact.model).SerializeToString()
    session = ort.InferenceSession(file, plain, providers=["CPUExecutionProvider"])
    written = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    return tuple(np.abs(y - simulated) / scale for y in (written, lowered.artifact.run(x.numpy())[0]))  # type: ignore[return-value]


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_adaquant_on_onnx_runtime_is_within_one_quantum_of_the_simulation(front: str) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(8, 3, 10, 10) for _ in range(2)]
    graph = load(Blocks().eval(), (batches[0],), front)
    for off in on_onnx_runtime(graph, batches, torch.randn(8, 3, 10, 10), rounding_options={"steps": 20}):
        assert off.max() <= 1.001 and (off > 0.5).mean() < 0.01


@pytest.mark.slow
@pytest.mark.data
def test_adaquant_of_a_trained_resnet20() -> None:
    """F8-01: 256 images; each layer at most nearest's error, held-out error at most twice."""
    images = cifar10("train", 256)[0]
    batches = list(images.split(64))
    model = trained_resnet(20)
    j = job(P.fold(model, images[:64], verify=False).graph, batches, "adaquant", steps=100, rows=8192)
    found = round_weights(j)
    assert all(r.details["mse"] <= r.details["mse_nearest"] for r in found.values())
    nearest = job(j.graph, batches)
    held_out = cifar10("test", 128)[0]
    error, seen = mse(j, found, held_out), mse(j, found, images[:128])
    assert error <= 2 * seen and error < 0.3 * mse(nearest, round_weights(nearest), held_out)


@pytest.mark.slow
@pytest.mark.data
def test_adaquant_of_a_trained_resnet20_on_onnx_runtime() -> None:
    """F8-01: after 20 layers 99 % of the integers are at most one step from the simulation's."""

    class Trunk(nn.Module):
        """The network before its pool, the classifier at every position: ends in a convolution, which is quantized."""

        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net, self.head = net, nn.Conv2d(64, 10, 1)
            self.head.weight.data = net.linear.weight.data[:, :, None, None]
            self.head.bias.data = net.linear.bias.data

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.net.bn1(self.net.conv1(x)))
            return self.head(self.net.layer3(self.net.layer2(self.net.layer1(x))))

    images = cifar10("train", 64)[0]
    trunk = P.fold(Trunk(trained_resnet(20)).eval(), images[:32], verify=False).graph
    options = {"rounding_options": {"steps": 5, "rows": 1024}}
    # Sums in another order send a value next to a tie the other way now and then, and 20 layers pass it on: one step
    # holds for a layer (above, and bit for bit in the integer reference), not for each number at the end.
    for off in on_onnx_runtime(trunk, list(images.split(32)), cifar10("test", 32)[0], **options):
        assert off.max() <= 4.001 and (off > 1.001).mean() < 0.01


@pytest.mark.slow
def test_adaquant_of_mobilenet_v2() -> None:
    """F8-01 on depthwise convolutions (random weights, 32 images of noise)."""
    from support.timm_models import timm

    torch.manual_seed(0)
    model = timm().create_model("mobilenetv2_035", pretrained=False, num_classes=10).eval()
    images = torch.randn(32, 3, 64, 64)
    batches = list(images.split(16))
    graph = P.fold(model, batches[0], verify=False).graph
    j = job(graph, batches, "adaquant", steps=20, rows=2048)
    found = round_weights(j)
    assert len(found) > 50
    assert all(r.details["mse"] <= r.details["mse_nearest"] for r in found.values())
    assert mse(j, found, torch.randn(16, 3, 64, 64)) <= 2 * mse(j, found, batches[0])


# ---- FlexRound --------------------------------------------------------------------------------------------------
def test_flexround_after_500_steps_errs_less_than_nearest() -> None:
    """F8-02: without a step it is nearest, after 500 the block's error is less, on inputs it has not seen too."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.b(torch.relu(self.a(x))) + x)

    torch.manual_seed(0)
    mixing = torch.randn(8, 8)
    batches = [torch.einsum("nchw,dc->ndhw", torch.randn(16, 8, 6, 6), mixing) for _ in range(3)]
    graph = load_torch(Block().eval(), batches[0])
    recipe = {"freedom": "flexround", "batch": 8, "bias": False, "activations": False}
    errors = {}
    for steps in (0, 500):
        j = job(graph, batches[:2], "reconstruct", weight_bits=3, steps=steps, **recipe)
        found = round_weights(j)
        errors[steps] = [mse(j, found, batches[0]), mse(j, found, batches[2])]
        if not steps:
            plain = round_weights(job(graph, batches[:2], weight_bits=3))
            for name, r in plain.items():
                np.testing.assert_array_equal(r.integers, found[name].integers)
    assert errors[500][0] < 0.6 * errors[0][0] and errors[500][1] < 0.7 * errors[0][1]


@pytest.mark.slow
@pytest.mark.data
def test_flexround_of_a_trained_resnet20_is_more_accurate_than_nearest() -> None:
    """F8-02: ResNet-20, W4A8."""
    x, y = cifar10("test", 1000)
    batches = list(cifar10("train", 128)[0].split(64))
    graph = P.fold(trained_resnet(20), batches[0], verify=False).graph
    right = {}
    for method, options in (("nearest", {}), ("reconstruct", {"freedom": "flexround", "steps": 60, "batch": 16})):
        j = job(graph, batches, method, **options)
        right[method] = agreement(j, round_weights(j), x, y)
    assert right["reconstruct"] > right["nearest"] + 0.005


def agreement(j: Any, found: dict[str, Any], x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of right answers of the quantized network."""
    logits = np.concatenate([outputs(j, found, part)[1] for part in x.split(250)])
    return float((logits.argmax(1) == y.numpy()).mean())


# ---- block reconstruction ---------------------------------------------------------------------------------------
@pytest.mark.slow
def test_reconstruction_of_a_trained_vision_transformer_over_three_calibration_sets() -> None:
    """F8-06: 4-bit weights above nearest, less than a point between three sets of calibration images."""
    model, (calibration, _), (x, y) = digits_vit()
    sets = [list(calibration[i::3][:96].split(32)) for i in range(3)]
    graph = load_torch(model, sets[0][0])
    right, errors = [], []
    for batches in sets:
        j = job(graph, batches, "reconstruct", weight_bits=4, steps=60, batch=16)
        found = round_weights(j)
        right.append(agreement(j, found, x, y))
        plain = job(graph, batches, weight_bits=4)
        nearest = round_weights(plain)
        errors.append((mse(j, found, x[:250]), mse(plain, nearest, x[:250])))
        assert right[-1] >= agreement(plain, nearest, x, y)
    assert max(right) - min(right) < 0.01
    assert all(ours < 0.5 * theirs for ours, theirs in errors)


@pytest.mark.slow
def test_mixed_widths_of_4_bits_on_average_reconstructed_are_at_least_uniform_ones() -> None:
    """F8-06: the same transformer and recipe, 4 bits everywhere or on average."""
    model, (calibration, _), (x, _) = digits_vit()
    batches = list(calibration[:96].split(32))
    recipe = partial(P.Quantize, target="inductor-cpu", rounding="reconstruct", rounding_options={"steps": 40})
    errors = []
    with torch.no_grad():
        wanted = model(x[:300])
    for options in ({"weight_bits": 4}, {"bits": {"choices": (2, 3, 4, 5, 6, 8), "budget": 4}}):
        made = fl.Pipeline([recipe(**options)]).run(model, batches[0], calibration=batches, verify=False)
        with torch.no_grad():
            errors.append(float((made.model(x[:300]) - wanted).square().sum() / wanted.square().sum()))
        if "bits" in options:
            assert made.report.passes[-1].details["bits"]["average_weight_bits"] <= 4
    assert errors[1] <= errors[0]
