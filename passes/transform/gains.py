"""Norms made ready for a rotation: gains and biases pushed into what reads them, layer norms turned into RMS norms."""

from __future__ import annotations

import numpy as np

from ...graph.errors import UnsupportedOp
from ...graph.groups import AxisGroups, axis_groups
from ...graph.ir import Graph, Node, Value
from ...graph.ops.carry import moves
from ...graph.rotate import freedom, transform
from ...graph.space import Leaf, norm
from ..base import Decision
from ..fold.affine import Affine, constant
from ..fold.affine_rules import gain_of
from ..fold.sinks import gain_shape
from ..fold.sources import affine_of, data_operand
from ..fold.walk import Walk
from ..rewrite import Env, Refusal, Why

NORMS = ("layer_norm", "rms_norm")


def push_gains(graph: Graph, env: Env, *, untie: bool) -> list[Decision]:
    """Push gain and bias of every norm, and every gain spelled as a product, into all that read it.

    The node keeps a gain of ones (and a bias of zeros). Exact. Readers without a bias get one where the norm has one.

    Args:
        untie: give a linear layer whose weight is an embedding's too a copy of its own where that is in the way.
    """
    decisions = []
    for node in list(graph.nodes):
        found = _gain_of(node)
        if found is None:
            continue
        affine, position, neutral = found
        walk = Walk(env)
        blocked = walk.down(node.output, affine)
        if blocked is not None and blocked.why is Why.TIED and untie:
            _copy_tied(graph, graph.node(blocked.node))
            walk = Walk(env)
            blocked = walk.down(node.output, affine)
            if blocked is None:
                decisions.append(Decision(node.name, "untied", "a reader's weight was an embedding's too"))
        if blocked is None:
            for slot, value in zip(position, neutral, strict=True):
                walk.edits.add(node, slot, _filled(value))
            done = walk.edits.finish()
            if not isinstance(done, Refusal):
                done.write(graph)
                decisions.append(Decision(node.name, "folded", "its gain is taken by what reads it"))
                continue
            blocked = done
        decisions.append(Decision(node.name, "kept", f"its gain stays: {blocked.reason}", {"why": blocked.why.value}))
    return decisions


def _gain_of(node: Node) -> tuple[Affine, list[int], list[float]] | None:
    """(the map, operands that hold it, what they become) of a norm's gain or a product with a vector."""
    if node.op in NORMS:
        shape = gain_shape(node)
        affine = None if isinstance(shape, Refusal) else gain_of(node, shape)
        if affine is None or affine.identity:
            return None
        held = [k for k in (1, 2) if node.input(k) is not None]
        return affine, held, [1.0 if k == 1 else 0.0 for k in held]
    if node.op != "mul":
        return None
    position, affine_ = data_operand(node), affine_of(node)
    if position is None or not isinstance(affine_, Affine) or affine_.identity:
        return None
    if affine_.axes != (affine_.rank - 1,) or constant(node, 1 - position) is None:
        return None
    return affine_, [1 - position], [1.0]


def _filled(value: float):  # type: ignore[no-untyped-def]
    return lambda a: np.full_like(a, value)


def _copy_tied(graph: Graph, node: Node) -> None:
    value = node.inputs[1]
    assert value is not None and value.weight is not None
    made = graph.add_weight(f"{node.name}_weight", value.weight.numpy().copy(), trainable=value.weight.trainable)
    graph.set_input(node, 1, made)


def to_rms_norms(graph: Graph) -> list[Decision]:
    """Turn layer norms (gain one, bias zero) over rotatable indices into RMS norms, centring what makes their input.

    Identity: where every row that enters has mean zero, ``LN(x) = RMSNorm(x)``; the rows are sums of outputs of linear
    layers and embeddings, so subtracting from each weight its mean along the output axis does that, and no layer norm
    sees the difference. Exact. ("QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", after SliceGPT.)
    """
    groups = axis_groups(graph)
    decisions = []
    for group in groups:
        found = freedom(groups, group)
        if found.reason or not found.ones:
            continue
        wrong = [n for n in found.norms if n.op == "layer_norm" and not _only_norms_read(groups, n)]
        if wrong:
            decisions.append(Decision(wrong[0].name, "kept", "others read the mean that centring would take away"))
            continue
        layers = [node for node in found.norms if node.op == "layer_norm"]
        try:
            for node in layers:
                _replace(graph, node)
        except UnsupportedOp as exc:  # the first fails if any does: nothing was changed
            decisions.append(Decision(layers[0].name, "kept", f"it stays a layer norm: {exc.message}"))
            continue
        n = group.size
        centre = np.eye(n) - np.full((n, n), 1 / n)
        transform(groups, {group.atom: centre}, (1,))
        decisions += [Decision(n.name, "converted", "a layer norm of centred rows is an RMS norm") for n in layers]
    graph.refresh()
    return decisions


def _only_norms_read(groups: AxisGroups, node: Node) -> bool:
    """Whether the stream that a norm reads is read by norms (through sums, rearrangements) alone: its mean is lost."""
    seen: set[int] = set()
    stack: list[Value] = [v for v in node.inputs[:1] if v is not None]
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        for user, position in value.uses:
            if user.op in ("layer_norm", "shape_of") and position == 0:
                continue
            if user.op in ("add", "sub", "cast") or moves(user.op):
                stack += user.outputs
            else:
                return False
        made = value.producer
        if made is not None and (made.op in ("add", "sub", "cast") or moves(made.op)):
            stack += [v for v in made.inputs if v is not None and not v.is_const and _same_axis(groups, v, node)]
    return True


def _same_axis(groups: AxisGroups, value: Value, node: Node) -> bool:
    x = node.inputs[0]
    assert x is not None
    e = norm(groups.analysis.of(x)[node.attrs["axes"][0]])
    own = groups.analysis.spaces.get(value, [])
    return isinstance(e, Leaf) and any(isinstance(o := norm(a), Leaf) and o.atom is e.atom for a in own)


def _replace(graph: Graph, node: Node) -> None:
    attrs = {k: v for k, v in node.attrs.items() if k in ("axes", "eps", "normalized_shape")}
    x, gain = node.inputs[0], node.input(1)
    made = graph.insert("rms_norm", [x, gain], attrs, name=f"{node.name}_rms", after=node, scope=node.scope)
    graph.replace_uses(node.output, made.output, except_nodes=[made])
    graph.erase(node)
