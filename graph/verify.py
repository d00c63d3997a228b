"""Equivalence of two graphs: error measures per output, and the first value that diverges."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import ConstraintError
from .execute import run_graph
from .ir import Graph, Value

TAP_BYTES = 256 << 20
"""Inner values are tapped in lots of about this many bytes, so that looking for a divergence needs no more."""


@dataclass
class OutputComparison:
    """How one output of ``after`` differs from that of ``before``, over all inputs given.

    Attributes:
        name: of the output (in ``before``).
        sqnr_db: signal to noise, 10 log10(sum a^2 / sum (a - b)^2) in decibel; inf when equal.
        cosine: of the two tensors taken as vectors; 1 when both are zero.
        max_abs: largest |a - b|.
        max_rel: largest over the inputs of max |a - b| / max |a|.
        top1: share of equal argmax positions along the last axis; None where that axis has one element or none.
        note: why the two cannot be compared (shapes differ, NaN on one side only), else empty.
    """

    name: str
    sqnr_db: float = math.inf
    cosine: float = 1.0
    max_abs: float = 0.0
    max_rel: float = 0.0
    top1: float | None = None
    note: str = ""


@dataclass
class Comparison:
    """What :func:`compare` found.

    Attributes:
        ok: every output agrees within ``rtol`` (``max_rel``) and nothing was incomparable.
        outputs: per output name.
        first_divergence: name of the first inner value that differs; None when ok, or when no value of that name
            exists in both graphs with the same shape.
    """

    ok: bool
    rtol: float
    outputs: dict[str, OutputComparison] = field(default_factory=dict)
    first_divergence: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: infinities and NaN are None (an infinite SQNR means equal: ``max_abs`` is 0)."""

        def plain(x: Any) -> Any:
            return None if isinstance(x, float) and not math.isfinite(x) else x

        return {
            "ok": self.ok,
            "rtol": self.rtol,
            "first_divergence": self.first_divergence,
            "outputs": {k: {f: plain(x) for f, x in vars(o).items()} for k, o in self.outputs.items()},
        }


@dataclass
class _Sums:
    signal: float = 0.0
    noise: float = 0.0
    other: float = 0.0
    dot: float = 0.0
    max_abs: float = 0.0
    max_rel: float = 0.0
    agree: int = 0
    rows: int = 0
    note: str = ""

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        if a.shape != b.shape:
            self.note = self.note or f"shape {a.shape} became {b.shape}"
            return
        if a.size == 0:
            return
        max_abs, max_rel, note = difference(a, b)
        self.max_abs, self.max_rel = max(self.max_abs, max_abs), max(self.max_rel, max_rel)
        self.note = self.note or note
        x, y = _finite(a).ravel(), _finite(b).ravel()
        d = x - y
        self.signal += float(np.vdot(x, x).real)
        self.other += float(np.vdot(y, y).real)
        self.noise += float(np.vdot(d, d).real)
        self.dot += float(np.vdot(x, y).real)
        if a.ndim >= 1 and a.shape[-1] > 1 and a.dtype != np.bool_ and not np.iscomplexobj(a):
            same = _finite(a).argmax(-1) == _finite(b).argmax(-1)
            self.agree += int(np.count_nonzero(same))
            self.rows += int(np.size(same))

    def finish(self, name: str) -> OutputComparison:
        if self.noise == 0:
            sqnr = math.inf
        else:
            sqnr = 10 * math.log10(self.signal / self.noise) if self.signal > 0 else -math.inf
        norm = math.sqrt(self.signal) * math.sqrt(self.other)
        both_zero = self.signal == 0 and self.other == 0
        cosine = self.dot / norm if norm > 0 else (1.0 if both_zero else 0.0)
        top1 = self.agree / self.rows if self.rows else None
        if self.note:
            sqnr = -math.inf if self.note.startswith("shape") else sqnr
        return OutputComparison(name, sqnr, cosine, self.max_abs, self.max_rel, top1, self.note)


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def _finite(x: np.ndarray) -> np.ndarray:
    return np.nan_to_num(_wide(x), nan=0.0, posinf=0.0, neginf=0.0)


def difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float, str]:
    """``max |a - b|``, the same over ``max |a|``, and a note; equal NaN and infinities at equal places agree.

    Where ``a`` is all zero, the relative error is 0 or inf. Shapes must be equal.
    """
    x, y = _wide(a), _wide(b)
    finite = np.isfinite(x)
    if not np.array_equal(finite, np.isfinite(y)) or not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return math.inf, math.inf, "NaN or infinity on one side only"
    if not finite.any():
        return 0.0, 0.0, ""
    x, y = x[finite], y[finite]
    max_abs = float(np.abs(x - y).max())
    scale = float(np.abs(x).max())
    return max_abs, max_abs / scale if scale > 0 else (0.0 if max_abs == 0 else math.inf), ""


def compare(before: Graph, after: Graph, inputs: Iterable[Mapping[str, np.ndarray]], rtol: float = 1e-5) -> Comparison:
    """Run both graphs on the same inputs and compare outputs, by position.

    Args:
        before, after: graphs with the same inputs (by name) and number of outputs; they may be of different kinds.
        inputs: one dictionary per run, as :func:`~foldline.graph.execute.run_graph` takes.
        rtol: bound on ``max |a - b| / max |a|`` per output and run.

    Raises:
        ConstraintError: the numbers of outputs differ, or there are no inputs to run.
    """
    if len(before.outputs) != len(after.outputs):
        raise ConstraintError(
            "the two graphs have different numbers of outputs",
            expected=[v.name for v in before.outputs],
            found=[v.name for v in after.outputs],
        )
    sums = [_Sums() for _ in before.outputs]
    failing: Mapping[str, np.ndarray] | None = None
    count = 0
    for arrays in inputs:
        count += 1
        a_list, _ = run_graph(before, arrays)
        b_list, _ = run_graph(after, arrays)
        for total, a, b in zip(sums, a_list, b_list, strict=True):
            total.add(a, b)
        if failing is None and any(s.max_rel > rtol or s.note for s in sums):
            failing = dict(arrays)
    if count == 0:
        raise ConstraintError("nothing to compare on", expected="at least one dictionary of inputs", found="none")
    outputs = {v.name: s.finish(v.name) for v, s in zip(before.outputs, sums, strict=True)}
    first = None if failing is None else first_divergence(before, after, failing, rtol)
    return Comparison(failing is None, rtol, outputs, first)


def _shared(before: Graph, after: Graph) -> list[Value]:
    """Computed values, in the topological order of ``before``, that exist by name in both."""
    found = []
    for node in before.nodes:
        for v in node.outputs:
            twin = after.values.get(v.name)
            if twin is not None and not twin.is_const and not twin.is_input:
                found.append(v)
    return found


def _lots(values: Sequence[Value]) -> Iterable[list[str]]:
    lot: list[str] = []
    size = 0
    for v in values:
        need = 8 * math.prod(v.hint) if v.hint is not None else 1 << 20
        if lot and size + need > TAP_BYTES:
            yield lot
            lot, size = [], 0
        lot.append(v.name)
        size += need
    if lot:
        yield lot


def first_divergence(before: Graph, after: Graph, arrays: Mapping[str, np.ndarray], rtol: float = 1e-5) -> str | None:
    """Name of the first value, in topological order, that both graphs have and that differs by more than ``rtol``.

    Values whose shapes differ (after pruning) are passed over. None if no such value exists.
    """
    for lot in _lots(_shared(before, after)):
        _, a = run_graph(before, arrays, lot)
        _, b = run_graph(after, arrays, lot)
        for name in lot:
            if a[name].shape == b[name].shape and a[name].size and difference(a[name], b[name])[1] > rtol:
                return name
    return None
