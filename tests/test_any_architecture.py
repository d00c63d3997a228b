"""The eight architectures of "Structurally Prune Anything" at half their parameters: no rule per model, FX and ONNX."""

from __future__ import annotations

from typing import Any

import foldline as fl
import pytest
import torch
from foldline import passes as P
from support import timm_models
from support.frontends import exported
from torch import nn

pytestmark = [pytest.mark.model, pytest.mark.slow]

TORCHVISION = ("resnet18", "densenet121", "mobilenet_v2", "googlenet", "vit_b_32", "shufflenet_v2_x0_5")


class UNet(nn.Module):
    """Two scales down and up, with concatenated skips and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = self._block(3, 16), self._block(16, 24), self._block(24, 40)
        self.pool = nn.MaxPool2d(2)
        self.up1, self.d1 = nn.ConvTranspose2d(40, 24, 2, stride=2), self._block(48, 24)
        self.up2, self.d2 = nn.ConvTranspose2d(24, 16, 2, stride=2), self._block(32, 16)
        self.head = nn.Conv2d(16, 5, 1)

    @staticmethod
    def _block(inner: int, outer: int) -> nn.Module:
        first = nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()
        return nn.Sequential(*first, nn.Conv2d(outer, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        b = self.b(self.pool(a))
        c = self.c(self.pool(b))
        b = self.d1(torch.cat([self.up1(c), b], 1))
        return self.head(self.d2(torch.cat([a, self.up2(b)], 1)))


def build(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    if name == "unet":
        return UNet().eval(), (torch.randn(2, 3, 32, 32),)
    if name == "gpt2":
        tr = timm_models.transformers()
        config = tr.GPT2Config(n_embd=96, n_layer=2, n_head=4, vocab_size=200, n_positions=64, use_cache=False)
        return tr.GPT2LMHeadModel(config).eval(), {"input_ids": torch.randint(0, 200, (2, 10))}
    options = {"init_weights": False} if name == "googlenet" else {}
    model = timm_models.torchvision_models().get_model(name, weights=None, **options).eval()
    return model, (torch.randn(2, 3, 224, 224),)


@pytest.mark.parametrize("front", ["fx", "onnx"])
@pytest.mark.parametrize("name", [*TORCHVISION, "unet", "gpt2"])
def test_half_of_the_parameters(name: str, front: str) -> None:
    model, inputs = build(name)
    given: Any = exported(model, inputs) if front == "onnx" else model
    result = P.prune(given, inputs, target=fl.params(0.5), verify=True)
    details = result.report.passes[0].details
    assert details["reached"] == pytest.approx(0.5, abs=0.01)
    assert details["identity"]["checked"] and details["identity"]["relative_error"] <= 1e-4
