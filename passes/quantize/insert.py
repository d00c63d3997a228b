"""Writes a placement into a graph: Q/DQ nodes, integer weights and biases, through the graph's own edits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...graph.ir import Graph, Value
from .numerics import QuantParams, bias_params, least_weight_scale, sqnr_db, weight_params
from .placement import Placement, WeightSite
from .rounding import Rounding
from .spec import BackendSpec


@dataclass
class Inserter:
    """Edits one graph. ``facts`` collects, per node name, the numbers worth reporting."""

    graph: Graph
    spec: BackendSpec
    rounding: Rounding
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    _stored: dict[tuple[int, int, bytes], tuple[Value, QuantParams, float]] = field(default_factory=dict)

    def write(self, placement: Placement, params: dict[str, QuantParams]) -> None:
        """Insert everything. ``params`` maps a point's root to its parameters."""
        inputs = {name: params[point.root] for name, point in placement.points.items()}
        for site in placement.weights:
            self._weight(site, inputs[site.x.name])
        for name in placement.points:
            self._pair(name, placement, inputs[name])

    def _constants(self, name: str, p: QuantParams) -> tuple[Value, Value | None]:
        scale = self.graph.add_weight(f"{name}_scale", p.scale)
        if self.spec.zero_points == "nonzero" and not p.zero_point.any():
            return scale, None
        return scale, self.graph.add_weight(f"{name}_zero_point", p.zero_point)

    def _pair(self, name: str, placement: Placement, p: QuantParams) -> None:
        point = placement.points[name]
        scale, zero = self._constants(name, p)
        attrs = {"axis": p.axis, "dtype": p.dtype, "block": 0}
        scope = point.value.producer.scope if point.value.producer is not None else ""
        q = self.graph.insert(
            "quantize",
            [point.value, scale, zero],
            attrs,
            name=f"{name}_quantize",
            after=point.value.producer,
            scope=scope,
        )
        dq = self.graph.insert(
            "dequantize",
            [q.output, scale, zero],
            {**attrs, "dtype": "float32"},
            name=f"{name}_dequantize",
            after=q,
            scope=scope,
        )
        if point.all_uses:
            self.graph.replace_uses(point.value, dq.output, except_nodes=[q])
        else:
            for node, position in point.readers:
                self.graph.set_input(node, position, dq.output)

    def _weight(self, site: WeightSite, x: QuantParams) -> None:
        bias = None if site.bias is None else site.bias.numpy().astype(np.float32).reshape(-1)
        least = None if bias is None else least_weight_scale(bias, x)
        w = site.weight.numpy().astype(np.float32)
        p = weight_params(w, site.axis, self.spec.weights, least)
        # Tied weights with equal scales are stored once.
        key = (id(site.weight), site.axis, p.scale.tobytes())
        if key not in self._stored:
            integers = self.rounding(w, p)
            value = self._dequantized(site.weight.name, integers, p, site.node.scope)
            self._stored[key] = value, p, sqnr_db(w, p.dequantize(integers))
        value, p, quality = self._stored[key]
        self.graph.set_input(site.node, site.position, value)
        self.facts[site.node.name] = {
            "weight": site.weight.name,
            "weight_sqnr_db": quality,
            "weight_axis": site.axis,
            "input_scale": float(x.scale),
            "input_zero_point": int(x.zero_point),
        }
        if site.bias is not None and site.bias_node is not None and bias is not None:
            b = bias_params(x, p, bias.size)
            name = f"{site.bias.name}_{site.node.name}"
            self.graph.set_input(
                site.bias_node, site.bias_position, self._dequantized(name, b.quantize(bias), b, site.node.scope)
            )

    def _dequantized(self, name: str, integers: np.ndarray, p: QuantParams, scope: str) -> Value:
        stored = self.graph.add_weight(f"{name}_quantized", integers)
        scale, zero = self._constants(name, p)
        node = self.graph.insert(
            "dequantize",
            [stored, scale, zero],
            {"axis": p.axis, "dtype": "float32", "block": 0},
            name=f"{name}_dequantize",
            after=None,
            scope=scope,
        )
        return node.output
