"""Diagnose: its numbers are those of the two models run apart; the page draws them; explain tells them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from foldline import Pipeline
from foldline import passes as P
from foldline.graph.errors import ConfigError
from foldline.graph.execute import run_graph
from foldline.passes.base import Context
from foldline.passes.quantize.diagnose_numbers import Spread, stored_grid
from foldline.passes.quantize.numerics import QuantParams, sqnr_db
from foldline.passes.result import Result
from support.quantized import weights_as_integers
from support.small_nets import conv_net, graph_of


def diagnosed(front: str, **options: object) -> tuple[Result, dict, object]:
    model, batches = conv_net()
    before = graph_of(model, batches[0], front)
    pipe = Pipeline([P.Quantize(weight_bits=4, activation_bits=6), P.Diagnose(samples=8, **options)])
    run = pipe.run(before, batches[0], calibration=batches[:1])
    return run, run.report.passes[-1].details["quantization"], before


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_numbers_are_those_of_both_models_run_apart(front: str) -> None:
    run, found, before = diagnosed(front)
    x = conv_net()[1][0]
    layers, points = found["layers"], found["points"]
    assert [x["op"] for x in layers] == ["conv", "conv", "linear"] and len(points) >= 3
    names = [run.graph.node(item["name"]).output.name for item in layers]
    _, a = run_graph(before, before.bind(x), names)
    _, b = run_graph(run.graph, run.graph.bind(x), names)
    for item, name in zip(layers, names, strict=True):
        # torch computes the diagnosis of ONNX graphs: activations on a tie may fall to the other side
        assert item["output_db"] == pytest.approx(sqnr_db(a[name], b[name]), abs=1e-3 if front == "fx" else 0.7)
        w = before.weight(item["weight"]).numpy()
        node = run.graph.node(item["name"]).inputs[1].producer
        grid = stored_grid(node)
        assert item["weight_db"] == pytest.approx(sqnr_db(w, grid.dequantize(node.inputs[0].const())), abs=1e-3)
        assert item["weight_bits"] <= 4 and item["sensitivity_db"] is not None
    worst = min(layers, key=lambda item: item["sensitivity_db"])
    assert "number 1 in sensitivity" in run.report.explain(worst["name"])
    inputs = [p for p in points if p["name"] in {v.name for v in before.inputs}]
    assert inputs[0]["bits"] == 6 and inputs[0]["used"] > 0.9 and inputs[0]["clipped"] == 0
    assert inputs[0]["own_db"] == pytest.approx(inputs[0]["accumulated_db"] or inputs[0]["own_db"], abs=40)


def test_the_page_draws_it_and_the_json_holds_it() -> None:
    run, found, _ = diagnosed("fx")
    page = run.report.html()
    for text in (
        "Signal to noise along the graph",
        "3 quantized layers",
        "histograms of the 3",
        "polyline",
        "6 bits in",
    ):
        assert text in page
    assert page.count("<figure>") == 6
    assert "layers that lose most" in str(run.report)
    data = json.loads(run.report.to_json())["passes"][-1]["details"]["quantization"]
    assert data["layers"][0]["name"] == found["layers"][0]["name"]
    plain = diagnosed("fx", histograms=False, sensitivity="none")[0].report.html()
    assert "<figure>" not in plain and "3 quantized layers" in plain


def test_clipping_and_wasted_range_are_told() -> None:
    grid = QuantParams(np.float32(0.1).reshape(()), np.uint8(0).reshape(()))
    spread = Spread(grid)
    spread.add(np.concatenate([np.full(50, 100.0), np.full(50, 1.0)]).astype(np.float32))
    assert spread.facts()["clipped"] == 0.5 and spread.facts()["used"] == pytest.approx(245 / 255)
    model, batches = conv_net()
    before = graph_of(model, batches[0], "fx")
    calibration = [batches[0], 50 * batches[1]]
    run = Pipeline([P.Quantize(), P.Diagnose(calibration=[batches[0]], sensitivity="none")]).run(
        before, batches[0], calibration=calibration, verify=False
    )
    assert {d.action for d in run.report.passes[-1].decisions} == {"wastes range"}


def test_weight_only_models_and_missing_references() -> None:
    model, batches = conv_net()
    before = graph_of(model, batches[0], "fx")
    graph = weights_as_integers(before, 3)
    details = P.Diagnose(calibration=batches).apply(graph, Context(unquantized=before)).details["quantization"]
    assert details["points"] == [] and len(details["layers"]) == 3 and details["layers"][0]["input_db"] is None
    state = {n: w.numpy().tobytes() for n, w in graph.weights.items()}
    P.Diagnose(calibration=batches, reference=before).apply(graph, Context())
    assert state == {n: w.numpy().tobytes() for n, w in graph.weights.items()}  # it only looks
    with pytest.raises(ConfigError, match="none is known"):
        P.Diagnose(calibration=batches).apply(graph, Context())
    assert torch.is_grad_enabled()
