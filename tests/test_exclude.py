"""Layers left in float for a signal-to-noise ratio: it is kept, at the least work, and the report says why."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from foldline import Pipeline
from foldline import passes as P
from foldline.graph.errors import ConstraintError
from foldline.graph.execute import run_graph
from foldline.passes.quantize.numerics import sqnr_db
from foldline.passes.quantize.sensitivity import exclude as module
from support.small_nets import graph_of


class Stack(torch.nn.Module):
    """Layers of different widths, one with an outlier in its weights and one behind an outlier channel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = [16, 32, 8, 24, 5]
        self.layers = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))
        with torch.no_grad():
            self.layers[1].weight[:, 0] *= 40
            self.layers[0].weight[3] *= 30

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = torch.nn.functional.gelu(layer(x))
        return self.layers[-1](x)


def batches() -> list[torch.Tensor]:
    return list(torch.randn(64, 16, generator=torch.Generator().manual_seed(1)).split(16))


def measured(float_graph, graph, data) -> float:
    a, b = (np.concatenate([run_graph(g, g.bind(x))[0][0] for x in data]) for g in (float_graph, graph))
    return sqnr_db(a, b)


@pytest.mark.parametrize("front", ["fx", "onnx"])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_the_ratio_is_kept_and_the_report_says_how(front: str, rounding: str) -> None:
    data = batches()
    graph = graph_of(Stack().eval(), data[0], front)

    def run(**options):
        return Pipeline([P.Quantize(rounding=rounding, calibration=data, **options)]).run(graph, data[0], verify=False)

    plain = run()
    base = measured(graph, plain.graph, data)
    wanted = base + 3
    found = run(sqnr=wanted)
    details = found.report.passes[0].details
    assert details["floats_for_sqnr"] and details["weights"] == 4 - len(details["floats_for_sqnr"])
    assert measured(graph, found.graph, data) >= wanted - 0.01
    assert details["sqnr_db"] == pytest.approx(measured(graph, found.graph, data), abs=0.1)
    for name in details["floats_for_sqnr"]:
        node = found.graph.node(name)
        assert node.inputs[1].weight is not None and node.inputs[1].weight.dtype == "float32"
        assert "dB below the outputs" in found.report.explain(name)
    easy = run(sqnr=base - 3)
    assert "floats_for_sqnr" not in easy.report.passes[0].details
    assert measured(graph, easy.graph, data) == pytest.approx(base, abs=1e-6)


def test_the_choice_equals_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches()
    graph = graph_of(Stack().eval(), data[0], "fx")
    rounds = []
    parts_of, keep = module._parts, module.exclude

    def parts(*args):
        made = parts_of(*args)
        rounds.append(made)
        return made

    def once(*args, **kwargs):
        found = keep(*args, **kwargs)
        rounds.append(found)
        return found

    monkeypatch.setattr(module, "_parts", parts)
    monkeypatch.setattr(module, "exclude", once)
    Pipeline([P.Quantize(sqnr=41.0, calibration=data)]).run(graph, data[0], verify=False)
    (made, fixed), found = rounds[0], rounds[1]
    total = fixed + sum(p.noise for p in made)
    scale = 10 ** (-found.sqnr_db / 10) / total
    fits = [
        set_
        for k in range(len(made) + 1)
        for set_ in combinations(range(len(made)), k)
        if scale * (total - sum(made[i].noise for i in set_)) <= 10**-4.1
    ]
    least = min(sum(made[i].work for i in set_) for set_ in fits)
    chosen = [p for p in made if p.sites[0].node.name in found.names]
    assert sum(p.work for p in chosen) == least


def test_what_no_layer_takes_is_refused() -> None:
    data = batches()
    graph = graph_of(Stack().eval(), data[0], "fx")
    with pytest.raises(ConstraintError, match="nothing to quantize|cannot keep"):
        Pipeline([P.Quantize(sqnr=100.0, calibration=data)]).run(graph, data[0], verify=False)
