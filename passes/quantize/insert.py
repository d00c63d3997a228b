"""Writes a placement into a graph: Q/DQ nodes, stored integers and biases, through the graph's own edits."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...graph.ir import Graph, Value
from .numerics import QuantParams, bias_params, quality_db
from .placement import Placement, WeightSite
from .rounding import Rounded
from .spec import BackendSpec


@dataclass
class Inserter:
    """Edits one graph, weight by weight. ``facts`` collects, per node name, the numbers worth reporting."""

    graph: Graph
    spec: BackendSpec
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    _integers: dict[tuple[Any, ...], tuple[Value, float]] = field(default_factory=dict)
    _numbers: dict[str, Value] = field(default_factory=dict)
    _grids: dict[str, tuple[Value, Value | None]] = field(default_factory=dict)
    _shared: Counter[int] = field(default_factory=Counter)

    def write(self, placement: Placement, params: dict[str, QuantParams], rounded: dict[str, Rounded]) -> None:
        """Insert everything.

        Args:
            params: point name -> its grid.
            rounded: name of a site's node -> its integers; entries are taken out as they are written.
        """
        self._shared.update(id(site.weight) for site in (*placement.weights, *placement.tables))
        for site in placement.weights:
            self._weight(site, params.get(site.x.name), rounded.pop(site.node.name))
        for site in placement.tables:
            self._table(site, rounded.pop(site.node.name))
        for name in placement.points:
            self._pair(name, placement, params[name])

    def _grid(self, name: str, p: QuantParams) -> tuple[Value, Value | None]:
        """Scale and zero point as stored constants."""
        scale = self.graph.add_weight(f"{name}_scale", p.scale)
        if self.spec.zero_points == "nonzero" and not p.zero_point.astype(np.float32).any():
            return scale, None
        return scale, self.graph.add_weight(f"{name}_zero_point", p.zero_point)

    def _pair(self, name: str, placement: Placement, p: QuantParams) -> None:
        point = placement.points[name]
        if point.root not in self._grids:  # points of one root share their constants, so that they stay equal
            self._grids[point.root] = self._grid(point.root, p)
        scale, zero = self._grids[point.root]
        attrs = {"axis": p.axis, "dtype": p.dtype, "block": 0}
        rounding = {} if p.rule == "divide" else {"rounding": p.rule}  # torch graphs only: ONNX divides
        scope = point.value.producer.scope if point.value.producer is not None else ""
        after = point.value.producer
        source, clip = point.value, None
        if p.narrow:  # fewer levels than the type holds: the operator would use them all
            low, high = ((end - float(p.zero_point)) * float(p.scale) for end in p.limits)
            clip = self.graph.insert(
                "clip", [source], {"min": low, "max": high}, name=f"{name}_clip", after=after, scope=scope
            )
            source, after = clip.output, clip
        q = self.graph.insert(
            "quantize",
            [source, scale, zero],
            attrs | rounding,
            name=f"{name}_quantize",
            after=after,
            scope=scope,
        )
        dq = self.graph.insert(
            "dequantize", [q.output, scale, zero], attrs, name=f"{name}_dequantize", after=q, scope=scope
        )
        if point.all_uses:
            self.graph.replace_uses(point.value, dq.output, except_nodes=[q] if clip is None else [q, clip])
        else:
            for node, position in point.readers:
                self.graph.set_input(node, position, dq.output)

    def _weight(self, site: WeightSite, x: QuantParams | None, made: Rounded) -> None:
        p = made.params
        bias = made.bias
        if bias is None and site.bias is not None:
            bias = site.bias.numpy().astype(np.float32).reshape(-1)
        stored, quality = self._store(site, made)
        if stored.name not in self._numbers:
            self._numbers[stored.name] = self._dequantized(stored, site.weight.name, p, site)
        self.graph.set_input(site.node, site.position, self._numbers[stored.name])
        self.facts[site.node.name] = {
            "weight": site.weight.name,
            "weight_dtype": p.dtype,
            "weight_bits": site.form.bits,
            "weight_sqnr_db": quality,
            "weight_axis": site.axis,
            **({} if x is None else {"input_scale": float(x.scale), "input_zero_point": int(x.zero_point)}),
            **made.details,
        }
        if site.bias is not None and site.bias_node is not None and bias is not None and x is not None:
            b = bias_params(x, p, bias.size)
            name = f"{site.bias.name}_{site.node.name}"
            integers = self.graph.add_weight(f"{name}_quantized", b.quantize(bias))
            self.graph.set_input(site.bias_node, site.bias_position, self._dequantized(integers, name, b, site))
        elif made.bias is not None:
            self._float_bias(site, made.bias)

    def _float_bias(self, site: WeightSite, bias: np.ndarray) -> None:
        """A corrected bias where the target adds it in float: in place of the old one."""
        position = site.rule.bias if site.rule is not None else None
        old = None if position is None else site.node.input(position)
        name = f"{site.node.name}_bias" if old is None or old.weight is None else f"{old.weight.name}_corrected"
        if position is not None:
            self.graph.set_input(site.node, position, self.graph.add_weight(name, bias.astype(np.float32)))

    def _table(self, site: WeightSite, made: Rounded) -> None:
        """A look-up of integers, dequantized behind."""
        node, p = site.node, made.params
        value, quality = self._store(site, made)
        self.graph.set_input(node, site.position, value)
        scale, zero = self._grid(site.weight.name, p)
        dq = self.graph.insert(
            "dequantize",
            [node.output, scale, zero],
            {"axis": None if p.axis is None else (node.output.rank or 1) - 1, "dtype": p.dtype, "block": 0},
            name=f"{node.name}_dequantize",
            after=node,
            scope=node.scope,
        )
        self.graph.replace_uses(node.output, dq.output, except_nodes=[dq])
        self.facts[node.name] = {
            "weight": site.weight.name,
            "weight_dtype": p.dtype,
            "weight_bits": site.form.bits,
            "weight_sqnr_db": quality,
            "weight_axis": site.axis,
        }

    def _store(self, site: WeightSite, made: Rounded) -> tuple[Value, float]:
        """The stored integers and the weight's quality in decibel; tied weights with equal integers are stored once."""
        p, key = made.params, None
        if self._shared[id(site.weight)] > 1:
            digest = hashlib.sha256(np.ascontiguousarray(made.integers).view(np.uint8).data).digest()
            key = (id(site.weight), p.axis, p.block, p.scale.tobytes(), p.zero_point.tobytes(), digest)
            if key in self._integers:
                return self._integers[key]
        quality = quality_db(site.weight.numpy(), made.integers, p)
        found = self.graph.add_weight(f"{site.weight.name}_quantized", made.integers), quality
        if key is not None:
            self._integers[key] = found
        return found

    def _dequantized(self, stored: Value, name: str, p: QuantParams, site: WeightSite) -> Value:
        scale, zero = self._grid(name, p)
        attrs = {"axis": p.axis, "dtype": p.dtype, "block": p.block}
        node = self.graph.insert(
            "dequantize",
            [stored, scale, zero],
            attrs,
            name=f"{name}_dequantize",
            after=None,
            scope=site.node.scope,
        )
        return node.output
