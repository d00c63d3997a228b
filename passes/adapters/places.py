"""Where adapters go in an nn.Module: layers by name pattern, how each stores its weight, and who shares it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...graph.errors import ConfigError
from ..base import nearest
from .patterns import matches, rows_of, split_part
from .view import View

NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


@dataclass(frozen=True)
class Place:
    """One weight that an adapter goes on.

    Attributes:
        path: of the layer that holds it; weight, bias: names of its parameters (bias None: it can have none).
        view: how it is stored; name: of the weight in the model.
        holders: every (layer, weight name) that holds the same parameter, this one first.
        options: of the adapter, from the pattern that chose it.
    """

    path: str
    layer: nn.Module
    weight: str
    bias: str | None
    view: View
    options: Mapping[str, Any]
    holders: tuple[tuple[nn.Module, str], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.path}.{self.weight}" if self.path else self.weight


def stored_weights(layer: nn.Module) -> Iterator[tuple[str, str | None, View]]:
    """(weight, bias, view) of every weight of a known layer; all parameters of two axes or more of an unknown one."""
    own = layer._parameters
    if isinstance(layer, nn.MultiheadAttention):
        if own.get("in_proj_weight") is not None:
            yield "in_proj_weight", "in_proj_bias", View()
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if own.get(name) is not None:
                yield name, None, View()
        return
    if isinstance(layer, CONVOLUTIONS):
        yield "weight", "bias", View(isinstance(layer, TRANSPOSED), layer.groups)
    elif isinstance(layer, nn.Embedding):
        yield "weight", None, View(transposed=True)
    elif isinstance(layer, NORMS) or isinstance(layer, nn.Linear):
        if own.get("weight") is not None:
            yield "weight", "bias", View()
    elif is_conv1d(layer):
        yield "weight", "bias", View(transposed=True)
    elif isinstance(layer, nn.RNNBase):
        for name in own:
            if name.startswith("weight"):
                bias = name.replace("weight", "bias", 1)
                yield name, bias if bias in own else None, View()
    else:
        for name, p in own.items():
            if p is not None and (p.ndim >= 2 or name == "weight"):
                yield name, "bias" if name == "weight" and own.get("bias") is not None else None, View()


def is_conv1d(layer: nn.Module) -> bool:
    """GPT-2's linear layer with a weight of [in, out]."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") and "weight" in layer._parameters


def by_default(layer: nn.Module) -> bool:
    """Layers that adapters go on where no targets are named: linear ones and convolutions."""
    return isinstance(layer, (nn.Linear, nn.MultiheadAttention, *CONVOLUTIONS)) or is_conv1d(layer)


Targets = Sequence[str] | Mapping[str, Mapping[str, Any]] | None


def find_places(
    model: nn.Module,
    targets: Targets,
    exclude: Sequence[str] = (),
    default: Callable[[nn.Module], bool] = by_default,
    only: Callable[[nn.Module], bool] = lambda layer: True,
) -> list[Place]:
    """The weights that the patterns choose, in the model's order; one of several names for tied weights.

    Args:
        targets: patterns, or {pattern: options}. A pattern is the name of a layer, weight or module around it, or a
            part of the name between dots (``"q_proj"``, ``"attn.qkv"``, ``"blocks.3"``), or a glob over the whole
            name; ``[a:b]`` or ``[i/n]`` behind it chooses outputs. None: every layer that ``default`` takes.
        exclude: patterns of what is left out.

    Raises:
        ConfigError: a pattern chooses nothing.
    """
    wanted: dict[str, Mapping[str, Any]] = (
        dict(targets) if isinstance(targets, Mapping) else {t: {} for t in (targets or ())}
    )
    holders = _holders(model)
    used: set[str] = set()
    places: list[Place] = []
    taken: set[tuple[int, str]] = set()
    for path, layer in model.named_modules():
        if path.endswith("_adapter") or not layer._parameters or not only(layer):
            continue
        for weight, bias, view in stored_weights(layer):
            parameter = layer._parameters[weight]
            name = f"{path}.{weight}" if path else weight
            if parameter is None or any(matches(e, path, name) for e in exclude):
                continue
            chosen: Iterable[tuple[str, Mapping[str, Any]]] = wanted.items()
            if targets is None:
                chosen = [("", {})] if default(layer) else []
            for pattern, options in chosen:
                stem, part = split_part(pattern)
                if pattern and not matches(stem, path, name):
                    continue
                used.add(pattern)
                rows = None if part is None else rows_of(part, view.rows_of(tuple(parameter.shape)), name)
                key = (id(parameter), f"{rows}")
                if key in taken:
                    continue
                taken.add(key)
                chosen_view = View(view.transposed, view.groups, rows)
                places.append(Place(path, layer, weight, bias, chosen_view, options, holders[id(parameter)]))
    missing = [p for p in wanted if p not in used]
    if missing or not places:
        names = [n for n, m in model.named_modules() if n and by_default(m)]
        close = nearest(missing[0], names) if missing else None
        raise ConfigError(
            "a target pattern chooses no weight" if missing else "there is no weight for an adapter",
            node=missing[0] if missing else "targets",
            expected=f"layers such as {', '.join(names[:6])}",
            found="nothing",
            hint=f"did you mean {close!r}?" if close else None,
        )
    return places


def _holders(model: nn.Module) -> dict[int, tuple[tuple[nn.Module, str], ...]]:
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for layer in model.modules():
        for name, p in layer._parameters.items():
            if p is not None:
                found.setdefault(id(p), []).append((layer, name))
    return {key: tuple(items) for key, items in found.items()}
