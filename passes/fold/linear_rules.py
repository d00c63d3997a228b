"""The rules for linear operators beside and behind each other: branches over one input, chains, and both in turn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from ...graph.ir import Graph, Node
from ..rewrite import Env, Refusal, Rewrite, Rule, Why
from .branches import MergeBranches
from .chains import WEIGHTED, chain_of, link, positions, spatial_axes, walk
from .hosts import host_among, prepare, take_over, written_form
from .kernels import Kernel, add, through


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
        host = host_among(whole.links[:1], behind, form.outputs)
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


class MergeFlattened(Rule):
    """Merge a convolution into the linear that reads all of its output, flattened.

    Identity: ``L flatten(K x + b) + c = L' flatten(x) + (L flatten(b) + c)`` with ``L' = L K``, K written out as a
    matrix over channels and positions; borders are exact, since K's own zero padding is in that matrix.
    Conditions: channels and positions have fixed sizes, each operator is read by the next alone, neither
    multiply-accumulates nor stored weights grow.
    Refuses: a linear on another axis, tied weights, a matrix that is larger than its factors.
    """

    name: ClassVar[str] = "merge_flattened"
    ops: ClassVar[tuple[str, ...]] = ("linear",)

    def __init__(self, grow: bool = False) -> None:
        self.grow = grow

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        flat = node.inputs[0]
        reshape = None if flat is None else flat.producer
        inner = None if reshape is None or reshape.op != "reshape" else reshape.inputs[0]
        before = None if inner is None else inner.producer
        if flat is None or reshape is None or inner is None or before is None or before.op != "conv":
            return None
        for value, reader in ((flat, node), (inner, reshape)):
            if (seen := env.sole_reader(value, reader)) is not None:
                return seen
        first, last = link(before, spatial_axes(before) or 0), link(node, 0)
        if isinstance(first, Refusal):
            return first
        if isinstance(last, Refusal):
            return last
        source = first.source
        assert inner.shape is not None and source.shape is not None and flat.shape is not None
        made, read = inner.shape[1:], source.shape[1:]
        if len(flat.shape) != 2 or len(made) != len(first.form.axes) + 1 or flat.shape[0] != inner.shape[0]:
            return None
        if not all(isinstance(d, int) for d in (*made, *read)) or last.form.inputs != math.prod(map(int, made)):
            return Refusal(f"the sizes of {inner.name} vary", before.name, Why.SHAPE)
        width = math.prod(map(int, read))
        batch = source.shape[0] if isinstance(source.shape[0], int) else None
        rows = positions(node.output, last.form.outputs)
        size = last.form.outputs * width
        if not self.grow and (rows * size > first.work + last.work or size > first.stored + last.stored):
            reason = f"one linear would take {rows * size} multiply-accumulates, the two take {first.work + last.work}"
            return Refusal(reason, before.name, Why.SIZE)
        host = host_among([last], [user for user, _ in node.output.uses], last.form.outputs)
        if host is None or isinstance(host, Refusal):
            return host
        kernel = through(last.load(), first.load(), [int(d) for d in read[1:]], [int(d) for d in made[1:]])
        if host.slot.holder is not node and kernel.bias is not None:
            kernel = Kernel(kernel.form, kernel.weight, kernel.bias + host.slot.data(last.form.outputs))
        new = prepare(host, kernel)
        if isinstance(new, Refusal):
            return new

        def apply(graph: Graph) -> Sequence[Node]:
            made = graph.insert(
                "reshape", [source], {"shape": [batch, width]}, name=reshape.name, after=before, scope=node.scope
            )
            take_over(graph, new, kernel.form, made.output, node.output)
            return [node, made]

        window = [before, reshape, node] if host.slot.holder is node else [before, reshape, node, host.slot.holder]
        return Rewrite(window, apply, "merged", f"{before.name} and {node.name} are one operator", {"into": node.name})


LINEAR_RULES: list[Rule] = [MergeBranches(), MergeChain(), MergeFlattened()]
