"""The ONNX front end: canonical view, shapes, edits, round trips, saving."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from foldline.graph.errors import ConstraintError, ModelFileError, UnsupportedOp
from foldline.graph.onnx import ONNXGraph, load_onnx
from foldline.graph.onnx_save import save_onnx


def parsed(text: str, **tensors: np.ndarray) -> onnx.ModelProto:
    """A model in onnx's text form, with extra initializers."""
    model = onnx.parser.parse_model(text)
    for name, data in tensors.items():
        model.graph.initializer.append(numpy_helper.from_array(data, name))
    return model


def run(model: Any, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return load_onnx(model).run(inputs)[0]


def node(graph: ONNXGraph, op: str) -> Any:
    found = [n for n in graph if n.op == op]
    assert found, f"no {op} in {[n.op for n in graph]}"
    return found[0]


def plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model without explicit empty domains, which say the same as none."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graphs = [copy.graph]
    while graphs:
        graph = graphs.pop()
        for n in graph.node:
            if not n.domain:
                n.ClearField("domain")
            graphs += [a.g for a in n.attribute if a.HasField("g")]
    for function in copy.functions:
        for n in function.node:
            n.ClearField("domain")
    for opset in [*copy.opset_import, *(o for f in copy.functions for o in f.opset_import)]:
        if not opset.domain:
            opset.ClearField("domain")
    return copy


def rand(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def exported(module: torch.nn.Module, args: tuple[Any, ...], opset: int = 18, dynamic: Any = None) -> onnx.ModelProto:
    program = torch.onnx.export(
        module.eval(), args, dynamo=True, opset_version=opset, dynamic_shapes=dynamic, verbose=False
    )
    assert program is not None
    buffer = io.BytesIO()
    program.save(buffer)
    return onnx.load_from_string(buffer.getvalue())


HEADS = """
<ir_version: 8, opset_import: ["" : 17]>
attention (float[batch, length, 24] x) => (float[batch, length, 24] y)
<int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] heads = {4}, int64[1] minus = {-1}, int64 last = {2}>
{
    shape = Shape(x)
    b = Slice(shape, zero, one, zero)
    l = Slice(shape, one, two, zero)
    c = Gather<axis = 0>(shape, last)
    n = Squeeze(heads, zero)
    d = Div(c, n)
    dim = Unsqueeze(d, zero)
    target = Concat<axis = 0>(b, l, heads, dim)
    f = Cast<to = 1>(d)
    root = Sqrt(f)
    q = MatMul(x, wq)
    r = Reshape(q, target)
    scaled = Div(r, root)
    back = Concat<axis = 0>(b, l, minus)
    joined = Reshape(scaled, back)
    y = MatMul(joined, wo)
}
"""


def attention() -> onnx.ModelProto:
    model = onnx.parser.parse_model(HEADS)
    model.graph.initializer.extend([numpy_helper.from_array(rand(24, 24), "wq"), numpy_helper.from_array(rand(24, 24), "wo")])
    return model


class TestShapes:
    def test_hints_equal_a_real_run(self) -> None:
        graph = load_onnx(attention())
        names = [v.name for v in graph.values.values() if v.producer is not None]
        x = rand(*graph.inputs[0].hint)
        _, taps = graph.run({"x": x}, names)
        for name in names:
            value = graph.values[name]
            assert value.hint == taps[name].shape, name
            assert value.dtype == taps[name].dtype.name, name

    def test_symbols_survive_through_computed_shapes(self) -> None:
        graph = load_onnx(attention())
        assert graph.values["r"].shape == ("batch", "length", 4, 6)
        assert graph.values["y"].shape == ("batch", "length", 24)

    def test_static_sizes_computed_from_shape_are_numbers_and_dynamic_ones_none(self) -> None:
        graph = load_onnx(attention())
        first, second = (n for n in graph if n.op == "reshape")
        assert first.attrs["shape"] == [None, None, 4, 6]
        assert second.attrs["shape"] == [None, None, None]
        assert [v.name for v in first.dynamic] == ["target"]
        div = node(graph, "div")
        assert div.inputs[1].const() == pytest.approx(6**0.5)
        assert {n.op for n in graph} == {"shape_of", "scalar", "linear", "reshape", "div", "squeeze"}

    def test_example_inputs_give_the_hints(self) -> None:
        graph = load_onnx(attention(), {"x": rand(3, 5, 24)})
        assert graph.values["r"].hint == (3, 5, 4, 6)
        with pytest.raises(ConstraintError, match="declared size of axis 2"):
            load_onnx(attention(), {"x": rand(3, 5, 23)})

    def test_unknown_operator_learns_its_shape_from_a_run(self) -> None:
        model = parsed(
            """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
            g (float[batch, 6] x) => (y) { a = com.microsoft.QuickGelu<alpha = 1.5>(x) y = Relu(a) }"""
        )
        graph = load_onnx(model)
        assert [n.op for n in graph] == ["opaque", "relu"]
        assert graph.values["a"].hint == graph.values["y"].hint == (7, 6)


class TestView:
    @pytest.mark.parametrize(
        ("line", "op", "attrs"),
        [
            ("y = Conv<pads=[1,0,1,2], strides=[2,1]>(x, w)", "conv",
             {"padding": [(1, 1), (0, 2)], "stride": [2, 1], "groups": 1, "transposed": False}),
            ("y = Conv<auto_pad=\"SAME_UPPER\", strides=[2,2]>(x, w)", "conv", {"padding": [(0, 1), (0, 1)]}),
            ("y = Softmax<axis=-3>(x)", "softmax", {"axis": 1}),
            ("y = ReduceMean<axes=[-1,2], keepdims=0>(x)", "mean", {"axes": [3, 2], "keepdims": False}),
            ("y = Flatten<axis=1>(x)", "reshape", {"shape": None}),
            ("y = GlobalAveragePool(x)", "adaptive_avg_pool", {"output_size": [1, 1]}),
            ("y = DepthToSpace<blocksize=2>(x)", "pixel_shuffle", {"factor": 2, "mode": "dcr"}),
            ("y = LeakyRelu<alpha=0.25>(x)", "leaky_relu", {"slope": 0.25}),
            ("y = Slice(x, m1, far, one, m1)", "flip", {"axes": [1]}),
            ("y = Slice(x, one, far, one)", "slice", {"axes": [1], "starts": [1], "ends": [4], "steps": [1]}),
            ("y = Slice(x, one, far, zero)", "slice", {"axes": [0], "starts": [1], "ends": [None], "steps": [1]}),
            ("y = Expand(x, shape)", "expand", {"shape": [2, None, None, None, None]}),
            ("y = Gather<axis=1>(x, last)", "select", {"axis": 1, "index": 3}),
            ("y = Reshape(x, to)", "reshape", {"shape": [None, 2, 2, None, 6]}),
            ("y = Clip(x, lo, hi)", "clip", {"min": 0.0, "max": 6.0}),
            ("y = Tile(x, to4)", "tile", {"repeats": [1, 2, 1, 1]}),
        ],
    )  # fmt: skip
    def test_canonical_attributes(self, line: str, op: str, attrs: dict[str, Any]) -> None:
        model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
            g (float[batch, 4, 6, 6] x) => (y)
            <int64[1] one = {{1}}, int64[1] m1 = {{-1}}, int64[1] zero = {{0}}, int64 last = {{-1}},
             int64[5] shape = {{2,1,1,1,1}}, int64[5] to = {{0,2,2,-1,6}},
             float lo = {{0}}, float hi = {{6}}, int64[4] to4 = {{1,2,1,1}}> {{ {line} }}""")
        model.graph.initializer.append(numpy_helper.from_array(rand(2, 4, 3, 3), "w"))
        far = np.asarray([-(2**63) + 1 if op == "flip" else 2**63 - 1])
        model.graph.initializer.append(numpy_helper.from_array(far, "far"))
        found = load_onnx(model).nodes[0]
        assert found.op == op
        assert {k: found.attrs[k] for k in attrs} == attrs

    def test_overridable_initializer_is_an_input(self) -> None:
        model = parsed(
            """<ir_version: 8, opset_import: ["" : 17]>
            g (float[2, 3] x, float[3] b) => (float[2, 3] y) <float[3] b = {1, 2, 3}> { y = Add(x, b) }"""
        )
        graph = load_onnx(model)
        add = graph.nodes[0]
        assert add.inputs[1].is_input and add.inputs[1].const() is None
        bound = graph.bind(rand(2, 3))
        assert bound["b"].tolist() == [1, 2, 3]
        x = rand(2, 3)
        other = np.ones(3, np.float32)
        assert np.array_equal(graph.run(graph.bind({"x": x, "b": other}))[0][0], x + other)

    def test_legacy_softmax_that_flattens_is_opaque(self) -> None:
        model = parsed('<ir_version: 6, opset_import: ["" : 11]> g (float[2,3,4] x) => (float[2,3,4] y) { y = Softmax(x) }')
        assert load_onnx(model).nodes[0].op == "opaque"

    def test_tied_external_tensors_are_one_weight(self, tmp_path: Path) -> None:
        np.arange(300, dtype=np.float32).tofile(tmp_path / "w.bin")
        tensors = []
        for name in ("a", "b"):
            t = TensorProto(name=name, data_type=1, dims=[10, 30], data_location=TensorProto.EXTERNAL)
            for k, v in (("location", "w.bin"), ("offset", "0"), ("length", "1200")):
                t.external_data.add(key=k, value=v)
            tensors.append(t)
        nodes = [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("Gemm", ["h", "b"], ["y"], transB=1)]
        proto = helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info("x", 1, [2, 10])], [helper.make_tensor_value_info("y", 1, [2, 10])], tensors
        )
        onnx.save(helper.make_model(proto, ir_version=9, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "m.onnx")
        graph = load_onnx(tmp_path / "m.onnx")
        assert list(graph.weights) == ["a"]
        weight = graph.weight("b")
        assert weight.aliases == ("a", "b")
        assert graph.node("MatMul:h").inputs[1].weight is graph.node("Gemm:y").inputs[1].weight is weight
        graph.slice_weight(weight, {1: np.arange(0, 30, 2)})
        out = graph.run({"x": rand(2, 10)})[0][0]
        kept = np.arange(300, dtype=np.float32).reshape(10, 30)[:, ::2]
        assert np.allclose(out, rand(2, 10) @ kept @ kept.T, rtol=1e-5)


    def test_constants_spelled_as_attributes_stay_apart(self) -> None:
        """Their tensors are made on the fly; two of them must never pass for one tied weight."""
        lines = "".join(f"c{i} = Constant<value_floats = [{i}.0, {i}.5]>() h{i + 1} = Add(h{i}, c{i}) " for i in range(30))
        text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[2] h0) => (float[2] y) {{ {lines} y = Identity(h30) }}'
        graph = load_onnx(onnx.parser.parse_model(text))
        assert len(graph.weights) == 30 and all(len(w.aliases) == 1 for w in graph.weights.values())
        assert [graph.weight(f"c{i}").numpy()[1] for i in range(30)] == [i + 0.5 for i in range(30)]


CONTROL = {
    "if": """g (bool c, float[2] x) => (float[2] y) {
        w = Constant<value = float[2] {1, 2}>()
        y = If(c)<then_branch = t () => (float[2] a) { a = Add(x, w) }, else_branch = e () => (float[2] b) { b = Neg(x) }>
    }""",
    "loop": """g (int64 n, float[2] x) => (float[2] y) {
        go = Constant<value = bool {1}>()
        y = Loop(n, go, x)<body = b (int64 i, bool c, float[2] s) => (bool d, float[2] t) { d = Identity(c) t = Add(s, x) }>
    }""",
    "scan": """g (float[3, 2] x, float[2] s) => (float[2] e, float[3, 2] y) {
        e, y = Scan<num_scan_inputs = 1, body = b (float[2] a, float[2] r) => (float[2] o, float[2] p) { o = Add(a, r) p = Mul(o, s) }>(s, x)
    }""",
}
FEEDS = {
    "if": {"c": np.asarray(True), "x": rand(2)},
    "loop": {"n": np.asarray(3), "x": rand(2)},
    "scan": {"x": rand(3, 2), "s": rand(2)},
}


class TestRoundTrip:
    @pytest.mark.parametrize("kind", CONTROL)
    def test_subgraphs(self, kind: str, tmp_path: Path) -> None:
        model = parsed(f'<ir_version: 8, opset_import: ["" : 17]> {CONTROL[kind]}')
        graph = load_onnx(model)
        control = node(graph, kind)
        assert [v.name for v in control.captured] == {"if": ["x", "w"], "loop": ["x"], "scan": ["s"]}[kind]
        assert graph.values[graph.outputs[-1].name].hint is not None
        assert plain(graph.clone().to_model()) == plain(model)
        path = save_onnx(graph, tmp_path / "m.onnx")
        for a, b in zip(graph.run(FEEDS[kind])[0], run(path, FEEDS[kind]), strict=True):
            assert np.array_equal(a, b)

    def test_edit_outside_a_subgraph_reaches_inside(self) -> None:
        graph = load_onnx(parsed(f'<ir_version: 8, opset_import: ["" : 17]> {CONTROL["if"]}'))
        x = graph.values["x"]
        doubled = graph.insert("add", [x, x], name="doubled")
        graph.replace_uses(x, doubled.output, except_nodes=[doubled])
        assert "doubled" in [v.name for v in node(graph, "if").captured]
        out = graph.run(FEEDS["if"])[0][0]
        assert np.allclose(out, 2 * FEEDS["if"]["x"] + [1, 2])

    def test_functions_survive_and_are_opaque(self) -> None:
        model = onnx.parser.parse_model(
            """<ir_version: 8, opset_import: ["" : 17, "mine" : 1], producer_name: "p", doc_string: "d",
                metadata_props: ["k" : "v"]>
            g (float[batch, 3] x) => (float[batch, 3] y) { h = mine.twice(x) y = Relu(h) }
            <domain: "mine", opset_import: ["" : 17]> twice (a) => (b) { b = Add(a, a) }"""
        )
        graph = load_onnx(model)
        assert [n.op for n in graph] == ["opaque", "relu"]
        assert graph.values["h"].hint == (7, 3)
        assert plain(graph.to_model()) == plain(model)
        assert np.array_equal(graph.run({"x": rand(7, 3)})[0][0], np.maximum(2 * rand(7, 3), 0))

    def test_torch_export_bit_for_bit(self, tmp_path: Path) -> None:
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        model = exported(layer, (torch.randn(2, 5, 16),), dynamic=({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},))
        before = model.SerializeToString()
        graph = load_onnx(model)
        assert plain(graph.to_model()) == plain(model)
        assert {n.scope for n in graph if n.op == "linear"} >= {"linear1", "linear2"}
        assert graph.weight("linear1.bias").kind == "parameter" and graph.weight("linear1.bias").trainable
        inputs = {graph.inputs[0].name: rand(3, 4, 16)}
        first = graph.run(inputs)[0][0]
        assert np.array_equal(first, run(save_onnx(graph, tmp_path / "m.onnx"), inputs)[0])
        for weight in list(graph.weights.values())[:3]:
            graph.set_weight(weight, weight.numpy() * 0)
        assert model.SerializeToString() == before

    def test_every_node_test_of_onnx(self) -> None:
        from onnx.backend.test.case.node import collect_testcases

        with np.errstate(all="ignore"):
            cases = [c for c in collect_testcases(None) if c.model is not None]
        assert len(cases) > 1000
        for case in cases[::8]:
            graph = load_onnx(case.model)
            assert plain(graph.to_model()) == plain(case.model), case.name


class TestFiles:
    def test_external_data_is_mapped_and_kept_external(self, tmp_path: Path) -> None:
        model = ir.from_proto(attention())
        ir.save(model, tmp_path / "m.onnx", external_data="weights.bin", size_threshold_bytes=0)
        graph = load_onnx(tmp_path / "m.onnx")
        tensor = graph.model.graph.initializers["wq"].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        graph.slice_weight(graph.weight("wq"), {1: np.arange(23, -1, -1)})
        saved = save_onnx(graph, tmp_path / "out.onnx")
        assert (tmp_path / "out.onnx.data").is_file()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "out.onnx", "out.onnx.data", "weights.bin"]
        again = load_onnx(saved)
        assert np.array_equal(again.weight("wq").numpy(), rand(24, 24)[:, ::-1])

    def test_large_external_weights_are_not_read(self, tmp_path: Path) -> None:
        """Loading, analysing and slicing leave the file alone; the slice is taken when the tensor is asked for."""
        model = parsed(
            '<ir_version: 8, opset_import: ["" : 17]> g (float[n, 1024] x) => (y) { y = MatMul(x, w) }', w=rand(1024, 300)
        )
        ir.save(ir.from_proto(model), tmp_path / "m.onnx", external_data="w.bin")
        graph = load_onnx(tmp_path / "m.onnx")
        tensor = graph.model.graph.initializers["w"].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        weight = graph.weight("w")
        graph.slice_weight(weight, {1: np.arange(0, 300, 3)})
        graph.slice_weight(weight, {1: np.arange(99, -1, -1)})
        graph.refresh()
        assert tensor.raw is None and weight.shape == (1024, 100) and graph.values["y"].shape == ("n", 100)
        assert np.array_equal(weight.numpy(), rand(1024, 300)[:, ::3][:, ::-1])

    def test_overwriting_the_source_keeps_the_graph_readable(self, tmp_path: Path) -> None:
        ir.save(ir.from_proto(attention()), tmp_path / "m.onnx", external_data="m.onnx.data", size_threshold_bytes=0)
        graph = load_onnx(tmp_path / "m.onnx")
        other = graph.clone()
        other.slice_weight(other.weight("wo"), {1: np.arange(3)})
        save_onnx(other, tmp_path / "m.onnx")
        assert np.array_equal(graph.weight("wo").numpy(), rand(24, 24))
        assert np.array_equal(load_onnx(tmp_path / "m.onnx").weight("wo").numpy(), rand(24, 24)[:, :3])

    @pytest.mark.parametrize("content", [b"", b"hello, this is text", b"\x08\x0a\x12\x04torch\x00\xff\xff", None])
    def test_not_a_model(self, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "m.onnx"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ModelFileError):
            load_onnx(path)

    def test_truncated_model(self, tmp_path: Path) -> None:
        (tmp_path / "m.onnx").write_bytes(attention().SerializeToString()[:-700])
        with pytest.raises(ModelFileError, match="truncated"):
            load_onnx(tmp_path / "m.onnx")

    def test_missing_and_short_external_data(self, tmp_path: Path) -> None:
        ir.save(ir.from_proto(attention()), tmp_path / "m.onnx", external_data="w.bin", size_threshold_bytes=0)
        data = (tmp_path / "w.bin").read_bytes()
        (tmp_path / "w.bin").write_bytes(data[:-8])
        with pytest.raises(ModelFileError, match="truncated"):
            load_onnx(tmp_path / "m.onnx")
        (tmp_path / "w.bin").unlink()
        with pytest.raises(ModelFileError, match="missing"):
            load_onnx(tmp_path / "m.onnx")

    def test_a_failed_save_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = save_onnx(attention(), tmp_path / "m.onnx")
        before = path.read_bytes()

        def broken(proto: onnx.ModelProto, target: Path) -> None:
            target.write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(onnx, "save", broken)
        with pytest.raises(ModelFileError, match="disk full"):
            save_onnx(attention(), path)
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]

    def test_ir_version_newer_than_the_runtime_still_runs_and_is_kept(self) -> None:
        model = attention()
        model.ir_version = 99
        graph = load_onnx(model)
        assert graph.run({"x": rand(2, 3, 24)})[0][0].shape == (2, 3, 24)
        assert graph.to_model().ir_version == 99


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
            {{ a, b = Split{sizes.replace("<", "<axis = 1, ") or "<axis = 1>"}(x{operand}) c = Slice(a, two, four, one) y = Pad(c, p) }}"""
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
        assert np.array_equal(graph.run({"x": rand(1, 4, 5, 5)}, ["n"])[1]["n"][:, 5], graph.run({"x": rand(1, 4, 5, 5)})[0][0])
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
            '<ir_version: 8, opset_import: ["" : 17]> g (float[2, 3] x) => (float[2, 3] y) { h = Add(x, b) y = Mul(h, b) }',
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
            ("gelu", {"approximate": "tanh"}, lambda x: torch.nn.functional.gelu(torch.tensor(x), approximate="tanh").numpy()),
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
        model = parsed(f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[batch, 3, 4] x) => (y) {{ y = Neg(x) }}')
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
            '<ir_version: 8, opset_import: ["" : 17]> g (float[1, 2, 5] x) => (y) { y = Conv(x, w, b) }', w=rand(3, 2, 3), b=rand(3)
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
