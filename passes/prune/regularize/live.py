"""The graph of a module that is being trained, and its parameters under the graph's names; torch and ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ....graph.errors import ConfigError
from ....graph.ir import Graph
from ....graph.load import is_onnx_model, load


def graph_of(module: nn.Module, source: Any) -> Graph:
    """The graph of ``module`` with its weights as they are now.

    Args:
        source: one call's arguments; for a module that was made from ONNX, that ONNX model (a path, a proto or a
            graph).

    Raises:
        ConfigError: the module comes from ONNX and ``source`` is no ONNX model.
    """
    if not hasattr(module, "weight_names"):
        return load(module, source)
    from ....graph.onnx import ONNXGraph
    from ....graph.onnx.as_torch import write_back

    graph = load(source).clone() if isinstance(source, (Graph, str, Path)) or is_onnx_model(source) else None
    if not isinstance(graph, ONNXGraph):
        raise ConfigError(
            "this module was made from an ONNX model, which tells its axis groups",
            node="example_inputs",
            expected="that ONNX model in place of example inputs",
            found=type(source).__name__,
        )
    write_back(module, graph)  # type: ignore[arg-type]
    return graph


def live_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter under every name that the graph may know it by."""
    named = dict(module.named_parameters(remove_duplicate=False))
    slots: dict[str, str] = getattr(module, "weight_names", {})
    return {slots.get(name, name): p for name, p in named.items()}
