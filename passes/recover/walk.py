"""One walk through the pruned network beside the original that corrects every layer in closed form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...graph.actions import Plan, groups_of_plan
from ...graph.analysis import Resize
from ...graph.errors import ConstraintError
from ...graph.groups import axis_groups
from ...graph.ir import Graph, Node, Value
from ..base import Decision, Progress, Reference, no_progress
from .layers import (
    LINEAR,
    NORM_GAINS,
    UNSUPPORTED,
    LinearOp,
    linear_op,
    norm_factor,
    own_vector,
    residual_sum,
    shift_sink,
)
from .runner import bound, runner
from .solve import Normal, Solution, solve

SAME = 1e-6
"""Relative error up to which an output counts as the original's: rounding."""
ROWS_PER_COLUMN = 8
"""Rows drawn at least per column of a Gram matrix, where there are so many."""


@dataclass
class Settings:
    """How the walk corrects.

    Attributes:
        ridge: relative to the mean diagonal of a layer's Gram matrix, or "auto" (chosen on rows left out).
        rows: rows (output positions, tokens) per layer that enter the Gram matrices, more for wide layers
            (``ROWS_PER_COLUMN``); drawn by ``seed``.
        sums: whether the last operator of a residual branch aims at the original sum.
        norms: whether normalizations whose input differs are re-estimated.
    """

    ridge: float | str = "auto"
    rows: int = 20_000
    sums: bool = True
    norms: bool = True
    seed: int = 0
    progress: Progress = no_progress


@dataclass
class Walk:
    """What the walk did: decisions, and per corrected layer its relative error before and after."""

    decisions: list[Decision] = field(default_factory=list)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)


class Kept:
    """Which positions of the original's values the pruned network kept."""

    def __init__(self, graph: Graph, plan: Plan) -> None:
        groups = axis_groups(graph)
        chosen = groups_of_plan(groups, plan)
        self._resize = Resize(groups.analysis, {g.atom: k for g, k in chosen.items()})
        self._values = groups.graph.values

    def positions(self, value: Value | None, axis: int) -> np.ndarray | None:
        """The positions kept along one axis of an original value; None where all of them were."""
        own = None if value is None else self._values.get(value.name)
        if own is None or own not in self._resize.analysis.spaces or not self._resize.touched(own, axis):
            return None
        return self._resize.kept(own, axis)

    def take(self, value: Value, tensor: Tensor) -> Tensor:
        """The original's tensor of a value, cut to what was kept of it."""
        own = self._values[value.name]
        if own not in self._resize.analysis.spaces:
            return tensor
        for axis in range(tensor.dim()):
            if self._resize.touched(own, axis):
                tensor = tensor.index_select(axis, torch.from_numpy(self._resize.kept(own, axis)))
        return tensor


def walk(graph: Graph, reference: Reference, batches: Iterable[Any], settings: Settings) -> Walk:
    """Correct ``graph`` in place so that each of its layers gives, on its own corrected inputs, what the original
    gives at the positions kept.

    Memory: the live values of both networks for all batches at once, plus one layer's Gram matrices.

    Raises:
        ConstraintError: the graph was rewritten since the cut, or a batch does not fit.
        UnsupportedOp: an ONNX operator has no torch implementation.
    """
    original = reference.graph.clone()
    check_same_layers(graph, original)
    fed = bound(graph, batches)
    with torch.no_grad():
        return _Walker(graph, original, Kept(original, reference.plan), settings).run(fed)


def check_same_layers(graph: Graph, original: Graph) -> None:
    """Nodes correspond by name: refuse a graph that was rewritten since the cut."""
    kinds = (*LINEAR, *NORM_GAINS, "batch_norm")
    here, there = ({n.name: n.op for n in g.nodes if n.op in kinds} for g in (graph, original))
    odd = sorted({k for k in {*here, *there} if here.get(k) != there.get(k)})
    if odd:
        raise ConstraintError(
            "the model was rewritten between the cut and its recovery",
            node=odd[0],
            expected=there.get(odd[0], "no such node"),
            found=here.get(odd[0], "no such node"),
            hint="recover right after pruning, fold before pruning or after recovery",
        )


class _Walker:
    def __init__(self, graph: Graph, original: Graph, kept: Kept, settings: Settings) -> None:
        self.graph, self.original, self.kept, self.settings = graph, original, kept, settings
        self.here, self.there = runner(graph, LINEAR), runner(original, LINEAR)
        self.twins = {n.name: n for n in original.nodes}
        self.found = Walk()

    def run(self, batches: list[dict[str, Any]]) -> Walk:
        self.here.start(batches)
        self.there.start(batches)
        treated = [n for n in self.graph.nodes if n.op in (*LINEAR, *NORM_GAINS, *UNSUPPORTED, "batch_norm")]
        treated.sort(key=lambda n: -1 if (at := self.here.position(n)) is None else at)
        for node in self.settings.progress(treated, "recovering"):
            self._visit(node)
        return self.found

    def _visit(self, node: Node) -> None:
        twin = self.twins[node.name]
        at, there = self.here.position(node), self.there.position(twin)
        if at is None or there is None:
            return
        self.there.advance(there + 1)
        self.here.advance(at + 1)
        wanted, now = self.there.values(twin.output), self.here.values(node.output)
        if wanted is None or now is None:
            return
        wanted = [self.kept.take(twin.output, y) for y in wanted]
        error = relative_error(wanted, now)
        if error <= SAME:
            return
        if node.op in LINEAR:
            done = self._linear(node, wanted, now)
        elif node.op in UNSUPPORTED:
            done = any(v is not None and v.is_const for v in node.inputs) and self._left(node, "no rule for this op")
        else:
            done = self.settings.norms and self._norm(node, wanted, now)
        if done:
            self.here.repeat()

    def _left(self, node: Node, reason: str) -> bool:
        weight = next((v.weight.name for v in node.inputs if v is not None and v.weight is not None), node.name)
        self.found.decisions.append(Decision(weight, "left", reason))
        return False

    def _record(self, name: str, what: str, solution: Solution, rows: int) -> None:
        self.found.errors[name] = (solution.before, solution.after)
        data = {"before": solution.before, "after": solution.after, "ridge": solution.ridge, "rows": rows}
        self.found.decisions.append(
            Decision(
                name, "corrected", f"{what}: error {solution.before:.3g} -> {solution.after:.3g} of the variance", data
            )
        )

    # ---- linear operators ----------------------------------------------------------------------------------------
    def _linear(self, node: Node, wanted: list[Tensor], now: list[Tensor]) -> bool:
        op = linear_op(node)
        if isinstance(op, str):
            return self._left(node, op)
        inputs = self.here.values(op.data)
        weight = op.weight.weight
        assert inputs is not None and weight is not None
        sink = shift_sink(op)
        targets = self._sum_targets(op, wanted) if self.settings.sums else None
        what = "aims at the sum with the skip" if targets is not None else "aims at the original output"
        targets = wanted if targets is None else targets
        data = weight.numpy()
        old = op.matrix(data)
        constant = self._bias(node, old)
        folds = self._normal(op, inputs, targets, constant, old)
        solution = solve(folds, old, self.settings.ridge, sink is not None)
        if not solution.after < solution.before:
            return self._left(node, "least squares finds nothing better")
        self.here.set_weight(op.weight, op.tensor(solution.matrix, data))
        if sink is not None:
            self.here.set_weight(sink.value, sink.shifted(solution.shift.reshape(-1).numpy()))
        self._record(weight.name, what, solution, sum(f.rows for f in folds))
        return True

    def _bias(self, node: Node, old: Tensor) -> Tensor:
        """What the operator adds to its product, [G, O] float64; exporters may leave it to be computed at run time."""
        bias = node.input(2)
        made = None if bias is None or bias.is_const else self.here.values(bias)
        data = made[0].numpy() if made else None if bias is None else bias.const()
        flat = np.zeros(1) if data is None else np.asarray(data, dtype=np.float64).reshape(-1)
        flat = np.broadcast_to(flat * node.attrs.get("beta", 1.0), old.shape[0] * old.shape[1])
        return torch.from_numpy(flat.copy()).reshape(old.shape[:2])

    def _normal(
        self, op: LinearOp, inputs: list[Tensor], targets: list[Tensor], constant: Tensor, old: Tensor
    ) -> list[Normal]:
        """Normal equations of the wanted outputs less the bias, over the rows drawn, in two halves of the samples."""
        folds = [Normal(*(old.shape[i] for i in (0, 2, 1))) for _ in range(2)]
        total = sum(op.rows_in(y) for y in targets)
        share = min(1.0, max(self.settings.rows, ROWS_PER_COLUMN * old.shape[2]) / max(total, 1))
        draw = torch.Generator().manual_seed(self.settings.seed)
        for x, y in zip(inputs, targets, strict=True):
            half = (x.shape[0] + 1) // 2
            for fold, part in zip(folds, (slice(0, half), slice(half, None)), strict=True):
                xs, ys = x[part], y[part]
                count = op.rows_in(ys)
                if not count:
                    continue
                picks = None
                if share < 1:
                    picks = torch.randperm(count, generator=draw)[: max(1, round(share * count))]
                fold.update(op.patches(xs, ys, picks), op.outputs(ys, picks) - constant[:, None, :])
        return folds

    def _sum_targets(self, op: LinearOp, wanted: list[Tensor]) -> list[Tensor] | None:
        """What the operator must give for the sum with the pruned skip to be the original's."""
        found = residual_sum(op)
        if found is None or found.skip.name not in self.original.values:
            return None
        twin = self.original.values[found.skip.name]
        skips, theirs = self.here.values(found.skip), self.there.values(twin)
        if skips is None or theirs is None:
            return None
        gain = found.gain
        usable = np.abs(gain) > 1e-3 * np.abs(gain).max()
        inverse = torch.from_numpy(np.where(usable, 1 / np.where(usable, gain, 1), 0)).to(wanted[0].dtype)
        inverse = inverse.reshape([-1] + [1] * (wanted[0].dim() - 1 - op.channel_axis))
        return [y + (self.kept.take(twin, s) - t) * inverse for y, s, t in zip(wanted, theirs, skips, strict=True)]

    # ---- normalizations ------------------------------------------------------------------------------------------
    def _norm(self, node: Node, wanted: list[Tensor], now: list[Tensor]) -> bool:
        """Gain and bias (batch norm: running variance and mean) such that the output fits the original's."""
        axis = 1 if node.op != "layer_norm" and node.op != "rms_norm" else node.output.rank - 1  # type: ignore[operator]
        size = now[0].shape[axis]
        gain, bias = node.input(1), node.input(2)
        normal = Normal(size, 1, 1)
        for y, z in zip(wanted, now, strict=True):
            rows = [t.movedim(axis, 0).flatten(1)[:, :, None].double() for t in (z, y)]
            normal.update(rows[0], rows[1])
        if node.op == "batch_norm":
            return self._batch_norm(node, normal)
        if not own_vector(gain, size):
            return self._left(node, "its gain is not a vector of its own")
        centred = own_vector(bias, size)
        solution = solve([normal], torch.ones(size, 1, 1, dtype=torch.float64), 1e-3, centred)
        if not solution.after < solution.before:
            return False
        slope = solution.matrix.reshape(-1).numpy()
        self._scale(gain, slope)
        if centred:
            assert bias is not None
            old = np.asarray(bias.const(), dtype=np.float64)
            new = old * slope.reshape(old.shape) + solution.shift.reshape(old.shape).numpy()
            self.here.set_weight(bias, new.astype(bias.const().dtype))  # type: ignore[union-attr]
        assert gain is not None and gain.weight is not None
        self._record(gain.weight.name, "gain and bias refitted", solution, normal.rows)
        return True

    def _scale(self, value: Value | None, slope: np.ndarray) -> None:
        assert value is not None
        old = value.const()
        assert old is not None
        self.here.set_weight(value, (old * slope.reshape(old.shape)).astype(old.dtype))

    def _batch_norm(self, node: Node, normal: Normal) -> bool:
        """Running statistics such that the output has the original's mean and variance on this data."""
        mean, var = node.input(3), node.input(4)
        size = normal.x.shape[0]
        factor = norm_factor(node)
        if factor is None or not own_vector(mean, size) or not own_vector(var, size):
            return self._left(node, "its statistics are not stored vectors of its own")
        assert mean is not None and var is not None and mean.weight is not None
        new_mean, new_var, solution = fitting_statistics(node, normal, factor)
        self.here.set_weight(mean, new_mean)
        self.here.set_weight(var, new_var)
        self._record(mean.weight.name, "running statistics re-estimated", solution, normal.rows)
        return True


def fitting_statistics(node: Node, normal: Normal, factor: np.ndarray) -> tuple[np.ndarray, np.ndarray, Solution]:
    """Running mean and variance of a batch norm such that its output has the wanted mean and variance.

    Args:
        normal: sums over (output now, output wanted), [C, rows, 1] each.
        factor: what the batch norm multiplies each channel by now (:func:`norm_factor`).

    Returns:
        Mean, variance (dtypes as stored), and the relative errors before and after.
    """
    stored_mean, stored_var = (v.const() for v in node.inputs[3:5])  # type: ignore[union-attr]
    assert stored_mean is not None and stored_var is not None
    xx, xy, yy = (m.reshape(-1) for m in normal.moments(True))
    growth = (yy / xx.clamp_min(1e-30)).sqrt()
    growth = torch.where((xx > 1e-12) & (yy > 1e-12), growth, torch.ones((), dtype=growth.dtype)).clamp(0.1, 10)
    # output = factor * (x - mean) + bias: a factor that grows by growth has a variance smaller by its square.
    old_mean, old_var = np.asarray(stored_mean, dtype=np.float64), np.asarray(stored_var, dtype=np.float64)
    new_var = (old_var + node.attrs["eps"]) / growth.numpy() ** 2 - node.attrs["eps"]
    new_var = np.maximum(new_var, 1e-12)
    ratio = np.sqrt((old_var + node.attrs["eps"]) / (new_var + node.attrs["eps"]))
    n = normal.rows
    here, there = (normal.x / n).reshape(-1).numpy(), (normal.y / n).reshape(-1).numpy()
    bias = None if node.input(2) is None else node.input(2).const()  # type: ignore[union-attr]
    beta = 0.0 if bias is None else np.asarray(bias, dtype=np.float64)
    # m = factor (mx - mean) + beta is the mean now; wanted: factor' (mx - mean') + beta = there.
    safe = np.where(np.abs(factor) > 1e-12, factor, 1.0)
    mx = (here - beta) / safe + old_mean
    new_mean = np.where(np.abs(factor) > 1e-12, mx - (there - beta) / (safe * ratio), old_mean)
    before = _relative(xx, xy, yy, here - there)
    r = torch.from_numpy(ratio)
    after = _relative(xx * r**2, xy * r, yy, np.zeros(1))
    solution = Solution(torch.zeros(0), torch.zeros(0), before, after, 0.0)
    return new_mean.astype(stored_mean.dtype), new_var.astype(stored_var.dtype), solution


def _relative(xx: Tensor, xy: Tensor, yy: Tensor, drift: np.ndarray) -> float:
    found = float((xx - 2 * xy + yy).sum()) + float(np.square(drift).sum())
    return max(found, 0.0) / (float(yy.sum()) or 1.0)


def relative_error(wanted: list[Tensor], now: list[Tensor]) -> float:
    """Largest difference over the largest wanted value."""
    top = max(float(y.abs().max()) for y in wanted if y.numel())
    return max(float((y - z).abs().max()) for y, z in zip(wanted, now, strict=True)) / (top or 1.0)
