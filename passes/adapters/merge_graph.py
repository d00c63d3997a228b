"""Merging adapters into a graph or a checkpoint: where each weight is, also if an exporter transposed it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...graph.errors import ConstraintError
from ...graph.ir import Graph, Weight
from .adapter import Adapter, Entry
from .merge import Originals, bias_name, merged


@dataclass
class Located:
    """A target in a graph: its weight, whether that is the transpose of what the adapter knows, and its bias."""

    weight: Weight
    turned: bool
    bias: Weight | None

    def data(self) -> np.ndarray:
        """The weight in the adapter's layout."""
        stored = self.weight.numpy()
        return stored.T if self.turned else stored


def locate(graph: Graph, target: str, entries: list[Entry]) -> Located:
    """Where the target's weight is: by name, else the one weight that the operator of its layer reads.

    Raises:
        ConstraintError: there is none, or another layer reads it too (exporters store equal tensors once).
    """
    name = bias_name(entries)
    bias = graph.weight(name) if name is not None and has(graph, name) else None
    aliases = {alias for entry in entries for alias in (entry.target, *entry.aliases)}
    layers = {alias.rpartition(".")[0] for alias in aliases}
    if has(graph, target):
        found, turned = graph.weight(target), False
    else:
        readers = [n for n in graph.nodes if n.op == "linear" and n.scope in layers and n.input(1) is not None]
        weights = {w.name: w for n in readers if (w := n.inputs[1].weight) is not None}  # type: ignore[union-attr]
        if len(weights) != 1:
            return Located(graph.weight(target), False, bias)  # raises, naming the target
        (found,) = weights.values()
        turned = bool(readers[0].attrs.get("transposed_weight")) != entries[0].view.transposed
    uses = found.value.uses if found.value is not None else []
    others = {n.scope for n, _ in uses if n.scope and n.scope not in layers and n.op in ("linear", "conv", "gather")}
    if others and any(entry.aliases for entry in entries):
        raise ConstraintError(
            "another layer reads this weight too, and the adapter is not for that one",
            node=target,
            found=", ".join(sorted(others)),
            hint="merge into the nn.Module and export it",
        )
    return Located(found, turned, bias)


def merge_into_graph(graph: Graph, adapter: Adapter, any_base: bool) -> dict[str, list[Entry]]:
    """Set the merged weights of an ONNX graph or of bare weights, all or none; what was merged comes back."""
    fingerprint = adapter.fingerprint()
    new: list[tuple[Weight, np.ndarray]] = []
    added: dict[str, np.ndarray] = {}
    for target, entries in adapter.targets().items():
        at, name = locate(graph, target, entries), bias_name(entries)
        held = None if at.bias is None else at.bias.numpy()
        w, b = merged(target, entries, at.data(), held, fingerprint, any_base)
        if b is not None and at.bias is None and graph.kind == "onnx":
            raise ConstraintError(
                "this adapter needs a bias that the graph does not have", node=name, hint="merge into the nn.Module"
            )
        new.append((at.weight, np.ascontiguousarray(w.T) if at.turned else w))
        if at.bias is not None and b is not None:
            new.append((at.bias, b))
        elif name is not None and b is not None:
            added[name] = b
    for stored, data in new:
        graph.set_weight(stored, data)
    for name, data in added.items():
        graph.add_weight(name, data)
    return adapter.targets()


def replaced(graph: Graph, adapter: Adapter) -> Originals:
    """Copies of what :func:`merge_into_graph` will replace, by stored name; None for a bias that is not there."""
    found: Originals = {}
    for target, entries in adapter.targets().items():
        at, name = locate(graph, target, entries), bias_name(entries)
        found[at.weight.name] = at.weight.numpy().copy()
        if at.bias is not None:
            found[at.bias.name] = at.bias.numpy().copy()
        elif name is not None:
            found[name] = None
    return found


def has(graph: Graph, name: str) -> bool:
    """Whether the graph stores a weight of this name or alias."""
    return name in graph.weights or any(name in w.aliases for w in graph.weights.values())
