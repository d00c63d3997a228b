"""The report as tables for a terminal (rich)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .report import change, count, decibel, size, worst_of

if TYPE_CHECKING:
    from .report import PassRecord, Report

DECISIONS = 12
"""Decisions shown per pass; the rest are counted (``report.explain`` and the HTML page have them all)."""

STYLE = {"exact": "green", "approximate": "yellow", "fresh": "magenta"}


def tables(report: Report) -> RenderableType:
    """The whole report as one renderable: headline, passes, totals, decisions, notes."""
    parts: list[RenderableType] = [_headline(report), _passes(report), _totals(report)]
    for record in report.passes:
        if record.decisions:
            parts.append(_decisions(record))
    parts += [Text(f"note: {note}", style="yellow") for note in report.notes]
    return Group(*parts)


def _headline(report: Report) -> Text:
    model = report.model
    return Text.assemble(
        (report.pipeline, "bold"), f" on {model['name']} ({model['kind']}), seed {report.seed}", style="default"
    )


def _passes(report: Report) -> Table:
    table = Table(title="Passes", title_justify="left", expand=False)
    for heading in ("pass", "contract", "measured"):
        table.add_column(heading, overflow="fold")
    for heading in ("parameters", "bytes", "MACs", "time", "peak memory"):
        table.add_column(heading, justify="right")
    for r in report.passes:
        table.add_row(
            r.name,
            Text(r.contract, style=STYLE.get(r.contract, "")),
            r.verdict,
            change(r.before.parameters, r.after.parameters),
            change(r.before.bytes, r.after.bytes),
            change(r.before.macs, r.after.macs),
            f"{r.seconds:.2f} s",
            "" if r.peak_bytes is None else size(r.peak_bytes),
        )
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


def _decisions(record: PassRecord) -> Table:
    table = Table(title=f"{record.name}: decisions", title_justify="left", expand=False)
    for heading in ("subject", "action", "reason"):
        table.add_column(heading, overflow="fold")
    for d in record.decisions[:DECISIONS]:
        table.add_row(d.subject, d.action, d.reason)
    left = len(record.decisions) - DECISIONS
    if left > 0:
        table.caption = f"and {left} more: report.explain(NAME), or the HTML page"
    return table
