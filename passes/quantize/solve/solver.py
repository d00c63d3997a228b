"""The solver: rules per node, joins where both sides are quantized, residuals, points, and groups of equal scales."""

from __future__ import annotations

from ....graph.ir import Graph, Node, Value
from ...base import Decision
from ..placement import Placement, Point, Tie, WeightSite, result
from ..spec import BackendSpec, OpPlacement, TensorFormat
from .regions import forbidden
from .residual import depths, skip
from .sites import data_operands, obstacle, weight_site
from .union import Groups

REARRANGE = frozenset("reshape transpose squeeze unsqueeze identity flip roll".split())
"""Ops that keep every element: the range before is the range after."""

ASK = "products of two activations are quantized on request only (activation_products=True)"


class Solver:
    """One graph, one spec. Time and memory linear in the number of uses.

    1. Each node gets the first of its rules that holds, or a reason to stay in float.
    2. Anchors ask for quantized operands; residual additions ask for their skip.
    3. Joins take part where every operand is available (one pass down) and their result is asked for (one pass up).
    4. Q moves up across rearranging ops, as far as nobody reads the values in float.
    5. Points that must have equal scales (moved elements, joins of one scale) become groups.
    """

    def __init__(
        self, graph: Graph, spec: BackendSpec, ignored: set[str], *, products: bool = False, tables: bool = True
    ) -> None:
        self.graph = graph
        self.spec = spec
        self.ignored = ignored
        self.products = products
        self.tables = tables
        self.plan = Placement()
        self.rules: dict[str, OpPlacement] = {}
        self.wanted: set[str] = set()
        self.outputs: set[str] = set()
        self.skips: dict[str, int] = {}

    def run(self) -> Placement:
        regions = forbidden(self.graph, self.spec.forbidden)
        for node in self.graph.nodes:
            self._classify(node, regions)
        self._residuals()
        self._settle_joins()
        self._chains()
        if self.spec.hoist:
            self._hoist()
        self._points()
        return self.plan

    # ---- which nodes take part --------------------------------------------------------------------------------
    def _classify(self, node: Node, regions: dict[str, str]) -> None:
        rules = self.spec.alternatives(node.op)
        worth = any(r.role not in ("carry", "float") for r in rules)
        if not rules:
            return
        if node.name in self.ignored:
            self._say(node, "it is on the ignore list")
            return
        if node.name in regions:
            if worth or any(r.role == "float" for r in rules):
                self._say(node, regions[node.name])
            return
        reasons: list[tuple[int, str]] = []
        for rule in rules:
            reason = self._declined(node, rule)
            if not reason and rule.weight is not None and rule.role in ("anchor", "weight_only", "table"):
                site = weight_site(node, rule, self.spec)
                reason = site if isinstance(site, str) else self._take(node, rule, site)
            elif not reason and rule.role != "float":
                self._take(node, rule, None)
            if not reason and rule.role != "float":
                return
            if rule.role not in ("carry", "join", "residual") or worth:
                reasons.append((_weight_of(rule, reason, node), reason or rule.reason))
        self._report(node, rules, reasons)

    def _declined(self, node: Node, rule: OpPlacement) -> str:
        """Why a rule does not apply, or an empty string."""
        unmet = rule.unmet(node)
        if unmet:
            return unmet
        found = obstacle(node, rule)
        if found:
            return found
        if rule.optional and not self.products:
            return ASK
        if rule.role == "table" and not self.tables:
            return "embeddings were to stay in float"
        return ""

    def _report(self, node: Node, rules: tuple[OpPlacement, ...], reasons: list[tuple[int, str]]) -> None:
        """One decision for a node that computes; additions of constants and the like are nothing to report."""
        if not any(r.role in ("anchor", "weight_only", "table", "float") for r in rules):
            return
        if all(r.role == "table" or r.role == "carry" for r in rules) and node.inputs[0] is not None:
            if not node.inputs[0].is_const:
                return
        reason = max(reasons, default=(0, ""), key=lambda r: r[0])[1]
        if reason:
            self._say(node, reason)

    def _take(self, node: Node, rule: OpPlacement, site: WeightSite | None) -> str:
        self.rules[node.name] = rule
        if rule.role == "table":
            assert site is not None
            self.plan.tables.append(site)
        elif rule.role == "weight_only":
            assert site is not None
            self.plan.weights.append(site)
            self.plan.quantized[node.name] = rule
        elif rule.role == "anchor":
            if site is not None:
                self.plan.weights.append(site)
            self.plan.quantized[node.name] = rule
            self.wanted.update(v.name for v in data_operands(node, rule) if v is not None)
            if rule.output == "required":
                self._require(node, rule)
        return ""

    def _require(self, node: Node, rule: OpPlacement) -> None:
        end = result(node, rule)
        self.wanted.add(end.name)
        self.outputs.add(end.name)

    def _of(self, role: str) -> dict[str, OpPlacement]:
        return {name: rule for name, rule in self.rules.items() if rule.role == role}

    # ---- residual additions -----------------------------------------------------------------------------------
    def _residuals(self) -> None:
        candidates = self._of("residual")
        if not candidates:
            return
        anchors = self._of("anchor")
        depth = depths(self.graph, anchors)
        for node in self.graph.nodes:
            rule = candidates.get(node.name)
            if rule is None:
                continue
            found = skip(node, rule, anchors, depth)
            if isinstance(found, str):
                del self.rules[node.name]
                self._say(node, found)
                continue
            position, _ = found
            value = node.inputs[position]
            assert value is not None
            self.skips[node.name] = position
            self.wanted.add(value.name)
            self.plan.quantized[node.name] = rule

    # ---- joins: quantized where all operands are anyway and the result is wanted ------------------------------------
    def _settle_joins(self) -> None:
        joins = self._of("join")
        if not joins:
            return
        available = self._available()
        demanded = self._demanded(available)
        for node in self.graph.nodes:
            rule = joins.get(node.name)
            if rule is None:
                continue
            operands = data_operands(node, rule)
            missing = next((v for v in operands if v is None or not (rule.asks or v.name in available)), None)
            end = result(node, rule)
            if missing is not None:
                reason = f"its operand {missing.name} stays in float"
            elif end.name not in demanded:
                reason = "no quantized op reads its result"
            else:
                self.plan.quantized[node.name] = rule
                continue
            del self.rules[node.name]
            self._say(node, reason)

    def _available(self) -> set[str]:
        """Values that are, or may be, quantized: one pass down."""
        found = set(self.wanted)
        for node in self.graph.nodes:
            rule = self.rules.get(node.name)
            if rule is None or rule.role not in ("join", "carry"):
                continue
            if rule.asks or all(v is not None and v.name in found for v in data_operands(node, rule)):
                ends = node.outputs if rule.role == "carry" else [result(node, rule)]
                found.update(v.name for v in ends)
        return found

    def _demanded(self, available: set[str]) -> set[str]:
        """Values that somebody wants quantized: one pass up, over what is available."""
        found = set(self.wanted)
        for node in reversed(self.graph.nodes):
            rule = self.rules.get(node.name)
            if rule is None or rule.role not in ("join", "carry"):
                continue
            operands = data_operands(node, rule)
            ends = node.outputs if rule.role == "carry" else [result(node, rule)]
            taken = rule.asks or all(v is not None and v.name in available for v in operands)
            if taken and any(v.name in found for v in ends):
                found.update(v.name for v in operands if v is not None)
        return found

    def _chains(self) -> None:
        """Everything that joins read is wanted, and so is each step of a carry chain that leads to a join."""
        for node in self.graph.nodes:
            rule = self.rules.get(node.name)
            if rule is None or rule.role != "join":
                continue
            if rule.output == "required":
                self._require(node, rule)
            for v in data_operands(node, rule):
                while v is not None and v.name not in self.wanted:
                    self.wanted.add(v.name)
                    producer = v.producer
                    if producer is None or not self._is(producer, "carry"):
                        break
                    v = producer.inputs[0]

    def _hoist(self) -> None:
        """Move Q up across ops that only rearrange, while every reader of the values before takes them quantized."""
        for node in reversed(self.graph.nodes):
            if node.op not in REARRANGE or not self._is(node, "carry") or node.output.name not in self.wanted:
                continue
            source = node.inputs[0]
            if source is None or source.name in self.wanted or source.is_output:
                continue
            moved = [u for u, i in source.uses if u.op in REARRANGE and self._is(u, "carry") and i == 0]
            if len(moved) == len(source.uses) and all(u.output.name in self.wanted for u in moved):
                self.wanted.add(source.name)

    def _is(self, node: Node, role: str) -> bool:
        rule = self.rules.get(node.name)
        return rule is not None and rule.role == role

    # ---- points and their scales --------------------------------------------------------------------------------
    def _points(self) -> None:
        ordered = [*self.graph.inputs, *(v for node in self.graph.nodes for v in node.outputs)]
        for value in ordered:
            if value.name in self.wanted:
                self.plan.points[value.name] = Point(value, value.name, value.name in self.outputs)
        asked: dict[str, list[TensorFormat]] = {}
        for node in self.graph.nodes:
            self._readers(node, asked)
        self._tie()
        for point in self.plan.points.values():
            sources = self.plan.sources.setdefault(point.root, [])
            if not self._carried(point.value):
                sources.append(point.value.name)
        self._formats(asked)

    def _readers(self, node: Node, asked: dict[str, list[TensorFormat]]) -> None:
        rule = self.rules.get(node.name)
        if rule is None or rule.role in ("table", "weight_only"):
            return
        positions = list(range(len(node.inputs))) if rule.data is None else list(rule.data)
        if rule.role == "carry":
            source = node.inputs[0]
            taken = (
                source is not None and source.name in self.wanted and any(v.name in self.wanted for v in node.outputs)
            )
            positions = [0] if taken else []
            if taken:
                self.plan.quantized[node.name] = rule
        elif rule.role == "residual":
            positions = [self.skips[node.name]]
        for i in positions:
            v = node.input(i)
            if v is not None and v.name in self.plan.points:
                self.plan.points[v.name].readers.append((node, i))
                if rule.data_format is not None:
                    asked.setdefault(v.name, []).append(rule.data_format)

    def _carried(self, value: Value) -> bool:
        """Whether the value's elements come through a carry op from another point."""
        node = value.producer
        source = node.inputs[0] if node is not None and self._is(node, "carry") else None
        return source is not None and source.name in self.plan.points

    def _tie(self) -> None:
        points = self.plan.points
        groups = Groups(points)
        for node in self.graph.nodes:
            rule = self.rules.get(node.name)
            if rule is None or not (rule.role == "carry" or rule.same_scale):
                continue
            ends = node.outputs if rule.role == "carry" else [result(node, rule)]
            tied = [v.name for v in [*data_operands(node, rule), *ends] if v is not None and v.name in points]
            why = "moves elements unchanged" if rule.role == "carry" else "wants one scale for operands and result"
            for a, b in zip(tied, tied[1:], strict=False):
                if groups.join(a, b):
                    self.plan.ties.append(Tie(a, b, node.name, f"{node.op} {why}"))
        for name, point in points.items():
            point.root = groups.root(name)

    def _formats(self, asked: dict[str, list[TensorFormat]]) -> None:
        """One format per group: what readers ask for, else that of the graph's inputs or outputs, else the spec's."""
        wishes: dict[str, list[TensorFormat]] = {}
        plain: set[str] = set()
        for name, point in self.plan.points.items():
            value = point.value
            own = asked.get(name, [])
            if not own and value.is_input and self.spec.inputs is not None:
                own = [self.spec.inputs]
            if not own and value.is_output and self.spec.outputs is not None:
                own = [self.spec.outputs]
            wishes.setdefault(point.root, []).extend(own)
            if not own:
                plain.add(point.root)
        for point in self.plan.points.values():
            choices = [*wishes[point.root], *([self.spec.activations] if point.root in plain else [])]
            point.form = max(choices, key=lambda f: f.bits)

    def _say(self, node: Node, reason: str) -> None:
        self.plan.decisions.append(Decision(node.name, "kept in float", reason, {"op": node.op, "scope": node.scope}))


def _weight_of(rule: OpPlacement, reason: str, node: Node) -> int:
    """Which reason says most: a request, an obstacle where the conditions hold, a spec's own words, the rest."""
    if rule.role == "float":
        return 3
    if reason == ASK:
        return 5
    if rule.role not in ("anchor", "weight_only", "table"):
        return 1
    return 2 if rule.unmet(node) else 4
