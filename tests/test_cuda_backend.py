"""The backends cuda and inductor-cpu: what is substituted and why not, numbers, packages, refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foldline.backends import get
from foldline.backends.cuda import ops
from foldline.backends.cuda.plan import plan
from foldline.backends.cuda.substitution import Options
from foldline.graph.errors import BackendError, ConfigError
from foldline.graph.fx import load_torch
from foldline.graph.onnx import load_onnx
from foldline.graph.verify import difference
from foldline.passes.base import Context
from foldline.passes.quantize import BackendSpec, Quantize
from foldline.passes.quantize.numerics import sqnr_db
from foldline.passes.quantize.weight_only import WeightOnly
from test_quantize import block, exported
from torch import nn

CUDA, INDUCTOR = get("cuda"), get("inductor-cpu")


class Mlp(nn.Module):
    """Three layers with a fused activation, an unfused one, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        return self.c(nn.functional.gelu(self.b(x)) + x)


def mlp() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    return Mlp().eval(), [torch.randn(6, 32) for _ in range(3)]


def quantized(target: str, model: nn.Module, batches: list[torch.Tensor], **options: Any) -> Any:
    graph = load_torch(model, batches[0])
    Quantize(target=target, **options).apply(graph, Context(calibration=batches, backends=get))
    return graph


def simulated(graph: Any, x: torch.Tensor) -> np.ndarray:
    return np.asarray(graph.run({graph.inputs[0].name: x.numpy()})[0][0])


def called(artifact: Any) -> list[str]:
    return [str(n.target).rpartition(".")[0] for n in artifact.module.graph.nodes if n.op == "call_function"]


# ---- specs ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", [CUDA, INDUCTOR], ids=["cuda", "inductor-cpu"])
def test_specs_are_documents(backend: Any, tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(backend.spec.to_dict()))
    assert BackendSpec.from_yaml(path) == backend.spec and backend.spec.target == backend.name


# ---- int8 -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("target", ["cuda", "onnxruntime-cpu", "inductor-cpu"])
def test_every_quantized_linear_layer_becomes_one_kernel_whatever_target_placed_its_pairs(target: str) -> None:
    model, batches = mlp()
    graph = quantized(target, model, batches)
    before = graph.to_graph_module().code
    artifact = CUDA.lower(graph, batches[0], package=False)
    assert called(artifact).count("foldline.int8_linear") == 3
    assert not any("dequantize" in name for name in called(artifact) if target == "cuda")
    assert difference(simulated(graph, batches[0]), artifact.run(batches[0])[0])[1] < 1e-5
    assert sqnr_db(model(batches[0]).detach().numpy(), artifact.run(batches[0])[0]) > 33
    assert CUDA.check(graph) == [] and graph.to_graph_module().code == before


def test_activations_and_requantization_go_into_the_kernel() -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)).eval()
    batches = [torch.randn(5, 16) for _ in range(2)]
    graph = quantized("cuda", model, batches)
    found = plan(graph, Options())
    assert [s.about for s in found.substitutions] == ["int8 product, requantized in the kernel"] * 2 + ["int8 product"]
    artifact = CUDA.lower(graph, package=False)
    assert called(artifact) == ["foldline.quantize_linear", *["foldline.int8_linear"] * 3]
    assert difference(simulated(graph, batches[0]), artifact.run(batches[0])[0])[1] < 1e-5


def test_zero_points_of_activations_and_integer_biases_are_exact_offsets() -> None:
    model, batches = mlp()
    graph = quantized("onnxruntime-cpu", model, [b.abs() + 1 for b in batches])  # zero points far from the middle
    first = plan(graph, Options()).substitutions[0]
    offset = first.args[4]
    assert offset.dtype == torch.int32 and first.args[5] is None  # the bias lies in the offset
    x = batches[0].abs() + 1
    artifact = CUDA.lower(graph, package=False)
    assert difference(simulated(graph, x), artifact.run(x)[0])[1] < 1e-5


def test_sixteen_bit_results() -> None:
    model, batches = mlp()
    graph = quantized("cuda", model, batches)
    artifact = CUDA.lower(graph, dtype="bfloat16", package=False)
    y = artifact.run(batches[0])[0]
    assert y.dtype == np.float32 and sqnr_db(simulated(graph, batches[0]), y) > 35
    float_graph = load_torch(model, batches[0])
    half = CUDA.lower(float_graph, dtype="bfloat16", package=False)
    assert half.module is not None and sum("aten.to" in n for n in called(half)) > 3
    assert 30 < sqnr_db(model(batches[0]).detach().numpy(), half.run(batches[0])[0]) < 80


@pytest.mark.parametrize("target", ["cuda", "inductor-cpu"])
def test_onnx_graphs_are_lowered_through_their_torch_form(target: str) -> None:
    model, batches = block()
    graph = load_onnx(exported(model, batches[0]))
    Quantize(target=target).apply(graph, Context(calibration=batches, backends=get))
    artifact = get(target).lower(graph, batches[0], package=False)
    wanted = {"cuda": "foldline.int8_linear", "inductor-cpu": "quantized_decomposed.dequantize_per_channel"}[target]
    assert called(artifact).count(wanted) == {"cuda": 2, "inductor-cpu": 5}[target]
    name = graph.inputs[0].name
    for count in (1, 4):
        x = torch.randn(count, 3, 14, 14)
        expected = np.asarray(graph.run({name: x.numpy()})[0][0])
        assert difference(expected, artifact.run({name: x.numpy()})[0])[1] < 1e-4


def test_what_is_not_substituted_is_said() -> None:
    model, batches = block()
    graph = quantized("onnxruntime-cpu", model, batches)
    found = CUDA.check(graph)
    assert len(found) == 3 and all(d.severity == "warning" and "no integer convolution" in d.message for d in found)
    artifact = CUDA.lower(graph, package=False)
    assert sum("not substituted" in note for note in artifact.notes) == 3
    assert any("as torch functions" in note for note in artifact.notes)
    assert difference(simulated(graph, batches[0]), artifact.run(batches[0])[0])[1] < 1e-4


def test_scales_that_no_kernel_can_use_leave_the_layer_alone() -> None:
    class Odd(nn.Module):
        """Weights whose scales lie along the inputs, and with zero points."""

        def __init__(self) -> None:
            super().__init__()
            g = torch.Generator().manual_seed(0)
            self.register_buffer("w", torch.randint(-9, 9, (8, 6), dtype=torch.int8, generator=g))
            self.register_buffer("per_input", torch.rand(6, generator=g) + 0.1)
            self.register_buffer("per_output", torch.rand(8, generator=g) + 0.1)
            self.register_buffer("zeros", torch.full((8,), 3, dtype=torch.int8))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            from foldline.graph.fx.custom import dequantize_linear, quantize_linear

            one = self.per_input[0]
            q = dequantize_linear(quantize_linear(x, one, None, None, "int8"), one)
            along = dequantize_linear(self.w, self.per_input, None, 1)
            shifted = dequantize_linear(self.w, self.per_output, self.zeros, 0)
            return nn.functional.linear(q, along), nn.functional.linear(q, shifted)

    x = torch.randn(3, 6)
    graph = load_torch(Odd().eval(), x)
    reasons = [reason for _, reason in plan(graph, Options()).left]
    assert len(reasons) == 2 and "along the inputs" in reasons[0] and "zero points" in reasons[1]
    artifact = CUDA.lower(graph, package=False)
    for ours, theirs in zip(artifact.run(x), Odd()(x), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)


# ---- weights of a few bits ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "operator"),
    [
        ({"format": "int", "bits": 4, "block": 32}, "int4_linear"),
        ({"format": "int", "bits": 4, "block": 32, "symmetric": True}, "int4_linear"),
        ({"format": "int", "bits": 4, "block": 16, "storage": "packed"}, "int4_linear"),
        ({"format": "int", "bits": 4, "block": 0, "storage": "packed"}, "int4_linear"),
        ({"format": "int", "bits": 3, "block": 32, "storage": "packed"}, "int4_linear"),
        ({"format": "int", "bits": 4, "block": 32, "storage": "dequantize"}, "int4_linear"),
        ({"format": "bcq", "bits": 3, "block": 32}, "binary_linear"),
        ({"format": "bcq", "bits": 2, "block": 0}, "binary_linear"),
    ],
)
def test_weight_only_formats_become_kernels(options: dict[str, Any], operator: str) -> None:
    model, batches = mlp()
    graph = load_torch(model, batches[0])
    WeightOnly(**options).apply(graph, Context())
    artifact = CUDA.lower(graph, package=False)
    assert called(artifact).count(f"foldline.{operator}") == 3, artifact.notes
    assert difference(simulated(graph, batches[0]), artifact.run(batches[0])[0])[1] < 1e-5
    stored = sum(b.numel() * b.element_size() for b in artifact.module.buffers())
    stored += sum(p.numel() * p.element_size() for p in artifact.module.parameters())
    floats = sum(p.numel() * 4 for p in model.parameters())
    assert stored < floats / 2


def test_formats_without_a_kernel_run_as_they_are_written() -> None:
    model, batches = mlp()
    graph = load_torch(model, batches[0])
    WeightOnly(format="nf4", block=64).apply(graph, Context())
    artifact = CUDA.lower(graph, package=False)
    assert not any("int4" in name or "binary" in name for name in called(artifact))
    assert difference(simulated(graph, batches[0]), artifact.run(batches[0])[0])[1] < 1e-5


def test_float8() -> None:
    model, batches = mlp()
    spec = {**CUDA.spec.to_dict()}
    float8 = {"dtype": "float8_e4m3fn", "symmetric": True}
    spec |= {"activations": float8, "weights": {**float8, "granularity": "out_channel"}}
    graph = load_torch(model, batches[0])
    from foldline.passes.quantize.numerics import range_params, weight_params

    for node in [n for n in graph.nodes if n.op == "linear"]:
        form = BackendSpec.from_dict(spec)
        x, w = node.inputs[0], node.inputs[1]
        p = range_params(-4.0, 4.0, form.activations)
        scale = graph.add_weight(f"{node.name}_s", p.scale)
        attrs = {"axis": None, "dtype": "float8_e4m3fn", "block": 0}
        q = graph.insert("quantize", [x, scale, None], attrs, name=f"{node.name}_q", after=x.producer)
        dq = graph.insert(
            "dequantize", [q.output, scale, None], {**attrs, "dtype": "float32"}, name=f"{node.name}_dq", after=q
        )
        graph.set_input(node, 0, dq.output)
        data = w.weight.numpy()
        wp = weight_params(data, 0, form.weights)
        stored, ws = (
            graph.add_weight(f"{node.name}_w", wp.quantize(data)),
            graph.add_weight(f"{node.name}_ws", wp.scale),
        )
        made = graph.insert(
            "dequantize", [stored, ws, None], {"axis": 0, "dtype": "float32", "block": 0}, name=f"{node.name}_wdq"
        )
        graph.set_input(node, 1, made.output)
    graph.refresh()
    artifact = CUDA.lower(graph, package=False)
    assert called(artifact).count("foldline.fp8_linear") == 3, artifact.notes
    assert difference(simulated(graph, batches[0]), artifact.run(batches[0])[0])[1] < 1e-5


def test_sparse_weights_and_softmax_on_request() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 32), nn.Linear(32, 8)
            self.a.weight.data = ops.prune24(self.a.weight.data)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.b(torch.relu(self.a(x))), -1)

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(5, 64)
    graph = load_torch(model, x)
    artifact = CUDA.lower(graph, dtype="bfloat16", sparse24=True, two_pass_softmax=True, package=False)
    assert {"foldline.sparse24_linear", "foldline.two_pass_softmax"} <= set(called(artifact))
    assert sqnr_db(model(x).detach().numpy(), artifact.run(x)[0]) > 35
    assert "foldline.sparse24_linear" not in called(CUDA.lower(graph, dtype="bfloat16", package=False))
    float_notes = CUDA.lower(graph, sparse24=True, package=False).notes
    assert any("take 16-bit types" in note for note in float_notes)
    model.b.weight.data[:, :16] = 0
    dense = CUDA.lower(load_torch(model, x), dtype="bfloat16", sparse24=True, package=False)
    assert any("the weight is not 2:4" in note for note in dense.notes)


def test_the_products_of_a_kronecker_transform_are_fused_with_the_quantization_behind_them() -> None:
    from foldline.passes.transform.affine import insert_kronecker
    from foldline.passes.transform.boundary import environment, find_boundaries
    from foldline.passes.transform.common import sites_of

    model, batches = mlp()
    graph = load_torch(model, batches[0])
    context = Context(calibration=batches, backends=get)
    g = np.random.default_rng(0)
    left, right = np.eye(8) + 0.2 * g.standard_normal((8, 8)), np.eye(8) + 0.2 * g.standard_normal((8, 8))
    site = next(
        s for s in sites_of(find_boundaries(graph), []) if "linear_1" in {n.name for n, _ in s.boundary.readers}
    )
    inverses = [np.linalg.inv(m).T for m in (left, right)]
    made = insert_kronecker(graph, environment(graph, context), site.boundary, left, right, *inverses, "flat")
    assert isinstance(made, list)
    graph.refresh()
    Quantize(target="cuda", ignore=made).apply(graph, context)
    artifact = CUDA.lower(graph, package=False)
    assert called(artifact).count("foldline.kronecker_quantize") == 1 and "aten.matmul" not in called(artifact)
    assert difference(simulated(graph, batches[0]), artifact.run(batches[0])[0])[1] < 2e-2  # ties may fall differently
    assert sqnr_db(simulated(graph, batches[0]), artifact.run(batches[0])[0]) > 45


# ---- inductor ---------------------------------------------------------------------------------------------------
def test_inductor_gets_the_operators_that_its_patterns_know() -> None:
    model, batches = block()
    graph = quantized("inductor-cpu", model, batches)
    assert INDUCTOR.check(graph) == []
    artifact = INDUCTOR.lower(graph, batches[0], package=False)
    names = called(artifact)
    assert names.count("quantized_decomposed.dequantize_per_channel") == 5
    assert not any(name.startswith("foldline") for name in names)
    # Inductor multiplies by the reciprocal: a tie may fall to the other side.
    assert sqnr_db(simulated(graph, batches[0]), artifact.run(batches[0])[0]) > 40


def test_inductor_rules_name_what_has_no_pattern() -> None:
    model, batches = mlp()
    rules = {d.rule for d in INDUCTOR.check(quantized("cuda", model, batches))}
    assert rules == set()  # linear layers take int8 activations too
    graph = load_torch(model, batches[0])
    WeightOnly(format="int", bits=4, block=32, storage="dequantize").apply(graph, Context())
    found = {d.rule for d in INDUCTOR.check(graph)}
    assert {"weight-blocks", "weight-only"} <= found


# ---- artifacts --------------------------------------------------------------------------------------------------
def test_node_times_stand_under_the_nodes_of_the_graph() -> None:
    model, batches = mlp()
    graph = quantized("onnxruntime-cpu", model, batches)
    times = CUDA.node_times(graph, batches[0], runs=3)
    known = {n.name for n in graph.nodes}
    assert set(times) <= known and {n.name for n in graph.nodes if n.op == "linear"} <= set(times)
    assert all(0 < t < 1e4 for t in times.values())


def test_artifacts_take_numpy_torch_and_names_and_can_be_timed() -> None:
    model, batches = mlp()
    artifact = CUDA.lower(load_torch(model, batches[0]), batches[0], package=False)
    (y,) = artifact.run(batches[0])
    name = artifact.inputs[0][0]
    np.testing.assert_array_equal(artifact.run({name: batches[0].numpy()})[0], y)
    np.testing.assert_allclose(y, model(batches[0]).detach().numpy(), rtol=1e-5, atol=1e-6)
    found = artifact.benchmark(runs=3, warmup=1, against=artifact)
    assert found["median_ms"] > 0 and found["ratio"] > 0


def test_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, batches = mlp()
    graph = load_torch(model, batches[0])
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="no GPU here"):
            CUDA.lower(graph, device="cuda")
        with pytest.raises(BackendError, match="CUDA graphs need a GPU"):
            CUDA.lower(graph, cuda_graphs=True, package=False)
    with pytest.raises(BackendError, match="unknown device"):
        CUDA.lower(graph, device="meta")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BackendError, match=r"needs a C\+\+ compiler"):
        CUDA.lower(graph, device="cpu")
    from foldline.backends.cuda.package import load_package

    with pytest.raises(BackendError, match="no such package"):
        load_package(tmp_path / "none.pt2")
    (tmp_path / "bad.pt2").write_bytes(b"nothing")
    with pytest.raises(BackendError, match="cannot be loaded"):
        load_package(tmp_path / "bad.pt2")
    with pytest.raises(ConfigError, match="has no option 'dtyp'"):
        from foldline.passes import Lower

        Lower("cuda", dtyp="bfloat16").prepare(Context(backends=get))


def test_onnx_operators_without_a_torch_form_are_refused_with_a_way_out() -> None:
    import onnx

    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g (float[2, 3] x) => (float[2, 3] y) { y = com.microsoft.QuickGelu(x) }"""
    )
    graph = load_onnx(model)
    with pytest.raises(BackendError, match="no torch form") as caught:
        CUDA.lower(graph, package=False)
    assert "onnxruntime-cuda" in str(caught.value)
    assert [d.rule for d in CUDA.check(graph)] == ["torch-form"]


def test_a_package_that_computes_something_else_is_refused() -> None:
    from foldline.backends.cuda.package import check_package

    model, batches = mlp()
    graph = load_torch(model, batches[0])
    artifact = CUDA.lower(graph, package=False)
    check_package(lambda *x: artifact.module(*x)[0] * 1.01, artifact.module, graph, torch.device("cpu"))
    for wrong in (1.5, float("nan")):
        with pytest.raises(BackendError, match="something else than the graph"):
            check_package(lambda *x, w=wrong: artifact.module(*x)[0] * w, artifact.module, graph, torch.device("cpu"))


# ---- packages ---------------------------------------------------------------------------------------------------
LOAD = """
import sys, numpy as np, torch
run = torch._inductor.aoti_load_package(sys.argv[1])
for i in range(2):
    y = run(torch.from_numpy(np.load(f"{sys.argv[2]}/x{i}.npy")))
    np.save(f"{sys.argv[2]}/y{i}.npy", (y[0] if isinstance(y, (list, tuple)) else y).numpy())
assert "foldline" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda", "inductor-cpu"])
def test_a_package_runs_in_a_process_without_foldline(target: str, tmp_path: Path) -> None:
    """A quantized convolution and two layers, any batch size; Inductor's package calls oneDNN's int8 kernels."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 32), nn.ReLU(), nn.Linear(32, 5)
    ).eval()
    batches = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    graph = quantized(target, model, batches)
    eager = get(target).lower(graph, package=False)
    artifact = get(target).lower(
        graph, batches[0], path=tmp_path / "m.pt2", **({"device": "cpu"} if target == "cuda" else {})
    )
    assert artifact.path == tmp_path / "m.pt2"
    inputs = [torch.randn(n, 3, 8, 8) for n in (4, 1)]
    for i, x in enumerate(inputs):
        np.save(tmp_path / f"x{i}.npy", x.numpy())
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(artifact.path), str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for i, x in enumerate(inputs):
        expected = eager.run(x)[0]
        np.testing.assert_array_equal(np.load(tmp_path / f"y{i}.npy"), artifact.run(x)[0])
        assert sqnr_db(expected, artifact.run(x)[0]) > (35 if target == "inductor-cpu" else 100)
    if target == "inductor-cpu":
        import zipfile

        with zipfile.ZipFile(artifact.path) as archive:
            source = "".join(archive.read(n).decode() for n in archive.namelist() if n.endswith(".wrapper.cpp"))
        assert "qlinear_pointwise" in source and "qconv" in source


@pytest.mark.slow
def test_inductor_compiles_in_the_process_and_chained_convolutions_are_right(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(16, 16, 3, padding=1)).eval()
    batches = [torch.randn(4, 3, 16, 16) for _ in range(2)]
    graph = quantized("inductor-cpu", model, batches)
    artifact = INDUCTOR.lower(graph, batches[0])
    assert artifact.path is None
    assert sqnr_db(simulated(graph, batches[0]), artifact.run(batches[0])[0]) > 35
    assert sqnr_db(model(batches[0]).detach().numpy(), artifact.run(batches[0])[0]) > 30
    package = INDUCTOR.lower(graph, batches[0], path=tmp_path / "chain.pt2")  # checked against the graph on the way
    assert sqnr_db(simulated(graph, batches[0]), package.run(batches[0])[0]) > 35
