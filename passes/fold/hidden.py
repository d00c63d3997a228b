"""Parallel hidden layers over one input become one: sums of linear, activation, linear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...graph.ir import Graph, Node, Value
from ..rewrite import Env, Refusal, Rewrite, Rule
from .branches import ADDITIONS, Leaf, is_inner, is_sum, leaves_of
from .chains import WEIGHTED, Chain, chain_of, spatial_axes, walk
from .hosts import insert_kernel
from .kernels import stacked

ACTIVATIONS = frozenset(
    "relu leaky_relu elu selu celu gelu silu mish sigmoid hardsigmoid hardswish tanh clip softplus softsign erf exp "
    "square abs sin cos".split()
)
"""Elementwise functions of one operand and constant attributes."""


@dataclass(eq=False)
class Hidden:
    """One term ``V act(W x + b) + c`` of a sum."""

    leaf: Leaf
    after: Chain
    activation: Node
    before: Chain
    source: Value


class MergeHidden(Rule):
    """Merge the terms of a sum that are hidden layers (linear, activation, linear) over one input into one layer.

    Identity: ``sum_t f_t (V_t act(W_t x + b_t) + c_t) = [f_1 V_1 ... f_T V_T] act([W_1; ...; W_T] x + [b_1; ...; b_T])
    + sum_t f_t c_t``.
    Conditions: one elementwise activation with equal attributes, one kernel shape, no groups, inner values read by
    nobody else.
    Refuses: tied weights, kernels of different shapes.
    Source of the method: "Sequential Training of Neural Networks with Gradient Boosting".
    """

    name: ClassVar[str] = "merge_hidden"
    ops: ClassVar[tuple[str, ...]] = ADDITIONS

    def __init__(self, keep: int | None = None) -> None:
        self.keep = keep

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        if not is_sum(node) or is_inner(node, env):
            return None
        leaves, sums = leaves_of(node, env)
        families: dict[object, list[Hidden]] = {}
        for leaf in leaves:
            term = _hidden(leaf, env)
            if term is not None:
                families.setdefault(_family(term), []).append(term)
        for terms in families.values():
            if len(terms) > 1:
                return self._merged(node, terms, leaves, sums)
        return None

    def _merged(self, top: Node, terms: list[Hidden], leaves: list[Leaf], sums: list[Node]) -> Rewrite | Refusal | None:
        kept = terms if self.keep is None else terms[: self.keep]
        taken = {id(term.leaf) for term in terms}
        rest = [leaf for leaf in leaves if id(leaf) not in taken]
        if any(abs(leaf.factor) != 1.0 for leaf in rest):
            return Refusal("a term that stays has a factor of its own", top.name)
        inner = list(dict.fromkeys(n for t in terms for n in (*t.after.nodes, t.activation, *t.before.nodes)))
        first = kept[0]
        early_last = first.before.links[-1].node
        late_last = next(item.node for item in first.after.links if item.weight is not None)

        def apply(graph: Graph) -> Sequence[Node]:
            early = stacked([(t.before.load(), 1.0) for t in kept], axis=0)
            late = stacked([(t.after.load(), t.leaf.factor) for t in kept], axis=1)
            hidden = insert_kernel(graph, early_last, first.source, early)
            act = graph.insert(
                first.activation.op,
                [hidden.output],
                first.activation.attrs,
                name=first.activation.name,
                after=hidden,
                scope=first.activation.scope,
            )
            wide = insert_kernel(graph, late_last, act.output, late, after=act)
            result = wide.output
            after = top
            for leaf in rest:
                op = "add" if leaf.factor > 0 else "sub"
                after = graph.insert(op, [result, leaf.value], name=top.name, after=after, scope=top.scope)
                result = after.output
            graph.replace_uses(top.output, result)
            return [hidden, act, wide]

        reason = f"{len(kept)} hidden layers over {first.source.name} are one"
        data = {"terms": len(terms), "kept": len(kept)}
        return Rewrite(list(dict.fromkeys([*inner, *sums, top])), apply, "merged", reason, data)


def _hidden(leaf: Leaf, env: Env) -> Hidden | None:
    """A term as linear, activation, linear; None where it is anything else."""
    path = leaf.path
    axes = next((a for n in path if (a := spatial_axes(n)) is not None), None)
    if not path or axes is None:
        return None
    inner = leaf.sources()[-1]
    activation = inner.producer
    if activation is None or activation.op not in ACTIVATIONS or len([v for v in activation.inputs if v]) != 1:
        return None
    if env.sole_reader(inner, path[-1]) is not None:
        return None
    fed = activation.inputs[0]
    assert fed is not None
    below = list(walk(fed, activation, env))
    stop = next((i for i, n in enumerate(below) if n.op in WEIGHTED), None)
    if stop is None:
        return None
    below = below[: stop + 1]
    source = below[-1].inputs[0]
    assert source is not None
    after, before = chain_of(path, inner, axes), chain_of(below, source, axes)
    if isinstance(after, Refusal) or isinstance(before, Refusal):
        return None
    if after.form.groups != 1 or before.form.groups != 1 or not after.stored:
        return None
    return Hidden(leaf, after, activation, before, source)


def _family(term: Hidden) -> object:
    """Terms that agree in this are widened into one."""
    act = tuple(sorted((k, str(v)) for k, v in term.activation.attrs.items()))
    early = term.before.form
    return id(term.source), term.activation.op, act, early.axes, early.inputs, term.after.form.axes
