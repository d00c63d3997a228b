"""Style and script of the HTML report, kept inside the page: it loads nothing."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #f6f7f9; --card: #ffffff; --ink: #171c24; --soft: #5b6675; --line: #e1e5ea;
  --before: #b4bdc9; --after: #1f6feb; --after-ink: #1558c0;
  --exact: #0f7b4b; --exact-bg: #dff5e9; --approximate: #8a5a00; --approximate-bg: #fdf0d3;
  --fresh: #6f3fc4; --fresh-bg: #eee6fc;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #10141a; --card: #181e26; --ink: #e7ebf0; --soft: #98a3b2; --line: #2a323d;
    --before: #4d5868; --after: #58a0ff; --after-ink: #8fc0ff;
    --exact: #63d9a0; --exact-bg: #123526; --approximate: #f0bf5f; --approximate-bg: #3a2d0e;
    --fresh: #c3a2ff; --fresh-bg: #2e2150;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 36px 24px 64px; }
h1 { font-size: 30px; line-height: 1.15; margin: 2px 0 6px; letter-spacing: -0.02em; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 14px; letter-spacing: -0.01em; }
h3 { font-size: 15px; margin: 0 0 8px; display: flex; gap: 10px; align-items: center; }
a { color: var(--after-ink); text-decoration: none; }
a:hover { text-decoration: underline; }
code { font: 12.5px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: break-word; }
.brand { margin: 0; color: var(--after-ink); font-weight: 650; letter-spacing: 0.01em; }
.brand span { color: var(--soft); font-weight: 400; }
.lede, .sub, .legend { color: var(--soft); margin: 0; }
.sub { font-size: 13px; }
.steps { list-style: none; display: flex; flex-wrap: wrap; gap: 6px; padding: 0; margin: 14px 0 0; }
.steps li + li::before { content: "\\2192"; color: var(--soft); margin-right: 6px; }
.badge { display: inline-block; padding: 1px 9px; border-radius: 99px; font-size: 12.5px; font-weight: 550;
  background: var(--line); }
.badge.exact { color: var(--exact); background: var(--exact-bg); }
.badge.approximate { color: var(--approximate); background: var(--approximate-bg); }
.badge.fresh { color: var(--fresh); background: var(--fresh-bg); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(168px, 1fr)); gap: 12px; margin: 24px 0 0; }
.tile, section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.tile { padding: 14px 16px; }
.tile p { margin: 0; color: var(--soft); font-size: 13px; }
.tile b { display: block; font-size: 23px; line-height: 1.3; letter-spacing: -0.02em; font-weight: 620; }
.tile i { font-style: normal; font-weight: 620; color: var(--after-ink); }
section { padding: 20px 22px; margin-top: 16px; }
article { border-top: 1px solid var(--line); padding-top: 16px; margin-top: 16px; }
.options { margin: 0 0 8px; color: var(--soft); }
.options code { background: var(--paper); border-radius: 5px; padding: 1px 6px; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 13.5px; }
th { text-align: left; color: var(--soft); font-weight: 500; font-size: 12.5px; white-space: nowrap; }
th, td { padding: 6px 14px 6px 0; vertical-align: top; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th:last-child, td:last-child { padding-right: 0; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
caption { caption-side: bottom; text-align: left; color: var(--soft); padding-top: 8px; }
.facts td:first-child { width: 1%; white-space: nowrap; color: var(--soft); }
.facts code { overflow-wrap: anywhere; }
.data { color: var(--soft); font-size: 12.5px; }
.same { color: var(--soft); }
details { margin-top: 10px; }
summary { cursor: pointer; color: var(--soft); font-size: 13.5px; padding: 2px 0; }
summary:hover { color: var(--ink); }
.filter { font: inherit; font-size: 13.5px; width: 260px; max-width: 100%; margin: 8px 0 4px; padding: 4px 10px;
  color: inherit; background: var(--paper); border: 1px solid var(--line); border-radius: 7px; }
.meter { display: inline-block; width: 56px; height: 7px; border-radius: 4px; background: var(--line);
  overflow: hidden; vertical-align: 1px; margin-left: 6px; }
.meter.wide { width: 150px; margin-left: 0; }
.meter span { display: block; height: 100%; background: var(--after); border-radius: 4px; }
.legend { font-size: 13px; margin-bottom: 8px; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin: 0 4px 0 10px; }
.key:first-child { margin-left: 0; }
.key.before { background: var(--before); }
.key.after { background: var(--after); }
.chart { display: block; width: 100%; max-width: 820px; height: auto; }
.chart text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--soft); }
.chart .label { fill: var(--ink); font-size: 13px; }
.chart rect.before { fill: var(--before); }
.chart rect.after { fill: var(--after); }
.chart .value.after { fill: var(--ink); font-weight: 600; }
.chart .grid, .picture .grid { stroke: var(--line); stroke-width: 1; }
.chart .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.chart .line.before { stroke: var(--before); }
.chart .line.after { stroke: var(--after); }
.chart .dot { fill: var(--after); }
h4 { font-size: 13.5px; margin: 12px 0 4px; font-weight: 600; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 14px; margin-top: 10px; }
.pictures figure { margin: 0; }
.picture { display: block; width: 100%; height: auto; }
.picture text { font: 10.5px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--soft); }
.picture .label { fill: var(--ink); font-size: 11.5px; }
.picture rect.after { fill: var(--after); }
.picture rect.out { fill: var(--approximate-bg); }
ul { margin: 0; padding-left: 20px; }
@media print { body { background: #fff; } section, .tile { break-inside: avoid; } }
"""

SCRIPT = """
for (const box of document.querySelectorAll(".filter"))
  box.addEventListener("input", () => {
    const wanted = box.value.toLowerCase();
    for (const row of box.parentElement.querySelectorAll("tbody tr"))
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
for (const link of document.querySelectorAll('a[href^="#pass-"]'))
  link.addEventListener("click", () => {
    for (const part of document.querySelectorAll(link.getAttribute("href") + " details")) part.open = true;
  });
"""
