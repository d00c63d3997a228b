"""Scales and shifts from every source, along every path, into every sink: the numbers stay, the nodes go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from foldline.graph.analysis import Analysis
from foldline.graph.execute import run_graph
from foldline.graph.ir import Graph
from foldline.graph.load import load
from foldline.graph.ops.carry import backward, forward, moves
from foldline.graph.positions import spread
from foldline.graph.space import atoms
from foldline.passes.base import Context
from foldline.passes.fold.affine import Affine
from foldline.passes.fold.affine_rules import AFFINE_RULES
from foldline.passes.fold.edits import fits
from foldline.passes.fold.sources import affine_of
from foldline.passes.rewrite import Env, Log, rewrite
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from support.random_affine import random_affine
from torch import Tensor, nn

RTOL = 1e-5


def fold(graph: Graph) -> tuple[Graph, Log]:
    """A clone under the affine rules alone."""
    after = graph.clone()
    log = rewrite(after, AFFINE_RULES, Env(after, Context()))
    after.refresh()
    return after, log


def assert_same(before: Graph, after: Graph, inputs: dict[str, np.ndarray], rtol: float = RTOL) -> None:
    for a, b in zip(run_graph(before, inputs)[0], run_graph(after, inputs)[0], strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(b.astype(np.float64), a.astype(np.float64), rtol=0, atol=rtol * np.abs(a).max())


def varied(model: nn.Module) -> nn.Module:
    """Every parameter and statistic random, some gains negative."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor))
    return model.eval()


def check_torch(model: nn.Module, *args: Tensor, gone: int, vary: bool = True) -> Log:
    """Fold, compare, and count how many nodes fewer there are."""
    before = load(varied(model) if vary else model.eval(), args)
    after, log = fold(before)
    assert_same(before, after, before.bind(args))
    with torch.no_grad():
        want, got = model(*args), after.to_model()(*args)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=RTOL * float(want.abs().max()))
    assert len(before.nodes) - len(after.nodes) == gone, (log.applied, log.refused)
    return log


class Scaled(nn.Module):
    """``between(x) * scale + shift`` with parameters of one shape."""

    def __init__(self, shape: tuple[int, ...], *, shift: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(shape))
        self.shift = nn.Parameter(torch.zeros(shape)) if shift else None

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.scale
        return y if self.shift is None else y + self.shift


class Call(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def seq(*layers: Any) -> nn.Module:
    return nn.Sequential(*(layer if isinstance(layer, nn.Module) else Call(layer) for layer in layers))


C = (4, 1, 1)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    # what stands in front absorbs
    "conv": (lambda: seq(nn.Conv2d(3, 4, 3, padding=1), Scaled(C)), (2, 3, 4, 4), 2),
    "conv without bias": (lambda: seq(nn.Conv2d(3, 4, 3, padding=1, bias=False), Scaled(C)), (2, 3, 4, 4), 2),
    "grouped transposed conv": (lambda: seq(nn.ConvTranspose2d(4, 4, 3, groups=2), Scaled(C)), (2, 4, 4, 4), 2),
    "linear": (lambda: seq(nn.Linear(5, 4), Scaled((4,))), (4, 4, 5), 2),
    "linear, one number": (lambda: seq(nn.Linear(5, 4), Scaled(())), (4, 4, 5), 2),
    "layer norm": (lambda: seq(nn.LayerNorm(4), Scaled((4,))), (4, 4, 4), 2),
    "layer norm without gains": (lambda: seq(nn.LayerNorm(4, elementwise_affine=False), Scaled((4,))), (4, 4), 2),
    "rms norm": (lambda: seq(nn.RMSNorm(4), Scaled((4,), shift=False)), (4, 4), 1),
    "group norm": (lambda: seq(nn.GroupNorm(2, 4), Scaled(C)), (2, 4, 4, 4), 2),
    "instance norm": (lambda: seq(nn.InstanceNorm2d(4, affine=True), Scaled(C)), (2, 4, 4, 4), 2),
    "batch norm behind relu": (lambda: seq(nn.ReLU(), nn.BatchNorm2d(4), Scaled(C), nn.Sigmoid()), (2, 4, 4, 4), 2),
    "through a transpose": (
        lambda: seq(nn.Conv2d(3, 4, 1), lambda x: x.flatten(2).transpose(1, 2), Scaled((4,))),
        (2, 3, 4, 4),
        2,
    ),
    "through avg pool": (lambda: seq(nn.Conv2d(3, 4, 1), nn.AvgPool2d(2), Scaled(C)), (2, 3, 4, 4), 2),
    "through pixel shuffle": (lambda: seq(nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), Scaled(C)), (2, 3, 4, 4), 2),
    "through upsampling": (
        lambda: seq(nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2), Scaled(C)),
        (2, 3, 4, 4),
        2,
    ),
    "through a sum of two": (lambda: Sum(), (2, 3, 4, 4), 2),
    "through concat": (lambda: Joined(), (2, 3, 4, 4), 2),
    "one of three parts": (lambda: Parts(), (2, 5), 2),
    "heads": (lambda: seq(nn.Linear(5, 8), lambda x: x.unflatten(-1, (2, 4)), Scaled((2, 1))), (3, 5), 2),
    "over two axes": (lambda: seq(nn.Linear(5, 8), lambda x: x.unflatten(-1, (2, 4)), Scaled((2, 4))), (3, 5), 2),
    # what stands behind absorbs
    "into a linear": (lambda: seq(nn.Sigmoid(), Scaled((5,)), nn.Linear(5, 4)), (4, 4, 5), 2),
    "into a linear without bias": (lambda: seq(nn.Sigmoid(), Scaled((5,)), nn.Linear(5, 4, bias=False)), (4, 5), 2),
    "into a conv": (lambda: seq(nn.Sigmoid(), Scaled((3, 1, 1)), nn.Conv2d(3, 4, 3)), (2, 3, 4, 4), 2),
    "into a grouped conv": (
        lambda: seq(nn.Sigmoid(), Scaled((4, 1, 1)), nn.Conv2d(4, 4, 3, groups=2)),
        (2, 4, 4, 4),
        2,
    ),
    "into a depthwise conv": (
        lambda: seq(nn.Sigmoid(), Scaled((4, 1, 1)), nn.Conv2d(4, 8, 3, groups=4, bias=False)),
        (2, 4, 4, 4),
        2,
    ),
    "scale into a padded conv": (
        lambda: seq(nn.Sigmoid(), Scaled((3, 1, 1), shift=False), nn.Conv2d(3, 4, 3, padding=1)),
        (2, 3, 4, 4),
        1,
    ),
    "flattened": (lambda: seq(nn.Sigmoid(), Scaled(C), nn.Flatten(), nn.Linear(64, 3)), (2, 4, 4, 4), 2),
    "into a batch norm": (lambda: seq(nn.Sigmoid(), Scaled(C), nn.BatchNorm2d(4), nn.ReLU()), (2, 4, 4, 4), 2),
    "a chain of numbers": (lambda: seq(nn.Sigmoid(), Scaled((4,)), Scaled((4,)), nn.Sigmoid()), (3, 4), 2),
}


class Sum(nn.Module):
    """Two convolutions added: both take the scale, one the shift."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.ssf = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1, bias=False), Scaled(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.ssf(self.a(x) + self.b(x))


class Joined(nn.Module):
    """Two convolutions side by side: each takes its part of the map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.ssf = nn.Conv2d(3, 1, 1), nn.Conv2d(3, 3, 1), Scaled(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.ssf(torch.cat([self.a(x), self.b(x)], 1))


class Parts(nn.Module):
    """Query, key and value from one projection; only the query is scaled and shifted."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.ssf = nn.Linear(5, 12), Scaled((4,))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.ssf(q) + torch.sigmoid(k) * torch.tanh(v)


@pytest.mark.parametrize("kind", CASES)
def test_scale_and_shift_are_absorbed(kind: str) -> None:
    make, shape, gone = CASES[kind]
    check_torch(make(), torch.randn(shape), gone=gone)


class Branches(nn.Module):
    """Several models side by side, so that one export covers them all."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        return tuple(model(x) for model, x in zip(self.models, args, strict=True))


def exported(model: nn.Module, *args: Tensor) -> Graph:
    program = torch.onnx.export(model.eval(), args, dynamo=True, optimize=False, verbose=False)
    assert program is not None
    return load(program.model_proto)


def test_onnx_absorbs_the_same_kinds() -> None:
    """Also where the exporter spells a linear as a matrix product and an addition."""
    from foldline.passes.fold import Fold

    # a product without bias keeps the shift as an addition; a chunk is exported as a sequence
    left_out = {"into a linear without bias", "one of three parts"}
    built = {kind: (make(), torch.randn(shape)) for kind, (make, shape, _) in CASES.items() if kind not in left_out}
    model = varied(Branches([m for m, _ in built.values()]))
    args = tuple(x for _, x in built.values())
    before = exported(model, *args)
    after = before.clone()
    Fold(verify="off").apply(after, Context())
    assert_same(before, after, dict(zip((v.name for v in before.inputs), (a.numpy() for a in args), strict=True)))
    onnx.checker.check_model(after.to_model())
    for scaled in (name for name, part in model.named_modules() if isinstance(part, Scaled)):
        kind = list(built)[int(scaled.split(".")[1])]
        spelled = [n.name for n in after.nodes if n.scope == scaled and n.op in ("mul", "add")]
        assert not spelled or kind in ("a chain of numbers", "rms norm", "group norm"), (kind, spelled)


# ---- random graphs -----------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_random_graphs_keep_their_function(seed: int) -> None:
    before = load(random_affine(seed))
    after, _ = fold(before)
    assert len(after.nodes) <= len(before.nodes)
    x = np.random.default_rng(seed).normal(size=before.inputs[0].shape).astype(np.float32)
    assert_same(before, after, {"x": x}, rtol=1e-3)  # random statistics can be badly conditioned


def test_random_graphs_hold_something_to_fold() -> None:
    """The generator is worth something: a good part of what it makes is absorbed, by every rule."""
    rules = [d.data["rule"] for seed in range(40) for d in fold(load(random_affine(seed)))[1].applied]
    assert {"fold_norm", "fold_scale_shift", "push_gain"} <= set(rules) and len(rules) > 30


# ---- indices: carrying agrees with the analysis ------------------------------------------------------------------
MOVES: dict[str, Callable[[Tensor], Any]] = {
    "transpose": lambda x: x.permute(2, 0, 3, 1),
    "merge": lambda x: x.reshape(2, 12, 4),
    "cut": lambda x: x.reshape(2, 2, 2, 3, 4),
    "cut and merge": lambda x: x.reshape(4, 2, 12),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "slice": lambda x: x[:, 1:3, :, 2:],
    "select": lambda x: x.select(1, 2),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 1),
    "split": lambda x: x.split([1, 3], 1),
    "unbind": lambda x: x.unbind(1),
    "concat": lambda x: torch.cat([x, torch.sigmoid(x)], 1),
    "stack": lambda x: torch.stack([x, torch.sigmoid(x)], 1),
    "expand": lambda x: x.unsqueeze(1).expand(2, 5, 4, 3, 4),
    "tile": lambda x: x.repeat(1, 2, 1, 1),
    "repeat": lambda x: x.repeat_interleave(2, 1),
    "shuffle": lambda x: F.pixel_shuffle(x, 2),
    "unshuffle": lambda x: F.pixel_unshuffle(x.repeat_interleave(2, 2), 2),
}


@pytest.mark.parametrize("kind", MOVES)
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_carrying_agrees_with_the_index_spaces_of_the_analysis(kind: str, axis: int) -> None:
    """A random number per atom of an axis, spread over an output's axis, is what carrying the vector there gives."""
    graph = load(Call(MOVES[kind]), (torch.randn(2, 4, 3, 4),))
    spaces = Analysis(graph).run()
    rng = np.random.default_rng(0)
    compared = 0
    for node in graph.nodes:
        x = node.inputs[0]
        if x is None or not moves(node.op) or x.rank is None or x.rank <= axis:
            continue
        numbers = {a: rng.normal(size=a.size) for a in atoms(spaces.of(x)[axis])}
        vector = spread(spaces.of(x)[axis], numbers).reshape([-1 if a == axis else 1 for a in range(x.rank)])
        try:
            carried = [forward(node, 0, k, vector, 1.0) for k in range(len(node.outputs))]
        except Exception as stuck:
            assert type(stuck).__name__ == "Stuck" and ("shuffle" in node.op or kind == "cut and merge")
            continue
        for k, made in enumerate(node.outputs):
            total: np.ndarray = np.ones((1,) * (made.rank or 0))
            for a, space in enumerate(spaces.of(made)):
                total = total * spread(space, numbers).reshape([-1 if b == a else 1 for b in range(made.rank or 0)])
            if node.op in ("concat", "stack"):
                continue  # the analysis ties or tells apart all parts, carrying treats one
            np.testing.assert_allclose(np.broadcast_to(carried[k], made.hint), np.broadcast_to(total, made.hint))
            again = forward(node, 0, k, backward(node, 0, k, carried[k], 1.0, True), 1.0)
            np.testing.assert_array_equal(np.broadcast_to(again, made.hint), np.broadcast_to(carried[k], made.hint))
            compared += 1
    assert compared or kind in ("concat", "stack", "shuffle", "unshuffle", "cut and merge")


@given(st.integers(0, 2**16), st.sampled_from(sorted(MOVES)))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_carrying_is_what_the_operator_does(seed: int, kind: str) -> None:
    """An array that lies over x, carried, lies over f(x): scaling before and behind is the same."""
    rng = np.random.default_rng(seed)
    graph = _moving(kind)
    shape = tuple(n if rng.random() < 0.5 else 1 for n in (2, 4, 3, 4))
    array = rng.normal(size=shape)
    node = next(n for n in graph.nodes if n.inputs[0] is not None and n.inputs[0].is_input)
    x = rng.normal(size=(2, 4, 3, 4)).astype(np.float32)
    if not moves(node.op) or node.inputs[0] is None:
        return
    names = [v.name for v in node.outputs if v.uses or v.is_output]
    plain = run_graph(graph, {graph.inputs[0].name: x}, names)[1]
    scaled = run_graph(graph, {graph.inputs[0].name: (x * array).astype(np.float32)}, names)[1]
    for k, v in enumerate(node.outputs):
        if v.name in names and node.op not in ("concat", "stack"):
            try:
                carried = forward(node, 0, k, array, 1.0)
            except Exception as stuck:
                assert type(stuck).__name__ == "Stuck"
                continue
            np.testing.assert_allclose(scaled[v.name], plain[v.name] * carried, rtol=1e-4, atol=1e-5)


_GRAPHS: dict[str, Graph] = {}


def _moving(kind: str) -> Graph:
    if kind not in _GRAPHS:
        _GRAPHS[kind] = load(Call(MOVES[kind]), (torch.randn(2, 4, 3, 4),))
    return _GRAPHS[kind]


# ---- ONNX by hand --------------------------------------------------------------------------------------------------
def onnx_graph(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], outputs: tuple[str, ...] = ("y",), **inputs: Any
) -> Graph:
    dtype = next(iter(weights.values())).dtype
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) if dtype.kind == "f" else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, "hand", [helper.make_tensor_value_info(n, kind, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, kind, None) for n in outputs],
        [numpy_helper.from_array(a if a.dtype.kind == "i" else a.astype(dtype), n) for n, a in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return load(onnx.shape_inference.infer_shapes(model))


def check_onnx(graph: Graph, left: list[str], rtol: float = RTOL) -> Log:
    """Fold, compare on random inputs, and name the ops that are left."""
    after, log = fold(graph)
    rng = np.random.default_rng(1)
    dtype = np.float16 if graph.inputs[0].dtype == "float16" else np.float32
    assert_same(graph, after, {v.name: rng.normal(size=v.hint).astype(dtype) for v in graph.inputs}, rtol)
    assert [n.op for n in after.nodes] == left, (log.applied, log.refused)
    return log


def why(log: Log, subject: str) -> tuple[str, str]:
    (found,) = [d for d in log.refused if d.subject == subject]
    return str(found.data["why"]), found.reason


def op(kind: str, inputs: str, output: str, name: str = "", **attrs: Any) -> onnx.NodeProto:
    name = name or (f"{kind.lower()}_{output}" if kind == "Sigmoid" else kind.lower())
    return helper.make_node(kind, inputs.split(), output.split(), name, **attrs)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape) + 7).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("behind", [True, False])
def test_gemm_with_alpha_beta_and_a_one_row_bias(trans: int, behind: bool) -> None:
    gemm = op(
        "Gemm", "h w b" if not behind else "x w b", "y" if not behind else "h", alpha=0.5, beta=-2.0, transB=trans
    )
    ssf = [op("Mul", "s h" if behind else "s x", "t"), op("Sub", "t c", "y" if behind else "h")]
    width = 4 if behind else 5
    weights = {
        "w": normal(4, 5) if trans else normal(5, 4),
        "b": normal(1, 4),
        "s": normal(width),
        "c": normal(1, width),
    }
    check_onnx(onnx_graph([gemm, *ssf] if behind else [*ssf, gemm], weights, x=[3, 5]), ["linear"])


def test_a_matrix_on_the_left_absorbs_rows() -> None:
    nodes = [op("MatMul", "w x", "h"), op("Mul", "h s", "y")]
    check_onnx(onnx_graph(nodes, {"w": normal(5, 4), "s": normal(5, 1)}, x=[2, 4, 4]), ["matmul"])
    nodes = [op("Mul", "x s", "h"), op("MatMul", "w h", "y")]
    check_onnx(onnx_graph(nodes, {"w": normal(5, 4), "s": normal(4, 1)}, x=[2, 4, 4]), ["matmul"])


def test_a_matrix_on_the_left_leaves_columns_alone() -> None:
    """[2, 4, 4]: the map on the columns has the length of the axis that is contracted."""
    nodes = [op("Sigmoid", "x", "a"), op("Mul", "a s", "h"), op("MatMul", "w h", "g"), op("Sigmoid", "g", "y")]
    log = check_onnx(
        onnx_graph(nodes, {"w": normal(4, 4), "s": normal(1, 4)}, x=[2, 4, 4]), ["sigmoid", "mul", "matmul", "sigmoid"]
    )
    assert why(log, "mul")[0] == "does not commute"


def test_an_einsum_with_a_parameter_absorbs() -> None:
    nodes = [op("Mul", "x s", "h"), op("Add", "h t", "k"), op("Einsum", "k w", "g", equation="bhd,hde->bhe"),
             op("Mul", "g u", "y", name="mul2")]  # fmt: skip
    weights = {"w": normal(3, 4, 5), "s": normal(3, 4), "t": normal(4), "u": normal(3, 5)}
    log = check_onnx(onnx_graph(nodes, weights, x=[2, 3, 4]), ["add", "einsum"])
    assert why(log, "add")[0] == "graph output"  # the shift is one behind the einsum too, and nothing absorbs it


def test_an_embedding_absorbs() -> None:
    nodes = [op("Gather", "w i", "h", axis=0), op("Mul", "h s", "k"), op("Add", "k t", "y")]
    graph = helper.make_graph(
        nodes, "hand", [helper.make_tensor_value_info("i", TensorProto.INT64, [2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3, 4])],
        [numpy_helper.from_array(a, n) for n, a in {"w": normal(7, 4), "s": normal(4), "t": normal(4)}.items()],
    )  # fmt: skip
    before = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
    after, _ = fold(before)
    assert [n.op for n in after.nodes] == ["gather"]
    assert_same(before, after, {"i": np.array([[0, 6, 3], [2, 2, 5]])})


def test_a_tied_embedding_is_not_changed() -> None:
    nodes = [op("Gather", "w i", "h", axis=0), op("Mul", "h s", "k"), op("Transpose", "w", "wt", perm=[1, 0]),
             op("Sigmoid", "k", "a"), op("MatMul", "a wt", "y")]  # fmt: skip
    graph = helper.make_graph(
        nodes, "hand", [helper.make_tensor_value_info("i", TensorProto.INT64, [2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3, 7])],
        [numpy_helper.from_array(a, n) for n, a in {"w": normal(7, 4), "s": normal(4)}.items()],
    )  # fmt: skip
    before = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
    after, log = fold(before)
    assert why(log, "mul")[0] == "tied weight" and len(after.nodes) == len(before.nodes)


@pytest.mark.parametrize("per_axis", [True, False])
def test_the_scales_of_a_dequantized_weight_absorb(per_axis: bool) -> None:
    nodes = [op("DequantizeLinear", "q d", "w", axis=1), op("MatMul", "x w", "h"), op("Mul", "h s", "y")]
    rng = np.random.default_rng(0)
    quantized = {"q": rng.integers(-127, 128, (5, 4)).astype(np.int8)}
    quantized["d"] = np.abs(normal(4)) if per_axis else np.float32(0.1).reshape(())
    graph = onnx_graph(nodes, {"s": np.abs(normal(4))} | quantized, x=[3, 5])
    after, log = fold(graph)
    assert [n.op for n in after.nodes][2:] == ([] if per_axis else ["mul"]), log.refused
    assert_same(graph, after, {"x": normal(3, 5)})


def test_the_scale_of_attention_goes_into_the_query_alone() -> None:
    """Three slices of one projection; the scale lands in the query's rows and nowhere else."""
    cut = [
        op("Slice", f"h {a} {b} axis", name, name=f"slice_{name}") for a, b, name in (("z", "f", "q"), ("f", "e", "k"))
    ]
    nodes = [op("MatMul", "x w", "m"), op("Add", "m b", "h"), *cut, op("Transpose", "k", "kt", perm=[0, 2, 1]),
             op("Mul", "q s", "qs"), op("MatMul", "qs kt", "a", name="scores"), op("Softmax", "a", "y")]  # fmt: skip
    weights = {"w": normal(5, 8), "b": normal(8), "s": np.float32(0.5).reshape(())}
    ints = {"z": np.array([0]), "f": np.array([4]), "e": np.array([8]), "axis": np.array([2])}
    graph = onnx_graph(nodes, weights | ints, x=[2, 3, 5])
    after, _ = fold(graph)
    assert "mul" not in [n.op for n in after.nodes]
    assert_same(graph, after, {"x": normal(2, 3, 5)})
    before, now = (next(n for n in g.nodes if n.op == "linear").inputs[1].const() for g in (graph, after))  # type: ignore[union-attr]
    np.testing.assert_array_equal(now[:, :4], before[:, :4] * 0.5)
    np.testing.assert_array_equal(now[:, 4:], before[:, 4:])


def test_a_gain_goes_into_all_projections_that_read_it() -> None:
    nodes = [op("LayerNormalization", "x g c", "n", axis=-1),
             *(op("MatMul", f"n w{i}", f"m{i}", name=f"m{i}") for i in range(3)),
             *(op("Add", f"m{i} b{i}", f"o{i}", name=f"a{i}") for i in range(3))]  # fmt: skip
    weights = {"g": normal(4), "c": normal(4)} | {f"w{i}": normal(4, 3) for i in range(3)}
    weights |= {f"b{i}": normal(3) for i in range(3)}
    graph = onnx_graph(nodes, weights, ("o0", "o1", "o2"), x=[2, 3, 4])
    log = check_onnx(graph, [n.op for n in graph.nodes])
    assert [d.data["into"] for d in log.applied] == [["m2", "a2", "m1", "a1", "m0", "a0"]] or len(log.applied) == 1
    after, _ = fold(graph)
    norm = after.nodes[0]
    assert (norm.inputs[1].const() == 1).all() and (norm.inputs[2].const() == 0).all()  # type: ignore[union-attr]


def test_a_gain_stays_where_one_reader_cannot_take_it() -> None:
    nodes = [op("LayerNormalization", "x g", "n", axis=-1), op("MatMul", "n w", "o"), op("Sigmoid", "n", "p")]
    graph = onnx_graph(nodes, {"g": normal(4), "w": normal(4, 3)}, ("o", "p"), x=[2, 3, 4])
    log = check_onnx(graph, ["layer_norm", "linear", "sigmoid"])
    assert why(log, "layernormalization")[0] == "does not commute"


def test_an_rms_norm_spelled_out_gives_its_gain_to_query_key_and_value() -> None:
    """Llama's and T5's norm in ONNX: a product with the gain behind the division by the root mean square."""
    nodes = [op("Mul", "x x", "sq", name="square"), op("ReduceMean", "sq axes", "mean"), op("Add", "mean eps", "v"),
             op("Sqrt", "v", "r"), op("Div", "x r", "n"), op("Mul", "g n", "h", name="gain"),
             *(op("MatMul", f"h w{i}", f"o{i}", name=f"m{i}") for i in range(3))]  # fmt: skip
    weights = {"g": normal(4)} | {f"w{i}": normal(4, 3) for i in range(3)} | {"eps": np.float32(1e-5).reshape(())}
    graph = onnx_graph(nodes, weights | {"axes": np.array([-1])}, ("o0", "o1", "o2"), x=[2, 3, 4])
    after, log = fold(graph)
    assert "gain" not in [n.name for n in after.nodes], log.refused
    assert_same(graph, after, {"x": normal(2, 3, 4)})


# ---- refusals --------------------------------------------------------------------------------------------------------
def chain(*layers: Any, shape: tuple[int, ...] = (2, 4, 4, 4), gone: int = 0, vary: bool = True) -> Log:
    return check_torch(seq(*layers), torch.randn(shape), gone=gone, vary=vary)


def test_a_negative_scale_does_not_pass_a_maximum() -> None:
    log = chain(nn.Sigmoid(), Scaled(C, shift=False), nn.MaxPool2d(2), nn.Conv2d(4, 3, 1))
    assert "sign" in {d.data["why"] for d in log.refused}


def test_a_positive_scale_passes_relu_and_maximum() -> None:
    model = seq(nn.Sigmoid(), Scaled(C, shift=False), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 1))
    varied(model)
    with torch.no_grad():
        model[1].scale.abs_()  # type: ignore[union-attr, operator]
    check_torch(model, torch.randn(2, 4, 4, 4), gone=1, vary=False)


def test_a_negative_scale_does_not_pass_relu() -> None:
    log = chain(nn.Conv2d(4, 4, 1), nn.ReLU(), Scaled(C, shift=False), nn.ReLU(), nn.Conv2d(4, 3, 1))
    assert "sign" in {d.data["why"] for d in log.refused}


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 3, 3, padding=1), nn.ConvTranspose2d(4, 3, 3), nn.AvgPool2d(3, 1, padding=1)]
)
def test_a_shift_does_not_pass_a_padded_border(layer: nn.Module) -> None:
    log = chain(nn.Sigmoid(), Scaled(C), layer, nn.Conv2d(3 if hasattr(layer, "weight") else 4, 2, 1), gone=1)
    assert "padded border" in {d.data["why"] for d in log.refused}


@pytest.mark.parametrize("axis", [2, 3])
def test_a_map_on_height_or_width_is_not_one_on_channels(axis: int) -> None:
    """All axes have length 4."""
    shape = tuple(4 if a == axis else 1 for a in range(1, 4))
    log = chain(nn.Conv2d(4, 4, 1), Scaled(shape), nn.Sigmoid())
    assert {d.data["why"] for d in log.refused} == {"does not commute"}


class Seen(nn.Module):
    """A convolution whose output somebody else reads, or is an output itself."""

    def __init__(self, output: bool) -> None:
        super().__init__()
        self.conv, self.ssf, self.output = nn.Conv2d(4, 4, 1), Scaled(C), output

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return torch.sigmoid(self.ssf(y)), y if self.output else torch.tanh(y)


@pytest.mark.parametrize(("output", "reason"), [(False, "second consumer"), (True, "graph output")])
def test_what_somebody_else_sees_does_not_change(output: bool, reason: str) -> None:
    before = load(varied(Seen(output)), (torch.randn(2, 4, 4, 4),))
    after, log = fold(before)
    assert reason in {d.data["why"] for d in log.refused}
    assert_same(before, after, before.bind((torch.randn(2, 4, 4, 4),)))


def test_a_layer_called_twice_is_not_changed() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.ssf = nn.Conv2d(4, 4, 1), Scaled(C)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.sigmoid(self.ssf(self.conv(x))))

    log = check_torch(Twice(), torch.randn(2, 4, 4, 4), gone=0)
    assert "tied weight" in {d.data["why"] for d in log.refused}


def test_a_constant_that_broadcasts_its_operand_is_no_map() -> None:
    """x [3, 1] times [4] is [3, 4]: the product makes axes; a constant of equal numbers does so too."""
    nodes = [op("MatMul", "x w", "h"), op("Mul", "h s", "y")]
    for s in (normal(4), np.full(4, 2.0, np.float32)):
        check_onnx(onnx_graph(nodes, {"w": normal(5, 1), "s": s}, x=[3, 5]), ["linear", "mul"])


def test_symbolic_sizes_are_not_taken_for_numbers() -> None:
    """The batch has no fixed length: a reshape that mixes it with the channels lets nothing pass, flattening does."""
    nodes = [op("MatMul", "x w", "h"), op("Reshape", "h to", "r"), op("Mul", "r s", "y")]
    weights = {"w": normal(5, 4), "s": normal(4)}
    mixed = onnx_graph(nodes, weights | {"to": np.array([4, -1, 4])}, x=["batch", 4, 5])
    after, _ = fold(mixed)
    assert [n.op for n in after.nodes] == ["linear", "reshape"]  # the last axis is the channels' own, whatever the rest
    weights["s"] = normal(4, 1, 1)
    across = onnx_graph(nodes, weights | {"to": np.array([4, -1, 4])}, x=["batch", 4, 5])
    after, log = fold(across)
    assert [n.op for n in after.nodes] == ["linear", "reshape", "mul"]
    assert "whose length is not fixed" in why(log, "mul")[1]


def test_a_result_that_does_not_fit_half_precision_is_refused() -> None:
    nodes = [op("MatMul", "x w", "h"), op("Mul", "h s", "y")]
    half = {"w": (normal(5, 4) * 1e3).astype(np.float16), "s": np.full(4, 300.0, np.float16)}
    graph = onnx_graph(nodes, half, x=[3, 5])
    after, log = fold(graph)
    assert [n.op for n in after.nodes] == ["linear", "mul"]
    assert why(log, "mul")[0] == "does not fit the dtype"


def test_half_precision_is_computed_in_double_and_cast_once() -> None:
    nodes = [op("MatMul", "x w", "h"), op("Add", "h b", "k"), op("Mul", "k s", "z"), op("Sub", "z t", "y")]
    half = {"w": normal(5, 4), "b": normal(4), "s": normal(4) + 2, "t": normal(4)}
    half = {k: v.astype(np.float16) for k, v in half.items()}
    graph = onnx_graph(nodes, half, x=[3, 5])
    after, _ = fold(graph)
    assert [n.op for n in after.nodes] == ["linear", "add"]
    wide = {k: v.astype(np.float64) for k, v in half.items()}
    found = next(n for n in after.nodes if n.op == "linear").inputs[1].const()  # type: ignore[union-attr]
    np.testing.assert_array_equal(found, (wide["w"] * wide["s"]).astype(np.float16))
    bias = next(n for n in after.nodes if n.op == "add").inputs[1].const()  # type: ignore[union-attr]
    np.testing.assert_array_equal(bias, (wide["b"] * wide["s"] - wide["t"]).astype(np.float16))


def test_fits_looks_at_range_and_rounding() -> None:
    tiny = np.full(4, 3e-8)
    assert not fits(tiny, tiny.astype(np.float16))  # subnormal: a quarter of the number is lost
    assert not fits(np.array([1e5]), np.array([np.inf], np.float16))
    assert fits(np.zeros(3), np.zeros(3, np.float16)) and fits(np.array([0.1]), np.array([0.1], np.float16))


def test_a_shared_constant_is_copied_not_changed() -> None:
    """Two products read one vector; what one absorbs must not show in the other."""
    nodes = [
        *(op("Sigmoid", "x", "a"), op("Mul", "a s", "b"), op("Mul", "b t", "c", name="mul2")),
        *(op("Sigmoid", "c", "d"), op("Mul", "d s", "e", name="mul3"), op("Sigmoid", "e", "y")),
    ]
    check_onnx(
        onnx_graph(nodes, {"s": normal(4), "t": normal(4) + 3}, x=[3, 4]),
        ["sigmoid", "mul", "sigmoid", "mul", "sigmoid"],
    )


def test_integers_are_left_alone() -> None:
    nodes = [op("Mul", "x s", "h"), op("Add", "h t", "y")]
    graph = helper.make_graph(
        nodes, "hand", [helper.make_tensor_value_info("x", TensorProto.INT64, [3])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [3])],
        [numpy_helper.from_array(np.array([2, 3, 4]), n) for n in ("s", "t")],
    )  # fmt: skip
    before = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
    after, log = fold(before)
    assert len(after.nodes) == 2 and not log.decisions


def test_maps_compose_as_functions() -> None:
    x = normal(3, 4)
    affine = Affine.of(normal(4), normal(3, 1), 2)
    np.testing.assert_allclose(affine.on(x), x.astype(np.float64) * normal(4) + normal(3, 1))
    assert affine.axes == (0, 1) and not affine.identity
    assert Affine.of(np.ones(4), 0.0, 2).identity and Affine.of(np.full(4, 2.0), 0.0, 2).axes == ()


def test_what_arithmetic_with_a_constant_is() -> None:
    kinds = {
        ("Sub", "c x"): (-1.0, 2.0),
        ("Sub", "x c"): (1.0, -2.0),
        ("Div", "x c"): (0.5, 0.0),
        ("Mul", "c x"): (2.0, 0.0),
    }
    for (kind, operands), (scale, shift) in kinds.items():
        graph = onnx_graph([op(kind, operands, "y")], {"c": np.full(1, 2.0, np.float32)}, x=[3, 4])
        found = affine_of(graph.nodes[0])
        assert isinstance(found, Affine) and found.scale.item() == scale and found.shift.item() == shift
    graph = onnx_graph([op("Div", "c x", "y")], {"c": np.full(1, 2.0, np.float32)}, x=[3, 4])
    assert affine_of(graph.nodes[0]) is None
