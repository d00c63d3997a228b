"""KeepFaster: layers that a backend times slower in integers go back to float, and only where that helps."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from foldline import Pipeline
from foldline import passes as P
from foldline.backends import get
from foldline.graph.errors import ConfigError, ConstraintError
from foldline.graph.fx import load_torch
from foldline.graph.onnx import load_onnx
from foldline.passes.base import Context
from foldline.passes.quantize.keep_faster import quantized_layers
from foldline.passes.quantize.numerics import sqnr_db
from foldline.passes.quantize.reference import find_kernels
from test_quantize import block, exported


def backend(price) -> SimpleNamespace:
    """A backend whose layers take the time that ``price(name, quantized)`` says."""

    def node_times(graph, example_inputs=None, *, runs=20, artifact=None, **options):
        ints = {n.name for n in quantized_layers(graph)}
        return {n.name: price(n.name, n.name in ints) for n in graph.nodes if n.op in ("conv", "linear")}

    return SimpleNamespace(name="priced", spec=get("onnxruntime-cpu").spec, node_times=node_times)


def run(front: str, price):
    model, batches = block()
    before = load_torch(model, batches[0]) if front == "fx" else load_onnx(exported(model, batches[0]))
    graph = before.clone()
    context = Context(calibration=batches, backends=get, example_inputs=batches[0])
    P.Quantize().apply(graph, context)
    context.unquantized = before
    context.backends = lambda name: backend(price)
    outcome = P.KeepFaster().apply(graph, context)
    return before, graph, outcome, batches[0]


def output(graph, x) -> np.ndarray:
    return np.asarray(graph.run({graph.inputs[0].name: x.numpy()})[0][0])


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_the_slower_layers_alone_go_back(front: str) -> None:
    names: list[str] = []

    def price(name: str, quantized: bool) -> float:
        names.append(name)
        return (3.0 if name == names[1] else 1.0) if quantized else 2.0  # the second layer is slower in integers

    before, quantized, outcome, x = run(front, price)
    found = outcome.graph
    layers = [n.name for n in quantized_layers(quantized)]
    assert [n.name for n in quantized_layers(found)] == [n for n in layers if n != layers[1]]
    assert [d.subject for d in outcome.decisions] == [layers[1]]
    original = {n.name: n for n in before.nodes}[layers[1]]
    node = found.node(layers[1])
    np.testing.assert_array_equal(node.inputs[1].const(), original.inputs[1].const())
    np.testing.assert_array_equal(node.inputs[2].const(), original.inputs[2].const())
    # The rest still runs in integer kernels, and the function is the same up to quantization.
    kernels = find_kernels(found)
    assert layers[1] not in kernels and {layers[0], *layers[2:]} <= set(kernels)
    assert sqnr_db(output(before, x), output(found, x)) > 25
    assert outcome.details["latency"] == {"before_ms": 7.0, "after_ms": 6.0}


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_nothing_changes_where_integers_are_faster(front: str) -> None:
    _, quantized, outcome, _ = run(front, lambda name, quantized: 1.0 if quantized else 2.0)
    assert outcome.graph is quantized and outcome.decisions == []


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_pairs_around_a_float_model_go_and_a_float_model_comes_out(front: str) -> None:
    before, _, outcome, x = run(front, lambda name, quantized: 3.0 if quantized else 2.0)
    assert not any(n.op in ("quantize", "dequantize") for n in outcome.graph.nodes)
    np.testing.assert_array_equal(output(outcome.graph, x), output(before, x))


def test_a_restored_layer_that_slows_the_whole_down_stays_in_integers() -> None:
    def price(name: str, quantized: bool) -> float:
        return price.whole if quantized else 1.0  # type: ignore[attr-defined]

    price.whole = 1.5  # type: ignore[attr-defined]
    model, batches = block()
    before = load_torch(model, batches[0])
    graph = before.clone()
    context = Context(calibration=batches, backends=get)
    P.Quantize().apply(graph, context)
    context.unquantized = before
    count = len(quantized_layers(graph))

    def node_times(g, example_inputs=None, *, runs=20, artifact=None, **options):
        ints = [n.name for n in quantized_layers(g)]
        layers = [n.name for n in g.nodes if n.op in ("conv", "linear")]
        if not ints:
            return dict.fromkeys(layers, 2.0)
        slow = {layers[0]: 2.5} if len(ints) == count else dict.fromkeys(layers, 1.9)
        return {**dict.fromkeys(layers, 1.0), **slow}

    context.backends = lambda name: SimpleNamespace(node_times=node_times)
    outcome = P.KeepFaster().apply(graph, context)
    assert outcome.graph is graph and outcome.decisions == []


def test_it_asks_for_a_pass_that_quantizes() -> None:
    model, batches = block()
    with pytest.raises(ConfigError, match="before quantization"):
        P.KeepFaster().apply(load_torch(model, batches[0]), Context(backends=get))
    with pytest.raises(ConstraintError, match="quantized"):
        Pipeline([P.KeepFaster()]).run(model, batches[0])


def test_it_runs_on_the_real_backend() -> None:
    model, batches = block()
    pipe = Pipeline([P.Quantize(), P.KeepFaster(runs=5, options={"threads": 1})])
    result = pipe.run(exported(model, batches[0]), batches[0].numpy(), calibration=[b.numpy() for b in batches])
    assert result.report.passes[-1].details["float_ms"] > 0
    got = get("onnxruntime-cpu").lower(load_onnx(result.model), threads=1).run(batches[0])[0]
    assert sqnr_db(model(batches[0]).detach().numpy(), got) > 25
