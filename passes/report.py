"""The report: what each pass promised, did, cost and measured, and why each part became what it is."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

from ..graph.errors import ConstraintError
from .base import Decision, nearest

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class CostSummary:
    """Totals of one graph: elements of parameters, bytes of stored tensors, multiply-accumulates per sample."""

    parameters: int
    bytes: int
    macs: int

    @classmethod
    def of(cls, cost: Any) -> CostSummary:
        return cls(int(cost.parameters), int(cost.bytes), int(cost.macs))


@dataclass
class PassRecord:
    """One pass of a run.

    Attributes:
        name, options: of the pass, options as text where they differ from the default.
        contract, needs: what it promised and needed.
        seconds: wall time of the pass itself; check_seconds: of verification and cost counting after it.
        peak_bytes: highest resident memory of the process during the pass; None where the system does not tell.
        before, after: cost on either side.
        comparison: ``Comparison.to_dict()`` of input and output graph on the inputs named in ``compared_on``;
            None when nothing was compared (``why_not`` says why).
        decisions, details: what the pass said.
        layers: ``{name, layer, op, sqnr_db}``: error of each layer's output against the graph before the pass.
        selected: per weight and axis, how many indices were kept, and of how many.
    """

    name: str
    options: dict[str, str]
    contract: str
    needs: str
    before: CostSummary
    after: CostSummary
    seconds: float = 0.0
    check_seconds: float = 0.0
    peak_bytes: int | None = None
    comparison: dict[str, Any] | None = None
    compared_on: list[str] = field(default_factory=list)
    why_not: str = ""
    decisions: list[Decision] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    selected: dict[str, dict[int, tuple[int, int]]] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """One phrase: verified, or the error measured, or why nothing was measured."""
        if self.comparison is None:
            return self.why_not or "not measured"
        worst = worst_of(self.comparison)
        if self.contract == "exact":
            return "verified, " + (f"error {worst['max_rel']:.1e}" if worst["max_rel"] else "identical")
        if worst["max_abs"] == 0:
            return "identical"
        top1 = "" if worst["top1"] is None else f", top-1 {worst['top1']:.1%}"
        return f"{decibel(worst['sqnr_db'])}, cosine {worst['cosine']:.4f}{top1}"


@dataclass
class Report:
    """What a pipeline did to a model.

    Attributes:
        pipeline, seed, verify: of the run.
        model: ``{name, kind, inputs, outputs}`` of the model that came in.
        versions: of foldline and the libraries that did the work.
        passes: one record per pass, in order.
        before, after: cost of the model that came in and of the one that went out.
        comparison: the model that went out against the one that came in, as in :class:`PassRecord`.
        notes: what the reader must know (what could not be saved, captured, measured).
        names: every layer, node and weight of the model that came in, so that ``explain`` knows a misspelling.
    """

    pipeline: str
    seed: int
    verify: bool
    model: dict[str, Any]
    versions: dict[str, str]
    before: CostSummary
    after: CostSummary
    passes: list[PassRecord] = field(default_factory=list)
    comparison: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    names: frozenset[str] = field(default_factory=frozenset, repr=False)

    def to_dict(self, times: bool = True) -> dict[str, Any]:
        """Plain data for JSON. Without ``times`` (times and memory) it is the same for the same model and seed."""
        passes = []
        for record in self.passes:
            item = {k: jsonable(v) for k, v in vars(record).items() if k not in ("decisions", "details", "selected")}
            if not times:
                for key in ("seconds", "check_seconds", "peak_bytes"):
                    del item[key]
            item["verdict"] = record.verdict
            item["decisions"] = jsonable(record.decisions)
            item["details"] = jsonable(record.details)
            passes.append(item)
        top = ("pipeline", "seed", "verify", "model", "versions", "before", "after", "comparison", "notes")
        return {**{key: jsonable(getattr(self, key)) for key in top}, "passes": passes}

    def to_json(self, times: bool = True) -> str:
        """:meth:`to_dict` as JSON text (UTF-8, two spaces)."""
        return json.dumps(self.to_dict(times), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def explain(self, name: str) -> str:
        """What happened to a layer, node, weight or axis group, pass by pass, and why.

        Args:
            name: any name of the model or of a decision; a module path also finds what lies inside it.

        Raises:
            ConstraintError: neither the model nor any pass knows the name (the nearest one is named).
        """
        lines = [name]
        for record in self.passes:
            found = [d for d in record.decisions if _concerns(d, name)]
            said = [f"    {d.subject}: {d.action}, because {d.reason}" for d in found]
            for weight, axes in record.selected.items():
                if _within(weight, name):
                    said += [f"    {weight}: axis {axis} keeps {kept} of {size}" for axis, (kept, size) in axes.items()]
            said += [
                f"    {item['name']}: output at {decibel(item['sqnr_db'])}"
                for item in record.layers
                if name in (item["name"], item["layer"]) or _within(item["layer"], name)
            ]
            if said:
                lines += [f"  {record.name} ({record.contract}):", *said]
        if len(lines) > 1:
            return "\n".join(lines)
        if any(_within(known, name) for known in self.names):
            done = ", ".join(record.name for record in self.passes)
            return f"{name}\n  nothing happened to it ({done} said nothing about it)"
        subjects = {d.subject for record in self.passes for d in record.decisions}
        close = nearest(name, sorted(self.names | subjects))
        raise ConstraintError(
            "neither the model nor any pass knows this name",
            node=name,
            found=name,
            hint=f"did you mean {close!r}?" if close else "`foldline inspect MODEL` lists the names",
        )

    def html(self) -> str:
        """One self-contained page, without any external resource."""
        from .report_html import page

        return page(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from .report_text import tables

        yield from tables(self, options.max_width)

    def __str__(self) -> str:
        import io

        from rich.console import Console

        stream = io.StringIO()
        Console(file=stream, width=118, no_color=True).print(self)
        return stream.getvalue().rstrip("\n")


def in_order(decisions: Iterable[Decision]) -> list[Decision]:
    """What was done before what was left alone: there is more of the latter, and it is rarely the question."""
    return sorted(decisions, key=lambda d: d.action.startswith("kept"))


def _within(name: str, scope: str) -> bool:
    """Whether ``name`` is ``scope``, or a part, an axis (``weight[0]``) or a group (``weight:0``) of it."""
    return name == scope or (name.startswith(scope) and name[len(scope)] in ".[:")


def _concerns(decision: Decision, name: str) -> bool:
    """Whether a decision is about ``name``, about something inside it, about what holds it, or mentions it."""
    if _within(decision.subject, name) or _within(name, decision.subject):
        return True
    return any(_within(text, name) or _within(name, text) for text in _texts(decision.data))


def _texts(data: Any) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping):
        for key, item in data.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(data, Iterable) and not isinstance(data, (np.ndarray, bytes)):
        for item in data:
            yield from _texts(item)


def worst_of(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """The worst of each error measure over all outputs; an SQNR of None means equal, -inf that nothing agrees."""
    outputs = list(comparison["outputs"].values())
    sqnr = [o["sqnr_db"] if o["sqnr_db"] is not None or o["max_abs"] == 0 else -math.inf for o in outputs]
    finite = [value for value in sqnr if value is not None]
    top1 = [o["top1"] for o in outputs if o["top1"] is not None]
    return {
        "sqnr_db": min(finite, default=None),
        "cosine": min((o["cosine"] for o in outputs), default=1.0),
        "max_abs": max((math.inf if o["max_abs"] is None else o["max_abs"] for o in outputs), default=0.0),
        "max_rel": max((math.inf if o["max_rel"] is None else o["max_rel"] for o in outputs), default=0.0),
        "top1": min(top1, default=None),
    }


def decibel(value: float | None) -> str:
    """An SQNR as :func:`worst_of` gives it."""
    if value is None:
        return "identical"
    return "no agreement" if math.isinf(value) else f"{value:.1f} dB"


def jsonable(value: Any) -> Any:
    """Anything a pass may put in decisions and details, as plain JSON data; infinities and NaN become None."""
    if isinstance(value, Enum):
        return jsonable(value.value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (np.integer, np.bool_)):
        return value.item()
    if isinstance(value, np.ndarray):
        return jsonable(value.tolist())
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return [jsonable(v) for v in sorted(value, key=str)]
    if isinstance(value, (list, tuple, range)):
        return [jsonable(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "to_dict"):
        return jsonable(value.to_dict())
    if hasattr(value, "model_dump"):
        return jsonable(value.model_dump())
    return str(value)


def count(value: float, unit: str = "") -> str:
    """A count in four significant places with a decimal prefix: ``11.69 M``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}".rstrip()


def size(value: float) -> str:
    """Bytes with a binary prefix: ``44.6 MiB``."""
    for factor, prefix in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= factor:
            return f"{value / factor:.4g} {prefix}"
    return f"{value:.0f} B"


def change(before: float, after: float) -> str:
    """``-50.2%``, ``+1.3%`` or ``=``."""
    if before == after:
        return "="
    return "new" if before == 0 else f"{(after - before) / before:+.1%}"
