"""Plans on whatever else holds a model's weights: state dicts, checkpoint files, EMA copies, optimizer state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ConstraintError, ModelFileError
from .plans import Plan, check_shape

CHECKPOINTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def take(tensor: Any, axes: Mapping[int, Sequence[int]]) -> Any:
    """The kept indices of each axis, one gather per axis; a torch tensor stays one, detached, on its device."""
    for axis, keep in axes.items():
        if isinstance(tensor, np.ndarray):
            tensor = np.take(tensor, keep, axis=axis)
        else:
            import torch

            tensor = tensor.detach().index_select(axis, torch.as_tensor(keep, device=tensor.device))
    return tensor


def on_state(state: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """A state dict under a plan, in a new dict; tensors outside the plan are the same objects.

    Names may all carry one prefix (``module.`` of EMA copies and data-parallel wrappers).

    Raises:
        ConstraintError: a weight is missing or has another shape.
    """
    out = dict(state)
    plan = plan.prefixed(plan.prefix_in(state))
    for name, axes in plan.weights.items():
        present = [n for n in plan.names(name) if n in out]
        if not present and name not in plan.unsaved:
            raise ConstraintError(
                "the plan names a weight the checkpoint lacks",
                node=name,
                found=f"{len(out)} entries, such as {', '.join(list(out)[:3])}",
                hint="use an unpruned checkpoint of the model the plan was made for",
            )
        for n in present:
            check_shape(plan, n, tuple(out[n].shape), name)
            out[n] = take(out[n], axes)
    return out


def on_checkpoint(data: Mapping[str, Any], plan: Plan, original: Any = None) -> dict[str, Any]:
    """A checkpoint under a plan: a state dict, or a mapping with state dicts (and optimizer states) inside.

    Raises:
        ConstraintError: no mapping in it holds the plan's weights, or an optimizer state cannot be followed.
    """
    if _holds(data, plan):
        return on_state(data, plan)
    found = False
    out = dict(data)
    for key, item in data.items():
        if is_optimizer_state(item):
            out[key] = on_optimizer_state(item, plan, original)
        elif isinstance(item, Mapping) and _holds(item, plan):
            out[key], found = on_state(item, plan), True
    return out if found else on_state(data, plan)


def _holds(data: Mapping[str, Any], plan: Plan) -> bool:
    first = next((n for n in plan.weights if n not in plan.unsaved), None)
    prefix = plan.prefix_in(k for k in data if isinstance(k, str))
    return first is None or any(prefix + n in data for n in plan.names(first))


def on_file(path: Path, plan: Plan, original: Any = None) -> dict[str, Any]:
    """A checkpoint file (safetensors, or a pickle of tensors) under a plan, as a dict of tensors.

    Raises:
        ModelFileError: it is missing or unreadable.
        ConstraintError: it is a checkpoint of another model.
    """
    if not path.is_file():
        raise ModelFileError("there is no such checkpoint", node=str(path))
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            data = load_file(str(path))
        else:
            import torch

            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:  # pickle, zip and safetensors each raise their own kinds
        raise ModelFileError(f"the checkpoint cannot be read: {exc}", node=str(path)) from exc
    if not isinstance(data, Mapping):
        raise ModelFileError("the file holds no state dict", node=str(path), found=type(data).__name__)
    return on_checkpoint(data, plan, original)


# ---- optimizers ----------------------------------------------------------------------------------------------------
def on_optimizer(optimizer: Any, plan: Plan, model: Any, original: Any = None) -> Any:
    """A torch optimizer under a plan, in place: its state is sliced and it holds the pruned model's parameters.

    Which parameter is which is told by identity (in ``model``, pruned in place, or in ``original``), by the
    optimizer's own ``param_names``, or, with a single parameter group over all parameters, by order. Statistics that
    are means over a cut axis (factored second moments) keep the values they had.

    Raises:
        ConstraintError: parameters cannot be told apart, or a state is not laid out like its parameter. The
            optimizer is then as it was.
    """
    if model is None:
        raise ConstraintError("an optimizer holds no names", hint="pass model=<the pruned module> to apply_plan")
    old = [p for g in optimizer.param_groups for p in g["params"]]
    fresh = dict(model.named_parameters())
    plan = plan.prefixed(plan.prefix_in([n for n, _ in model.named_parameters(remove_duplicate=False)]))
    names = _names(optimizer.param_groups, old, fresh, model, original)
    states = []
    for p, name in zip(old, names, strict=True):
        if name not in fresh:
            raise ConstraintError(
                "the optimizer holds a parameter that the pruned model lacks",
                node=name,
                hint="pass model=<the pruned module> that belongs to this optimizer",
            )
        q, axes = fresh[name], plan.axes(name)
        full = _full_shape(plan, name, tuple(q.shape))
        if p is not q and tuple(p.shape) != full:
            raise ConstraintError(
                "the plan is for another model",
                node=name,
                expected=f"shape {list(full)}",
                found=f"shape {list(p.shape)}",
                hint="pass original=<the unpruned module> so that parameters are told apart by identity",
            )
        held = optimizer.state.get(p, {})
        states.append({k: _state(v, full, axes, f"{name}.{k}", str(k)) for k, v in held.items()})
    for p in old:
        optimizer.state.pop(p, None)
    for name, state in zip(names, states, strict=True):
        if state:
            optimizer.state[fresh[name]] = state
    at = iter(names)
    for g in optimizer.param_groups:
        g["params"] = [fresh[next(at)] for _ in g["params"]]
    return optimizer


def is_optimizer_state(item: Any) -> bool:
    """Whether this is what ``optimizer.state_dict()`` returns."""
    return isinstance(item, Mapping) and isinstance(item.get("param_groups"), list) and "state" in item


def on_optimizer_state(data: Mapping[str, Any], plan: Plan, original: Any = None) -> dict[str, Any]:
    """``optimizer.state_dict()`` under a plan, in a new dict.

    Raises:
        ConstraintError: it names no parameters (``original``, the unpruned module, tells their order for a single
            group), or a state is not laid out like its parameter.
    """
    groups = data["param_groups"]
    indices = [i for g in groups for i in g["params"]]
    named = {} if original is None else dict(original.named_parameters())
    names = _names(groups, [None] * len(indices), named, None, None)
    state = dict(data["state"])
    for i, name in zip(indices, names, strict=True):
        axes = plan.axes(name)
        if i in state and axes:
            full = _full_shape(plan, name, ())
            state[i] = {k: _state(v, full, axes, f"{name}.{k}", str(k)) for k, v in state[i].items()}
    return {**data, "state": state}


def _names(groups: Any, old: list[Any], fresh: Mapping[str, Any], model: Any, original: Any) -> list[str]:
    known = {id(p): n for m in (original, model) if m is not None for n, p in m.named_parameters()}
    if old and all(id(p) in known for p in old):
        return [known[id(p)] for p in old]
    if all("param_names" in g for g in groups):
        return [n for g in groups for n in g["param_names"]]
    if len(groups) == 1 and len(old) == len(fresh):
        return list(fresh)
    raise ConstraintError(
        "the optimizer's parameters cannot be told apart",
        expected=f"one group of all {len(fresh)} parameters in the model's order, or names",
        found=f"{len(groups)} groups with {len(old)} parameters",
        hint="pass original=<the unpruned module>, or build the optimizer from model.named_parameters()",
    )


def _full_shape(plan: Plan, name: str, now: tuple[int, ...]) -> tuple[int, ...]:
    weight = next((n for n in plan.weights if name in plan.names(n)), None)
    return now if weight is None else tuple(plan.shapes[weight])


def _state(value: Any, full: tuple[int, ...], axes: Mapping[int, Sequence[int]], where: str, key: str) -> Any:
    """One entry of a parameter's optimizer state under the plan; ``full`` is the parameter's shape before it."""
    import torch

    if not isinstance(value, torch.Tensor):
        parts = list(value.values()) if isinstance(value, Mapping) else value
        nested = isinstance(parts, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in parts)
        if nested and axes:
            raise _not_laid_out(where, full, f"{type(value).__name__} of tensors")
        return value
    shape = tuple(value.shape)
    if not axes or value.numel() == 1:  # counters, also those that a fused optimizer keeps as tensors
        return value
    if len(shape) == len(full) and all(s in (1, f) for s, f in zip(shape, full, strict=True)):
        return take(value, {a: k for a, k in axes.items() if shape[a] == full[a]})
    ways = {}
    for gone in range(len(full)):
        if full[:gone] + full[gone + 1 :] == shape:
            here = {a - (a > gone): list(k) for a, k in axes.items() if a != gone}
            ways[gone] = here
    if len(ways) > 1 and len(full) >= 2:  # Adafactor's factors of a square matrix, told apart by their usual names
        by_name = {"row": len(full) - 1, "col": len(full) - 2}
        ways = {g: w for g, w in ways.items() if key.endswith(("row", "col")) and by_name[key[-3:]] == g} or ways
    distinct = {repr(sorted(w.items())): w for w in ways.values()}
    if len(distinct) != 1:
        raise _not_laid_out(where, full, f"shape {list(shape)}")
    return take(value, next(iter(distinct.values())))


def _not_laid_out(where: str, full: tuple[int, ...], found: str) -> ConstraintError:
    return ConstraintError(
        "this optimizer state is not laid out like its parameter, so a plan cannot slice it",
        node=where,
        expected=f"shape {list(full)}, that shape with axes of size 1 or one axis reduced, or a single number",
        found=found,
        hint="start a fresh optimizer for the pruned model",
    )
