"""A torch model quantized and then exported is its ONNX export quantized directly: the same nodes, the same scales."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from foldline.backends import get
from foldline.backends.onnxruntime.backend import onnx_model
from foldline.graph.fx import load_torch
from foldline.graph.onnx import load_onnx
from foldline.passes.base import Context
from foldline.passes.fold import Fold
from foldline.passes.quantize import BackendSpec, Quantize
from foldline.passes.quantize.numerics import sqnr_db
from support.data import cifar10, trained_resnet
from support.quantize_nets import Concat, Residual, encoder, images
from support.timm_models import create
from test_quantize_solve import TRT
from torch import nn

QDQ = ("QuantizeLinear", "DequantizeLinear")


def both(model: nn.Module, batches: list[Any], fold: bool = True, **options: Any) -> tuple[ir.Model, ir.Model]:
    """(quantized in torch, exported), (exported, quantized in ONNX)."""
    first = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
    dynamic = tuple({0: torch.export.Dim.DYNAMIC} for _ in first)
    program = torch.onnx.export(model, first, dynamo=True, verbose=False, dynamic_shapes=dynamic, opset_version=20)
    context = Context(calibration=batches, backends=get)
    made = []
    for graph in (load_torch(model, batches[0]), load_onnx(program.model_proto)):
        if fold:
            graph = Fold().apply(graph, context).graph or graph
        Quantize(**options).apply(graph, context)
        made.append(onnx_model(graph)[0])
    return made[0], made[1]


def described(model: ir.Model, whole: bool = True) -> Counter[Any]:
    """Every node by operator, what makes its operands, their constants' types and shapes, the axis of Q and DQ.

    ``whole=False``: only Q, DQ and what reads a DQ, without who reads these (the exporter has more
    than one way to write fused attention).
    """
    found = []
    for node in model.graph:
        operands = []
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if producer is not None and producer.op_type != "Constant":
                operands.append(producer.op_type)
            elif value is not None and value.const_value is not None:
                operands.append((str(value.const_value.dtype), tuple(value.const_value.shape)))
            else:
                operands.append("input" if value is not None else "")
        stored = node.op_type in QDQ and len(operands[1][1]) > 0
        axis = node.attributes["axis"].as_int() if stored else None
        if not whole and node.op_type not in QDQ and "DequantizeLinear" not in operands:
            continue
        readers = () if not whole else tuple(sorted(use.node.op_type for v in node.outputs for use in v.uses()))
        found.append((node.op_type, tuple(operands), axis, readers))
    return Counter(found)


def scales(model: ir.Model) -> dict[str, list[np.ndarray]]:
    """Scales and zero points of Q and of DQ of stored integers, sorted."""
    found: dict[str, list[np.ndarray]] = {"points": [], "zeros": [], "weights": []}
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            found["points"].append(node.inputs[1].const_value.numpy())
            found["zeros"].append(node.inputs[2].const_value.numpy())
        elif node.op_type == "DequantizeLinear" and node.inputs[0].const_value is not None:
            if node.inputs[0].const_value.dtype == ir.DataType.INT8:
                found["weights"].append(node.inputs[1].const_value.numpy().reshape(-1))
    return found


def integers(model: ir.Model) -> list[np.ndarray]:
    """The stored int8 tensors, whichever way round matrices lie: sorted, and in the order of sizes and contents."""
    found = []
    for value in model.graph.initializers.values():
        if value.const_value.dtype == ir.DataType.INT8 and len(value.const_value.shape) > 1:
            found.append(np.sort(value.const_value.numpy().astype(np.int32).reshape(-1)))
    return sorted(found, key=lambda a: (a.size, float(np.square(a).sum())))


def assert_same(torch_first: ir.Model, onnx_first: ir.Model, whole: bool = True) -> None:
    a, b = described(torch_first, whole), described(onnx_first, whole)
    assert a == b, f"only from torch: {a - b}; only from ONNX: {b - a}"
    mine, theirs = scales(torch_first), scales(onnx_first)
    points = [np.sort(np.array(s["points"]).reshape(-1)) for s in (mine, theirs)]
    np.testing.assert_allclose(*points, rtol=1e-5)
    assert sorted(map(int, mine["zeros"])) == sorted(map(int, theirs["zeros"]))
    # The exporter folds batch norms in float32, foldline in float64: weights agree to rounding, and now and then one
    # falls to the other side of a tie.
    weights = [np.sort(np.concatenate(s["weights"])) for s in (mine, theirs)]
    np.testing.assert_allclose(*weights, rtol=2e-6)
    for one, other in zip(integers(torch_first), integers(onnx_first), strict=True):
        assert one.size == other.size and np.abs(one - other).max() <= 1
        assert (one != other).mean() < 1e-3


def outputs(model: ir.Model, inputs: list[np.ndarray]) -> np.ndarray:
    import onnxruntime as ort

    session = ort.InferenceSession(
        ir.serde.serialize_model(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, dict(zip([i.name for i in session.get_inputs()], inputs, strict=True)))[0]


@pytest.mark.parametrize("spec", [None, TRT], ids=["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("net", [Residual, Concat], ids=["residual", "concat"])
def test_convolutions(net: type[nn.Module], spec: BackendSpec | None) -> None:
    torch.manual_seed(0)
    model, batches = net().eval(), images()
    mine, theirs = both(model, batches, spec=spec)
    assert_same(mine, theirs)
    x = [images(4)[3].numpy()]
    assert sqnr_db(outputs(theirs, x), outputs(mine, x)) > 35


def test_a_transformer_block_with_embeddings_and_a_mask() -> None:
    model, batches = encoder()
    mine, theirs = both(model, batches)
    assert_same(mine, theirs)
    x = [t.numpy() for t in batches[0]]
    assert sqnr_db(outputs(theirs, x), outputs(mine, x)) > 60


@pytest.mark.parametrize("target", ["cuda", "tensorrt", "inductor-cpu"])
def test_other_targets(target: str) -> None:
    """Zero points that a target leaves out of the torch graph are stored in the file all the same."""
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 8)).eval(), [torch.randn(5, 12)]
    mine, theirs = both(model, batches, target=target)
    assert_same(mine, theirs)
    assert not any(node.op_type == "ConstantOfShape" for node in mine.graph)


def test_rows_looked_up_alike_in_every_run_are_constants() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places, self.head = nn.Embedding(40, 16), nn.Embedding(12, 16), nn.Linear(16, 5)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.words(ids) + self.places(torch.arange(ids.shape[1])))

    torch.manual_seed(0)
    mine, theirs = both(Net().eval(), [torch.randint(0, 40, (2, 6)) for _ in range(2)])
    assert_same(mine, theirs)
    assert sum(v.dtype == ir.DataType.INT8 and v.shape == (40, 16) for v in mine.graph.initializers.values()) == 1


@pytest.mark.slow
def test_resnet20_with_its_trained_weights() -> None:
    pixels, _ = cifar10(count=96)
    batches = list(pixels.split(32))
    model = trained_resnet(20).eval()
    mine, theirs = both(model, batches)
    assert_same(mine, theirs)
    with torch.no_grad():
        exact = model(batches[0]).numpy()
    assert sqnr_db(exact, outputs(mine, [batches[0].numpy()])) > 26
    assert sqnr_db(exact, outputs(theirs, [batches[0].numpy()])) > 26


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "deit_tiny_patch16_224"])
def test_timm_models(name: str) -> None:
    deit = name.startswith("deit")
    options: dict[str, Any] = {"img_size": 32, "depth": 2} if deit else {}
    model = create(name, **options)
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.ndim == 1:  # fresh biases are zero, which the exporter leaves out
                tensor.add_(0.1 * torch.rand_like(tensor))
    batches = [torch.randn(2, 3, 32 if deit else 64, 32 if deit else 64) for _ in range(2)]
    # Attention is one operator in torch; written out in ONNX its scale folds into weights, which then differ.
    mine, theirs = both(model, batches, fold=not deit)
    assert_same(mine, theirs, whole=not deit)


def test_four_bit_blocks_are_exported_in_their_type() -> None:
    from foldline.passes.quantize.spec.files import load_spec
    from test_quantize_solve import FOLDER

    spec = load_spec(FOLDER / "tensorrt/specs/tensorrt-int4.yaml")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(128, 24), nn.ReLU(), nn.Linear(24, 8)).eval(), torch.randn(3, 128)
    graph = load_torch(model, x)
    outcome = Quantize(spec=spec).apply(graph, Context(backends=get))
    assert outcome.details["weights"] == 1
    assert any("in_channels is 24" in d.reason for d in outcome.decisions)
    made, _ = onnx_model(graph)
    assert made.opset_imports[""] == 21
    (dq,) = [n for n in made.graph if n.op_type == "DequantizeLinear"]
    assert dq.inputs[0].const_value.dtype == ir.DataType.INT4 and dq.inputs[2].const_value.dtype == ir.DataType.INT4
    assert not any(n.op_type == "Cast" for n in made.graph)
    found = outputs(made, [x.numpy()])
    np.testing.assert_allclose(found, graph.run(graph.bind(x))[0][0], rtol=1e-4, atol=1e-5)
