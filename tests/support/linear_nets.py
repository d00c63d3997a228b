"""Random sums and chains of linear operators as data, built as a torch module and as an ONNX model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

SIZE = (7, 9)
CHANNELS = 4


@dataclass
class Layer:
    """One linear operator: ``kind`` is conv, pool, norm, scale or shift; arrays are float32."""

    kind: str
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    pads: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


def conv(rng: np.random.Generator, ins: int, outs: int, bias: bool = True, **options: Any) -> Layer:
    layer = Layer("conv", **options)
    layer.arrays["weight"] = rng.standard_normal((outs, ins // layer.groups, *layer.kernel)).astype(np.float32)
    if bias:
        layer.arrays["bias"] = rng.standard_normal(outs).astype(np.float32)
    return layer


def norm(rng: np.random.Generator, channels: int) -> Layer:
    """A batch norm with the statistics of a trained one: nothing is 0 or 1."""
    arrays = {
        "scale": rng.uniform(0.5, 1.5, channels),
        "bias": rng.normal(0, 0.5, channels),
        "mean": rng.normal(0, 0.5, channels),
        "var": rng.uniform(0.5, 1.5, channels),
    }
    return Layer("norm", {k: v.astype(np.float32) for k, v in arrays.items()})


def per_channel(rng: np.random.Generator, kind: str, channels: int) -> Layer:
    return Layer(kind, {"value": rng.standard_normal((channels, 1, 1)).astype(np.float32)})


class Sum(nn.Module):
    """``relu(sum of branches of x)``, each branch a chain of layers; an empty branch is x itself."""

    def __init__(self, branches: list[list[Layer]], signs: list[int]) -> None:
        super().__init__()
        self.branches, self.signs = branches, signs
        for i, branch in enumerate(branches):
            for j, layer in enumerate(branch):
                for name, array in layer.arrays.items():
                    self.register_buffer(f"b{i}_{j}_{name}", torch.from_numpy(array.copy()))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        total = None
        for i, branch in enumerate(self.branches):
            y = x
            for j, layer in enumerate(branch):
                y = self._layer(y, layer, f"b{i}_{j}_")
            if total is None:
                total = y if self.signs[i] > 0 else -y
            else:
                total = total + y if self.signs[i] > 0 else total - y
        assert total is not None
        return F.relu(total)

    def _layer(self, x: Tensor, layer: Layer, key: str) -> Tensor:
        held = {name: getattr(self, key + name) for name in layer.arrays}
        lows = [low for low, _ in layer.pads]
        if layer.kind == "conv":
            return F.conv2d(
                x, held["weight"], held.get("bias"), layer.stride, lows, layer.dilation, layer.groups
            )  # fmt: skip
        if layer.kind == "pool":
            return F.avg_pool2d(x, layer.kernel, layer.stride, lows)
        if layer.kind == "norm":
            return F.batch_norm(x, held["mean"], held["var"], held["scale"], held["bias"], eps=1e-3)
        return x * held["value"] if layer.kind == "scale" else x + held["value"]


def as_onnx(branches: list[list[Layer]], signs: list[int], channels: int = CHANNELS) -> onnx.ModelProto:
    """The same function as :class:`Sum`, as a model of opset 17."""
    nodes: list[onnx.NodeProto] = [helper.make_node("Relu", ["x"], ["x0"], "relu_in")]
    tensors: list[onnx.TensorProto] = []

    def emit(op: str, inputs: list[str], name: str, **attrs: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [name], name, **attrs))
        return name

    total = ""
    for i, branch in enumerate(branches):
        y = "x0"
        for j, layer in enumerate(branch):
            names = {}
            for key, array in layer.arrays.items():
                names[key] = f"b{i}_{j}_{key}"
                tensors.append(numpy_helper.from_array(array, names[key]))
            window = {
                "kernel_shape": layer.kernel,
                "strides": layer.stride,
                "pads": [low for low, _ in layer.pads] + [high for _, high in layer.pads],
            }
            here = f"y{i}_{j}"
            if layer.kind == "conv":
                inputs = [y, names["weight"], *([names["bias"]] if "bias" in names else [])]
                y = emit("Conv", inputs, here, **window, dilations=layer.dilation, group=layer.groups)
            elif layer.kind == "pool":
                y = emit("AveragePool", [y], here, **window, count_include_pad=1)
            elif layer.kind == "norm":
                inputs = [y, *(names[k] for k in ("scale", "bias", "mean", "var"))]
                y = emit("BatchNormalization", inputs, here, epsilon=1e-3)
            else:
                y = emit("Mul" if layer.kind == "scale" else "Add", [y, names["value"]], here)
        if not total:
            total = y if signs[i] > 0 else emit("Neg", [y], f"neg{i}")
        else:
            total = emit("Add" if signs[i] > 0 else "Sub", [total, y], f"sum{i}")
    emit("Relu", [total], "out")
    graph = helper.make_graph(
        nodes,
        "sum",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, channels, *SIZE])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)
