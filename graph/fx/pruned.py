"""Pruned modules on disk: their sizes as data, and a loader that puts them onto a freshly built, unpruned module."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ..errors import ConfigError, ConstraintError, ModelFileError
from ..holders import take
from ..plans import Plan
from .config_entries import configs, integer_entries, set_entry, sizes_of
from .copies import structural_copy

STRUCTURE = "structure.json"


def structure(module: nn.Module) -> dict[str, Any]:
    """Classes and integer attributes of a module tree: everything but tensors that pruning may have changed."""
    modules = {}
    for path, m in module.named_modules():
        entry: dict[str, Any] = {"class": _kind(m)}
        if sizes := dict(sizes_of(m)):
            entry["sizes"] = {k: v if isinstance(v, int) else list(v) for k, v in sizes.items()}
        modules[path] = entry
    entries = {path: integer_entries(config) for path, config in configs(module)}
    return {"format": "foldline-structure", "version": 1, "modules": modules, "configs": entries}


def _kind(m: nn.Module) -> str:
    return "GraphModule" if isinstance(m, fx.GraphModule) else type(m).__qualname__


def load_pruned(model: nn.Module, folder: str | Path, example_inputs: Any = None) -> nn.Module:
    """A saved pruned model, from the unpruned one as its own code builds it and the folder ``result.save`` wrote.

    Nothing is traced and no pass runs where the pruned model is of the caller's class: tensors of the new sizes come
    from ``model.safetensors``, the integers that modules and configurations hold from ``structure.json``. Where
    pruning gave a GraphModule, the plan is applied again instead, which needs ``example_inputs``.

    Args:
        model: freshly built, of the sizes before pruning (on the meta device too, if all its buffers are saved). It
            is left as it was.
        folder: holds ``model.safetensors``, ``structure.json`` and ``plan.json``.
        example_inputs: one call's arguments, where the plan has to be applied again.

    Raises:
        ConstraintError: the model is not the one that was pruned; the first tensor or module that differs is named.
        ConfigError: the folder holds no pruned module, or example inputs are needed.
        ModelFileError: a file in it cannot be read.
    """
    folder = Path(folder)
    for name in ("model.safetensors", STRUCTURE):
        if not (folder / name).is_file():
            onnx = (folder / "model.onnx").exists()
            raise ConfigError(
                "this folder holds no saved module",
                node=str(folder / name),
                expected="a folder that result.save(...) wrote for a PyTorch model",
                hint="an ONNX result is complete: fl.load(folder / 'model.onnx')" if onnx else None,
            )
    plan = Plan.load(folder / "plan.json") if (folder / "plan.json").exists() else Plan({}, {})
    data, tensors = _read(folder)
    foreign = _foreign(model, data["modules"])
    if not foreign:
        return _loaded(model, data, tensors, plan)
    if example_inputs is None:
        raise ConfigError(
            f"module {foreign!r} was turned into a graph, so the plan has to be applied again",
            node=foreign,
            expected="example_inputs, one call's arguments",
            hint="load_pruned(model, folder, example_inputs), or torch.load(folder / 'model.pt', weights_only=False)",
        )
    from ..actions import apply_plan

    twin: nn.Module = apply_plan(model, plan, example_inputs) if plan else model
    return _loaded(twin, structure(twin), tensors, Plan({}, {}))


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    try:
        data = json.loads((folder / STRUCTURE).read_text(encoding="utf-8"))
        data["modules"], data["configs"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ModelFileError(f"the structure cannot be read: {exc!r}", node=str(folder / STRUCTURE)) from exc
    try:
        return data, load_file(str(folder / "model.safetensors"))
    except Exception as exc:  # safetensors raises its own class, which is no public name
        raise ModelFileError(f"the weights cannot be read: {exc}", node=str(folder / "model.safetensors")) from exc


def _foreign(model: nn.Module, modules: dict[str, Any]) -> str | None:
    """The first saved module that is none of the caller's classes; ConstraintError if the model is another one."""
    here = dict(model.named_modules())
    for path, entry in modules.items():
        kind, own = entry["class"], here.get(path)
        if own is not None and kind in (_kind(own), nn.Identity.__qualname__):
            continue
        parents = [path[:i] for i, c in enumerate(path) if c == "."] + ([""] if path else [])
        if any(modules[p]["class"] == "GraphModule" for p in [path, *parents] if p in modules):
            return path or "the whole model"
        raise ConstraintError(
            "the model is not the one that was pruned",
            node=path or "the model itself",
            expected=kind,
            found="no such module" if own is None else _kind(own),
            hint="build it with the class and configuration that it had before pruning",
        )
    return None


def _loaded(model: nn.Module, data: dict[str, Any], tensors: dict[str, torch.Tensor], plan: Plan) -> nn.Module:
    gone = {p for p, e in data["modules"].items() if e["class"] == nn.Identity.__qualname__}
    gone = {p for p in gone if not isinstance(model.get_submodule(p), nn.Identity)}
    replace, added = _tensors(model, tensors, plan, gone)
    twin = structural_copy(model, replace)
    for path in gone:
        parent, _, leaf = path.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, nn.Identity())
    here = dict(twin.named_modules())
    for name in added:
        path, _, leaf = name.rpartition(".")
        like = next(iter(here[path]._parameters.values()), None)
        here[path].register_parameter(leaf, nn.Parameter(tensors[name], like is None or like.requires_grad))
    for path, entry in data["modules"].items():
        for name, value in entry.get("sizes", {}).items():
            now: Any = vars(here[path]).get(name) if path in here else None
            if isinstance(value, list) and isinstance(now, (list, tuple)):
                value = type(now)(value)
            if type(now) is type(value) and now != value:
                setattr(here[path], name, value)
    held = dict(configs(twin))
    for path, entries in data["configs"].items():
        if path in held:
            now_entries = integer_entries(held[path])
            for name, value in entries.items():
                if now_entries.get(name) != value:
                    set_entry(held[path], name, value)
    return twin


def _tensors(
    model: nn.Module, tensors: dict[str, torch.Tensor], plan: Plan, gone: set[str]
) -> tuple[dict[int, torch.Tensor], list[str]]:
    """New tensors by the id of the one they replace, and the names of parameters that the model has no place for."""
    live = {n: t for n, t in _named(model) if not any(n.startswith(f"{p}.") for p in gone)}
    state = set(model.state_dict(keep_vars=True))
    by_id: dict[int, list[str]] = {}
    for name, t in live.items():
        by_id.setdefault(id(t), []).append(name)
    replace: dict[int, torch.Tensor] = {}
    for names in by_id.values():
        old = live[names[0]]
        stored = next((n for n in names if n in tensors), None)
        saved = [n for n in names if n in state]
        axes = next((a for n in names if (a := plan.axes(n))), {})
        planned = next((w for w in plan.weights if any(n in plan.names(w) for n in names)), None)
        if planned is not None and list(old.shape) != plan.shapes[planned]:
            raise ConstraintError(
                "the model was built with other sizes than the one that was pruned",
                node=names[0],
                expected=f"shape {plan.shapes[planned]}",
                found=f"shape {list(old.shape)}",
                hint="build it with the configuration that it had before pruning",
            )
        if stored is None and saved:
            raise ConstraintError(
                "the saved weights lack one of the model's",
                node=saved[0],
                hint="build the model with the class and configuration that it had before pruning",
            )
        if stored is None:  # a buffer that no state dict holds
            if old.is_meta:
                raise ConstraintError(
                    "a buffer that is not saved is on the meta device",
                    node=names[0],
                    hint="build the model on a real device",
                )
            new = take(old, axes) if axes else old.detach().clone()
        else:
            shape = [len(axes[i]) if i in axes else s for i, s in enumerate(old.shape)]
            if list(tensors[stored].shape) != shape:
                raise ConstraintError(
                    "a saved weight does not fit the model",
                    node=stored,
                    expected=f"shape {shape}, what the plan leaves of {list(old.shape)}" if axes else f"shape {shape}",
                    found=f"shape {list(tensors[stored].shape)}",
                    hint="build the model with the configuration that it had before pruning",
                )
            new = tensors[stored].to("cpu" if old.is_meta else old.device)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        replace[id(old)] = new
    return replace, _added(model, live, tensors)


def _named(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor a module tree holds under a name: parameters, buffers, and plain attributes."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    for path, m in model.named_modules():
        for name, value in vars(m).items():
            if isinstance(value, torch.Tensor):
                yield f"{path}.{name}" if path else name, value


def _added(model: nn.Module, live: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> list[str]:
    """Saved parameters that take an empty place of the model (the bias that folding gave a layer)."""
    added = [n for n in tensors if n not in live]
    for name in added:
        path, _, leaf = name.rpartition(".")
        try:
            empty = model.get_submodule(path)._parameters.get(leaf, model) is None
        except AttributeError:
            empty = False
        if not empty:
            raise ConstraintError(
                "the saved weights have one that the model lacks",
                node=name,
                hint="build the model with the class and configuration that it had before pruning",
            )
    return added
