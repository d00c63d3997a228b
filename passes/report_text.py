"""The report as tables for a terminal (rich)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .report import change, count, decibel, in_order, size, worst_of

if TYPE_CHECKING:
    from .report import PassRecord, Report

DECISIONS = 12
"""Decisions shown per pass; the rest are counted (``report.explain`` and the HTML page have them all)."""

LAYERS = 8
"""Layers shown of a diagnosis."""

STYLE = {"exact": "green", "approximate": "yellow", "fresh": "magenta"}


def tables(report: Report, width: int = 118) -> Iterator[RenderableType]:
    """The whole report, part by part: headline, passes, totals, decisions, notes; narrower below 100 columns."""
    yield _headline(report)
    yield _passes(report, wide=width >= 100)
    yield _totals(report)
    for record in report.passes:
        if record.decisions:
            yield _decisions(record)
        if isinstance(record.details.get("quantization"), dict) and record.details["quantization"]["layers"]:
            yield _quantization(record)
    for note in report.notes:
        yield Text(f"note: {note}", style="yellow")


def _headline(report: Report) -> Text:
    model = report.model
    return Text.assemble(
        (report.pipeline, "bold"), f" on {model['name']} ({model['kind']}), seed {report.seed}", style="default"
    )


def _passes(report: Report, wide: bool) -> Table:
    table = Table(title="Passes", title_justify="left", expand=False)
    table.add_column("pass", no_wrap=True)
    table.add_column("contract", no_wrap=True)
    table.add_column("measured", overflow="fold")
    for heading in ("parameters", "bytes", "MACs", "time", "peak memory") if wide else ("bytes", "MACs", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for r in report.passes:
        a, b = r.before, r.after
        memory = "" if r.peak_bytes is None else size(r.peak_bytes)
        row = [change(a.bytes, b.bytes), change(a.macs, b.macs), f"{r.seconds:.2f} s"]
        row = [change(a.parameters, b.parameters), *row, memory] if wide else row
        table.add_row(r.name, Text(r.contract, style=STYLE.get(r.contract, "")), escape(r.verdict), *row)
    return table


def _totals(report: Report) -> Table:
    a, b = report.before, report.after
    table = Table(title="Model", title_justify="left", expand=False)
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("parameters", count(a.parameters), count(b.parameters), change(a.parameters, b.parameters))
    table.add_row("stored weights", size(a.bytes), size(b.bytes), change(a.bytes, b.bytes))
    table.add_row("MACs per sample", count(a.macs), count(b.macs), change(a.macs, b.macs))
    if report.comparison is not None:
        worst = worst_of(report.comparison)
        table.add_row("SQNR against the input model", "", decibel(worst["sqnr_db"]), "")
        table.add_row("cosine", "", f"{worst['cosine']:.5f}", "")
        if worst["top1"] is not None:
            table.add_row("top-1 agreement", "", f"{worst['top1']:.1%}", "")
    return table


def _quantization(record: PassRecord) -> Table:
    """The layers that a quantized model loses most in."""
    layers = record.details["quantization"]["layers"]
    ranked = any(item["sensitivity_db"] is not None for item in layers)
    key = "sensitivity_db" if ranked else "output_db"
    order = sorted(layers, key=lambda item: float("inf") if item[key] is None else item[key])
    table = Table(title=f"{record.name}: layers that lose most (SQNR)", title_justify="left", expand=False)
    for heading in ("layer", "weight", "input", "output", "outputs, this weight alone"):
        table.add_column(heading, justify="left" if heading == "layer" else "right", overflow="fold")
    for item in order[:LAYERS]:
        source = "float" if item["input_db"] is None else decibel(item["input_db"])
        alone = decibel(item["sensitivity_db"]) if ranked else ""
        table.add_row(escape(item["layer"]), decibel(item["weight_db"]), source, decibel(item["output_db"]), alone)
    if len(layers) > LAYERS:
        table.caption = f"and {len(layers) - LAYERS} more in the HTML page and report.json"
    return table


def _decisions(record: PassRecord) -> Table:
    table = Table(title=f"{record.name}: decisions", title_justify="left", expand=False)
    for heading in ("subject", "action", "reason"):
        table.add_column(heading, overflow="fold")
    for d in in_order(record.decisions)[:DECISIONS]:
        table.add_row(escape(d.subject), escape(d.action), escape(d.reason))
    left = len(record.decisions) - DECISIONS
    if left > 0:
        table.caption = f"and {left} more: report.explain(NAME), or the HTML page"
    return table
