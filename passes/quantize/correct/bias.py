"""Bias correction: take the mean error that quantization leaves out of each layer's output, channel by channel."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from ....graph.ir import Graph
from ...base import Context, Contract, Decision, Needs, Outcome, Pass
from .sites import BiasSlot, Site, float_reference, quantized_sites, slots

if TYPE_CHECKING:
    from ...base import Progress


class BiasCorrection(Pass):
    """Shift each quantized layer's bias by the mean error of its output, per output channel.

    ``full``: one walk through both models; layer by layer, in order of execution, bias -= E[y_quantized - y_float]
    with all earlier layers already corrected. Afterwards each corrected layer's mean output equals the float one's on
    the calibration data, up to half a step of an int32 bias. ``fast``: bias -= (W_q - W) E[x], with E[x] the mean
    patch of the float model's inputs (one float run); sees the weights' error only. ``moments``: the same with E[x]
    from the statistics that norms store, carried on under a Gaussian model: no data at all; kernels that reach over
    the border count with the share of positions where they lie inside. Sources: "Data-Free Quantization Through
    Weight Equalization and Bias Correction" (both forms). A layer without a bias gets one, in the form (int32 on the
    accumulator's scale, or float) that the others have; an int32 bias moves in whole steps.

    Raises:
        ConfigError: no float model is known.
        ConstraintError: no layer holds integers for a weight of the float model, or the data is empty.
        UnsupportedOp: an ONNX operator has no torch implementation (``full``, ``fast``).
    """

    name: ClassVar[str] = "bias_correction"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    needs: ClassVar[Needs] = Needs.CALIBRATION
    requires: ClassVar[frozenset[str]] = frozenset({"quantized"})

    method: Literal["full", "fast", "moments"] = "full"
    """"full": sequential, from both models' outputs; "fast": weight error times mean input; "moments": the same without
    data, from norms' statistics."""
    calibration: Any = Field(default=None, exclude=True, repr=False)
    """Batches of typical inputs; the run's own when absent. "moments" needs none."""
    reference: Any = Field(default=None, exclude=True, repr=False)
    """The float model (anything fl.load takes, or a graph), where P.Quantize ran elsewhere."""

    def requirement(self) -> Needs:
        return Needs.NOTHING if self.method == "moments" else Needs.CALIBRATION

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        reference = float_reference(ctx, self.reference, self.name)
        found = quantized_sites(graph, reference, self.name)
        where = slots(graph, found)
        if self.method == "full":
            shifts = _full(graph, reference, found, where, self.batches(ctx), ctx.progress)
        elif self.method == "fast":
            shifts = _fast(reference, found, where, self.batches(ctx), ctx.progress)
        else:
            shifts = _moments(reference, found, where)
        if self.method != "full":
            for site in found:
                if site.node.name in shifts:
                    slot = where[site.node.name]
                    assert slot.value.weight is not None
                    graph.set_weight(slot.value.weight, slot.shifted(shifts[site.node.name]))
        decisions = [self._said(site, where.get(site.node.name), shifts.get(site.node.name)) for site in found]
        corrected = sum(d.action == "corrected" for d in decisions)
        return Outcome(
            decisions=decisions,
            details={"method": self.method, "corrected": corrected, "left": len(decisions) - corrected},
        )

    def _said(self, site: Site, slot: BiasSlot | None, shift: np.ndarray | None) -> Decision:
        layer = {"layer": site.scope, "weight": site.weight.name}
        if slot is None:
            return Decision(site.node.name, "left", "nothing stored of its own is added to its output", layer)
        if shift is None:
            return Decision(site.node.name, "left", "the mean of its input is not known", layer)
        size = math.sqrt(float(np.square(shift).mean()))
        reason = f"bias shifted by {size:.3g} (root mean square over {len(shift)} channels), into its {_where(slot)}"
        data = {**layer, "shift_rms": size, "shift_max": float(np.abs(shift).max())}
        return Decision(site.node.name, "corrected", reason, data)


def _where(slot: BiasSlot) -> str:
    return {"float": "float bias", "int32": "int32 bias", "mean": "batch norm's running mean"}[slot.form]


def _full(
    graph: Graph, reference: Graph, found: list[Site], where: dict[str, BiasSlot], batches: Any, progress: Progress
) -> dict[str, np.ndarray]:
    from .walk import PairWalk, channel_moments

    walk = PairWalk(graph, reference, batches)
    by_name = {site.node.name: site for site in found}
    shifts = {}
    for node, twin in walk.visit([(s.node, s.twin) for s in found if s.node.name in where], progress):
        site, slot = by_name[node.name], where[node.name]
        target = _behind(site, slot)
        both = walk.outputs(node, twin)
        if both is None:
            continue
        wanted, now = (channel_moments(side, site.channel_axis)[0] for side in both)
        # a bias that is added behind the layer is part of neither output: the shift is the same
        shifts[node.name] = wanted - now
        walk.change(slot.value, slot.shifted(wanted - now), slot.result)
        if not target:
            walk.repeat()
    return shifts


def _behind(site: Site, slot: BiasSlot) -> bool:
    """Whether the vector is added after the layer itself, by a call that is still to come."""
    return all(v is not slot.result for v in site.node.inputs)


def _fast(
    reference: Graph, found: list[Site], where: dict[str, BiasSlot], batches: Any, progress: Progress
) -> dict[str, np.ndarray]:
    import torch

    from ...recover.layers import LINEAR, linear_op
    from ...recover.runner import bound, runner

    run = runner(reference, LINEAR)
    shifts = {}
    with torch.no_grad():
        run.start(bound(reference, batches))
        placed = [(at, s) for s in found if s.node.name in where and (at := run.position(s.twin)) is not None]
        for at, site in progress(sorted(placed, key=lambda item: item[0]), "correcting"):
            op = linear_op(site.twin, shared=True)
            if isinstance(op, str):
                continue
            run.advance(at + 1)
            inputs, outputs = run.values(op.data), run.values(site.twin.output)
            if inputs is None or outputs is None:
                continue
            total, rows = None, 0
            for x, y in zip(inputs, outputs, strict=True):
                for k in range(len(x)):  # sample by sample: patches of a whole batch would be large
                    patches = op.patches(x[k : k + 1], y[k : k + 1], None)
                    part = patches.sum(1)
                    total, rows = part if total is None else total + part, rows + patches.shape[1]
            if total is None:
                continue
            error = op.matrix(site.error())
            shifts[site.node.name] = -torch.einsum("god,gd->go", error, total / rows).reshape(-1).numpy()
    return shifts


def _moments(reference: Graph, found: list[Site], where: dict[str, BiasSlot]) -> dict[str, np.ndarray]:
    import torch

    from ...recover.absorb import coverage, input_moments
    from ...recover.layers import linear_op

    known = input_moments(reference)
    shifts = {}
    for site in found:
        op, x = linear_op(site.twin, shared=True), known.get(site.twin.name)
        if isinstance(op, str) or x is None or site.node.name not in where or site.twin.attrs.get("transposed"):
            continue
        error = op.matrix(site.error())
        groups, outputs, columns = error.shape
        width = len(x.mean) // groups
        taps = columns // width
        mean = x.mean.reshape(groups, width)
        inside = coverage(op, taps)
        shift = torch.einsum("goct,gc,t->go", error.reshape(groups, outputs, width, taps), mean, inside)
        shifts[site.node.name] = -shift.reshape(-1).numpy()
    return shifts
