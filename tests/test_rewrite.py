"""The engine: fixed point, order, logs, an end to rules that undo each other; and what no rewrite may ever change."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import ClassVar

import foldline as fl
import foldline.passes as P
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from foldline.graph.errors import ConstraintError
from foldline.graph.execute import run_graph
from foldline.graph.ir import Graph, Node
from foldline.graph.load import load
from foldline.passes.base import Context
from foldline.passes.rewrite import Env, Refusal, Rewrite, Rule, rewrite
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def chain(length: int) -> onnx.ModelProto:
    """Identities and additions of one shared vector, one after the other."""
    nodes, value = [], "x"
    for i in range(length // 2):
        nodes.append(helper.make_node("Identity", [value], [f"i{i}"], f"id{i}"))
        nodes.append(helper.make_node("Add", [f"i{i}", "w"], [f"a{i}"], f"add{i}"))
        value = f"a{i}"
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", FLOAT, [4, 8])],
        [helper.make_tensor_value_info(value, FLOAT, [4, 8])],
        [numpy_helper.from_array(np.ones(8, np.float32), "w")],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


class Swap(Rule):
    """Turns one op into another, so that two of them undo each other."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.old}_to_{self.new}"

    @property
    def ops(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.old,)

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        def apply(graph: Graph) -> list[Node]:
            made = graph.insert(self.new, node.inputs, {}, name=f"{node.name}_", after=node)
            graph.replace_uses(node.output, made.output, except_nodes=[made])
            return [made]

        return Rewrite([node], apply)


class Nothing(Rule):
    """Refuses every relu, to see what is logged."""

    name: ClassVar[str] = "nothing"
    ops: ClassVar[tuple[str, ...]] = ("relu",)

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        return Refusal("it never does")


def one_relu() -> Graph:
    nodes = [helper.make_node("Relu", ["x"], ["y"], "r")]
    ends = [helper.make_tensor_value_info(n, FLOAT, [2, 3]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    return load(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]))


def test_rewrites_are_logged_with_rule_and_nodes_and_refusals_with_why() -> None:
    log = rewrite(one_relu(), [Nothing(), Swap("relu", "sigmoid")], Env(one_relu(), Context()))
    assert not log.applied or log.applied[0].data["rule"]
    graph = one_relu()
    log = rewrite(graph, [Swap("relu", "sigmoid")], Env(graph, Context()))
    (made,) = log.applied
    assert made.subject == "r" and made.data["rule"] == "relu_to_sigmoid" and made.data["nodes"] == ["r"]
    assert [n.op for n in graph.nodes] == ["sigmoid"] and graph.outputs[0].name == "y"
    graph = one_relu()
    (refused,) = rewrite(graph, [Nothing()], Env(graph, Context())).refused
    assert refused.action == "refused" and refused.data["why"] == "other" and refused.reason == "it never does"


def test_rules_that_undo_each_other_end_in_an_error_that_names_them() -> None:
    graph = one_relu()
    with pytest.raises(ConstraintError, match="do not come to an end") as caught:
        rewrite(graph, [Swap("relu", "sigmoid"), Swap("sigmoid", "relu")], Env(graph, Context()))
    assert "relu_to_sigmoid" in str(caught.value) and "sigmoid_to_relu" in str(caught.value)


def test_one_call_reaches_the_fixed_point() -> None:
    graph = load(chain(60))
    first = P.Fold().apply(graph, Context())
    assert first.details["rewrites"] >= 30 and len(graph.nodes) == 1
    assert not P.Fold().apply(graph, Context()).details["rewrites"]


def test_the_cost_grows_with_the_graph_and_not_with_its_square() -> None:
    seconds = []
    for length in (1000, 4000):
        graph = load(chain(length))
        gc.disable()  # a collection would look through whatever earlier tests left, in one of the two
        try:
            start = time.process_time()
            P.Clean().apply(graph, Context())
            seconds.append(time.process_time() - start)
        finally:
            gc.enable()
        assert len(graph.nodes) <= length // 2
    assert seconds[1] < 10 * seconds[0] + 0.2, seconds


# ---- what never changes -------------------------------------------------------------------------------------------
def rich_model() -> onnx.ModelProto:
    """Unused inputs, an overridable initializer, metadata, doc strings, an output that repeats an input."""
    rng = np.random.default_rng(0)

    def stored(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.uniform(0.5, 2, shape).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv", doc_string="the convolution", kernel_shape=[1, 1]),
        helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"], "norm"),
        helper.make_node("Mul", ["n", "gain"], ["g"], "gain_mul"),
        helper.make_node("Identity", ["g"], ["y"], "last"),
        helper.make_node("Identity", ["x"], ["same"], "copy"),
        helper.make_node("Bernoulli", ["y"], ["r1"], "random1"),
        helper.make_node("Bernoulli", ["y"], ["r2"], "random2"),
    ]
    shape = ["batch", 3, 5, 5]
    inputs = [
        helper.make_tensor_value_info("x", FLOAT, shape, doc_string="an image"),
        helper.make_tensor_value_info("unused", TensorProto.INT64, ["k"]),
        helper.make_tensor_value_info("gain", FLOAT, [3, 1, 1]),
    ]
    outputs = [helper.make_tensor_value_info(n, FLOAT, shape) for n in ("y", "same", "r1", "r2")]
    weights = [stored("w", 3, 3, 1, 1), *(stored(n, 3) for n in "sbmv"), stored("gain", 3, 1, 1)]
    graph = helper.make_graph(nodes, "named", inputs, outputs, weights, doc_string="a graph")
    model = helper.make_model(
        graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)], doc_string="a model", producer_name="me"
    )
    model.producer_version, model.domain, model.model_version = "1.2", "org.example", 7
    helper.set_model_props(model, {"author": "somebody", "license": "MIT"})
    return model


@pytest.mark.parametrize("make", [P.Fold, P.Clean])
def test_inputs_outputs_metadata_and_versions_stay(make: type, tmp_path: Path) -> None:
    model = rich_model()
    text = model.SerializeToString()
    result = P.Pipeline([make()]).run(
        model, {"x": np.ones((2, 3, 5, 5), np.float32), "unused": np.arange(2)}, verify=False
    )
    assert model.SerializeToString() == text  # the caller's own is untouched
    fl.save(result.model, tmp_path / "out.onnx")
    after = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(after)
    assert len(after.graph.node) < len(model.graph.node)
    for field in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        assert getattr(after, field) == getattr(model, field), field
    assert {p.key: p.value for p in after.metadata_props} == {"author": "somebody", "license": "MIT"}
    assert [(o.domain, o.version) for o in after.opset_import] == [("", 18)]
    assert after.graph.name == "named" and after.graph.doc_string == "a graph"
    assert list(after.graph.input) == list(model.graph.input)
    assert [o.name for o in after.graph.output] == [o.name for o in model.graph.output]
    for old, new in zip(model.graph.output, after.graph.output, strict=True):
        assert old.type == new.type
    assert "gain" in {t.name for t in after.graph.initializer}  # a caller may override it
    assert sum(n.op_type == "Bernoulli" for n in after.graph.node) == 2  # twins, but each with its own numbers
    x = np.random.default_rng(1).standard_normal((4, 3, 5, 5)).astype(np.float32)
    feeds = {"x": x, "unused": np.arange(3), "gain": np.full((3, 1, 1), -1.5, np.float32)}
    want, got = (
        ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(["y", "same"], feeds)
        for m in (model, after)
    )
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)


def test_a_new_file_has_an_ir_version_that_the_installed_runtime_reads(tmp_path: Path) -> None:
    """A model that came without one (0 as onnx_ir gives it new models) is written with one that can be loaded."""
    model = ir.serde.deserialize_model(chain(10))
    result = P.fold(model, verify=False)
    fl.save(result.model, tmp_path / "m.onnx")
    written = onnx.load(tmp_path / "m.onnx")
    assert written.ir_version == 10
    ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])


@pytest.mark.slow
def test_weights_of_a_large_model_are_not_loaded(tmp_path: Path) -> None:
    """A model of 2.5 GiB in external data goes through the pass with less than 0.3 GiB of extra resident memory."""
    import subprocess
    import sys

    path = tmp_path / "large.onnx"
    blocks, width = 10, 8192
    nodes, value, weights = [], "x", []
    for i in range(blocks):
        nodes += [
            helper.make_node("MatMul", [value, f"w{i}"], [f"m{i}"], f"mm{i}"),
            helper.make_node("Identity", [f"m{i}"], [f"i{i}"], f"id{i}"),
            helper.make_node("Relu", [f"i{i}"], [f"r{i}"], f"relu{i}"),
        ]
        value = f"r{i}"
        tensor = TensorProto(name=f"w{i}", data_type=FLOAT, dims=[width, width], data_location=TensorProto.EXTERNAL)
        size = 4 * width * width
        for key, entry in (("location", "large.data"), ("offset", str(i * size)), ("length", str(size))):
            tensor.external_data.add(key=key, value=entry)
        weights.append(tensor)
    with open(tmp_path / "large.data", "wb") as stream:
        stream.truncate(blocks * 4 * width * width)  # zeros that take no room on the disk, and a few numbers
        for i in range(blocks):
            stream.seek(i * 4 * width * width)
            stream.write(np.full(1024, i + 1, np.float32).tobytes())
    ends = [helper.make_tensor_value_info(n, FLOAT, ["n", width]) for n in ("x", value)]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], weights)
    path.write_bytes(
        helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString()
    )
    script = (
        "import sys, foldline as fl, foldline.passes as P\n"
        "def kib(key): return int(next(l for l in open('/proc/self/status') if l.startswith(key)).split()[1])\n"
        "from foldline.passes.base import Context\n"
        "import onnxruntime, torch\n"
        "before = kib('VmRSS')\n"
        "graph = fl.load(sys.argv[1])\n"
        "out = P.Fold().apply(graph, Context())\n"
        "print(out.details['rewrites'], len(graph.nodes), kib('VmHWM') - before)\n"
    )
    found = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    rewrites, left, extra = map(int, found.stdout.split()[-3:])
    assert rewrites >= blocks and left == 2 * blocks
    assert extra < 0.3 * 2**20, f"{extra / 2**20:.2f} GiB"


def test_a_value_that_a_merge_makes_and_a_subgraph_reads_is_seen_as_read() -> None:
    """The sum of two branches is read by an If alone; folding the dead addition behind it must not change it."""
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[1,2,4,4] x, bool c) => (float[1,2,4,4] y)
        <float[2,2,3,3] w, float[2,2,1,1] v, float k = {0.5}>
        {
            a = Conv<pads=[1,1,1,1]>(x, w)
            b = Conv(x, v)
            s = Add(a, b)
            dead = Add(k, s)
            y = If(c) <then_branch = t () => (float[1,2,4,4] p) { p = Relu(s) },
                       else_branch = e () => (float[1,2,4,4] q) { q = Neg(s) }>
        }
    """
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    del model.graph.initializer[:]
    for name, shape in (("w", (2, 2, 3, 3)), ("v", (2, 2, 1, 1)), ("k", ())):
        data = np.asarray(rng.standard_normal(shape), np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(data, name))
    graph = fl.load(model)
    inputs = {"x": rng.standard_normal((1, 2, 4, 4)).astype(np.float32), "c": np.asarray(True)}
    after = graph.clone()
    P.Fold().apply(after, Context())
    assert sum(n.op == "conv" for n in after.nodes) == 1
    for flag in (True, False):
        inputs["c"] = np.asarray(flag)
        np.testing.assert_allclose(run_graph(after, inputs)[0][0], run_graph(graph, inputs)[0][0], rtol=1e-5, atol=1e-5)
