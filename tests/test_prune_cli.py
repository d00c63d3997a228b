"""foldline prune: options as the pass's, a plan applied to another checkpoint, every form of MODEL, clear refusals."""

from __future__ import annotations

import json
from pathlib import Path

import foldline as fl
import numpy as np
import onnx
import pytest
import torch
from test_cli import call, here, onnx_model

__all__ = ["here"]


@pytest.mark.parametrize("model", ["m.onnx", "clinet.py:make"])
def test_prune_writes_model_plan_and_report(here: Path, capsys: pytest.CaptureFixture[str], model: str) -> None:
    assert call("prune", model, "--ratio", "0.5", "-o", "out") == 0
    assert "prune" in capsys.readouterr().out
    report = json.loads((here / "out" / "report.json").read_text())
    assert report["after"]["macs"] * 2 == report["before"]["macs"]
    plan = fl.Plan.load(here / "out" / "plan.json")
    assert {len(k) for axes in plan.weights.values() for k in axes.values()} == {4}
    assert (here / "out" / ("model.onnx" if model.endswith("onnx") else "model.safetensors")).exists()


def test_options_reach_the_pass(here: Path) -> None:
    options = ["--target", "macs=0.5", "--criterion", "l1", "--scope", "global", "--round-to", "2", "--min-keep", "2"]
    assert call("prune", "m.onnx", *options, "--atoms", "all", "--equal", "--seed", "3", "-q", "-o", "out") == 0
    report = json.loads((here / "out" / "report.json").read_text())
    expected = {"target": "macs(0.5)", "criterion": "l1", "scope": "global", "round_to": "2", "min_keep": "2"}
    assert expected.items() <= report["passes"][0]["options"].items() and report["seed"] == 3
    assert report["passes"][0]["options"]["equal"] == "True"
    assert call("prune", "m.onnx", "--ratio", "0.5", "--ignore", "w", "-q", "-o", "out2") == 1
    assert not (here / "out2").exists()


def test_a_plan_prunes_another_checkpoint(here: Path) -> None:
    assert call("prune", "m.onnx", "--ratio", "0.5", "-q", "-o", "one") == 0
    other = onnx_model(0.3)
    onnx.save(other, str(here / "other.onnx"))
    assert call("prune", "other.onnx", "--plan", "one/plan.json", "-q", "-o", "two") == 0
    kept = fl.Plan.load(here / "one" / "plan.json").weights["w"][1]
    assert (here / "two" / "plan.json").read_text() == (here / "one" / "plan.json").read_text()
    w, v = (onnx.numpy_helper.to_array(i) for i in other.graph.initializer)
    x = np.linspace(-1, 1, 18, dtype="f4").reshape(3, 6)
    graph = fl.load(here / "two" / "model.onnx")
    found = fl.run_graph(graph, {"x": x})[0][0]
    assert np.allclose(found, np.maximum(x @ w[:, kept], 0) @ v[kept], atol=1e-6)
    assert "kept 4 of 8 by the plan" in (here / "two" / "report.json").read_text()


def test_a_plan_prunes_a_module_that_loads_again(here: Path) -> None:
    assert call("prune", "clinet.py:make", "--ratio", "0.5", "-q", "-o", "one") == 0
    assert call("prune", "clinet.py:make", "--plan", "one/plan.json", "-q", "-o", "two") == 0
    import clinet

    first, x = clinet.make()
    small = fl.load_pruned(first, here / "two")
    assert small.up.out_features == 4
    assert torch.equal(small(*x), fl.load_pruned(clinet.bare(), here / "one")(*x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratio", "1.5"], "out of range"),
        ([], "exactly one of ratio and target"),
        (["--target", "half"], "not a target"),
        (["--target", "flops=0.5"], "target"),
        (["--ratio", "0.5", "--criterion", "l3"], "unknown criterion"),
        (["--plan", "missing.json"], "cannot be read"),
        (["--plan", "pipe.yaml"], "not a foldline plan"),
        (["--plan", "plan.json", "--ratio", "0.5"], "give --plan alone"),
        (["--ratio", "0.5", "--ignore", "nothing"], "matches nothing"),
    ],
)
def test_refusals(here: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert call("prune", "m.onnx", *options, "-o", "out") == 1
    assert message in capsys.readouterr().err
    assert not (here / "out").exists()


def test_a_plan_for_another_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("prune", "clinet.py:make", "--ratio", "0.5", "-q", "-o", "one") == 0
    assert call("prune", "m.onnx", "--plan", "one/plan.json", "-q", "-o", "two") == 1
    text = capsys.readouterr().err
    assert "another model" in text and "down.weight" in text and "try:" in text
