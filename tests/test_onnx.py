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
from foldline.graph.errors import ConstraintError, ModelFileError
from foldline.graph.onnx import load_onnx, stream
from foldline.graph.onnx.save import save_onnx
from onnx import TensorProto, helper, numpy_helper
from support.onnx_models import attention, node, parsed, plain, rand, run


def exported(module: torch.nn.Module, args: tuple[Any, ...], opset: int = 18, dynamic: Any = None) -> onnx.ModelProto:
    program = torch.onnx.export(
        module.eval(), args, dynamo=True, opset_version=opset, dynamic_shapes=dynamic, verbose=False
    )
    assert program is not None
    buffer = io.BytesIO()
    program.save(buffer)
    return onnx.load_from_string(buffer.getvalue())


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
        model = parsed(
            '<ir_version: 6, opset_import: ["" : 11]> g (float[2,3,4] x) => (float[2,3,4] y) { y = Softmax(x) }'
        )
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
            nodes,
            "g",
            [helper.make_tensor_value_info("x", 1, [2, 10])],
            [helper.make_tensor_value_info("y", 1, [2, 10])],
            tensors,
        )
        onnx.save(
            helper.make_model(proto, ir_version=9, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "m.onnx"
        )
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
        lines = "".join(
            f"c{i} = Constant<value_floats = [{i}.0, {i}.5]>() h{i + 1} = Add(h{i}, c{i}) " for i in range(30)
        )
        text = (
            f'<ir_version: 8, opset_import: ["" : 17]> g (float[2] h0) => (float[2] y) {{ {lines} y = Identity(h30) }}'
        )
        graph = load_onnx(onnx.parser.parse_model(text))
        assert len(graph.weights) == 30 and all(len(w.aliases) == 1 for w in graph.weights.values())
        assert [graph.weight(f"c{i}").numpy()[1] for i in range(30)] == [i + 0.5 for i in range(30)]


CONTROL = {
    "if": """g (bool c, float[2] x) => (float[2] y) {
        w = Constant<value = float[2] {1, 2}>()
        y = If(c)<then_branch = t () => (float[2] a) { a = Add(x, w) },
                  else_branch = e () => (float[2] b) { b = Neg(x) }>
    }""",
    "loop": """g (int64 n, float[2] x) => (float[2] y) {
        go = Constant<value = bool {1}>()
        y = Loop(n, go, x)<body = b (int64 i, bool c, float[2] s) => (bool d, float[2] t)
            { d = Identity(c) t = Add(s, x) }>
    }""",
    "scan": """g (float[3, 2] x, float[2] s) => (float[2] e, float[3, 2] y) {
        e, y = Scan<num_scan_inputs = 1, body = b (float[2] a, float[2] r) => (float[2] o, float[2] p)
            { o = Add(a, r) p = Mul(o, s) }>(s, x)
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
        assert [n.op for n in graph.inline()] == ["add", "relu"]
        assert plain(graph.to_model()) == plain(model)
        assert np.array_equal(graph.run({"x": rand(7, 3)})[0][0], np.maximum(2 * rand(7, 3), 0))

    def test_torch_export_bit_for_bit(self, tmp_path: Path) -> None:
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        model = exported(
            layer, (torch.randn(2, 5, 16),), dynamic=({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
        )
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
            '<ir_version: 8, opset_import: ["" : 17]> g (float[n, 1024] x) => (y) { y = MatMul(x, w) }',
            w=rand(1024, 300),
        )
        ir.save(ir.from_proto(model), tmp_path / "m.onnx", external_data="m.onnx.data")
        graph = load_onnx(tmp_path / "m.onnx")
        tensor = graph.model.graph.initializers["w"].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        weight = graph.weight("w")
        graph.slice_weight(weight, {1: np.arange(0, 300, 3)})
        graph.slice_weight(weight, {1: np.arange(99, -1, -1)})
        graph.refresh()
        assert tensor.raw is None and weight.shape == (1024, 100) and graph.values["y"].shape == ("n", 100)
        expected = rand(1024, 300)[:, ::3][:, ::-1]
        assert np.array_equal(weight.numpy(), expected) and tensor.raw is None
        save_onnx(graph, tmp_path / "m.onnx")
        assert np.array_equal(weight.numpy(), expected), "the lazy slice must not read the new file"
        assert np.array_equal(load_onnx(tmp_path / "m.onnx").weight("w").numpy(), expected)

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

    def test_nodes_in_another_order_are_sorted(self, tmp_path: Path) -> None:
        """ONNX Runtime takes such files, and its float16 converter writes them."""
        proto = attention()
        nodes = list(proto.graph.node)
        del proto.graph.node[:]
        proto.graph.node.extend(reversed(nodes))
        onnx.save(proto, tmp_path / "m.onnx")
        x = rand(*load_onnx(attention()).inputs[0].hint)
        wanted, found = (load_onnx(m).run({"x": x})[0][0] for m in (attention(), tmp_path / "m.onnx"))
        assert np.array_equal(found, wanted)
        assert load_onnx(proto).clone().to_model() is not None
        proto.graph.node[0].input[0] = proto.graph.node[0].output[0]
        with pytest.raises(ModelFileError, match="cycle"):
            load_onnx(proto)

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

        def broken(model: ir.Model, target: Path) -> None:
            target.write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(stream, "write", broken)
        with pytest.raises(ModelFileError, match="disk full"):
            save_onnx(attention(), path)
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]

    def test_ir_version_newer_than_the_runtime_still_runs_and_is_kept(self) -> None:
        model = attention()
        model.ir_version = 99
        graph = load_onnx(model)
        assert graph.run({"x": rand(2, 3, 24)})[0][0].shape == (2, 3, 24)
        assert graph.to_model().ir_version == 99
