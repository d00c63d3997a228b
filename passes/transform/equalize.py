"""Equalize: the weight ranges of channels are balanced between neighbouring layers, without data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from ...graph.ir import Graph, Node
from ...graph.ops.carry import compress
from ..base import Context, Contract, Decision, Needs, Outcome, Pass
from ..calibrate import Moments, collect
from ..fold.affine import Affine
from ..rewrite import Env, Refusal
from .boundary import Boundary, BoundaryWalk, above, below, environment, find_boundaries
from .common import Scaler, layer_name, matches, pooled

LINEAR = ("conv", "linear", "matmul", "einsum")
LIMIT = 1e4
"""Largest factor of one channel, and its inverse the smallest."""
SETTLED = 1e-3
"""Largest logarithm of a factor in a sweep after which the ranges count as balanced."""


@dataclass(eq=False)
class Slots:
    """The weights on one side of a boundary, with the channel that each of their elements belongs to.

    Attributes:
        places: (key of the weight, channel index that broadcasts against it, int64).
    """

    places: list[tuple[int, np.ndarray]]

    def peaks(self, weights: dict[int, np.ndarray], size: int) -> np.ndarray:
        """Largest magnitude per channel, float64 [size]."""
        most = np.zeros(size)
        for key, index in self.places:
            data = np.abs(weights[key])
            small = data.max(axis=tuple(a for a in range(data.ndim) if index.shape[a] == 1), keepdims=True)
            np.maximum.at(most, index.reshape(-1), small.reshape(-1))
        return most

    def scale(self, weights: dict[int, np.ndarray], factors: np.ndarray) -> None:
        for key, index in self.places:
            weights[key] *= factors[index]


@dataclass(eq=False)
class Pair:
    """A boundary between weights that make its channels and weights that read them."""

    boundary: Boundary
    makers: Slots
    readers: Slots
    classes: np.ndarray | None
    total: np.ndarray

    @property
    def name(self) -> str:
        return ", ".join(dict.fromkeys(layer_name(n) for n, _ in self.boundary.readers))


class Equalize(Pass):
    """Cross-layer equalization: every channel gets the same weight range in the layer that makes it and in its readers.

    Identity: ``W2 f(W1 x + b) = (W2 s) f((W1 x + b) / s)`` for positive s and positively homogeneous f (relu, leaky
    relu, pools, reshapes, concatenation, addition where both sides can follow); ``s_i = sqrt(r1_i / r2_i)`` makes the
    ranges r of both sides equal. ``Data-Free Quantization Through Weight Equalization and Bias Correction``, here over
    all boundaries of a graph (chains with depthwise convolutions included), swept until nothing moves. What lies
    between is the affine algebra's business; where it lets no scale pass, the boundary is reported with the reason.

    Exact up to float rounding. ``absorb_bias`` is not: it moves what a relu practically never cuts off, ``c = max(0,
    mean - 3 std)`` of its input on calibration data, from one layer's bias into the next one's.
    """

    name: ClassVar[str] = "equalize"
    contract: ClassVar[Contract] = Contract.EXACT
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    sweeps: int = Field(20, ge=1)
    """Most sweeps over all boundaries."""
    caps: Literal["refuse", "scale"] = "refuse"
    """A relu with a cap (relu6) lets no scale pass; "scale" writes it as relu and minimum with one cap per channel."""
    absorb_bias: bool = False
    """Move high biases into the next layer (needs calibration; approximate)."""
    ignore: list[str] = Field(default_factory=list)
    """Glob patterns of layers whose inputs are left alone."""
    calibration: Any = Field(None, exclude=True)
    """Batches for ``absorb_bias``; those of the run if None."""

    def promise(self) -> Contract:
        return Contract.APPROXIMATE if self.absorb_bias else Contract.EXACT

    def requirement(self) -> Needs:
        return Needs.CALIBRATION if self.absorb_bias else Needs.NOTHING

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        env = environment(graph, ctx)
        decisions: list[Decision] = []
        if self.caps == "scale":
            decisions += scale_caps(graph, env)
        scaler = Scaler(graph, env)
        pairs, weights = self._pairs(graph, scaler, decisions)
        before = [_evenness(pair, weights) for pair in pairs]
        swept = _balance(pairs, weights, self.sweeps)
        for pair, share in zip(pairs, before, strict=True):
            data = {"before": share, "after": _evenness(pair, weights)}
            done = scaler.fold(pair.boundary, pair.total)
            if isinstance(done, Refusal):
                decisions.append(Decision(pair.name, "kept", done.reason, data))
                continue
            reason = f"ranges balanced with {', '.join(done)}: evenness {share:.3f} -> {data['after']:.3f}"
            decisions.append(Decision(pair.name, "equalized", reason, data | {"into": done}))
        if self.absorb_bias:
            decisions += self._absorb(graph, env, ctx, [pair.boundary for pair in pairs])
        graph.refresh()
        return Outcome(decisions=decisions, details={"boundaries": len(pairs), "sweeps": swept})

    def _pairs(
        self, graph: Graph, scaler: Scaler, decisions: list[Decision]
    ) -> tuple[list[Pair], dict[int, np.ndarray]]:
        pairs: list[Pair] = []
        weights: dict[int, np.ndarray] = {}
        for boundary in find_boundaries(graph, LINEAR):
            name = ", ".join(dict.fromkeys(layer_name(n) for n, _ in boundary.readers))
            if any(matches(node, self.ignore) for node, _ in boundary.readers):
                continue
            classes, refused = scaler.probe(boundary)
            if refused is not None:
                decisions.append(Decision(name, "kept", f"no scale passes before it: {refused.reason}"))
                continue
            sides = [_slots(scaler.env, boundary, side, weights, classes) for side in ("above", "below")]
            if not sides[0].places:
                decisions.append(Decision(name, "kept", "no layer's weight makes its input: Smooth scales that"))
                continue
            pairs.append(Pair(boundary, sides[0], sides[1], classes, np.ones(boundary.size)))
        return pairs, weights

    def _absorb(self, graph: Graph, env: Env, ctx: Context, boundaries: list[Boundary]) -> list[Decision]:
        places = {}
        for boundary in boundaries:
            node = boundary.value.producer
            if node is not None and node.op == "relu" and node.inputs[0] is not None:
                places[node.inputs[0].name] = (boundary, node, Moments(boundary.axis))
        collect(graph, self.batches(ctx), {name: m for name, (_, _, m) in places.items()}, progress=ctx.progress)
        decisions = []
        for boundary, node, moments in places.values():
            mean = moments.mean()
            assert moments.squares is not None
            deviation = np.sqrt(np.maximum(moments.squares / moments.per_channel - mean**2, 0))
            high = np.maximum(mean - 3 * deviation, 0)
            if not high.any():
                continue
            subject = layer_name(boundary.readers[0][0])
            done = _move_bias(env, boundary, node, high)
            if isinstance(done, Refusal):
                decisions.append(Decision(subject, "kept", f"no bias is moved into it: {done.reason}"))
                continue
            done.write(graph)
            moved = int((high > 0).sum())
            decisions.append(Decision(subject, "absorbed", f"high biases of {moved} channels", {"channels": moved}))
        return decisions


def _move_bias(env: Env, boundary: Boundary, relu: Node, high: np.ndarray) -> Any:
    """The edits that lower the relu's input by ``high`` and add ``W high`` behind its readers."""
    walk = BoundaryWalk(env, boundary.value)
    ones = np.ones(boundary.size)
    if (blocked := walk.down(boundary.value, boundary.along(ones, high))) is not None:
        return blocked
    assert boundary.value.rank is not None
    if (blocked := walk.up(relu, 0, Affine.along(boundary.axis, ones, -high, boundary.value.rank))) is not None:
        return blocked
    return walk.edits.finish()


def _slots(
    env: Env, boundary: Boundary, side: str, weights: dict[int, np.ndarray], classes: np.ndarray | None
) -> Slots:
    """Which element of which weight belongs to which channel: a factor per channel is walked there and read off."""
    walk = BoundaryWalk(env, boundary.value)
    size = boundary.size
    known = np.arange(1, size + 1) if classes is None else _first(classes)[classes] + 1
    probe = 1.0 + known / (size + 1)
    refused = (above if side == "above" else below)(walk, boundary, probe)
    assert refused is None
    places = []
    for node, position in walk.edits.slots():
        value = node.input(position) if position >= 0 else None
        if position != 1 or node.op not in LINEAR or value is None or value.weight is None:
            continue
        data = np.ones(value.weight.shape)
        for edit in walk.edits.journal:
            if edit.node is node and edit.position == position:
                data = edit.change(data)
        index = np.rint((compress(data) - 1.0) * (size + 1)).astype(np.int64) - 1
        key = id(value.weight)
        weights.setdefault(key, value.weight.numpy().astype(np.float64))
        places.append((key, index))
    return Slots(places)


def _first(classes: np.ndarray) -> np.ndarray:
    return np.unique(classes, return_index=True)[1]


def _balance(pairs: list[Pair], weights: dict[int, np.ndarray], sweeps: int) -> int:
    """Scale the working copies until no factor moves; the number of sweeps."""
    for sweep in range(1, sweeps + 1):
        moved = 0.0
        for pair in pairs:
            made, read = (side.peaks(weights, pair.boundary.size) for side in (pair.makers, pair.readers))
            if pair.classes is not None:
                made, read = pooled(made, pair.classes), pooled(read, pair.classes)
            alive = (made > 0) & (read > 0)
            factors = np.ones(pair.boundary.size)
            factors[alive] = np.sqrt(made[alive] / read[alive])
            wanted = np.clip(pair.total * factors, 1 / LIMIT, LIMIT)
            factors, pair.total = wanted / pair.total, wanted
            pair.readers.scale(weights, factors)
            pair.makers.scale(weights, 1.0 / factors)
            moved = max(moved, float(np.abs(np.log(factors)).max()))
        if moved < SETTLED:
            return sweep
    return sweeps


def _evenness(pair: Pair, weights: dict[int, np.ndarray]) -> float:
    """Mean over both sides of a channel's range as a share of the widest channel's: 1 is perfectly even."""
    shares = []
    for side in (pair.makers, pair.readers):
        peaks = side.peaks(weights, pair.boundary.size)
        shares.append(float(peaks.mean() / max(peaks.max(), 1e-30)))
    return float(np.mean(shares))


def scale_caps(graph: Graph, env: Env) -> list[Decision]:
    """Write every ``clip(x, 0, c)`` before a linear operator as ``min(relu(x), c)`` with one cap per channel. Exact."""
    scaler = Scaler(graph, env)
    decisions = []
    for boundary in find_boundaries(graph, LINEAR):
        _, refused = scaler.probe(boundary)
        node = next((n for n in graph.nodes if refused is not None and n.name == refused.node), None)
        cap = None if node is None or node.op != "clip" or node.attrs.get("min") != 0 else node.attrs.get("max")
        if node is None or cap is None or node.output.rank is None:
            continue
        x = node.inputs[0]
        axis = 1 if node.output.rank == 4 else node.output.rank - 1
        assert x is not None and x.hint is not None
        shape = (x.hint[axis], *[1] * (node.output.rank - 1 - axis))
        caps = graph.add_weight(f"{node.name}_caps", np.full(shape, cap, np.float32))
        relu = graph.insert("relu", [x], name=f"{node.name}_relu", after=node, scope=node.scope)
        least = graph.insert("minimum", [relu.output, caps], name=f"{node.name}_min", after=relu, scope=node.scope)
        graph.replace_uses(node.output, least.output, except_nodes=[relu, least])
        graph.erase(node)
        decisions.append(Decision(node.name, "rewritten", f"the cap {cap:g} became one number per channel"))
    if decisions:
        graph.refresh()
        env.look_again()
    return decisions
