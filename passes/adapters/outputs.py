"""Adapters that act on what a layer gives rather than on its weight: bottlenecks, parallel adapters, prefixes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ...graph.errors import ConfigError, ConstraintError
from ...graph.fx.tensors import from_numpy
from .attach import MIXES, OUTPUTS, RECORDS, Box, reclass
from .factors import kron_apply
from .kinds import AdapterKind, kind_of
from .view import View

if TYPE_CHECKING:
    from .places import Place

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


class OutputAdapter(nn.Module):
    """h + s f(x W_down + b) W_up + b, x the layer's output (sequential) or its input (parallel), along ``axis``."""

    def __init__(
        self,
        kind: AdapterKind,
        options: Mapping[str, Any],
        view: View,
        tensors: Mapping[str, np.ndarray],
        dtype: torch.dtype,
        axis: int,
        shared: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        super().__init__()
        self.kind_name, self.options, self.view, self.axis = kind.name, dict(options), view, axis
        activation = options.get("activation", "relu")
        if activation not in ACTIVATIONS:
            raise ConfigError(
                "no such activation", node="activation", expected=", ".join(ACTIVATIONS), found=activation
            )
        for name, data in tensors.items():
            if shared and name in shared:
                self.register_parameter(name, shared[name])
            else:
                self.register_parameter(name, nn.Parameter(from_numpy(data).to(dtype)))

    @property
    def kind(self) -> AdapterKind:
        return kind_of(self.kind_name)

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        """Tensors that a checkpoint holds."""
        return dict(self.named_parameters(recurse=False))

    def forward(self, x: torch.Tensor, y: Any) -> Any:
        """The layer's output with the adapter's, given its input and output (of a tuple the first is adapted)."""
        if isinstance(y, tuple):
            return (self(x, y[0]), *y[1:])
        t = self.stored_tensors()
        read = y if self.kind.insertion == "sequential" else x
        moved = read.movedim(self.axis, -1).to(t["down_bias"].dtype)
        hidden = ACTIVATIONS[self.options["activation"]](self._project("down", moved, t) + t["down_bias"])
        added = self.options["scale"] * (self._project("up", hidden, t) + t["up_bias"])
        return y + added.movedim(-1, self.axis).to(y.dtype)

    def _project(self, which: str, x: torch.Tensor, t: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self.kind_name == "compacter":
            product: torch.Tensor = kron_apply(t["A"], t[f"{which}_left"] @ t[f"{which}_right"], x)
            return product
        return x @ t[which].T

    def extra_repr(self) -> str:
        return f"{self.kind_name}, axis={self.axis}"


def attach_output(
    place: Place,
    kind: AdapterKind,
    options: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    dtype: torch.dtype,
    shared: Mapping[str, nn.Parameter],
    name: str,
) -> tuple[str, OutputAdapter]:
    """Let the layer's forward pass through an adapter of this kind; (name of the submodule, adapter)."""
    if place.view.rows is not None:
        raise ConstraintError("an adapter of the output takes the whole output", node=place.name, found="rows")
    axis = 1 if place.view.geometry(tuple(getattr(place.layer, place.weight).shape)).kernel else -1
    made = OutputAdapter(kind, options, place.view, tensors, dtype, axis, shared)
    return _add(place.layer, OUTPUTS, f"output_{name}", made, place.weight), made


def _add(layer: nn.Module, what: str, key: str, module: nn.Module, weight: str) -> str:
    known: dict[str, str] = dict(layer.__dict__.get(what, {}))
    base, i = key, 1
    while key in known:
        i += 1
        key = f"{base}{i}"
    known[key] = weight
    layer.add_module(key, module)
    layer.__dict__[what] = known
    reclass(layer)
    return key


# ---- prefixes --------------------------------------------------------------------------------------------------------
OUT_NAMES = ("proj", "out_proj", "o_proj", "c_proj", "out_lin", "to_out", "o", "dense", "wo")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")


class PrefixAdapter(nn.Module):
    """(1 - l) h + l softmax(q P_k^T / sqrt(d)) P_v per head, on what the output projection reads; l is the gate."""

    def __init__(
        self, kind: AdapterKind, options: Mapping[str, Any], view: View, tensors: Mapping[str, np.ndarray], heads: int,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kind_name, self.options, self.view, self.heads = kind.name, dict(options), view, heads
        self.box = Box()
        for name, data in tensors.items():
            self.register_parameter(name, nn.Parameter(from_numpy(data).to(dtype)))

    @property
    def kind(self) -> AdapterKind:
        return kind_of(self.kind_name)

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        """Tensors that a checkpoint holds."""
        return dict(self.named_parameters(recurse=False))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """h: [..., length, width], the heads' outputs side by side."""
        query = self.box.take()
        q = query.unflatten(-1, (self.heads, -1)).transpose(-2, -3)
        t = self.stored_tensors()
        key = t["key"].unflatten(-1, (self.heads, -1)).transpose(-2, -3)
        value = t["value"].unflatten(-1, (self.heads, -1)).transpose(-2, -3)
        scores = torch.softmax(q @ key.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
        mixed = (scores @ value).transpose(-2, -3).flatten(-2)
        return h + t["gate"] * (mixed.reshape(h.shape) - h)


def attach_prefix(
    model: nn.Module,
    place: Place,
    kind: AdapterKind,
    options: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    dtype: torch.dtype,
    name: str,
) -> tuple[str, PrefixAdapter]:
    """Between the query projection (the target) and the output projection beside it.

    Raises:
        ConstraintError: there is no output projection of the query's width beside it, or the heads are unknown.
    """
    parent = model.get_submodule(place.path.rpartition(".")[0])
    width = place.view.geometry(tuple(getattr(place.layer, place.weight).shape)).out
    out = next((m for n in OUT_NAMES if isinstance(m := getattr(parent, n, None), nn.Module)), None)
    if isinstance(out, nn.Sequential):
        out = out[0]
    heads = options["heads"] or next((v for n in HEADS if isinstance(v := getattr(parent, n, None), int)), None)
    if out is None or heads is None or width % heads:
        raise ConstraintError(
            "a prefix needs the query projection of an attention with its output projection beside it",
            node=place.name,
            expected=f"one of {', '.join(OUT_NAMES)} and a number of heads that divides {width}",
            found=f"{type(parent).__name__}, heads={heads}",
            hint="target the query (for a fused projection 'qkv[0/3]'), and give options={'heads': n}",
        )
    made = PrefixAdapter(kind, options, place.view, tensors, int(heads), dtype)
    start, stop = place.view.rows or (0, width)
    place.layer.__dict__[RECORDS] = (*place.layer.__dict__.get(RECORDS, ()), (made.box, start, stop))
    reclass(place.layer)
    key = _add(out, MIXES, f"prefix_{name}", made, place.name)
    return key, made
