"""The quantization section of the HTML page: error along the graph, layers, histograms on their grids."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

TOP_DB = 60.0
"""Full height of the chart along the graph; more is drawn as that."""
PICTURES = 12
"""Histograms shown: the layers that cost most."""
LEVELS = 40
"""Grids with up to this many levels inside the picture are drawn level by level."""

Table = Callable[..., str]


def section(found: Mapping[str, Any], folded: Table) -> str:
    """What ``details["quantization"]`` holds, as HTML; ``folded`` makes a table that folds away."""
    layers, points = list(found.get("layers") or ()), list(found.get("points") or ())
    if not layers and not points:
        return ""
    parts = [_along(points), _layers(layers, folded), _points(points, folded), _pictures(layers, points)]
    return "".join(part for part in parts if part)


def _db(value: float | None) -> str:
    if value is None:
        return "equal"
    return f"{value:.1f} dB" if math.isfinite(value) else "-"


def _type(item: Mapping[str, Any], prefix: str = "") -> str:
    """``int8``, or ``4 bits in int8`` where the type holds more than is used."""
    dtype, bits = str(item[f"{prefix}dtype"]), item.get(f"{prefix}bits")
    whole = "".join(c for c in dtype if c.isdigit()) if dtype.startswith(("int", "uint")) else ""
    return f"{bits} bits in {dtype}" if whole and bits is not None and bits < int(whole) else dtype


def _meter(value: float | None) -> str:
    share = 1.0 if value is None else min(1.0, max(0.0, value / TOP_DB)) if math.isfinite(value) else 0.0
    return f'<span class="meter wide"><span style="width:{share:.1%}"></span></span>'


def _along(points: Sequence[Mapping[str, Any]]) -> str:
    """SQNR of every point in graph order: of the pair alone, and of everything up to it."""
    known = [p for p in points if p["accumulated_db"] is None or math.isfinite(p["accumulated_db"])]
    if len(known) < 2:
        return ""
    left, width, height, top = 46, 680, 190, 10

    def x(i: int) -> float:
        return left + width * i / (len(known) - 1)

    def y(value: float | None) -> float:
        db = TOP_DB if value is None else min(max(value, 0.0), TOP_DB)
        return top + height * (1 - db / TOP_DB)

    parts = [f'<svg class="chart" viewBox="0 0 {left + width + 12} {height + top + 34}" role="img">']
    parts.append("<title>Signal to quantization noise along the graph</title>")
    for db in range(0, int(TOP_DB) + 1, 20):
        at = y(db)
        parts.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="value" x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{db} dB</text>')
    for kind, key in (("before", "own_db"), ("after", "accumulated_db")):
        line = " ".join(f"{x(i):.1f},{y(p[key]):.1f}" for i, p in enumerate(known))
        parts.append(f'<polyline class="line {kind}" points="{line}"/>')
    for i, p in enumerate(known):
        said = f"{p['name']}: {_db(p['own_db'])} alone, {_db(p['accumulated_db'])} with all before it"
        parts.append(
            f'<circle class="dot" cx="{x(i):.1f}" cy="{y(p["accumulated_db"]):.1f}" r="3.5">'
            f"<title>{escape(said)}</title></circle>"
        )
    foot = height + top + 22
    parts.append(f'<text class="value" x="{left}" y="{foot}">{escape(str(known[0]["name"]))}</text>')
    parts.append(
        f'<text class="value" x="{left + width}" y="{foot}" text-anchor="end">{escape(str(known[-1]["name"]))}</text>'
    )
    legend = (
        '<p class="legend"><span class="key before"></span>each Q/DQ pair alone '
        '<span class="key after"></span>all errors up to there</p>'
    )
    return f"<h4>Signal to noise along the graph</h4>{legend}{''.join(parts)}</svg>"


def _layers(layers: Sequence[Mapping[str, Any]], folded: Table) -> str:
    rows = []
    for item in layers:
        rank = item.get("sensitivity_db")
        rows.append(
            [
                f"<code>{escape(str(item['layer']))}</code>",
                escape(f"{item['op']}, {_type(item, 'weight_')}"),
                _db(item["weight_db"]),
                "float" if item["input_db"] is None else _db(item["input_db"]),
                _meter(item["output_db"]),
                _db(item["output_db"]),
                "" if rank is None else _db(rank),
            ]
        )
    if not rows:
        return ""
    head = ("layer", "op, weight", "weight", "input", "output", "", "outputs, this weight alone")
    return folded(f"{len(rows)} quantized layers (SQNR)", head, rows, numeric=[2, 3, 5, 6])


def _points(points: Sequence[Mapping[str, Any]], folded: Table) -> str:
    rows = [
        [
            f"<code>{escape(str(p['name']))}</code>",
            escape(_type(p)),
            f"{p['low']:.3g} .. {p['high']:.3g}",
            f"{p['clipped']:.2%}",
            f"{p['used']:.0%}",
            _db(p["own_db"]),
            _db(p["accumulated_db"]),
        ]
        for p in points
    ]
    if not rows:
        return ""
    head = ("value", "type", "seen", "clipped", "grid used", "alone", "accumulated")
    return folded(f"{len(rows)} quantized activations", head, rows, numeric=range(2, 7))


def _pictures(layers: Sequence[Mapping[str, Any]], points: Sequence[Mapping[str, Any]]) -> str:
    def badness(item: Mapping[str, Any]) -> float:
        value = item.get("sensitivity_db")
        value = item["output_db"] if value is None else value
        return math.inf if value is None else float(value)

    by_name = {p["name"]: p for p in points}
    shown = []
    for item in sorted(layers, key=badness)[:PICTURES]:
        if item.get("weight_histogram"):
            shown.append(_histogram(f"{item['layer']}, weight", item["weight_histogram"], item["weight_db"]))
        point = by_name.get(item.get("input"))
        if point is not None and point.get("histogram"):
            shown.append(_histogram(f"{item['layer']}, input", point["histogram"], point["own_db"]))
    if not shown:
        return ""
    note = "counts on a logarithmic scale, in steps of the grid; shaded: outside the grid, where values are clipped"
    return (
        f"<details open><summary>histograms of the {min(PICTURES, len(layers))} most sensitive layers</summary>"
        f'<p class="sub">{note}</p><div class="pictures">{"".join(shown)}</div></details>'
    )


def _histogram(title: str, data: Mapping[str, Any], db: float | None) -> str:
    width, height, head = 220, 84, 18
    start, stop = float(data["start"]), float(data["stop"])
    first, last = float(data["first"]), float(data["last"])
    low, high = min(start, max(first, start - 1)), max(stop, min(last, stop + 1))
    span = (high - low) or 1.0
    counts = [math.log1p(c) for c in data["counts"]]
    top = max(counts) or 1.0

    def x(value: float) -> float:
        return width * (value - low) / span

    bar = (stop - start) / len(counts)
    parts = [f'<svg class="picture" viewBox="0 0 {width} {height + head + 14}" role="img">']
    parts.append(f"<title>{escape(title)}: {_db(db)}</title>")
    label = title if len(title) <= 34 else "..." + title[-31:]
    parts.append(f'<text class="label" x="0" y="11">{escape(label)}</text>')
    for a, b in ((low, first - 0.5), (last + 0.5, high)):
        if b > a:
            parts.append(f'<rect class="out" x="{x(a):.1f}" y="{head}" width="{x(b) - x(a):.1f}" height="{height}"/>')
    levels = range(math.ceil(max(low, first)), math.floor(min(high, last)) + 1)
    if len(levels) <= LEVELS:
        parts += [
            f'<line class="grid" x1="{x(v):.1f}" x2="{x(v):.1f}" y1="{head}" y2="{head + height}"/>' for v in levels
        ]
    for i, value in enumerate(counts):
        if value:
            tall = max(1.0, height * value / top)
            at = x(start + i * bar)
            wide = max(0.8, x(start + (i + 1) * bar) - at - 0.4)
            y = head + height - tall
            parts.append(f'<rect class="after" x="{at:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}"/>')
    foot = head + height + 11
    parts.append(f'<text class="value" x="0" y="{foot}">{low:.0f}</text>')
    parts.append(f'<text class="value" x="{width}" y="{foot}" text-anchor="end">{high:.0f}</text>')
    parts.append(f'<text class="value" x="{width / 2}" y="{foot}" text-anchor="middle">{_db(db)}</text></svg>')
    return f"<figure>{''.join(parts)}</figure>"
