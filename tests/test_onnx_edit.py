"""Edits of ONNX graphs: sizes, weights, wiring, insertion in the spelling of the model's opset."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from foldline.graph.errors import ConstraintError, UnsupportedOp
from foldline.graph.onnx import load_onnx
from onnx import numpy_helper
from support.onnx_models import attention, node, parsed, plain, rand, run


class TestEdits:
    def test_prune_heads_keeps_the_scale_and_the_dynamic_dims(self) -> None:
        """Two heads of four leave: sizes computed from static shapes must not follow the shorter axis."""
        graph = load_onnx(attention())
        kept = np.concatenate([np.arange(0, 6), np.arange(12, 18)])
        graph.slice_weight(graph.weight("wq"), {1: kept})
        graph.set_attr(next(n for n in graph if n.op == "reshape"), shape=[None, None, 2, 6])
        graph.slice_weight(graph.weight("wo"), {0: kept})
        graph.refresh()
        assert graph.values["r"].shape == ("batch", "length", 2, 6)
        assert graph.values["joined"].hint == (7, 11, 12)
        onnx.checker.check_model(graph.to_model(), full_check=True)
        masked = attention()
        wo = rand(24, 24)
        wo[np.setdiff1d(np.arange(24), kept)] = 0
        masked.graph.initializer[[t.name for t in masked.graph.initializer].index("wo")].CopyFrom(
            numpy_helper.from_array(wo, "wo")
        )
        x = {"x": rand(3, 2, 24)}
        assert np.allclose(graph.run(x)[0][0], run(masked, x)[0], atol=1e-5)

    def test_shared_shape_constant_is_copied_before_it_changes(self) -> None:
        model = parsed(
            """<ir_version: 8, opset_import: ["" : 17]>
            g (float[2, 6] x) => (float[2, 3, 2] y, float[2, 3, 2] z) <int64[3] s = {0, 3, -1}>
            { y = Reshape(x, s) n = Neg(x) z = Reshape(n, s) }"""
        )
        graph = load_onnx(model)
        first, second = (n for n in graph if n.op == "reshape")
        graph.set_attr(first, shape=[None, 2, None])
        graph.refresh()
        assert graph.values["y"].hint == (2, 2, 3) and graph.values["z"].hint == (2, 3, 2)
        assert second.attrs["shape"] == [None, 3, None]
        assert np.array_equal(graph.run({"x": rand(2, 6)})[0][0], rand(2, 6).reshape(2, 2, 3))

    @pytest.mark.parametrize("opset", [11, 13, 18])
    def test_split_slice_pad_sizes(self, opset: int) -> None:
        sizes = "<split = [4, 4]>" if opset < 13 else ""
        operand = "" if opset < 13 else ", halves"
        model = parsed(
            f"""<ir_version: 8, opset_import: ["" : {opset}]>
            g (float[batch, 8] x) => (y, b) <int64[2] halves = {{4, 4}}, int64[1] two = {{2}}, int64[1] four = {{4}},
            int64[1] one = {{1}}, int64[4] p = {{0, 1, 0, 2}}>
            {{ a, b = Split{sizes.replace("<", "<axis = 1, ") or "<axis = 1>"}(x{operand})
               c = Slice(a, two, four, one) y = Pad(c, p) }}"""
        )
        graph = load_onnx(model)
        graph.set_attr(node(graph, "split"), sizes=[5, 3])
        graph.set_attr(node(graph, "slice"), starts=[1], ends=[5])
        graph.set_attr(node(graph, "pad"), pads=[(0, 0), (2, 0)])
        graph.refresh()
        x = rand(3, 8)
        y, b = graph.run({"x": x})[0]
        assert np.array_equal(y, np.pad(x[:, 1:5], [(0, 0), (2, 0)])) and np.array_equal(b, x[:, 5:])
        assert graph.values["y"].shape == ("batch", 6)

    def test_select_index_conv_groups_and_norm_groups(self) -> None:
        model = parsed(
            """<ir_version: 10, opset_import: ["" : 21]>
            g (float[1, 4, 5, 5] x) => (y) <int64 i = {-1}>
            { c = Conv<group = 4>(x, w) n = GroupNormalization<num_groups = 4>(c, s, b) y = Gather<axis = 1>(n, i) }""",
            w=rand(8, 1, 3, 3), s=rand(8), b=rand(8),
        )  # fmt: skip
        graph = load_onnx(model)
        full, _ = graph.run({"x": rand(1, 4, 5, 5)}, ["n"])
        graph.set_attr(node(graph, "select"), index=5)
        assert np.array_equal(
            graph.run({"x": rand(1, 4, 5, 5)}, ["n"])[1]["n"][:, 5], graph.run({"x": rand(1, 4, 5, 5)})[0][0]
        )
        kept = np.arange(4)
        for name in "wsb":
            graph.slice_weight(graph.weight(name), {0: kept})
        graph.set_attr(node(graph, "select"), index=1)
        graph.set_attr(node(graph, "conv"), groups=2)
        graph.set_attr(node(graph, "group_norm"), groups=2)
        half = graph.insert("slice", [graph.inputs[0]], {"axes": [1], "starts": [0], "ends": [2]}, name="half")
        graph.set_input(node(graph, "conv"), 0, half.output)
        graph.refresh()
        new, taps = graph.run({"x": rand(1, 4, 5, 5)}, ["n"])
        assert taps["n"].shape == (1, 4, 3, 3)
        old = load_onnx(model).run({"x": rand(1, 4, 5, 5)}, ["n"])[1]["n"]
        assert np.allclose(taps["n"], old[:, :4], atol=1e-5)

    def test_replace_uses_of_a_graph_output_keeps_its_name(self) -> None:
        model = parsed(
            '<ir_version: 8, opset_import: ["" : 17]> g (float[2, 3] x) => (float[2, 3] y) { h = Neg(x) y = Relu(h) }'
        )
        graph = load_onnx(model)
        relu = graph.node("Relu:y")
        scaled = graph.insert("mul", [relu.output, graph.add_weight("two", np.float32([2]))], name="scaled", after=relu)
        graph.replace_uses(relu.output, scaled.output, except_nodes=[scaled])
        assert [v.name for v in graph.outputs] == ["y"] and graph.outputs[0].producer is scaled
        assert graph.values["y"] is scaled.output
        assert np.allclose(graph.run({"x": rand(2, 3)})[0][0], 2 * np.maximum(-rand(2, 3), 0))
        graph.replace_uses(scaled.output, graph.inputs[0])
        assert [v.name for v in graph.outputs] == ["y"]
        assert np.array_equal(graph.run({"x": rand(2, 3)})[0][0], rand(2, 3))
        graph.erase(scaled)
        assert "two" not in graph.weights
        with pytest.raises(ConstraintError, match="still in use"):
            graph.erase(graph.node("Neg:h"))

    def test_clone_is_independent(self) -> None:
        graph = load_onnx(attention())
        other = graph.clone()
        x = {"x": rand(2, 3, 24)}
        before = graph.run(x)[0][0]
        other.set_weight(other.weight("wq"), np.zeros((24, 24), np.float32))
        other.set_attr(next(n for n in other if n.op == "reshape"), shape=[None, None, 3, 8])
        assert np.array_equal(graph.run(x)[0][0], before)
        assert not other.run(x)[0][0].any()
        assert plain(graph.to_model()) == plain(attention())

    def test_untie_gives_each_use_its_own_copy(self) -> None:
        model = parsed(
            '<ir_version: 8, opset_import: ["" : 17]> g (float[2, 3] x) => (float[2, 3] y)'
            " { h = Add(x, b) y = Mul(h, b) }",
            b=rand(3),
        )
        graph = load_onnx(model)
        first, second = graph.untie(graph.weight("b"))
        graph.set_weight(second, np.zeros(3, np.float32))
        assert not graph.run({"x": rand(2, 3)})[0][0].any()
        assert np.array_equal(first.numpy(), rand(3))

    @pytest.mark.parametrize("opset", [13, 17, 21])
    @pytest.mark.parametrize(
        ("op", "attrs", "reference"),
        [
            ("identity", {}, lambda x: x),
            ("relu", {}, lambda x: np.maximum(x, 0)),
            ("silu", {}, lambda x: x / (1 + np.exp(-x))),
            ("square", {}, lambda x: x * x),
            (
                "gelu",
                {"approximate": "tanh"},
                lambda x: torch.nn.functional.gelu(torch.tensor(x), approximate="tanh").numpy(),
            ),
            ("gelu", {}, lambda x: torch.nn.functional.gelu(torch.tensor(x)).numpy()),
            ("leaky_relu", {"slope": 0.3}, lambda x: np.where(x > 0, x, 0.3 * x)),
            ("transpose", {"perm": [0, 2, 1]}, lambda x: x.transpose(0, 2, 1)),
            ("reshape", {"shape": [None, 6, 2]}, lambda x: x.reshape(2, 6, 2)),
            ("slice", {"axes": [1], "starts": [1], "ends": [None]}, lambda x: x[:, 1:]),
            ("flip", {"axes": [2]}, lambda x: x[..., ::-1]),
            ("select", {"axis": 1, "index": 2}, lambda x: x[:, 2]),
            ("pad", {"pads": [(0, 0), (1, 0), (0, 2)]}, lambda x: np.pad(x, [(0, 0), (1, 0), (0, 2)])),
            ("mean", {"axes": [1], "keepdims": False}, lambda x: x.mean(1)),
            ("sum", {"axes": [1, 2], "keepdims": True}, lambda x: x.sum((1, 2), keepdims=True)),
            ("unsqueeze", {"axes": [1]}, lambda x: x[:, None]),
            ("expand", {"shape": [4, None, None, None]}, lambda x: np.broadcast_to(x, (4, *x.shape))),
            ("clip", {"min": -0.5, "max": None}, lambda x: np.maximum(x, -0.5)),
            ("cast", {"dtype": "float16"}, lambda x: x.astype(np.float16)),
            ("softmax", {"axis": 1}, lambda x: np.exp(x) / np.exp(x).sum(1, keepdims=True)),
            ("tile", {"repeats": [1, 2, 1]}, lambda x: np.tile(x, (1, 2, 1))),
        ],
    )
    def test_insert(self, opset: int, op: str, attrs: dict[str, Any], reference: Any) -> None:
        model = parsed(
            f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[batch, 3, 4] x) => (y) {{ y = Neg(x) }}'
        )
        graph = load_onnx(model)
        neg = graph.nodes[0]
        made = graph.insert(op, [neg.output], attrs, name="made", after=neg)
        graph.replace_uses(neg.output, made.output, except_nodes=[n for n in graph if n.name.startswith("made")])
        out = graph.run({"x": rand(2, 3, 4)})[0][0]
        assert np.allclose(out, reference(-rand(2, 3, 4)), rtol=2e-3 if op == "cast" else 1e-5, atol=1e-6)
        _, taps = graph.run({"x": rand(7, 3, 4)}, [made.output.name])
        assert made.output.hint == taps[made.output.name].shape
        assert {k: made.attrs[k] for k in attrs if k in made.attrs} == {
            k: attrs[k] for k in attrs if k in made.attrs
        } or op in ("slice", "expand", "reshape")
        onnx.checker.check_model(graph.to_model(), full_check=True)

    def test_insert_linear_quantize_and_refuse(self) -> None:
        model = parsed('<ir_version: 8, opset_import: ["" : 17]> g (float[batch, 3, 4] x) => (y) { y = Relu(x) }')
        graph = load_onnx(model)
        relu = graph.nodes[0]
        w, b = graph.add_weight("w", rand(5, 4)), graph.add_weight("b", rand(5))
        made = graph.insert("linear", [relu.output, w, b], {"transposed_weight": False}, name="fc", after=relu)
        s, z = graph.add_weight("s", np.float32(0.02)), graph.add_weight("z", np.uint8(128))
        q = graph.insert("quantize", [made.output, s, z], {"axis": None, "dtype": "uint8"}, name="q", after=made)
        d = graph.insert("dequantize", [q.output, s, z], {"axis": None, "dtype": "uint8"}, name="d", after=q)
        graph.replace_uses(relu.output, d.output, except_nodes=[n for n in graph if relu.output in n.inputs])
        out = graph.run({"x": rand(2, 3, 4)})[0][0]
        expected = np.maximum(rand(2, 3, 4), 0) @ rand(5, 4).T + rand(5)
        assert np.abs(out - np.clip(expected, -2.56, 2.54)).max() <= 0.0101
        assert q.attrs["dtype"] == "uint8" and q.output.dtype == "uint8"
        with pytest.raises(UnsupportedOp, match="opset 23"):
            graph.insert("rms_norm", [relu.output, w], {"axes": [2]}, name="n", after=relu)

    def test_set_input_drops_and_adds_a_bias(self) -> None:
        model = parsed(
            '<ir_version: 8, opset_import: ["" : 17]> g (float[1, 2, 5] x) => (y) { y = Conv(x, w, b) }',
            w=rand(3, 2, 3),
            b=rand(3),
        )
        graph = load_onnx(model)
        conv = graph.nodes[0]
        bias = conv.inputs[2]
        with_bias = graph.run({"x": rand(1, 2, 5)})[0][0]
        graph.set_input(conv, 2, None)
        without = graph.run({"x": rand(1, 2, 5)})[0][0]
        assert np.allclose(with_bias - without, rand(3)[:, None], atol=1e-6)
        graph.set_input(conv, 2, bias)
        assert np.array_equal(graph.run({"x": rand(1, 2, 5)})[0][0], with_bias)
        assert (conv, 2) in bias.uses
        graph.set_input(conv, 2, None)
        graph.refresh()
        assert "b" not in graph.weights and [t.name for t in graph.to_model().graph.initializer] == ["w"]

    def test_wrong_uses_are_refused(self) -> None:
        graph = load_onnx(attention())
        with pytest.raises(ConstraintError, match="missing"):
            graph.run({})
        with pytest.raises(ConstraintError, match="dtype"):
            graph.run({"x": rand(1, 2, 24).astype(np.float64)})
        with pytest.raises(ConstraintError, match="lies outside"):
            graph.slice_weight(graph.weight("wq"), {0: np.asarray([24])})
        with pytest.raises(UnsupportedOp, match="cannot be set"):
            graph.set_attr(node(graph, "linear"), alpha=2.0)
