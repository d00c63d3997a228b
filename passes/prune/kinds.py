"""What an axis group is in the network (heads, FFN width, residual width), told from the graph's structure alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from ...graph.analysis import Analysis
from ...graph.errors import ConstraintError
from ...graph.groups import AxisGroup, AxisGroups
from ...graph.ir import Node, Value
from ...graph.space import Atom, Leaf, Prod, Space, Sum, atoms, norm
from ..base import nearest
from .blocks import Reach, skip_of

KINDS: dict[str, str] = {
    "heads": "attention heads; under grouped-query attention the query heads of each key-value group",
    "kv_groups": "key-value heads of grouped-query attention, each with its query heads",
    "head_dim_qk": "width of a head's queries and keys",
    "head_dim_v": "width of a head's values",
    "head_dim": "width of a head where one layout (a fused qkv) ties queries, keys and values",
    "hidden": "hidden state of an LSTM, GRU or RNN",
    "residual": "width of a stream that residual sums carry through the network",
    "ffn": "width between two linear (or recurrent) layers, gated ones included",
    "channels": "channels between convolutions, and whatever else weights produce and consume",
    "table": "positions of a stored table: no weight produces or consumes them",
}
RECURRENT = ("lstm", "gru", "rnn")
LINEAR = ("linear", "matmul", "einsum")
TELLING = frozenset((*RECURRENT, "sdpa", "matmul", "einsum", "add", "addn"))
"""Ops whose operands say what their axes are."""
FORWARD = frozenset(
    "add sub mul div where masked_fill clip tanh cast identity dropout reshape transpose expand unsqueeze squeeze "
    "concat slice pad neg sdpa".split()
)
"""Ops that stand between attention scores and their softmax, or between it and the product with the values."""


def kinds(groups: AxisGroups) -> dict[AxisGroup, str]:
    """The kind (a key of :data:`KINDS`) of every group.

    Nothing is read from names: heads are batch axes of products of two activations, the widths of heads are the axes
    that such products contract (before a softmax) or carry on (after it), the residual width is that of sums
    ``x + f(x)``, the hidden size is what recurrent weights feed back.
    """
    found: dict[AxisGroup, set[str]] = {}
    reach = Reach(groups.graph)
    for node in groups.graph.nodes:
        if node.op not in TELLING:
            continue
        for kind, atom in _signs(groups.analysis, node, reach):
            g = groups.by_atom(atom)
            if g is not None:
                found.setdefault(g, set()).add(kind)
    return {g: _decide(groups, g, found) for g in groups}


def _signs(an: Analysis, node: Node, reach: Reach) -> Iterator[tuple[str, Atom]]:
    """(kind, atom) pairs that one node gives evidence of."""
    if any(v is not None and v not in an.spaces for v in node.inputs) or any(v not in an.spaces for v in node.outputs):
        return
    if node.op in RECURRENT:
        yield from (("hidden", a) for v in node.outputs for a in atoms(an.of(v)[-1]))
    elif node.op == "sdpa":
        q, k, v = node.inputs[:3]
        assert q is not None and k is not None and v is not None
        yield from (("heads", a) for e in an.of(q)[:-2] for a in atoms(e))
        yield from (("head_dim_qk", a) for a in atoms(an.of(q)[-1]))
        yield from (("head_dim_v", a) for a in atoms(an.of(v)[-1]))
    elif node.op in ("matmul", "einsum") and len(node.inputs) == 2:
        yield from _product(an, node)
    elif node.op in ("add", "addn"):
        pair = skip_of(node, reach)
        if pair is not None:
            yield from (("residual", a) for e in an.of(pair[0])[1:] for a in atoms(e))
        elif len(node.inputs) == 2 and _two_branches(node.inputs[0], node.inputs[1], reach):
            yield from (("joined", a) for e in an.of(node.output)[1:] for a in atoms(e))


def _two_branches(a: Value | None, b: Value | None, reach: Reach) -> bool:
    """Whether both operands come from layers that the other does not depend on (a projected shortcut)."""
    if a is None or b is None:
        return False
    one, two = reach.of(a), reach.of(b)
    return bool(one & ~two & reach.weighty and two & ~one & reach.weighty)


def _product(an: Analysis, node: Node) -> Iterator[tuple[str, Atom]]:
    """Evidence from a product of two activations: attention, softmax or not."""
    a, b = node.inputs
    if a is None or b is None or an.is_const(a) or an.is_const(b):
        return
    together, contracted, free = _axes(an, node, a, b)
    yield from (("heads", x) for x in together)
    if _meets_softmax(node.output, forward=True):
        yield from (("head_dim_qk", x) for x in contracted)
    elif any(_meets_softmax(v, forward=False) for v in (a, b)):
        yield from (("head_dim_v", x) for x in free)
    else:  # linear attention: q (k^T v)
        yield from (("head_dim_qk", x) for x in contracted)
        yield from (("head_dim_v", x) for x in free)


def _axes(an: Analysis, node: Node, a: Value, b: Value) -> tuple[list[Atom], list[Atom], list[Atom]]:
    """Atoms of the batch axes, of the contracted axes, and of the axes that only one operand has."""
    left, right = an.of(a), an.of(b)
    if node.op == "matmul":
        if len(left) < 2 or len(right) < 2:
            return [], [], []
        batch, inner = [*left[:-2], *right[:-2]], [left[-1], right[-2]]
        outer = [left[-2], right[-1]]
    else:
        first, _, result = node.attrs["equation"].partition("->")
        one, two = first.split(",")
        if "." in first or len(one) != len(left) or len(two) != len(right):
            return [], [], []
        both = set(one) & set(two)
        axes = [*zip(one, left, strict=True), *zip(two, right, strict=True)]
        batch = [e for c, e in axes if c in both and c in result]
        inner = [e for c, e in axes if c in both and c not in result]
        outer = [e for c, e in axes if c not in both]
    return _all_atoms(batch), _all_atoms(inner), _all_atoms(outer)


def _all_atoms(spaces: Iterable[Space]) -> list[Atom]:
    return [a for e in spaces for a in atoms(e)]


def _meets_softmax(v: Value, forward: bool, steps: int = 12) -> bool:
    """Whether a softmax follows (or precedes) a value through elementwise ops and rearrangements."""
    front = [v]
    for _ in range(steps):
        following: list[Value] = []
        for x in front:
            nodes = [n for n, _ in x.uses] if forward else [x.producer] if x.producer is not None else []
            for n in nodes:
                if n.op in ("softmax", "log_softmax"):
                    return True
                if n.op in FORWARD:
                    following += n.outputs if forward else [i for i in n.inputs if i is not None and not i.is_const]
        front = following
    return False


def _decide(groups: AxisGroups, g: AxisGroup, found: dict[AxisGroup, set[str]]) -> str:
    signs = found.get(g, set())
    if not any(m.role in ("produces", "both", "consumes") for m in g.members):
        return "table"
    for kind in ("hidden", "residual"):
        if kind in signs:
            return kind
    if {"head_dim_qk", "head_dim_v"} <= signs:
        return "head_dim"
    for kind in ("head_dim_qk", "head_dim_v"):
        if kind in signs:
            return kind
    if "heads" in signs:
        return "kv_groups" if _shared_by_heads(groups, g, found) else "heads"
    if "joined" in signs:
        return "residual"
    matrices = [m.weight.value for m in g.members if m.role != "carries" and len(m.weight.shape) > 1]
    uses = {n.op for v in matrices if v is not None for n in _readers(v)}
    return "ffn" if uses and uses <= {*LINEAR, *RECURRENT} else "channels"


def _readers(v: Value) -> Iterator[Node]:
    """What reads a stored matrix, through the rearrangements that may stand between (a transpose before a matmul)."""
    for n, _ in v.uses:
        if n.op in ("transpose", "reshape", "cast", "identity", "dequantize"):
            yield from _readers(n.output)
        else:
            yield n


def _shared_by_heads(groups: AxisGroups, g: AxisGroup, found: dict[AxisGroup, set[str]]) -> bool:
    """Whether query heads are an inner factor under this group that the key and value weights do not have."""
    mine = {m.weight for m in g.members}
    for m in g.members:
        e = norm(m.space)
        for part in e.terms if isinstance(e, Sum) else (e,):
            if not isinstance(part, Prod) or not (isinstance(part.factors[0], Leaf) and part.factors[0].atom is g.atom):
                continue
            for a in (x for f in part.factors[1:] for x in atoms(f)):
                inner = groups.by_atom(a)
                if inner is not None and "heads" in found.get(inner, ()) and {x.weight for x in inner.members} < mine:
                    return True
    return False


def chosen_kinds(atoms: str | Sequence[str]) -> tuple[str, ...]:
    """The kinds that a list names; a fused head dim counts when both its halves are named.

    Raises:
        ConstraintError: an unknown kind.
    """
    named = [atoms] if isinstance(atoms, str) else list(atoms)
    for kind in named:
        if not any(fnmatchcase(k, kind) for k in KINDS):
            close = nearest(kind, KINDS)
            raise ConstraintError(
                "unknown kind of axis group",
                node="atoms",
                value=kind,
                expected=", ".join(("outer", "all", *KINDS)),
                hint=f"did you mean {close!r}?" if close else None,
            )
    picked = {k for k in KINDS if any(fnmatchcase(k, kind) for kind in named)}
    if {"head_dim_qk", "head_dim_v"} <= picked:
        picked.add("head_dim")
    return tuple(k for k in KINDS if k in picked)


def of_kind(kinds_of: dict[AxisGroup, str], names: Iterable[str]) -> list[AxisGroup]:
    """The groups of the named kinds, in graph order."""
    wanted = set(names)
    return [g for g, kind in kinds_of.items() if kind in wanted]
