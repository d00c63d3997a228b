"""The clean-up rules: each removes what it says, keeps the numbers, and refuses what it must."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import foldline as fl
import numpy as np
import onnx
import pytest
import torch
from foldline import Pipeline
from foldline import passes as P
from foldline.graph.onnx.native import deserialize
from foldline.graph.onnx.run import Session
from foldline.passes.base import Context
from foldline.passes.clean import CLEAN_RULES
from onnx import helper, numpy_helper, parser
from torch import nn

HEAD = '<ir_version: 8, opset_import: ["" : 17]>\n'


def model(text: str, head: str = HEAD, **stored: Any) -> onnx.ModelProto:
    proto = parser.parse_model(head + text)
    for name, data in stored.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(data), name))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def run(proto: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[Any]:
    return Session(deserialize(proto)).run(inputs)[0]


def cleaned(proto: onnx.ModelProto, *batches: dict[str, np.ndarray], **options: Any) -> onnx.ModelProto:
    """The cleaned model (also with every rewrite checked alone), equal to the given one on every batch, to the bit."""
    for verify in ("off", "window"):
        after: onnx.ModelProto = Pipeline([P.Clean(verify=verify, **options)]).run(proto, verify=False).model
        onnx.checker.check_model(after, full_check=True)
        assert [v.SerializeToString() for v in after.graph.output] == [
            v.SerializeToString() for v in proto.graph.output
        ]
        for batch in batches:
            for a, b in zip(run(proto, batch), run(after, batch), strict=True):
                assert a.dtype == b.dtype and a.shape == b.shape
                np.testing.assert_array_equal(a, b)
    return after


def ops(proto: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in proto.graph.node]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X = {"x": normal(2, 3, 4)}

ONE = {"one": np.ones(1, np.float32), "zero": np.zeros((), np.float32)}
AXIS = {"ax": np.asarray([1])}

SQUARE = np.arange(4).reshape(2, 2, 1)
CUBE = np.arange(24).reshape(2, 3, 4)
FLAT = {"f": np.asarray([-1])}

KEPT = [
    ("a = Gather<axis=1>(x, i)  y = Relu(a)", {"i": np.asarray([0, 1, 2])}, ["Relu"]),
    ("a = Gather<axis=1>(x, i)  y = Relu(a)", {"i": np.asarray([0, 2, 1])}, ["Gather", "Relu"]),
    ("a = Gather<axis=1>(x, i)  y = Relu(a)", {"i": np.asarray([0, 1])}, ["Gather", "Relu"]),
    ("a = Gather<axis=2>(x, i)  b = Reshape(a, s)  y = Relu(b)", {"i": SQUARE, "s": np.asarray([2, 3, 4])}, ["Relu"]),
    ("a = Reshape(x, f)  b = Gather<axis=0>(a, i)  y = Relu(b)", FLAT | {"i": CUBE}, ["Relu"]),
    ("a = Reshape(x, f)  b = Gather<axis=0>(a, i)  y = Relu(b)", FLAT | {"i": 23 - CUBE}, 3),
    ("a = Mul(x, one)  y = Relu(a)", ONE, ["Relu"]),
    ("a = Mul(one, x)  b = Sub(a, zero)  c = Div(b, one)  d = Pow(c, one)  y = Add(zero, d)", ONE, 1),
    ("a = Sub(zero, x)  y = Div(one, a)", ONE, ["Sub", "Div"]),
    ("a = Mul(x, zero)  y = Relu(a)", ONE, ["Mul", "Relu"]),
    ("a = Cast<to=1>(x)  y = Relu(a)", {}, ["Relu"]),
    ("a = Cast<to=11>(x)  b = Cast<to=1>(a)  y = Relu(b)", {}, ["Relu"]),
    ("a = Cast<to=10>(x)  b = Cast<to=1>(a)  y = Relu(b)", {}, ["Cast", "Cast", "Relu"]),
    ("a = Cast<to=9>(x)  b = Cast<to=6>(a)  c = Cast<to=1>(b)  y = Relu(c)", {}, ["Cast", "Cast", "Relu"]),
    ("a = Transpose<perm=[0,1,2]>(x)  y = Relu(a)", {}, ["Relu"]),
    ("a = Transpose<perm=[2,0,1]>(x)  b = Transpose<perm=[1,2,0]>(a)  y = Relu(b)", {}, ["Relu"]),
    ("a = Transpose<perm=[2,0,1]>(x)  b = Transpose<perm=[0,2,1]>(a)  y = Relu(b)", {}, ["Transpose", "Relu"]),
    ("a = Reshape(x, s)  b = Reshape(a, t)  y = Relu(b)", {"s": np.asarray([6, 4]), "t": np.asarray([0, -1])}, 2),
    ("a = Reshape(x, s)  b = Reshape(a, t)  y = Relu(b)", {"s": np.asarray([6, 4]), "t": np.asarray([2, 3, 4])}, 1),
    ("a = Flatten<axis=1>(x)  b = Reshape(a, t)  y = Relu(b)", {"t": np.asarray([3, -1])}, ["Reshape", "Relu"]),
    ("a = Unsqueeze(x, ax)  b = Squeeze(a, ax)  y = Relu(b)", AXIS, ["Relu"]),
    ("a = Concat<axis=1>(x)  y = Relu(a)", {}, ["Relu"]),
    ("a, b, c = Split<axis=1>(x)  d = Concat<axis=1>(a, b, c)  y = Relu(d)", {}, ["Relu"]),
    ("a, b, c = Split<axis=1>(x)  d = Concat<axis=1>(a, c, b)  y = Relu(d)", {}, ["Split", "Concat", "Relu"]),
    ("a, b, c = Split<axis=1>(x)  d = Concat<axis=0>(a, b, c)  y = Relu(d)", {}, ["Split", "Concat", "Relu"]),
    ("r = Relu(x)  a = Concat<axis=1>(x, r)  b, c = Split<axis=1>(a)  y = Sub(b, c)", {}, ["Relu", "Sub"]),
    ("a = Identity(x)  b = Dropout(a)  y = Relu(b)", {}, ["Relu"]),
    ("a = Relu(x)  b = Relu(x)  y = Add(a, b)", {}, ["Relu", "Add"]),
    ("a = Relu(x)  b = Sigmoid(x)  c = Tanh(b)  y = Neg(a)", {}, ["Relu", "Neg"]),
    ("a = Expand(x, s)  y = Relu(a)", {"s": np.asarray([1, 3, 1])}, ["Relu"]),
    ("a = Expand(x, s)  y = Relu(a)", {"s": np.asarray([2, 1, 1, 1])}, ["Expand", "Relu"]),
    ("a = Tile(x, s)  y = Relu(a)", {"s": np.asarray([1, 1, 1])}, ["Relu"]),
    ("a = Pad(x, s)  y = Relu(a)", {"s": np.zeros(6, np.int64)}, ["Relu"]),
    ("a = Pad(x, s)  b = Pad(a, s)  y = Relu(b)", {"s": np.asarray([0, 1, 0, 2, 0, 0])}, ["Pad", "Relu"]),
    ('a = Clip(x)  y = Relu(a)', {}, ["Relu"]),
    ("a = Slice(x, s, e, s)  y = Relu(a)", {"s": np.asarray([0]), "e": np.asarray([2**31])}, ["Relu"]),
    ("s = Shape(x)  f = Cast<to=1>(s)  m = ReduceProd<keepdims=0>(f)  y = Mul(x, m)", {}, ["Mul"]),
    ("c = Add(p, q)  d = Mul(c, c)  y = Add(x, d)", {"p": normal(4), "q": normal(4, seed=1)}, ["Add"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "stored", "left"), KEPT, ids=[t for t, _, _ in KEPT])
def test_rules_on_onnx(text: str, stored: dict[str, np.ndarray], left: list[str] | int) -> None:
    proto = model(f"g (float[2,3,4] x) => (float[{_dims(text, stored)}] y) {{ {text} }}", **stored)
    after = cleaned(proto, X, {"x": np.asarray(-100 * X["x"])})
    assert len(ops(after)) == left if isinstance(left, int) else ops(after) == left


def _dims(text: str, stored: dict[str, np.ndarray]) -> str:
    """The shape of the output, which a checked model declares."""
    proto = parser.parse_model(HEAD + f"g (float[2,3,4] x) => (float[] y) {{ {text} }}")
    for name, data in stored.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(data), name))
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    return ",".join(str(n) for n in run(proto, X)[0].shape)


def test_a_pad_goes_into_a_convolution_and_two_pads_into_one() -> None:
    proto = model(
        """g (float[1,2,6,6] x) => (float[1,3,10,9] y) {
             a = Pad(x, p)  b = Pad(a, p)  y = Conv<pads=[1,0,1,1]>(b, w) }""",
        p=np.asarray([0, 0, 1, 1, 0, 0, 1, 1]), w=normal(3, 2, 3, 3),
    )  # fmt: skip
    after = Pipeline([P.Clean()]).run(proto, verify=True).model
    assert ops(after) == ["Conv"]
    assert list(helper.get_node_attr_value(after.graph.node[0], "pads")) == [3, 2, 3, 3]


@pytest.mark.parametrize("value", [1.0, -np.inf])
def test_a_pad_by_something_else_stays(value: float) -> None:
    proto = model(
        "g (float[1,2,6,6] x) => (float[1,3,6,6] y) { a = Pad(x, p, v)  y = Conv(a, w) }",
        p=np.asarray([0, 0, 1, 1, 0, 0, 1, 1]), w=normal(3, 2, 3, 3), v=np.float32(value),
    )  # fmt: skip
    assert ops(cleaned(proto)) == ["Pad", "Conv"]


def test_padding_that_follows_the_size_of_the_input_stays() -> None:
    proto = model(
        """g (float[1,2,H,W] x) => (float[1,3,A,B] y) {
             a = Pad(x, p)  y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(a, w) }""",
        p=np.asarray([0, 0, 1, 1, 0, 0, 1, 1]), w=normal(3, 2, 3, 3),
    )  # fmt: skip
    assert ops(cleaned(proto, {"x": normal(1, 2, 7, 8)}, {"x": normal(1, 2, 8, 11)})) == ["Pad", "Conv"]


def test_a_matrix_product_and_its_bias_become_one_gemm() -> None:
    proto = model(
        "g (float[N,4] x) => (float[N,3] y) { p = MatMul(x, w)  y = Add(b, p) }", w=normal(4, 3), b=normal(3, seed=2)
    )
    after = Pipeline([P.Clean()]).run(proto, verify=True).model
    assert ops(after) == ["Gemm"]
    x = {"x": normal(5, 4, seed=3)}
    np.testing.assert_allclose(run(after, x)[0], run(proto, x)[0], rtol=1e-6)


IF = """g (float[2,3] x, bool k) => (float[2,3] y, float[2,3] z) {
  t = Relu(x)
  y, z = If(c) <
    then_branch = tb () => (float[2,3] o, float[2,3] o2) <float[3] w = {1,2,3}> {
      q = Add(t, w)  o = Mul(q, q)
      o2 = If(k) <then_branch = ib () => (float[2,3] i1) { i1 = Neg(q) },
                  else_branch = jb () => (float[2,3] i2) { i2 = Abs(q) }> },
    else_branch = eb () => (float[2,3] p, float[2,3] p2) { q = Neg(t)  p = Identity(x)  p2 = Identity(q) }> }"""


@pytest.mark.parametrize("condition", [True, False])
def test_the_branch_of_a_constant_condition_is_inlined(condition: bool) -> None:
    proto = model(IF, c=np.asarray(condition))
    after = cleaned(proto, *({"x": normal(2, 3), "k": np.asarray(k)} for k in (True, False)))
    assert ops(after).count("If") == int(condition)  # the inner one has a condition of its own


def test_local_functions_are_inlined() -> None:
    proto = model(
        """g (float[N,3] x) => (float[N,3] y) { a = local.f<slope=0.3>(x)  y = local.f<slope=0.5>(a) }
           <domain: "local", opset_import: ["" : 17]>
           f<slope>(a) => (b) { r = LeakyRelu<alpha: float = @slope>(a)  s = LeakyRelu<alpha: float = @slope>(a)
                                b = Add(r, s) }""",
        head='<ir_version: 8, opset_import: ["" : 17, "local" : 1]>\n',
    )
    after = cleaned(proto, {"x": normal(4, 3)})
    assert ops(after) == ["LeakyRelu", "Add"] * 2 and not after.functions


def test_sizes_of_static_shapes_become_numbers_and_one_open_size_is_inferred() -> None:
    proto = model(
        """g (float[N,2,3,4] x) => (float[N,6,4] y, float[N,24] z) {
             s = Shape(x)  n = Gather<axis=0>(s, zero)  n1 = Unsqueeze(n, ax)
             h = Gather<axis=0>(s, one)  w = Gather<axis=0>(s, two)  hw = Mul(h, w)  hw1 = Unsqueeze(hw, ax)
             t = Concat<axis=0>(n1, hw1, four)  y = Reshape(x, t)
             u = Concat<axis=0>(n1, minus)  z = Reshape(x, u) }""",
        zero=np.asarray(0), one=np.asarray(1), two=np.asarray(2), ax=np.asarray([0]), four=np.asarray([4]),
        minus=np.asarray([-1]),
    )  # fmt: skip
    after = cleaned(proto, *({"x": normal(n, 2, 3, 4)} for n in (1, 2, 9)))
    assert "Mul" not in ops(after) and ops(after).count("Reshape") == 2
    assert ops(after).count("Concat") <= 1  # two open sizes: [n, -1] stays what it is


def test_equal_integers_are_merged_at_once_and_equal_matrices_at_last() -> None:
    w = normal(32, 32)
    proto = model(
        """g (float[2,32] x) => (float[2,32] y) { a = MatMul(x, w1)  b = MatMul(a, w2)
             c = Add(b, b1)  d = Add(a, b2)  s1 = Unsqueeze(c, i)  s2 = Unsqueeze(d, j)  s = Add(s1, s2)
             y = Squeeze(s, j) }""",
        w1=w, w2=w.copy(), b1=np.full((2, 32), 0.5, np.float32), b2=np.full((2, 32), 0.5, np.float32),
        i=np.asarray([1]), j=np.asarray([1]),
    )  # fmt: skip
    after = cleaned(proto, {"x": normal(2, 32, seed=4)})
    assert len([t for t in after.graph.initializer if t.dims == [32, 32]]) == 1
    assert len([t for t in after.graph.initializer if t.data_type == onnx.TensorProto.INT64]) == 1
    assert len([t for t in after.graph.initializer if t.dims == [2, 32]]) == 2  # small floats have owners


def test_a_negative_zero_is_no_zero_and_an_input_with_a_default_is_no_constant() -> None:
    plus, minus = np.zeros(400, np.float32), -np.zeros(400, np.float32)
    proto = model(
        """g (float[400] x, float[400] d) => (float[400] y, float[400] z, float[400] u)
           { a = Div(x, p)  b = Div(x, m)  y = Add(a, b)  z = Mul(x, d)  u = Div(x, d) }""",
        p=plus, m=minus, d=plus.copy(),
    )  # fmt: skip
    after = cleaned(proto, {"x": normal(400)}, {"x": normal(400), "d": normal(400, seed=1)})
    assert sorted(t.name for t in after.graph.initializer) == ["d", "m", "p"]


def test_growth_is_refused_with_its_size() -> None:
    proto = model("g (float[1] x) => (float[1] y) { b = Expand(v, n)  m = ReduceMax<keepdims=0>(b)  y = Add(x, m) }",
                  v=np.ones(1, np.float32), n=np.asarray([1 << 26]))  # fmt: skip
    result = P.clean(proto, verify=False)
    refused = [d for d in result.report.passes[0].decisions if d.action == "refused"]
    assert [d.data["why"] for d in refused] == ["size guard"] and "268435456" in refused[0].reason
    assert ops(result.model) == ["Expand", "ReduceMax", "Add"]


def test_quantized_weights_keep_their_format() -> None:
    proto = model(
        "g (float[2,4] x) => (float[2,3] y) { w = DequantizeLinear(q, s, z)  y = MatMul(x, w) }",
        q=np.arange(12, dtype=np.int8).reshape(4, 3), s=np.float32(0.1), z=np.int8(1),
    )  # fmt: skip
    assert ops(cleaned(proto, {"x": normal(2, 4)})) == ["DequantizeLinear", "MatMul"]


def test_rules_can_be_chosen_and_left_out() -> None:
    proto = model("g (float[2] x) => (float[2] y) { a = Identity(x)  b = Relu(a)  c = Relu(a)  y = Add(b, c) }")
    assert ops(cleaned(proto, rules=["no_op"])) == ["Relu", "Relu", "Add"]
    assert ops(cleaned(proto, disable=["no_op", "duplicate_tensor"])) == ["Identity", "Relu", "Add"]
    with pytest.raises(fl.ConfigError, match="no_op"):
        P.clean(proto, rules=["no_ops"])


def test_every_rule_states_its_identity_its_conditions_and_its_refusals() -> None:
    names = [rule.name for rule in CLEAN_RULES]
    assert len(set(names)) == len(names)
    for rule in CLEAN_RULES:
        text = type(rule).__doc__ or ""
        assert text.splitlines()[0].endswith(".") and "Identity:" in text, rule.name
        assert "Conditions:" in text and "Refuses:" in text, rule.name


def test_old_opsets() -> None:
    proto = model(
        """g (float[2,6] x) => (float[3,4] y) {
             a = Slice<axes=[1], starts=[0], ends=[5]>(x)  b = Slice<axes=[1], starts=[1], ends=[9]>(a)
             c = Pad<pads=[0,1,0,1]>(b)  d = Pad<pads=[0,0,0,0]>(c)
             f = Unsqueeze<axes=[2]>(d)  e = Squeeze<axes=[2]>(f)  y = Reshape(e, s) }""",
        head='<ir_version: 6, opset_import: ["" : 9]>\n',
        s=np.asarray([3, 4]),
    )
    assert ops(cleaned(proto, {"x": normal(2, 6)})) == ["Slice", "Slice", "Pad", "Reshape"]


def big(n: int) -> onnx.ModelProto:
    """n nodes, four in five of which go."""
    nodes, at = [], "x"
    for i in range(n // 5):
        nodes += [
            helper.make_node("Transpose", [at], [f"a{i}"], perm=[1, 0]),
            helper.make_node("Transpose", [f"a{i}"], [f"b{i}"], perm=[1, 0]),
            helper.make_node("Add", [f"b{i}", "zero"], [f"c{i}"]),
            helper.make_node("Relu", [f"c{i}"], [f"d{i}"]),
            helper.make_node("Relu", [f"c{i}"], [f"dead{i}"]),
        ]
        at = f"d{i}"
    ends = [helper.make_tensor_value_info(v, onnx.TensorProto.FLOAT, ["N", 4]) for v in ("x", at)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(np.zeros(1, "f"), "zero")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_the_time_is_near_linear_in_the_graph() -> None:
    spent = []
    for n in (4000, 16000):
        graph = fl.load(big(n))
        start = time.process_time()
        P.Clean().apply(graph, Context())
        spent.append(time.process_time() - start)
        assert len(graph.nodes) == n // 5
    assert spent[1] < 10 * spent[0], spent


# ---- nn.Module ---------------------------------------------------------------------------------------------
class Does(nn.Module):
    """A module whose forward is one function."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


ON_FX: list[tuple[str, Callable[[torch.Tensor], torch.Tensor], list[str]]] = [
    ("neutral", lambda x: torch.relu((x + 0) * 1 / 1), ["relu"]),
    ("promotion", lambda x: torch.relu((x > 0) * 1), ["gt", "mul", "relu"]),
    ("transposes", lambda x: torch.relu(x.permute(2, 0, 1).permute(1, 2, 0)), ["relu"]),
    ("one transpose", lambda x: torch.relu(x.permute(2, 0, 1).transpose(0, 1)), ["transpose", "relu"]),
    ("reshapes", lambda x: torch.relu(x.reshape(-1, 4).reshape(-1, 12)), ["reshape", "relu"]),
    ("casts", lambda x: torch.relu(x.double().float()), ["relu"]),
    ("lossy casts", lambda x: torch.relu(x.half().float()), ["cast", "cast", "relu"]),
    ("squeezes", lambda x: torch.relu(x.unsqueeze(1).squeeze(1)), ["relu"]),
    ("slices", lambda x: torch.relu(x[:, 1:][:, :1]), ["slice", "relu"]),
    ("split and cat", lambda x: torch.relu(torch.cat(x.split(1, 1), 1)), ["relu"]),
    ("twins", lambda x: torch.sigmoid(x) + torch.sigmoid(x), ["sigmoid", "add"]),
    ("draws", lambda x: x + torch.rand_like(x) - torch.rand_like(x), ["random", "random", "add", "sub"]),
    ("empty pad", lambda x: torch.relu(nn.functional.pad(x, (0, 0))), ["relu"]),
]  # fmt: skip


@pytest.mark.parametrize(("function", "left"), [(f, k) for _, f, k in ON_FX], ids=[t for t, _, _ in ON_FX])
def test_rules_on_modules(function: Callable[[torch.Tensor], torch.Tensor], left: list[str]) -> None:
    x = torch.from_numpy(normal(2, 3, 4))
    graph = fl.load(Does(function), (x,))
    P.Clean(verify="window").apply(graph, Context())
    assert sorted(n.op for n in graph.nodes) == sorted(left)
    if "random" not in left:
        torch.testing.assert_close(graph.to_model()(x), function(x), rtol=0, atol=0)


def test_a_module_keeps_its_class_and_its_dropout() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.drop = nn.ReLU(), nn.ReLU(), nn.Dropout()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.pad(x, (1, 1, 1, 1))
            z: torch.Tensor = self.drop(self.a(x) + self.b(x)) + self.conv(y)
            return z

    net, x = Net().eval(), torch.from_numpy(normal(1, 3, 5, 5))
    result = P.clean(net, (x,), verify=True)
    assert type(result.model) is Net and isinstance(result.model.drop, nn.Dropout)
    torch.testing.assert_close(result.model(x), net(x))
