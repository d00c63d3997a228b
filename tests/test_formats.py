"""Formats of weights: codes round-trip, graphs compute exactly what decode says, bytes are those that are stored."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from foldline.graph.errors import ConfigError, ConstraintError
from foldline.graph.execute import run_graph
from foldline.graph.fx import load_torch
from foldline.graph.onnx import load_onnx
from foldline.passes.quantize.formats import (
    FORMATS,
    Codebook,
    Emitter,
    Float4,
    Integers,
    NormalFloat,
    Plain,
    PowerExponent,
    compensated,
    format_of,
    product_table,
)
from foldline.passes.quantize.formats.grids import E2M1
from foldline.passes.quantize.formats.lookup import nearest_numbers
from foldline.passes.quantize.formats.packing import pack, packed_bytes, unpack
from foldline.passes.quantize.formats.scales import e4m3_table, power_table, store
from torch import nn

CASES: list[tuple[str, dict[str, Any]]] = [
    *[("int", {"bits": b, "block": 16, "symmetric": s}) for b in (2, 3, 4, 8) for s in (True, False)],
    ("int", {"bits": 5, "block": 0}),
    ("int", {"bits": 4, "block": 32, "scale": "float16", "search": True}),
    ("nf4", {"block": 16}),
    ("mxfp4", {}),
    ("mxfp4", {"search": True}),
    ("nvfp4", {}),
    ("fp8", {}),
    ("fp8_e5m2", {"block": 16}),
    ("int16", {}),
    ("power", {"bits": 4}),
    ("power", {"bits": 3, "block": 16}),
    ("bcq", {"bits": 3, "block": 16}),
    ("bcq", {"bits": 2, "block": 0, "powers": False}),
    ("kmeans", {"bits": 3}),
    ("kmeans", {"bits": 6, "step": 2, "block": 16, "scaled": True}),
    ("kmeans", {"bits": 10, "step": 4}),
]
IDS = ["-".join([n, *(f"{k}{v}" for k, v in o.items())]) for n, o in CASES]


def weights(rows: int = 24, columns: int = 72) -> np.ndarray:
    rng = np.random.default_rng(0)
    w = rng.standard_t(5, (rows, columns)).astype(np.float32) * 0.05
    w[3, :40] = 0  # blocks of zeros
    return w


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("count", [1, 7, 64])
def test_codes_of_any_width_survive_packing(bits: int, count: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, count)).astype(np.uint16)
    packed = pack(codes, bits)
    np.testing.assert_array_equal(unpack(packed, bits, count), codes)
    assert sum(p.nbytes for p in packed) == packed_bytes(3, count, bits)
    assert packed_bytes(1, 64, bits) == 8 * bits  # whole bytes waste nothing


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_numbers_on_the_grid_stay_and_others_go_to_the_nearest(name: str, options: dict[str, Any]) -> None:
    w = weights()
    encoded = format_of(name, **options).fit(w)
    decoded = encoded.decode()
    assert decoded.dtype == np.float32 and decoded.shape == w.shape
    np.testing.assert_array_equal(encoded.values(encoded.nearest(decoded, 0), 0), decoded)
    np.testing.assert_array_equal(encoded.nearest(w, 0), encoded.codes)
    # No code is nearer than the one chosen.
    error = np.square(decoded - w, dtype=np.float64).reshape(24, -1, encoded.step).sum(2)
    rng = np.random.default_rng(1)
    for _ in range(20):
        if encoded.codes.dtype.kind == "u":
            other = rng.integers(0, 2 ** getattr(encoded, "bits", 8), encoded.codes.shape).astype(encoded.codes.dtype)
        else:
            other = rng.permutation(encoded.codes.ravel()).reshape(encoded.codes.shape)
        off = np.square(encoded.values(other, 0) - w, dtype=np.float64).reshape(24, -1, encoded.step).sum(2)
        assert (error <= off * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("front", ["fx", "onnx"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_a_graph_computes_exactly_what_decode_says(name: str, options: dict[str, Any], front: str) -> None:
    axis = (CASES.index((name, options)) + (front == "onnx")) % 2
    w = weights(24, 72) if axis == 0 else np.ascontiguousarray(weights(24, 72).T)
    encoded = format_of(name, **options).fit(w, axis)
    graph = holder(w, front)
    node = next(n for n in graph.nodes if n.op == "add")
    emitter = Emitter(graph)
    graph.set_input(node, 1, encoded.write(emitter, "w_low"))
    graph.refresh()
    x = np.zeros(w.shape, np.float32)
    outputs, _ = run_graph(graph, {graph.inputs[0].name: x})
    np.testing.assert_array_equal(outputs[0], encoded.decode())
    stored = sum(v.numpy().nbytes for k, v in graph.weights.items() if k.startswith("w_low"))
    assert stored == encoded.nbytes


class Add(nn.Module):
    def __init__(self, w: np.ndarray) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.from_numpy(w))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.w


def holder(w: np.ndarray, front: str) -> Any:
    """A graph that adds the weight to its input, so that the output shows it."""
    if front == "fx":
        return load_torch(Add(w), torch.zeros(w.shape))
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 13]>
        g (float[{w.shape[0]}, {w.shape[1]}] x) => (float[{w.shape[0]}, {w.shape[1]}] y)
        <float[{w.shape[0]}, {w.shape[1]}] w = {{{", ".join(["0"] * w.size)}}}> {{ y = Add(x, w) }}"""
    )
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(w, "w"))
    return load_onnx(model)


# ---- the formats one by one -------------------------------------------------------------------------------------
def test_integer_blocks_are_those_of_the_reference_arithmetic() -> None:
    from foldline.passes.quantize.numerics import weight_params
    from foldline.passes.quantize.spec import TensorFormat

    w = weights(16, 64)
    for symmetric, dtype, span in ((True, "int4", (-8, 7)), (False, "uint4", (0, 15))):
        form = TensorFormat(dtype, symmetric=symmetric, granularity="block", block=16, range=span)
        reference = weight_params(w, 0, form, in_axis=1)
        ours = Integers(bits=4, block=16, symmetric=symmetric).fit(w)
        np.testing.assert_array_equal(ours.decode(), reference.dequantize(reference.quantize(w)))


def test_float4_and_float8_round_as_their_types_do() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-7, 7, 4000), np.arange(-24, 25) / 4]).astype(np.float32)
    wanted = np.clip(x, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(E2M1[nearest_numbers(np.clip(x, -6, 6), E2M1)], wanted)
    w = weights()
    for dtype in ("float8_e4m3fn", "float8_e5m2"):
        encoded = Plain(dtype).fit(w)
        scale = encoded.scales.numbers()
        np.testing.assert_array_equal(
            (w / scale).astype(getattr(ml_dtypes, dtype)).astype(np.float32) * scale, encoded.decode()
        )


def test_microscaling_scales_are_powers_of_two_and_those_of_nvfp4_are_e4m3() -> None:
    w = weights()
    mx, nv = Float4().fit(w), Float4(kind="nvfp4").fit(w)
    assert mx.block == 32 and nv.block == 16 and mx.scales is not None and nv.scales is not None
    assert (np.frexp(mx.scales.numbers())[0] == 0.5).all() and mx.scales.nbytes == 24 * 3
    ratio = nv.scales.numbers() / nv.scales.tensor
    np.testing.assert_allclose(ratio.astype(ml_dtypes.float8_e4m3fn).astype(np.float32), ratio, rtol=1e-6)
    assert np.square(nv.decode() - w).sum() < np.square(mx.decode() - w).sum()
    searched = Float4(search=True).fit(w)
    assert np.square(searched.decode() - w).sum() < np.square(mx.decode() - w).sum()


def test_stored_scales() -> None:
    s = np.array([[1e-3, 0.7, 0.5, 3.0, 0.0]], np.float32)
    np.testing.assert_array_equal(store(s, "e8m0").numbers(), [[2.0**-9, 1.0, 0.5, 4.0, 1.0]])
    np.testing.assert_allclose(store(s, "e4m3").numbers()[0, :4], s[0, :4], rtol=0.07)
    assert power_table()[127] == 1 and e4m3_table()[0x7E] == 448


def test_normal_float_is_better_than_integers_on_normal_numbers() -> None:
    w = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    nf = np.square(NormalFloat(block=64).fit(w).decode() - w).mean()
    assert nf < np.square(Integers(bits=4, block=64, symmetric=True).fit(w).decode() - w).mean()


def test_a_searched_scale_is_never_worse() -> None:
    w = weights(24, 96)
    cost = np.random.default_rng(2).uniform(0.1, 3, 96)
    for bits in (2, 3, 4):
        plain, searched = (Integers(bits=bits, block=32, search=s).fit(w, importance=cost) for s in (False, True))
        errors = [(np.square(e.decode() - w) * cost).reshape(24, 3, 32).sum(2) for e in (plain, searched)]
        assert (errors[1] <= errors[0] * (1 + 1e-6)).all() and errors[1].sum() < 0.97 * errors[0].sum()


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_range_that_clips_loses_gain_and_gets_it_back(symmetric: bool) -> None:
    w = np.random.default_rng(0).standard_normal((32, 128)).astype(np.float32)

    def gains(q: np.ndarray) -> np.ndarray:
        return np.asarray((w * q).reshape(32, -1, 64).sum(2) / np.square(w).reshape(32, -1, 64).sum(2))

    lossy, kept = (
        Integers(bits=2, block=64, symmetric=symmetric, search=True, gain=g).fit(w).decode() for g in (False, True)
    )
    assert gains(lossy).mean() < 0.92 and np.abs(gains(kept) - 1).max() < 1e-5
    plain = Integers(bits=2, block=64, symmetric=symmetric).fit(w).decode()
    assert np.square(kept - w).sum() < np.square(plain - w).sum()  # and it still is the better estimate


def test_ranges_are_searched_by_the_outputs_where_the_inputs_are_known() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((400, 6)) @ rng.standard_normal((6, 96)) + rng.standard_normal((400, 96)) * 0.1 + 0.5
    w = rng.standard_normal((24, 96)).astype(np.float32)
    gram = x.T @ x

    def errors(q: np.ndarray) -> np.ndarray:
        return np.stack([np.square(x[:, k : k + 32] @ (q - w)[:, k : k + 32].T).sum(0) for k in (0, 32, 64)], 1)

    fmt = Integers(bits=3, block=32, search=True)
    plain, by_weight, by_power, by_output = (
        errors(e.decode())
        for e in (
            Integers(bits=3, block=32).fit(w),
            fmt.fit(w),
            fmt.fit(w, importance=np.diag(gram)),
            fmt.fit(w, 0, gram),
        )
    )
    assert (by_output <= plain * (1 + 1e-6)).all()
    assert by_output.sum() < 0.8 * min(by_weight.sum(), by_power.sum())
    with pytest.raises(ConstraintError, match="Gram matrix"):
        fmt.fit(w, importance=gram[:5, :5])
    with pytest.raises(ConfigError, match="gain"):
        format_of("mxfp4", gain=True)


# ---- power exponents --------------------------------------------------------------------------------------------
def test_exponent_one_is_uniform_quantization_bit_for_bit() -> None:
    from foldline.passes.quantize.numerics import weight_params
    from foldline.passes.quantize.spec import TensorFormat

    w = weights()
    w[5, :15] = np.arange(-7, 8) * np.float32(w[5].max() / 7) / 2  # ties
    form = TensorFormat("int4", symmetric=True, granularity="out_channel", range=(-7, 7))
    reference = weight_params(w, 0, form)
    encoded = PowerExponent(bits=4, exponent=1.0).fit(w)
    np.testing.assert_array_equal(encoded.codes.astype(int) - 8, reference.quantize(w).astype(int))
    np.testing.assert_array_equal(encoded.decode(), reference.dequantize(reference.quantize(w)))


def test_the_searched_exponent_beats_uniform_and_its_neighbours() -> None:
    w = np.random.default_rng(0).standard_normal((32, 256)).astype(np.float32)
    found = PowerExponent(bits=4).prepared(w).exponent
    assert found is not None and 0.3 < found < 1

    def error(a: float) -> float:
        return float(np.square(PowerExponent(bits=4, exponent=a).fit(w).decode() - w).sum())

    assert error(found) < 0.85 * error(1.0)
    assert error(found) <= min(error(found + 0.1), error(found - 0.1))


def test_products_of_codes_are_a_table() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 20, 30)).astype(np.float32)
    fmt = PowerExponent(bits=4, exponent=0.6)
    p, q = fmt.fit(a), fmt.fit(b)
    table = product_table(4, 0.6)
    assert table.shape == (16, 16)
    codes = np.arange(16) - 8
    for i in range(1, 16):  # the entry follows from the integer product alone
        for j in range(1, 16):
            c = codes[i] * codes[j]
            assert table[i, j] == pytest.approx(np.sign(c) * abs(c) ** (1 / 0.6), rel=1e-6)
    assert p.scales is not None and q.scales is not None
    looked = table[p.codes[:, None], q.codes[None]].sum(2) * (p.scales.numbers() * q.scales.numbers().T)
    np.testing.assert_allclose(looked, p.decode() @ q.decode().T, rtol=1e-4, atol=1e-4)


# ---- error compensation -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options"),
    [("int", {"bits": 3, "block": 16}), ("int", {"bits": 4, "block": 0}), ("nf4", {"block": 16}), ("mxfp4", {}),
     ("nvfp4", {}), ("bcq", {"bits": 2, "block": 16}), ("kmeans", {"bits": 3}), ("power", {"bits": 3}),
     ("kmeans", {"bits": 6, "step": 2})],
)  # fmt: skip
def test_compensation_lowers_the_output_error(name: str, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    w = weights(24, 96)
    x = rng.standard_normal((400, 96)) @ rng.standard_normal((96, 96)) * 0.3 + rng.standard_normal((400, 96))
    gram = x.T @ x
    fmt = format_of(name, **options)
    plain, better = fmt.fit(w), compensated(fmt, w, 0, gram)
    errors = [np.square(x @ (e.decode() - w).T).sum() for e in (plain, better)]
    assert errors[1] < 0.8 * errors[0]
    assert better.nbytes == plain.nbytes and better.codes.shape == plain.codes.shape
    if better.step == 1:
        np.testing.assert_array_equal(better.values(better.nearest(better.decode(), 0), 0), better.decode())


def test_compensation_without_correlation_is_rounding() -> None:
    w = weights(24, 96)
    fmt = Integers(bits=4, block=0)
    np.testing.assert_array_equal(compensated(fmt, w, 0, np.eye(96)).codes, fmt.fit(w).codes)
    with pytest.raises(ConstraintError, match="does not fit"):
        compensated(fmt, w, 0, np.eye(95))


def test_bad_options_are_named() -> None:
    assert set(FORMATS) >= {"int", "nf4", "mxfp4", "nvfp4", "fp8", "power", "bcq", "kmeans"}
    with pytest.raises(ConfigError, match="unknown weight format"):
        format_of("int5")
    with pytest.raises(ConfigError, match="no such option"):
        format_of("nf4", bits=4)
    with pytest.raises(ConfigError, match="2 to 8"):
        format_of("int", bits=9)
    with pytest.raises(ConfigError, match="divide"):
        Codebook(bits=4, step=5).fit(np.zeros((2, 12), np.float32))
