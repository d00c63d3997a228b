"""Weight-only quantization: what is written equals decode, on torch and ONNX; MatMulNBits is what ONNX Runtime runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from foldline.graph.errors import ConfigError, ConstraintError
from foldline.graph.execute import run_graph
from foldline.graph.fx import load_torch
from foldline.graph.onnx import load_onnx
from foldline.passes.base import Context
from foldline.passes.quantize.formats import format_of
from foldline.passes.quantize.weight_only import WeightOnly
from support.data import cifar10, trained_resnet
from torch import nn


class Tiny(nn.Module):
    """A token model: embedding, two layers with and without bias, a head that may share the embedding."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 48)
        self.up, self.down = nn.Linear(48, 100), nn.Linear(100, 48, bias=False)
        self.norm = nn.LayerNorm(48)
        self.head = nn.Linear(48, 40, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(self.norm(x))


_MODELS: dict[bool, tuple[nn.Module, list[torch.Tensor]]] = {}
_FILES: dict[bool, onnx.ModelProto] = {}


def tiny(tied: bool = False) -> tuple[nn.Module, list[torch.Tensor]]:
    if tied not in _MODELS:
        torch.manual_seed(0)
        _MODELS[tied] = Tiny(tied).eval(), [torch.randint(0, 40, (4, 12)) for _ in range(6)]
    return _MODELS[tied]


def loaded(front: str, tied: bool = False, opset: int = 21) -> Any:
    model, batches = tiny(tied)
    if front == "fx":
        return load_torch(model, batches[0])
    if tied not in _FILES:
        shapes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
        program = torch.onnx.export(
            model, (batches[0],), dynamo=True, verbose=False, dynamic_shapes=shapes, opset_version=opset
        )
        _FILES[tied] = program.model_proto
    copy = onnx.ModelProto()
    copy.CopyFrom(_FILES[tied])
    return load_onnx(copy)


def run(graph: Any, ids: torch.Tensor) -> np.ndarray:
    outputs, _ = run_graph(graph, {graph.inputs[0].name: ids.numpy()})
    return outputs[0]


def quantized(graph: Any, **options: Any) -> Any:
    _, batches = tiny()
    return WeightOnly(**options).apply(graph, Context(calibration=batches))


def decoded(graph: Any, name: str, bits: int = 4, block: int = 32, **options: Any) -> np.ndarray:
    """The model with every matrix replaced by what its format stands for, computed in float."""
    for weight in list(graph.weights.values()):
        linear = [n for n, i in weight.value.uses if n.op == "linear" and i == 1]
        if linear:
            axis = 1 if linear[0].attrs.get("transposed_weight") else 0
            extra = {"bits": bits} if name in ("int", "kmeans", "bcq", "power") else {}
            if name not in ("mxfp4", "nvfp4"):
                extra["block"] = block
            graph.set_weight(weight, format_of(name, **extra, **options).fit(weight.numpy(), axis).decode())
    return run(graph, tiny()[1][0])


# ---- what is written ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("front", ["fx", "onnx"])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (4, True), (4, False), (8, True)])
def test_matmul_nbits_equals_the_decoded_model(front: str, bits: int, symmetric: bool) -> None:
    graph = loaded(front)
    outcome = quantized(graph, bits=bits, symmetric=symmetric, block=16)
    assert {f["form"] for f in outcome.details["layers"].values()} == {"matmul_nbits"}
    assert sum(n.op == "matmul_nbits" for n in graph.nodes) == 3
    assert not any(n.op == "linear" for n in graph.nodes)
    wanted = decoded(loaded(front), "int", bits, 16, symmetric=symmetric)
    np.testing.assert_allclose(run(graph, tiny()[1][0]), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("front", ["fx", "onnx"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("int", {"bits": 3}), ("nf4", {"block": 16}), ("nvfp4", {}), ("fp8", {"block": 0}),
     ("bcq", {"bits": 2, "block": 16}), ("kmeans", {"bits": 3, "block": 0})],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_packed_codes_equal_the_decoded_model(front: str, name: str, options: dict[str, Any]) -> None:
    graph = loaded(front)
    outcome = quantized(graph, format=name, **options)
    assert {f["form"] for f in outcome.details["layers"].values()} == {"packed"}
    wanted = decoded(loaded(front), name, options.get("bits", 4), options.get("block", 32))
    np.testing.assert_allclose(run(graph, tiny()[1][0]), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "dtype"),
    [("int", {"bits": 4, "block": 16}, "uint4"), ("int", {"bits": 4, "symmetric": True, "block": 32}, "int4"),
     ("int", {"bits": 8, "block": 0}, "uint8"), ("fp8", {"block": 0}, "float8_e4m3fn"),
     ("int16", {"block": 0}, "int16")],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_dequantize_linear_equals_the_decoded_model(name: str, options: dict[str, Any], dtype: str) -> None:
    symmetric = {"symmetric": True} if options.get("symmetric") else {}
    wanted = decoded(loaded("onnx"), name, options.get("bits", 4), options["block"], **symmetric)
    for front in ("onnx", "fx"):
        graph = loaded(front)
        outcome = quantized(graph, format=name, storage="dequantize", **options)
        assert {f["form"] for f in outcome.details["layers"].values()} == {"dequantize"}
        stored = [n.inputs[0].dtype for n in graph.nodes if n.op == "dequantize"]
        assert len(stored) == 3 and (front == "fx" or set(stored) == {dtype})
        np.testing.assert_allclose(run(graph, tiny()[1][0]), wanted, rtol=1e-4, atol=1e-5)


def test_nvfp4_in_onnx_types_keeps_both_scales() -> None:
    """ONNX Runtime has no CPU kernel for float4, so the file is checked by its stored numbers."""
    graph = loaded("onnx")
    for imports in (graph.model.graph.opset_imports, graph.model.opset_imports):
        imports[""] = 23
    outcome = quantized(graph, format="nvfp4", storage="dequantize")
    assert {f["form"] for f in outcome.details["layers"].values()} == {"dequantize"}
    outer = [n for n in graph.nodes if n.op == "dequantize" and n.inputs[0].dtype == "float4_e2m1fn"]
    inner = [n.inputs[1].producer for n in outer]
    assert len(outer) == 3 and all(n.inputs[0].dtype == "float8_e4m3fn" for n in inner)
    reference = loaded("onnx").weights
    for node, scales in zip(outer, inner, strict=True):
        numbers = scales.inputs[0].const().astype(np.float32) * scales.inputs[1].const()
        codes, axis = node.inputs[0].const().astype(np.float32), node.attrs["axis"]
        spread = np.repeat(numbers, 16, axis=axis)
        value = codes * (spread[: codes.shape[0]] if axis == 0 else spread[:, : codes.shape[1]])
        name = next(k for k in reference if node.name.startswith(k))
        expected = format_of("nvfp4").fit(reference[name].numpy(), 1 - axis).decode()
        np.testing.assert_array_equal(value, expected)


def test_where_a_form_is_impossible_the_packed_one_takes_its_place_and_says_why() -> None:
    graph = loaded("onnx")
    outcome = quantized(graph, format="nf4", storage="dequantize")
    facts = [d for d in outcome.decisions if d.action == "quantized"]
    assert all(d.data["form"] == "packed" and "ONNX has no type" in d.reason for d in facts)


def test_both_front_ends_store_the_same_codes() -> None:
    sizes = {}
    for front in ("fx", "onnx"):
        graph = loaded(front)
        sizes[front] = quantized(graph, bits=4).details["bytes"]
        sizes[f"{front} codes"] = sorted(
            w.numpy().tobytes() for n, w in graph.weights.items() if n.endswith(("_packed", "_zero_points"))
        )
    assert sizes["fx"] == sizes["onnx"] and sizes["fx codes"] == sizes["onnx codes"]


def test_the_state_dict_shrinks_and_gradients_of_the_input_flow() -> None:
    model, batches = tiny()
    graph = loaded("fx")
    outcome = quantized(graph, bits=4)
    small = graph.to_model()
    size = {
        k: sum(t.numel() * t.element_size() for t in m.state_dict().values()) for k, m in (("a", model), ("b", small))
    }
    matrices = 4 * (48 * 100 * 2 + 48 * 40)
    assert size["b"] == size["a"] - matrices + outcome.details["bytes"]
    assert outcome.details["bytes"] < matrices / 4.5
    out = small(batches[0])
    np.testing.assert_allclose(out.detach().numpy(), run(graph, batches[0]), atol=1e-6)
    out.sum().backward()
    assert small.get_parameter("embed.weight").grad is not None or any(p.grad is not None for p in small.parameters())


# ---- methods ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_methods_that_see_inputs_lower_the_output_error(front: str) -> None:
    quality = {}
    for method in ("rtn", "weighted", "gptq"):
        graph = loaded(front)
        outcome = quantized(graph, bits=3, block=16, method=method, options={"search": True})
        wanted = run(loaded(front), tiny()[1][1])
        quality[method] = float(np.square(run(graph, tiny()[1][1]) - wanted).mean())
        if method != "rtn":
            assert all("output_sqnr_db" in f for f in outcome.details["layers"].values())
    assert quality["gptq"] < 0.8 * quality["rtn"] and quality["gptq"] < quality["weighted"]


# ---- embeddings, patterns, refusals -------------------------------------------------------------------------------
@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_a_tied_table_is_stored_once(front: str) -> None:
    graph = loaded(front, tied=True)
    untouched = quantized(graph, bits=4)
    reasons = [d.reason for d in untouched.decisions if d.action == "kept in float"]
    assert ("tied to" if front == "fx" else "an embedding table") in reasons[0]
    graph = loaded(front, tied=True)
    outcome = quantized(graph, bits=4, embeddings=True)
    facts = outcome.details["layers"]
    assert len(facts) == 3
    table = next(f for f in facts.values() if f["float_bytes"] == 4 * 40 * 48)
    assert table["bytes"] < 40 * 48 + 40 * 8 + 256  # one byte a number, scale and zero point per row
    reference = run(loaded(front, tied=True), tiny(True)[1][0])
    assert np.square(run(graph, tiny(True)[1][0]) - reference).mean() < 0.02 * reference.var()
    assert not any(w.shape == (40, 48) and w.dtype == "float32" for w in graph.weights.values())


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_patterns_choose_formats_and_exceptions(front: str) -> None:
    graph = loaded(front)
    outcome = quantized(
        graph, bits=4, block=16, ignore=("head",), formats={"down": {"bits": 8}}, embeddings=True,
        embedding_options={"format": "int", "bits": 4, "block": 16},
    )  # fmt: skip
    by_bits = sorted(round(f["bits_per_weight"]) for f in outcome.details["layers"].values())
    assert by_bits == [6, 6, 12]  # codes, float32 scales and zero points per 16: the table, up; down is padded
    assert any(n.op == "linear" for n in graph.nodes)
    assert [d.reason for d in outcome.decisions if d.action == "kept in float"] == ["it is on the ignore list"]


def test_bad_options_are_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="unknown weight format"):
        WeightOnly(format="int5").prepare(Context())
    with pytest.raises(ConfigError, match="blocks of its own"):
        WeightOnly(format="mxfp4", block=64).prepare(Context())
    with pytest.raises(ConstraintError, match="matches nothing"):
        quantized(loaded("fx"), ignore=("nowhere",))
    with pytest.raises(ConfigError, match="needs calibration"):
        WeightOnly(method="gptq").apply(loaded("fx"), Context())


# ---- a real network -----------------------------------------------------------------------------------------------
@pytest.mark.data
@pytest.mark.slow
def test_power_exponents_beat_uniform_grids_on_resnet20_at_four_bits() -> None:
    from foldline import passes as P

    images, _ = cifar10("test", 500)
    program = P.fold(trained_resnet(20), images[:2]).model
    with torch.no_grad():
        reference = program(images)
    quality = {}
    for name, method in (("int", "rtn"), ("power", "weighted")):
        graph = load_torch(program, images[:2])
        outcome = quantized(
            graph, format=name, bits=4, block=0, symmetric=True, convolutions=True, method=method,
            calibration=[cifar10("train", 128)[0]],
        )  # fmt: skip
        assert outcome.details["weights"] == 20
        with torch.no_grad():
            found = graph.to_model()(images)
        quality[name] = 10 * float(torch.log10(reference.square().sum() / (found - reference).square().sum()))
    assert outcome.details["exponent"] < 1
    assert quality["power"] > quality["int"] + 1
