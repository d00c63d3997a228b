"""Parts of a graph that stay in float, found by structure: attention cores, mask additions, arithmetic on shapes."""

from __future__ import annotations

from collections.abc import Iterable

from ....graph.ir import Graph, Node, Value

# Between the scores' product and the softmax, and between the softmax and the product with the values.
SCORES = frozenset(
    "add sub mul div where masked_fill cast clip identity reshape transpose expand squeeze unsqueeze tanh slice".split()
)
SHARES = frozenset("cast identity reshape transpose expand squeeze unsqueeze mul div where masked_fill slice".split())
PRODUCTS = frozenset(("matmul", "einsum"))
LAYERS = frozenset(("linear", "conv"))

ATTENTION = "it is part of an attention core, which this target keeps in float"
MASK = "it makes the mask that is added to attention scores"
SHAPE = "it computes with sizes"


def forbidden(graph: Graph, kinds: Iterable[str]) -> dict[str, str]:
    """Node name -> why the node must stay in float, for the kinds of region a spec forbids.

    Softmax is the anchor: upwards through score arithmetic to a product of two activations, downwards through what
    rescales or reshapes the shares to the next one. What is added to the scores without leading to that product is a
    mask; so is everything that serves nothing else.
    """
    kinds = set(kinds)
    found: dict[str, str] = {}
    if "shape" in kinds:
        found |= dict.fromkeys(_shapes(graph), SHAPE)
    if not kinds & {"attention", "mask"}:
        return found
    cores: dict[str, Node] = {}
    for node in graph.nodes:
        if node.op == "sdpa":
            cores[node.name] = node
        elif node.op == "softmax":
            cores |= {n.name: n for n in attention_core(node)}
    if "mask" in kinds:
        found |= dict.fromkeys((n.name for n in _masks(cores)), MASK)
    if "attention" in kinds:
        found |= dict.fromkeys(cores, ATTENTION)
    return found


def is_product(node: Node) -> bool:
    """Whether a node multiplies two activations."""
    return node.op in PRODUCTS and sum(v is not None and not v.is_const for v in node.inputs) > 1


def attention_core(softmax: Node) -> list[Node]:
    """The nodes between the products around a softmax, these included; empty if there is no product on either side."""
    above: dict[str, bool] = {}
    nodes: dict[str, Node] = {}
    up = _leads(softmax.inputs[0], above, nodes)
    down = _follow(softmax, nodes)
    return [softmax, *nodes.values()] if up or down else []


def _leads(value: Value | None, known: dict[str, bool], nodes: dict[str, Node]) -> bool:
    """Whether a value comes from a product of activations through score arithmetic; collects the nodes on the way."""
    top = None if value is None else value.producer
    if top is None:
        return False
    stack = [(top, False)]
    while stack:
        node, ready = stack.pop()
        if not ready and node.name in known:
            continue
        if is_product(node):
            known[node.name], nodes[node.name] = True, node
            continue
        if node.op not in SCORES:
            known[node.name] = False
            continue
        sources = [v.producer for v in node.inputs if v is not None and v.producer is not None]
        if not ready:
            known[node.name] = False
            stack.append((node, True))
            stack += [(s, False) for s in sources if s.name not in known]
        elif any(known.get(s.name) for s in sources):
            known[node.name], nodes[node.name] = True, node
    return known[top.name]


def _follow(softmax: Node, nodes: dict[str, Node]) -> bool:
    """Collect what stands between a softmax and the products behind it; False (collecting nothing) if none is there."""
    passed: dict[str, Node] = {}
    ends: dict[str, Node] = {}
    stack = [softmax]
    while stack:
        for value in stack.pop().outputs:
            for user, _ in value.uses:
                if is_product(user):
                    ends[user.name] = user
                elif user.op in SHARES and user.name not in passed:
                    passed[user.name] = user
                    stack.append(user)
    if not ends:
        return False
    # Of several ways down only those that lead to a product belong to the core.
    alive = set(ends)
    for node in reversed(passed.values()):
        if any(user.name in alive for v in node.outputs for user, _ in v.uses):
            alive.add(node.name)
            nodes[node.name] = node
    nodes |= ends
    return True


def _masks(cores: dict[str, Node]) -> list[Node]:
    """What feeds the cores' additions and selections without being part of a core, and serves nothing else."""
    found: dict[str, Node] = {}
    stack: list[Value | None] = []
    for core in cores.values():
        if core.op == "sdpa":
            stack += core.inputs[3:4]
        elif core.op in ("add", "sub", "where", "masked_fill", "mul"):
            stack += [v for v in core.inputs if v is not None and (v.producer is None or v.producer.name not in cores)]
    while stack:
        value = stack.pop()
        node = None if value is None else value.producer
        if node is None or node.name in found or node.name in cores or node.op in LAYERS:
            continue
        users = [user for v in node.outputs for user, _ in v.uses]
        if all(user.name in cores or user.name in found for user in users):
            found[node.name] = node
            stack += node.inputs
    return list(found.values())


def _shapes(graph: Graph) -> list[str]:
    """Nodes whose operands all come from sizes."""
    made: set[str] = set()
    found = []
    for node in graph.nodes:
        operands = [v for v in node.inputs if v is not None and not v.is_const]
        starts = node.op in ("shape_of", "scalar")
        if starts or (operands and all(v.name in made for v in operands)):
            found.append(node.name)
            made.update(v.name for v in node.outputs)
    return found
