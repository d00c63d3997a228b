"""fl.check for TensorRT against its own parser and builder: small files, one rule each, and the products' types."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from foldline.backends.check import check
from foldline.backends.tensorrt.engine import EngineOptions, EngineReport, build, library
from foldline.backends.tensorrt.rules import RULES
from support.trt_cases import Case, cases

ALL = list(cases())
HERE = library()


def ask(chosen: list[Case], folder: Path) -> dict[str, EngineReport]:
    """What the builder says to each case, by name."""
    found: dict[str, EngineReport] = {}
    for capability in {c.options.get("capability", 89) for c in chosen}:
        group = [c for c in chosen if c.options.get("capability", 89) == capability]
        files = []
        for case in group:
            files.append(folder / f"{len(found) + len(files)}.onnx")
            onnx.save(case.model, files[-1])
        reports = build(files, EngineOptions(library=HERE, capability=capability))
        found |= {case.name: report for case, report in zip(group, reports, strict=True)}
    return found


@pytest.mark.parametrize("case", ALL, ids=lambda c: c.name)
def test_rules_fire_where_they_must_and_nowhere_else(case: Case) -> None:
    assert {d.rule for d in check(case.model, "tensorrt", **case.options)} == case.rules


def test_every_rule_has_a_case_and_names_are_unique() -> None:
    assert len({r.id for r in RULES}) == len(RULES) >= 30
    assert {rule for case in ALL for rule in case.rules} == {r.id for r in RULES}
    assert len({c.name for c in ALL}) == len(ALL)


def agrees(case: Case, report: EngineReport) -> None:
    """The builder's verdict is check's verdict, and the expected one."""
    said = check(case.model, "tensorrt", **case.options)
    assert any(d.consequence == "error" for d in said) == (not report.built) == case.refused, report.errors
    if report.built:
        assert {node: report.precision(node) for node in case.precision} == case.precision


@pytest.mark.skipif(HERE is None, reason="no TensorRT: pip install foldline[tensorrt-oracle]")
def test_a_few_files_are_taken_refused_and_crashed_on_as_check_says(tmp_path: Path) -> None:
    names = ("conv", "zero point", "scale is an input", "fp8", "fp8 on 8.6", "relu", "K axis", "int32 bias")
    chosen = [c for c in ALL if c.name in names or c.name == "attention in int8"]
    found = ask(chosen, tmp_path)
    for case in chosen:
        agrees(case, found[case.name])
    assert found["scale is an input"].crash is not None


@pytest.mark.slow
@pytest.mark.skipif(HERE is None, reason="no TensorRT: pip install foldline[tensorrt-oracle]")
def test_every_case_gets_from_tensorrt_what_check_says(tmp_path: Path) -> None:
    found = ask(ALL, tmp_path)
    for case in ALL:
        agrees(case, found[case.name])
    # What the rules on speed and accuracy are about, seen in the layers.
    layers = {name: report.layers for name, report in found.items()}
    fused = [layer for layer in layers["attention"] if {"s", "p", "y"} <= set(layer.nodes)]
    apart = [layer for layer in layers["attention in int8"] if {"s", "p", "y"} <= set(layer.nodes)]
    assert len(fused) == 1 and apart == []
    assert _reads(layers["residual, float skip"], "a") == {"Float"}
    assert _reads(layers["residual, quantized skip"], "a") == {"Float", "Int8"}
    assert any(layer.outputs == ("Int8", "Int8") for layer in layers["two pairs on one value"])
    assert any("uint8" in text.lower() and "int8" in text.lower() for text in found["uint8"].warnings)


def _reads(layers: tuple, node: str) -> set[str]:
    return {kind for layer in layers if node in layer.nodes for kind in layer.inputs}
