"""Quantization-aware training: equal to Q/DQ at the start, trainable, frozen into what was trained, in integers too."""

from __future__ import annotations

import copy
from typing import Any

import foldline as fl
import numpy as np
import pytest
import torch
from foldline import passes as P
from foldline.graph.errors import ConfigError, ConstraintError
from foldline.graph.fx.fake_quantize import fake_quantize
from foldline.passes.quantize.numerics import sqnr_db
from torch import nn


class Block(nn.Module):
    """A residual block, a pool, a convolution, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 6, 3, stride=2)
        self.fc1, self.fc2 = nn.Linear(6 * 9, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.conv(x) + x)
        x = self.last(nn.functional.max_pool2d(x, 2))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def data(count: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(count, 3, 14, 14, generator=g)
    return x, (x[:, :, :7].mean((1, 2, 3)) > x[:, :, 7:].mean((1, 2, 3))).long() + 2 * (x[:, 0, 0, 0] > 0).long()


def prepared(**options: Any) -> tuple[nn.Module, P.Result, torch.Tensor]:
    torch.manual_seed(0)
    model, (x, _) = Block().eval(), data()
    result = P.qat(model, x[:8], calibration=[x[:16], x[16:32]], **options)
    return model, result, x


def train(module: nn.Module, steps: int = 30, rate: float = 0.02, hook: Any = None) -> list[float]:
    x, y = data()
    optimizer = torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(x), y)
        loss.backward()
        optimizer.step()
        if hook is not None:
            hook.step()
        losses.append(float(loss.detach()))
    return losses


def test_before_training_it_is_the_quantized_model() -> None:
    model, result, x = prepared()
    quantized = P.quantize(model, x[:8], calibration=[x[:16], x[16:32]]).model
    with torch.no_grad():
        # biases are rounded to the accumulator's scale in the one and not in the other
        torch.testing.assert_close(result.model(x), quantized(x), rtol=1e-3, atol=2e-2)
        frozen = P.freeze_quantized(result.model, x[:8]).model
        assert torch.equal(frozen(x), quantized(x))
    nodes = [n for n in fl.load(frozen, x[:8]).nodes if n.op in ("quantize", "dequantize", "fake_quantize")]
    wanted = [n for n in fl.load(quantized, x[:8]).nodes if n.op in ("quantize", "dequantize", "fake_quantize")]
    assert [n.op for n in nodes] == [n.op for n in wanted]


@pytest.mark.parametrize("scales", ["learned", "statistical", "fixed"])
def test_it_trains_and_freezes_to_what_was_trained(scales: str) -> None:
    _, result, x = prepared(weight_scales=scales, weight_bits=4, activation_bits=6)
    module = result.model
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    losses = train(module)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) * 0.9
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, start[name])}
    assert any(name.endswith("weight_scale") for name in moved) == (scales == "learned")
    assert any(name.endswith("weight") for name in moved)
    with torch.no_grad():
        trained = module(x)
        frozen = P.freeze_quantized(module, x[:8])
        # a bias rounded to int32 turns a few values on a tie, which are a coarse step apart here
        assert sqnr_db(trained.numpy(), frozen.model(x).numpy()) > 25
    stored = [w for w in frozen.graph.weights.values() if w.name.endswith("weight_quantized")]
    assert stored and all(w.dtype in ("int8", "int4") and np.abs(w.numpy().astype(int)).max() <= 8 for w in stored)


def test_the_integer_result_is_within_one_step_of_training(tmp_path: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.b(torch.relu(self.a(x))))

    torch.manual_seed(0)
    x = torch.randn(16, 3, 14, 14)
    module = P.qat(Net().eval(), x, calibration=[x]).model
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        (module(x) - x.mean()).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        trained = module(x).numpy()
    frozen = fl.Pipeline([P.FreezeQuantized(), P.Lower("onnxruntime", threads=1)]).run(module, x)
    profile = frozen.artifact.profile()
    assert profile.counts.get("QLinearConv", 0) == 2 and not profile.float_matrix
    last = [n for n in frozen.graph.nodes if n.op == "quantize"][-1]
    scale = float(last.inputs[1].weight.numpy())
    off = np.abs(frozen.artifact.run(x.numpy())[0] - trained) / scale
    assert off.max() <= 1.001
    assert (off > 0.5).mean() < 0.01


def fit(hook_options: dict[str, Any]) -> tuple[int, float, float]:
    """A layer whose best weights lie between the integers: (changes in the last 100 steps, share frozen, loss)."""
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    teacher = torch.randn(16, 8) * 0.5
    model = nn.Sequential(nn.Linear(16, 8))
    with torch.no_grad():
        model[0].weight.copy_(teacher.T)
    options = {"weight_bits": 3, "weight_scales": "fixed", "activation_scales": "fixed"}
    module = P.qat(model.eval(), x[:8], calibration=[x], **options).model
    freezing = P.WeightFreezing(module, **hook_options)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    loss = torch.zeros(())
    for _ in range(300):
        optimizer.zero_grad()
        loss = (module(x) - x @ teacher).square().mean()
        loss.backward()
        optimizer.step()
        freezing.step()
    return sum(freezing.flips[-100:]), freezing.share, float(loss.detach())


def test_freezing_ends_oscillation() -> None:
    flips, share, loss = fit({"start": 10**9})
    assert share == 0 and flips > 1000
    calm, frozen, better = fit({"by": "frequency", "threshold": 0.015, "start": 100})
    assert frozen > 0.3 and calm < flips / 20 and better < 0.8 * loss
    _, certain, _ = fit({"by": "confidence", "margin": 0.3, "start": 100})
    assert 0.05 < certain < 1


def test_frozen_weights_keep_their_integers_while_scales_train() -> None:
    _, result, _ = prepared(weight_bits=4)
    freezing = P.WeightFreezing(result.model, by="confidence", margin=0.25)
    train(result.model, 3, hook=freezing)
    held = {w.name: (w.steps().round().clamp(w.low, w.high), freezing.frozen[w.name].clone()) for w in freezing.weights}
    train(result.model, 10, hook=freezing)
    assert freezing.share > 0.1
    for w in freezing.weights:
        before, mask = held[w.name]
        assert torch.equal(w.steps().round().clamp(w.low, w.high)[mask], before[mask])


def test_a_pipeline_trains_in_between() -> None:
    torch.manual_seed(0)
    model, (x, _) = Block().eval(), data()
    before = copy.deepcopy(model.state_dict())
    pipe = fl.Pipeline([P.Fold(), P.QuantizeAware(weight_bits=4), P.FineTune(train), P.FreezeQuantized()])
    result = pipe.run(model, x[:8], calibration=[x[:16]])
    ops = {n.op for n in result.graph.nodes}
    assert "quantize" in ops and "fake_quantize" not in ops
    assert all(torch.equal(a, before[k]) for k, a in model.state_dict().items())
    with pytest.raises(ConstraintError, match="requires 'float'"):
        fl.Pipeline([P.QuantizeAware(), P.FreezeQuantized(), P.Quantize()]).run(model, x[:8], calibration=[x[:16]])


def test_what_cannot_be_frozen_is_refused() -> None:
    model, result, x = prepared()
    with pytest.raises(ConstraintError, match="nothing in this model is fake-quantized"):
        P.freeze_quantized(model, x[:8])
    with pytest.raises(ConstraintError, match="no fake-quantized weight"):
        P.WeightFreezing(model)
    with pytest.raises(ConfigError, match="criterion"):
        P.WeightFreezing(result.model, by="mood")  # type: ignore[arg-type]
    with pytest.raises(ConstraintError, match="target"):
        P.freeze_quantized(result.model, x[:8], target="tensorrt")

    class Dynamic(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return fake_quantize(x, x.abs().max() / 127, None, None, -128, 127)

    with pytest.raises(ConstraintError, match="depends on the model's input"):
        P.freeze_quantized(Dynamic().eval(), x[:8])
