"""Recovery without any forward run: removed channels are expressed by kept ones under the model of their moments."""

from __future__ import annotations

from collections.abc import Mapping

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
    patch matrices are needed: memory is C^2 per layer. Under a padded kernel the moments are taken about zero, so that
    the map holds at the border too. The shift goes in only where batch norms saw the mean. The batch norm that
    follows gets the variance that is left. Kept channels count as
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
    if op.groups > 1 or op.node.attrs.get("transposed"):
        if op.matrix(op.weight.const()).shape[2] < theirs.matrix(theirs.weight.const()).shape[2]:  # type: ignore[arg-type]
            found.decisions.append(Decision(name, "left", "grouped or transposed: its weight is only sliced"))
        return
    _merge(graph, op, theirs, x, stay, kept, ridge, found, name)


def _merge(
    graph: Graph, op: LinearOp, theirs: LinearOp, x: Moments, stay: np.ndarray, kept: Kept, ridge: float,
    found: Walk, name: str,
) -> None:  # fmt: skip
    data, whole = op.weight.const(), theirs.weight.const()
    assert data is not None and whole is not None and op.weight.weight is not None
    width = len(x.mean)
    now, w = op.matrix(data)[0], theirs.matrix(whole)[0].reshape(-1, width, theirs.matrix(whole).shape[2] // width)
    rows = kept.positions(theirs.node.output, op.channel_axis)
    w = w if rows is None else w[torch.from_numpy(rows)]
    s = torch.from_numpy(stay)
    gone = torch.from_numpy(np.setdiff1d(np.arange(width), stay))
    sink = shift_sink(op)
    centred = sink is not None and w.shape[2] == 1
    second = x.cov if centred else x.cov + x.mean[:, None] * x.mean
    coefficients = regression(second, s, gone, ridge)
    wr = w[:, gone]
    before, after = _unexplained(w, second, s, gone, coefficients)
    if not after < before:
        found.decisions.append(Decision(name, "left", "its expected error would not fall: weights are only sliced"))
        return
    matrix = now.reshape(len(w), len(s), -1) + torch.einsum("ort,rs->ost", wr, coefficients)
    graph.set_weight(op.weight.weight, op.tensor(matrix.reshape(1, len(w), -1), data))
    if x.measured and sink is not None and sink.value.weight is not None:
        left = x.mean[gone] - coefficients @ x.mean[s]
        inside = coverage(theirs, w.shape[2])
        shift = torch.einsum("ort,r,t->o", wr, left, inside)
        graph.set_weight(sink.value.weight, sink.shifted(shift.numpy()))
    _variance(graph, op, w, wr, x.cov, s, gone, coefficients)
    found.errors[name] = (before, after)
    reason = f"{len(gone)} removed channels expressed by kept ones: expected error {before:.3g} -> {after:.3g}"
    found.decisions.append(Decision(name, "corrected", reason, {"before": before, "after": after, "ridge": ridge}))


def _variance(
    graph: Graph, op: LinearOp, w: Tensor, wr: Tensor, cov: Tensor, s: Tensor, gone: Tensor, b: Tensor
) -> None:
    """Give the batch norm that reads the operator the variance that the merged weights leave."""
    readers = followers(op.node)
    norm = readers[0] if readers and readers[0].op == "batch_norm" else None
    if norm is None or norm.attrs.get("training") or not own_vector(norm.input(4), len(w)):
        return
    var = norm.inputs[4]
    assert var is not None and var.weight is not None
    lost = torch.einsum("oct,cd,odt->o", wr, _rest(cov, s, gone, b), wr)
    share = (lost / torch.einsum("oct,cd,odt->o", w, cov, w).clamp_min(1e-30)).clamp(0, MOST)
    old, eps = var.weight.numpy(), norm.attrs["eps"]
    new = (old.astype(np.float64) + eps) * (1 - share.numpy()) - eps
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


def _unexplained(w: Tensor, second: Tensor, s: Tensor, gone: Tensor, b: Tensor) -> tuple[float, float]:
    """Share of the outputs' variance that is lost by slicing and after merging, positions taken as independent."""

    def energy(v: Tensor, m: Tensor) -> float:
        return float(torch.einsum("oct,cd,odt->", v, m, v))

    total = energy(w, second) or 1.0
    before = energy(w[:, gone], second[gone][:, gone])
    return before / total, max(energy(w[:, gone], _rest(second, s, gone, b)), 0.0) / total


def coverage(op: LinearOp, taps: int) -> Tensor:
    """For each tap of a kernel the share of output positions where it lies on the input, not on its padding."""
    node = op.node
    if taps == 1 or node.inputs[0] is None or node.inputs[0].hint is None or node.output.hint is None:
        return torch.ones(taps, dtype=torch.float64)
    ones = torch.ones(1, 1, *node.inputs[0].hint[2:])
    out = torch.zeros(1, 1, *node.output.hint[2:])
    return op.windows(ones, out).flatten(2 + ones.dim() - 2).double().mean(dim=tuple(range(ones.dim()))).reshape(-1)
