"""Writing an edited FXGraph back to the caller's nn.Module class, checked by execution; else a GraphModule."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..errors import ConstraintError
from .check import Check
from .copies import copied_with
from .hf_config import foresee, update_configs
from .layers import update_layers
from .modes import trainable_module
from .partial import culprit, replace_layers
from .patch import Patch, apply_patches, plan_patches
from .place import NotExpressible, place, simplify
from .replay import replays
from .shorten import dead_entries, shorten
from .tensors import storage_key

if TYPE_CHECKING:
    from .view import FXView

_MAX_TRIALS = 48
_FEW_TRIALS = 8
"""For a recorded call: what they do not reach, the exported graph is tried on anew, and in full."""
_MAX_REPLACEMENTS = 4


def write_back(graph: FXView) -> nn.Module:
    """The edited model: a copy of the caller's module where its class can express the edits, else a GraphModule.

    The result shares no tensor with the caller's model. Every candidate is compared with the graph on the example
    inputs (weights that are constant, such as zero-initialised scales, replaced by random ones, so that nothing hides
    behind a zero); the first one that agrees is returned.
    """
    tensors = _owned_tensors(graph)
    if graph.source.module is None:
        return trainable_module(graph, tensors, {})
    model, ready = _written(graph, tensors)
    return model if ready else update_configs(graph, model)


def _written(graph: FXView, tensors: dict[str, torch.Tensor]) -> tuple[nn.Module, bool]:
    """:func:`write_back`, and whether configurations are up to date."""
    reason = "the structure of the graph changed"
    try:
        twin = _restructured(graph, tensors)
    except NotExpressible as problem:
        reason = str(problem)
    else:
        check = Check(graph)
        if graph.mode is None:
            foreseen = foresee(graph, twin)
            same = replays(graph, twin, tensors)
            if foreseen is not None and (same or check(twin) is None):
                graph.notes += [note for note in foreseen.notes if note not in graph.notes]
                return twin, True
            if foreseen is not None:
                foreseen.back()
                same = replays(graph, twin, tensors)
            if same or same is None and _patched_replays(graph, twin, tensors):
                return twin, False
        failure = check(twin)
        if failure is not None and _forget_caches(graph, twin):
            failure = check(twin)
        if failure is None:
            return twin, False
        reason = failure
        plan = plan_patches(graph, twin)
        for choice in _choices(plan, _FEW_TRIALS if graph.mode is None else _MAX_TRIALS):
            undo = apply_patches(choice)
            failure = check(twin)
            if failure is None:
                return twin, False
            reason = failure
            apply_patches(undo)
        reason += _unpatched(graph)
        if dead := dead_entries(graph, twin):
            apply_patches([p for group in plan for p in group[0]])
            check.moved = shorten(twin, dead)
            if check(twin) is None:
                graph.notes.append(f"to_model took {', '.join(dead)} out of the containers that held them")
                return twin, False
            check.moved = {}
            twin = _restructured(graph, tensors)
            plan = plan_patches(graph, twin)
        if graph.mode is not None and _replaced(graph, twin, check, tensors, plan, reason):
            return twin, False
    if graph.mode is None:
        return _exported(graph, reason), False
    graph.notes.append(f"to_model returned a GraphModule instead of {type(graph.source.module).__name__}: {reason}")
    return trainable_module(graph, tensors, _unused(graph)), False


def _patched_replays(graph: FXView, twin: nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    """Does ``twin`` make the recorded calls once the sizes that its code holds are patched? Else it stays as it is."""
    if not (plan := plan_patches(graph, twin)):
        return False
    undo = apply_patches([p for group in plan for p in group[0]])
    if replays(graph, twin, tensors):
        return True
    apply_patches(undo)
    return False


def _exported(graph: FXView, reason: str) -> nn.Module:
    """The same selection on a full capture, for a class that cannot express it: a recorded call is no program."""
    from ..actions import apply_plan
    from ..plans import Plan
    from . import load_torch

    moved = next((n for n, axes in graph.kept.items() if any((np.diff(k) <= 0).any() for k in axes.values())), "")
    if graph.rewritten or moved:
        raise ConstraintError(
            "the graph of a recorded call can only be written back to its own class",
            node=graph.rewritten or moved,
            found=reason,
            hint="load the model without static=True",
        )
    weights = {n: {a: k.tolist() for a, k in axes.items()} for n, axes in graph.kept.items()}
    full = load_torch(graph.source.module, (graph.source.args, graph.source.kwargs))  # type: ignore[arg-type]
    known = {a for w in full.weights.values() for a in w.aliases}
    weights = {n: axes for n, axes in weights.items() if n in known}  # what a cache stands for there is not read
    plan = Plan(weights, {n: list(graph.originals[n].shape) for n in weights})
    model: nn.Module = apply_plan(full, plan).to_model()
    graph.notes += [n for n in full.notes if n not in graph.notes]
    return model


def _forget_caches(graph: FXView, twin: nn.Module) -> bool:
    """Drop tensors that modules keep in plain dicts and the graph never read (results by device); was there one?"""
    read = {storage_key(t) for t in graph.originals.values()} | {storage_key(t) for t in graph.tensors.values()}
    found = False
    for m in twin.modules():
        for name, cache in vars(m).items():
            if type(cache) is not dict or name.startswith("_"):
                continue
            for key in [k for k, v in cache.items() if isinstance(v, torch.Tensor) and storage_key(v) not in read]:
                del cache[key]
                found = True
    return found


def _replaced(
    graph: FXView,
    twin: nn.Module,
    check: Check,
    tensors: dict[str, torch.Tensor],
    plan: list[list[list[Patch]]],
    reason: str,
) -> bool:
    """Try to keep the root class by replacing the layers whose own forward cannot be expressed."""
    apply_patches([p for group in plan for p in group[0]])
    done: list[str] = []
    for _ in range(_MAX_REPLACEMENTS):
        failure = check(twin)
        if failure is None:
            graph.notes.append(f"to_model turned {', '.join(done)} into GraphModules: {reason}")
            return True
        path = culprit(check.error, twin) if check.error is not None else None
        if not path or path in done:
            return False
        try:
            done += (made := replace_layers(graph, twin, path, check.call, tensors))
        except Exception:  # user code runs here, on recorded arguments; whatever it raises, the whole graph remains
            return False
        if not made:
            return False
    return False


def _owned_tensors(graph: FXView) -> dict[str, torch.Tensor]:
    """Tensors for the result: unchanged ones cloned, changed ones handed over (once; cloned in later calls)."""
    owned: dict[str, torch.Tensor] = {}
    for name, tensor in graph.tensors.items():
        if name in graph.changed and name not in graph.given:
            graph.given.add(name)
            owned[name] = tensor
        else:
            owned[name] = _clone(tensor)
    return owned


def _clone(t: torch.Tensor) -> torch.Tensor:
    copy = t.detach().clone()
    return nn.Parameter(copy, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else copy


def _unused(graph: FXView) -> dict[str, torch.Tensor]:
    """Copies of the state-dict entries that the graph never used, except in layers whose weights were folded away."""
    live = {a for w in graph.weights.values() for a in w.aliases}
    gone = {n.rpartition(".")[0] for n in graph.loaded_names - live}
    kept = {n.rpartition(".")[0] for n in live}
    copies: dict[int, torch.Tensor] = {}
    found: dict[str, torch.Tensor] = {}
    for name, tensor in graph.state_tensors():
        path = name.rpartition(".")[0]
        if name not in live and name not in graph.loaded_names and (path not in gone or path in kept):
            found[name] = copies.setdefault(id(tensor), _clone(tensor))
    return found


def _restructured(graph: FXView, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Copy of the caller's module with the graph's tensors, new biases, identities for removed layers, new sizes."""
    module = graph.source.module
    assert module is not None
    keys = graph.source.keys
    by_key = {keys[graph.originals[n]]: tensors[n] for n in tensors if n in graph.originals}
    fresh: dict[tuple[Any, ...], torch.Tensor] = {}

    def give(tensor: torch.Tensor) -> torch.Tensor:
        where = keys[tensor]
        new = by_key.get(where) if tensor.numel() else None
        if new is None:
            new = fresh.setdefault(where, _clone(tensor))
        if isinstance(tensor, nn.Parameter) != isinstance(new, nn.Parameter):
            new = (
                nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new.data
            )
        return new

    try:
        twin = copied_with(module, give)
    except Exception as error:  # copying runs user code (__deepcopy__, __setstate__)
        raise NotExpressible(f"the module cannot be copied ({error})") from error
    added = [n for n in graph.weights if n not in graph.originals]
    for name in added:
        place(graph, twin, name, tensors[name])
    simplify(graph, twin)
    _remove_layers(graph, twin)
    update_layers(graph, twin)
    return twin


def _remove_layers(graph: FXView, twin: nn.Module) -> None:
    """Replace modules all of whose calls were erased by nn.Identity (or by what is left of their children)."""
    live = {n.name for n in graph.nodes}
    own: dict[str, list[bool]] = {}
    for name, record in graph.pristine.items():
        own.setdefault(record.scope, []).append(name in live)
    inserted = {n.scope for n in graph.nodes if n.name not in graph.pristine}
    for path in sorted((p for p, flags in own.items() if p and not any(flags)), key=len, reverse=True):
        if path in inserted:
            continue
        parent_path, _, leaf = path.rpartition(".")
        try:
            parent, module = twin.get_submodule(parent_path), twin.get_submodule(path)
        except AttributeError:
            continue
        busy = [
            k for k in module._modules if any(s == f"{path}.{k}" or s.startswith(f"{path}.{k}.") for s in _live(own))
        ]
        rest = {k: v for k, v in module.named_children() if k in busy}
        setattr(parent, leaf, nn.Sequential(_ordered(rest)) if rest else nn.Identity())
        getattr(parent, leaf).train(module.training)


def _live(own: dict[str, list[bool]]) -> list[str]:
    return [s for s, flags in own.items() if any(flags)]


def _ordered(items: dict[str, nn.Module]) -> Any:
    from collections import OrderedDict

    return OrderedDict(items)


def _choices(plan: list[list[list[Patch]]], most: int) -> Iterator[list[Patch]]:
    """Sets of patches to try: the first alternative of every group, then sets that differ from it in few groups."""
    tried = 0
    for count in range(min(len(plan), 3) + 1):
        for places in itertools.combinations(range(len(plan)), count):
            for picks in itertools.product(*(range(1, len(plan[p])) for p in places)):
                if tried == most:
                    return
                index = dict(zip(places, picks, strict=True))
                yield [p for g, group in enumerate(plan) for p in group[index.get(g, 0)]]
                tried += 1


def _unpatched(graph: FXView) -> str:
    """Names the first baked size that changed, with its line."""
    for node in graph.nodes:
        record = graph.pristine.get(node.name)
        if record is None:
            continue
        for key, old in record.attrs.items():
            if key in ("shape", "sizes", "groups", "ends", "starts", "repeats") and node.attrs.get(key) != old:
                return f"; {key} {old} -> {node.attrs.get(key)} of {node.name} ({node.location or node.scope})"
    return ""
