"""Fake quantization written into a graph at the points and weights of a placement, with scales that train."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from ....graph.errors import ConstraintError
from ....graph.ir import Graph, Value
from ..numerics import QuantParams
from ..placement import Placement, WeightSite

Scales: TypeAlias = Literal["learned", "statistical", "fixed"]


@dataclass
class FakeQuantizer:
    """Edits one graph.

    Attributes:
        weight_scales, activation_scales: how scales come about: ``learned`` ones are parameters with the gradient of
            LSQ, starting where calibration put them; ``fixed`` ones stay there; ``statistical`` ones (weights only)
            follow the weight, scale = factor * mean |w| / largest integer.
        factor: of statistical scales.
        inserted: one entry per fake-quantize node, for the report.
    """

    graph: Graph
    weight_scales: Scales = "learned"
    activation_scales: Scales = "learned"
    factor: float = 2.0
    inserted: list[dict[str, Any]] = field(default_factory=list)
    _scales: dict[str, tuple[Value, Value | None]] = field(default_factory=dict)
    _weights: dict[tuple[int, int], Value] = field(default_factory=dict)

    def write(
        self, placement: Placement, params: dict[str, QuantParams], weight_params: dict[str, QuantParams]
    ) -> None:
        """Insert everything.

        Args:
            params: name of a point -> its grid (points of one root have one).
            weight_params: name of a weight site's node -> the grid of its weight.

        Raises:
            ConstraintError: a format that does not train (blocks, floating types).
        """
        for site in placement.weights:
            self._weight(site, weight_params[site.node.name])
        for name in placement.points:
            self._point(name, placement, params[name])

    def _point(self, name: str, placement: Placement, p: QuantParams) -> None:
        point = placement.points[name]
        if point.root not in self._scales:
            zero = self.graph.add_weight(f"{point.root}_zero_point", p.zero_point) if p.zero_point.any() else None
            learned = self.activation_scales == "learned"
            self._scales[point.root] = (
                self.graph.add_weight(f"{point.root}_scale", p.scale.astype(np.float32), trainable=learned),
                zero,
            )
        scale, zero = self._scales[point.root]
        node = self.graph.insert(
            "fake_quantize",
            [point.value, scale, zero],
            self._attrs(p, name, "sample" if self.activation_scales == "learned" else ""),
            name=f"{name}_fake_quantize",
            after=point.value.producer,
            scope=point.value.producer.scope if point.value.producer is not None else "",
        )
        if point.all_uses:
            self.graph.replace_uses(point.value, node.output, except_nodes=[node])
        else:
            for reader, position in point.readers:
                self.graph.set_input(reader, position, node.output)
        self.inserted.append({"value": name, "bits": _bits(p), "scale": float(p.scale), "learned": scale.name})

    def _weight(self, site: WeightSite, p: QuantParams) -> None:
        key = id(site.weight), site.axis
        if key not in self._weights:  # a tied weight has one grid
            self._weights[key] = self._of_weight(site, p)
        self.graph.set_input(site.node, site.position, self._weights[key])

    def _of_weight(self, site: WeightSite, p: QuantParams) -> Value:
        assert site.weight.value is not None
        name, scope = site.weight.name, site.node.scope
        attrs = self._attrs(p, site.node.name, "tensor" if self.weight_scales == "learned" else "")
        if self.weight_scales == "statistical":
            scale, after = self._statistic(site, p)
        else:
            learned = self.weight_scales == "learned"
            scale, after = self.graph.add_weight(f"{name}_scale", p.scale.astype(np.float32), trainable=learned), None
        zero = self.graph.add_weight(f"{name}_zero_point", p.zero_point) if p.zero_point.any() else None
        node = self.graph.insert(
            "fake_quantize",
            [site.weight.value, scale, zero],
            attrs,
            name=f"{name}_fake_quantize",
            after=after,
            scope=scope,
        )
        self.inserted.append({"weight": name, "bits": _bits(p), "scales": int(p.scale.size), "learned": scale.name})
        return node.output

    def _statistic(self, site: WeightSite, p: QuantParams) -> tuple[Value, Any]:
        """factor * mean |w| / largest integer, per index of the weight's axis."""
        name, rank = site.weight.name, len(site.weight.shape)
        axes = [i for i in range(rank) if p.axis is None or i != p.axis % rank]
        size = self.graph.insert("abs", [site.weight.value], name=f"{name}_magnitude", scope=site.node.scope)
        mean = self.graph.insert(
            "mean", [size.output], {"axes": axes, "keepdims": False}, name=f"{name}_mean", after=size,
            scope=site.node.scope,
        )  # fmt: skip
        share = np.array(self.factor / max(1.0, p.limits[1] - float(p.zero_point.reshape(-1)[0])), np.float32)
        constant = self.graph.add_weight(f"{name}_share", share)
        node = self.graph.insert(
            "mul", [mean.output, constant], name=f"{name}_scale", after=mean, scope=site.node.scope
        )
        return node.output, node

    @staticmethod
    def _attrs(p: QuantParams, name: str, learn: str) -> dict[str, Any]:
        if p.block or p.dtype.startswith("float"):
            raise ConstraintError(
                "this format does not train: one scale per tensor or per channel, of integers, does", node=name,
                expected="an integer format without blocks", found=f"{p.dtype}, blocks of {p.block}",
                hint="give it another format with formats={...}, or put it on the ignore list",
            )  # fmt: skip
        low, high = p.limits
        return {"axis": p.axis, "quant_min": int(low), "quant_max": int(high), "learn": learn}


def _bits(p: QuantParams) -> int:
    low, high = p.limits
    return int(high - low).bit_length()
