"""Coded weights: the coder is lossless and near the entropy, sizes are as predicted, accuracy survives compression."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from foldline import passes as P
from foldline.graph.errors import ConstraintError, ModelFileError
from foldline.graph.fx import load_torch
from foldline.graph.onnx import load_onnx
from foldline.passes.base import Context
from foldline.passes.quantize.archive import Archive, rans, read_archive
from foldline.passes.quantize.archive.size import soft_bits
from support.data import cifar10, trained_resnet
from support.digits_nets import accuracy, digits, lenet
from torch import nn


@pytest.mark.parametrize("count", [1, 100, 5000, 40_000])
@pytest.mark.parametrize("spread", [0.0, 0.4, 3.0, 40.0])
def test_the_coder_is_lossless_and_near_the_entropy(count: int, spread: float) -> None:
    symbols = np.rint(np.random.default_rng(0).laplace(0, spread, count) if spread else np.zeros(count)).astype(int)
    symbols -= symbols.min()
    counts = np.bincount(symbols)
    freq = rans.frequencies(counts)
    assert freq.sum() == 1 << rans.PRECISION and ((freq > 0) == (counts > 0)).all()
    data = rans.encode(symbols, freq)
    np.testing.assert_array_equal(rans.decode(data, count, freq), symbols)
    bound = rans.entropy_bits(counts) / 8
    assert len(data) <= 1.01 * bound + 4 * rans.lanes_for(count) + 4
    assert len(data) >= bound * 0.999


def test_damage_is_noticed() -> None:
    symbols = np.random.default_rng(0).integers(0, 9, 5000)
    freq = rans.frequencies(np.bincount(symbols))
    data = rans.encode(symbols, freq)
    with pytest.raises(ModelFileError, match="truncated"):
        rans.decode(data[:-2], 5000, freq)
    with pytest.raises(ModelFileError, match="truncated"):
        rans.decode(data[:3], 5000, freq)
    wrong = bytearray(data)
    wrong[len(wrong) // 2] ^= 1
    with pytest.raises(ModelFileError, match="damaged|truncated"):
        rans.decode(bytes(wrong), 5000, freq)
    with pytest.raises(ModelFileError, match="not an archive"):
        read_archive(b"something else")
    archive = Archive()
    archive.add_raw("a", np.arange(5.0))
    with pytest.raises(ModelFileError, match="truncated"):
        read_archive(archive.to_bytes()[:-1])


def test_names_shapes_and_dtypes_come_back(tmp_path) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((6, 5, 3, 3)).astype(np.float32)
    archive = Archive()
    archive.codebooks["book"] = rng.standard_normal((256, 4)).astype(np.float32)
    archive.add_raw("a.bias", rng.standard_normal(7).astype(np.float16))
    integers = np.rint(w * 4).astype(np.int32)
    archive.add_grid("b.weight", w, integers, np.full(6, 0.25, np.float32), 0)
    codes = rng.integers(0, 256, 68)
    archive.add_vq("c.weight", w, codes, 0.5, "book", 8)
    back = read_archive(archive.save(tmp_path / "weights.flwz"))
    tensors = back.tensors()
    assert list(tensors) == ["a.bias", "b.weight", "c.weight"] and back.nbytes == archive.nbytes
    assert tensors["a.bias"].dtype == np.float16 and tensors["b.weight"].shape == w.shape
    np.testing.assert_array_equal(back.integers("b.weight"), integers)
    np.testing.assert_array_equal(tensors["b.weight"], integers.astype(np.float32) * np.float32(0.25))
    wanted = archive.codebooks["book"][codes].ravel()[: w.size].reshape(w.shape) * np.float32(0.5)
    np.testing.assert_array_equal(tensors["c.weight"], wanted)


def test_the_size_is_exact_and_its_gradient_points_to_smaller_files() -> None:
    w = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    sizes = []
    for step in (0.2, 0.4, 0.8):
        log_step = torch.tensor(step).log().requires_grad_()
        scaled = w / log_step.exp()
        integers = scaled + (torch.round(scaled) - scaled).detach()
        size = soft_bits(integers)
        whole = torch.round(w / step).long()
        assert size.item() == pytest.approx(rans.entropy_bits(np.bincount((whole - whole.min()).numpy())), rel=1e-6)
        sizes.append(size.item())
    assert sizes[0] > sizes[1] > sizes[2]
    values = torch.tensor([0.0] * 50 + [1.0] * 5 + [2.2], requires_grad=True)
    soft_bits(values).backward()
    assert values.grad is not None and values.grad[-1] > 0  # a rare 2 costs more than a 1


def compressed(graph, ratio: float, batches=None, steps: int = 100):
    return P.CompressWeights(ratio=ratio, steps=steps).apply(graph, Context(calibration=batches))


def test_lenet_is_what_its_archive_says() -> None:
    graph = load_torch(lenet(), digits()[0][:2])
    outcome = compressed(graph, 8.0, [digits()[0][:100]], steps=25)
    size, predicted, whole = (outcome.details[k] for k in ("bytes", "predicted_bytes", "float_bytes"))
    assert abs(size - predicted) <= 0.02 * size and 0.95 * whole / 8 <= size <= 1.01 * whole / 8
    back = read_archive(outcome.artifact.to_bytes()).tensors()
    for name, weight in graph.weights.items():
        np.testing.assert_array_equal(back[name], weight.numpy())
    assert accuracy(graph.to_model()) >= accuracy(lenet()) - 0.02
    assert [d for d in outcome.decisions if d.action == "compressed" and d.data["zeros"] > 0.2]


def test_learned_steps_beat_equal_bits() -> None:
    """The layers' relative errors together, at equal size, against one step per deviation."""
    sizes = {}
    for steps in (1, 25):
        graph = load_torch(lenet(), digits()[0][:2])
        before = {n: w.numpy().copy() for n, w in graph.weights.items()}
        compressed(graph, 8.0, steps=steps)
        sizes[steps] = sum(
            np.square(w.numpy() - before[n]).sum() / np.square(before[n]).sum() for n, w in graph.weights.items()
        )
    assert sizes[25] < 0.98 * sizes[1]


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_resnet20_ten_times_smaller(front: str) -> None:
    images, labels = cifar10("test", 1000)
    program = P.fold(trained_resnet(20), images[:2]).model
    if front == "fx":
        graph = load_torch(program, images[:2])
    else:
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        exported = torch.onnx.export(program, (images[:2],), dynamo=True, verbose=False, dynamic_shapes=shapes)
        graph = load_onnx(exported.model_proto)
    start = right(graph, images, labels)
    outcome = compressed(graph, 10.0, [cifar10("train", 64)[0]])
    size, predicted, whole = (outcome.details[k] for k in ("bytes", "predicted_bytes", "float_bytes"))
    assert abs(size - predicted) <= 0.02 * size
    assert 0.95 * whole / 10 <= size <= 1.01 * whole / 10
    assert size == outcome.artifact.nbytes == len(outcome.artifact.to_bytes())
    back = read_archive(outcome.artifact.to_bytes()).tensors()
    stored = {n: w.numpy() for n, w in graph.weights.items() if w.dtype == "float32"}
    assert set(back) == set(stored)
    for name, weight in stored.items():
        np.testing.assert_array_equal(back[name], weight)
    assert start - right(graph, images, labels) <= 0.01


def right(graph, images: torch.Tensor, labels: torch.Tensor) -> float:
    from foldline.graph.execute import run_graph

    found = [run_graph(graph, {graph.inputs[0].name: b.numpy()})[0][0].argmax(1) for b in images.split(100)]
    return float((np.concatenate(found) == labels.numpy()).mean())


def test_impossible_budgets_are_refused() -> None:
    graph = load_torch(nn.Sequential(nn.Linear(20, 20)), torch.zeros(1, 20))
    with pytest.raises(ConstraintError, match="budget"):
        compressed(graph, 400.0)


def test_tokens_of_one_codebook_keep_the_accuracy_of_lenet() -> None:
    model = lenet()
    result = P.vq_weights(model, digits()[0][:2], bits=8, step=4, verify=False)
    assert accuracy(result.model) >= accuracy(model) - 0.02
    archive = result.artifact
    state = model.state_dict()
    back = read_archive(archive.to_bytes()).tensors()
    assert {n: (tuple(t.shape), t.dtype) for n, t in back.items()} == {
        n: (tuple(t.shape), np.dtype(np.float32)) for n, t in state.items()
    }
    large = {n for n, t in state.items() if t.dim() > 1 and t.numel() >= 1024}
    codes = sum(-(-state[n].numel() // 4) for n in large)
    vectors = sum(4 * t.numel() for n, t in state.items() if n not in large)
    assert codes + vectors + 256 * 16 < archive.nbytes < codes + vectors + 256 * 16 + 700
    for name, tensor in result.model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), back[name])
