"""Weights without a program: an nn.Module or a state dict as a Graph of no nodes, for passes that only need weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ...graph.errors import ConstraintError
from ...graph.ir import Graph, Node, Value, Weight


class WeightsGraph(Graph):
    """The weights of a module or of a checkpoint; every edit of the program is refused.

    Args:
        source: an ``nn.Module``, or a mapping of names to tensors or arrays. Never changed: a weight that is set is
            kept beside it, and ``to_model`` copies.
    """

    kind = "weights"

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.source = source
        self.name = type(source).__name__
        self.new: dict[str, np.ndarray] = {}
        for name, tensors in _stored(source).items():
            first = tensors[0]
            self.weights[name] = Weight(
                name,
                tuple(first[1].shape),
                _dtype(first[1]),
                "parameter",
                self._loader(name, first[1]),
                tuple(n for n, _ in tensors),
            )

    def _loader(self, name: str, tensor: Any) -> Any:
        return lambda: self.new[name] if name in self.new else _numpy(tensor)

    def set_weight(self, weight: Weight, data: np.ndarray) -> None:
        self.new[weight.name] = data
        weight.shape, weight.dtype = tuple(data.shape), data.dtype.name

    def clone(self) -> WeightsGraph:
        twin = WeightsGraph(self.source)
        for name, data in self.new.items():
            if name in twin.weights:
                twin.set_weight(twin.weights[name], data)
            else:
                twin.add_weight(name, data)
        return twin

    def to_model(self) -> Any:
        """A copy of the module, or a new mapping of the same type of values, with the weights as set."""
        if isinstance(self.source, Mapping):
            made = dict(self.source)
            for name, data in self.new.items():
                for alias in self.weights[name].aliases:
                    made[alias] = _like(self.source.get(alias, next(iter(self.source.values()))), data)
            return made
        import torch

        model = copy.deepcopy(self.source)
        state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        with torch.no_grad():
            for name, data in self.new.items():
                state[name].data = _like(state[name], data)
        return model

    def bind(self, batch: Any) -> dict[str, np.ndarray]:
        raise self._refused("run")

    def refresh(self) -> None:
        """There are no values."""

    def slice_weight(self, weight: Weight, kept: dict[int, np.ndarray]) -> None:
        raise self._refused("slice_weight")

    def add_weight(self, name: str, data: np.ndarray, *, trainable: bool = False) -> Value:
        """Add a name to a checkpoint; a module has its parameters."""
        if not isinstance(self.source, Mapping) or name in self.weights:
            raise self._refused("add_weight")
        self.new[name] = data
        value = Value(name, tuple(data.shape), tuple(data.shape), data.dtype.name)
        loaded = Weight(name, tuple(data.shape), data.dtype.name, "parameter", lambda: self.new[name], (name,), value)
        value.weight = self.weights[name] = loaded
        return value

    def set_attr(self, node: Node, **attrs: Any) -> None:
        raise self._refused("set_attr")

    def set_input(self, node: Node, position: int, value: Value | None) -> None:
        raise self._refused("set_input")

    def replace_uses(self, old: Value, new: Value, *, except_nodes: Iterable[Node] = ()) -> None:
        raise self._refused("replace_uses")

    def insert(
        self,
        op: str,
        inputs: Sequence[Value | None],
        attrs: dict[str, Any] | None = None,
        *,
        name: str,
        after: Node | None = None,
        scope: str = "",
    ) -> Node:
        raise self._refused("insert")

    def erase(self, node: Node) -> None:
        raise self._refused("erase")

    def _refused(self, what: str) -> ConstraintError:
        return ConstraintError(
            "these are weights without a program", node=what, hint="give example_inputs, so that the model is captured"
        )


def _stored(source: Any) -> dict[str, list[tuple[str, Any]]]:
    """First name -> (name, tensor) of every name of one storage."""
    if isinstance(source, Mapping):
        items = [(str(k), v) for k, v in source.items() if hasattr(v, "shape") and hasattr(v, "dtype")]
    else:
        items = list(source.named_parameters(remove_duplicate=False)) + list(source.named_buffers())
    found: dict[Any, list[tuple[str, Any]]] = {}
    for name, tensor in items:
        found.setdefault(_key(tensor), []).append((name, tensor))
    return {tensors[0][0]: tensors for tensors in found.values()}


def _key(tensor: Any) -> Any:
    if isinstance(tensor, np.ndarray) or not tensor.numel():
        return id(tensor)
    from ...graph.fx.tensors import storage_key

    return storage_key(tensor)


def _dtype(tensor: Any) -> str:
    return tensor.dtype.name if isinstance(tensor, np.ndarray) else str(tensor.dtype).removeprefix("torch.")


def _numpy(tensor: Any) -> np.ndarray:
    if isinstance(tensor, np.ndarray):
        return tensor
    from ...graph.fx.tensors import to_numpy

    return to_numpy(tensor)


def _like(old: Any, data: np.ndarray) -> Any:
    """The data as what ``old`` is: an array, or a tensor on its device."""
    if isinstance(old, np.ndarray):
        return data
    from ...graph.fx.tensors import from_numpy

    return from_numpy(data).to(old.device)
