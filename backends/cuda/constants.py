"""Values of an FX graph that are the same in every run, computed on demand from the stored tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...graph.ir import Value

if TYPE_CHECKING:
    from ...graph.fx import FXGraph


class Constants:
    """Evaluates constant values of one graph on the CPU; intermediate results are not kept.

    Whether a value is constant is found out once per node, without computing anything.
    """

    def __init__(self, graph: FXGraph) -> None:
        self.graph = graph
        self._fixed: dict[fx.Node, bool] = {}
        for node in graph.fx.nodes:
            pure = node.op == "call_function" and all(self._fixed[n] for n in node.all_input_nodes)
            self._fixed[node] = node.op == "get_attr" or (pure and bool(node.all_input_nodes) and _pure(node.target))

    def holds(self, value: Value | None) -> bool:
        """Whether the value is constant."""
        if value is None:
            return False
        return value.literal is not None or (value.native is not None and self._fixed.get(value.native, False))

    def get(self, value: Value | None) -> torch.Tensor | None:
        """The tensor of a constant value, detached and on the CPU; None for what depends on the inputs."""
        if value is None or not self.holds(value):
            return None
        if value.literal is not None:
            return torch.as_tensor(value.literal)
        with torch.no_grad():
            found = self._evaluate(value.native)
        return found.detach().cpu() if isinstance(found, torch.Tensor) else None

    def _evaluate(self, node: fx.Node) -> Any:
        order: list[fx.Node] = []
        seen: set[fx.Node] = set()
        stack: list[tuple[fx.Node, bool]] = [(node, False)]
        while stack:
            current, ready = stack.pop()
            if ready:
                order.append(current)
            elif current not in seen:
                seen.add(current)
                stack.append((current, True))
                stack.extend((n, False) for n in current.all_input_nodes)
        known: dict[fx.Node, Any] = {}
        for current in order:
            if current.op == "get_attr":
                stored: Any = {**self.graph.tensors, **self.graph.submodules}[str(current.target)]
                known[current] = stored.detach().cpu() if isinstance(stored, torch.Tensor) else stored
            else:
                args, kwargs = fx.node.map_arg((current.args, current.kwargs), lambda n: known[n])
                known[current] = current.target(*args, **kwargs)  # type: ignore[operator]
        return known[node]


def _pure(target: Any) -> bool:
    """No random numbers, nothing written, no control flow."""
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") in ("_operator", "operator", "math")
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags
