"""Everything computed from parameters and constants alone becomes a stored weight."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...graph.errors import FoldlineError
from ...graph.ir import Graph, Node, Value, Weight
from ...graph.ops import known_ops
from ..base import Context, Decision
from ..rewrite import Env, Refusal, Rewrite, Rule, Why, rewrite
from .evaluate64 import RUNTIME, evaluable, evaluate64

READERS = {
    **dict.fromkeys(("conv", "linear", "batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"), 1),
    **dict.fromkeys(("lstm", "gru", "rnn"), 3),
}
"""Operators whose operands from this position on are wanted as stored weights, whatever computes them."""

MOVES = frozenset(
    "reshape transpose squeeze unsqueeze expand identity concat stack split unbind slice select gather flip roll tile "
    "repeat_interleave cast full full_like arange pad".split()
)
"""Ops without arithmetic. In a module they cost next to nothing, and storing their result may cost it its class."""

FREE = 1 << 20
"""Bytes up to which a result may be stored although it is larger than what it is computed from."""
BUDGET = 64 << 20
"""Bytes that all such results of one run may add together."""
GROWTH = 2.0
"""A result may be this many times as large as the weights that vanish with its computation."""

_NAMES = (
    re.compile(r"^(?P<home>.*?\.?)parametrizations\.(?P<slot>\w+)\."),  # torch.nn.utils.parametrize
    re.compile(r"^(?P<home>(?:.*\.)?)(?P<slot>\w+)_(?:g|v|orig)$"),  # hooks of weight norm and of spectral norm
)


@dataclass
class _Component:
    """Constant nodes that share operands, and the values of theirs that somebody else reads.

    Attributes:
        nodes: operands before readers.
        roots: values with a reader outside, or graph outputs.
        leaves: weights that the nodes read.
        pinned: whether some value must stay computed: a subgraph reads it, or a size at run time.
    """

    nodes: list[Node]
    roots: list[Value]
    leaves: list[Weight]
    pinned: bool
    cones: dict[int, list[Node]] = field(default_factory=dict)

    def cone(self, root: Value) -> list[Node]:
        """The nodes that compute one root."""
        if id(root) not in self.cones:
            wanted = {id(root)}
            found: list[Node] = []
            for node in reversed(self.nodes):
                if any(id(v) in wanted for v in node.outputs):
                    found.append(node)
                    wanted.update(id(v) for v in [*node.inputs, *node.dynamic] if v is not None)
            self.cones[id(root)] = found[::-1]
        return self.cones[id(root)]


class ConstantSubgraph(Rule):
    """Evaluate what is computed from parameters and constants alone, and store the result.

    Identity: a deterministic function of tensors that are the same in every run is itself the same in every run.
    Weight norm, spectral norm (by the stored u and v), orthogonal and other parametrizations, weight standardization,
    adapters beside a weight, hypernetworks with a bound input, hash-shared weights and random subspaces all are such
    functions. Computed in float64, rounded once to the dtype the value had; integers as they are.
    Conditions: every leaf is a weight or a literal, at least one of them a weight (or the result is an operand of a
    linear operator or a norm); every op is deterministic. In a module the result must be an operand of a layer that
    stores such a tensor (ONNX: any); ``Materialise`` takes the others too.
    Refuses: random ops, ops in training mode, control flow, quantize and dequantize (a quantization is worth keeping),
    values that subgraphs or computed sizes read, and results much larger than the weights they replace.
    """

    name = "constant_subgraph"
    ops = tuple(op for op in known_ops() if op not in RUNTIME and op not in ("shape_of", "scalar"))

    def __init__(
        self,
        *,
        free: int = FREE,
        budget: int = BUDGET,
        growth: float = GROWTH,
        within: str = "",
        everywhere: bool = False,
    ) -> None:
        """``free``, ``budget`` (bytes) and ``growth`` set the size guard.

        ``within``: only what this scope reads. ``everywhere``: in modules, too, what no layer of :data:`READERS` reads.
        """
        self.free, self.budget, self.growth, self.within = free, budget, growth, within
        self.everywhere = everywhere

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        """Anchored at a node whose operands are all stored: every constant subgraph has one."""
        if any(v is not None and not v.is_const for v in [*node.inputs, *node.dynamic]):
            return None
        known: dict[Value, bool] = env.memo.setdefault("constant values", {})
        if known.get(node.outputs[0], True) is False or not evaluable(env.graph, node):
            return None
        refused: set[Node] = env.memo.setdefault("constant subgraphs refused", set())
        if node in refused:
            return None
        found = _component(node, env, known)
        roots = [root for root in found.roots if self._wanted(root, found, env.graph)]
        if not roots:
            refused.update(found.nodes)
            return None
        grown = _growth(found, roots)
        spent: int = env.memo.get("constant bytes", 0)
        if not self._affordable(grown, found, roots, spent):
            small = [r for r in roots if _bytes(r) <= self.free]
            grown = sum(map(_bytes, small))
            if not small or spent + grown > self.budget:
                refused.update(found.nodes)
                large = max(roots, key=_bytes)
                return Refusal(
                    f"{large.name} would be stored with {_bytes(large)} bytes in place of {_freed(found)}",
                    node=large.producer.name if large.producer is not None else "",
                    why=Why.SIZE,
                )
            roots = small
        try:
            results = evaluate64(env.graph, roots)
        except FoldlineError as error:  # an operator or dtype that nothing here computes
            refused.update(found.nodes)
            return Refusal(f"it cannot be computed: {error.args[0] if error.args else error}"[:200])
        data = {"values": [r.name for r in roots], "bytes": sum(map(_bytes, roots)), "grown": grown}
        return Rewrite(
            [*_window(found, roots), *_operators(roots)],
            self._storing(env, found, results, grown),
            action="stored",
            reason=f"computed from constants alone: {', '.join(r.name for r in roots[:3])}",
            data=data,
        )

    def _wanted(self, root: Value, found: _Component, graph: Graph) -> bool:
        """Whether storing this value is worth while."""
        outside = [(user, i) for user, i in root.uses if user not in set(found.nodes)]
        if self.within and not any((u.scope + ".").startswith(self.within + ".") for u, _ in outside):
            return False
        read = any(position >= READERS.get(user.op, 99) for user, position in outside)
        cone = found.cone(root)
        if graph.kind == "fx" and not self.everywhere:
            # elsewhere a module has no place for a stored tensor: it would lose its class for a few small operations
            return read and any(node.op not in MOVES for node in cone)
        if read:
            return True
        if root.dtype in ("float16", "bfloat16") and graph.kind == "onnx":
            return False  # no weight of a layer: rounded once it has other digits than rounded at every node
        if not any(v is not None and v.weight is not None for node in cone for v in node.inputs):
            return False
        return not (not outside and len(cone) == 1 and cone[0].op == "identity")  # an output that repeats a weight

    def _affordable(self, grown: int, found: _Component, roots: Sequence[Value], spent: int) -> bool:
        if grown <= 0:
            return True
        stored = sum(map(_bytes, roots))
        if stored <= self.growth * _freed(found):
            return True
        return all(_bytes(r) <= self.free for r in roots) and spent + grown <= self.budget

    def _storing(
        self, env: Env, found: _Component, data: dict[str, np.ndarray], grown: int
    ) -> Callable[[Graph], Sequence[Node] | None]:
        def apply(graph: Graph) -> Sequence[Node]:
            roots = [graph.values[name] for name in data]
            stay = {id(n) for root in found.roots if root.name not in data for n in found.cone(root)}
            window = {n.name for n in found.nodes if id(n) not in stay}  # what computes another result stays
            again: list[Node] = []
            for root in roots:
                again += store(graph, root, data[root.name], window)
            env.memo["constant bytes"] = env.memo.get("constant bytes", 0) + max(grown, 0)
            return again

        return apply


def store(graph: Graph, root: Value, data: np.ndarray, window: set[str]) -> list[Node]:
    """Let every reader of ``root`` read a stored tensor instead; returns those readers.

    The tensor takes the place and name of a weight that only the computation (nodes by name in ``window``) read and
    that looks like it, else the name under which parametrized modules show it, else the name of the value.
    """
    readers = [user for user, _ in root.uses]
    outside = [user for user in readers if user.name not in window]
    leaves = _leaves_of(root)
    trainable = any(w.trainable for w in leaves)
    trainable |= any(v is not None and v.weight is not None and v.weight.trainable for u in outside for v in u.inputs)
    trainable &= np.asarray(data).dtype.kind not in "iub"
    name = _given_name(leaves)
    old = None if name else _replaceable(root, leaves, window)
    if old is not None and old.value is not None:
        graph.set_weight(old, data)
        stored = old.value
    else:
        stored = graph.add_weight(
            name or root.name, np.ascontiguousarray(data).reshape(data.shape), trainable=trainable
        )
    inner = [user for user in readers if user.name in window]
    graph.replace_uses(root, stored, except_nodes=inner)
    return outside


def _leaves_of(root: Value) -> list[Weight]:
    """The weights from which a value is computed, in the order in which a walk up finds them."""
    found: dict[str, Weight] = {}
    seen: set[int] = set()
    stack = [root]
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if value.weight is not None:
            found.setdefault(value.weight.name, value.weight)
        elif value.producer is not None:
            stack += [v for v in [*value.producer.inputs, *value.producer.dynamic] if v is not None][::-1]
    return list(found.values())


def _given_name(leaves: Iterable[Weight]) -> str:
    """The name of the parametrized tensor to which the leaves belong, if they name one."""
    for leaf in leaves:
        for pattern in _NAMES:
            if (found := pattern.match(leaf.name)) is not None:
                return found["home"] + found["slot"]
    return ""


def _replaceable(root: Value, leaves: Iterable[Weight], window: set[str]) -> Weight | None:
    """A weight of the result's shape and dtype that nothing but its computation reads."""
    fits = [
        leaf
        for leaf in leaves
        if leaf.shape == tuple(root.shape or ()) and leaf.dtype == root.dtype and leaf.shape
        if len(leaf.aliases) == 1 and leaf.value is not None and not leaf.value.is_output
        if all(user.name in window for user, _ in leaf.value.uses)
    ]
    fits.sort(key=lambda w: (w.kind != "parameter", w.name.rpartition(".")[2] != "weight"))
    return fits[0] if fits else None


def _component(start: Node, env: Env, known: dict[Value, bool]) -> _Component:
    """The constant nodes connected with ``start`` through values that only constant nodes make."""
    if "size readers" not in env.memo:
        readers: dict[Value, list[Node]] = {}
        for node in env.graph.nodes:
            for size in node.dynamic:
                readers.setdefault(size, []).append(node)
        env.memo["size readers"] = readers
    sized: dict[Value, list[Node]] = env.memo["size readers"]
    nodes: dict[Node, None] = {}
    stack = [start]
    while stack:
        node = stack.pop()
        if node in nodes:
            continue
        nodes[node] = None
        stack += [v.producer for v in [*node.inputs, *node.dynamic] if v is not None and v.producer is not None]
        for made in node.outputs:
            users = [*(user for user, _ in made.uses), *sized.get(made, ())]
            stack += [user for user in users if user not in nodes and _is_constant(user, env, known)]
    order = _ordered(nodes)
    made_here = {v for node in order for v in node.outputs}
    pinned = any(id(v) in env.captured or any(n not in nodes for n in sized.get(v, ())) for v in made_here)
    roots: list[Value] = []
    leaves: dict[str, Weight] = {}
    for node in order:
        for value in node.inputs:
            if value is not None and value.weight is not None:
                leaves.setdefault(value.weight.name, value.weight)
        for made in node.outputs:
            if made.is_output or any(user not in nodes for user, _ in made.uses):
                roots.append(made)
    return _Component(order, roots, list(leaves.values()), pinned)


def _ordered(nodes: Iterable[Node]) -> list[Node]:
    """Operands before readers, without a look at the rest of the graph."""
    order: list[Node] = []
    done: set[Node] = set()
    inside = set(nodes)
    for first in nodes:
        stack: list[tuple[Node, bool]] = [(first, False)]
        while stack:
            node, ready = stack.pop()
            if ready:
                order.append(node)
            elif node not in done:
                done.add(node)
                stack.append((node, True))
                feeding = [
                    v.producer for v in [*node.inputs, *node.dynamic] if v is not None and v.producer is not None
                ]
                stack += [(n, False) for n in feeding if n in inside and n not in done]
    return order


def _is_constant(node: Node, env: Env, known: dict[Value, bool]) -> bool:
    """Whether every operand of a node is the same in every run and the node deterministic; answers are remembered."""
    stack: list[tuple[Node, bool]] = [(node, False)]
    while stack:
        at, ready = stack.pop()
        made = at.outputs[0] if at.outputs else None
        if made is None or (made in known and not ready):
            if at is node:
                return made is not None and known[made]
            continue
        feeding = [v for v in [*at.inputs, *at.dynamic] if v is not None and not v.is_const]
        missing = [v.producer for v in feeding if v.producer is not None and v not in known]
        if not ready and missing and not any(v.producer is None for v in feeding):
            stack.append((at, True))
            stack += [(n, False) for n in missing]
            continue
        same = all(known.get(v, False) for v in feeding) and evaluable(env.graph, at) and at.op != "shape_of"
        known.update((v, same) for v in at.outputs)
    return known[node.outputs[0]]


def _window(found: _Component, roots: Sequence[Value]) -> list[Node]:
    """The nodes that compute ``roots``."""
    if len(roots) == len(found.roots):
        return found.nodes
    wanted = {id(node) for root in roots for node in found.cone(root)}
    return [node for node in found.nodes if id(node) in wanted]


def _operators(roots: Sequence[Value]) -> list[Node]:
    """The operators for whose sake ``roots`` are stored: without them the rule might leave the computation as it is."""
    found = {user: None for root in roots for user, i in root.uses if i >= READERS.get(user.op, 99)}
    return list(found)


def _bytes(value: Value) -> int:
    shape = value.hint if value.hint is not None else ()
    return int(np.prod(shape, dtype=np.int64)) * _width(value.dtype)


def _width(dtype: str) -> int:
    digits = re.search(r"(\d+)", dtype)
    return max(1, int(digits[1]) // 8) if digits else 1


def _freed(found: _Component) -> int:
    """Bytes of the weights that vanish with the whole component."""
    if found.pinned:
        return 0
    inside = set(found.nodes)
    gone = [
        w
        for w in found.leaves
        if w.value is not None and not w.value.is_output and all(user in inside for user, _ in w.value.uses)
    ]
    return sum(w.size * _width(w.dtype) for w in gone)


def _growth(found: _Component, roots: Sequence[Value]) -> int:
    """Bytes that the model gains when ``roots`` are stored."""
    return sum(map(_bytes, roots)) - (_freed(found) if len(roots) == len(found.roots) else 0)


CONSTANT_RULES: list[Rule] = [ConstantSubgraph()]


def materialize(graph: Graph, ctx: Context) -> list[Decision]:
    """Run :data:`CONSTANT_RULES` alone; what was stored and what was refused."""
    return rewrite(graph, CONSTANT_RULES, Env(graph, ctx)).decisions
