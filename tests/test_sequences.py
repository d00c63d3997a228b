"""A sequence of pieces, read one piece at a time, is a split; what else reads a sequence keeps it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from foldline import passes as P
from onnx import TensorProto, helper, numpy_helper


def model(
    split: Any = None, *, keepdims: int = 1, axis: int = -1, at: tuple[int, ...] = (0, 1, -1), length: bool = False
) -> onnx.ModelProto:
    """Split x [batch, 3, 6]; relu of pieces ``at``, and the length of the sequence where asked for."""
    held = [numpy_helper.from_array(np.array(i, np.int64), f"i{k}") for k, i in enumerate(at)]
    if split is not None:
        held.append(numpy_helper.from_array(np.array(split, np.int64), "sizes"))
    attrs = {} if split is not None else {"keepdims": keepdims}
    nodes = [
        helper.make_node("SplitToSequence", ["x", "sizes"][: 1 + (split is not None)], ["s"], "cut", axis=axis, **attrs)
    ]
    outputs = []
    for k in range(len(at)):
        nodes += [
            helper.make_node("SequenceAt", ["s", f"i{k}"], [f"p{k}"], f"at{k}"),
            helper.make_node("Relu", [f"p{k}"], [f"y{k}"], f"relu{k}"),
        ]
        outputs.append(helper.make_tensor_value_info(f"y{k}", TensorProto.FLOAT, None))
    if length:
        nodes.append(helper.make_node("SequenceLength", ["s"], ["n"], "length"))
        outputs.append(helper.make_tensor_value_info("n", TensorProto.INT64, []))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 6])
    graph = helper.make_graph(nodes, "g", [x], outputs, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def run(proto: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


@pytest.mark.parametrize("verify", ["model", "window"])
@pytest.mark.parametrize(
    "made",
    [
        model([1, 2, 3]),
        model(2),
        model(4, at=(0, 1)),
        model(None, at=(0, 5, -2)),
        model(None, keepdims=0, at=(0, 5, -2)),
        model(None, keepdims=0, axis=1),
        model([6], at=(0, -1)),
    ],
    ids=["sizes", "step", "rest", "ones", "squeezed", "axis", "whole"],
)
def test_pieces_of_a_split(made: onnx.ModelProto, verify: str) -> None:
    cleaned = P.clean(made, verify=verify).model
    kinds = {n.op_type for n in cleaned.graph.node}
    assert not kinds & {"SplitToSequence", "SequenceAt"}
    for batch in (1, 4):
        x = np.random.default_rng(batch).normal(size=(batch, 3, 6)).astype(np.float32)
        for a, b in zip(run(made, x), run(cleaned, x), strict=True):
            assert a.shape == b.shape and (a == b).all()


def test_other_readers_keep_the_sequence() -> None:
    made = model([1, 2, 3], length=True)
    result = P.clean(made)
    assert [n.op_type for n in result.model.graph.node].count("SplitToSequence") == 1
    assert "reads the sequence" in str(result.report.explain("cut"))


def test_sizes_of_the_input_keep_the_sequence() -> None:
    made = model(None, axis=0, at=(0,))  # as many pieces as the batch has rows
    assert [n.op_type for n in P.clean(made).model.graph.node].count("SplitToSequence") == 1
