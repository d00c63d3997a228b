"""Parameters, bytes and MACs against hand counts, equal for torch and for ONNX."""

from __future__ import annotations

import json

import onnx
import pytest
import torch
from foldline.graph.cost import cost, is_parameter, weight_bytes
from foldline.graph.fx import load_torch
from foldline.graph.ir import Node, Value, Weight
from foldline.graph.onnx import load_onnx
from support.resnet_cifar import ResNetCifar
from support.timm_models import create
from support.toys import toy
from support.toys_base import fill
from torch import nn


def to_onnx(model: nn.Module, x: torch.Tensor, optimize: bool):
    """``optimize`` lets the exporter fold the batch norms away."""
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False, dynamic_shapes=shapes, optimize=optimize)
    return load_onnx(program.model)


def hand_count(model: nn.Module, x: torch.Tensor) -> int:
    """MACs of convolutions and linear layers, from what flows through them."""
    total = 0

    def count(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output[0].numel() * module.in_channels // module.groups * module.kernel_size[0] ** 2
        elif isinstance(module, nn.Linear):
            total += output[0].numel() * module.in_features

    hooks = [m.register_forward_hook(count) for m in model.modules()]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return total


def test_a_residual_network_is_counted_alike_on_both_sides() -> None:
    model, x = fill(ResNetCifar(1)).eval(), torch.randn(2, 3, 32, 32)
    parameters = sum(p.numel() for p in model.parameters())
    fx, onnx_ = cost(load_torch(model, x)), cost(to_onnx(model, x, optimize=False))
    assert (fx.parameters, fx.macs) == (parameters, hand_count(model, x))
    assert fx.macs == 12_239_488
    assert (onnx_.parameters, onnx_.macs, onnx_.bytes) == (fx.parameters, fx.macs, fx.bytes)
    assert fx.batch == 2
    # Folded, a bias per channel takes the place of scale and shift; the statistics were no parameters anyway.
    folded = cost(to_onnx(model, x, optimize=True))
    channels = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert (folded.parameters, folded.macs) == (parameters - channels, fx.macs)


@pytest.mark.model
@pytest.mark.slow
def test_resnet50_has_its_published_size() -> None:
    model, x = create("resnet50").eval(), torch.randn(2, 3, 224, 224)
    found = cost(load_torch(model, x))
    assert found.parameters == sum(p.numel() for p in model.parameters()) == 25_557_032
    assert found.macs == hand_count(model, x) == 4_089_184_256
    assert found.unknown == []
    other = cost(to_onnx(model, x, optimize=False))
    assert (other.parameters, other.macs) == (found.parameters, found.macs)


def test_batch_norm_statistics_are_stored_but_no_parameters() -> None:
    bn = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)).eval()
    found = cost(load_torch(bn, torch.randn(2, 3, 4, 4)))
    assert found.parameters == 3 * 8 + 16
    assert found.bytes == 4 * (3 * 8 + 32)
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18]>
        g (float[2, 4, 5, 5] x) => (float[2, 100] y)
        <float[4] s = {1,1,1,1}, float[4] b = {0,0,0,0}, float[4] m = {0,0,0,0}, float[4] v = {1,1,1,1},
         int64[2] shape = {2, 100}>
        { h = BatchNormalization(x, s, b, m, v)  y = Reshape(h, shape) }"""
    )
    found = cost(load_onnx(model))
    assert (found.parameters, found.bytes) == (8, 64)


def test_tied_weights_count_once() -> None:
    model, inputs = toy("tied_embedding")
    found = cost(load_torch(model, inputs))
    assert found.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("layers", [1, 2])
def test_recurrent_work_is_steps_times_matrices(layers: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(6, 5, layers, batch_first=True, bidirectional=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(x)[0]

    net = Net().eval()
    found = cost(load_torch(net, torch.randn(2, 7, 6)))
    assert found.macs == 7 * sum(p.numel() for n, p in net.named_parameters() if "weight" in n)


def test_attention_and_einsum() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 3, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = torch.einsum("bld,dhe->bhle", x, self.w)
            y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
            return y @ y.transpose(-1, -2)

    found = {n.op: n.macs for n in cost(load_torch(Net().eval(), torch.randn(2, 5, 8))).nodes if n.macs}
    assert found["sdpa"] == 3 * 5 * 5 * (6 + 6)
    assert found["matmul"] == 3 * 5 * 5 * 6
    assert sum(found.values()) - found["sdpa"] - found["matmul"] == 5 * 8 * 3 * 6


def test_transposed_grouped_and_dilated_convolutions() -> None:
    for conv, positions in (
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), 25),
        (nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=4), 25),
        (nn.Conv2d(4, 8, 3, stride=2), 4),
    ):
        found = cost(load_torch(conv.eval(), torch.randn(2, 4, 5, 5)))
        assert found.macs == conv.weight.numel() * positions


def test_work_on_weights_alone_is_not_divided_by_the_batch() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (self.a @ self.b).sum()

    assert cost(load_torch(Net().eval(), torch.randn(6, 4))).macs == 4 * 3 * 4


def test_quantized_data_stands_for_its_parameter_and_scales_do_not() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18]>
        g (float[2, 3] x) => (float[2, 2] y)
        <int8[3, 2] w = {1, 2, 3, 4, 5, 6}, float[2] s = {0.5, 0.25}, int8[2] z = {0, 0}>
        { d = DequantizeLinear<axis = 1>(w, s, z)  y = MatMul(x, d) }"""
    )
    found = cost(load_onnx(model))
    assert found.parameters == 6
    assert found.bytes == 6 + 8 + 2
    assert found.macs == 6
    json.dumps(found.to_dict())


def test_roles_decide_what_a_parameter_is() -> None:
    def weight(op: str, position: int, dtype: str = "float32", kind: str = "parameter") -> Weight:
        value = Value("w", (3,), (3,), dtype)
        value.weight = Weight("w", (3,), dtype, kind, load=lambda: None, value=value)
        value.uses = [(Node("n", op, [], []), position)]
        return value.weight

    assert is_parameter(weight("conv", 1)) and is_parameter(weight("batch_norm", 1))
    assert is_parameter(weight("dequantize", 0, "int8", "constant"))
    for op, position in (("batch_norm", 3), ("batch_norm", 4), ("quantize", 1), ("dequantize", 1)):
        assert not is_parameter(weight(op, position)), op
    assert not is_parameter(weight("gather", 1, "int64"))
    assert not is_parameter(weight("mul", 1, "float32", "buffer"))


def test_four_bit_weights_count_half_a_byte() -> None:
    assert weight_bytes(Weight("w", (3, 3), "int4", "parameter", load=lambda: None)) == 5
