"""Sensitivity: what is measured equals a run with that layer quantized; the integral sums to the loss change."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from foldline import Pipeline
from foldline import passes as P
from foldline.graph.errors import ConstraintError
from foldline.graph.execute import run_graph
from foldline.graph.ir import Graph
from foldline.passes.gradients import Example, losses_of
from foldline.passes.quantize.archive import read_archive
from foldline.passes.quantize.choices import narrowed
from foldline.passes.quantize.sensitivity.integral import by_layer, local_scores, post_quantization_integral
from foldline.passes.quantize.sensitivity.layers import layers
from foldline.passes.quantize.sensitivity.measured import Trial, measure
from foldline.passes.quantize.sensitivity.sparse import split_dense_sparse, store_dense_sparse
from scipy.stats import spearmanr
from support.data import cifar10, trained_resnet
from support.quantized import WEIGHTS
from support.small_nets import Mlp, conv_net, graph_of

FORM = {b: narrowed(WEIGHTS, b) for b in (2, 3, 4, 8)}


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_measured_equals_a_run_with_that_layer_quantized(front: str) -> None:
    model, batches = conv_net()
    graph = graph_of(model, batches[0], front)
    run = Pipeline([P.Sensitivity(bits=(2, 4))]).run(graph, batches[0], calibration=batches)
    found = run.report.passes[0].details["layers"]
    assert run.graph is graph or [n.name for n in run.graph.nodes] == [n.name for n in graph.nodes]
    for layer in layers(graph):
        for bits in (2, 4):
            other = graph.clone()
            other.set_weight(other.weight(layer.weight.name), layer.rounded(FORM[bits]))
            signal = noise = 0.0
            for batch in batches:
                (a,), (b,) = (run_graph(g, g.bind(batch))[0] for g in (graph, other))
                signal, noise = signal + float((a**2).sum()), noise + float(((a - b) ** 2).sum())
            assert found[layer.name][bits] == pytest.approx(noise / signal, rel=1e-3)
    ranked = [d.subject for d in run.report.passes[0].decisions]
    assert ranked == sorted(found, key=lambda n: -found[n][2])
    assert "place 1 in sensitivity" in run.report.explain(ranked[0])


def test_activations_can_be_tried_and_tied_weights_are_one_layer() -> None:
    torch.manual_seed(0)
    model = Mlp("layer").eval()
    model.head.weight = model.embed.weight
    tokens = torch.randint(0, 80, (4, 6))
    graph = graph_of(model, tokens, "fx")
    found = layers(graph)
    assert len(found) == 5
    value = next(n.output for n in graph.nodes if n.op == "relu")
    losses = measure(graph, [Trial("relu", value, (0.0, 1.0), lambda f, x: x * f)], [tokens])
    assert losses["relu"][1.0] == 0 and losses["relu"][0.0] > 0


def trained_classifier() -> tuple[Graph, list[Example]]:
    """A small network trained to near its minimum on noisy labels, where gradients say little."""
    torch.manual_seed(0)
    x = torch.randn(256, 12)
    y = (x[:, :4] @ torch.randn(4, 5) + 0.5 * torch.randn(256, 5)).argmax(1)
    model = torch.nn.Sequential(
        *(torch.nn.Linear(12, 24), torch.nn.Tanh(), torch.nn.Linear(24, 24), torch.nn.Tanh()),
        *(torch.nn.Linear(24, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5)),
    )
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(300):
        adam.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        adam.step()
    graph = graph_of(copy.deepcopy(model).eval(), x[:8], "fx")
    return graph, [Example(graph.bind(x), y.numpy())]


def loss_of(graph: Graph, data: list[Example]) -> float:
    total = count = 0.0
    for example in data:
        out = torch.from_numpy(run_graph(graph, example.inputs)[0][0])
        losses = losses_of(out, example, "cross_entropy", 0)
        total, count = total + float(losses.sum()), count + len(losses)
    return total / count


@pytest.mark.parametrize("bits", [2, 3])
def test_the_integral_sums_to_the_loss_change_and_ranks_better_than_local_guesses(bits: int) -> None:
    graph, data = trained_classifier()
    found = layers(graph)
    rounded = {layer.weight.name: layer.rounded(FORM[bits]) for layer in found}
    made = post_quantization_integral(graph, rounded, data)
    assert made.total == pytest.approx(made.change, rel=0.01)
    every = graph.clone()
    for name, w in rounded.items():
        every.set_weight(every.weight(name), w)
    assert made.change == pytest.approx(loss_of(every, data) - loss_of(graph, data), rel=1e-4)
    # rows of the weights, one at a time: the truth, the integral of each, the gradient's guess, Fisher's guess
    truth, integral = [], []
    first, second = local_scores(graph, rounded, data)
    base = loss_of(graph, data)
    guesses: dict[str, list[float]] = {"gradient": [], "fisher": []}
    for layer in found:
        for row in range(0, layer.weight.shape[0], 2):
            w = layer.data().copy()
            w[row] = rounded[layer.weight.name][row]
            other = graph.clone()
            other.set_weight(other.weight(layer.weight.name), w)
            truth.append(loss_of(other, data) - base)
            one = post_quantization_integral(graph, {layer.weight.name: w}, data, points=4)
            integral.append(one.total)
            guesses["gradient"].append(float(first[layer.weight.name][row].sum()))
            guesses["fisher"].append(float(second[layer.weight.name][row].sum()))
    rank = {"pqi": spearmanr(truth, integral)[0], **{k: spearmanr(truth, v)[0] for k, v in guesses.items()}}
    assert rank["pqi"] > 0.99 > max(rank["gradient"], rank["fisher"])


def test_pass_takes_labels_and_says_how_good_its_integral_is() -> None:
    model, batches = conv_net()
    data = [(b, torch.arange(8) % 5) for b in batches[:1]]
    run = Pipeline([P.Sensitivity(kind="pqi", bits=(3,), data=data)]).run(model, batches[0])
    sums = run.report.passes[0].details["sums"][3]
    assert sums["integral"] == pytest.approx(sums["change"], rel=0.02)
    kinds = {}
    for kind in ("gradient", "fisher"):
        kinds[kind] = Pipeline([P.Sensitivity(kind=kind, bits=(3,), data=data)]).run(model, batches[0]).report
        assert len(kinds[kind].passes[0].details["layers"]) == 3
    graph = graph_of(model, batches[0], "fx")
    w = {x.weight.name: x.rounded(FORM[3]) for x in layers(graph)}
    first, _ = local_scores(graph, w, [Example(graph.bind(batches[0]), np.arange(8) % 5)])
    expected = by_layer(first, layers(graph))
    for name, losses in kinds["gradient"].passes[0].details["layers"].items():
        assert losses[3] == pytest.approx(expected[name], rel=1e-4)


def test_bad_input() -> None:
    with pytest.raises(ConstraintError, match="no layer"):
        Pipeline([P.Sensitivity()]).run(torch.nn.ReLU(), torch.randn(2, 3), calibration=[torch.randn(2, 3)])


@pytest.mark.slow
def test_integral_on_a_trained_resnet() -> None:
    x, y = cifar10("train", 32)
    graph = Pipeline([P.Fold()]).run(trained_resnet(20), x[:16], verify=False).graph
    rounded = {layer.weight.name: layer.rounded(FORM[4]) for layer in layers(graph)}
    made = post_quantization_integral(graph, rounded, [Example(graph.bind(x), y.numpy())])
    assert made.total == pytest.approx(made.change, rel=0.02)


def test_dense_and_sparse_beat_plain_rounding_bytes_counted() -> None:
    graph, data = trained_classifier()
    form = FORM[3]
    split = split_dense_sparse(graph, form, data, outliers=0.01, significant=0.02, steps=2, points=8)
    plain, sparse, larger = graph.clone(), graph.clone(), graph.clone()
    for layer in layers(graph):
        name, made = layer.weight.name, split[layer.weight.name]
        w = layer.data()
        numbers = made.numbers()
        plain.set_weight(plain.weight(name), layer.rounded(form))
        sparse.set_weight(sparse.weight(name), numbers)
        larger.set_weight(larger.weight(name), layer.rounded(FORM[4]))
        np.testing.assert_array_equal(numbers.reshape(-1)[made.index], w.reshape(-1)[made.index].astype(np.float16))
        assert (made.integers.reshape(-1)[made.index] == 0).all()
        assert made.bytes == w.size * 3 / 8 + 4 * w.shape[0] + 4 * len(made.index)
        assert (made.params.scale <= layer.params(form).scale).all()
    kept = sum(len(s.index) for s in split.values())
    total = sum(x.weight.size for x in layers(graph))
    assert kept == round(0.01 * total) + round(0.02 * total)
    shares = [len(split[x.weight.name].index) / x.weight.size for x in layers(graph)]
    assert max(shares) > 1.5 * min(shares)  # each layer gets what it needs
    base = loss_of(graph, data)
    assert loss_of(sparse, data) - base < 0.6 * (loss_of(plain, data) - base)
    assert sum(s.bytes for s in split.values()) < sum(x.bytes(FORM[4]) for x in layers(graph))
    none = split_dense_sparse(graph, form, data, outliers=0, significant=0)
    for layer in layers(graph):
        np.testing.assert_array_equal(none[layer.weight.name].numbers(), layer.rounded(form))


@pytest.mark.parametrize("granularity", ["out_channel", "tensor"])
def test_dense_and_sparse_are_a_file_that_gives_the_weights_back(granularity: str, tmp_path: Path) -> None:
    graph, data = trained_classifier()
    form = narrowed(replace(WEIGHTS, granularity=granularity), 3)
    split = split_dense_sparse(graph, form, data, outliers=0.02, significant=0.02, steps=1, points=4)
    path = store_dense_sparse(graph, split).save(tmp_path / "weights.flw")
    back = read_archive(path)
    assert set(back.tensors()) == set(graph.weights)
    for name, weight in graph.weights.items():
        np.testing.assert_array_equal(back.tensors()[name], weight.numpy())
    for name, made in split.items():
        np.testing.assert_array_equal(graph.weight(name).numpy(), made.numbers())
        np.testing.assert_array_equal(back.integers(name), made.integers)
    others = sum(w.size * 4 for n, w in graph.weights.items() if n not in split)
    header = 2500  # names, shapes and the coder's table of frequencies
    assert path.stat().st_size < sum(s.bytes for s in split.values()) + others + header
    blocks = split_dense_sparse(graph, replace(form, granularity="block", block=4), data, significant=0)
    with pytest.raises(ConstraintError, match="scale per block"):
        store_dense_sparse(graph, blocks)
