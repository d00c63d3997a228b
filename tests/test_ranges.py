"""Range estimators: what each promises, and that bounds depend on the data alone, not on batches or their order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from foldline.graph.errors import ConfigError, ConstraintError
from foldline.graph.fx import load_torch
from foldline.graph.onnx import load_onnx
from foldline.passes.quantize.numerics import grid, range_params
from foldline.passes.quantize.ranges import RANGES, collect_ranges, estimator, weight_bounds
from foldline.passes.quantize.ranges.histograms import squared_errors
from foldline.passes.quantize.spec.formats import TensorFormat
from hypothesis import given, settings
from hypothesis import strategies as st

UINT8 = TensorFormat("uint8")
INT8 = TensorFormat("int8", symmetric=True)
FORMATS = [UINT8, INT8, TensorFormat("uint8", range=(0, 15)), TensorFormat("float8_e4m3fn"), TensorFormat("int16")]


def bounds(name: str, x: np.ndarray, form: TensorFormat = UINT8, **options) -> tuple[float, float]:
    made = estimator(name, **options)
    statistic = made.statistic()
    for part in np.array_split(x, 4):
        statistic.update(part)
    return made.bounds(statistic, form)


def mse(x: np.ndarray, low: float, high: float, form: TensorFormat = UINT8) -> float:
    return float(np.square(range_params(low, high, form).apply(x).astype(np.float64) - x).mean())


def long_tails(n: int = 40_000) -> np.ndarray:
    return np.random.default_rng(1).standard_t(4, (n // 40, 40)).astype(np.float32)


def sparse_input(n: int = 40_000) -> np.ndarray:
    """A point cloud's pseudo image: nine of ten elements exactly zero, the rest positive with a long tail."""
    rng = np.random.default_rng(2)
    x = rng.lognormal(0, 1.2, (n // 40, 40)).astype(np.float32)
    return np.where(rng.random(x.shape) < 0.9, np.float32(0), x)


# ---- what depends on the data alone ----------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(RANGES))
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=30),
    st.lists(st.integers(0, 30), max_size=4),
    st.randoms(use_true_random=False),
)
def test_order_and_batching_do_not_matter(name: str, values, cuts, random) -> None:
    whole = np.array(values, np.float32).reshape(-1, 1)
    made = estimator(name)
    one = made.statistic()
    one.update(whole)
    parts = [p for p in np.split(whole, sorted(cuts)) if len(p)]
    random.shuffle(parts)
    other = made.statistic()
    for p in parts:
        other.update(p)
    left, right = made.statistic(), made.statistic()
    for i, p in enumerate(parts):
        (left if i % 2 else right).update(p)
    left.merge(right)
    expected = made.bounds(one, UINT8)
    assert made.bounds(other, UINT8) == expected and made.bounds(left, UINT8) == expected


@pytest.mark.parametrize("name", sorted(RANGES))
@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.dtype}{f.range or ''}")
def test_bounds_lie_within_the_extremes_and_hold_zero(name: str, form: TensorFormat) -> None:
    for x in (long_tails(), np.abs(long_tails()), -np.abs(long_tails()), np.zeros((8, 4), np.float32)):
        low, high = bounds(name, x, form)
        assert min(x.min(), 0) <= low <= 0 <= high <= max(x.max(), 0)


def test_any_shapes_stream_together() -> None:
    rng = np.random.default_rng(0)
    shapes = [(2, 7, 3), (1, 50, 3), (3, 3), (5,), ()]
    for name in RANGES:
        made = estimator(name)
        statistic = made.statistic()
        for shape in shapes:
            statistic.update(np.asarray(rng.standard_normal(shape), np.float32))
        low, high = made.bounds(statistic, UINT8)
        assert low < 0 < high and statistic.count == sum(int(np.prod(s)) for s in shapes)


# ---- what each one is ---------------------------------------------------------------------------------------------
def test_minmax_and_mean() -> None:
    x = long_tails()
    assert bounds("minmax", x) == (x.min(), x.max())
    low, high = bounds("mean", x)
    assert low == pytest.approx(x.min(1).astype(np.float64).mean()) and high == pytest.approx(x.max(1).mean(), rel=1e-6)


def test_percentile_clips_its_share() -> None:
    x = long_tails()
    low, high = bounds("percentile", x, percentile=99.0)
    assert (x < low).mean() == pytest.approx(0.005, abs=2e-3) and (x > high).mean() == pytest.approx(0.005, abs=2e-3)
    low, high = bounds("percentile", np.abs(x), percentile=99.0)
    assert low == 0 and (np.abs(x) > high).mean() == pytest.approx(0.01, abs=2e-3)


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.dtype}{f.range or ''}")
def test_the_error_on_a_histogram_is_the_error_on_the_data(form: TensorFormat) -> None:
    x = np.random.default_rng(0).laplace(0, 1, (200, 200)).astype(np.float32)
    statistic = estimator("mse").statistic()
    statistic.update(x)
    for low, high in [(x.min(), x.max()), (-3.0, 4.0), (-1.0, 1.0)]:
        found = squared_errors(statistic, np.array([low]), np.array([high]), form)[0]
        assert found == pytest.approx(mse(x, low, high, form), rel=0.15, abs=statistic.width**2 / 12)


@pytest.mark.parametrize("form", FORMATS[:3], ids=lambda f: f"{f.dtype}{f.range or ''}")
@pytest.mark.parametrize("one_sided", [False, True])
def test_mse_and_l2_find_the_least_error(form: TensorFormat, one_sided: bool) -> None:
    x = np.abs(long_tails()) if one_sided else long_tails()
    found = mse(x, *bounds("mse", x, form), form)
    assert found < 0.95 * mse(x, x.min(), x.max(), form)
    brute = min(
        mse(x, min(x.min(), 0) * a, x.max() * b, form)
        for a in np.geomspace(0.02, 1, 12)
        for b in np.geomspace(0.02, 1, 12)
    )
    assert found <= 1.05 * brute
    assert mse(x, *bounds("l2", x, form), form) < mse(x, x.min(), x.max(), form)


def test_fewer_levels_clip_more() -> None:
    x = long_tails()
    widths = [np.subtract(*bounds("mse", x, TensorFormat("uint8", range=(0, 2**b - 1)))[::-1]) for b in (4, 6, 8)]
    assert all(np.diff(widths) > 0)


def test_entropy_differs_from_minmax_where_tails_are_long_and_not_where_there_are_none() -> None:
    x = long_tails()
    low, high = bounds("entropy", x)
    assert high - low < 0.5 * (x.max() - x.min())
    even = np.random.default_rng(0).uniform(-1, 1, (1000, 40)).astype(np.float32)
    low, high = bounds("entropy", even)
    assert high - low > 0.95 * (even.max() - even.min())


def test_entropy_is_the_least_divergence_of_the_direct_formula() -> None:
    """The published recipe written as loops, on the same histogram: the threshold found is the best or as good."""
    x = np.abs(np.random.default_rng(3).laplace(0, 1, (500, 40))).astype(np.float32)
    made = estimator("entropy", bins=512)
    statistic = made.statistic()
    statistic.update(x)
    form = TensorFormat("uint8", range=(0, 31))
    edges, counts = statistic.filled()
    centres = (edges[:-1] + edges[1:]) / 2

    def divergence(last: int) -> float:
        params = range_params(0.0, float(edges[last]), form)
        group = params.quantize(centres[:last].astype(np.float32)).astype(int)
        p = counts[:last].astype(float)
        p[-1] += counts[last:].sum()
        q = np.zeros(last)
        for level in set(group):
            members = [i for i in range(last) if group[i] == level and counts[i]]
            for i in members:
                q[i] = sum(counts[j] for j in members) / len(members)
        if any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)):
            return np.inf
        p, q = p / p.sum(), q / q.sum()
        return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a)

    found = {last: divergence(last) for last in range(32, len(counts) + 1, 2)}
    threshold = made.bounds(statistic, form)[1]
    mine = divergence(max(int(np.searchsorted(centres, threshold)), 1))
    assert mine <= 1.2 * min(found.values()) and min(found.values()) < found[max(found)] / 2


def test_ranges_for_sparse_inputs_beat_entropy_and_percentile_and_keep_zeros_exact() -> None:
    x = sparse_input()
    assert 0.88 < (x == 0).mean() < 0.92
    for form in (UINT8, INT8):
        low, high = bounds("sparse", x, form)
        found = mse(x, low, high, form)
        assert found < mse(x, *bounds("entropy", x, form), form)
        assert found < mse(x, *bounds("percentile", x, form), form)
        assert found <= mse(x, x.min(), x.max(), form)
        assert (range_params(low, high, form).apply(x)[x == 0] == 0).all()


# ---- weights ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "form",
    [
        TensorFormat("int8", symmetric=True, granularity="out_channel"),
        TensorFormat("int4", symmetric=True, granularity="block", block=16),
        TensorFormat("uint4", granularity="block", block=16),
        TensorFormat("int4", symmetric=True, granularity="in_channel"),
        TensorFormat("int4", symmetric=True),
        TensorFormat("float4_e2m1fn", granularity="block", block=16),
    ],
    ids=lambda f: f"{f.dtype}-{f.granularity}",
)
@pytest.mark.parametrize("axes", [(0, 1), (1, 0)])
def test_weight_ranges_of_least_error(form: TensorFormat, axes: tuple[int, int]) -> None:
    w = np.random.default_rng(0).standard_t(4, (24, 40)).astype(np.float32)  # 40: the last block is short

    def error(method: str) -> np.ndarray:
        low, high, along = weight_bounds(w, form, *axes, method=method)
        params = grid(low, high, form, along, form.block)
        return np.square(params.apply(w).astype(np.float64) - w)

    wide, best = error("minmax"), error("mse")
    assert best.sum() < wide.sum() * (0.999 if form.bits > 4 else 0.95)
    if form.granularity == "out_channel":  # each channel on its own
        assert (best.sum(axes[1]) <= wide.sum(axes[1]) * (1 + 1e-6)).all()


def test_weight_ranges_name_what_there_is() -> None:
    with pytest.raises(ConfigError, match="minmax, mse"):
        weight_bounds(np.ones((2, 2), np.float32), INT8, 0, method="best")


# ---- collecting ------------------------------------------------------------------------------------------------------
class Attention(torch.nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = x @ x.transpose(-1, -2)
        if self.how == "add":
            scores = scores + (1.0 - mask[:, None, :].float()) * -10000.0
        elif self.how == "fill":
            scores = scores.masked_fill(mask[:, None, :] == 0, torch.finfo(torch.float32).min)
        else:
            scores = torch.where(mask[:, None, :] == 0, torch.tensor(float("-inf")), scores)
        return (scores.transpose(1, 2) * 1.0).softmax(-2)


@pytest.mark.parametrize(
    ("front", "how"), [("fx", "add"), ("fx", "fill"), ("fx", "where"), ("onnx", "add"), ("onnx", "where")]
)
def test_what_masks_put_in_never_enters(front: str, how: str) -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    net = Attention(how).eval()
    if front == "fx":
        graph = load_torch(net, (x, mask))
    else:
        graph = load_onnx(torch.onnx.export(net, (x, mask), dynamo=True, verbose=False).model_proto)
    named = [n.output.name for n in graph.nodes if n.op in ("add", "masked_fill", "where", "transpose", "softmax")]
    named = [n for n in named if graph.values[n].dtype == "float32"]
    found, seen = collect_ranges(graph, [(x, mask)], {n: [n] for n in named}, estimator("minmax"))
    assert seen == 1
    reach = float((x @ x.transpose(-1, -2)).abs().max())
    for statistic in found.values():
        assert float(statistic.low) >= -1.001 * reach and float(statistic.high) <= 1.001 * reach


def test_shapes_constants_and_booleans_have_no_range() -> None:
    graph = load_onnx(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["" : 19]>
            g (float[n, 3] x) => (float[n, 3] y, int64[2] s) <float[3] w = {1.0, 2.0, 3.0}>
            { s = Shape(x)  y = Mul(x, w) }"""
        )
    )
    for name, what in (("s", "int64"), ("w", "a constant")):
        with pytest.raises(ConstraintError, match=what):
            collect_ranges(graph, [np.ones((2, 3), np.float32)], {name: [name]}, estimator("minmax"))


def test_one_range_of_several_values() -> None:
    graph = load_onnx(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["" : 19]>
            g (float[n, 3] x) => (float[n, 3] y) { a = Exp(x)  b = Neg(x)  y = Sub(a, b) }"""
        )
    )
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    found, _ = collect_ranges(graph, [x[:2], x[2:]], {"a": ["a", "b"]}, estimator("minmax"))
    assert float(found["a"].low) == (-x).min() and float(found["a"].high) == max(np.exp(x).max(), (-x).max())


def test_unknown_names_and_options_are_named() -> None:
    with pytest.raises(ConfigError, match="minmax, mean, percentile"):
        estimator("max")
    with pytest.raises(ConfigError, match="has no option 'percentile'"):
        estimator("entropy", percentile=99)
    with pytest.raises(ConfigError, match="no such percentile"):
        estimator("percentile", percentile=20)


def test_the_example_of_the_docs_runs() -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "ranges.md").read_text()
    exec(compile(text.split("```python")[1].split("```")[0], "ranges.md", "exec"), {})


def test_the_docs_name_every_estimator() -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "ranges.md").read_text()
    assert all(f"| `{name}` |" in text for name in RANGES)
