"""Pruning-aware tuning: trainable linear ops and one shared mask on the residual stream, folded away afterwards."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from ...graph.errors import ConstraintError
from ...graph.groups import AxisGroup, AxisGroups, axis_groups
from ...graph.ir import Graph, Node, Value, Weight
from ...graph.space import Leaf, norm
from ..base import Context, Contract, Decision, Needs, Outcome, Pass
from .importance import Reduction, importance
from .pat_fold import fold_ops, slice_stream

if TYPE_CHECKING:
    import torch

MASK, FILL = "pat_mask", "pat_fill"
OP = re.compile(r"(?:^|[./])pat_(\d+)_(down|up)$")

KEEP_ZERO = frozenset(
    "identity cast reshape transpose squeeze unsqueeze expand slice select split concat stack flip roll tile relu "
    "leaky_relu gelu silu mish tanh neg abs sign square sqrt erf hardswish elu selu celu softsign rms_norm mean sum "
    "masked_fill max_pool avg_pool adaptive_avg_pool adaptive_max_pool pad lp_normalize".split()
)
"""Ops of one operand that leave a channel of zeros a channel of zeros."""
INVERSE = frozenset("log rsqrt reciprocal".split())


class InsertLinearOp(Pass):
    """Insert trainable linear ops on the residual stream, and one mask that all of them share.

    "PAT: Pruning-Aware Tuning for Large Language Models". Each op is D = I + A B with A [width, rank] and B [rank,
    width] zero, so that the model computes what it did. It stands behind every operator that writes to the stream
    ("writers": embedding, attention output, FFN output), before all that read a normalised stream ("readers"), or
    both. The mask multiplies whatever could be non-zero in a removed channel; layer norms see the mean of the kept
    channels in the removed ones. Train the result (``pat_<i>_down`` = A, ``pat_<i>_up`` = B and what else is
    wanted; :func:`identity_loss` keeps D near orthogonal), set the mask with ``SharedMask``, and fold with
    ``FoldLinearOp``.

    Raises:
        ConstraintError: no such group, or it cannot be selected, or holds an operator that a mask cannot pass.
    """

    name: ClassVar[str] = "insert_linear_op"
    contract: ClassVar[Contract] = Contract.EXACT
    needs: ClassVar[Needs] = Needs.NOTHING
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    establishes: ClassVar[frozenset[str]] = frozenset({"linear ops"})

    rank: int = Field(8, ge=1)
    """Inner width of each op."""
    where: Literal["writers", "readers", "both"] = "writers"
    """Where the ops stand; the mask is everywhere."""
    group: str | None = None
    """The axis group of the stream; the one with most members that can be cut, if None."""
    learn_mask: bool = False
    """Whether the mask, ones at first, is a parameter (``pat_mask``) that training moves, too; :func:`mask_loss`
    presses it down, ``SharedMask(criterion="mask")`` then keeps what it holds to be large."""

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        graph.separate_shared()
        groups = axis_groups(graph)
        g = stream_group(groups, self.group)
        if any(OP.search(n) or n.endswith(MASK) for n in graph.weights):
            raise ConstraintError("linear ops are there already", node=g.name, hint="fold them first")
        mask = graph.add_weight(MASK, np.ones(g.size, np.float32), trainable=self.learn_mask)
        fill: Value | None = None
        stream = _Stream(groups, g)
        reads = stream.readers() if self.where != "writers" else []
        decisions, count = [], 0
        rng = np.random.default_rng(ctx.seed)
        for node in list(graph.nodes):
            axis = stream.axis(node.output) if len(node.outputs) == 1 else None
            if axis is None:
                continue
            if node.op == "layer_norm" and axis in node.attrs["axes"]:
                fill = graph.add_weight(FILL, np.zeros(g.size, np.float32)) if fill is None else fill
                _fill(graph, node, axis, fill)
            written = stream.written_by(node)
            if written is None and stream.keeps_zero(node):
                continue
            last = node
            if written is not None and self.where != "readers" and _foldable(written, node) and _last(node, axis):
                last = _insert_op(graph, node.output, node, count, g.size, self.rank, rng)
                decisions.append(Decision(node.name, "inserted", f"op pat_{count} behind {written.name}"))
                count += 1
            _insert_mask(graph, node.output, last, mask, axis, g.size)
        for value in reads:
            producer = value.producer
            assert producer is not None
            behind = next((u for u, _ in value.uses if u.name.startswith(f"{producer.name}_pat_mask")), None)
            seen = value if behind is None else behind.output
            _insert_op(graph, seen, behind or producer, count, g.size, self.rank, rng)
            decisions.append(Decision(producer.name, "inserted", f"op pat_{count} before what reads {value.name}"))
            count += 1
        graph.refresh()
        if not count:
            raise ConstraintError(
                "there is no place for a linear op", node=g.name, expected="an untied linear or embedding", found="none"
            )
        return Outcome(decisions=decisions, details={"group": g.name, "width": g.size, "ops": count})


class SharedMask(Pass):
    """Set the one mask of a model with linear ops: the least important residual channels become zero everywhere.

    The criterion judges the model with its ops folded. Without ``ratio``, ``kept`` says which channels stay. A mask
    that was learnt becomes zeros and ones; take it out of the optimizer for any training that follows.

    Raises:
        ConstraintError: the ratio or the channels are out of range, or criterion "mask" finds one that was not trained.
    """

    name: ClassVar[str] = "shared_mask"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    needs: ClassVar[Needs] = Needs.NOTHING
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    ratio: float | None = None
    """Share of the width that goes, in (0, 1)."""
    kept: list[int] | None = None
    """The channels that stay, instead."""
    criterion: Any = "l2"
    """As in Prune: a name, or a callable (group, groups) -> one score per channel; or "mask": the absolute values of a
    mask that was trained (``InsertLinearOp(learn_mask=True)``)."""
    reduction: Reduction = "mean"
    """As in Prune."""
    round_to: int = Field(1, ge=1)
    """The width that stays is a multiple of this."""
    value: float = Field(0.0, ge=0, lt=1)
    """What removed channels are multiplied by; above 0 while the mask fades in, 0 before folding."""

    @model_validator(mode="after")
    def _one_goal(self) -> SharedMask:
        if (self.ratio is None) == (self.kept is None):
            raise ValueError("give exactly one of ratio and kept")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ConstraintError("the ratio is out of range", node="ratio", expected="in (0, 1)", found=self.ratio)
        return self

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        mask = mask_of(graph)
        n = mask.shape[0]
        keep = self._choose(graph, n, ctx.seed)
        if len(keep) == 0 or keep[0] < 0 or keep[-1] >= n:
            raise ConstraintError("the kept channels are out of range", node="kept", expected=f"0..{n - 1}", found=keep)
        data = np.full(n, self.value, np.float32)
        data[keep] = 1
        graph.set_weight(mask, data.astype(mask.numpy().dtype))
        for name in [m for m in graph.weights if re.search(rf"(?:^|[./]){FILL}$", m)]:  # there are layer norms
            filled = np.where(data == 0, 1 / data.mean(), 0)
            graph.set_weight(graph.weight(name), filled.astype(graph.weight(name).numpy().dtype))
        reason = f"{len(keep)} of {n} channels stay"
        return Outcome(decisions=[Decision(mask.name, "masked", reason, {"kept": keep.tolist()})])

    def _choose(self, graph: Graph, n: int, seed: int) -> np.ndarray:
        if self.kept is not None:
            return np.unique(self.kept)
        assert self.ratio is not None
        count = min(max(round(n * (1 - self.ratio) / self.round_to), 1) * self.round_to, n)
        return np.sort(np.argsort(-self._scores(graph, n, seed), kind="stable")[:count])

    def _scores(self, graph: Graph, n: int, seed: int) -> np.ndarray:
        if self.criterion == "mask":
            learnt = np.abs(mask_of(graph).numpy().astype(np.float64))
            if np.ptp(learnt) == 0:
                hint = "P.InsertLinearOp(learn_mask=True), then train"
                raise ConstraintError("the shared mask was not trained", node=MASK, found="one value", hint=hint)
            return learnt
        folded = graph.clone()
        anchor = stream_anchor(folded)
        fold_ops(folded)
        groups = axis_groups(folded)
        g = next(h for h in groups.of(*anchor) if h.size == n)
        scores = importance(groups, [g], self.criterion, seed, self.reduction)
        if g not in scores:
            raise ConstraintError("the criterion finds nothing to judge the stream by", value=self.criterion)
        return scores[g]


class FoldLinearOp(Pass):
    """Absorb the linear ops up- and downstream and cut the masked channels out of the whole residual stream.

    Behind a writer W' = D W, b' = D b; before readers W' = W D; then the mask's zeros are sliced out of embeddings,
    norms, projections and head. A norm over d' of d channels has the mean square d / d' times as large: means get a
    factor d' / d, and norm operators the gain sqrt(d / d') and eps d / d'. The function of the masked model is kept.

    Raises:
        ConstraintError: there is no mask, it is not all zeros and ones, an op can no longer be absorbed (its neighbour
            is tied or was replaced), or a statistic over the stream cannot be corrected.
    """

    name: ClassVar[str] = "fold_linear_op"
    contract: ClassVar[Contract] = Contract.EXACT
    needs: ClassVar[Needs] = Needs.NOTHING
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    establishes: ClassVar[frozenset[str]] = frozenset({"pruned"})

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        mask = mask_of(graph).numpy()
        if not np.isin(mask, (0, 1)).all() or not mask.any():
            raise ConstraintError(
                "the shared mask is not all zeros and ones",
                node=MASK,
                found=f"{mask.min():g} .. {mask.max():g}",
                hint="set it with P.SharedMask(..., value=0) before folding",
            )
        anchor, keep = stream_anchor(graph), np.flatnonzero(mask)
        decisions = fold_ops(graph)
        plan = slice_stream(graph, anchor, keep)
        reason = f"{len(keep)} of {len(mask)} channels of the residual stream stay"
        decisions.append(Decision(f"{anchor[0]}:{anchor[1]}", "cut", reason, {"kept": len(keep), "size": len(mask)}))
        details = {"groups": [{"name": anchor[0], "size": len(mask), "kept": len(keep), "reason": ""}]}
        return Outcome(decisions=decisions, details=details, plan=plan)


def identity_loss(module: torch.nn.Module) -> torch.Tensor:
    """Sum over the linear ops of |D D^T - I|^2 / width, differentiable: how far the ops are from orthogonal."""
    import torch

    names: dict[str, str] = getattr(module, "weight_names", {})  # a module made from ONNX keeps them here
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, p in module.named_parameters():
        hit = OP.search(names.get(name, name))
        if hit:
            found.setdefault(hit[1], {})[hit[2]] = p
    if not found:
        raise ConstraintError("this module has no linear ops", found=type(module).__name__, hint="P.insert_linear_op")
    losses = []
    for pair in found.values():
        eye = torch.eye(pair["down"].shape[0], device=pair["down"].device, dtype=pair["down"].dtype)
        d = eye + pair["down"] @ pair["up"]
        losses.append((d @ d.T - eye).square().sum() / len(eye))
    return torch.stack(losses).sum()


def mask_loss(module: torch.nn.Module) -> torch.Tensor:
    """Mean absolute value of the mask that is being learnt, differentiable: what makes it let go of channels."""
    names: dict[str, str] = getattr(module, "weight_names", {})
    found = [p for name, p in module.named_parameters() if re.search(rf"(?:^|[./]){MASK}$", names.get(name, name))]
    if not found:
        hint = "P.insert_linear_op(..., learn_mask=True)"
        raise ConstraintError("this module learns no mask", found=type(module).__name__, hint=hint)
    return found[0].abs().mean()


# ---- where the stream is -------------------------------------------------------------------------------------------
def stream_group(groups: AxisGroups, name: str | None) -> AxisGroup:
    """The group of that name, or the selectable one with most members."""
    free = [g for g in groups if g.can("select") and not g.nested]
    if name is not None:
        g = groups[name]
        if g not in free:
            raise ConstraintError("this axis group cannot be cut", node=name, found=g.why() or "nested")
        return g
    if not free:
        raise ConstraintError("no axis group can be cut", hint="`foldline inspect MODEL` tells why")
    return max(free, key=lambda g: len(g.members))


class _Stream:
    """Where one axis group runs through a graph, before anything is inserted."""

    def __init__(self, groups: AxisGroups, g: AxisGroup) -> None:
        self.groups, self.g = groups, g

    def axis(self, v: Value | None) -> int | None:
        """The axis of a computed value that is exactly the group, if one is."""
        if v is None or v.is_const or v not in self.groups.analysis.spaces:
            return None
        for i, e in enumerate(self.groups.analysis.spaces[v]):
            e = norm(e)
            if isinstance(e, Leaf) and e.atom is self.g.atom:
                return i
        return None

    def written_by(self, node: Node) -> Weight | None:
        """The weight with which a node writes to the stream, if it does."""
        position = {"linear": 1, "conv": 1, "gather": 0}.get(node.op)
        value = None if position is None else node.input(position)
        if value is None or value.weight is None:
            return None
        made = {m.axis for m in self.g.members if m.weight is value.weight}
        out = (
            1 if node.op == "gather" else int(bool(node.attrs.get("transposed_weight") or node.attrs.get("transposed")))
        )
        return value.weight if out in made else None

    def keeps_zero(self, node: Node) -> bool:
        """Whether channels of zeros in the operands are channels of zeros in the result."""
        inside = [self.axis(v) is not None for v in node.inputs if v is not None]
        if node.op in INVERSE or (node.op == "div" and len(inside) > 1 and inside[1]):
            raise ConstraintError(
                "a masked channel would be divided by zero here", node=node.name, found=node.op, value=self.g.name
            )
        if node.op in ("add", "sub", "addn", "maximum", "minimum"):
            return all(inside)
        if node.op in ("mul", "div", "pow"):
            return any(inside) and (node.op != "pow" or inside[0])
        return node.op in KEEP_ZERO

    def readers(self) -> list[Value]:
        """Values that only untied linears read, along the group: an op on them can be absorbed downstream."""
        found = []
        for node in self.groups.graph.nodes:
            v = node.outputs[0]
            if self.axis(v) is None or v.rank is None or self.axis(v) != v.rank - 1 or v.is_output:
                continue
            if v.uses and all(u.op == "linear" and i == 0 and _untied(u.input(1)) for u, i in v.uses):
                found.append(v)
        return found


def _untied(value: Value | None) -> bool:
    return value is not None and value.weight is not None and len(value.uses) == 1


def _foldable(weight: Weight, node: Node) -> bool:
    return weight.value is not None and len(weight.value.uses) == 1 and node.op in ("linear", "gather")


def _last(node: Node, axis: int) -> bool:
    return node.output.rank is not None and axis == node.output.rank - 1


def mask_of(graph: Graph) -> Weight:
    """The shared mask. Raises ConstraintError where no pass has inserted one."""
    return graph.weight(_named(graph, MASK))


def _named(graph: Graph, end: str) -> str:
    found = [n for n in graph.weights if re.search(rf"(?:^|[./]){end}$", n)]
    if len(found) != 1:
        raise ConstraintError(
            "the model has no linear ops to work on", node=end, found=len(found), hint="P.insert_linear_op makes them"
        )
    return found[0]


def stream_anchor(graph: Graph) -> tuple[str, int]:
    """A weight and axis that stand for the stream, whatever is inserted or folded."""
    groups = axis_groups(graph)
    (g,) = groups.of(mask_of(graph), 0)
    own = [m for m in g.members if not re.search(r"(?:^|[./])pat_", m.weight.name)]
    alone = next((m for m in own if groups.of(m.weight, m.axis) == [g]), None)
    if alone is None:
        raise ConstraintError("the mask no longer belongs to the residual stream", node=MASK)
    return alone.weight.name, alone.axis


# ---- inserting -----------------------------------------------------------------------------------------------------
def _insert_op(graph: Graph, x: Value, after: Node, i: int, n: int, rank: int, rng: np.random.Generator) -> Node:
    """x + (x A) B behind ``after``, for every use of x."""
    down = graph.add_weight(f"pat_{i}_down", rng.normal(0, n**-0.5, (n, rank)).astype(np.float32), trainable=True)
    up = graph.add_weight(f"pat_{i}_up", np.zeros((rank, n), np.float32), trainable=True)
    attrs = {"transposed_weight": True}
    one = graph.insert("linear", [x, down], attrs, name=f"pat_{i}_one", after=after, scope=after.scope)
    two = graph.insert("linear", [one.output, up], attrs, name=f"pat_{i}_two", after=one, scope=after.scope)
    total = graph.insert("add", [x, two.output], name=f"pat_{i}_sum", after=two, scope=after.scope)
    graph.replace_uses(x, total.output, except_nodes=[one, total])
    return total


def _insert_mask(graph: Graph, x: Value, last: Node, mask: Value, axis: int, n: int) -> None:
    seen = last.output if last.output is not x else x
    rank = seen.rank or 0
    factor, after = mask, last
    if axis != rank - 1:
        shape = [n] + [1] * (rank - 1 - axis)
        after = graph.insert("reshape", [mask], {"shape": shape}, name=f"{last.name}_pat_view", after=last)
        factor = after.output
    name = f"{x.producer.name if x.producer is not None else x.name}_pat_mask"
    made = graph.insert("mul", [seen, factor], name=name, after=after, scope=last.scope)
    graph.replace_uses(seen, made.output, except_nodes=[made])


def _fill(graph: Graph, node: Node, axis: int, fill: Value) -> None:
    """Let a layer norm see the mean of the kept channels in the removed ones."""
    x = node.inputs[0]
    if x is None or x.producer is None or list(node.attrs["axes"]) != [axis]:
        raise ConstraintError("this layer norm spans more than the stream", node=node.name, value=node.attrs["axes"])
    mean = graph.insert("mean", [x], {"axes": [axis], "keepdims": True}, name=f"{node.name}_pat_mean", after=x.producer)
    part = graph.insert("mul", [mean.output, fill], name=f"{node.name}_pat_part", after=mean)
    total = graph.insert("add", [x, part.output], name=f"{node.name}_pat_fill", after=part)
    graph.set_input(node, 0, total.output)
