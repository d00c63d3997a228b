"""Error measures against their formulas, and the first diverging value by name."""

from __future__ import annotations

import json
import math

import numpy as np
import onnx
import pytest
from foldline.graph.errors import ConstraintError
from foldline.graph.execute import synthesize_inputs
from foldline.graph.onnx import load_onnx
from foldline.graph.verify import compare, difference


def net(a: float = 2.0, b: float = 3.0, outputs: str = "y"):
    return load_onnx(
        onnx.parser.parse_model(
            f"""<ir_version: 10, opset_import: ["" : 18]>
            g (float[4, 5] x) => (float[4, 5] {outputs})
            <float[1] a = {{{a}}}, float[1] b = {{{b}}}>
            {{ first = Mul(x, a)  second = Tanh(first)  third = Mul(second, b)  {outputs} = Add(third, first) }}"""
        )
    )


def arrays(*seeds: int):
    return [synthesize_inputs(net(), s) for s in seeds]


def test_equal_graphs_are_equal() -> None:
    found = compare(net(), net(), arrays(0, 1))
    assert found.ok and found.first_divergence is None
    out = found.outputs["y"]
    assert (out.sqnr_db, out.max_abs, out.max_rel, out.top1) == (math.inf, 0, 0, 1)
    assert out.cosine == pytest.approx(1)
    assert json.loads(json.dumps(found.to_dict()))["outputs"]["y"]["sqnr_db"] is None


def test_measures_follow_their_formulas() -> None:
    before, after, inputs = net(), net(b=3.3), arrays(0, 1)
    found = compare(before, after, inputs)
    pairs = [(before.run(i)[0][0].astype(float), after.run(i)[0][0].astype(float)) for i in inputs]
    a, b = (np.stack(x) for x in zip(*pairs, strict=True))
    out = found.outputs["y"]
    assert out.sqnr_db == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()))
    assert out.cosine == pytest.approx((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))
    assert out.max_abs == pytest.approx(np.abs(a - b).max())
    assert out.max_rel == pytest.approx(max(np.abs(p - q).max() / np.abs(p).max() for p, q in pairs))
    assert out.top1 == pytest.approx((a.argmax(-1) == b.argmax(-1)).mean())
    assert not found.ok


@pytest.mark.parametrize(("change", "name"), [({"b": 3.1}, "third"), ({"a": 2.1}, "first")])
def test_the_first_diverging_value_is_named(change, name) -> None:
    assert compare(net(), net(**change), arrays(0)).first_divergence == name


def test_tolerance_decides() -> None:
    slightly = net(b=3.0 * (1 + 1e-4))
    assert not compare(net(), slightly, arrays(0), rtol=1e-5).ok
    assert compare(net(), slightly, arrays(0), rtol=1e-3).ok


def test_values_whose_shapes_differ_are_passed_over() -> None:
    def chain(width: int, gain: float):
        w1 = ",".join("0.5" for _ in range(2 * width))
        w2 = ",".join(str(gain) for _ in range(width))
        return load_onnx(
            onnx.parser.parse_model(
                f"""<ir_version: 10, opset_import: ["" : 18]>
                g (float[1, 2] x) => (float[1, 1] y)
                <float[2, {width}] w1 = {{{w1}}}, float[{width}, 1] w2 = {{{w2}}}>
                {{ h = MatMul(x, w1)  y = MatMul(h, w2) }}"""
            )
        )

    before = chain(4, 0.25)
    inputs = [synthesize_inputs(before)]
    assert compare(before, chain(2, 0.5), inputs).ok
    assert compare(before, chain(2, 0.6), inputs).first_divergence == "y"


def test_nan_and_infinity() -> None:
    a = np.array([1.0, np.nan, np.inf])
    assert difference(a, a.copy()) == (0.0, 0.0, "")
    assert difference(a, np.array([1.0, 0.0, np.inf]))[1] == math.inf
    assert difference(a, np.array([1.0, np.nan, -np.inf]))[1] == math.inf
    assert difference(np.zeros(2), np.array([0, 1e-9]))[1] == math.inf


def test_a_shape_that_changes_is_a_difference() -> None:
    def sized(axis: int):
        return load_onnx(
            onnx.parser.parse_model(
                f"""<ir_version: 10, opset_import: ["" : 18]>
                g (float[2, 3] x) => (float[p, q] y) {{ y = Concat<axis = {axis}>(x, x) }}"""
            )
        )

    found = compare(sized(0), sized(1), [synthesize_inputs(sized(0))])
    assert not found.ok and found.outputs["y"].note == "shape (4, 3) became (2, 6)"


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ConstraintError, match="nothing to compare"):
        compare(net(), net(), [])
