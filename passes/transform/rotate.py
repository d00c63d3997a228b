"""Rotate: orthogonal matrices spread outliers over all channels, merged into the weights on both sides."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from ...graph.groups import AxisGroup, AxisGroups, axis_groups
from ...graph.ir import Graph
from ...graph.rotate import Freedom, freedom, off_orthogonal, rotate
from ..base import Context, Contract, Decision, Needs, Outcome, Pass
from .affine import near_square
from .boundary import Boundary, environment, find_boundaries
from .common import Scaler, layer_name, matches
from .gains import push_gains, to_rms_norms
from .grids import formats_of
from .hadamard import keeping_ones, random_hadamard, random_orthogonal

Kind = Literal["residual", "inner", "query_key"]


class Rotate(Pass):
    """Rotate the indices of axis groups: the residual stream, the values of attention, queries with keys.

    Identity: ``(x R)(W R)^T = x W^T`` and ``RMSNorm(x R) = RMSNorm(x) R``. A merged rotation leaves no operator. Norm
    gains are folded into what reads them first, layer norms become RMS norms by centring the weights before them (where
    the model cannot hold RMS norms, the rotation keeps the vector of ones instead: layer norms commute with that).
    ``QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs`` (random Hadamard), ``SpinQuant`` and ``OstQuant: Refining
    Large Language Model Quantization with Orthogonal and Scaling Transformations for Better Distribution Fitting``
    (learned; with ``scale``, a diagonal beside every rotation, folded where something takes it; its loss on the top
    logits with ``objective="outputs"``).

    Refused, with the reason: indices that something tells apart (a nonlinearity, a rotary embedding between the
    projection and the product of queries and keys, a norm's gain that a residual reads too, an output of the graph).
    Exact up to float rounding; ``online`` inserts two small matrix products before the named layers.
    """

    name: ClassVar[str] = "rotate"
    contract: ClassVar[Contract] = Contract.EXACT
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    method: Literal["hadamard", "random", "learned"] = "hadamard"
    """Random Hadamard (or its nearest relative for the size), uniformly random, or learned from a random Hadamard."""
    where: list[Kind] = Field(["residual", "inner"], min_length=1)
    """Kinds of groups: "residual" (a norm is over them), "inner" (one linear layer to another, so the values of
    attention), "query_key" (contracted between two activations)."""
    online: list[str] = Field(default_factory=list)
    """Glob patterns of layers whose input is rotated at run time, by a Kronecker product of two Hadamard matrices."""
    untie: bool = True
    """Copy an embedding's weight that a linear layer shares where that layer has to take a gain."""
    scale: bool = True
    """Learn a diagonal beside each rotation too (``method="learned"``)."""
    objective: Literal["layers", "outputs"] = "layers"
    """What learning lowers: the squared error of the layers that read a group, each group on its own; or the divergence
    of the network's output distribution from the float network's, all groups together (slower)."""
    top: int = Field(1000, ge=2)
    """Largest logits of the float network that the divergence is over."""
    steps: int = Field(60, ge=1)
    """Steps of learning."""
    rate: float = Field(0.01, gt=0)
    """Learning rate."""
    rows: int = Field(256, ge=16)
    """Rows of activations kept per layer while learning."""
    target: str | None = None
    """Backend whose formats learning simulates."""
    weight_bits: int | None = Field(4, ge=2, le=8)
    """Width of the weights while learning."""
    activation_bits: int | None = Field(4, ge=2, le=16)
    """Width of the activations while learning; 16: they stay in float."""
    block: int = Field(0, ge=0)
    """Input channels that share a weight scale while learning; 0: one scale per output channel."""
    symmetric: bool | None = None
    """Weights without zero points while learning, or with them; None: as the target has them."""
    per_token: bool = False
    """Activations with a range per row while learning."""
    float_inputs: list[str] = Field(default_factory=list)
    """Glob patterns of layers whose operand stays in float while learning (``objective="outputs"``)."""
    clip: bool = True
    """Let ranges shrink while learning (``objective="layers"``), as those of a quantizer that clips do."""
    ignore: list[str] = Field(default_factory=list)
    """Glob patterns of layers whose inputs no rotation may touch."""
    calibration: Any = Field(None, exclude=True)
    """Batches for learning; those of the run if None."""

    def requirement(self) -> Needs:
        return Needs.CALIBRATION if self.method == "learned" else Needs.NOTHING

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        graph.separate_shared()
        env = environment(graph, ctx)
        decisions = push_gains(graph, env, untie=self.untie)
        decisions += to_rms_norms(graph)
        groups = axis_groups(graph)
        boundaries = find_boundaries(graph)
        chosen = self._chosen(groups, boundaries, decisions)
        rng = np.random.default_rng(ctx.seed)
        rotations = {group: start(group.size, found.ones, self.method, rng) for group, found in chosen.items()}
        online = self._online_matrices(boundaries, rng)
        details: dict[str, Any] = {}
        scales: list[tuple[Boundary, np.ndarray]] = []
        if self.method == "learned" and chosen:
            if self.objective == "outputs":
                from .learn_outputs import learn_outputs as learn
            else:
                from .learn import learn
            from .learn import Problem

            formats = formats_of(
                ctx, self.target, self.weight_bits, self.activation_bits, self.block, symmetric=self.symmetric,
                per_token=self.per_token,
            )  # fmt: skip
            data = self.batches(ctx)
            learned = learn(Problem(graph, groups, chosen, rotations, boundaries, online, self, formats, data, ctx))
            rotations, scales, details = learned.rotations, learned.scales, learned.details
        rotate(groups, rotations)
        for group, matrix in rotations.items():
            off = off_orthogonal(matrix)
            data = {"size": group.size, "off_orthogonal": off, "members": len(group.members)}
            reason = f"{_kind(chosen[group])} group of {group.size}, {len(group.members)} weight axes, no operator left"
            decisions.append(Decision(group.name, "rotated", reason, data))
        decisions += self._scale(graph, Scaler(graph, env), scales)
        decisions += self._online(graph, env, online)
        graph.refresh()
        return Outcome(decisions=decisions, details=details | {"rotated": len(rotations)})

    def _chosen(
        self, groups: AxisGroups, boundaries: list[Boundary], decisions: list[Decision]
    ) -> dict[AxisGroup, Freedom]:
        """The groups to rotate; for those that make sense and are not free, the reason."""
        spared = {
            node.inputs[1].weight  # type: ignore[union-attr]
            for b in boundaries
            for node, _ in b.readers
            if matches(node, self.ignore)
        }
        chosen: dict[AxisGroup, Freedom] = {}
        for group in groups:
            roles = {m.role for m in group.members}
            if group.size < 2 or not ({"produces", "both"} & roles):
                continue
            found = freedom(groups, group)
            if found.reason:
                if len(group.members) > 1:
                    decisions.append(Decision(group.name, "refused", found.reason, {"node": found.node}))
                continue
            if _kind(found) not in self.where:
                continue
            if any(m.weight in spared and m.role == "consumes" for m in group.members):
                decisions.append(Decision(group.name, "kept", "a layer that reads it is ignored"))
                continue
            chosen[group] = found
        return chosen

    def _scale(self, graph: Graph, scaler: Scaler, scales: list[tuple[Boundary, np.ndarray]]) -> list[Decision]:
        decisions = []
        for boundary, factors in scales:
            name = ", ".join(dict.fromkeys(layer_name(n) for n, _ in boundary.readers))
            done = scaler.fold(boundary, factors)
            if isinstance(done, list):
                decisions.append(Decision(name, "scaled", f"a learned diagonal, absorbed by {', '.join(done)}"))
            else:
                decisions.append(Decision(name, "kept", f"nothing takes the learned diagonal: {done.reason}"))
        return decisions

    def _online_matrices(
        self, boundaries: list[Boundary], rng: np.random.Generator
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The two factors of the rotation at run time, by the name of the boundary."""
        found = {}
        for boundary in boundaries:
            if any(matches(node, self.online) for node, _ in boundary.readers):
                a, b = near_square(boundary.size)
                found[boundary.name] = random_hadamard(a, rng), random_hadamard(b, rng)
        return found

    def _online(self, graph: Graph, env: Any, online: dict[str, tuple[np.ndarray, np.ndarray]]) -> list[Decision]:
        from .affine import insert_kronecker

        decisions = []
        for boundary in find_boundaries(graph) if online else []:
            if boundary.name not in online:
                continue
            left, right = online[boundary.name]
            a, b = len(left), len(right)
            name = ", ".join(dict.fromkeys(layer_name(n) for n, _ in boundary.readers))
            done = insert_kronecker(graph, env, boundary, left, right, left, right, "rotation")
            if isinstance(done, list):
                reason = f"rotated at run time by two products of {a} and {b}"
                decisions.append(Decision(name, "rotated online", reason, {"sizes": [a, b], "nodes": done}))
            else:
                decisions.append(Decision(name, "refused", done.reason))
        return decisions


def _kind(found: Freedom) -> Kind:
    return "residual" if found.norms else "query_key" if found.products else "inner"


def start(size: int, ones: bool, method: str, rng: np.random.Generator) -> np.ndarray:
    """The rotation of one group before anything is learned."""
    if ones:
        return keeping_ones(random_orthogonal(size - 1, rng))
    return random_orthogonal(size, rng) if method == "random" else random_hadamard(size, rng)
