"""Dynamic channel gates: a head on what a convolution reads predicts which of its filters matter for this input."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from ...graph.cost import cost
from ...graph.errors import ConfigError, ConstraintError
from ...graph.execute import batches_of, run_graph
from ...graph.groups import AxisGroup, AxisGroups
from ...graph.ir import Graph, Node, Value
from ...graph.positions import coordinates
from ...graph.space import norm
from ..base import Context, Contract, Decision, Needs, Outcome, Pass

REST = re.compile(r"(?:^|[./])gate_(\d+)_rest$")
FOLLOWS = frozenset("batch_norm relu leaky_relu gelu silu hardswish elu mish clip tanh sigmoid identity".split())
"""Ops between a convolution and the activation by which its filters are judged."""


class InsertDynamicChannelGate(Pass):
    """Gate the filters of convolutions per input: conv(x) becomes conv(x) * mask(x).

    "Fire Together Wire Together: A Dynamic Pruning Approach with Self-Supervised Mask Prediction", in its plainest
    form. A head on the convolution's input, global average pool, linear, sigmoid, gives a mass per filter; the
    filters kept are the fewest whose masses reach the share ``r`` of their sum. With r = 1, or before the heads know
    anything (they start at zero, all masses equal), every filter is kept and the function is that of before.

    With calibration batches the heads are fitted in closed form (ridge regression of the logits of the mean absolute
    activations, relative to the largest), which takes the place of the paper's training with a cross-entropy on
    masks; ``gate_<i>_weight`` and ``gate_<i>_bias`` can be trained further. The graph computes every filter and masks
    it: no runtime here skips work, so ``expected_macs`` says what one that does would save, and
    :class:`TopKFrequency` turns the same masks into a criterion for static pruning.

    Raises:
        ConstraintError: no convolution matches ``layers``.
    """

    name: ClassVar[str] = "insert_dynamic_channel_gate"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    needs: ClassVar[Needs] = Needs.NOTHING
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    r: float = Field(0.9, gt=0, le=1)
    """Share of the predicted mass that the kept filters reach."""
    layers: list[str] = Field(default_factory=lambda: ["*"])
    """Patterns (fnmatch) of weight names or module paths of the convolutions to gate."""
    calibration: Any = None
    """Batches of model inputs to fit the heads (those of the run, if None)."""
    ridge: float = Field(1e-3, gt=0)
    """Regularization of the fit, relative to the mean square of the features."""

    def promise(self) -> Contract:
        """Exact at r = 1."""
        return Contract.EXACT if self.r == 1 else self.contract

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        convs = self._convs(graph)
        batches = self.calibration if self.calibration is not None else ctx.calibration
        heads: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        batches = None if batches is None else list(batches)
        if batches is not None:
            heads = _fit(graph, convs, batches, self.ridge)
        decisions = []
        for i, node in enumerate(convs):
            _insert(graph, node, i, self.r, heads.get(node.name))
            known = "fitted on calibration inputs" if node.name in heads else "all masses equal: nothing is gated yet"
            decisions.append(Decision(node.name, "gated", known, {"gate": f"gate_{i}"}))
        graph.refresh()
        details: dict[str, Any] = {"gates": len(convs)}
        if batches is not None:
            found = expected_macs(graph, batches)
            details.update(expected_macs=found.macs, static_macs=found.static, kept_share=found.kept)
        return Outcome(decisions=decisions, details=details)

    def _convs(self, graph: Graph) -> list[Node]:
        found, unused = [], set(self.layers)
        for node in graph.nodes:
            x, value = node.input(0), node.input(1)
            stored = None if value is None else value.weight
            if node.op != "conv" or x is None or x.rank is None or x.rank < 3 or stored is None:
                continue
            names = [part for a in stored.aliases for part in (a, a.rpartition(".")[0])]
            hit = {p for p in self.layers if any(fnmatchcase(n, p) for n in names)}
            unused -= hit
            if hit and isinstance(_channels(node.output), int):
                found.append(node)
        if unused or not found:
            raise ConstraintError(
                "a pattern of layers matches no convolution" if unused else "there is no convolution to gate",
                node="layers",
                value=sorted(unused)[0] if unused else None,
                expected="weight names or module paths of convolutions",
                hint="`foldline inspect MODEL` lists the names",
            )
        return found


def _channels(v: Value) -> int | None:
    return v.hint[1] if v.hint is not None else None


def _spatial(v: Value) -> list[int]:
    return list(range(2, v.rank or 2))


def _insert(graph: Graph, conv: Node, i: int, r: float, head: tuple[np.ndarray, np.ndarray] | None) -> None:
    """Filter c is kept if the masses of the filters that are not above it sum to more than (1 - r) of the total."""
    x, y = conv.inputs[0], conv.output
    weight = conv.inputs[1]
    assert x is not None and weight is not None and x.hint is not None and y.hint is not None
    dtype = np.dtype(x.dtype) if x.dtype in ("float32", "float64", "float16") else np.dtype("float32")
    w, b = head if head is not None else (np.zeros((x.hint[1], y.hint[1])), np.zeros(y.hint[1]))
    w_value = graph.add_weight(f"gate_{i}_weight", w.astype(dtype), trainable=True)
    b_value = graph.add_weight(f"gate_{i}_bias", b.astype(dtype), trainable=True)
    rest = graph.add_weight(f"gate_{i}_rest", np.full(1, 1 - r, dtype))
    last = conv

    def add(op: str, inputs: list[Value], name: str, **attrs: Any) -> Value:
        nonlocal last
        last = graph.insert(op, inputs, attrs, name=f"gate_{i}_{name}", after=last, scope=conv.scope)
        return last.output

    pooled = add("mean", [x], "pool", axes=_spatial(x), keepdims=False)
    logits = add("add", [add("linear", [pooled, w_value], "product", transposed_weight=True), b_value], "logits")
    mass = add("sigmoid", [logits], "mass")
    mine, other = add("unsqueeze", [mass], "mine", axes=[2]), add("unsqueeze", [mass], "other", axes=[1])
    not_above = add("cast", [add("le", [other, mine], "order")], "weights", dtype=dtype.name)
    below = add("squeeze", [add("matmul", [not_above, mine], "sums")], "below", axes=[2])
    total = add("sum", [mass], "total", axes=[1], keepdims=True)
    chosen = add("gt", [below, add("mul", [total, rest], "threshold")], "chosen")
    mask = add("cast", [chosen], "mask", dtype=dtype.name)
    for axis in _spatial(y):
        mask = add("unsqueeze", [mask], f"mask_{axis}", axes=[axis])
    gated = add("mul", [y, mask], "gated")
    graph.replace_uses(y, gated, except_nodes=[last])


# ---- fitting and counting ------------------------------------------------------------------------------------------
def activation(node: Node) -> Value:
    """What a convolution or linear becomes through the norm and activation that only it feeds."""
    value = node.output
    while len(value.uses) == 1 and not value.is_output:
        user, position = value.uses[0]
        if position != 0 or user.op not in FOLLOWS:
            break
        value = user.output
    return value


def _strength(data: np.ndarray, axis: int) -> np.ndarray:
    """[samples, channels]: mean absolute activation."""
    moved = np.moveaxis(np.abs(data.astype(np.float64)), axis, 1)
    return np.asarray(moved.reshape(*moved.shape[:2], -1).mean(2))


def top_k(mass: np.ndarray, r: float) -> np.ndarray:
    """bool [samples, channels]: the fewest channels whose masses reach the share r of their sum; ties come together."""
    order = np.sort(mass, axis=1)
    sums = np.cumsum(order, axis=1)
    # Sum of all masses that are not above mine: the last place that holds my value.
    at = np.stack([np.searchsorted(row, own, side="right") for row, own in zip(order, mass, strict=True)]) - 1
    return np.asarray((np.take_along_axis(sums, at, 1) > (1 - r) * sums[:, -1:]) | (mass == mass.max(1, keepdims=True)))


def _fit(
    graph: Graph, convs: list[Node], batches: Iterable[Any], ridge: float
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Ridge regression of each head: weight [in, out] and bias [out], float64."""
    sums: dict[str, list[np.ndarray]] = {}
    judged = {n.name: activation(n) for n in convs}
    computed = [v for n in convs for v in (n.inputs[0], judged[n.name]) if v is not None and not v.is_input]
    seen = 0
    for arrays in batches_of(graph, batches):
        _, taps = run_graph(graph, arrays, list(dict.fromkeys(v.name for v in computed)))
        values = {**taps, **arrays}
        seen += 1
        for node in convs:
            x = node.inputs[0]
            assert x is not None
            pooled = values[x.name].astype(np.float64).mean(axis=tuple(_spatial(x)))
            features = np.concatenate([pooled, np.ones((len(pooled), 1))], 1)
            strength = _strength(values[judged[node.name].name], 1)
            share = np.clip(strength / np.maximum(strength.max(1, keepdims=True), 1e-30), 0.01, 0.99)
            new = [features.T @ features, features.T @ np.log(share / (1 - share)), np.array(float(len(features)))]
            sums[node.name] = [a + b for a, b in zip(sums[node.name], new, strict=True)] if node.name in sums else new
    if not seen:
        raise ConstraintError("the calibration data is empty", expected="at least one batch", found="none")
    heads = {}
    for name, (gram, cross, _) in sums.items():
        penalty = ridge * max(float(np.diag(gram)[:-1].mean()), 1e-12) * np.eye(len(gram))
        penalty[-1, -1] = 1e-9 * gram[-1, -1]  # the bias is free
        solved = np.linalg.solve(gram + penalty, cross)
        heads[name] = solved[:-1], solved[-1]
    return heads


@dataclass(frozen=True)
class GatedMacs:
    """Multiply-accumulates of one sample, on average over the inputs seen.

    Attributes:
        macs: where a runtime skips the filters that are gated off, heads included.
        static: what the graph computes without gates.
        kept: mean share of filters kept, per gated convolution.
    """

    macs: float
    static: float
    kept: dict[str, float]


def expected_macs(graph: Graph, batches: Iterable[Any]) -> GatedMacs:
    """Count what the gates of a graph would save on these inputs: each gated convolution times its kept share.

    Only the convolution's own outputs count, not that the next layer could skip the same inputs. What sorts the
    masses is not counted either; pool, linear and products of the head are.

    Raises:
        ConstraintError: the graph has no gates, or there is no batch.
    """
    gates = gates_of(graph)
    if not gates:
        raise ConstraintError("this model has no gates", hint="P.insert_dynamic_channel_gate makes them")
    kept: dict[str, list[float]] = {conv.name: [0.0, 0.0] for conv, _ in gates}
    for arrays in batches_of(graph, batches):
        _, taps = run_graph(graph, arrays, [mask.name for _, mask in gates])
        for conv, mask in gates:
            data = taps[mask.name].astype(np.float64)
            kept[conv.name][0] += float(data.sum())
            kept[conv.name][1] += data.size
    if not all(size for _, size in kept.values()):
        raise ConstraintError("there is no data to count on", expected="at least one batch", found="none")
    shares = {name: total / size for name, (total, size) in kept.items()}
    counted = cost(graph)
    own = {n.name: n.macs for n in counted.nodes}
    heads = {n.name for _, mask in gates for n in _ancestors(mask)}
    # The pairwise comparison stands for a sort: its products are no work a runtime would do.
    sorting = sum(n.macs for n in counted.nodes if n.name in heads and n.op == "matmul")
    head = sum(n.macs for n in counted.nodes if n.name in heads) - sorting
    body = counted.macs - head - sorting
    saved = sum(own[name] * (1 - share) for name, share in shares.items())
    return GatedMacs(body + head - saved, body, shares)


def gates_of(graph: Graph) -> list[tuple[Node, Value]]:
    """(convolution, its mask [samples, filters]) of every gate, however the graph was saved and loaded since."""
    found = []
    for name, weight in graph.weights.items():
        if not REST.search(name) or weight.value is None:
            continue
        value = weight.value
        for op in ("mul", "gt", "cast"):
            value = next(u.output for u, _ in value.uses if u.op == op)
        mask = value
        while value.uses[0][0].op != "mul":
            value = value.uses[0][0].output
        product = value.uses[0][0]
        conv = next(v.producer for v in product.inputs if v is not None and v is not value)
        if conv is not None:
            found.append((conv, mask))
    return found


def _ancestors(value: Value) -> list[Node]:
    """The nodes of a gate, from its mask up to the pool."""
    found: list[Node] = []
    stack = [value]
    while stack:
        node = stack.pop().producer
        if node is None or node in found:
            continue
        found.append(node)
        if node.op != "mean":
            stack += [v for v in node.inputs if v is not None]
    return found


class TopKFrequency:
    """Static pruning by dynamic masks: how often each channel is among the fewest that reach the share ``r``.

    A criterion for ``P.Prune(criterion=TopKFrequency(batches))``, at ratios of one's choice. Channels are judged by
    their mean absolute activation, per sample, behind the norm and activation of what makes them; frequencies are
    averaged over the convolutions and linears that write to a group, ties broken by the mean share of the mass.
    Groups that none writes to score 1 everywhere.
    """

    def __init__(self, batches: Iterable[Any], r: float = 0.9) -> None:
        if not 0 < r <= 1:
            raise ConfigError("r is out of range", node="r", expected="a share in (0, 1]", found=r)
        self.batches, self.r = list(batches), r
        self._groups: AxisGroups | None = None
        self._scores: dict[str, tuple[int, np.ndarray]] = {}

    __name__ = "top_k_frequency"

    def __call__(self, g: AxisGroup, groups: AxisGroups) -> np.ndarray:
        """One score per index of the group, in 0..1 (and at most 1e-3 above, from the ties)."""
        if self._groups is not groups:
            self._groups, self._scores = groups, self._measure(groups)
        found = []
        for node, axis in _writers(groups):
            at = coordinates(norm(groups.analysis.of(node.output)[axis]), g.atom)
            if node.name in self._scores and (at >= 0).any():
                scores = self._scores[node.name][1]
                count = np.bincount(at[at >= 0], minlength=g.size)
                found.append(np.bincount(at[at >= 0], scores[at >= 0], minlength=g.size) / np.maximum(count, 1))
        return np.mean(found, axis=0) if found else np.ones(g.size)

    def _measure(self, groups: AxisGroups) -> dict[str, tuple[int, np.ndarray]]:
        writers = _writers(groups)
        taps = {node.name: activation(node).name for node, _ in writers}
        totals: dict[str, tuple[int, np.ndarray]] = {}
        for arrays in batches_of(groups.graph, self.batches):
            _, seen = run_graph(groups.graph, arrays, list(dict.fromkeys(taps.values())))
            for node, axis in writers:
                strength = _strength(seen[taps[node.name]], axis)
                share = strength / np.maximum(strength.sum(1, keepdims=True), 1e-30)
                new = (top_k(strength, self.r) + 1e-3 * share).sum(0)
                n, total = totals.get(node.name, (0, np.zeros(len(new))))
                totals[node.name] = n + len(strength), total + new
        if not totals:
            raise ConstraintError("the criterion has no data", expected="at least one batch", found="none")
        return {name: (n, total / n) for name, (n, total) in totals.items()}


def _writers(groups: AxisGroups) -> list[tuple[Node, int]]:
    """Convolutions and linears with stored weights, and the axis of their output that holds the channels."""
    found = []
    for node in groups.graph.nodes:
        weight, rank = node.input(1), node.output.rank if node.outputs else None
        if node.op in ("conv", "linear") and rank is not None and weight is not None and weight.is_const:
            found.append((node, 1 if node.op == "conv" else rank - 1))
    return found
