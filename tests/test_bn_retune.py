"""BnRetune: every channel has the float mean and deviation again, through scales and biases or through norms."""

from __future__ import annotations

import numpy as np
import pytest
from foldline import Pipeline
from foldline import passes as P
from foldline.graph.execute import run_graph
from foldline.graph.ir import Graph
from foldline.passes.base import Context
from foldline.passes.quantize.correct.sites import sites
from support.quantized import weights_as_integers
from support.small_nets import conv_net, graph_of


def moments(graph: Graph, name: str, batches: list) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel of a value over all batches."""
    rows = []
    for batch in batches:
        x = run_graph(graph, graph.bind(batch), [name])[1][name]
        rows.append(np.moveaxis(x, 1, -1).reshape(-1, x.shape[1]).astype(np.float64))
    every = np.concatenate(rows)
    return every.mean(0), every.std(0)


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_folded_norms_are_retuned_in_the_scale_and_the_bias(front: str) -> None:
    model, batches = conv_net(norm=True)
    folded = Pipeline([P.Fold()]).run(graph_of(model, batches[0], front), batches[0], verify=False).graph
    run = Pipeline([P.Quantize(weight_bits=3), P.BnRetune()]).run(folded, batches[0], calibration=batches, verify=False)
    plain = Pipeline([P.Quantize(weight_bits=3)]).run(folded, batches[0], calibration=batches, verify=False).graph
    assert [n.op for n in run.graph.nodes] == [n.op for n in plain.nodes]  # no operator is added
    convs = [s for s in sites(run.graph, folded) if s.node.op == "conv"]
    assert len(convs) == run.report.passes[-1].details["corrected"] == 2
    for site, old in zip(convs, sites(plain, folded), strict=False):
        np.testing.assert_array_equal(site.stored.numpy(), old.stored.numpy())  # no integer of a weight either
        name = site.node.output.name
        (mu, sd), (mu_q, sd_q), (mu_r, sd_r) = (moments(g, name, batches) for g in (folded, plain, run.graph))
        assert np.abs(sd_r / sd - 1).max() < 0.02 < np.abs(sd_q / sd - 1).max()
        assert np.abs(mu_r - mu).max() < 0.2 * np.abs(mu_q - mu).max()


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_unfolded_norms_get_new_statistics(front: str) -> None:
    model, batches = conv_net(norm=True)
    before = graph_of(model, batches[0], front)
    if not any(n.op == "batch_norm" for n in before.nodes):
        pytest.skip("the exporter folded the batch norm")
    graph = weights_as_integers(before, 3)
    raw = moments(graph, next(n.output.name for n in graph.nodes if n.op == "batch_norm"), batches)
    P.BnRetune(layers="norms", calibration=batches).apply(graph, Context(unquantized=before))
    name = next(n.output.name for n in graph.nodes if n.op == "batch_norm")
    (mu, sd), (mu_r, sd_r) = moments(before, name, batches), moments(graph, name, batches)
    np.testing.assert_allclose(mu_r, mu, atol=1e-4)
    np.testing.assert_allclose(sd_r, sd, rtol=1e-3)
    assert np.abs(raw[0] - mu).max() > 0.01
    weights = [n for n in graph.weights if n in before.weights and n not in ("bn.running_mean", "bn.running_var")]
    for weight in weights:  # nothing else moved
        if "running" not in weight:
            np.testing.assert_array_equal(graph.weights[weight].numpy(), before.weights[weight].numpy())


def test_an_exact_copy_is_left_as_it_is() -> None:
    model, batches = conv_net()
    before = graph_of(model, batches[0], "fx")
    graph = weights_as_integers(before, 16)
    scales = {s.node.name: np.asarray(s.dequantize.inputs[1].const()).copy() for s in sites(graph, before)}
    P.BnRetune(calibration=batches, layers="all").apply(graph, Context(unquantized=before))
    for site in sites(graph, before):
        np.testing.assert_allclose(np.asarray(site.dequantize.inputs[1].const()), scales[site.node.name], rtol=1e-3)
