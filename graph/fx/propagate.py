"""Shapes of an edited fx graph: one call evaluated on fake tensors, and the baked sizes that simply follow an input."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ..errors import ConstraintError
from . import custom
from .functional import packet
from .shortcuts import shortcut

# A quantizer inserts thousands: their fake results without a trip through torch's dispatcher.
_PLAIN: dict[Any, Any] = {
    custom.quantize_linear: custom._fake_quantize,
    custom.dequantize_linear: custom._fake_dequantize,
}

_FAKE_LOG = logging.getLogger("torch._subclasses.fake_tensor")


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The mode that a captured graph's fake tensors belong to."""
    for node in graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, FakeTensor):
            return val.fake_mode
    return FakeTensorMode()


def meta_of(mode: FakeTensorMode | None, tensor: torch.Tensor) -> torch.Tensor:
    """Fake tensor of a stored one (static shape, same dtype and device); a meta tensor in a recorded graph."""
    if mode is None:
        return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="meta")
    with mode:
        return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device=tensor.device)


def propagate(mode: FakeTensorMode | None, node: fx.Node) -> Any:
    """Fake result of one call. ConstraintError naming the node where the operands' shapes do not fit.

    Without a mode the graph was recorded on meta tensors, and is evaluated on them.
    """
    args = tuple([_val(a) for a in node.args])
    kwargs = {k: _val(a) for k, a in node.kwargs.items()}
    if mode is None:
        return _on_meta(node, args, kwargs)
    alike = _PLAIN.get(node.target) if not kwargs else None
    if alike is not None:
        with mode, torch.no_grad():
            return alike(*args)
    level = _FAKE_LOG.level
    _FAKE_LOG.setLevel(logging.CRITICAL)  # torch logs a traceback of what is raised as a ConstraintError here
    known = {} if mode.shape_env is None else dict(mode.shape_env.replacements)
    try:
        with mode, enable_python_dispatcher(), torch.no_grad():
            found = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:
        raise _misfit(node, error) from error
    finally:
        _FAKE_LOG.setLevel(level)
    now = {} if mode.shape_env is None else mode.shape_env.replacements
    if len(now) > len(known):  # torch has settled a size, for every graph of this capture
        fixed = ", ".join(f"{s} = {v}" for s, v in now.items() if s not in known and v.is_number)
        if fixed:
            raise fixes_a_size(node, fixed)
    return found


def _val(item: Any) -> Any:
    """An argument of a call, with the values of its nodes in their places."""
    if isinstance(item, fx.Node):
        return item.meta.get("val")
    if isinstance(item, (list, tuple, dict, slice)):
        return fx.node.map_arg(item, lambda n: n.meta.get("val"))
    return item


def fixes_a_size(node: fx.Node, what: str) -> ConstraintError:
    """The error of a call that would be right for one size of a symbolic dimension only."""
    return ConstraintError(
        "the call would work for one size of a symbolic dimension only", node=node.name, found=what,
        expected="any size", hint="leave that size open (None), or load the model with a static batch",
    )  # fmt: skip


def _on_meta(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        out = shortcut(node.target, args, kwargs)
        if out is not None:
            return out
        if any(isinstance(a, torch.device) for a in (*args, *kwargs.values())):
            meta = torch.device("meta")
            args, kwargs = fx.node.map_aggregate((args, kwargs), lambda a: meta if isinstance(a, torch.device) else a)
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:
        raise _misfit(node, error) from error


def _misfit(node: fx.Node, error: Exception) -> ConstraintError:
    shapes = [tuple(v.shape) for n in node.all_input_nodes if isinstance(v := n.meta.get("val"), torch.Tensor)]
    return ConstraintError(
        f"shapes do not fit after the edits: {str(error).strip().splitlines()[0][:200]}",
        node=node.name,
        found=f"{node.target} on {shapes}",
        hint="every tensor that shares the edited axis must be cut alike",
    )


def sync_baked_sizes(node: fx.Node) -> bool:
    """Rewrite arguments that must equal a size of an operand (``normalized_shape``); True if one changed."""
    if packet(node) not in ("aten.layer_norm", "aten.rms_norm", "aten.native_layer_norm"):
        return False
    shape = list(node.args[1])  # type: ignore[arg-type]
    weight = node.args[2] if len(node.args) > 2 else node.kwargs.get("weight")
    source = weight if isinstance(weight, fx.Node) else node.args[0]
    value = source.meta.get("val")  # type: ignore[union-attr]
    if not isinstance(value, torch.Tensor) or not all(isinstance(s, int) for s in value.shape[-len(shape) :]):
        return False
    wanted = [int(s) for s in value.shape[-len(shape) :]]
    if wanted == shape:
        return False
    node.update_arg(1, wanted)
    return True
