"""Attaching adapters to an nn.Module: layers get a subclass whose weight is the adapted one; names and classes stay.

The stored parameter keeps its name and its object (``layer.weight``, frozen), so checkpoints of the base load as they
did; the adapter is a submodule of the layer (``layer.weight_adapter.A``). Reading ``layer.weight`` gives the adapted
weight, so every forward works that reads attributes, also one that never calls the layer (nn.MultiheadAttention reads
``out_proj.weight``). Tied parameters are adapted in every layer that holds them, by one shared submodule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ...graph.errors import ConstraintError
from ...graph.fx.tensors import from_numpy, to_numpy
from .adapter import Adapter, Entry, base_hash
from .kinds import AdapterKind, kind_of
from .view import View

SUFFIX = "_adapter"
ADAPTED = "_foldline_adapted"
"""Where a layer keeps {submodule: (weight, bias)}; below: {submodule: target weight}, and ((box, start, stop), ...)."""
OUTPUTS = "_foldline_outputs"
MIXES = "_foldline_mixes"
RECORDS = "_foldline_records"


class WeightAdapter(nn.Module):
    """The trained and fixed tensors of one adapter on one weight, and its formula.

    Args:
        kind: what it is; options: its options; view: how the layer stores the weight.
        tensors: start values by name, float64; stored in ``dtype``.
        dtype: of the tensors (float32 for a half precision base trains better; the result has the base's dtype).
        shape: of the stored weight.
        shared: parameters of another adapter that this one uses too, by tensor name.
    """

    def __init__(
        self,
        kind: AdapterKind,
        options: Mapping[str, Any],
        view: View,
        tensors: Mapping[str, np.ndarray],
        dtype: torch.dtype,
        shape: tuple[int, ...],
        shared: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        super().__init__()
        self.kind_name, self.options, self.view = kind.name, dict(options), view
        self.geometry = view.geometry(shape)
        for name, data in tensors.items():
            tensor = from_numpy(np.asarray(data, dtype=np.float64)).to(dtype)
            if shared and name in shared:
                self.register_parameter(name, shared[name])
            elif name in kind.fixed or name.endswith("_start"):
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor))
        for name, data in (kind.derived(self.geometry, options) if kind.derived else {}).items():
            self.register_buffer(name, torch.from_numpy(data).to(dtype), persistent=False)

    @property
    def kind(self) -> AdapterKind:
        return kind_of(self.kind_name)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name, those made from a seed too."""
        return {**dict(self.named_parameters(recurse=False)), **dict(self.named_buffers(recurse=False))}

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        """Tensors that a checkpoint holds."""
        left_out = self._non_persistent_buffers_set
        return {name: t for name, t in self.tensors().items() if name not in left_out}

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The adapted stored weight, in the dtype of ``weight``; half precision is computed in float32."""
        t, wide = self._wide(weight.dtype)
        new = self.kind.new_weight(self.view.canonical(weight).to(wide), t, self.geometry, self.options)
        return self.view.stored(new.to(weight.dtype), weight)

    def _wide(self, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], torch.dtype]:
        """The tensors in the widest dtype of theirs, the weight's and float32; and it."""
        found = self.tensors()
        wide = torch.float32
        for other in (dtype, *(t.dtype for t in found.values())):
            wide = torch.promote_types(wide, other)
        return {name: t.to(wide) for name, t in found.items()}, wide

    def bias(self, bias: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
        """The adapted bias; a layer without one starts from zeros."""
        if self.kind.bias is None:
            return bias
        if bias is None:
            bias = weight.new_zeros(self.view.rows_of(tuple(weight.shape)))
        t, wide = self._wide(bias.dtype)
        new = self.kind.bias(self.view.bias_rows(bias).to(wide), t, self.options)
        return self.view.stored_bias(new.to(bias.dtype), bias)

    def extra_repr(self) -> str:
        g = self.geometry
        return f"{self.kind_name}, out={g.out}, in={g.inp * g.groups}, kernel={g.kernel}"


# ---- layers whose attributes are adapted ----------------------------------------------------------------------------
def _attribute(name: str) -> property:
    def read(layer: Any) -> Any:
        stored = layer._parameters[name]
        for key, (weight, bias) in live(layer).items():
            if name == weight:
                stored = layer._modules[key](stored)
            elif name == bias:
                stored = layer._modules[key].bias(stored, layer._parameters[weight])
        return stored

    return property(read)


def live(layer: nn.Module) -> dict[str, tuple[str, str | None]]:
    """{submodule: (weight, bias)} of the layer's weight adapters; one that was folded away is an nn.Identity now."""
    known: dict[str, tuple[str, str | None]] = layer.__dict__.get(ADAPTED, {})
    return {key: names for key, names in known.items() if isinstance(layer._modules.get(key), WeightAdapter)}


class Box:
    """Holds one tensor between two layers of one forward pass; copies start empty."""

    def __init__(self) -> None:
        self._held: Any = None

    def put(self, tensor: Any) -> None:
        self._held = tensor

    def take(self) -> Any:
        held, self._held = self._held, None
        return held

    def __getstate__(self) -> dict[str, Any]:
        return {"_held": None}


def _forward(cls: type[nn.Module]) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        for key in self.__dict__.get(MIXES, ()):
            args = (self._modules[key](args[0]), *args[1:])
        y = cls.forward(self, *args, **kwargs)
        for key in self.__dict__.get(OUTPUTS, ()):
            y = self._modules[key](args[0] if args else None, y)
        for box, start, stop in self.__dict__.get(RECORDS, ()):
            box.put(y[..., start:stop])
        return y

    return forward


_classes: dict[tuple[type[nn.Module], tuple[str, ...], bool], type[nn.Module]] = {}


def adapted_class(cls: type[nn.Module], names: tuple[str, ...], wraps: bool = False) -> type[nn.Module]:
    """A subclass of ``cls`` whose parameters ``names`` read as adapted and whose forward is wrapped where asked.

    It has the name and module of ``cls`` and can be pickled and copied. Equal arguments give the same class.
    """
    if (cls, names, wraps) in _classes:
        return _classes[cls, names, wraps]

    def reduce(self: Any, protocol: Any) -> Any:
        return _rebuilt, (cls, names, wraps), dict(self.__dict__)

    body: dict[str, Any] = {name: _attribute(name) for name in names}
    body.update(__reduce_ex__=reduce, __module__=cls.__module__, __doc__=cls.__doc__, _foldline_base=cls)
    if wraps:
        body["forward"] = _forward(cls)
    if issubclass(cls, nn.RNNBase):  # reads its weights from a list made beforehand
        body["_flat_weights"] = property(_flat_weights, _ignored)
    made = _classes[cls, names, wraps] = type(cls.__name__, (cls,), body)
    return made


def _flat_weights(layer: Any) -> list[Any]:
    return [getattr(layer, name) for name in layer._flat_weights_names]


def _ignored(layer: Any, value: Any) -> None:
    """The list is made anew at every reading."""


def _rebuilt(cls: type[nn.Module], names: tuple[str, ...], wraps: bool) -> nn.Module:
    made = adapted_class(cls, names, wraps)
    return made.__new__(made)


def base_class(layer: nn.Module) -> type[nn.Module]:
    """The class of a layer without adapters."""
    return getattr(type(layer), "_foldline_base", type(layer))


def attach(layer: nn.Module, weight: str, bias: str | None, adapter: WeightAdapter, name: str = "adapter") -> str:
    """Let ``layer``'s parameter ``weight`` (and ``bias``) read as adapted; returns the name of the submodule.

    A second adapter on one weight applies to what the first gives.
    """
    adapted: dict[str, tuple[str, str | None]] = dict(layer.__dict__.get(ADAPTED, {}))
    key, i = f"{weight}_{name}", 1
    while key in adapted:
        i += 1
        key = f"{weight}_{name}{i}"
    adapted[key] = (weight, bias)
    layer.add_module(key, adapter)
    layer.__dict__[ADAPTED] = adapted
    reclass(layer)
    return key


def reclass(layer: nn.Module) -> None:
    """Give a layer the class that its adapters need."""
    names: set[str] = set()
    for key, (weight, bias) in live(layer).items():
        names.add(weight)
        if bias is not None and layer._modules[key].kind.bias is not None:  # type: ignore[union-attr]
            names.add(bias)
    wraps = any(layer.__dict__.get(what) for what in (OUTPUTS, MIXES, RECORDS))
    cls = base_class(layer)
    layer.__class__ = adapted_class(cls, tuple(sorted(names)), wraps) if names or wraps else cls


def detach(layer: nn.Module) -> None:
    """Take all weight adapters off a layer; its stored parameters are as they are."""
    for key in layer.__dict__.pop(ADAPTED, {}):
        del layer._modules[key]
    reclass(layer)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, tuple[str, str | None]]]]:
    """(path, layer, {submodule: (weight, bias)}) of every layer with weight adapters."""
    for path, layer in model.named_modules():
        if adapted := live(layer):
            yield path, layer, adapted


def weight_adapters(model: nn.Module) -> dict[str, WeightAdapter]:
    """Every weight adapter by its path in the model; one that tied weights share is there once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, WeightAdapter)}


def adapter_of(model: nn.Module) -> Adapter:
    """The adapters of a model as data, with the hashes of the base weights they were trained on.

    Raises:
        ConstraintError: the model has none.
    """
    entries: list[Entry] = []
    seen: set[int] = set()
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    arrays: dict[int, np.ndarray] = {}
    for path, layer in model.named_modules():
        adapted = live(layer)
        others = {**layer.__dict__.get(OUTPUTS, {}), **layer.__dict__.get(MIXES, {})}
        for key, (weight, bias) in {**adapted, **{k: (w, None) for k, w in others.items()}}.items():
            module = layer._modules[key]
            if id(module) not in seen:
                seen.add(id(module))
                made = _entry(path, layer, weight, bias, module, arrays)
                made.aliases = tuple(names.get(id(layer._parameters.get(weight)), ()))
                entries.append(made)
    if not entries:
        raise ConstraintError(
            "the model has no adapters", found=type(model).__name__, hint="P.insert_adapter adds them"
        )
    return Adapter(entries)


def _entry(
    path: str, layer: nn.Module, weight: str, bias: str | None, module: Any, arrays: dict[int, np.ndarray]
) -> Entry:
    prefix = f"{path}." if path else ""
    tensors = {}
    for name, t in module.stored_tensors().items():
        if id(t) not in arrays:  # one array for a tensor that several adapters share
            arrays[id(t)] = to_numpy(t).copy()
        tensors[name] = arrays[id(t)]
    stored = layer._parameters.get(weight)
    if stored is None:  # a prefix: its target is the query projection
        return Entry(weight, module.kind_name, tensors, dict(module.options), module.view)
    has_bias = bias is not None and module.kind.bias is not None
    offset = layer._parameters.get(bias) if has_bias and bias is not None else None
    base = base_hash(to_numpy(stored), None if offset is None else to_numpy(offset))
    named = prefix + bias if has_bias and bias is not None else None
    return Entry(prefix + weight, module.kind_name, tensors, dict(module.options), module.view, named, base)
