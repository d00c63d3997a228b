"""Small ONNX models in text form, and comparisons of protos."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
from foldline.graph.onnx import ONNXGraph, load_onnx
from onnx import numpy_helper


def parsed(text: str, **tensors: np.ndarray) -> onnx.ModelProto:
    """A model in onnx's text form, with extra initializers."""
    model = onnx.parser.parse_model(text)
    for name, data in tensors.items():
        model.graph.initializer.append(numpy_helper.from_array(data, name))
    return model


def run(model: Any, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return load_onnx(model).run(inputs)[0]


def node(graph: ONNXGraph, op: str) -> Any:
    found = [n for n in graph if n.op == op]
    assert found, f"no {op} in {[n.op for n in graph]}"
    return found[0]


def plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model without explicit empty domains, which say the same as none."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graphs = [copy.graph]
    while graphs:
        graph = graphs.pop()
        for n in graph.node:
            if not n.domain:
                n.ClearField("domain")
            graphs += [a.g for a in n.attribute if a.HasField("g")]
    for function in copy.functions:
        for n in function.node:
            n.ClearField("domain")
    for opset in [*copy.opset_import, *(o for f in copy.functions for o in f.opset_import)]:
        if not opset.domain:
            opset.ClearField("domain")
    return copy


def rand(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


HEADS = """
<ir_version: 8, opset_import: ["" : 17]>
attention (float[batch, length, 24] x) => (float[batch, length, 24] y)
<int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] heads = {4}, int64[1] minus = {-1},
 int64 last = {2}>
{
    q = MatMul(x, wq)
    shape = Shape(q)
    b = Slice(shape, zero, one, zero)
    l = Slice(shape, one, two, zero)
    c = Gather<axis = 0>(shape, last)
    n = Squeeze(heads, zero)
    d = Div(c, n)
    dim = Unsqueeze(d, zero)
    target = Concat<axis = 0>(b, l, heads, dim)
    f = Cast<to = 1>(d)
    root = Sqrt(f)
    r = Reshape(q, target)
    scaled = Div(r, root)
    back = Concat<axis = 0>(b, l, minus)
    joined = Reshape(scaled, back)
    y = MatMul(joined, wo)
}
"""


def attention() -> onnx.ModelProto:
    model = onnx.parser.parse_model(HEADS)
    model.graph.initializer.extend(
        [numpy_helper.from_array(rand(24, 24), "wq"), numpy_helper.from_array(rand(24, 24), "wo")]
    )
    return model
