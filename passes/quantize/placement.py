"""Where Q/DQ pairs go: the backend's spec applied to a graph, as data, with a reason for every node it mentions."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...graph.ir import Graph, Node, Value, Weight
from ..base import Decision
from .spec import BackendSpec, OpPlacement


@dataclass
class Point:
    """A value that gets a Q/DQ pair.

    ``root`` names the value whose scale it takes (itself unless tied); ``all_uses`` says whether every consumer reads
    the dequantized value, else only ``readers`` do.
    """

    value: Value
    root: str
    all_uses: bool = False
    readers: list[tuple[Node, int]] = field(default_factory=list)


@dataclass
class WeightSite:
    """A weight operand to store as integers: its output-channel axis, and the bias that goes with it.

    ``bias`` is None where there is none to store; ``bias_node`` is the node itself or the addition behind it.
    """

    node: Node
    position: int
    weight: Weight
    axis: int
    x: Value
    bias: Weight | None = None
    bias_node: Node | None = None
    bias_position: int = -1


@dataclass
class Placement:
    """Points by value name in topological order, weights, and what was decided.

    ``sources[root]`` lists the values whose statistics make the range of that root.
    """

    points: dict[str, Point] = field(default_factory=dict)
    weights: list[WeightSite] = field(default_factory=list)
    sources: dict[str, list[str]] = field(default_factory=dict)
    quantized: dict[str, OpPlacement] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)


def place(graph: Graph, spec: BackendSpec, ignored: set[str]) -> Placement:
    """Apply the spec. ``ignored`` holds names of nodes that stay float. The graph is only read."""
    return _Placer(graph, spec, ignored).run()


class _Placer:
    def __init__(self, graph: Graph, spec: BackendSpec, ignored: set[str]) -> None:
        self.graph = graph
        self.spec = spec
        self.ignored = ignored
        self.plan = Placement()
        self.rules: dict[str, OpPlacement] = {}
        self.joins: dict[str, Node] = {}
        self.wanted: set[str] = set()
        self.outputs: set[str] = set()

    def run(self) -> Placement:
        for node in self.graph.nodes:
            self._classify(node)
        self._settle_joins()
        self._chains()
        self._points()
        return self.plan

    # ---- which nodes take part --------------------------------------------------------------------------------
    def _classify(self, node: Node) -> None:
        if node.op not in self.spec.ops:
            return
        if node.name in self.ignored:
            self._say(node, "kept in float", "it is on the ignore list")
            return
        rule, reason = self.spec.placement(node)
        if rule is None or rule.role == "float":
            # An addition of a constant that does not qualify as a join is nothing to report.
            if rule is not None or any(r.role == "anchor" for r in self.spec.ops[node.op]):
                self._say(node, "kept in float", reason or (rule.reason if rule else ""))
            return
        problem = self._obstacle(node, rule)
        if problem:
            if rule.role != "carry":
                self._say(node, "kept in float", problem)
            return
        self.rules[node.name] = rule
        if rule.role == "join":
            self.joins[node.name] = node
        elif rule.role == "anchor":
            self._anchor(node, rule)

    def _obstacle(self, node: Node, rule: OpPlacement) -> str:
        """Why a node cannot take part, or an empty string."""
        for x in self._data(node, rule):
            if x is None or x.is_const:
                return "an operand that would be quantized as an activation is a constant"
            if x.dtype != "float32":
                return f"its operand is {x.dtype}; integer kernels take float32 around them"
        if rule.role == "carry" and node.op == "pad":
            return "" if node.attrs.get("value") in (0, 0.0, None) else "it pads with a value other than 0"
        if rule.role != "anchor":
            return ""
        w = node.input(rule.weight) if rule.weight is not None else None
        if w is None or w.weight is None:
            return "its weight is computed, not stored (Fold evaluates constant subgraphs)"
        if w.dtype != "float32":
            return f"its weight is {w.dtype}, not float32"
        if any(abs(node.attrs.get(key, 1.0) - 1.0) > 0 for key in ("alpha", "beta")):
            return "integer kernels take alpha = beta = 1"
        return ""

    def _data(self, node: Node, rule: OpPlacement) -> list[Value | None]:
        if rule.data is None:
            return list(node.inputs)
        return [node.input(i) for i in rule.data]

    def _anchor(self, node: Node, rule: OpPlacement) -> None:
        x = node.inputs[0]
        w = node.inputs[rule.weight] if rule.weight is not None else None
        if x is None or w is None or w.weight is None:
            return
        site = WeightSite(node, rule.weight or 0, w.weight, output_axis(node), x)
        bias = node.input(rule.bias) if rule.bias is not None else None
        channels = w.weight.shape[site.axis]
        if rule.bias_dtype == "int32" and bias is not None:
            if bias.weight is None or bias.weight.size != channels:
                self._say(node, "kept in float", "its bias is computed or not one value per output channel")
                del self.rules[node.name]
                return
            site.bias, site.bias_node, site.bias_position = bias.weight, node, rule.bias or 0
        elif rule.bias_dtype == "int32" and rule.bias_add:
            _find_bias_add(site, channels)
        self.plan.weights.append(site)
        self.plan.quantized[node.name] = rule
        self.wanted.update(v.name for v in self._data(node, rule) if v is not None)
        if rule.output == "required":
            self._require(node, rule)

    def _require(self, node: Node, rule: OpPlacement) -> None:
        end = result(node, rule)
        self.wanted.add(end.name)
        self.outputs.add(end.name)

    # ---- joins: quantized where all operands are anyway and the result is wanted ------------------------------------
    def _settle_joins(self) -> None:
        """Start with every candidate and drop those that lack an operand or a taker, until nothing changes."""
        while True:
            available = self._available()
            demanded = self._demanded()
            dropped = []
            for node in self.joins.values():
                rule = self.rules[node.name]
                missing = next((v for v in self._data(node, rule) if v is None or v.name not in available), None)
                if missing is not None:
                    dropped.append((node, f"its operand {missing.name} stays in float"))
                elif result(node, rule).name not in demanded:
                    dropped.append((node, "no quantized op reads its result"))
            if not dropped:
                break
            for node, reason in dropped:
                del self.joins[node.name], self.rules[node.name]
                self._say(node, "kept in float", reason)
        for node in self.joins.values():
            self.plan.quantized[node.name] = self.rules[node.name]

    def _available(self) -> set[str]:
        found = set(self.wanted)
        for node in self.graph.nodes:
            rule = self.rules.get(node.name)
            if rule is None:
                continue
            if rule.role == "join":
                found.add(result(node, rule).name)
            elif rule.role == "carry" and node.inputs[0] is not None and node.inputs[0].name in found:
                found.update(v.name for v in node.outputs)
        return found

    def _demanded(self) -> set[str]:
        found = set(self.wanted)
        for node in reversed(self.graph.nodes):
            rule = self.rules.get(node.name)
            if rule is None:
                continue
            if rule.role == "join":
                found.update(v.name for v in self._data(node, rule) if v is not None)
            elif rule.role == "carry" and any(v.name in found for v in node.outputs) and node.inputs[0] is not None:
                found.add(node.inputs[0].name)
        return found

    def _chains(self) -> None:
        """Everything that joins touch is wanted, and so is each step of a carry chain that leads to a join."""
        for node in self.joins.values():
            rule = self.rules[node.name]
            self._require(node, rule)
            for v in self._data(node, rule):
                while v is not None and v.name not in self.wanted:
                    self.wanted.add(v.name)
                    producer = v.producer
                    if producer is None or not self._is(producer, "carry"):
                        break
                    v = producer.inputs[0]

    def _is(self, node: Node, role: str) -> bool:
        rule = self.rules.get(node.name)
        return rule is not None and rule.role == role

    # ---- points and their scales --------------------------------------------------------------------------------
    def _points(self) -> None:
        ordered = [*self.graph.inputs, *(v for node in self.graph.nodes for v in node.outputs)]
        for value in ordered:
            if value.name in self.wanted:
                self.plan.points[value.name] = Point(value, value.name, value.name in self.outputs)
        for node in self.graph.nodes:
            self._readers(node)
        self._tie()
        for point in self.plan.points.values():
            sources = self.plan.sources.setdefault(point.root, [])
            if not self._carried(point.value):
                sources.append(point.value.name)

    def _readers(self, node: Node) -> None:
        rule = self.rules.get(node.name)
        if rule is None:
            return
        if rule.role == "carry":
            positions = [0] if any(v.name in self.wanted for v in node.outputs) else []
            if positions and node.inputs[0] is not None and node.inputs[0].name in self.wanted:
                self.plan.quantized[node.name] = rule
        else:
            positions = list(range(len(node.inputs))) if rule.data is None else list(rule.data)
        for i in positions:
            v = node.input(i)
            if v is not None and v.name in self.plan.points:
                self.plan.points[v.name].readers.append((node, i))

    def _carried(self, value: Value) -> bool:
        """Whether the value's elements come through a carry op from another point."""
        node = value.producer
        source = node.inputs[0] if node is not None and self._is(node, "carry") else None
        return source is not None and source.name in self.plan.points

    def _tie(self) -> None:
        points = self.plan.points
        parent = {name: name for name in points}

        def find(name: str) -> str:
            while parent[name] != name:
                name = parent[name]
            return name

        order = {name: i for i, name in enumerate(points)}
        for node in self.graph.nodes:
            rule = self.rules.get(node.name)
            if rule is None or not (rule.role == "carry" or rule.same_scale):
                continue
            ends = node.outputs if rule.role == "carry" else [result(node, rule)]
            tied = [v.name for v in [*self._data(node, rule), *ends] if v is not None and v.name in points]
            for a, b in zip(tied, tied[1:], strict=False):
                first, second = sorted((find(a), find(b)), key=order.__getitem__)
                parent[second] = first
        for name, point in points.items():
            point.root = find(name)

    def _say(self, node: Node, action: str, reason: str) -> None:
        self.plan.decisions.append(Decision(node.name, action, reason, {"op": node.op, "scope": node.scope}))


def _find_bias_add(site: WeightSite, channels: int) -> None:
    """Note the constant that a single following addition adds along the last axis, if there is one."""
    value = site.node.output
    if value.is_output or len(value.uses) != 1:
        return
    user, position = value.uses[0]
    other = user.input(1 - position) if user.op == "add" and len(user.inputs) == 2 else None
    if other is None or other.weight is None or other.weight.shape != (channels,) or other.dtype != "float32":
        return
    if user.attrs.get("alpha", 1) == 1:
        site.bias, site.bias_node, site.bias_position = other.weight, user, 1 - position


def output_axis(node: Node) -> int:
    """The weight axis that indexes output channels."""
    if node.op == "conv":
        return 1 if node.attrs.get("transposed") else 0
    return 1 if node.attrs.get("transposed_weight") else 0


def result(node: Node, rule: OpPlacement) -> Value:
    """The node's result after the activations that the backend fuses into it."""
    value = node.output
    while not value.is_output and len(value.uses) == 1:
        user, position = value.uses[0]
        if user.op not in rule.activations or position != 0 or len(user.outputs) != 1:
            break
        value = user.output
    return value
