"""Writing an edited FXGraph back to the caller's nn.Module class, checked by execution; else a GraphModule."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import ConstraintError
from .functional import has_effect
from .layers import update_layers
from .modes import trainable_module
from .partial import culprit, replace_layers
from .patch import Patch, apply_patches, plan_patches
from .place import NotExpressible, place, simplify
from .replay import replays
from .run import interpret
from .shorten import dead_entries, renamed, shorten
from .tensors import storage_key
from .trace import copied_with, module_tensors, user_line

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
    reason = "the structure of the graph changed"
    try:
        twin = _restructured(graph, tensors)
    except NotExpressible as problem:
        reason = str(problem)
    else:
        check = _Check(graph)
        if graph.mode is None:
            same = replays(graph, twin, tensors)
            if same or same is None and _patched_replays(graph, twin, tensors):
                return twin
        failure = check(twin)
        if failure is not None and _forget_caches(graph, twin):
            failure = check(twin)
        if failure is None:
            return twin
        reason = failure
        plan = plan_patches(graph, twin)
        for choice in _choices(plan, _FEW_TRIALS if graph.mode is None else _MAX_TRIALS):
            undo = apply_patches(choice)
            failure = check(twin)
            if failure is None:
                return twin
            reason = failure
            apply_patches(undo)
        reason += _unpatched(graph)
        if dead := dead_entries(graph, twin):
            apply_patches([p for group in plan for p in group[0]])
            check.moved = shorten(twin, dead)
            if check(twin) is None:
                graph.notes.append(f"to_model took {', '.join(dead)} out of the containers that held them")
                return twin
            check.moved = {}
            twin = _restructured(graph, tensors)
            plan = plan_patches(graph, twin)
        if graph.mode is not None and _replaced(graph, twin, check, tensors, plan, reason):
            return twin
    if graph.mode is None:
        return _exported(graph, reason)
    graph.notes.append(f"to_model returned a GraphModule instead of {type(graph.source.module).__name__}: {reason}")
    return trainable_module(graph, tensors, _unused(graph))


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
    check: _Check,
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
    by_key = {storage_key(graph.originals[n]): tensors[n] for n in tensors if n in graph.originals}
    replace: dict[int, torch.Tensor] = {}
    fresh: dict[tuple[Any, ...], torch.Tensor] = {}
    for key, tensor in module_tensors(module).items():
        where = storage_key(tensor)
        new = by_key.get(where) if tensor.numel() else None
        if new is None:
            new = fresh.setdefault(where, _clone(tensor))
        if isinstance(tensor, nn.Parameter) != isinstance(new, nn.Parameter):
            new = (
                nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new.data
            )
        replace[key] = new
    try:
        twin = copied_with(module, replace)
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


class _Check:
    """Compares a module with the graph on the example inputs."""

    def __init__(self, graph: FXView) -> None:
        self.graph = graph
        self.generator = torch.Generator().manual_seed(0)
        self.moved: dict[str, str] = {}
        self.error: Exception | None = None

    @cached_property
    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example call, constant inputs made random."""
        small = _small(self.graph, self.graph.source.args, self.graph.source.kwargs)
        call: Any = pytree.tree_map_only(torch.Tensor, lambda t: _lively(t, self.generator), small)
        return call  # type: ignore[no-any-return]

    @cached_property
    def random(self) -> dict[str, torch.Tensor]:
        """Weights to run with instead of those that hold one value only."""
        return _randomized(self.graph, self.generator)

    @cached_property
    def expected(self) -> list[torch.Tensor]:
        """What the graph gives for them."""
        return interpret(self.graph, self.graph.bind_tensors(self.call), (), False, self.random)[0]

    def __call__(self, module: nn.Module) -> str | None:
        """None if the module agrees with the graph, else why not (``self.error`` holds what it raised)."""
        self.error = None
        flags = [(m, m.training) for m in module.modules()]
        state: dict[str, torch.Tensor] = {}
        for name, tensor in self.random.items():
            for alias in self.graph.weights[name].aliases:
                state[renamed(alias, self.moved)] = tensor
        names = {n for n, _ in module.named_parameters(remove_duplicate=False)}
        names |= {n for n, _ in module.named_buffers(remove_duplicate=False)}
        state = {k: v for k, v in state.items() if k in names}
        if any(has_effect(n) for n in self.graph.fx.nodes):  # the forward writes buffers: let it write copies
            state = {n: b.clone() for n, b in module.named_buffers()} | state
        for m, _ in flags:
            m.training = False
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                args, kwargs = self.call
                result = torch.func.functional_call(module, state, args, kwargs) if state else module(*args, **kwargs)
        except Exception as error:
            line, self.error = user_line(error), error
            return f"its forward fails ({str(error).strip().splitlines()[0][:160]}) at {_short(line)}"
        finally:
            for m, flag in flags:
                m.training = flag
        got = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        want = [t for t in self.expected if isinstance(t, torch.Tensor)]
        if len(got) != len(want):
            return "it returns another number of outputs"
        for a, b in zip(got, want, strict=True):
            if a.shape != b.shape:
                return f"an output has shape {tuple(a.shape)} instead of {tuple(b.shape)}"
            if not a.is_meta and not _agree(a, b):
                return "its forward computes something else"
        return None


def _short(line: str) -> str:
    head, sep, rest = line.partition(":")
    return "/".join(head.replace("\\", "/").split("/")[-2:]) + sep + rest


def _agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    if not a.is_floating_point():
        return bool(torch.equal(a, b))
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(a.dtype, 3e-2)
    x, y = a.double(), b.double()
    finite = torch.isfinite(y)
    if not torch.equal(torch.isfinite(x), finite):
        return False
    scale = float(y[finite].abs().max()) if bool(finite.any()) else 0.0
    return bool(torch.allclose(x[finite], y[finite], rtol=tolerance, atol=tolerance * scale + 1e-12))


def _small(graph: FXView, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The example call with a dynamic batch narrowed to two."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    holders = [n for n in graph.fx.nodes if n.op == "placeholder"]
    for i, (node, leaf) in enumerate(zip(holders, leaves, strict=True)):
        val = node.meta.get("val")
        if isinstance(leaf, torch.Tensor) and leaf.ndim and isinstance(val, torch.Tensor):
            if isinstance(val.shape[0], torch.SymInt) and leaf.shape[0] > 2:
                leaves[i] = leaf[:2]
    return pytree.tree_unflatten(leaves, spec)


def _lively(t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random values in place of a constant float example (torch.zeros tells nothing apart)."""
    if t.is_meta or not t.is_floating_point() or t.numel() < 2 or bool((t != t.flatten()[0]).any()):
        return t
    return torch.randn(t.shape, generator=generator).to(t)


def _randomized(graph: FXView, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random stand-ins for weights that hold one value only (zero biases, unit scales)."""
    found: dict[str, torch.Tensor] = {}
    for name, t in graph.tensors.items():
        if graph.kinds[name] == "constant" or t.is_meta or not t.is_floating_point() or t.numel() < 2:
            continue
        first = t.flatten()[:16]
        if not bool((first != first[0]).any()) and not bool((t != first[0]).any()):
            new = (torch.rand(t.shape, generator=generator) * 0.5 + 0.5).to(t)
            found[name] = nn.Parameter(new, requires_grad=False) if isinstance(t, nn.Parameter) else new
    return found


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
