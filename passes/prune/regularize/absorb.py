"""Cut: drop given indices, after their constant part has moved into the biases of what reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from ....graph.actions import select
from ....graph.errors import ConstraintError
from ....graph.execute import run_graph, synthesize_inputs
from ....graph.groups import AxisGroup, AxisGroups, Member, axis_groups
from ....graph.ir import Graph, Node, Value
from ....graph.positions import kept_positions
from ....graph.space import norm
from ...base import Context, Contract, Decision, Needs, Outcome, Pass
from ...fold.absorb import Absorbed, write
from ...fold.affine import Refusal
from ...fold.operands import LINEAR_OPS, bias_slot, channel_axis, channels, inputs_first, stored_weight
from ...fold.operands import groups as groups_of
from ...plan import remember
from ..oracle import identity_check

NORMS = ("batch_norm", "group_norm", "layer_norm", "rms_norm", "instance_norm")
CONSTANT = 1e-4
"""Largest deviation of a constant, relative to 1 + its size: rounding, not data."""


class Cut(Pass):
    """Keep the given indices of the given axis groups and drop the others.

    With ``absorb``, an index that has come to carry a constant (a norm whose gain is 0 leaves its bias) is not just
    dropped: what it adds to each convolution or linear that reads it, W[:, c] * constant, moves into that operator's
    bias, or into the running mean of the batch norm behind it. Exact where the gain is exactly 0 and the reader does
    not pad ("Pruning-aware Sparse Regularization for Network Pruning" drops the constant). Where a reader pads, no
    bias is right at the border and inside: it gets the one that is nearest in the mean square over the positions.

    Raises:
        ConstraintError: no such group, a frozen group, or indices that are empty or out of range.
    """

    name: ClassVar[str] = "cut"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    needs: ClassVar[Needs] = Needs.NOTHING
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    establishes: ClassVar[frozenset[str]] = frozenset({"pruned"})

    kept: dict[str, list[int]] = Field(min_length=1)
    """Kept indices per axis group, by the group's name (`foldline inspect MODEL` lists them)."""
    absorb: bool = True
    """Move the constant part of what is dropped into the biases of its readers."""

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        graph.separate_shared()
        before = graph.clone()
        groups = axis_groups(graph)
        cut = {groups[name]: np.asarray(k, dtype=np.int64) for name, k in self.kept.items()}
        for g, k in cut.items():
            if not g.can("select"):
                raise ConstraintError("this axis group cannot be cut", node=g.name, found=g.why())
            if len(k) == 0 or k.min() < 0 or k.max() >= g.size:
                raise ConstraintError(
                    "indices to keep are empty or out of range", node=g.name, expected=f"0..{g.size - 1}", found=k[:8]
                )
        cut = {g: k for g, k in cut.items() if len(np.unique(k)) < g.size}
        decisions: list[Decision] = []
        if self.absorb and cut:
            decisions = absorb_removed(groups, cut, seed=ctx.seed)
            groups = axis_groups(graph)
            cut = {groups[g.name]: k for g, k in cut.items()}
        oracle = identity_check(groups, cut, ctx.seed) if ctx.verify else None
        plan = select(groups, cut)
        remember(ctx, before, plan)
        for g, k in cut.items():
            data = {"size": g.size, "kept": len(k)}
            decisions.append(Decision(g.name, "cut", f"kept the {len(k)} of {g.size} that were asked for", data))
        details: dict[str, Any] = {} if oracle is None else {"identity": oracle(graph)}
        details["groups"] = [{"name": g.name, "size": g.size, "kept": len(k), "reason": ""} for g, k in cut.items()]
        return Outcome(decisions=decisions, details=details, plan=plan)


def absorb_removed(groups: AxisGroups, cut: Mapping[AxisGroup, np.ndarray], *, seed: int = 0) -> list[Decision]:
    """Add to each reader of an index that is to go what the index's constant part gives it. Edits ``groups.graph``.

    The constants are found by running the graph, with the gains (and, where no norm follows, the weights) that make
    the removed indices set to 0: whatever stands between a norm and its readers is passed as it is. Nothing is cut
    yet; the function afterwards with the removed slabs zeroed is the function before, where the removed indices were
    constant and no reader pads.

    Args:
        groups: axis groups of the graph; they are no longer valid afterwards.
        cut: kept indices of each group that will be cut.

    Returns:
        Per reader "absorbed" (with the largest shift) or "refused" with the reason (it reads something that is not
        constant, its outputs sum different taps, it is no convolution or linear, its weight or bias is shared).
    """
    graph = groups.graph
    selection = {g.atom: np.unique(k) for g, k in cut.items()}
    probe = _silenced(groups, cut)
    decisions: list[Decision] = []
    readers: dict[Node, Value] = {}
    for g in cut:
        for node, position in _uses(g):
            x = node.inputs[0]
            if position == 1 and node.op in LINEAR_OPS and x is not None:
                readers[node] = x
            elif node.op not in NORMS:
                reason = "only convolutions and linears take a constant into their bias"
                decisions.append(Decision(node.name, "refused", f"{reason}, this is {node.op}"))
    taps = list(dict.fromkeys(x.name for x in readers.values()))
    _, seen = run_graph(probe, synthesize_inputs(probe, seed), taps)
    for node, x in readers.items():
        axis = channel_axis(node, x)
        if isinstance(axis, Refusal):
            decisions.append(Decision(node.name, "refused", axis.reason))
            continue
        data = np.moveaxis(seen[x.name].astype(np.float64), axis, 0).reshape(seen[x.name].shape[axis], -1)
        gone = np.setdiff1d(np.arange(len(data)), kept_positions(norm(groups.analysis.of(x)[axis]), selection))
        decisions.append(_absorb(graph, node, data, gone))
    return decisions


def _uses(g: AxisGroup) -> list[tuple[Node, int]]:
    """Where the group's consuming members are used, each place once."""
    members = [m for m in g.members if m.role in ("consumes", "both") and m.weight.value is not None]
    return list(dict.fromkeys(use for m in members for use in (m.weight.value.uses if m.weight.value else ())))


def _silenced(groups: AxisGroups, cut: Mapping[AxisGroup, np.ndarray]) -> Graph:
    """A copy in which the removed indices carry only their constant part."""
    probe = groups.graph.clone()
    for g, keep in cut.items():
        for m in g.members:
            if m.stat or not (gain(m) or (m.role == "produces" and len(m.weight.shape) > 1)):
                continue
            at = m.positions(g.atom)
            gone = np.flatnonzero((at >= 0) & ~np.isin(at, keep))
            weight = probe.weight(m.weight.name)
            data = weight.numpy().copy()
            data[(slice(None),) * m.axis + (gone,)] = 0
            probe.set_weight(weight, data)
    return probe


def gain(m: Member) -> bool:
    """Whether a member is the gain of a normalization."""
    return m.weight.value is not None and any(n.op in NORMS and i == 1 for n, i in m.weight.value.uses)


def _absorb(graph: Graph, node: Node, data: np.ndarray, gone: np.ndarray) -> Decision:
    """One reader: its input [channels, positions] with the removed channels ``gone`` silenced."""
    shift = np.zeros(len(data))
    shift[gone] = data[gone].mean(axis=1)
    spread = np.abs(data[gone] - shift[gone, None]).max(axis=1, initial=0.0) / (1 + np.abs(shift[gone]))
    if len(gone) and spread.max() > CONSTANT:
        reason = "what the removed indices carry is not constant"
        return Decision(node.name, "refused", reason, {"spread": float(spread.max())})
    stored = stored_weight(node)
    if isinstance(stored, Refusal):
        return Decision(node.name, "refused", stored.reason)
    weight = stored.numpy().astype(np.float64)
    if node.attrs.get("transposed") and any(n != 1 for n in weight.shape[2:]):
        return Decision(node.name, "refused", "a transposed convolution sums different taps at different outputs")
    delta = _contract(node, weight, shift, _inside(node)) * float(node.attrs.get("alpha", 1.0))
    if not delta.any():
        return Decision(node.name, "kept", "the removed indices carry nothing to it")
    moved = _into_mean(graph, node, delta)
    if moved is None:
        slot = bias_slot(node, channels(node, stored.shape)[1])
        if isinstance(slot, Refusal):
            return Decision(node.name, "refused", slot.reason)
        beta = float(node.attrs.get("beta", 1.0)) if slot.holder is node else 1.0
        if beta == 0:
            return Decision(node.name, "refused", "it multiplies its bias by zero")
        write(graph, Absorbed(node, stored, slot, weight, slot.data(len(delta)) + delta / beta))
        moved = "its bias"
    pads = any(lo or hi for lo, hi in node.attrs.get("padding") or ())
    note = "; the mean over the positions, since it pads" if pads else ""
    return Decision(node.name, "absorbed", f"constants moved into {moved}{note}", {"shift": float(np.abs(delta).max())})


def _contract(node: Node, weight: np.ndarray, shift: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """[out]: the weight, summed over its taps by their share ``inside``, times one number per input channel."""
    g = groups_of(node)
    split = weight.reshape(g, weight.shape[0] // g, weight.shape[1], -1) @ inside
    pattern = "gio,gi->go" if inputs_first(node) else "goi,gi->go"
    return np.einsum(pattern, split, shift.reshape(g, -1)).reshape(-1)


def _inside(node: Node) -> np.ndarray:
    """[taps]: share of the output positions at which a tap reads the input and not its padding; 1 without padding.

    A bias adds one number everywhere; this one is nearest to the true sums, in the mean square over the positions.
    """
    x, weight = node.inputs[0], node.inputs[1]
    if node.op == "linear" or x is None or weight is None or x.hint is None or weight.hint is None:
        return np.ones(1)
    if node.attrs.get("transposed"):
        return np.ones(math.prod(weight.hint[2:]))
    shares = np.ones(1)
    attrs, taps = node.attrs, weight.hint[2:]
    spaces = zip(x.hint[-len(taps) :], taps, attrs["padding"], attrs["stride"], attrs["dilation"], strict=True)
    for length, n, (low, high), stride, dilation in spaces:
        starts = np.arange(0, length + low + high - dilation * (n - 1), stride) - low
        read = starts[None, :] + dilation * np.arange(n)[:, None]
        shares = np.outer(shares, ((read >= 0) & (read < length)).mean(axis=1)).reshape(-1)
    return shares


def _into_mean(graph: Graph, node: Node, delta: np.ndarray) -> str | None:
    """Shift the running mean of a batch norm right behind an operator without bias; its name, if there is one."""
    if node.input(2) is not None or node.output.is_output or len(node.output.uses) != 1:
        return None
    ((norm_node, position),) = node.output.uses
    mean = norm_node.input(3)
    if norm_node.op != "batch_norm" or position != 0 or norm_node.attrs.get("training") or mean is None:
        return None
    if mean.weight is None or len(mean.uses) != 1 or len(mean.weight.aliases) > 1:
        return None
    data = mean.weight.numpy()
    graph.set_weight(mean.weight, (data.astype(np.float64) - delta).astype(data.dtype))
    return f"the running mean of {norm_node.name}"
