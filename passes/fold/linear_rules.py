"""The rules for linear operators beside and behind each other: branches over one input, chains, and both in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ...graph.ir import Graph, Node
from ..rewrite import Env, Refusal, Rewrite, Rule, Why
from .branches import MergeBranches
from .chains import WEIGHTED, chain_of, positions, spatial_axes, walk
from .hosts import host_among, prepare, take_over, written_form
from .kernels import Kernel, add


class MergeChain(Rule):
    """Merge a convolution or linear with the one before it.

    Identity: ``W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2)``; of two convolutions the taps are convolved, strides
    multiply. Constant scales and additions in between are multiplied out too.
    Conditions: the first is read by the second alone; neither multiply-accumulates nor stored weights grow; the weight
    of the second is its own.
    Refuses: a bias, or several taps, in front of zero padding (the second reads zeros at the border, where the first
    would have made something else); transposed convolutions; tied weights; a product that is larger than its factors.
    """

    name: ClassVar[str] = "merge_chain"
    ops: ClassVar[tuple[str, ...]] = WEIGHTED

    def __init__(self, grow: bool = False) -> None:
        self.grow = grow

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        value, axes = node.inputs[0], spatial_axes(node)
        if value is None or axes is None:
            return None
        nodes = [node]
        for before in walk(value, node, env):
            nodes.append(before)
            if before.op in WEIGHTED:
                break
        else:
            return None
        if spatial_axes(nodes[-1]) != axes:
            return None
        source = nodes[-1].inputs[0]
        assert source is not None
        whole = chain_of(nodes, source, axes)
        if isinstance(whole, Refusal):
            return whole
        form = written_form(whole.form, env.graph)
        cost = form.size * positions(node.output, form.outputs)
        if not self.grow and (cost > whole.work or form.size > whole.stored):
            reason = f"one operator would take {cost} multiply-accumulates, the two take {whole.work}"
            return Refusal(reason, nodes[-1].name, Why.SIZE)
        behind = [user for user, _ in node.output.uses]
        host = host_among(whole.links[:1], behind)
        if host is None or isinstance(host, Refusal):
            return host
        kernel = add([whole.load()], [1.0], form)
        if host.slot.holder is not node and kernel.bias is not None:  # the bias sits in an addition behind it
            kernel = Kernel(form, kernel.weight, kernel.bias + host.slot.data(form.outputs))
        new = prepare(host, kernel)
        if isinstance(new, Refusal):
            return new

        def apply(graph: Graph) -> Sequence[Node]:
            take_over(graph, new, form, source, node.output)
            return [node]

        reason = f"{nodes[-1].name} and {node.name} are one operator"
        window = nodes if host.slot.holder is node else [host.slot.holder, *nodes]
        return Rewrite(window, apply, "merged", reason, {"into": node.name, "taps": list(form.shape[2:])})


LINEAR_RULES: list[Rule] = [MergeBranches(), MergeChain()]
