"""Reading and writing ONNX files with the weights apart: the same bytes as protobuf's own, in far less memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from foldline.graph.errors import ModelFileError
from foldline.graph.onnx import load_onnx, stream, wire
from foldline.graph.onnx.save import save_onnx
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper


def model(weights: list[TensorProto], **fields: str) -> onnx.ModelProto:
    reads = [w.name for w in weights]
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("SequenceConstruct", reads, ["s"])]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], weights, doc_string="the graph")
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10, **fields)
    made.metadata_props.add(key="who", value="me")
    return made


def array(name: str, n: int, dtype: str = "float32") -> TensorProto:
    tensor = numpy_helper.from_array(np.arange(n).astype(dtype), name)
    tensor.doc_string = f"doc of {name}"
    return tensor


def lifted(data: bytes, least: int) -> tuple[bytes, dict[int, bytes]]:
    small, spans = wire.lift(data, least)
    return small, {i: data[a:b] for i, (a, b) in spans.items()}


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(0, 200))
def test_laying_undoes_lifting(sizes: list[int], least: int) -> None:
    data = model([array(f"w{i}", n) for i, n in enumerate(sizes)], producer_name="p").SerializeToString()
    small, large = lifted(data, max(least, 1))
    assert set(large) == {i for i, n in enumerate(sizes) if 4 * n >= max(least, 1)}
    assert b"".join(wire.lay(small, large)) == data
    parsed = onnx.ModelProto.FromString(small)
    assert [t.name for t in parsed.graph.initializer] == [f"w{i}" for i in range(len(sizes))]
    assert all(not parsed.graph.initializer[i].raw_data for i in large)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        small, large = lifted(data, 4)
    except ModelFileError:
        return
    assert b"".join(wire.lay(small, large)) == data or not large


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int64", "int8", "uint8", "bool", "complex64"])
def test_weights_come_back_as_they_were(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "m.onnx"
    weights = [array("a", 700), array("big", 3000, dtype), array("none", 0), array("c", 3)]
    path.write_bytes(model(weights).SerializeToString())
    proto, large = stream.parse(path)
    assert 1 in large
    graph = load_onnx(path)
    for tensor in weights:
        np.testing.assert_array_equal(graph.weight(tensor.name).numpy(), numpy_helper.to_array(tensor))
    assert not graph.weight("big").numpy().flags.writeable
    out = save_onnx(graph, tmp_path / "out.onnx")
    written = onnx.load(out)
    assert out.read_bytes() == written.SerializeToString()
    for old, new in zip(weights, written.graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(new), numpy_helper.to_array(old))
        assert (new.name, new.doc_string, new.data_type) == (old.name, old.doc_string, old.data_type)


def test_packed_strings_and_spelled_out_data_are_left_to_protobuf(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    four_bits = helper.make_tensor("four", TensorProto.INT4, [4096], np.zeros(2048, np.uint8).tobytes(), raw=True)
    spelled = helper.make_tensor("spelled", TensorProto.FLOAT, [600], np.arange(600.0))
    words = helper.make_tensor("words", TensorProto.STRING, [300], ["word"] * 300)
    path.write_bytes(model([four_bits, spelled, words, array("plain", 600)]).SerializeToString())
    _, large = stream.parse(path)
    assert set(large) == {3}
    out = save_onnx(load_onnx(path), tmp_path / "out.onnx")
    again = onnx.load(out)
    for old, new in zip(onnx.load(path).graph.initializer, again.graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(new), numpy_helper.to_array(old))


def test_a_weight_of_wrong_length_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    tensor = array("short", 700)
    tensor.dims[0] = 701
    path.write_bytes(model([tensor]).SerializeToString())
    with pytest.raises(Exception, match="short|701"):
        load_onnx(path).weight("short").numpy()


@pytest.mark.parametrize("cut", [1, 100, 2000, 2900])
def test_truncated_files_are_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(model([array("w", 700)]).SerializeToString()[:-cut])
    with pytest.raises(ModelFileError, match="truncated|no graph"):
        load_onnx(path)


def test_a_weight_is_freed_when_nobody_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(model([array("a", 700), array("b", 700)]).SerializeToString())
    graph = load_onnx(path)
    a, b = graph.weight("a").numpy(), graph.weight("b").numpy()
    assert a.base is not b.base
    path.write_bytes(b"gone")  # what was read does not depend on the file
    assert a[-1] == b[-1] == 699


def test_serialized_equals_protobuf(tmp_path: Path) -> None:
    made = model([array("a", 700), array("b", 5)])
    native = ir.serde.deserialize_model(made)
    assert stream.serialized(native) == ir.serde.serialize_model(native).SerializeToString()
