"""Shapes of an edited fx graph: one call evaluated on fake tensors, and the baked sizes that simply follow an input."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import ConstraintError
from .functional import packet
from .shortcuts import shortcut

_FAKE_LOG = logging.getLogger("torch._subclasses.fake_tensor")


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
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    if mode is None:
        return _on_meta(node, args, kwargs)
    level = _FAKE_LOG.level
    _FAKE_LOG.setLevel(logging.CRITICAL)  # torch logs a traceback of what is raised as a ConstraintError here
    sizes = _Sizes(mode.shape_env)
    try:
        with mode, enable_python_dispatcher(), torch.no_grad():
            found = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:
        sizes.restore()
        raise _misfit(node, error) from error
    finally:
        _FAKE_LOG.setLevel(level)
    fixed = sizes.fixed()
    if fixed:
        sizes.restore()
        raise ConstraintError(
            "the call would work for one size of a symbolic dimension only", node=node.name, found=fixed,
            expected="any size", hint="leave that size open (None), or load the model with a static batch",
        )  # fmt: skip
    return found


class _Sizes:
    """What is known about the symbolic sizes, which all graphs of one capture share, before a call is evaluated."""

    def __init__(self, env: Any) -> None:
        self.env = env
        if env is not None:
            self.known, self.ranges, self.guards = dict(env.replacements), dict(env.var_to_range), len(env.guards)

    def fixed(self) -> str:
        """The symbols that the call has turned into numbers since, with them."""
        if self.env is None or len(self.env.replacements) == len(self.known):
            return ""
        new = {s: v for s, v in self.env.replacements.items() if s not in self.known and v.is_number}
        return ", ".join(f"{s} = {v}" for s, v in new.items())

    def restore(self) -> None:
        """Forget what a call that is not made has settled."""
        if self.env is None or len(self.env.replacements) == len(self.known):
            return
        for table, old in ((self.env.replacements, self.known), (self.env.var_to_range, self.ranges)):
            table.clear()
            table.update(old)
        del self.env.guards[self.guards :]
        self.env._update_version_counter()
        FakeTensorMode.cache_clear()  # or the same call would be answered from there, and settle nothing


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
