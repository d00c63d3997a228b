"""Tensor data that hangs on sizes alone, computed when a model reads it, from the calls that made the tensor."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import fx

from .functional import by_identity, packet_of
from .purity import is_pure_call

aten = torch.ops.aten
_READS = {aten.is_nonzero.default, aten.item.default, aten._local_scalar_dense.default}
_MOST_ELEMENTS, _MOST_CALLS = 1 << 20, 64


class NotKnown(Exception):
    """The data depends on an input or a weight, or is not worth its computing."""


@by_identity
def reads(func: Any) -> bool:
    """Whether an operator hands a tensor's element to Python."""
    return func in _READS


Made: TypeAlias = tuple[Any, tuple[Any, ...], dict[str, Any], Any]


class Known:
    """Computes the data behind tensors of a recorded call.

    ``made_by`` says which call made a tensor or node (``kind``): (operator, arguments, keyword arguments, what it gives
    by shape), operands may be such items again, or the data itself. It raises NotKnown for inputs, weights, and
    whatever may have been written to. Only operators that are functions of their operands are evaluated, on the CPU,
    no more than 64 calls with 2^20 elements each.
    """

    def __init__(self, kind: type, made_by: Callable[[Any], Made | torch.Tensor]) -> None:
        self.kind, self.made_by = kind, made_by
        self.values: dict[int, Any] = {}

    def __getitem__(self, item: Any) -> Any:
        if id(item) not in self.values:
            made = self.made_by(item)
            if isinstance(made, torch.Tensor):
                return self.values.setdefault(id(item), made)
            func, args, kwargs, like = made
            if len(self.values) >= _MOST_CALLS or not _evaluates(func):
                raise NotKnown
            if isinstance(like, torch.Tensor) and like.numel() > _MOST_ELEMENTS:
                raise NotKnown
            self.values[id(item)] = None  # counted, for what follows
            given = self._operand(args)
            out = func(*given, **self._operand(kwargs))
            if isinstance(out, torch.Tensor) and (out.shape != like.shape or out.dtype != like.dtype):
                raise NotKnown
            self.values[id(item)] = out
        return self.values[id(item)]

    def _operand(self, item: Any) -> Any:
        if isinstance(item, self.kind):
            return self[item]
        if isinstance(item, torch.Tensor):
            raise NotKnown
        if isinstance(item, torch.device):
            return torch.device("cpu")
        if isinstance(item, list):
            return [self._operand(x) for x in item]
        if type(item) is tuple:
            return tuple([self._operand(x) for x in item])
        if isinstance(item, dict):
            return {k: self._operand(v) for k, v in item.items()}
        return item


def data_of(node: fx.Node) -> torch.Tensor:
    """The data of a node of a recorded graph, whose meta tensors share memory where the model's do.

    Raises NotKnown where an input or a weight takes part, or what was written to in place.
    """
    written = {
        v.untyped_storage()._cdata
        for n in node.graph.nodes
        if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable
        for source in n.all_input_nodes
        if isinstance(v := source.meta.get("val"), torch.Tensor)
    }

    def made_by(n: fx.Node) -> Made:
        val = n.meta.get("val")
        if n.op != "call_function" or (isinstance(val, torch.Tensor) and val.untyped_storage()._cdata in written):
            raise NotKnown
        return n.target, n.args, n.kwargs, val

    found: torch.Tensor = Known(fx.Node, made_by)[node]
    return found


@by_identity
def _evaluates(func: Any) -> bool:
    if func is operator.getitem:
        return True
    return is_pure_call(func) and not packet_of(func).removeprefix("aten.").startswith(("empty", "new_empty"))
