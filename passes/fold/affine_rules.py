"""The rules of affine folding: constant scales and shifts travel to an operator that absorbs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ...graph.ir import Graph, Node, Value
from ..rewrite import Env, Refusal, Rewrite, Rule, Why
from .affine import Affine, constant
from .edits import BEHIND, Finished
from .linear_sinks import takes_bias
from .operands import FLOATS, LINEAR_OPS
from .sinks import gain_shape
from .sources import affine_of, data_operand, movers
from .walk import Walk

LONGEST_RUN = 8
"""Affine nodes in a row that are tried as one."""
NORMS = ("layer_norm", "rms_norm", "group_norm", "instance_norm")


class FoldNorm(Rule):
    """Fold a batch norm (eval mode) into what makes its operand, or into everything that reads it.

    Identity: a batch norm with constant statistics is ``A(x) = scale * x + shift`` per channel, and
    ``A(W x + b) = (scale W) x + (scale b + shift)``, ``W A(x) + b = (W scale) x + (b + W shift)``.
    Conditions: every operator in between commutes with the map (it moves indices, or is linear, or positively
    homogeneous under positive scales); every path ends in something that absorbs it: a convolution, a linear, a matrix
    product or einsum with a constant, an embedding, another norm's gain and bias, a constant that is added or
    multiplied. All arithmetic is float64, cast once.
    Refuses: a second consumer that sees the change, a graph output in between, training mode, a tied weight, statistics
    or a bias computed at run time, a zero-padded border under a shift, a negative scale before a maximum, a result that
    does not fit its dtype.
    """

    name: ClassVar[str] = "fold_norm"
    ops: ClassVar[tuple[str, ...]] = ("batch_norm",)

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        affine = affine_of(node)
        if affine is None or isinstance(affine, Refusal):
            return affine
        position = data_operand(node)
        assert position is not None
        if node.op == "add" and _is_bias(node, position):
            return None
        run, composed = _run(node, affine, env)
        if len(run) > 1:
            found = _absorb(run, composed, env)
            if not isinstance(found, Refusal):
                return found
        return _absorb([node], affine, env)


class FoldScaleShift(FoldNorm):
    """Fold a multiplication, division, addition or subtraction with a constant into what stands before or behind it.

    Identity: ``s * x + t`` is an affine map, whatever axes s and t lie over; where it goes and what absorbs it is as
    for batch norms. Scale-shift features, layer scale, the scale of attention, a gain spelled as a product.
    Conditions: as for batch norms; the constant does not broadcast its operand to another shape.
    Refuses: what they refuse, and whatever would leave as many nodes as before.
    """

    name: ClassVar[str] = "fold_scale_shift"
    ops: ClassVar[tuple[str, ...]] = ("mul", "div", "add", "sub", "neg")


class PushGain(Rule):
    """Push gain and bias of a normalization into all the projections that read it.

    Identity: ``W (g * n + b) + c = (W g) n + (c + W b)``, n being the normalized value.
    Conditions: every reader absorbs the map and none needs a bias that it does not have; the gain that stays is one,
    the bias zero.
    Refuses: as for batch norms behind them; a reader without bias where the normalization has one.
    """

    name: ClassVar[str] = "push_gain"
    ops: ClassVar[tuple[str, ...]] = NORMS

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        shape = gain_shape(node)
        affine = None if isinstance(shape, Refusal) else gain_of(node, shape)
        if isinstance(shape, Refusal) or affine is None or affine.identity:
            return None
        walk = Walk(env, arithmetic=False)
        if (blocked := walk.down(node.output, affine)) is not None:
            return blocked
        if lacking := [*walk.edits.created(), *walk.edits.inserted()]:
            return Refusal(f"{lacking[0].name} has no bias and would need one", lacking[0].name)
        for position, neutral in ((1, 1.0), (2, 0.0)):
            if node.input(position) is not None:
                walk.edits.add(node, position, _filled(neutral))
        done = walk.edits.finish()
        if isinstance(done, Refusal):
            return done
        into = _absorbers(walk, node)
        reason = f"its gain is absorbed by {', '.join(into)}"
        return Rewrite([node, *walk.window], done.write, "folded", reason, {"side": "behind", "into": into})


def _is_bias(node: Node, position: int) -> bool:
    """Whether an addition is how a product without bias operand gets its bias: that is where it belongs."""
    producer = node.inputs[position].producer if node.inputs[position] is not None else None  # type: ignore[union-attr]
    return producer is not None and producer.op in ("linear", "matmul", "einsum") and not takes_bias(producer)


def gain_of(node: Node, shape: tuple[int, ...]) -> Affine | None:
    """Gain and bias as a map on the output; None where there is none, or none that may be changed."""
    rank = node.output.rank
    gain, bias = constant(node, 1), constant(node, 2)
    for position, data in ((1, gain), (2, bias)):
        value = node.input(position)
        if value is not None and (
            data is None or value.dtype not in FLOATS or np.broadcast(data, np.empty(shape)).shape != shape
        ):
            return None
    if rank is None or (gain is None and bias is None):
        return None
    tail = (1,) * (rank - 2) if node.op in ("group_norm", "instance_norm") else ()
    parts = [
        np.full((), neutral) if data is None else np.broadcast_to(data, shape).reshape(*shape, *tail)
        for data, neutral in ((gain, 1.0), (bias, 0.0))
    ]
    return Affine.of(parts[0], parts[1], rank)


def _filled(value: float):  # type: ignore[no-untyped-def]
    return lambda a: np.full_like(a, value)


def _run(node: Node, affine: Affine, env: Env) -> tuple[list[Node], Affine]:
    """The affine nodes from ``node`` on that only each other read, and their composition: it is cast once."""
    run = [node]
    while len(run) < LONGEST_RUN:
        made = run[-1].output
        if made.is_output or id(made) in env.captured or len(made.uses) != 1:
            break
        user, position = made.uses[0]
        found = affine_of(user)
        if not isinstance(found, Affine) or position != data_operand(user):
            break
        if env.layers_only and user.op != "batch_norm":
            break
        affine = Affine.of(found.scale * affine.scale, found.scale * affine.shift + found.shift, affine.rank)
        run.append(user)
    return run, affine


def _absorb(run: list[Node], affine: Affine, env: Env) -> Rewrite | Refusal:
    """The rewrite that takes out a run of affine nodes: in front of it if possible, else behind it."""
    first, last = run[0], run[-1]
    position = data_operand(first)
    assert position is not None
    # a norm takes arithmetic beside it, not the other way round: so that the two do not end as arithmetic alone
    arithmetic = all(n.op != "batch_norm" for n in run)
    spare = sum(2 if n.op == "batch_norm" else 1 for n in run) - 1  # additions that may stand there instead
    if env.layers_only:
        spare = 0
    refusals = []
    for side in ("before", "behind"):
        walk = Walk(env, arithmetic=arithmetic)
        blocked = walk.up(first, position, affine) if side == "before" else walk.down(last.output, affine)
        if blocked is None and (inserted := walk.edits.inserted()[spare:]):
            reason = f"{inserted[0].name} has no bias: an addition would stand there instead"
            blocked = Refusal(reason, inserted[0].name)
        done = walk.edits.finish() if blocked is None else blocked
        if isinstance(done, Finished):
            return _removal(run, position, side, walk, done)
        refusals.append(done)
    before, behind = refusals
    why = behind.why if before.why in (Why.GRAPH_INPUT, Why.COMMUTE) else before.why
    return Refusal(f"before it: {before.reason}; behind it: {behind.reason}", before.node or behind.node, why)


def _removal(run: list[Node], position: int, side: str, walk: Walk, done: Finished) -> Rewrite:
    """The rewrite that makes the edits and takes the nodes out."""

    def apply(graph: Graph) -> Sequence[Node]:
        touched = done.write(graph)
        source = run[0].inputs[position]  # an addition may now stand behind the operator
        assert isinstance(source, Value)
        graph.replace_uses(run[-1].output, source)
        return touched

    into = _absorbers(walk, run[0])
    biases = {n.name: _bias(walk, n) for n in walk.window if n.op in LINEAR_OPS and _touched(walk, n)}
    reason = f"absorbed by {', '.join(into)}, which stands {side} it" if into else "it changes nothing"
    window = dict.fromkeys([*run, *walk.window, *(m for n in run for m in movers(n))])
    data = {"side": side, "into": into, "bias": biases}
    return Rewrite(list(window), apply, "folded", reason, data)


def _absorbers(walk: Walk, source: Node) -> list[str]:
    return [n.name for n in dict.fromkeys(n for n, _ in walk.edits.slots()) if n is not source]


def _touched(walk: Walk, node: Node) -> bool:
    return any(n is node for n, _ in walk.edits.slots())


def _bias(walk: Walk, node: Node) -> str:
    """What becomes of a linear operator's bias: kept, updated, created, or untied from others that share it."""
    slots = walk.edits.slots()
    if (node, BEHIND) in slots or ((node, 2) in slots and node.input(2) is None):
        return "created"
    own = node.input(2)
    if (node, 2) in slots and own is not None:
        alone = own.weight is not None and len(own.uses) == 1 and len(own.weight.aliases) <= 1
        return "updated" if alone else "untied"
    added = [user for user, _ in node.output.uses if user.op == "add" and _touched(walk, user)]
    return "updated" if added else "kept"


AFFINE_RULES: list[Rule] = [FoldNorm(), FoldScaleShift(), PushGain()]
