"""Interpreter of an FXGraph: outputs and tapped values, each intermediate freed after its last reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from ..errors import ConstraintError
from .functional import has_effect
from .tensors import from_numpy

if TYPE_CHECKING:
    from .view import FXView


def fitting(graph: FXView) -> str:
    """What inputs a graph that fails on some should be given."""
    fixed = next((n for n in graph.notes if n.startswith("batch size is fixed")), "")
    return f"give batches as large as the example inputs ({fixed})" if fixed else "give inputs like the example inputs"


def interpret(
    graph: FXView,
    inputs: dict[str, Any],
    taps: Sequence[str] = (),
    grad: bool = False,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Run ``graph`` in eval semantics; inputs by graph input name, taps by value name; ``tensors`` replaces weights."""
    unknown = [t for t in taps if t not in graph.values]
    if unknown:
        raise ConstraintError("no such value to tap", value=unknown[0], hint="value names are in graph.values")
    env: dict[fx.Node, Any] = {}
    last = _last_readers(graph)
    wanted: dict[fx.Node, list[str]] = {}
    results: dict[str, torch.Tensor] = {}
    for name in taps:
        value = graph.values[name]
        if value.literal is not None:
            results[name] = torch.from_numpy(value.literal.copy())
        else:
            wanted.setdefault(graph.fx_value(value), []).append(name)
    stored: dict[str, Any] = {**graph.tensors, **graph.submodules, **(tensors or {})}
    outputs: list[torch.Tensor] = []
    device = next((t.device for t in graph.tensors.values()), torch.device("cpu"))
    with torch.enable_grad() if grad else torch.no_grad():
        for node in graph.fx.nodes:
            if node.op == "placeholder":
                env[node] = _input(graph, node, inputs, device, from_numpy)
            elif node.op == "get_attr":
                env[node] = stored[str(node.target)]
            elif node.op == "output":
                outputs = [env[n] for n in node.args[0] if isinstance(n, fx.Node) and n in graph._value_of]  # type: ignore[union-attr]
                continue
            elif has_effect(node):
                env[node] = env[node.all_input_nodes[-1]]  # a buffer update: weights are never written to
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
                try:
                    env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                except Exception as error:
                    raise ConstraintError(
                        f"the graph cannot run: {str(error).strip().splitlines()[0][:300]}",
                        node=node.name,
                        found=[tuple(a.shape) for a in args if isinstance(a, torch.Tensor)],
                        hint=fitting(graph),
                    ) from error
            for name in wanted.get(node, ()):
                results[name] = env[node]
            for done in last.get(node, ()):
                env.pop(done, None)
    return outputs, {name: results[name] for name in taps}


def _last_readers(graph: FXView) -> dict[fx.Node, list[fx.Node]]:
    seen: set[fx.Node] = set()
    last: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.fx.nodes):
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                last.setdefault(node, []).append(source)
    return last


def _input(graph: FXView, node: fx.Node, inputs: dict[str, Any], device: torch.device, convert: Any) -> Any:
    value = graph._value_of.get(node)
    if value is None:
        return None
    if value.name not in inputs:
        raise ConstraintError(
            "an input is missing", value=value.name, expected=[v.name for v in graph.inputs], found=sorted(inputs)
        )
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return np.asarray(inputs[value.name]).item()  # a size given as an argument
    tensor = convert(inputs[value.name])
    return tensor.to(device) if isinstance(tensor, torch.Tensor) and tensor.device != device else tensor
