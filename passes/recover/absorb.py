"""Recovery without any forward run: removed channels are expressed by kept ones under the model of their moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...graph.ir import Graph, Node
from ..base import Decision, Reference
from .layers import LINEAR, LinearOp, followers, linear_op, own_vector, shift_sink
from .moments import Moments, Propagation
from .walk import Kept, Walk, check_same_layers

MOST = 0.9
"""Largest share of a channel's variance that counts as lost."""


def absorb(graph: Graph, reference: Reference, ridge: float, inputs: Mapping[str, Moments] | None = None) -> Walk:
    """Correct ``graph`` in place: W' = W_S + W_R B and a shift, with B the regression of removed channels on kept
    ones under the propagated covariances, per consumer of a cut axis.

    With covariances of the form (channels x positions) the regression is the same at every tap of a kernel, so no
    patch matrices are needed: memory is C^2 per layer. Channel groups of a convolution are taken one by one. Under a
    padded kernel the moments are taken about zero, so that the map holds at the border too. The shift goes in only
    where batch norms saw the mean. The batch norm that follows gets the variance that is left. Kept channels count as
    those of the original: errors of earlier layers are not modelled (a model of them overstates them, and shrinks).
    A consumer whose expected error would not fall stays sliced. ``inputs``: :func:`input_moments` of the original,
    for callers that try many cuts of it.
    """
    original = reference.graph.clone()
    check_same_layers(graph, original)
    kept = Kept(original, reference.plan)
    found = Walk()
    here = {n.name: n for n in graph.nodes}
    inputs = input_moments(original) if inputs is None else inputs
    with torch.no_grad():
        for twin in original.nodes:
            node = here.get(twin.name)
            if node is not None and node.op in LINEAR:
                _consumer(graph, node, twin, inputs.get(twin.name), kept, ridge, found)
    return found


def input_moments(original: Graph) -> dict[str, Moments]:
    """Moments of what each linear operator reads, by node name, where they are known."""
    moments = Propagation(original)
    found: dict[str, Moments] = {}
    with torch.no_grad():
        for node in original.nodes:
            if node.op in LINEAR and (x := moments.of(node.input(0))) is not None:
                found[node.name] = x
            moments.visit(node)
    return found


def _consumer(graph: Graph, node: Node, twin: Node, x: Moments | None, kept: Kept, ridge: float, found: Walk) -> None:
    axis = 1 if node.op == "conv" else (twin.inputs[0].rank or 1) - 1  # type: ignore[union-attr]
    stay = kept.positions(twin.inputs[0], axis)
    if stay is None:
        return
    op, theirs = linear_op(node), linear_op(twin, shared=True)
    weight = node.inputs[1]
    name = weight.weight.name if weight is not None and weight.weight is not None else node.name
    if isinstance(op, str) or isinstance(theirs, str):
        found.decisions.append(Decision(name, "left", op if isinstance(op, str) else str(theirs)))
        return
    if x is None or x.axis != axis:
        found.decisions.append(Decision(name, "left", "no moments are known for its input: weights are only sliced"))
        return
    if op.node.attrs.get("transposed"):
        if op.matrix(op.weight.const()).shape[2] < theirs.matrix(theirs.weight.const()).shape[2]:  # type: ignore[arg-type]
            found.decisions.append(Decision(name, "left", "transposed: its weight is only sliced"))
        return
    if len(stay) * theirs.groups < len(x.mean) * op.groups:  # else whole groups went, and no group lost an input
        _merge(graph, op, theirs, x, stay, kept, ridge, found, name)


@dataclass
class _Part:
    """One channel group of a consumer (the whole of it, if it has one group).

    Attributes:
        w: the original's weights of the rows that are kept, [O, C, taps].
        stay, gone: kept and removed ones among these C input channels, counted in the group.
        first: the original's number of the group's first channel.
    """

    w: Tensor
    stay: Tensor
    gone: Tensor
    first: int

    def of(self, moments: Tensor) -> Tensor:
        """This group's part of a mean or a covariance."""
        mine = slice(self.first, self.first + self.w.shape[1])
        return moments[(mine,) * moments.dim()]


def _parts(op: LinearOp, theirs: LinearOp, stay: np.ndarray, rows: np.ndarray | None, width: int) -> list[_Part]:
    """The groups that are left, each beside the original's group it comes from; empty where one is made of several."""
    data = theirs.weight.const()
    assert data is not None
    whole = theirs.matrix(data)
    groups, outputs, columns = whole.shape
    per = width // groups
    kernels = whole.reshape(groups, outputs, per, columns // per)
    rows = np.arange(groups * outputs) if rows is None else rows
    found = []
    for mine, channels in zip(np.split(rows, op.groups), np.split(stay, op.groups), strict=True):
        origin = {*(mine // outputs).tolist(), *(channels // per).tolist()}
        if len(origin) != 1:
            return []
        (g,) = origin
        here = channels - g * per
        gone = np.setdiff1d(np.arange(per), here)
        w = kernels[g][torch.from_numpy(mine - g * outputs)]
        found.append(_Part(w, torch.from_numpy(here), torch.from_numpy(gone), g * per))
    return found


def _merge(
    graph: Graph, op: LinearOp, theirs: LinearOp, x: Moments, stay: np.ndarray, kept: Kept, ridge: float,
    found: Walk, name: str,
) -> None:  # fmt: skip
    data = op.weight.const()
    assert data is not None and op.weight.weight is not None
    parts = _parts(op, theirs, stay, kept.positions(theirs.node.output, op.channel_axis), len(x.mean))
    if not parts:
        found.decisions.append(Decision(name, "left", "its channel groups were joined: its weight is only sliced"))
        return
    taps, removed = parts[0].w.shape[2], sum(len(p.gone) for p in parts)
    sink = shift_sink(op)
    centred = sink is not None and taps == 1
    second = x.cov if centred else x.cov + x.mean[:, None] * x.mean
    maps = [regression(p.of(second), p.stay, p.gone, ridge) for p in parts]
    energies = [_energies(p, p.of(second), b) for p, b in zip(parts, maps, strict=True)]
    total, before, after = (sum(column) for column in zip(*energies, strict=True))
    before, after = before / (total or 1.0), after / (total or 1.0)
    if not after < before:
        found.decisions.append(Decision(name, "left", "its expected error would not fall: weights are only sliced"))
        return
    now = op.matrix(data)
    merged = [
        m.reshape(len(p.w), len(p.stay), -1) + torch.einsum("ort,rs->ost", p.w[:, p.gone], b)
        for m, p, b in zip(now, parts, maps, strict=True)
    ]
    graph.set_weight(op.weight.weight, op.tensor(torch.stack(merged).reshape(now.shape), data))
    if x.measured and sink is not None and sink.value.weight is not None:
        inside = coverage(theirs, taps)
        shifts = []
        for p, b in zip(parts, maps, strict=True):
            mean = p.of(x.mean)
            shifts.append(torch.einsum("ort,r,t->o", p.w[:, p.gone], mean[p.gone] - b @ mean[p.stay], inside))
        graph.set_weight(sink.value.weight, sink.shifted(torch.cat(shifts).numpy()))
    _variance(graph, op, parts, x.cov, maps)
    found.errors[name] = (before, after)
    reason = f"{removed} removed channels expressed by kept ones: expected error {before:.3g} -> {after:.3g}"
    found.decisions.append(Decision(name, "corrected", reason, {"before": before, "after": after, "ridge": ridge}))


def _variance(graph: Graph, op: LinearOp, parts: list[_Part], cov: Tensor, maps: list[Tensor]) -> None:
    """Give the batch norm that reads the operator the variance that the merged weights leave."""
    readers = followers(op.node)
    norm = readers[0] if readers and readers[0].op == "batch_norm" else None
    if norm is None or norm.attrs.get("training") or not own_vector(norm.input(4), sum(len(p.w) for p in parts)):
        return
    var = norm.inputs[4]
    assert var is not None and var.weight is not None
    shares = []
    for p, b in zip(parts, maps, strict=True):
        wr, mine = p.w[:, p.gone], p.of(cov)
        lost = torch.einsum("oct,cd,odt->o", wr, _rest(mine, p.stay, p.gone, b), wr)
        shares.append((lost / torch.einsum("oct,cd,odt->o", p.w, mine, p.w).clamp_min(1e-30)).clamp(0, MOST))
    old, eps = var.weight.numpy(), norm.attrs["eps"]
    new = (old.astype(np.float64) + eps) * (1 - torch.cat(shares).numpy()) - eps
    graph.set_weight(var.weight, np.maximum(new, 1e-12).astype(old.dtype))


def _rest(second: Tensor, s: Tensor, gone: Tensor, b: Tensor) -> Tensor:
    """Second moments of what the kept channels do not express of the removed ones."""
    cross = b @ second[s][:, gone]
    return second[gone][:, gone] - cross - cross.T + b @ second[s][:, s] @ b.T


def regression(second: Tensor, stay: Tensor, gone: Tensor, ridge: float) -> Tensor:
    """B with x_gone ~ B x_stay: second[gone, stay] (second[stay, stay] + ridge d I)^-1, d its mean diagonal."""
    inner = second[stay][:, stay]
    d = inner.diagonal().mean().clamp_min(1e-30)
    eye = torch.eye(len(stay), dtype=second.dtype)
    return torch.linalg.solve(inner + ridge * d * eye, second[stay][:, gone]).T


def _energies(part: _Part, second: Tensor, b: Tensor) -> tuple[float, float, float]:
    """Energy of the outputs, and what of it is lost by slicing and after merging, positions taken as independent."""

    def energy(v: Tensor, m: Tensor) -> float:
        return float(torch.einsum("oct,cd,odt->", v, m, v))

    wr, gone = part.w[:, part.gone], part.gone
    before = energy(wr, second[gone][:, gone])
    return energy(part.w, second), before, max(energy(wr, _rest(second, part.stay, gone, b)), 0.0)


def coverage(op: LinearOp, taps: int) -> Tensor:
    """For each tap of a kernel the share of output positions where it lies on the input, not on its padding."""
    node = op.node
    if taps == 1 or node.inputs[0] is None or node.inputs[0].hint is None or node.output.hint is None:
        return torch.ones(taps, dtype=torch.float64)
    ones = torch.ones(1, 1, *node.inputs[0].hint[2:])
    out = torch.zeros(1, 1, *node.output.hint[2:])
    return op.windows(ones, out).flatten(2 + ones.dim() - 2).double().mean(dim=tuple(range(ones.dim()))).reshape(-1)
