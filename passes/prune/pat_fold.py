"""Folding linear ops of the residual stream into their neighbours, and slicing the stream with exact statistics."""

from __future__ import annotations

import math
import re

import numpy as np

from ...graph.actions import Plan, select
from ...graph.analysis import INEXACT
from ...graph.errors import ConstraintError
from ...graph.groups import AxisGroup, AxisGroups, axis_groups
from ...graph.ir import Graph, Node, Value, Weight
from ...graph.space import Leaf, norm
from ..base import Decision

OWN = re.compile(r"(?:^|[./])pat_(?:(\d+)_(down|up)|mask|fill)$")
RESCALED = ("mean", "layer_norm", "rms_norm")
UNCHANGED = ("sum", "norm", "lp_normalize")
"""Statistics in which zeros count for nothing."""


def fold_ops(graph: Graph) -> list[Decision]:
    """Absorb every linear op and take out mask and fill: the function of the model with a mask of ones.

    Raises:
        ConstraintError: an op's neighbours cannot take it in.
    """
    decisions = []
    pairs: dict[str, dict[str, Weight]] = {}
    for name, w in graph.weights.items():
        hit = OWN.search(name)
        if hit and hit[1]:
            pairs.setdefault(hit[1], {})[hit[2]] = w
    for i, pair in sorted(pairs.items(), key=lambda item: int(item[0])):
        decisions.append(_fold_one(graph, f"pat_{i}", pair["down"], pair["up"]))
    for name in [n for n in graph.weights if (hit := OWN.search(n)) and not hit[1]]:
        value = graph.weights[name].value
        assert value is not None
        _take_out(graph, value)
    graph.refresh()
    return decisions


def _fold_one(graph: Graph, label: str, down: Weight, up: Weight) -> Decision:
    one, two = _reader(down), _reader(up)
    total = two.output.uses[0][0]
    x = one.inputs[0]
    if total.op != "add" or x is None or x not in total.inputs or one.output is not two.inputs[0]:
        raise ConstraintError("the linear op is no longer x + (x A) B", node=label, hint="insert it anew")
    d = np.eye(down.shape[0]) + down.numpy().astype(np.float64) @ up.numpy().astype(np.float64)
    above = x.producer
    alone = {u for u, _ in x.uses} <= {one, total} and not x.is_output
    if above is not None and above.op in ("linear", "gather") and alone and _stored(above) is not None:
        into = _fold_up(graph, above, d)
    else:
        into = _fold_down(graph, label, total.output, d)
    graph.replace_uses(total.output, x)
    for node in (total, two, one):
        graph.erase(node)
    return Decision(
        label, "folded", f"absorbed by {into}", {"distance": float(np.linalg.norm(d @ d.T - np.eye(len(d))))}
    )


def _reader(weight: Weight) -> Node:
    value = weight.value
    if value is None or len(value.uses) != 1:
        raise ConstraintError("the linear op is gone or shared", node=weight.name, hint="insert it anew")
    return value.uses[0][0]


def _stored(node: Node) -> Weight | None:
    """The weight of a linear or gather, if only this node reads it."""
    value = node.input(0 if node.op == "gather" else 1)
    return value.weight if value is not None and value.weight is not None and len(value.uses) == 1 else None


def _fold_up(graph: Graph, node: Node, d: np.ndarray) -> str:
    """y = x D behind the operator: its rows (or the table's) times D."""
    weight = _stored(node)
    assert weight is not None
    data = weight.numpy()
    wide = data.astype(np.float64)
    rows_last = node.op == "gather" or node.attrs.get("transposed_weight")
    bias = node.input(2) if node.op == "linear" else None
    if bias is not None:
        if bias.weight is None or len(bias.uses) != 1:
            raise ConstraintError("the bias before a linear op is shared", node=node.name)
        old = bias.weight.numpy()
        graph.set_weight(bias.weight, (old.astype(np.float64) @ d).astype(old.dtype))
    graph.set_weight(weight, (wide @ d if rows_last else d.T @ wide).astype(data.dtype))
    return weight.name


def _fold_down(graph: Graph, label: str, y: Value, d: np.ndarray) -> str:
    """y = x D before linears: their columns times D."""
    users = list(y.uses)
    weights = [_stored(u) if u.op == "linear" and i == 0 else None for u, i in users]
    if not users or y.is_output or any(w is None for w in weights):
        raise ConstraintError(
            "nothing next to the linear op can take it in",
            node=label,
            expected="an untied linear or embedding before it, or untied linears behind it",
            found=", ".join(u.op for u, _ in users) or "nothing",
        )
    for (user, _), weight in zip(users, weights, strict=True):
        assert weight is not None
        data = weight.numpy()
        wide = data.astype(np.float64)
        graph.set_weight(weight, (d @ wide if user.attrs.get("transposed_weight") else wide @ d.T).astype(data.dtype))
    return ", ".join(w.name for w in weights if w is not None)


def _take_out(graph: Graph, stored: Value) -> None:
    """Remove the mask (products with it) or the fill (sums with its product)."""
    for node, _ in list(stored.uses):
        if node.op == "reshape":
            _take_out(graph, node.output)
            if not node.output.uses:
                graph.erase(node)
            continue
        if node.op != "mul":
            raise ConstraintError("something else reads the shared mask", node=node.name, found=node.op)
        other = next(v for v in node.inputs if v is not None and v is not stored)
        users = [u for u, _ in node.output.uses]
        mean = other.producer
        if (
            len(users) == 1
            and users[0].op == "add"
            and mean is not None
            and mean.op == "mean"
            and not node.output.is_output
        ):
            x = mean.inputs[0]
            if x is not None and x in users[0].inputs:
                graph.replace_uses(users[0].output, x)
                for gone in (users[0], node, mean):
                    graph.erase(gone)
                continue
        graph.replace_uses(node.output, other)
        graph.erase(node)


def slice_stream(graph: Graph, anchor: tuple[str, int], keep: np.ndarray) -> Plan:
    """Cut the stream to ``keep``, and let its statistics be those of the masked model.

    Raises:
        ConstraintError: a statistic over the stream that has no correction.
    """
    groups = axis_groups(graph)
    (g,) = groups.of(*anchor)
    n = g.size
    if len(keep) == n:
        return Plan({}, {})
    for reason, where in g.atom.marks.get(INEXACT, []):
        if graph.node(where).op not in (*RESCALED, *UNCHANGED):
            raise ConstraintError("a statistic over the stream cannot be corrected", node=where, found=reason)
    over = [node for node in graph.nodes if node.op in RESCALED and _spans(groups, g, node)]
    gains: dict[Weight, np.ndarray] = {}
    plan = select(groups, {g: keep})
    share = len(keep) / n
    for node in over:
        if node.op == "mean":
            dtype = node.output.dtype if node.output.dtype.startswith("float") else "float32"
            factor = graph.add_weight(f"{node.name}_share", np.full(1, share, dtype))
            scaled = graph.insert("mul", [node.output, factor], name=f"{node.name}_scaled", after=node)
            graph.replace_uses(node.output, scaled.output, except_nodes=[scaled])
            continue
        graph.set_attr(node, eps=float(node.attrs["eps"]) / share)
        gain = node.input(1)
        if gain is None:
            new = graph.add_weight(f"{node.name}_gain", np.full(len(keep), math.sqrt(1 / share), np.float32))
            graph.set_input(node, 1, new)
        elif gain.weight is None or any(u not in over for u, _ in gain.uses):
            raise ConstraintError("the gain of a norm over the stream is shared", node=node.name)
        elif gain.weight not in gains:
            gains[gain.weight] = gain.weight.numpy()
    for weight, data in gains.items():
        graph.set_weight(weight, (data.astype(np.float64) * math.sqrt(1 / share)).astype(data.dtype))
    graph.refresh()
    return plan


def _spans(groups: AxisGroups, g: AxisGroup, node: Node) -> bool:
    """Whether a statistic is taken along the group's axis."""
    x = node.inputs[0]
    if x is None or x not in groups.analysis.spaces:
        return False
    spaces = [norm(e) for e in groups.analysis.spaces[x]]
    return any(isinstance(spaces[a], Leaf) and spaces[a].atom is g.atom for a in node.attrs["axes"])
