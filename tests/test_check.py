"""fl.check itself: kinds of input, order, options, the plain ONNX rules against ONNX, and the tables in its page."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from foldline.backends.base import Diagnostic
from foldline.backends.check import check
from foldline.backends.onnxruntime.rules import RULES as CPU
from foldline.backends.onnxruntime.rules_cuda import RULES as CUDA
from foldline.backends.rules import OnnxFile, markdown
from foldline.backends.rules.rule import SEVERITY
from foldline.backends.rules.validity import RULES as ONNX
from foldline.backends.tensorrt.rules import RULES as TRT
from foldline.graph.errors import ConfigError, ModelFileError
from support.trt_cases import CONV, CONV_IN, E4, I4, I8, MM, MM_IN, MM_W, F, W, conv_constants, mm_constants, model, qd

PAGE = Path(__file__).resolve().parents[1] / "docs" / "check.md"
TABLES = {"onnx": ONNX, "tensorrt": TRT, "onnxruntime": CPU, "onnxruntime-cuda": CUDA}


@pytest.mark.parametrize("name", TABLES)
def test_the_page_holds_every_rule(name: str) -> None:
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(rf"<!-- rules: {name} -->\n(.*?)<!-- end -->", text, flags=re.DOTALL)
    assert found is not None and found[1] == markdown(TABLES[name])
    for rule in TABLES[name]:
        assert rule.consequence in SEVERITY and rule.fix and len(rule.text.split()) > 3


def bad() -> onnx.ModelProto:
    return model(CONV_IN + qd("x", "xd") + W + CONV, conv_constants(zx=I8(3)))


def test_all_kinds_of_onnx_model_are_judged_alike_and_left_alone(tmp_path: Path) -> None:
    given = bad()
    before = given.SerializeToString()
    path = tmp_path / "m.onnx"
    onnx.save(given, path)
    found = check(given, "tensorrt")
    assert [d.rule for d in found] == ["zero-point"] * 2 and {d.node for d in found} == {"xd_q", "xd"}
    assert all(d.consequence == "error" and d.severity == "error" and "3" in d.message for d in found)
    for other in (path, str(path), ir.serde.deserialize_model(given)):
        assert check(other, "tensorrt") == found
    assert given.SerializeToString() == before
    assert check(given, "onnx") == []
    with pytest.raises(ConfigError):
        check(given, "nothing")
    with pytest.raises(ModelFileError):
        check(tmp_path / "none.onnx", "tensorrt")
    (tmp_path / "broken.onnx").write_bytes(b"no protobuf at all")
    assert [d.rule for d in check(tmp_path / "broken.onnx", "tensorrt")] == ["onnx"]


def test_errors_come_first_and_a_module_keeps_its_names() -> None:
    text = CONV_IN + qd("x", "xd") + W.replace("axis=0", "axis=1") + CONV
    both = model(text, conv_constants(zx=I8(3)))
    assert [d.severity for d in check(both, "tensorrt")] == ["error", "error", "warning"]
    net = torch.nn.Conv2d(3, 4, 1).eval()
    assert check(net, "tensorrt", torch.randn(1, 3, 4, 4)) == []
    assert check(net, "onnxruntime-cpu", torch.randn(1, 3, 4, 4)) == []
    assert Diagnostic("r", "error", "n", "m").to_dict()["consequence"] == ""


def test_nameless_nodes_are_called_by_their_results() -> None:
    given = bad()
    for node in given.graph.node:
        node.name = ""
    assert {d.node for d in check(given, "tensorrt")} == {"xd_q", "xd"}


def refused(made: onnx.ModelProto) -> bool:
    """Whether ONNX's full check or ONNX Runtime's loading refuses it."""
    try:
        onnx.checker.check_model(made, full_check=True)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feeds = {v.name: np.zeros(v.shape, np.float32) for v in session.get_inputs()}
        session.run(None, feeds)
    except Exception:  # each of the three raises classes of its own
        return True
    return False


def _mm(opset: int, text: str = qd("x", "xd") + MM_W + MM, **changes) -> onnx.ModelProto:
    return model(MM_IN + text, mm_constants(**changes), opset)


EIGHT = {"zx": np.array(0, E4), "w": np.ones((32, 16), E4), "zw": np.zeros(16, E4)}
FOUR = {"w": np.ones((32, 16), I4), "zw": np.zeros(16, I4)}
PLAIN = {
    "int8": (_mm(13), ""),
    "float8": (_mm(19, **EIGHT), ""),
    "float8 too early": (_mm(18, **EIGHT), "opset"),
    "int4": (_mm(21, MM_W + " y = MatMul(x, wd)\n}", **FOUR), ""),
    "int4 too early": (_mm(19, MM_W + " y = MatMul(x, wd)\n}", **FOUR), "opset"),
    "zero point of another type": (_mm(21, zx=np.uint8(0), zw=np.zeros(16, np.uint8)), "zero-point-type"),
    "no such axis": (_mm(21, qd("x", "xd") + MM_W.replace("axis=1", "axis=5") + MM), "axis"),
    "scale of one element": (_mm(21, sx=np.array([0.1], F), zx=np.zeros(1, I8)), ""),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_rules_fire_where_onnx_refuses(name: str) -> None:
    made, rule = PLAIN[name]
    assert {d.rule for d in check(made, "onnx")} == ({rule} if rule else set())
    assert refused(made) == bool(rule)


def test_every_plain_rule_has_a_case() -> None:
    assert {rule for _, rule in PLAIN.values() if rule} == {r.id for r in ONNX}


def test_the_view_evaluates_constants_and_knows_what_is_static() -> None:
    text = "g (float[2] x) => (float[2] y) { a = Add(k, k) b = Mul(a, x) c = RandomNormal<shape=[2]>() d = Add(c, k) "
    made = model(text + "y = Add(b, d) }", {"k": np.array([1, 2], F)})
    file = OnnxFile(made)
    values = {v.name: v for n in file.nodes for v in n.outputs}
    assert file.const(values["a"]).tolist() == [2, 4] and file.is_static(values["a"])
    assert not file.is_static(values["b"]) and not file.is_static(values["d"]) and file.const(values["d"]) is None
    assert file.shape(values["b"]) == (2,) and file.static_dtype(values["b"]) == "float32" and file.opset == 21
