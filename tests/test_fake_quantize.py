"""foldline::fake_quantize: the numbers of quantize and dequantize to the bit, and the gradients of LSQ."""

from __future__ import annotations

import math

import pytest
import torch
from foldline.graph.fx import custom, load_torch
from foldline.graph.fx.fake_quantize import fake_quantize
from torch import nn


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "uint4", "int2"])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_forward_is_quantize_then_dequantize(dtype: str, axis: int | None) -> None:
    torch.manual_seed(0)
    low, high, storage = custom._RANGES[dtype]
    x = torch.randn(6, 5, 3) * 4
    scale = torch.rand(() if axis is None else (x.shape[axis],)) + 0.05
    zero = torch.randint(low, high + 1, scale.shape).to(storage)
    x[0] = (torch.arange(15).reshape(5, 3) - 7) * 0.5 * scale.reshape(-1)[0]  # ties
    reference = custom.dequantize_linear(custom.quantize_linear(x, scale, zero, axis, dtype), scale, zero, axis, dtype)
    assert torch.equal(fake_quantize(x, scale, zero, axis, low, high), reference)


def test_gradients_are_those_of_learned_step_size_quantization() -> None:
    # written as a graph of differentiable ops with a straight-through rounding, autograd gives the same
    torch.manual_seed(0)
    x = (torch.randn(4, 10) * 3).requires_grad_()
    scale = (torch.rand(4) + 0.2).requires_grad_()
    weights = torch.randn(4, 10)
    (fake_quantize(x, scale, None, 0, -4, 3, "tensor") * weights).sum().backward()
    y, s = x.detach().clone().requires_grad_(), scale.detach().clone().requires_grad_()
    steps = y / s[:, None]
    rounded = steps + (steps.round() - steps).detach()
    (rounded.clamp(-4, 3) * s[:, None] * weights).sum().backward()
    inside = (steps.round() >= -4) & (steps.round() <= 3)
    at_the_edge = (steps > 3) & inside | (steps < -4) & inside  # autograd's clamp looks before rounding
    torch.testing.assert_close(x.grad[~at_the_edge], y.grad[~at_the_edge])
    free = ~at_the_edge.any(1)
    assert free.any()
    torch.testing.assert_close(scale.grad[free], s.grad[free] / math.sqrt(10 * 3))


def test_a_fixed_scale_has_no_gradient_and_a_sample_counts_once() -> None:
    x, scale = torch.randn(8, 6), torch.tensor(0.3, requires_grad=True)

    def slope(learn: str) -> torch.Tensor | None:
        scale.grad = None
        y = x.clone().requires_grad_()
        fake_quantize(y, scale, None, None, -8, 7, learn).sum().backward()
        return scale.grad

    assert slope("") is None or float(slope("")) == 0
    tensor, sample = slope("tensor"), slope("sample")
    assert tensor is not None and sample is not None
    torch.testing.assert_close(sample, tensor * math.sqrt(8))


def test_the_operator_keeps_torchs_rules() -> None:
    x, scale = torch.randn(4, 5, requires_grad=True), torch.rand(4).add(0.1).requires_grad_()
    torch.library.opcheck(fake_quantize, (x, scale, None, 0, -8, 7, "tensor"))
    torch.library.opcheck(fake_quantize, (x, torch.tensor(0.1), torch.tensor(3, dtype=torch.uint8), None, 0, 15))


def test_a_negative_scale_stands_for_its_magnitude() -> None:
    x = torch.randn(3, 4)
    a = fake_quantize(x, torch.tensor(-0.2), None, None, -8, 7)
    assert torch.equal(a, fake_quantize(x, torch.tensor(0.2), None, None, -8, 7))
    assert torch.isfinite(fake_quantize(x, torch.tensor(0.0), None, None, -8, 7)).all()


def test_it_is_one_canonical_node_in_a_captured_graph() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(5, 4), nn.Parameter(torch.tensor(0.1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = fake_quantize(x, self.scale, None, None, -8, 7, "sample")
            return nn.functional.linear(x, self.linear.weight, self.linear.bias)

    graph = load_torch(Net().eval(), torch.randn(3, 5))
    node = next(n for n in graph.nodes if n.op == "fake_quantize")
    assert node.attrs == {"axis": None, "quant_min": -8, "quant_max": 7, "learn": "sample"}
    assert node.inputs[1].weight.name == "scale" and node.inputs[1].weight.trainable
