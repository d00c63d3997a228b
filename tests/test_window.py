"""Cutting windows out of graphs, checking a rewrite on its window alone, fuel and the search for the first bad one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import foldline as fl
import numpy as np
import onnx
import pytest
import torch
from foldline.cli import main
from foldline.graph.errors import ConstraintError
from foldline.graph.execute import run_graph, synthesize_inputs
from foldline.graph.ir import Graph, Node
from foldline.graph.load import load
from foldline.passes import Clean, Fold, Pipeline
from foldline.passes.base import Context, Fuel
from foldline.passes.fold import fold_pass
from foldline.passes.rewrite import Env, Refusal, Rewrite, Rule, Why, rewrite
from foldline.passes.rewrite.bisect import bisect
from onnx import TensorProto, helper, numpy_helper
from support.toys_base import fill
from torch import nn

FRONTS = ("fx", "onnx")


def graph_of(module: nn.Module, *args: torch.Tensor, front: str) -> Graph:
    """A module as a graph with a symbolic batch, through export for ONNX (batch norms stay)."""
    if front == "fx":
        return load(module, args)
    return load(proto_of(module, *args))


def proto_of(module: nn.Module, *args: torch.Tensor) -> onnx.ModelProto:
    batch = tuple({0: torch.export.Dim("batch")} for _ in args)
    program = torch.onnx.export(module, args, dynamo=True, optimize=False, verbose=False, dynamic_shapes=batch)
    assert program is not None
    return program.model_proto


def small_net() -> nn.Module:
    return fill(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)
        )
    ).eval()


class Reshaped(nn.Module):
    """Sizes read from the input at run time, in the middle of the window."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(torch.relu(x))
        return self.two(y.reshape(x.shape[0] * 5, 8)).reshape(x.shape[0], 20)


# ---- extract ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("front", FRONTS)
def test_every_window_of_consecutive_nodes_computes_what_the_graph_computes_there(front: str) -> None:
    graph = graph_of(small_net(), torch.randn(2, 3, 7, 7), front=front)
    inputs = synthesize_inputs(graph)
    _, known = run_graph(graph, inputs, [v.name for n in graph.nodes for v in n.outputs if v.uses or v.is_output])
    known |= inputs
    for start in range(len(graph.nodes)):
        for stop in range(start + 1, len(graph.nodes) + 1):
            window = graph.nodes[start:stop]
            for readers in (False, True):
                cut = graph.extract(window, readers=readers)
                assert [n.name for n in cut.nodes if n.op != "identity"] == [n.name for n in window]
                outputs, _ = run_graph(cut, {v.name: known[v.name] for v in cut.inputs})
                for value, found in zip(cut.outputs, outputs, strict=True):
                    np.testing.assert_array_equal(found, known[value.name.removesuffix("_read")])
                whole = next(v for v in cut.inputs)
                assert whole.shape == graph.values[whole.name].shape and whole.hint == graph.values[whole.name].hint
                assert all(graph.weight(name).numpy() is not None for name in cut.weights)


@pytest.mark.parametrize("front", FRONTS)
def test_sizes_computed_at_run_time_come_along(front: str) -> None:
    graph = graph_of(Reshaped(), torch.randn(2, 5, 6), front=front)
    reshape = next(n for n in graph.nodes if n.op == "reshape" and n.inputs[0] is not None)
    cut = graph.extract([reshape])
    small, big = synthesize_inputs(cut), synthesize_inputs(cut, sizes=cut.other_sizes())
    assert small.keys() == big.keys() and any(small[k].shape != big[k].shape for k in small)
    for arrays in (small, big):
        (out,), _ = run_graph(cut, arrays)
        data = arrays[reshape.inputs[0].name]  # type: ignore[union-attr]
        np.testing.assert_array_equal(out, data.reshape(-1, 8))


@pytest.mark.parametrize("front", FRONTS)
def test_a_cut_shares_its_weights_and_leaves_the_graph_alone(front: str) -> None:
    graph = graph_of(small_net(), torch.randn(2, 3, 7, 7), front=front)
    conv = next(n for n in graph.nodes if n.op == "conv")
    weight = conv.inputs[1].weight  # type: ignore[union-attr]
    assert weight is not None
    cut = graph.extract([conv])
    twin = cut.weight(weight.name)
    if front == "onnx":
        assert twin.value.native.const_value is weight.value.native.const_value  # type: ignore[union-attr]
    else:
        assert np.shares_memory(twin.numpy(), weight.numpy())
    before = weight.numpy().copy()
    cut.set_weight(twin, np.zeros_like(before))
    np.testing.assert_array_equal(weight.numpy(), before)


def test_a_node_of_another_graph_cannot_be_cut_out() -> None:
    graph = graph_of(small_net(), torch.randn(2, 3, 7, 7), front="fx")
    with pytest.raises(ConstraintError, match="not part of this graph"):
        graph.extract(graph.clone().nodes[:1])


def test_a_subgraph_that_reads_outer_values_is_cut_with_them() -> None:
    then = helper.make_graph(
        [helper.make_node("Mul", ["h", "w"], ["t"])], "t", [], [helper.make_tensor_value_info("t", 1, [2, 3])]
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["h"], ["e"])], "e", [], [helper.make_tensor_value_info("e", 1, [2, 3])]
    )
    nodes = [
        helper.make_node("Relu", ["x"], ["h"], "relu"),
        helper.make_node("If", ["c"], ["y"], "branch", then_branch=then, else_branch=other),
        helper.make_node("Neg", ["y"], ["z"], "neg"),
    ]
    graph = load(onnx_model(nodes, {"w": np.full(3, 2.0)}, c=(TensorProto.BOOL, []), x=(TensorProto.FLOAT, [2, 3])))
    cut = graph.extract([graph.node("branch")])
    assert {v.name for v in cut.inputs} == {"h", "c"}
    h = np.arange(6, dtype=np.float32).reshape(2, 3)
    (out,), _ = run_graph(cut, {"h": h, "c": np.asarray(True)})
    np.testing.assert_array_equal(out, 2 * h)


def onnx_model(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], **inputs: tuple[int, Any]) -> Any:
    stored = [numpy_helper.from_array(np.asarray(w, np.float32), n) for n, w in weights.items()]
    out = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    ins = [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()]
    return helper.make_model(
        helper.make_graph(nodes, "g", ins, [out], stored), ir_version=10, opset_imports=[helper.make_opsetid("", 20)]
    )


# ---- window checks ------------------------------------------------------------------------------------------------
class DropRelu(Rule):
    """Wrong on purpose: right only where everything is positive."""

    name: ClassVar[str] = "drop_relu"
    ops: ClassVar[tuple[str, ...]] = ("relu",)

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        source = node.inputs[0]
        assert source is not None

        def apply(graph: Graph) -> None:
            graph.replace_uses(node.output, source)

        return Rewrite([node], apply, reason="wrong on purpose")


class WrongBias(Rule):
    """Wrong on purpose: right only where the input is large."""

    name: ClassVar[str] = "wrong_bias"
    ops: ClassVar[tuple[str, ...]] = ("conv",)

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        value = node.input(2)
        if value is None or value.weight is None or not np.any(value.weight.numpy()):
            return None
        weight = value.weight
        return Rewrite([node], lambda graph: graph.set_weight(weight, np.zeros_like(weight.numpy())))


class Fixed(Rule):
    """Wrong on purpose: takes the size that the example has for the size of every batch."""

    name: ClassVar[str] = "fixed"
    ops: ClassVar[tuple[str, ...]] = ("reshape",)

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        hint, source = node.output.hint, node.inputs[0]
        if hint is None or source is None or None not in node.attrs["shape"]:
            return None

        def apply(graph: Graph) -> None:
            made = graph.insert("reshape", [source], {"shape": list(hint)}, name="fixed", after=node)
            graph.replace_uses(node.output, made.output, except_nodes=[made])

        return Rewrite([node], apply)


@pytest.mark.parametrize(
    ("front", "rule", "kind"),
    [
        *((front, rule, "random") for front in FRONTS for rule in (DropRelu(), WrongBias())),
        ("onnx", Fixed(), "resized"),
    ],
)
def test_a_wrong_rewrite_fails_in_its_window_and_is_not_made(front: str, rule: Rule, kind: str) -> None:
    model, args = (Reshaped(), torch.randn(2, 5, 6)) if rule.name == "fixed" else (small_net(), torch.randn(2, 3, 7, 7))
    graph = graph_of(model.eval(), args, front=front)
    before = graph.clone()
    log = rewrite(graph, [rule], Env(graph, Context(), windows=True))
    assert not log.applied and log.refused
    for found in log.refused:
        assert found.data["why"] == Why.WINDOW.value and found.data["rule"] == rule.name
        assert found.data["inputs"] == kind and found.data["nodes"] == [found.subject]
        assert rule.name in found.reason and found.subject in found.reason
        assert found.data["error"] is None or found.data["error"] > 1e-5
    arrays = synthesize_inputs(graph)
    for a, b in zip(run_graph(before, arrays)[0], run_graph(graph, arrays)[0], strict=True):
        np.testing.assert_array_equal(a, b)
    assert rewrite(graph, [rule], Env(graph, Context())).applied  # unchecked, it is made


def test_a_call_that_fixes_a_symbolic_size_cannot_be_inserted() -> None:
    """Torch settles the size for all graphs of one capture: that must not happen, nor outlive the attempt."""
    graph = graph_of(Reshaped().eval(), torch.randn(2, 5, 6), front="fx")
    shape = graph.inputs[0].shape
    reshape = next(n for n in graph.nodes if n.op == "reshape")
    with pytest.raises(ConstraintError, match="symbolic"):
        graph.insert("reshape", reshape.inputs, {"shape": [10, 8]}, name="fixed", after=reshape)
    assert graph.clone().inputs[0].shape == shape
    graph.set_hints(**{str(shape[0]): 9})  # type: ignore[attr-defined, index]
    assert graph.inputs[0].shape == shape and graph.inputs[0].hint == (9, 5, 6)


@pytest.mark.parametrize("front", FRONTS)
def test_right_rewrites_pass_their_windows(front: str) -> None:
    graph = graph_of(small_net(), torch.randn(2, 3, 7, 7), front=front)
    out = Fold(verify="window").apply(graph, Context())
    assert out.details["folded"] == 2 and not out.details["refused"]
    assert not [n for n in graph.nodes if n.op == "batch_norm"]


def test_an_ill_conditioned_norm_is_given_what_it_loses_by_itself() -> None:
    """A tiny variance multiplies every rounding error of the convolution: that is no fault of the fold."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with torch.no_grad():
        fill(model)
        model[1].running_var.fill_(1e-3)
        model[0].bias.fill_(300.0)
        model[1].running_mean.fill_(300.0)
    graph = graph_of(model.eval(), torch.randn(2, 3, 7, 7), front="fx")
    assert Fold(verify="window").apply(graph, Context()).details["folded"] == 1


# ---- options ------------------------------------------------------------------------------------------------------
def test_verify_as_a_word_reaches_the_pass_and_off_is_not_compared() -> None:
    model, args = small_net(), (torch.randn(2, 3, 7, 7),)
    assert fl.passes.fold(model, args, verify="window").report.passes[0].comparison is not None
    record = fl.passes.fold(model, args, verify="off").report.passes[0]
    assert record.comparison is None and record.why_not == "not verified"
    with pytest.raises(fl.graph.errors.ConfigError):
        fl.passes.fold(model, args, verify="windows")


def test_rules_are_chosen_and_left_out_by_name() -> None:
    model, args = small_net(), (torch.randn(2, 3, 7, 7),)
    name = next(r.name for r in fold_pass.AFFINE_RULES if "batch_norm" in r.ops)
    assert fl.passes.fold(model, args, rules=[name]).report.passes[0].details["folded"] == 2
    assert fl.passes.fold(model, args, disable=[name]).report.passes[0].details["folded"] == 0
    with pytest.raises(fl.graph.errors.ConfigError, match="did you mean"):
        fl.passes.fold(model, args, rules=[name + "x"])


# ---- fuel and bisection -------------------------------------------------------------------------------------------
@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass fold with one wrong rule among the right ones."""
    right = fold_pass.fold_rules
    monkeypatch.setattr(fold_pass, "fold_rules", lambda: [*right(), DropRelu()])


def test_fuel_limits_the_rewrites_of_all_passes_together() -> None:
    counts = []
    for limit in (0, 1, 2, None):
        graph = graph_of(small_net(), torch.randn(2, 3, 7, 7), front="onnx")
        ctx = Context(fuel=Fuel(limit))
        Fold(clean=False).apply(graph, ctx)
        Clean().apply(graph, ctx)
        assert ctx.fuel is not None
        counts.append(len(ctx.fuel.taken))
    assert counts[:3] == [0, 1, 2] and counts[3] >= 2


@pytest.mark.parametrize("front", FRONTS)
def test_bisection_finds_the_wrong_rewrite(front: str, wrong: None) -> None:
    module, args = small_net(), (torch.randn(2, 3, 7, 7),)
    model = module if front == "fx" else proto_of(module, *args)
    found = bisect(model, Pipeline([Fold()]), args)
    assert found is not None
    assert found.rule == "drop_relu" and len(found.nodes) == 1 and "relu" in found.nodes[0]
    assert found.error > 1e-3 and found.before < 1e-5 and 1 <= found.index <= found.total
    assert bisect(model, Pipeline([Fold()]), args, tolerance=1e3) is None
    assert bisect(model, Pipeline([Fold(verify="window")]), args) is None  # there it is never made


def test_the_command_prints_the_wrong_rewrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: None
) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(proto_of(small_net(), torch.randn(2, 3, 7, 7)), "m.onnx")

    def call(*argv: str) -> int:
        with pytest.raises(SystemExit) as stop:
            main(list(argv))
        return int(stop.value.code or 0)

    assert call("run", "fold", "m.onnx", "--bisect") == 1
    printed = capsys.readouterr().out
    assert "drop_relu" in printed and "relu" in printed and "error" in printed
    assert call("run", "fold", "m.onnx", "--bisect", "--tolerance", "1000") == 0
    assert call("run", "fold", "m.onnx", "-o", "out", "--verify", "window", "-q") == 0
    assert "window check" in (tmp_path / "out" / "report.json").read_text()
    assert call("run", "fold", "m.onnx") == 2
