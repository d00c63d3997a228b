"""The streaming collector: bounded, exact where it says so, and independent of the order of batches."""

from __future__ import annotations

import itertools
import math

import numpy as np
import onnx
import pytest
from foldline.graph.errors import ConstraintError
from foldline.graph.onnx import load_onnx
from foldline.passes.calibrate import Gram, Histogram, MeanMinMax, MinMax, Moments, collect
from hypothesis import given, settings
from hypothesis import strategies as st

BATCHES = [np.random.default_rng(i).standard_normal((8, 5, 3)).astype(np.float32) * 3**i for i in range(4)]


def fill(statistic, batches):
    for x in batches:
        statistic.update(x)
    return statistic


def test_minmax_is_exact_per_tensor_and_per_channel() -> None:
    whole = np.concatenate(BATCHES)
    total = fill(MinMax(), BATCHES)
    assert (total.low, total.high) == (whole.min(), whole.max())
    each = fill(MinMax(axis=1), BATCHES)
    np.testing.assert_array_equal(each.low, whole.min((0, 2)))
    np.testing.assert_array_equal(each.high, whole.max((0, 2)))
    assert each.count == whole.size


def test_mean_of_extremes_has_the_same_bits_in_every_order() -> None:
    seen = {(s.low, s.high) for p in itertools.permutations(BATCHES) for s in [fill(MeanMinMax(), p)]}
    assert len(seen) == 1
    (low, high) = seen.pop()
    assert low == pytest.approx(np.mean([sample.min() for b in BATCHES for sample in b]))
    assert high == pytest.approx(np.mean([sample.max() for b in BATCHES for sample in b]))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40), st.integers(0, 40)
)
def test_mean_of_extremes_does_not_depend_on_how_samples_are_batched(values, cut) -> None:
    whole = np.array(values, np.float32).reshape(-1, 1)
    one, two, three = MeanMinMax(), MeanMinMax(), MeanMinMax()
    one.update(whole)
    fill(two, [whole[cut:], whole[:cut]])
    fill(three, [whole[:cut]])
    three.merge(fill(MeanMinMax(), [whole[cut:]]))
    assert one.low == two.low == three.low and one.samples == two.samples == three.samples
    # The sum is exact: what math.fsum gives, over the number of samples.
    assert one.low == math.fsum(float(v) for v in whole[:, 0]) / len(values)


def test_histogram_equals_numpy_on_its_own_edges() -> None:
    h = fill(Histogram(bins=64), BATCHES)
    whole = np.concatenate([b.ravel() for b in BATCHES]).astype(np.float64)
    inner = np.floor(whole / h.width).astype(int) - h.start
    np.testing.assert_array_equal(h.counts, np.bincount(inner, minlength=64))
    assert h.counts.sum() == whole.size
    assert h.edges()[0] <= whole.min() and whole.max() < h.edges()[-1]
    # The width is minimal: half of it would not fit.
    assert np.floor(whole.max() * 2 / h.width) - np.floor(whole.min() * 2 / h.width) >= 64


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=6),
        min_size=2,
        max_size=5,
    ),
    st.randoms(use_true_random=False),
)
def test_histogram_depends_on_the_data_alone(batches, random) -> None:
    arrays = [np.array(b, np.float32) for b in batches]
    one = fill(Histogram(bins=16), arrays)
    shuffled = list(arrays)
    random.shuffle(shuffled)
    other = fill(Histogram(bins=16), shuffled)
    single = fill(Histogram(bins=16), [np.concatenate(arrays)])
    left, right = fill(Histogram(bins=16), shuffled[:1]), fill(Histogram(bins=16), shuffled[1:])
    left.merge(right)
    for twin in (other, single, left):
        assert (one.exponent, one.start if one.exponent is not None else 0, one.zeros) == (
            twin.exponent,
            twin.start if twin.exponent is not None else 0,
            twin.zeros,
        )
        np.testing.assert_array_equal(one.counts, twin.counts)
    assert one.counts.sum() + one.zeros == sum(a.size for a in arrays)


def test_quantile_is_within_a_bin_of_the_truth() -> None:
    x = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    h = fill(Histogram(), np.split(x, 10))
    for share in (0.001, 0.1, 0.5, 0.9, 0.999):
        assert abs(h.quantile(share) - np.quantile(x, share)) <= h.width
    assert h.quantile(0) == x.min() and h.quantile(1) == x.max()


def test_moments_and_gram_equal_the_direct_formulas_and_merge() -> None:
    whole = np.concatenate(BATCHES).astype(np.float64)
    m = fill(Moments(axis=1), BATCHES)
    np.testing.assert_allclose(m.mean(), whole.mean((0, 2)))
    np.testing.assert_allclose(m.norm(), np.sqrt((whole**2).sum((0, 2))))
    g = fill(Gram(), BATCHES[:2])
    g.merge(fill(Gram(), BATCHES[2:]))
    rows = whole.reshape(-1, 3)
    np.testing.assert_allclose(g.matrix, rows.T @ rows)
    assert g.rows == len(rows)


def small_graph():
    return load_onnx(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["" : 18]>
            g (float[n, 3] x) => (float[n, 3] y) { h = Exp(x)  y = Relu(h) }"""
        )
    )


def test_collect_taps_inner_values_and_inputs_in_lots() -> None:
    graph = small_graph()
    batches = [BATCHES[0][:, 0], BATCHES[1][:, 1]]
    for memory in (1 << 30, 1):
        wanted = {"x": MinMax(), "h": MinMax(), "y": Histogram()}
        assert collect(graph, iter(batches), wanted, memory=memory) == 2
        inputs = np.concatenate(batches)
        assert wanted["x"].high == inputs.max() and wanted["x"].low == inputs.min()
        assert float(wanted["h"].high) == pytest.approx(np.exp(inputs.max()), rel=1e-6)
        assert wanted["y"].count == inputs.size


def test_collect_refuses_nothing_and_what_is_not_finite() -> None:
    graph = small_graph()
    with pytest.raises(ConstraintError, match="empty"):
        collect(graph, [], {"h": MinMax()})
    with pytest.raises(ConstraintError, match=r"not finite[\s\S]*value: h"):
        collect(graph, [np.full((2, 3), 1e4, np.float32)], {"h": MinMax()})
