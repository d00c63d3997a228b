"""The report as one self-contained HTML page: no external resource, light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from .report import change, count, decibel, in_order, jsonable, size, worst_of
from .report_quantize import section as quantization
from .report_style import SCRIPT, STYLE

if TYPE_CHECKING:
    from .report import PassRecord, Report

ROWS = 3000
"""Rows shown of one table; report.json has them all."""
OPEN = 15
"""Tables up to this many rows are shown unfolded."""


def page(report: Report) -> str:
    """The whole page as text."""
    model = report.model
    title = f"{report.pipeline} on {model['name']}"
    body = [
        _header(report),
        _tiles(report),
        _section("Before and after", chart(bars(report))),
        _section("Passes", _overview(report) + "".join(_pass(i, r) for i, r in enumerate(report.passes, 1))),
        _groups(report),
        _notes(report),
        _section("Model", _model(report)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def _header(report: Report) -> str:
    model = report.model
    steps = "".join(f"<li>{_badge(r.contract, r.name)}</li>" for r in report.passes)
    used = sorted({name for r in report.passes for name in r.compared_on})
    checked = f"checked on {' and '.join(used)} inputs" if report.verify and used else "not verified"
    article = "an" if _kind(model["kind"])[0] in "AEIOU" else "a"
    return (
        f'<header>\n<p class="brand">foldline <span>{escape(report.versions.get("foldline", ""))}</span></p>\n'
        f"<h1>{escape(model['name'])}</h1>\n"
        f'<p class="lede">Pipeline <b>{escape(report.pipeline)}</b> on {article} {escape(_kind(model["kind"]))} model, '
        f"seed {report.seed}, {checked}.</p>\n"
        f'<ol class="steps">{steps}</ol>\n</header>'
    )


def _kind(kind: str) -> str:
    return {"fx": "PyTorch", "onnx": "ONNX"}.get(kind, kind)


def _badge(contract: str, text: str | None = None) -> str:
    return f'<span class="badge {escape(contract)}" title="{escape(contract)}">{escape(text or contract)}</span>'


# ---- numbers ------------------------------------------------------------------------------------------------
def _latency(report: Report) -> tuple[float, float] | None:
    """Milliseconds before and after, where a pass measured both (``details["latency"]``)."""
    for record in reversed(report.passes):
        found = record.details.get("latency")
        if isinstance(found, dict) and "before_ms" in found and "after_ms" in found:
            return float(found["before_ms"]), float(found["after_ms"])
    return None


def _tiles(report: Report) -> str:
    a, b = report.before, report.after
    tiles = [
        ("parameters", count(b.parameters), change(a.parameters, b.parameters), f"from {count(a.parameters)}"),
        ("stored weights", size(b.bytes), change(a.bytes, b.bytes), f"from {size(a.bytes)}"),
        ("MACs per sample", count(b.macs), change(a.macs, b.macs), f"from {count(a.macs)}"),
    ]
    if (latency := _latency(report)) is not None:
        tiles.append(("latency", f"{latency[1]:.3g} ms", change(*latency), f"from {latency[0]:.3g} ms"))
    if report.comparison is not None:
        worst = worst_of(report.comparison)
        top1 = "" if worst["top1"] is None else f", top-1 {worst['top1']:.1%}"
        tiles.append(("agreement", decibel(worst["sqnr_db"]), "", f"cosine {worst['cosine']:.5f}{top1}"))
    cells = "".join(
        f'<div class="tile"><p>{escape(label)}</p><b>{escape(value)}</b>'
        f'<p class="sub">{f"<i>{escape(delta)}</i> " if delta else ""}{escape(note)}</p></div>'
        for label, value, delta, note in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def bars(report: Report) -> list[tuple[str, float, float, str, str]]:
    """Rows of the chart: label, before, after (any unit, one per row), and both as text."""
    a, b = report.before, report.after
    rows: list[tuple[str, float, float, str, str]] = [
        ("Parameters", a.parameters, b.parameters, count(a.parameters), count(b.parameters)),
        ("Stored weights", a.bytes, b.bytes, size(a.bytes), size(b.bytes)),
        ("MACs per sample", a.macs, b.macs, count(a.macs), count(b.macs)),
    ]
    if (latency := _latency(report)) is not None:
        rows.append(("Latency", *latency, f"{latency[0]:.3g} ms", f"{latency[1]:.3g} ms"))
    if report.comparison is not None:
        worst = worst_of(report.comparison)
        rows.append(("Cosine with input model", 1.0, worst["cosine"], "1", f"{worst['cosine']:.5f}"))
        if worst["top1"] is not None:
            rows.append(("Top-1 agreement", 1.0, worst["top1"], "100%", f"{worst['top1']:.1%}"))
    return rows


def chart(rows: Sequence[tuple[str, float, float, str, str]]) -> str:
    """Horizontal bars, before over after, each pair on its own scale (the longer one fills the width)."""
    left, width, right, pitch, thick = 186, 430, 122, 46, 14
    height = pitch * len(rows) + 6
    parts = [f'<svg class="chart" viewBox="0 0 {left + width + right} {height}" role="img">']
    parts.append("<title>Parameters, size, work and quality before and after</title>")
    for i, (label, before, after, before_text, after_text) in enumerate(rows):
        y = i * pitch + 6
        top = max(before, after) or 1.0
        parts.append(f'<text class="label" x="{left - 12}" y="{y + 20}" text-anchor="end">{escape(label)}</text>')
        for j, (kind, value, text) in enumerate((("before", before, before_text), ("after", after, after_text))):
            long = max(1.0, width * max(0.0, value) / top) if math.isfinite(value) else 1.0
            at = y + j * (thick + 2)
            parts.append(f'<rect class="{kind}" x="{left}" y="{at}" width="{long:.1f}" height="{thick}" rx="3"/>')
            parts.append(f'<text class="value {kind}" x="{left + long + 7:.1f}" y="{at + 11}">{escape(text)}</text>')
    parts.append("</svg>")
    legend = '<p class="legend"><span class="key before"></span>before <span class="key after"></span>after</p>'
    return legend + "".join(parts)


# ---- passes -------------------------------------------------------------------------------------------------
def _overview(report: Report) -> str:
    head = ("pass", "contract", "measured", "parameters", "stored", "MACs", "time", "checks", "peak memory")
    rows = []
    for i, r in enumerate(report.passes, 1):
        share = r.after.bytes / report.before.bytes if report.before.bytes else 1.0
        meter = f'<span class="meter"><span style="width:{min(1.0, share):.1%}"></span></span>'
        rows.append(
            [
                f'<a href="#pass-{i}">{escape(r.name)}</a>',
                _badge(r.contract),
                escape(r.verdict),
                change(r.before.parameters, r.after.parameters),
                f"{change(r.before.bytes, r.after.bytes)} {meter}",
                change(r.before.macs, r.after.macs),
                f"{r.seconds:.2f} s",
                f"{r.check_seconds:.2f} s",
                "" if r.peak_bytes is None else size(r.peak_bytes),
            ]
        )
    return f'<div class="scroll">{_table(head, rows, numeric=range(3, 9))}</div>'


def _pass(i: int, record: PassRecord) -> str:
    options = "".join(f"<code>{escape(k)}={escape(v[:80])}</code> " for k, v in record.options.items())
    parts = [f'<p class="options">{options}</p>' if options else ""]
    if record.comparison is not None:
        parts.append(_errors(record))
    if record.layers:
        parts.append(_layers(record))
    if isinstance(record.details.get("quantization"), dict):
        parts.append(quantization(record.details["quantization"], _folded))
    if record.decisions:
        rows = [
            [f"<code>{escape(d.subject)}</code>", escape(d.action), escape(d.reason) + _data(d.data)]
            for d in in_order(record.decisions)
        ]
        parts.append(
            _folded(f"{len(rows)} decision{'s' if len(rows) > 1 else ''}", ("subject", "action", "reason"), rows)
        )
    extra = {k: v for k, v in record.details.items() if k not in ("groups", "latency", "quantization")}
    if extra:
        rows = [[escape(k), f"<code>{escape(_brief(v))}</code>"] for k, v in extra.items()]
        parts.append(_folded("details", ("", ""), rows))
    return f'<article id="pass-{i}"><h3>{escape(record.name)} {_badge(record.contract)}</h3>{"".join(parts)}</article>'


def _errors(record: PassRecord) -> str:
    assert record.comparison is not None
    head = ("output", "SQNR", "cosine", "max error", "relative", "top-1")
    rows = []
    for name, o in record.comparison["outputs"].items():
        one = worst_of({"outputs": {name: o}})
        rows.append(
            [
                f"<code>{escape(name)}</code>",
                decibel(one["sqnr_db"]),
                f"{one['cosine']:.6f}",
                f"{one['max_abs']:.3g}",
                f"{one['max_rel']:.2e}",
                "" if one["top1"] is None else f"{one['top1']:.1%}",
            ]
        )
    on = " and ".join(record.compared_on)
    return _folded(f"error per output, on {on} inputs", head, rows, numeric=range(1, 6))


def _layers(record: PassRecord) -> str:
    """Error per layer, as bars on a scale of 0 to 60 dB and beyond."""
    rows = []
    for item in record.layers:
        value = item["sqnr_db"]
        share = 1.0 if value is None else min(1.0, max(0.0, value) / 60)
        meter = f'<span class="meter wide"><span style="width:{share:.1%}"></span></span>'
        rows.append([f"<code>{escape(item['layer'])}</code>", escape(item["op"]), meter, decibel(value)])
    return _folded("error per layer (SQNR of its output)", ("layer", "op", "", "SQNR"), rows, numeric=[3])


def _data(data: dict[str, Any]) -> str:
    if not data:
        return ""
    text = ", ".join(f"{k} {_brief(v)}" for k, v in data.items())
    return f' <span class="data">{escape(text[:300])}</span>'


def _brief(value: Any) -> str:
    value = jsonable(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        text = ", ".join(map(_brief, value))
    elif isinstance(value, dict):
        text = ", ".join(f"{key} {_brief(item)}" for key, item in value.items())
    else:
        text = str(value)
    return text if len(text) <= 240 else text[:237] + "..."


def _groups(report: Report) -> str:
    parts = []
    for record in report.passes:
        groups = record.details.get("groups")
        if not groups:
            continue
        rows = []
        for g in sorted(groups, key=lambda g: g["kept"] == g["size"]):
            total, kept = int(g["size"]), int(g["kept"])
            share = kept / total if total else 1.0
            meter = f'<span class="meter wide"><span style="width:{share:.1%}"></span></span>'
            style = "same" if kept == total else "cut"
            label = f'<code class="{style}">{escape(str(g["name"]))}</code>'
            rows.append([label, meter, f"{kept} of {total}", escape(str(g.get("reason", "")))])
        kept_all = sum(1 for g in groups if g["kept"] == g["size"])
        summary = f"{record.name}: {len(groups)} groups, {len(groups) - kept_all} cut, {kept_all} kept whole"
        parts.append(_folded(summary, ("group", "kept", "", "why"), rows, numeric=[2]))
    return _section("Axis groups", "".join(parts))


# ---- the rest -----------------------------------------------------------------------------------------------
def _notes(report: Report) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return _section("Notes", f"<ul>{items}</ul>") if items else ""


def _model(report: Report) -> str:
    rows = []
    for side in ("inputs", "outputs"):
        for v in report.model[side]:
            shape = "?" if v["shape"] is None else " x ".join(map(str, v["shape"])) or "scalar"
            rows.append([side[:-1], f"<code>{escape(v['name'])}</code>", escape(shape), escape(v["dtype"])])
    versions = ", ".join(f"{k} {v}" for k, v in report.versions.items())
    table = _table(("", "name", "shape", "dtype"), rows)
    return f'<div class="scroll">{table}</div><p class="sub">{escape(versions)}</p>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Iterable[int] = ()) -> str:
    right = set(numeric)
    cell = ['<td class="n">' if i in right else "<td>" for i in range(len(head))]
    title = ['<th class="n">' if i in right else "<th>" for i in range(len(head))]
    heads = "".join(f"{t}{escape(h)}</th>" for t, h in zip(title, head, strict=True))
    lines = ["<tr>" + "".join(f"{c}{v}</td>" for c, v in zip(cell, row, strict=True)) + "</tr>" for row in rows[:ROWS]]
    more = f"<caption>{len(rows) - ROWS} more rows are in report.json</caption>" if len(rows) > ROWS else ""
    thead = f"<thead><tr>{heads}</tr></thead>" if any(head) else ""
    kind = "" if any(head) else ' class="facts"'
    return f"<table{kind}>{more}{thead}<tbody>{''.join(lines)}</tbody></table>"


def _folded(summary: str, head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Iterable[int] = ()) -> str:
    """A table that folds away, with a filter where it is long."""
    wide = len(rows) > OPEN
    box = '<input class="filter" type="search" placeholder="filter" aria-label="filter rows">' if wide else ""
    opened = "" if wide else " open"
    table = _table(head, rows, numeric)
    return f'<details{opened}><summary>{escape(summary)}</summary>{box}<div class="scroll">{table}</div></details>'
