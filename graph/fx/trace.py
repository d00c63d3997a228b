"""Capture of an nn.Module with torch.export: eval mode on a structural copy, dynamic batch, errors with a line."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from ..errors import TraceError
from .copies import structural_copy
from .quiet import quiet_torch
from .tensors import StorageKeys
from .walk import modules_of

_TORCH_DIR = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


@dataclass
class Capture:
    """What tracing gave: the exported program and what is needed to write results back.

    Attributes:
        program: the exported program (parameters are the caller's own tensors, never copied); None if recorded.
        module: the caller's module, or None when an ExportedProgram came in.
        args, kwargs: the caller's example call.
        training: ``training`` flag per module path, as the caller had it.
        sizes: example size of each symbol, by printed name.
        notes: what the user should know.
        keys: which of the module's tensors share their data.
        as_run: whether a call was recorded as the module's user makes it, who is not told that it is traced.
    """

    program: ExportedProgram | None
    module: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    training: dict[str, bool] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    keys: StorageKeys = field(default_factory=StorageKeys)
    as_run: bool = False

    @cached_property
    def unsaved(self) -> frozenset[str]:
        """Names of the buffers that the module's state dict leaves out."""
        modules = [] if self.module is None else modules_of(self.module, repeated=True)
        return frozenset(f"{path}.{n}".lstrip(".") for path, m in modules for n in m._non_persistent_buffers_set)


def normalize_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of a call given as tensor, tuple or list, dict of keywords, or (tuple, dict)."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if (
        isinstance(example, tuple)
        and len(example) == 2
        and isinstance(example[0], (tuple, list))
        and isinstance(example[1], dict)
        and all(isinstance(k, str) for k in example[1])
    ):
        return tuple(example[0]), dict(example[1])
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    return (example,), {}


@lru_cache(maxsize=256)
def _positional(function: Any) -> list[str]:
    """Names of the arguments that may be given by position."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def leaf_names(found: Capture) -> list[str]:
    """One name per leaf of the call: the argument's, numbered where it is a container."""
    assert found.module is not None
    own = getattr(found.module.forward, "__func__", None)
    parameters = _positional(found.module.forward) if own is None else _positional(own)[1:]
    names = [parameters[i] if i < len(parameters) else f"arg_{i}" for i in range(len(found.args))]
    out: list[str] = []
    for name, item in [*zip(names, found.args, strict=True), *found.kwargs.items()]:
        count = len(pytree.tree_leaves(item))
        plain = isinstance(item, torch.Tensor) or count == 1
        out += [name] if plain else [f"{name}_{k}" for k in range(count)]
    return out


class _EvalView:
    """Context: ``model`` in eval mode with the flags restored afterwards, for modules that deepcopy refuses."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> nn.Module:
        self.flags = [(m, m.training) for m in self.model.modules()]
        for m, _ in self.flags:
            m.training = False
        return self.model

    def __exit__(self, *exc: object) -> None:
        for m, flag in self.flags:
            m.training = flag


def user_line(error: BaseException) -> str:
    """The innermost frame of the user's own code in an exception chain, as ``file:line in function: code``."""
    best = ""
    seen: BaseException | None = error
    while seen is not None:
        for frame in traceback.extract_tb(seen.__traceback__):
            name = os.path.abspath(frame.filename)
            if not name.startswith((_TORCH_DIR, _HERE)) and not frame.filename.startswith("<"):
                best = f"{frame.filename}:{frame.lineno} in {frame.name}: {(frame.line or '').strip()}"
        seen = seen.__cause__ or seen.__context__
    return best


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    with quiet_torch():
        try:
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as first:
            try:
                return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=True)
            except Exception:
                raise first from None


def _run_eagerly(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise TraceError if the model's own forward fails on the example inputs: then tracing is not to blame."""
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        shapes = [tuple(x.shape) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        raise TraceError(
            f"the model fails on the example inputs: {_first_line(error)}",
            node=user_line(error) or type(model).__name__,
            found=f"example tensors of shape {', '.join(map(str, shapes))}",
            hint="pass example inputs that model(*example_inputs) accepts",
        ) from error


def _batch_leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | None, list[torch.Tensor]]:
    """The shared size of dim 0 and the input tensors that have it (the first tensor input decides)."""
    leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim > 0]
    if not leaves:
        return None, []
    size = int(leaves[0].shape[0])
    return size, [x for x in leaves if x.shape[0] == size]


def _auto_batch(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], notes: list[str]
) -> tuple[ExportedProgram, bool] | None:
    """Export with dim 0 of batch-like inputs dynamic; (program, example was doubled), or None if it must be static."""
    size, leaves = _batch_leaves(args, kwargs)
    if size is None or size == 0:
        return None
    doubled = size == 1
    if doubled:  # torch.export specialises sizes 0 and 1
        twice = {id(x): torch.cat([x, x]) for x in leaves}
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda x: twice.get(id(x), x), (args, kwargs))
        leaves = list(twice.values())
    collection = ShapesCollection()
    for x in leaves:
        collection[x] = {0: Dim.AUTO}
    try:
        program = _export(model, args, kwargs, collection)
    except Exception as error:
        notes.append(f"batch size is fixed: tracing with a dynamic one failed ({_first_line(error)})")
        return None
    dynamic = [_is_dynamic(program, i) for i, x in enumerate(_flat(args, kwargs)) if any(x is y for y in leaves)]
    if not all(dynamic):
        notes.append(f"batch size is fixed at {size}: the model computes with it as a constant")
        if doubled or any(dynamic):
            return None
    return program, doubled


def _flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    return list(pytree.tree_leaves((args, kwargs)))


def _user_values(program: ExportedProgram) -> list[Any]:
    by_name = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    names = [s.arg.name for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"]
    return [by_name[n].meta.get("val") if n in by_name else None for n in names]


def _is_dynamic(program: ExportedProgram, position: int) -> bool:
    values = _user_values(program)
    value = values[position] if position < len(values) else None
    return isinstance(value, torch.Tensor) and isinstance(value.shape[0], torch.SymInt)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


def _symbol_sizes(program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for value, example in zip(_user_values(program), _flat(args, kwargs), strict=False):
        if isinstance(value, torch.Tensor) and isinstance(example, torch.Tensor):
            for dim, size in zip(value.shape, example.shape, strict=False):
                if isinstance(dim, torch.SymInt) and dim.node.expr.is_symbol:
                    sizes.setdefault(str(dim.node.expr), int(size))
    return sizes


def _unwrapped(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The module inside torch.compile or data-parallel wrappers, and a note where there was one."""
    notes: list[str] = []
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(
        inner := model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None), nn.Module
    ):
        notes.append(f"{type(model).__name__} was unwrapped; wrap the result again")
        model = inner
    return model, notes


def describe(model: nn.Module, example_inputs: Any) -> Capture:
    """What is known before anything runs: the bare module, its flags and the example call."""
    model, notes = _unwrapped(model)
    args, kwargs = normalize_call(example_inputs)
    modules = modules_of(model, repeated=True)
    if any([t is not None and t.is_meta for _, m in modules for t in (*m._parameters.values(), *m._buffers.values())]):
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
    training = {name: m.training for name, m in modules}
    return Capture(None, model, args, kwargs, training, notes=notes)


def capture(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
) -> Capture:
    """Export ``model`` in eval mode; the caller's module is left exactly as it was.

    Raises TraceError (with the line of the user's model) if neither non-strict nor strict export succeeds.
    """
    if isinstance(model, ExportedProgram):
        if example_inputs is None:
            args, kwargs = model.example_inputs or ((), {})
        else:
            args, kwargs = normalize_call(example_inputs)
        return Capture(model, None, tuple(args), dict(kwargs), sizes=_symbol_sizes(model, tuple(args), dict(kwargs)))
    if example_inputs is None:
        raise TraceError(
            "an nn.Module needs example inputs to be traced",
            expected="a tensor, a tuple of arguments, a dict of keyword arguments, or (tuple, dict)",
            hint="call fl.load(model, example_inputs)",
        )
    known = describe(model, example_inputs)
    bare, args, kwargs, notes = known.module, known.args, known.kwargs, known.notes
    assert bare is not None
    try:
        twin: nn.Module | None = structural_copy(bare)
    except Exception:
        twin = None  # a module that cannot be copied is traced in place, its flags restored
    with _EvalView(bare if twin is None else twin) as traced:
        try:
            found = None
            if dynamic_shapes is None and dynamic_batch:
                found = _auto_batch(traced, args, kwargs, notes)
            program = found[0] if found else _export(traced, args, kwargs, dynamic_shapes)
        except Exception as error:
            _run_eagerly(traced, args, kwargs)
            raise TraceError(
                f"the model cannot be traced: {_first_line(error)}",
                node=user_line(error) or type(bare).__name__,
                found=type(error).__name__,
                hint="avoid Python control flow on tensor values, .item() and in-forward mutation on that line "
                "(torch.cond, torch.where), or export the model yourself and pass the ExportedProgram",
            ) from error
    known.program, known.sizes = program, _symbol_sizes(program, args, kwargs)
    return known
