"""BiasCorrection: the mean output of every layer is the float model's again, on torch and on ONNX."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from foldline import Pipeline
from foldline import passes as P
from foldline.backends import get
from foldline.graph.errors import ConfigError, ConstraintError
from foldline.graph.execute import run_graph
from foldline.graph.ir import Graph
from foldline.graph.verify import compare
from foldline.passes.base import Context
from foldline.passes.quantize.correct.sites import sites
from support.data import cifar10, trained_resnet
from support.quantized import weights_as_integers
from support.small_nets import ConvNet, conv_net, graph_of


def means(graph: Graph, names: list[str], batches: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """Mean per channel of each named value, over all batches."""
    rows: dict[str, list[np.ndarray]] = {n: [] for n in names}
    for batch in batches:
        _, tapped = run_graph(graph, graph.bind(batch), names)
        for name, x in tapped.items():
            rows[name].append(np.moveaxis(x, 1, -1).reshape(-1, x.shape[1]).astype(np.float64))
    return {n: np.concatenate(r).mean(0) for n, r in rows.items()}


def sqnr(before: Graph, after: Graph, batches: list[torch.Tensor]) -> float:
    found = compare(before, after, [before.bind(b) for b in batches])
    return next(iter(found.outputs.values())).sqnr_db


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_full_gives_every_layer_its_mean_back(front: str) -> None:
    model, batches = conv_net()
    before = graph_of(model, batches[0], front)
    outcome = Pipeline([P.Quantize(weight_bits=3), P.BiasCorrection()]).run(
        before, batches[0], calibration=batches, verify=False
    )
    plain = Pipeline([P.Quantize(weight_bits=3)]).run(before, batches[0], calibration=batches, verify=False).graph
    graph = outcome.graph
    names = [s.node.output.name for s in sites(graph, before)]
    assert len(names) == 3
    wanted, raw, fixed = (means(g, names, batches) for g in (before, plain, graph))
    for site in sites(graph, before):
        name = site.node.output.name
        step = np.abs(np.asarray(site.node.inputs[2].producer.inputs[1].const())).max()  # int32 biases: whole steps
        # ONNX Runtime fuses what torch computed piecewise: a few activations on a tie fall to the other side
        slack = 0.0 if front == "fx" else 0.01 * np.abs(wanted[name]).max()
        assert np.abs(fixed[name] - wanted[name]).max() <= 0.51 * step + 1e-5 + slack
        assert np.abs(fixed[name] - wanted[name]).max() < 0.2 * np.abs(raw[name] - wanted[name]).max()
    assert sqnr(before, graph, batches) > sqnr(before, plain, batches) + 1
    assert outcome.report.passes[-1].details == {"method": "full", "corrected": 3, "left": 0}
    said = outcome.report.explain("conv1")
    assert "bias_correction" in said and "int32 bias" in said


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_fast_equals_the_mean_error_of_the_weights_alone(front: str) -> None:
    """With activations in float the first layer's mean error is exactly dW E[x]: both methods agree there."""
    model, batches = conv_net()
    before = graph_of(model, batches[0], front)
    made = {}
    for method in ("fast", "full"):
        graph = weights_as_integers(before, 3)
        P.BiasCorrection(method=method, calibration=batches).apply(graph, Context(unquantized=before))
        made[method] = [np.asarray(s.node.inputs[2].const()) for s in sites(graph, before)]
        assert sqnr(before, graph, batches) > sqnr(before, weights_as_integers(before, 3), batches) + 0.5
    np.testing.assert_allclose(made["fast"][0], made["full"][0], atol=1e-5)
    assert np.abs(made["fast"][1] - made["full"][1]).max() > 1e-4  # later layers: full sees the earlier ones' errors


def test_moments_need_no_data_and_come_near_the_fast_form() -> None:
    model, batches = conv_net(norm=True)
    before = graph_of(model, batches[0], "fx")
    graphs = {}
    for method in ("moments", "fast"):
        graphs[method] = weights_as_integers(before, 3)
        calibration = None if method == "moments" else batches
        P.BiasCorrection(method=method, calibration=calibration).apply(graphs[method], Context(unquantized=before))
    plain = weights_as_integers(before, 3)
    second = [np.asarray(sites(g, before)[1].node.inputs[2].const()) for g in (plain, *graphs.values())]
    drift = [b - second[0] for b in second[1:]]
    assert np.corrcoef(*drift)[0, 1] > 0.9
    assert sqnr(before, graphs["moments"], batches) > sqnr(before, plain, batches)


def test_a_batch_norm_takes_the_shift_and_a_layer_without_bias_gets_one() -> None:
    model, batches = conv_net(norm=True)
    model.head = torch.nn.Linear(12, 5, bias=False)
    before = graph_of(model, batches[0], "fx")
    graph = weights_as_integers(before, 3)
    outcome = P.BiasCorrection(calibration=batches).apply(graph, Context(unquantized=before))
    reasons = {d.subject: d.reason for d in outcome.decisions}
    assert "batch norm's running mean" in reasons["conv2d"] and "float bias" in reasons["linear"]
    names = [n.output.name for n in graph.nodes if n.op in ("batch_norm", "linear")]
    wanted, fixed = means(before, names, batches), means(graph, names, batches)
    for name in names:
        np.testing.assert_allclose(fixed[name], wanted[name], atol=1e-4)


def test_nothing_is_shifted_where_nothing_is_lost_and_the_float_model_stays() -> None:
    model, batches = conv_net()
    before = graph_of(model, batches[0], "fx")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    graph = weights_as_integers(before, 16)
    old = [np.asarray(s.node.inputs[2].const()).copy() for s in sites(graph, before)]
    P.BiasCorrection(calibration=batches).apply(graph, Context(unquantized=before))
    for a, site in zip(old, sites(graph, before), strict=True):
        np.testing.assert_allclose(np.asarray(site.node.inputs[2].const()), a, atol=1e-3)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_it_says_what_it_lacks() -> None:
    model, batches = conv_net()
    before = graph_of(model, batches[0], "fx")
    with pytest.raises(ConfigError, match="none is known"):
        P.BiasCorrection(calibration=batches).apply(weights_as_integers(before, 3), Context())
    with pytest.raises(ConstraintError, match="no layer holds integers"):
        P.BiasCorrection(calibration=batches, reference=before).apply(before.clone(), Context())
    with pytest.raises(ConstraintError, match="requires 'quantized'"):
        Pipeline([P.BiasCorrection(method="moments")]).run(ConvNet().eval(), batches[0])
    assert get("onnxruntime-cpu").spec is not None


@pytest.mark.slow
def test_four_bit_weights_of_a_trained_resnet_gain_decibels() -> None:
    images, _ = cifar10("train", 64)
    model, batches = trained_resnet(20), list(images.split(32))
    folded = Pipeline([P.Fold()]).run(model, images[:16], verify=False).graph
    found = {}
    for name, more in {
        "plain": [],
        "full": [P.BiasCorrection()],
        "moments": [P.BiasCorrection(method="moments")],
        "retuned": [P.BnRetune(), P.BiasCorrection()],
    }.items():
        run = Pipeline([P.Quantize(weight_bits=4), *more]).run(folded, images[:16], calibration=batches, verify=False)
        found[name] = sqnr(folded, run.graph, list(cifar10("test", 100)[0].split(50)))
    assert found["full"] > found["plain"] + 3 and found["moments"] > found["plain"] + 1
    assert found["retuned"] > found["full"] - 0.5
