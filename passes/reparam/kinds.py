"""Reparam: one way to compute a weight from other tensors, how it starts from a given weight, and the registry of all.

A reparameterization is a ``torch.nn.utils.parametrize`` parametrization: its ``forward`` computes the weight from the
trained tensor, its ``right_inverse`` the trained tensor from a weight. Exported or captured, it is a subgraph whose
leaves are parameters and constants, which :class:`~foldline.passes.reparam.materialise.Materialise` evaluates.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...graph.errors import ConfigError, ConstraintError
from ..base import nearest

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class Start:
    """What a reparameterization starts from.

    Attributes:
        weight: the stored tensor; axis: its output axis; name: of the weight in the model.
        options: the kind's options, defaults filled in.
        rng: numpy's Philox stream of the seed and the name.
        seed: of the run, for what is made anew from it later.
    """

    weight: Tensor
    axis: int
    name: str
    options: Mapping[str, Any]
    rng: np.random.Generator
    seed: int


@dataclass(frozen=True)
class Reparam:
    """One kind.

    Attributes:
        name: how options and errors call it; paper: title of its source.
        make: parametrizations for a weight, in the order in which they are registered, and facts for the report.
        exact: whether the weight is the same (to rounding) right after insertion, under the given options.
        defaults: options and their defaults; nothing else is accepted.
    """

    name: str
    paper: str
    make: Callable[[Start], tuple[list[nn.Module], dict[str, Any]]]
    exact: Callable[[Mapping[str, Any]], bool] = lambda options: True
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The given options with the defaults filled in.

        Raises:
            ConfigError: an unknown option (naming the nearest one).
        """
        for key in given:
            if key not in self.defaults:
                close = nearest(key, list(self.defaults))
                raise ConfigError(
                    f"the reparameterization {self.name!r} has no option {key!r}", node=key,
                    expected=", ".join(self.defaults) or "no options", found=key,
                    hint=f"did you mean {close!r}?" if close else None,
                )  # fmt: skip
        return {**self.defaults, **given}


_KINDS: dict[str, Reparam] = {}
_HOMES = ("norms", "elementwise", "sharing", "subspace")


def register(kind: Reparam) -> Reparam:
    """Make a kind known by its name."""
    _KINDS[kind.name] = kind
    return kind


def kinds() -> dict[str, Reparam]:
    """All kinds by name."""
    for home in _HOMES:
        importlib.import_module(f".{home}", __package__)
    return dict(_KINDS)


def kind_of(name: str) -> Reparam:
    """The kind of that name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    known = kinds()
    if name not in known:
        close = nearest(name, known)
        raise ConfigError(
            f"there is no reparameterization {name!r}", node="kind", expected=", ".join(known), found=name,
            hint=f"did you mean {close!r}?" if close else None,
        )  # fmt: skip
    return known[name]


def out_of_range(start: Start, expected: str, found: Any, hint: str) -> ConstraintError:
    """The error for a weight that a reparameterization cannot produce."""
    return ConstraintError(
        "the weight cannot be written in this form", node=start.name, expected=expected, found=found, hint=hint
    )
