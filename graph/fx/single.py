"""One call of an FXGraph evaluated by itself, in the dtypes of the model or in the widest of each kind."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..errors import ConstraintError
from ..ir import Node

if TYPE_CHECKING:
    from .view import FXView

WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}
PURE = ("aten", "prims")
"""Namespaces whose operators say in their schema whether they write or draw random numbers."""


@cache
def _deterministic(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") in ("_operator", "operator", "math")
    drawn = torch.Tag.nondeterministic_seeded in target.tags
    return target.namespace in PURE and not target._schema.is_mutable and not drawn


class Single:
    """Evaluates canonical nodes of an FX graph through their fx calls, on the CPU."""

    def __init__(self, graph: FXView) -> None:
        self.graph = graph

    def takes(self, node: Node) -> bool:
        """Whether the node is a function of its operands: no control flow, no random numbers, nothing written."""
        return _deterministic(node.native.target)

    @staticmethod
    def widened(result: Any) -> Any:
        """The same numbers as float64 or complex128; integers and Python numbers as they are."""
        if isinstance(result, torch.Tensor):
            return result.to(WIDER.get(result.dtype, result.dtype))
        return result

    def run(self, node: Node, known: Mapping[int, Any], *, widen: bool) -> list[Any]:
        """One result per output of ``node``; ``known`` holds computed operands by ``id`` of their canonical value."""

        def operand(native: fx.Node) -> Any:
            value = self.graph._value_of.get(native)
            if value is None:
                raise ConstraintError("an operand has no data", node=node.name, value=native.name)
            if value.weight is not None:
                tensor = self.graph.tensors[value.weight.name].detach().cpu()
                return self.widened(tensor) if widen else tensor
            if id(value) not in known:
                raise ConstraintError("an operand has not been computed", node=node.name, value=value.name)
            return known[id(value)]

        def convert(item: Any) -> Any:
            if isinstance(item, torch.dtype):
                return WIDER.get(item, item) if widen else item
            return torch.device("cpu") if isinstance(item, torch.device) else item

        native: fx.Node = node.native
        args, kwargs = fx.node.map_arg((native.args, native.kwargs), operand)
        args = torch.utils._pytree.tree_map(convert, args)
        kwargs = torch.utils._pytree.tree_map(convert, kwargs)
        if widen and "dtype" in kwargs and kwargs["dtype"] is None and not native.all_input_nodes:
            made = native.meta.get("val")  # a maker of tensors takes torch's default, which is narrow
            if isinstance(made, torch.Tensor) and made.dtype in WIDER:
                kwargs = {**kwargs, "dtype": WIDER[made.dtype]}
        try:
            result = native.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:
            raise ConstraintError(
                f"the call cannot be evaluated: {str(error).strip().splitlines()[0][:200]}", node=node.name
            ) from error
        results = list(result) if isinstance(result, (list, tuple)) else [result]
        return [self.widened(r) for r in results] if widen else results
