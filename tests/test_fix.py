"""fl.fix: every mechanical fix on the file it is for; what it leaves, what it changes, and that the input stays."""

from __future__ import annotations

from pathlib import Path

import foldline as fl
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from foldline.backends.fix import _repairs, fix, rules_of
from foldline.backends.onnxruntime.plain import run_plain
from foldline.backends.tensorrt.engine import EngineOptions, build, library
from foldline.cli import main
from foldline.graph.errors import ConfigError
from foldline.passes.quantize.numerics import sqnr_db
from support import ort_cases, trt_cases
from support.trt_cases import I8, U8, F, conv_constants, model, qd

TRT = [c for c in trt_cases.cases() if c.rules & set(rules_of("tensorrt"))]
ORT = [c for c in ort_cases.cases() if c.rules & set(rules_of("onnxruntime-cpu"))]
KEPT = {"fan-out": {"two pairs"}, "uint8-stored": {"uint8 input"}, "input-q": set()}
"""Rule -> files where its fix does not apply: two scales differ on purpose, the integers are the graph's input."""
BLOCKED = {"pad with 1", "times a vector", "maximum of integers", "maximum of uint8"}


@pytest.mark.parametrize("case", TRT, ids=lambda c: c.name)
def test_fixed_files_give_tensorrt_nothing_of_that_kind_to_refuse(case: trt_cases.Case) -> None:
    _fixed(case, "tensorrt", case.options)


@pytest.mark.parametrize("case", ORT, ids=lambda c: c.name)
def test_fixed_files_fuse_in_onnx_runtime(case: ort_cases.Case) -> None:
    _fixed(case, case.target, {})


def _fixed(case: ort_cases.Case | trt_cases.Case, target: str, options: dict) -> None:
    before = case.model.SerializeToString()
    made, report = fix(case.model, target, **options)
    assert case.model.SerializeToString() == before, "the input was changed"
    onnx.checker.check_model(made)
    left = {d.rule for d in report.after}
    repairable = {rule for rule in case.rules if rule in rules_of(target)}
    if case.name in BLOCKED or any(case.name in KEPT.get(rule, ()) for rule in repairable):
        assert left == case.rules and not report.actions
        return
    assert not left & repairable and left <= case.rules
    assert report.actions and all(node and what for _, node, what in report.actions)
    for value in report.sqnr_db.values():
        floor = 1 if "attention" in case.name else 9 if "per channel" in case.name or "per row" in case.name else 15
        assert value > floor


def test_each_repair_tells_its_numbers() -> None:
    """Two faults in one file: a bias of int32, uint8 activations."""
    case = next(c for c in TRT if c.name == "int32 bias")
    made = onnx.ModelProto.FromString(case.model.SerializeToString())
    zero = next(t for t in made.graph.initializer if t.name == "zx")
    zero.CopyFrom(onnx.numpy_helper.from_array(U8(100), "zx"))
    _, report = fix(made, "tensorrt")
    assert [step.repair for step in report.steps] == ["float_bias", "int8"]
    first, last = report.steps
    assert first.sqnr_db == {"y": float("inf")} and 15 < last.sqnr_db["y"] < 60 and last.sqnr_db == report.sqnr_db
    assert (first.before, last.after) == (len(report.before), 0) and first.after == last.before > 0
    assert sum(step.places for step in report.steps) == len(report.actions)
    assert "float_bias (1 place)" in str(report) and report.to_dict()["steps"][1]["repair"] == "int8"
    _, silent = fix(made, "tensorrt", compare=False)
    assert [step.sqnr_db for step in silent.steps] == [{}, {}]


def test_all_repairs_are_some_rules_and_the_other_way_round() -> None:
    used = set(rules_of("tensorrt").values()) | set(rules_of("onnxruntime-cpu").values())
    assert used == set(_repairs())
    assert rules_of("onnxruntime-cuda") == {}


def test_exact_fixes_change_no_number() -> None:
    names = {"int32 bias", "uint8 weights", "transposed integers", "scale of shape [1]", "relu", "dequantized shape"}
    names |= {"stored scalar", "scalar given back", "table looked up", "table, a scale per feature"}
    found = {c.name: fix(c.model, "tensorrt").report.sqnr_db for c in TRT if c.name in names}
    assert set(found) == names
    assert all(v == np.inf for values in found.values() for v in values.values())
    same = {"int8, read twice", "conv uint8 weights", "gemm, bias scale"}
    for case in ORT:
        if case.name in same:
            assert all(v == np.inf for v in fix(case.model, "onnxruntime-cpu").report.sqnr_db.values())


def test_uint8_activations_keep_their_range_and_what_they_cut() -> None:
    text = trt_cases.CONV_IN + qd("x", "xd") + trt_cases.W + trt_cases.CONV
    made, report = fix(model(text, conv_constants(zx=U8(0))), "tensorrt")
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in made.graph.initializer}
    q = next(n for n in made.graph.node if n.op_type == "QuantizeLinear")
    assert stored[q.input[1]] == pytest.approx(0.1 * 255 / 127) and stored[q.input[2]].dtype == np.int8
    assert [n.op_type for n in made.graph.node].count("Relu") == 1
    # Behind a Relu there is nothing to cut.
    relu = trt_cases.CONV_IN + " r = Relu(x)\n" + qd("r", "xd") + trt_cases.W + trt_cases.CONV
    made, _ = fix(model(relu, conv_constants(zx=U8(0))), "tensorrt")
    assert [n.op_type for n in made.graph.node].count("Relu") == 1
    assert report.sqnr_db["y"] > 20


def test_asymmetric_to_symmetric_loses_what_the_coarser_step_costs() -> None:
    """A range of [-2, 6] takes steps of 6/127 instead of 8/255: 20 log10(12/8) = 3.5 dB of noise more, no clipping."""
    scale, zero = F(8 / 255), U8(64)
    text = "g (float[4,64] x) => (float[4,64] y) {\n" + qd("x", "y") + "}"
    made = model(text, {"sx": scale, "zx": zero})
    x = np.random.default_rng(0).uniform(-2, 6, (4, 64)).astype(F)
    fixed, _ = fix(made, "tensorrt", {"x": x})
    # The only pair feeds the output: it goes entirely.
    assert np.array_equal(run_plain(ir.serde.deserialize_model(fixed), {"x": x})["y"], x)
    text = trt_cases.CONV_IN + qd("x", "xd") + trt_cases.W + trt_cases.CONV
    made = model(text, conv_constants(sx=scale, zx=zero))
    x = np.random.default_rng(0).uniform(-2, 6, (1, 16, 8, 8)).astype(F)
    fixed, _ = fix(made, "tensorrt")
    plain = model(text.replace(qd("x", "xd"), " xd = Identity(x)\n"), conv_constants(sx=None, zx=None))
    truth, old, new = (run_plain(ir.serde.deserialize_model(m), {"x": x})["y"] for m in (plain, made, fixed))
    loss = sqnr_db(truth, old) - sqnr_db(truth, new)
    assert 2.5 < loss < 4.5


def test_qlinear_operators_become_pairs_with_the_same_numbers() -> None:
    head = "g (uint8[1,4,6,6] x) => (uint8[1,8,6,6] y) {\n"
    conv = " y = QLinearConv<pads=[1,1,1,1]>(x, sx, zx, w, sw, zw, sy, zy, b)\n}"
    rng = np.random.default_rng(0)
    constants = {
        "sx": F(0.02),
        "zx": U8(120),
        "w": rng.integers(-120, 120, (8, 4, 3, 3)).astype(I8),
        "sw": np.linspace(0.01, 0.02, 8).astype(F),
        "zw": np.zeros(8, I8),
        "sy": F(0.1),
        "zy": U8(130),
        "b": rng.integers(-900, 900, 8).astype(np.int32),
    }
    made = model(head + conv, constants)
    fixed, report = fix(made, "tensorrt")
    ops = {n.op_type for n in fixed.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= ops and "QLinearConv" not in ops
    assert report.sqnr_db["y"] > 40  # only ties of the last rounding fall elsewhere
    # The graph's own integers cannot change their type: that is left, and said.
    assert {d.rule for d in report.after} == {"zero-point", "uint8-stored"}


def test_kinds_options_and_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = next(c for c in TRT if c.name == "int32 bias")
    path = tmp_path / "m.onnx"
    onnx.save(case.model, path)
    bytes_before = path.read_bytes()
    made, report = fl.fix(path, "tensorrt")
    assert isinstance(made, ir.Model) and path.read_bytes() == bytes_before
    assert report.to_dict()["after"] == [] and "bias stored in float" in str(report)
    with pytest.raises(ConfigError, match="ONNX"):
        fl.fix(object(), "tensorrt")
    with pytest.raises(SystemExit) as done:
        main(["fix", str(path), "--target", "tensorrt", "-o", str(tmp_path / "fixed.onnx")])
    assert done.value.code == 0 and "bias stored in float" in capsys.readouterr().out
    assert fl.check(tmp_path / "fixed.onnx", "tensorrt") == []
    with pytest.raises(SystemExit) as done:
        main(["check", str(path), "--target", "tensorrt"])
    assert done.value.code == 1


def test_an_onnx_ir_model_with_noted_types_stays_as_it_is() -> None:
    """Clones of onnx_ir share type objects: retyping must not reach the original."""
    text = trt_cases.CONV_IN + qd("x", "xd") + trt_cases.W + trt_cases.CONV
    given = onnx.shape_inference.infer_shapes(model(text, conv_constants(zx=U8(120))))
    original = ir.serde.deserialize_model(given)
    before = ir.serde.serialize_model(original).SerializeToString()
    _, report = fix(original, "tensorrt")
    assert ir.serde.serialize_model(original).SerializeToString() == before
    assert report.sqnr_db["y"] > 20 and report.note == ""


@pytest.mark.slow
@pytest.mark.skipif(library() is None, reason="no TensorRT: pip install foldline[tensorrt-oracle]")
def test_tensorrt_takes_what_was_fixed(tmp_path: Path) -> None:
    files, names = [], []
    for case in TRT:
        made, report = fix(case.model, "tensorrt", **case.options)
        if not any(d.consequence == "error" for d in report.after) and not case.options:
            files.append(tmp_path / f"{len(files)}.onnx")
            names.append(case.name)
            onnx.save(made, files[-1])
    reports = build(files, EngineOptions())
    assert len(files) > 30
    assert {n: r.errors for n, r in zip(names, reports, strict=True) if not r.built} == {}
    for name, report in zip(names, reports, strict=True):
        if name not in BLOCKED | {"transposed convolution"} and "lstm" not in name:
            assert set(report.counts()) <= {"int8"} or "attention" in name, (name, report.counts())
