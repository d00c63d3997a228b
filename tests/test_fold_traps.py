"""Small legal models on which graph optimizers are known to compute wrong answers, through the whole of P.Fold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from foldline import passes as P
from foldline.graph.onnx.native import deserialize
from foldline.graph.onnx.run import Session
from onnx import numpy_helper, parser
from torch import nn

HEAD = '<ir_version: 8, opset_import: ["" : 17]>\n'
Arrays = Mapping[str, np.ndarray]


def model(text: str, stored: Arrays | None = None, head: str = HEAD) -> onnx.ModelProto:
    """A model from onnx's own text form, with stored tensors added to it."""
    proto = parser.parse_model(head + text)
    for name, data in (stored or {}).items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(data), name))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def run(proto: onnx.ModelProto, inputs: Arrays) -> list[Any]:
    return Session(deserialize(proto)).run(inputs)[0]


def folded(proto: onnx.ModelProto, *batches: Arrays, tolerance: float = 1e-5, **options: Any) -> onnx.ModelProto:
    """The folded model, after checking that it gives the same on every batch and kept what the user knows."""
    given = proto.SerializeToString(deterministic=True)
    for windows in (False, True):
        result = P.Fold(**options, **({"verify": "window"} if windows else {}))
        after = _apply(result, proto)
        assert proto.SerializeToString(deterministic=True) == given, "the caller's model was changed"
        onnx.checker.check_model(after, full_check=True)
        assert after.ir_version == proto.ir_version
        before_ops = {(o.domain, o.version) for o in proto.opset_import}
        assert before_ops <= {(o.domain, o.version) for o in after.opset_import}
        for what in ("input", "output"):
            old, new = getattr(proto.graph, what), getattr(after.graph, what)
            assert [v.SerializeToString() for v in old] == [v.SerializeToString() for v in new]
        for batch in batches:
            for a, b in zip(run(proto, batch), run(after, batch), strict=True):
                assert a.shape == b.shape and a.dtype == b.dtype
                if a.dtype.kind == "f":
                    scale = np.abs(a[np.isfinite(a)]).max(initial=0.0)
                    np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * max(scale, 1e-30))
                else:
                    np.testing.assert_array_equal(b, a)
    return after


def _apply(step: P.Fold, proto: onnx.ModelProto) -> onnx.ModelProto:
    from foldline import Pipeline

    made: onnx.ModelProto = Pipeline([step]).run(proto, verify=False).model
    return made


def ops(proto: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in proto.graph.node]


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def statistics(n: int, prefix: str = "", seed: int = 9) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = (rng.uniform(0.5, 2, n), rng.normal(size=n), rng.normal(size=n), rng.uniform(0.5, 2, n))
    return {prefix + k: v.astype(np.float32) for k, v in zip("gbmv", values, strict=True)}


# ---- ONNX --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 4, 1), (4, 1, 1), (4,), (1, 4, 1, 1)], ids=str)
def test_a_scale_along_the_width_is_no_channel_scale(shape: tuple[int, ...]) -> None:
    """Channels, height and width all have length 4."""
    proto = model(
        "g (float[1,3,4,4] x) => (float[1,4,4,4] y) { c = Conv(x, w)  y = Mul(c, s) }",
        {"w": normal(4, 3, 1, 1), "s": normal(*shape, seed=1)},
    )
    after = folded(proto, {"x": normal(1, 3, 4, 4, seed=2)})
    channels = shape in ((4, 1, 1), (1, 4, 1, 1))
    assert ops(after) == (["Conv"] if channels else ["Conv", "Mul"])


def test_a_conv_weight_used_twice() -> None:
    proto = model(
        """g (float[1,3,5,5] x) => (float[1,3,5,5] y, float[1,3,5,5] z) {
             a = Conv(x, w)  y = BatchNormalization(a, g, b, m, v)  r = Relu(x)  z = Conv(r, w) }""",
        {"w": normal(3, 3, 1, 1), **statistics(3)},
    )
    folded(proto, {"x": normal(1, 3, 5, 5, seed=2)})


def test_a_conv_with_two_readers() -> None:
    proto = model(
        """g (float[1,3,5,5] x) => (float[1,3,5,5] y, float[1,3,5,5] z) {
             a = Conv(x, w)  y = BatchNormalization(a, g, b, m, v)  z = Relu(a) }""",
        {"w": normal(3, 3, 1, 1), **statistics(3)},
    )
    folded(proto, {"x": normal(1, 3, 5, 5, seed=2)})


@pytest.mark.parametrize("group", [1, 2, 4])
def test_a_grouped_transposed_convolution(group: int) -> None:
    proto = model(
        f"""g (float[2,4,5,5] x) => (float[2,O,H,W] y) {{
             a = ConvTranspose<group={group}, strides=[2,2]>(x, w)  y = BatchNormalization(a, g, b, m, v) }}""",
        {"w": normal(4, 6 // max(group // 2, 1) if group < 4 else 2, 3, 3), **statistics({1: 6, 2: 12, 4: 8}[group])},
    )
    after = folded(proto, {"x": normal(2, 4, 5, 5, seed=2)})
    assert ops(after) == ["ConvTranspose"]


@pytest.mark.parametrize("high", [-1.0, 0.0, 3.0])
def test_relu_before_clip_with_a_negative_maximum(high: float) -> None:
    proto = model(
        "g (float[2,4] x) => (float[2,4] y) { r = Relu(x)  y = Clip(r, lo, hi) }",
        {"lo": np.float32(-2), "hi": np.float32(high)},
    )
    folded(proto, {"x": 5 * normal(2, 4)})


@pytest.mark.parametrize("value", [0.0, -np.inf])
def test_a_pad_before_a_max_pool(value: float) -> None:
    proto = model(
        "g (float[1,2,6,6] x) => (float[1,2,6,6] y) { p = Pad(x, n, v)  y = MaxPool<kernel_shape=[3,3]>(p) }",
        {"n": np.asarray([0, 0, 1, 1, 0, 0, 1, 1]), "v": np.float32(value)},
    )
    after = folded(proto, {"x": -1 - np.abs(normal(1, 2, 6, 6))}, {"x": normal(1, 2, 6, 6)})
    assert ops(after) == (["Pad", "MaxPool"] if value == 0 else ["MaxPool"])


@pytest.mark.parametrize("counts", [0, 1])
@pytest.mark.parametrize("own", [0, 1])
def test_a_pad_before_an_average_pool(counts: int, own: int) -> None:
    size = 6 + 2 * own
    proto = model(
        f"""g (float[1,2,6,6] x) => (float[1,2,{size},{size}] y) {{ p = Pad(x, n)
             y = AveragePool<kernel_shape=[3,3], pads=[{own},{own},{own},{own}], count_include_pad={counts}>(p) }}""",
        {"n": np.asarray([0, 0, 1, 1, 0, 0, 1, 1])},
    )
    after = folded(proto, {"x": normal(1, 2, 6, 6)})
    assert (ops(after) == ["AveragePool"]) == (not own or bool(counts))


def test_an_average_pool_that_does_not_count_its_padding() -> None:
    proto = model(
        """g (float[1,3,6,6] x) => (float[1,3,6,6] y) {
             p = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(x)
             c = Conv(p, w)  y = BatchNormalization(c, g, b, m, v) }""",
        {"w": normal(3, 3, 1, 1), **statistics(3)},
    )
    folded(proto, {"x": normal(1, 3, 6, 6)})


def test_a_shift_does_not_cross_a_zero_padded_border() -> None:
    proto = model(
        """g (float[1,3,6,6] x) => (float[1,3,6,6] y) {
             n = BatchNormalization(x, g, b, m, v)  y = Conv<pads=[1,1,1,1]>(n, w) }""",
        {"w": normal(3, 3, 3, 3), **statistics(3)},
    )
    folded(proto, {"x": normal(1, 3, 6, 6)})


def test_two_pairs_of_quantize_and_dequantize_with_different_scales() -> None:
    proto = model(
        """g (float[2,4] x) => (float[2,4] y) {
             a = QuantizeLinear(x, s1, z)  b = DequantizeLinear(a, s1, z)
             c = QuantizeLinear(b, s2, z)  y = DequantizeLinear(c, s2, z) }""",
        {"s1": np.float32(0.1), "s2": np.float32(0.037), "z": np.uint8(128)},
    )
    assert ops(folded(proto, {"x": normal(2, 4)})) == ["QuantizeLinear", "DequantizeLinear"] * 2


@pytest.mark.parametrize("target", [[0, -1], [-1, 0], [0, 0, -1], [-1, 6], [0, 6, 1]], ids=str)
def test_a_reshape_with_zero_or_minus_one(target: list[int]) -> None:
    rank = len(target)
    dims = ",".join(f"D{i}" for i in range(rank))
    proto = model(
        f"g (float[N,2,3] x) => (float[{dims}] y) {{ a = Reshape(x, one)  y = Reshape(a, t) }}",
        {"one": np.asarray([0, 6] if target != [0, 0, -1] else [0, 3, 2]), "t": np.asarray(target)},
    )
    folded(proto, *({"x": normal(n, 2, 3)} for n in (1, 4, 6)))


def test_a_reshape_that_copies_an_axis_which_the_first_reshape_moved() -> None:
    proto = model(
        "g (float[N,2,6] x) => (float[A,B,C] y) { a = Reshape(x, s)  y = Reshape(a, t) }",
        {"s": np.asarray([-1, 4, 3]), "t": np.asarray([0, 0, 3])},
    )
    folded(proto, *({"x": normal(n, 2, 6)} for n in (1, 3)))


@pytest.mark.parametrize("bounds", ["", "start=1", "start=-2", "end=2", "end=-1", "start=1, end=-1", "start=5"])
def test_shape_with_start_and_end(bounds: str) -> None:
    proto = model(
        f"""g (float[N,2,3,4] x) => (float[S] y, int64[K] z) {{
             s = Shape<{bounds}>(x)  z = Mul(s, two)  f = Cast<to=1>(s)  y = Relu(f) }}""".replace("<>", ""),
        {"two": np.asarray(2)},
    )
    folded(proto, *({"x": normal(n, 2, 3, 4)} for n in (1, 4)))


def test_a_shape_that_depends_on_where_a_slice_ends() -> None:
    """At most three rows are taken: their number is 3 only for batches of three and more."""
    proto = model(
        """g (float[N,4] x) => (float[M,4] y) {
             s = Slice(x, zero, three, zero)  h = Shape<end=1>(s)  n = Cast<to=1>(h)  y = Mul(s, n) }""",
        {"zero": np.asarray([0]), "three": np.asarray([3])},
    )
    folded(proto, *({"x": normal(n, 4)} for n in (1, 2, 3, 8)))


@pytest.mark.parametrize(
    ("first", "second"),
    [((1, 9), (2, 4)), ((0, 5), (3, 20)), ((-4, -1), (0, 2)), ((2, 3), (5, 9)), ((1, 2**63 - 1), (-3, 2**63 - 1))],
)
@pytest.mark.parametrize("length", ["N", "10"])
def test_a_slice_of_a_slice(first: tuple[int, int], second: tuple[int, int], length: str) -> None:
    proto = model(
        f"g (float[{length},2] x) => (float[M,2] y) {{ a = Slice(x, s, e, z)  y = Slice(a, s2, e2, z) }}",
        {
            **{"s": np.asarray([first[0]]), "e": np.asarray([first[1]]), "z": np.asarray([0])},
            **{"s2": np.asarray([second[0]]), "e2": np.asarray([second[1]])},
        },
    )
    folded(proto, *({"x": normal(n, 2)} for n in ((10,) if length == "10" else (10, 3, 1))))


def test_bias_names_that_are_taken() -> None:
    stored = {"conv_bias": normal(3), "conv.bias": normal(3, seed=3), "c_bias": normal(3, seed=4)}
    proto = model(
        """g (float[1,3,5,5] x) => (float[1,3,5,5] y, float[3] z) {
             [conv] c = Conv(x, w)  y = BatchNormalization(c, g, b, m, v)
             t = Add(conv_bias, "conv.bias")  z = Add(t, c_bias) }""".replace('"conv.bias"', "cb"),
        {"w": normal(3, 3, 1, 1), **statistics(3), "cb": stored["conv.bias"], **stored},
    )
    folded(proto, {"x": normal(1, 3, 5, 5)})


def test_an_input_that_is_also_an_output() -> None:
    proto = model(
        "g (float[2,3] x, float[2,3] u) => (float[2,3] x, float[2,3] y, float[2,3] z) "
        "{ i = Identity(x)  y = Identity(i)  t = Mul(x, one)  z = Identity(t) }",
        {"one": np.ones(1, np.float32)},
    )
    folded(proto, {"x": normal(2, 3), "u": normal(2, 3, seed=1)})


def test_two_outputs_of_one_value() -> None:
    proto = model("g (float[2,3] x) => (float[2,3] y, float[2,3] z) { y = Relu(x)  z = Relu(x) }")
    assert len(folded(proto, {"x": normal(2, 3)}).graph.output) == 2


def test_an_integer_matrix_product_stays_one() -> None:
    rng = np.random.default_rng(0)
    proto = model(
        "g (int32[2,4] x) => (int32[2,3] y) { p = MatMul(x, w)  y = Add(p, b) }",
        {"w": rng.integers(-9, 9, (4, 3), dtype=np.int32), "b": rng.integers(-9, 9, 3, dtype=np.int32)},
    )
    assert ops(folded(proto, {"x": rng.integers(-9, 9, (2, 4), dtype=np.int32)})) == ["MatMul", "Add"]


@pytest.mark.parametrize(
    "random", ["RandomNormalLike(x)", "Bernoulli(h)", "RandomUniformLike(x)"], ids=lambda t: str(t).partition("(")[0]
)
def test_random_twins_stay_two(random: str) -> None:
    proto = model(
        f"g (float[64,64] x) => (float[64,64] y) {{ h = Sigmoid(x)  a = {random}  b = {random}  y = Sub(a, b) }}"
    )
    after = folded(proto)
    assert ops(after)[-3:] == ops(proto)[-3:]
    assert np.abs(run(after, {"x": normal(64, 64)})[0]).max() > 0


def test_common_subexpressions_do_not_cross_domains() -> None:
    head = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>\n'
    proto = parser.parse_model(
        head
        + "g (float[2,3] x) => (float[2,3] y) { a = Gelu(x)  b = com.microsoft.Gelu(x)  y = Sub(a, b) }".replace(
            "a = Gelu(x)", "a = com.microsoft.QuickGelu(x)"
        )
    )
    after = _apply(P.Fold(), proto)
    assert sorted(ops(after)) == ["Gelu", "QuickGelu", "Sub"]
    np.testing.assert_array_equal(run(after, {"x": normal(2, 3)})[0], run(proto, {"x": normal(2, 3)})[0])


def test_common_subexpressions_see_every_attribute_and_optional_operand() -> None:
    proto = model(
        """g (float[3,4] x) => (float[3,4] y, float[3,4] z) {
             a = LeakyRelu<alpha=0.1>(x)  b = LeakyRelu<alpha=0.2>(x)  y = Add(a, b)
             c = Clip(x, l)  d = Clip(x, "", l)  z = Add(c, d) }""".replace('""', ""),
        {"l": np.float32(0.3)},
    )
    folded(proto, {"x": normal(3, 4)})


@pytest.mark.parametrize("function", ["Relu", "Sigmoid", "Clip", "Tanh"])
def test_argmax_of_a_monotone_function_with_ties(function: str) -> None:
    call = "Clip(x, l, h)" if function == "Clip" else f"{function}(x)"
    proto = model(
        f"g (float[2,6] x) => (int64[2,1] y) {{ f = {call}  y = ArgMax<axis=1>(f) }}",
        {"l": np.float32(-1), "h": np.float32(1)},
    )
    ties = np.asarray([[-3, -1, -2, -5, -1, -7], [0, 60, 90, 100, 2, 100]], np.float32)
    folded(proto, {"x": ties})


@pytest.mark.parametrize("bias", [(4,), (1, 4), (1,), (3, 1), (3, 4), ()], ids=str)
@pytest.mark.parametrize("flags", ["transB=1", "transA=1", "alpha=0.5, beta=2.0", "alpha=2.0, transA=1, transB=1"])
def test_gemm_with_all_its_options(flags: str, bias: tuple[int, ...]) -> None:
    a, b = ("5,3" if "transA" in flags else "3,5"), ((4, 5) if "transB" in flags else (5, 4))
    proto = model(
        f"""g (float[{a}] x) => (float[3,4] y) {{ p = Gemm<{flags}>(x, w, c)
             n = BatchNormalization(p, g, b, m, v)  y = Mul(n, s) }}""",
        {"w": normal(*b), "c": normal(*bias, seed=4), "s": normal(4, seed=5), **statistics(4)},
    )
    folded(proto, {"x": normal(*(int(i) for i in a.split(",")), seed=6)})


def test_a_gemm_without_bias_behind_which_a_matrix_is_added() -> None:
    proto = model(
        "g (float[3,5] x) => (float[3,4] y) { p = MatMul(x, w)  y = Add(p, c) }",
        {"w": normal(5, 4), "c": normal(3, 4, seed=2)},
    )
    folded(proto, {"x": normal(3, 5, seed=3)})


def test_a_bias_that_is_computed_at_run_time() -> None:
    proto = model(
        """g (float[1,3,5,5] x, float[3] r) => (float[1,3,5,5] y) {
             q = Relu(r)  c = Conv(x, w, q)  y = BatchNormalization(c, g, b, m, v) }""",
        {"w": normal(3, 3, 1, 1), **statistics(3)},
    )
    folded(proto, {"x": normal(1, 3, 5, 5), "r": normal(3, seed=3)})


def test_a_batch_norm_in_training_mode_stays() -> None:
    proto = model(
        """g (float[4,3,5,5] x) => (float[4,3,5,5] y, float[3] nm, float[3] nv) {
             c = Conv(x, w)  y, nm, nv = BatchNormalization<training_mode=1>(c, g, b, m, v) }""",
        {"w": normal(3, 3, 1, 1), **statistics(3)},
    )
    assert ops(folded(proto, {"x": normal(4, 3, 5, 5)})) == ["Conv", "BatchNormalization"]


def test_a_dropout_in_training_mode_stays() -> None:
    proto = model(
        "g (float[32,32] x) => (float[32,32] y) { y = Dropout(x, r, t) }",
        {"r": np.float32(0.5), "t": np.asarray(True)},
    )
    assert ops(folded(proto)) == ["Dropout"]


def test_statistics_in_half_precision() -> None:
    """A variance that half precision rounds to nothing beside eps, and weights that overflow it when scaled."""
    stored = {k: v.astype(np.float16) for k, v in statistics(3).items()}
    stored["v"] = np.asarray([6e-8, 1e-4, 6e4], np.float16)
    proto = model(
        "g (float16[1,3,5,5] x) => (float16[1,3,5,5] y) { c = Conv(x, w)  y = BatchNormalization(c, g, b, m, v) }",
        {"w": normal(3, 3, 1, 1, dtype=np.float16), **stored},
    )
    folded(proto, {"x": normal(1, 3, 5, 5, dtype=np.float16)}, tolerance=4e-3)


def test_tied_weights_of_an_embedding_and_a_head() -> None:
    proto = model(
        """g (int64[2,3] i) => (float[2,3,7] y) {
             e = Gather(w, i)  n = LayerNormalization(e, g, b)  t = Transpose<perm=[1,0]>(w)  y = MatMul(n, t) }""",
        {"w": normal(7, 4), "g": normal(4, seed=1), "b": normal(4, seed=2)},
    )
    folded(proto, {"i": np.asarray([[0, 6, 3], [1, 1, 2]])})


def test_a_default_that_a_caller_can_override_is_no_constant() -> None:
    proto = model(
        "g (float[2,3] x, float[3] s) => (float[2,3] y, float[3] z) <float[3] s = {1,1,1}> "
        "{ y = Mul(x, s)  t = Add(s, one)  z = Mul(t, t) }",
        {"one": np.ones(3, np.float32)},
    )
    x = normal(2, 3)
    folded(proto, {"x": x}, {"x": x, "s": normal(3, seed=5)})


def test_values_that_a_subgraph_reads() -> None:
    proto = model(
        """g (float[2,3] x, bool c) => (float[2,3] y, float[2,3] z) {
             a = Conv1(x)  y = If(c) <then_branch = t () => (float[2,3] p) { p = Mul(a, two) },
                                     else_branch = e () => (float[2,3] q) { q = Identity(a) }>
             r = Mul(a, two)  z = Relu(r) }""".replace("Conv1(x)", "Identity(x)"),
        {"two": np.asarray([1.0], np.float32)},
    )
    for c in (True, False):
        folded(proto, {"x": normal(2, 3), "c": np.asarray(c)})


def test_a_norm_whose_input_a_subgraph_reads() -> None:
    proto = model(
        """g (float[1,3,4,4] x, bool c) => (float[1,3,4,4] y, float[1,3,4,4] z) {
             a = Conv(x, w)  z = BatchNormalization(a, g, b, m, v)
             y = If(c) <then_branch = t () => (float[1,3,4,4] p) { p = Relu(a) },
                        else_branch = e () => (float[1,3,4,4] q) { q = Neg(a) }> }""",
        {"w": normal(3, 3, 1, 1), **statistics(3)},
    )
    for c in (True, False):
        folded(proto, {"x": normal(1, 3, 4, 4), "c": np.asarray(c)})


@pytest.mark.parametrize(
    "grow", ["Expand(v, n)", "Tile(v, n)", "ConstantOfShape(n)"], ids=lambda t: t.partition("(")[0]
)
def test_a_small_model_does_not_grow(grow: str) -> None:
    """Of less than 200 bytes, with a constant that would take 256 MiB."""
    proto = model(
        f"g (float[1] x) => (float[1] y) {{ b = {grow}  m = ReduceMax<keepdims=0>(b)  y = Add(x, m) }}",
        {"v": np.ones(1, np.float32), "n": np.asarray([1 << 26])},
        head='<ir_version: 8, opset_import: ["" : 13]>\n',
    )
    assert proto.ByteSize() < 260
    after = _apply(P.Fold(), proto)
    assert after.ByteSize() < 2 * proto.ByteSize()
    assert [v.name for v in after.graph.output] == ["y"]


def test_negative_zero_infinity_and_nan_pass_through() -> None:
    proto = model(
        """g (float[6] x) => (float[6] y, float[6] z, float[6] u) {
             a = Mul(x, zero)  y = Add(a, zero)  b = Mul(x, one)  z = Div(b, one)
             c = Pow(x, one)  u = Sub(c, zero) }""",
        {"zero": np.zeros(1, np.float32), "one": np.ones(1, np.float32)},
    )
    folded(proto, {"x": np.asarray([0.0, -0.0, np.inf, -np.inf, np.nan, 1e38], np.float32)})


def test_a_neutral_element_that_broadcasts_is_not_neutral() -> None:
    proto = model(
        "g (float[N,1] x) => (float[A,3] y, float[B,N,1] z) { y = Mul(x, a)  z = Add(x, b) }",
        {"a": np.ones((1, 3), np.float32), "b": np.zeros((1, 1, 1), np.float32)},
    )
    folded(proto, {"x": normal(4, 1)}, {"x": normal(1, 1)})


def test_a_symbolic_axis_may_be_one() -> None:
    proto = model(
        "g (float[N,4] x) => (float[M,4] y) { a = Mul(x, ones)  y = Expand(a, s) }",
        {"ones": np.ones((7, 1), np.float32), "s": np.asarray([7, 4])},
    )
    folded(proto, {"x": normal(7, 4)}, {"x": normal(1, 4)})


@pytest.mark.parametrize("chain", [(6, 1), (10, 1), (1, 11), (7, 6), (11, 1), (9, 1), (3, 2)], ids=str)
def test_casts_that_lose_something_stay(chain: tuple[int, int]) -> None:
    via, back = chain
    proto = model(f"g (float[5] x) => (T[5] y) {{ a = Cast<to={via}>(x)  y = Cast<to={back}>(a) }}".replace(
        "T[5]", {1: "float", 11: "double", 6: "int32", 2: "uint8"}[back] + "[5]"))  # fmt: skip
    folded(proto, {"x": np.asarray([0.3, -1.7, 100.123, 16777217.0 / 2**20, 0.0], np.float32)})


def test_empty_tensors() -> None:
    proto = model(
        """g (float[N,0,4] x) => (float[A,B] y, float[C,D,E] z) {
             a = Reshape<allowzero=1>(x, s)  y = Reshape(a, t)  z = Concat<axis=1>(x, x) }""",
        {"s": np.asarray([0, 4]), "t": np.asarray([-1, 4])},
    )
    folded(proto, {"x": np.zeros((3, 0, 4), np.float32)})


# ---- nn.Module ---------------------------------------------------------------------------------------------
def kept(module: nn.Module, *inputs: torch.Tensor, tolerance: float = 1e-5) -> nn.Module:
    """The folded module, after checking that it gives the same as the module."""
    result: nn.Module = P.fold(module.eval(), inputs, verify=False).model
    with torch.no_grad():
        a, b = module(*inputs), result(*inputs)
    assert float((a - b).abs().max()) <= tolerance * float(a.abs().max())
    return result


def awake(norm: Any) -> Any:
    """A batch norm whose statistics are not those of a new one."""
    torch.manual_seed(3)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


class Twice(nn.Module):
    """A conv (and, if asked, its norm) that the forward calls twice."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.both = nn.Conv2d(3, 3, 1), awake(nn.BatchNorm2d(3)), both

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x))
        return self.norm(self.conv(y)) if self.both else self.conv(torch.relu(y))


@pytest.mark.parametrize("both", [True, False])
def test_a_module_called_twice(both: bool) -> None:
    kept(Twice(both), torch.randn(1, 3, 4, 4))


@pytest.mark.parametrize("shape", [(5, 4), (5, 6, 4), (5, 4, 4)], ids=str)
def test_linear_and_batch_norm_on_two_and_three_axes(shape: tuple[int, ...]) -> None:
    """On (N, C, L) the norm's channels are axis 1, which the linear layer does not produce."""
    channels = 4 if len(shape) == 2 else shape[1]
    kept(nn.Sequential(nn.Linear(4, 4), awake(nn.BatchNorm1d(channels))), torch.randn(*shape))


def test_a_batch_norm_in_training_mode_of_a_module() -> None:
    """Written into the forward: a graph of a module is its inference, whatever mode its layers are in."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), awake(nn.BatchNorm2d(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n = self.norm
            return nn.functional.batch_norm(self.conv(x), None, None, n.weight, n.bias, training=True)

    kept(Normed(), torch.randn(6, 3, 4, 4))


def test_tied_weights_of_a_module() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.head = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight
            nn.init.normal_(self.norm.weight)

        def forward(self, i: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.norm(self.embed(i)))
            return logits

    kept(Tied(), torch.tensor([[0, 6, 3], [1, 1, 2]]))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_grouped_transposed_convolution_of_a_module(groups: int) -> None:
    kept(
        nn.Sequential(nn.ConvTranspose2d(4, 8, 3, stride=2, groups=groups), awake(nn.BatchNorm2d(8))),
        torch.randn(2, 4, 5, 5),
    )
