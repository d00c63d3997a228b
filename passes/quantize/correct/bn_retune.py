"""BN re-tuning: statistics of a quantized model estimated again, so that every channel is as in the float model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from ....graph.ir import Graph, Node, Value
from ...base import Context, Contract, Decision, Needs, Outcome, Pass
from .sites import BiasSlot, Site, float_reference, quantized_sites, slots

if TYPE_CHECKING:
    from .walk import PairWalk

MOST = 4.0
"""Largest factor by which a channel's deviation is corrected, either way; a channel that died is not revived."""


class BnRetune(Pass):
    """Redo batch norm statistics after quantization: each channel gets the float model's mean and deviation back.

    In one walk through both models, in order of execution. A batch norm that is still there gets a new running mean
    and variance such that its output, on the calibration data, has the mean and variance of the float model's. One
    that was folded into its layer lives on in the layer's per-channel weight scale and bias: with s = sd_float /
    sd_quantized, scale *= s and bias = s (bias - mean_quantized) + mean_float, which is the fold of the re-estimated
    statistics; no integer weight changes and no operator is added. Linear layers never followed by a batch norm are
    treated likewise only with ``layers="all"``. Source: "Improving Post Training Neural Quantization: Layer-wise
    Calibration and Integer Programming" (batch-norm tuning).

    Raises:
        ConfigError: no float model is known.
        ConstraintError: no layer is quantized, or the data is empty.
        UnsupportedOp: an ONNX operator has no torch implementation.
    """

    name: ClassVar[str] = "bn_retune"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    needs: ClassVar[Needs] = Needs.CALIBRATION
    requires: ClassVar[frozenset[str]] = frozenset({"quantized"})

    layers: str = Field(default="conv", pattern="^(conv|all|norms)$")
    """"conv": batch norms and convolutions (into which they fold); "all": linear layers too; "norms": only batch norms
    that are still in the graph."""
    calibration: Any = Field(default=None, exclude=True, repr=False)
    """Batches of typical inputs; the run's own when absent."""
    reference: Any = Field(default=None, exclude=True, repr=False)
    """The float model (anything fl.load takes, or a graph), where P.Quantize ran elsewhere."""

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        from .walk import PairWalk

        reference = float_reference(ctx, self.reference, self.name)
        found = [s for s in quantized_sites(graph, reference, self.name) if self._takes(s)]
        where = slots(graph, found)
        twins = {n.name: n for n in reference.nodes}
        norms = [(n, twins[n.name]) for n in graph.nodes if n.op == "batch_norm" and n.name in twins]
        walk = PairWalk(graph, reference, self.batches(ctx))
        by_name = {s.node.name: s for s in found}
        decisions = []
        for node, twin in walk.visit([*norms, *((s.node, s.twin) for s in found)], ctx.progress):
            if node.op == "batch_norm":
                decisions.append(_norm(walk, node, twin))
            else:
                decisions.append(_layer(walk, by_name[node.name], where.get(node.name)))
        graph.refresh()
        corrected = sum(d.action == "corrected" for d in decisions)
        return Outcome(decisions=decisions, details={"corrected": corrected, "left": len(decisions) - corrected})

    def _takes(self, site: Site) -> bool:
        """A layer whose batch norm follows is corrected there, and not twice."""
        if self.layers == "norms" or (self.layers == "conv" and site.node.op != "conv"):
            return False
        return not any(reader.op == "batch_norm" for reader, _ in site.node.output.uses)


def _norm(walk: PairWalk, node: Node, twin: Node) -> Decision:
    from ...recover.layers import norm_factor, own_vector
    from ...recover.solve import Normal
    from ...recover.walk import fitting_statistics

    both = walk.outputs(node, twin)
    size = int(node.output.hint[1]) if node.output.hint else 0
    factor = norm_factor(node)
    mean, var = node.input(3), node.input(4)
    if both is None or factor is None or not own_vector(mean, size) or not own_vector(var, size):
        return Decision(node.name, "left", "its statistics are not stored vectors of its own")
    normal = Normal(size, 1, 1)
    for wanted, now in zip(*both, strict=True):
        x, y = (t.movedim(1, 0).flatten(1)[:, :, None].double() for t in (now, wanted))
        normal.update(x, y)
    assert mean is not None and var is not None
    new_mean, new_var, solution = fitting_statistics(node, normal, factor)
    walk.change(mean, new_mean)
    walk.change(var, new_var)
    walk.repeat()
    data = {"layer": node.scope, "before": solution.before, "after": solution.after}
    reason = f"running statistics re-estimated: error {solution.before:.3g} -> {solution.after:.3g} of the variance"
    return Decision(node.name, "corrected", reason, data)


def _layer(walk: PairWalk, site: Site, slot: BiasSlot | None) -> Decision:
    from .walk import channel_moments

    name = site.node.name
    if slot is None or all(v is not slot.result for v in site.node.inputs):
        return Decision(name, "left", "it has no bias of its own to shift")
    both = walk.outputs(site.node, site.twin)
    if both is None:
        return Decision(name, "left", "its output is not computed by itself")
    (mu_f, var_f), (mu_q, var_q) = (channel_moments(side, site.channel_axis) for side in both)
    alive = (var_f > 1e-12) & (var_q > 1e-12)
    s = np.where(alive, np.sqrt(var_f / np.where(alive, var_q, 1.0)), 1.0)
    s = np.clip(s, 1 / MOST, MOST)
    scale = _channel_scale(site)
    if scale is None:
        s = np.ones_like(s)
    # the bias as it is applied: factor * stored
    old = slot.numbers().reshape(-1) / slot.factor
    new = s * (old - mu_q) + mu_f
    if scale is not None:
        value, shape = scale
        data = value.const()
        assert data is not None
        walk.change(value, (data.astype(np.float64) * s.reshape(shape)).astype(data.dtype), site.dequantize.output)
        _rescale_bias(walk, slot, s, new)
    else:
        walk.change(slot.value, slot.replaced(new * slot.factor), slot.result)
    walk.repeat()
    spread = float(np.abs(np.log2(s)).max())
    what = "scale and bias" if scale is not None else "bias (its weight has no scale of its own per output channel)"
    reason = f"{what} refitted: deviations by up to 2^{spread:.2g}, means by up to {np.abs(mu_f - mu_q).max():.3g}"
    said = {"layer": site.scope, "largest_scale": float(s.max()), "smallest_scale": float(s.min())}
    return Decision(name, "corrected", reason, said)


def _channel_scale(site: Site) -> tuple[Value, tuple[int, ...]] | None:
    """The weight's own scale, and the shape in which one factor per output channel multiplies it, or None."""
    node = site.dequantize
    scale = node.inputs[1]
    if scale is None or scale.weight is None or len(scale.uses) != 1 or len(node.output.uses) != 1:
        return None
    axis = out_axis(site)
    shape = scale.weight.shape
    if len(shape) == 1 and shape[0] == site.channels and node.attrs.get("axis") == axis:
        return scale, (site.channels,)
    if len(shape) > 1 and shape[axis] == site.channels:  # blocks along the other axis
        return scale, tuple(site.channels if i == axis else 1 for i in range(len(shape)))
    return None


def out_axis(site: Site) -> int:
    """The weight axis that indexes output channels."""
    if site.node.op == "conv":
        return 1 if site.node.attrs.get("transposed") else 0
    if site.node.op == "matmul":
        return len(site.stored.shape) - 1
    return 1 if site.node.attrs.get("transposed_weight") else 0


def _rescale_bias(walk: PairWalk, slot: BiasSlot, s: np.ndarray, new: np.ndarray) -> None:
    """Write a bias under the accumulator's new scale."""
    if slot.form != "int32":
        walk.change(slot.value, slot.replaced(new * slot.factor), slot.result)
        return
    node = slot.result.producer
    scale = None if node is None else node.inputs[1]
    assert scale is not None and scale.weight is not None and slot.scale is not None
    data = scale.const()
    assert data is not None
    if data.size == s.size:
        stored = (data.astype(np.float64) * s.reshape(data.shape)).astype(data.dtype)
        walk.change(scale, stored)
        walk.change(slot.value, slot.replaced(new * slot.factor, stored.astype(np.float64).reshape(-1)), slot.result)
    else:
        walk.change(slot.value, slot.replaced(new * slot.factor), slot.result)
