"""A Graph of linear and relu layers that runs in numpy: lets pipeline tests do without a front end."""

from __future__ import annotations

from typing import Any

import numpy as np
from foldline.graph.errors import ConstraintError
from foldline.graph.ir import Graph, Node, Value, Weight


class ToyGraph(Graph):
    """A chain ``linear, relu, linear, ...`` with weights ``fc0.weight``, ``fc0.bias``, ...; input ``x`` [batch, n]."""

    kind = "toy"

    def __init__(self, weights: dict[str, np.ndarray], batch: int = 3) -> None:
        super().__init__()
        self.name = "toy"
        self.data = weights
        self.batch = batch
        self._build()

    def _build(self) -> None:
        self.nodes, self.inputs, self.outputs, self.values, self.weights = [], [], [], {}, {}
        layers = sorted({name.split(".")[0] for name in self.data})
        width = self.data[f"{layers[0]}.weight"].shape[1]
        x = self._value("x", (self.batch, width), is_input=True)
        self.inputs.append(x)
        for i, layer in enumerate(layers):
            w, b = self._stored(f"{layer}.weight"), self._stored(f"{layer}.bias")
            y = self._value(layer, (self.batch, w.shape[0]))
            attrs = {"transposed_weight": False, "alpha": 1.0, "beta": 1.0}
            self.nodes.append(Node(layer, "linear", [x, w, b], [y], attrs, scope=layer))
            if i + 1 < len(layers):
                x = self._value(f"relu{i}", y.shape)
                self.nodes.append(Node(f"relu{i}", "relu", [y], [x]))
        y.is_output = True
        self.outputs.append(y)
        self._link()

    def _value(self, name: str, shape: tuple[int, ...], **kind: Any) -> Value:
        self.values[name] = Value(name, shape, shape, "float32", **kind)
        self.values[name].native = name
        return self.values[name]

    def _stored(self, name: str) -> Value:
        shape = self.data[name].shape
        weight = Weight(name, shape, "float32", "parameter", lambda: self.data[name], (name,), trainable=True)
        value = self._value(name, shape, weight=weight)
        weight.value, self.weights[name] = value, weight
        return value

    def run(self, arrays: dict[str, np.ndarray], taps: list[str]) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        found = dict(arrays)
        for node in self.nodes:
            x = found[node.inputs[0].name]
            if node.op == "linear":
                found[node.name] = x @ self.data[f"{node.name}.weight"].T + self.data[f"{node.name}.bias"]
            else:
                found[node.name] = np.maximum(x, 0)
        return [found[v.name] for v in self.outputs], {name: found[name] for name in taps}

    def set_weight(self, weight: Weight, data: np.ndarray) -> None:
        self.data = {**self.data, weight.name: data}
        self._build()

    def slice_weight(self, weight: Weight, kept: dict[int, np.ndarray]) -> None:
        data = self.data[weight.name]
        for axis, indices in kept.items():
            data = np.take(data, indices, axis)
        self.data = {**self.data, weight.name: data}

    def refresh(self) -> None:
        self._build()

    def clone(self) -> ToyGraph:
        return ToyGraph(dict(self.data), self.batch)

    def to_model(self) -> dict[str, np.ndarray]:
        return dict(self.data)

    def bind(self, batch: Any) -> dict[str, np.ndarray]:
        return {"x": np.asarray(batch, dtype=np.float32)}

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ConstraintError("the toy graph has no such edit")

    add_weight = set_attr = set_input = replace_uses = insert = erase = _refuse


def toy(*widths: int, seed: int = 0) -> ToyGraph:
    """A chain of the given widths with normal weights."""
    rng = np.random.default_rng(seed)
    weights = {}
    for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        weights[f"fc{i}.weight"] = rng.standard_normal((b, a)).astype(np.float32) / np.sqrt(a)
        weights[f"fc{i}.bias"] = rng.standard_normal(b).astype(np.float32)
    return ToyGraph(weights)
