"""Parallel linear branches over one input become one linear operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...graph.ir import Graph, Node, Value
from ..rewrite import Env, Refusal, Rewrite, Rule, Why
from .chains import SUMS, Chain, chain_of, data_operand, positions, spatial_axes, walk
from .hosts import host_among, prepare, take_over, written_form
from .kernels import Form, add, sum_form

ADDITIONS = (*SUMS, "addn")


@dataclass(eq=False)
class Leaf:
    """One term of a sum.

    Attributes:
        value: the term.
        factor: what it is multiplied by in the sum.
        path: the linear operators that make it, nearest first.
    """

    value: Value
    factor: float
    path: list[Node]

    def down_to(self, source: Value) -> list[Node] | None:
        """The operators between ``source`` and the term; None if it does not start there."""
        value = self.value
        for i, node in enumerate(self.path):
            if value is source:
                return self.path[:i]
            value = _source(node)
        return list(self.path) if value is source else None

    def sources(self) -> list[Value]:
        return [self.value, *(_source(node) for node in self.path)]


def _source(node: Node) -> Value:
    found = data_operand(node)
    assert found is not None
    return found


class MergeBranches(Rule):
    """Merge the terms of a sum that are linear operators over one input into one of them.

    Identity: ``sum_i f_i K_i(x) = (sum_i f_i K_i)(x)``; kernels are laid on a common grid of taps (a smaller kernel
    gets zeros round it, where its padding says it lies), groups on their common divisor; a batch norm, a scale and
    the identity are depthwise 1x1 kernels, an average pool is a depthwise kernel of equal taps, operators one behind
    the other (a low-rank side branch) are multiplied out.
    Conditions: equal strides; outputs of one size; every operator of a branch is read by the next one alone; the sum
    holds a convolution or linear whose weight nothing else uses; neither multiply-accumulates nor stored weights grow.
    Refuses: average pools that leave out their padding, a bias or several taps before a zero-padded operator, training
    mode, transposed convolutions, tied weights, weights and biases computed at run time.
    Source of the method: "RepVGG: Making VGG-style ConvNets Great Again"; "ACNet: Strengthening the Kernel Skeletons
    for Powerful CNN via Asymmetric Convolution Blocks"; "Diverse Branch Block".
    """

    name: ClassVar[str] = "merge_branches"
    ops: ClassVar[tuple[str, ...]] = ADDITIONS

    def __init__(self, grow: bool = False) -> None:
        self.grow = grow

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        if not is_sum(node) or is_inner(node, env):
            return None
        leaves, sums = leaves_of(node, env)
        refusal: Refusal | None = None
        for source, members in _common(leaves):
            found = self._merge(node, source, members, leaves, sums, env)
            if isinstance(found, Rewrite):
                return found
            refusal = refusal or found
        return refusal

    def _merge(
        self, top: Node, source: Value, members: list[Leaf], leaves: list[Leaf], sums: list[Node], env: Env
    ) -> Rewrite | Refusal | None:
        known = Counter(a for leaf in members for n in leaf.path if (a := spatial_axes(n)) is not None)
        refusal: Refusal | None = None
        for axes, _ in known.most_common():
            chains: list[tuple[Leaf, Chain]] = []
            for leaf in members:
                nodes = leaf.down_to(source)
                assert nodes is not None
                found = chain_of(nodes, source, axes)
                if isinstance(found, Chain):
                    chains.append((leaf, found))
                else:
                    refusal = refusal or found
            chosen = self._choose(chains, source, axes, env)
            if isinstance(chosen, Refusal):
                refusal = refusal or chosen
                continue
            return self._rewrite(top, source, *chosen, leaves, sums, env)
        return refusal

    def _choose(
        self, chains: list[tuple[Leaf, Chain]], source: Value, axes: int, env: Env
    ) -> tuple[list[tuple[Leaf, Chain]], Form] | Refusal:
        """The largest set of branches that together cost no more than apart, and the form of their sum."""
        assert source.shape is not None and source.rank is not None
        sizes = [d if isinstance(d, int) else None for d in source.shape[source.rank - axes :]]
        ordered = sorted(chains, key=lambda pair: -pair[1].form.size)
        refusal = Refusal("no two of its terms are linear operators over one input", why=Why.COMMUTE)
        for i, seed in enumerate(ordered):
            if not any(item.weight is not None for item in seed[1].links):
                continue
            taken, form = [seed], seed[1].form
            work, stored = seed[1].work, seed[1].stored
            for other in ordered[:i] + ordered[i + 1 :]:
                both = sum_form([form, other[1].form], sizes)
                if isinstance(both, str):
                    refusal = Refusal(both, why=Why.SHAPE)
                    continue
                both = written_form(both, env.graph)
                cost = both.size * positions(seed[0].value, both.outputs)
                if not self.grow and (cost > work + other[1].work or both.size > stored + other[1].stored):
                    reason = f"one kernel would take {cost} multiply-accumulates, apart {work + other[1].work}"
                    refusal = Refusal(reason, why=Why.SIZE)
                    continue
                taken.append(other)
                form, work, stored = both, cost, both.size
            if len(taken) > 1:
                return taken, form
        return refusal

    def _rewrite(
        self,
        top: Node,
        source: Value,
        taken: Sequence[tuple[Leaf, Chain]],
        form: Form,
        leaves: list[Leaf],
        sums: list[Node],
        env: Env,
    ) -> Rewrite | Refusal | None:
        inner = list(dict.fromkeys(n for _, branch in taken for n in branch.nodes))
        host = host_among([item for _, branch in taken for item in branch.links], inner, form.outputs)
        if host is None or isinstance(host, Refusal):
            return host
        merged = {id(leaf) for leaf, _ in taken}
        rest = [leaf for leaf in leaves if id(leaf) not in merged]
        if any(abs(leaf.factor) != 1.0 for leaf in rest):
            return Refusal("a term that stays has a factor of its own", top.name)
        kernel = add([branch.load() for _, branch in taken], [leaf.factor for leaf, _ in taken], form)
        new = prepare(host, kernel)
        if isinstance(new, Refusal):
            return new
        like = taken[0][0].value

        def apply(graph: Graph) -> Sequence[Node]:
            result = take_over(graph, new, form, source, like)
            made = [new.node]
            after = top
            for leaf in rest:
                op = "add" if leaf.factor > 0 else "sub"
                after = graph.insert(op, [result, leaf.value], name=top.name, after=after, scope=top.scope)
                result = after.output
                made.append(after)
            graph.replace_uses(top.output, result)
            return made

        data = {"branches": len(taken), "into": host.node.name, "taps": list(form.shape[2:])}
        reason = f"{len(taken)} linear branches over {source.name} are one operator, {host.node.name}"
        return Rewrite(list(dict.fromkeys([*inner, *sums, top])), apply, "merged", reason, data)


# ---- sums --------------------------------------------------------------------------------------------------------
def is_sum(node: Node) -> bool:
    """Whether it adds tensors that are all computed at run time, with factors that are numbers."""
    if node.op not in ADDITIONS or not isinstance(node.attrs.get("alpha", 1), (int, float)):
        return False
    return len(node.inputs) > 1 and all(v is not None and not v.is_const for v in node.inputs)


def is_inner(node: Node, env: Env) -> bool:
    """Whether its result is but a term of a larger sum, which is looked at as a whole."""
    users = [user for user, _ in node.output.uses if user.op != "shape_of"]
    return len(users) == 1 and is_sum(users[0]) and env.sole_reader(node.output, users[0]) is None


def leaves_of(top: Node, env: Env) -> tuple[list[Leaf], list[Node]]:
    """The terms of a sum of sums, and the additions inside it."""
    leaves: list[Leaf] = []
    inside: list[Node] = []

    todo: list[tuple[Value, Node, float]] = []

    def push(node: Node, factor: float) -> None:
        terms = []
        for i, value in enumerate(node.inputs):
            own = float(node.attrs.get("alpha", 1)) * (-1.0 if node.op == "sub" else 1.0) if i else 1.0
            assert value is not None
            terms.append((value, node, factor * own))
        todo.extend(reversed(terms))

    push(top, 1.0)
    while todo:
        value, node, factor = todo.pop()
        below = value.producer
        alone = sum(v is value for v in node.inputs) == 1 and env.sole_reader(value, node) is None
        if below is not None and alone and is_sum(below):
            inside.append(below)
            push(below, factor)
        else:
            leaves.append(Leaf(value, factor, list(walk(value, node, env)) if alone else []))
    return leaves, inside


def _common(leaves: list[Leaf]) -> list[tuple[Value, list[Leaf]]]:
    """Values from which at least two terms start, the one with most terms first, the nearest first among equals."""
    starts: dict[int, tuple[Value, list[Leaf]]] = {}
    for leaf in leaves:
        for value in leaf.sources():
            starts.setdefault(id(value), (value, []))[1].append(leaf)
    shared = [pair for pair in starts.values() if len(pair[1]) > 1 and any(leaf.path for leaf in pair[1])]
    return sorted(shared, key=lambda pair: -len(pair[1]))
