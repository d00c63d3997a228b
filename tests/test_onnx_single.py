"""Constants evaluated in numpy equal what ONNX Runtime computes, operator by operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from foldline.graph.execute import run_graph
from foldline.graph.load import load
from foldline.graph.onnx.single import move
from onnx import TensorProto, helper, numpy_helper

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4) - 7.5
I = np.array([[2, -1, 0], [1, 1, -2]], dtype=np.int64)  # noqa: E741
R = np.random.default_rng(0).standard_normal((37, 61)).astype(np.float32)
CASES: dict[str, tuple[str, list[np.ndarray], dict[str, Any], int]] = {
    "gather elements": ("GatherElements", [X[0].copy(), I[:, :3].copy()], {"axis": 1}, TensorProto.FLOAT),
    "gather elements, rows": ("GatherElements", [X[0].copy(), I[:, :3].copy() % 3], {"axis": 0}, TensorProto.FLOAT),
    "gather elements, one row": ("GatherElements", [X[0].copy(), I[:1].copy()], {"axis": -1}, TensorProto.FLOAT),
    "expand": ("Expand", [X[:, :1].copy(), np.array([2, 5, 4])], {}, TensorProto.FLOAT),
    "concat": ("Concat", [X, X[:, :2].copy()], {"axis": 1}, TensorProto.FLOAT),
    "transpose": ("Transpose", [X], {"perm": [2, 0, 1]}, TensorProto.FLOAT),
    "reshape": ("Reshape", [X, np.array([0, -1])], {}, TensorProto.FLOAT),
    "slice": ("Slice", [X, np.array([3]), np.array([-9]), np.array([2]), np.array([-2])], {}, TensorProto.FLOAT),
    "float to int": ("Cast", [X], {"to": TensorProto.INT64}, TensorProto.INT64),
    "float to bool": ("Cast", [np.array([0.0, -0.5, 2.0], np.float32)], {"to": TensorProto.BOOL}, TensorProto.BOOL),
    "float to half": ("Cast", [X / 3], {"to": TensorProto.FLOAT16}, TensorProto.FLOAT16),
    "wide to narrow int": ("Cast", [I * 300], {"to": TensorProto.INT8}, TensorProto.INT8),
    "integers": ("Mul", [I, I[:1] - 5], {}, TensorProto.INT64),
    "modulo": ("Mod", [I * 7, I * 0 - 3], {}, TensorProto.INT64),
    "where": ("Where", [X > 0, X, X[:, :1] * 3], {}, TensorProto.FLOAT),
    "many comparisons": ("LessOrEqual", [np.arange(70), np.arange(60)[:, None]], {}, TensorProto.BOOL),
    "many ands": ("And", [np.arange(70) % 2 == 0, np.arange(60)[:, None] > 3], {}, TensorProto.BOOL),
    "not": ("Not", [np.arange(2000) % 3 == 0], {}, TensorProto.BOOL),
    "sum": ("Add", [R, R[:1] / 7], {}, TensorProto.FLOAT),
    "difference": ("Sub", [R, R[1] * 1e-3], {}, TensorProto.FLOAT),
    "product": ("Mul", [R, R[:, :1] / 3], {}, TensorProto.FLOAT),
    "quotient": ("Div", [R, R[:1] * 0.7], {}, TensorProto.FLOAT),
    "root of one number": ("Sqrt", [np.array(32.0, np.float32)], {}, TensorProto.FLOAT),
    "negated": ("Neg", [R], {}, TensorProto.FLOAT),
    "magnitude": ("Abs", [R], {}, TensorProto.FLOAT),
    "range": ("Range", [np.array(3), np.array(-4), np.array(-2)], {}, TensorProto.INT64),
}


@pytest.mark.parametrize("name", CASES)
def test_numpy_equals_the_runtime(name: str) -> None:
    op, operands, attributes, kind = CASES[name]
    names = [f"c{i}" for i in range(len(operands))]
    node = helper.make_node(op, names, ["made"], "it", **attributes)
    used = helper.make_node("Identity", ["made"], ["y"])
    stored = [numpy_helper.from_array(np.asarray(x), n) for x, n in zip(operands, names, strict=True)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", kind, None)
    graph = helper.make_graph([node, used], "g", [x], [y], stored)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    loaded = load(model)
    want = run_graph(loaded, {"x": np.zeros(1, np.float32)})[0][0]
    native = next((n for n in loaded.nodes if n.name == "it"), None)
    if native is None:  # a size computation, which the view settles by the same table
        found = loaded.nodes[0].inputs[0]
        assert found is not None and found.const() is not None
        np.testing.assert_array_equal(found.const(), want)
        return
    made = move(loaded, native, {})  # type: ignore[arg-type]
    assert made is not None
    assert made[0].dtype == want.dtype
    np.testing.assert_array_equal(made[0], want)


@pytest.mark.parametrize("data", [[np.nan, 1.0], [3e9, 1.0], [-np.inf, 0.0]])
def test_floats_that_runtimes_cast_differently_are_left_to_the_runtime(data: list[float]) -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[1] x) => (int32[2] y) <float[2] c> { y = Cast<to=6>(c) }'
    model = onnx.parser.parse_model(text.replace("float[2] c", "float[2] c = {0.0, 0.0}"))
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array(data, np.float32), "c"))
    loaded = load(model)
    assert move(loaded, loaded.nodes[0], {}) is None  # type: ignore[arg-type]
