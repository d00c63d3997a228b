"""The pass FuseParallelLinears: linears or convolutions side by side over one input become one wider operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ...graph.ir import Graph, Node, Value
from ..base import Context, Contract, Needs, Outcome, Pass
from ..rewrite import Env, Refusal, Rewrite, Rule, Why, rewrite
from .chains import WEIGHTED, Link, link, spatial_axes
from .hidden import MergeHidden
from .hosts import insert_kernel
from .kernels import Form, Kernel, stacked
from .operands import BiasSlot, bias_slot, channel_axis, groups, stored_weight


class FuseSideBySide(Rule):
    """Fuse linears (or convolutions) that read one value into one, and split its output: q, k and v, gate and up.

    Identity: ``[W1 x + b1; W2 x + b2; ...] = [W1; W2; ...] x + [b1; b2; ...]``; rows are copied, no number changes.
    Conditions: one input, one kind of operator with equal stride, padding, dilation and kernel, no groups; constant
    weights and biases that nothing else uses.
    Refuses: tied weights, weights or biases computed at run time, different dtypes.
    Source of the method: "Sequential Training of Neural Networks with Gradient Boosting" (branches become one net).
    """

    name: ClassVar[str] = "fuse_side_by_side"
    ops: ClassVar[tuple[str, ...]] = WEIGHTED

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        source = node.inputs[0]
        if source is None or groups(node) != 1 or node.attrs.get("transposed"):
            return None
        users = {id(user) for user, position in source.uses if position == 0}
        if len(users) < 2:
            return None
        order = {id(n): i for i, n in enumerate(env.graph.nodes)}
        beside = sorted((u for u, i in source.uses if i == 0 and _alike(u, node)), key=lambda n: order[id(n)])
        axes = spatial_axes(node)
        own = _member(node, axes or 0)
        if isinstance(own, Refusal) or axes is None:
            return own if isinstance(own, Refusal) else None
        found = [own if other is node else _member(other, axes) for other in dict.fromkeys(beside)]
        members = [m for m in found if isinstance(m, Member) and m.form.axes == own.form.axes]
        if len(members) < 2 or members[0] is not own:
            return None
        return _fused(members, source)


@dataclass(eq=False)
class Member:
    """One of the operators side by side: it, as a kernel, and where its bias is."""

    node: Node
    item: Link
    slot: BiasSlot

    @property
    def form(self) -> Form:
        return self.item.form

    def load(self) -> Kernel:
        kernel = self.item.load()
        if self.slot.holder is self.node or self.slot.value is None:
            return kernel
        return Kernel(replace(kernel.form, biased=True), kernel.weight, self.slot.data(kernel.form.outputs))


def _member(node: Node, axes: int) -> Member | Refusal:
    held = stored_weight(node)
    if isinstance(held, Refusal):
        return Refusal(held.reason, held.node, Why.TIED)
    item = link(node, axes)
    if isinstance(item, Refusal):
        return item
    slot = bias_slot(node, item.form.outputs)
    return slot if isinstance(slot, Refusal) else Member(node, item, slot)


def _alike(a: Node, b: Node) -> bool:
    """Whether two operators differ in nothing but their numbers."""
    return a.op == b.op and not b.dynamic and groups(b) == 1 and not b.attrs.get("transposed")


def _fused(members: Sequence[Member], source: Value) -> Rewrite:
    first = members[0].node
    sizes = [member.form.outputs for member in members]
    axis = channel_axis(first, first.output)
    assert isinstance(axis, int)
    window = list(dict.fromkeys([*(m.node for m in members), *(m.slot.holder for m in members)]))

    def apply(graph: Graph) -> Sequence[Node]:
        kernel = stacked([(member.load(), 1.0) for member in members], axis=0)
        wide = insert_kernel(graph, first, source, kernel)
        made = graph.insert(
            "split",
            [wide.output],
            {"axis": axis, "sizes": sizes},
            name=f"{first.name}_split",
            after=wide,
            scope=first.scope,
        )
        for member, new in zip(members, made.outputs, strict=True):
            graph.replace_uses(member.slot.holder.output, new, except_nodes=[made, wide])
        return [wide, made]

    names = ", ".join(member.node.name for member in members)
    data = {"sizes": sizes}
    return Rewrite(window, apply, "fused", f"{names} read one value: they are one operator and a split", data)


class FuseParallelLinears(Pass):
    """Fuse linears and convolutions over one input into one wider operator, and parallel hidden layers into one.

    Identity: ``[W1 x; W2 x] = [W1; W2] x``, and ``sum_t V_t act(W_t x + b_t) = [V_1 ... V_T] act([W_1; ...] x + b)``:
    weights are concatenated, no number changes. q, k and v, gate and up projections, the branches of an ensemble or of
    a boosted network become one operator each; fewer and larger matrix products are usually faster, but not always:
    measure (that is why this is a pass of its own and no part of ``fold``).
    Source of the method: "Sequential Training of Neural Networks with Gradient Boosting".
    """

    name: ClassVar[str] = "fuse_parallel_linears"
    contract: ClassVar[Contract] = Contract.EXACT
    needs: ClassVar[Needs] = Needs.NOTHING
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    keep: int | None = None
    """Of every sum of hidden layers only the first so many terms (a boosted network stopped early); all if None."""

    def promise(self) -> Contract:
        """Exact, unless terms are left out."""
        return self.contract if self.keep is None else Contract.APPROXIMATE

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        """Fuse what reads one value; the function stays the same to float tolerance (without ``keep``)."""
        # whole hidden layers first: a split in front of their activations would keep them apart
        logs = [rewrite(graph, [rule], Env(graph, ctx)) for rule in (MergeHidden(self.keep), FuseSideBySide())]
        fused, refused = sum(len(log.applied) for log in logs), sum(len(log.refused) for log in logs)
        if fused:
            graph.refresh()
        return Outcome(
            decisions=[d for log in logs for d in log.decisions], details={"fused": fused, "refused": refused}
        )
