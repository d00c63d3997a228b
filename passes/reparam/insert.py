"""Reparametrize: write chosen weights of a module as functions of other tensors, for training."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from ...graph.errors import ConstraintError
from ...graph.ir import Graph
from ..base import Context, Contract, Decision, Outcome, Pass
from .kinds import Reparam, Start, kind_of

if TYPE_CHECKING:
    from torch import nn


class Reparametrize(Pass):
    """Write weights of an ``nn.Module`` in another form, as torch's parametrizations; ``Materialise`` undoes it.

    Kinds: weight_norm, spectral_norm (inserted with the factor that keeps the function, unless ``keep: false``),
    row_equilibration (P W with P^-1 behind it, unless ``keep: false``), compander, scaled_ws (removes the mean of each
    output's weights), random_subspace (all chosen weights share one trained vector), hash_share.
    Exact where the kind is (see the kind's options), else the function is new.

    Raises:
        ConfigError: an unknown kind, option or pattern; the nearest is named.
        ConstraintError: a weight that the form cannot express (out of a compander's range, a row of zeros).
    """

    name: ClassVar[str] = "reparametrize"
    contract: ClassVar[Contract] = Contract.EXACT
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    kind: str
    """Name of the reparameterization."""
    targets: list[str] | None = None
    """Patterns of layers or weights; every linear layer and convolution if None."""
    exclude: list[str] = Field(default_factory=list)
    """Patterns of what is left out."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the kind."""

    def promise(self) -> Contract:
        kind = kind_of(self.kind)
        return Contract.EXACT if kind.exact(kind.options(self.options)) else Contract.FRESH

    def prepare(self, ctx: Context) -> None:
        """The kind and its options exist."""
        kind_of(self.kind).options(self.options)

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        from ..adapters.insert import graph_of, module_of
        from ..adapters.places import find_places
        from .subspace import insert_subspace

        kind = kind_of(self.kind)
        options = kind.options(self.options)
        module = module_of(graph)
        places = find_places(module, self.targets, self.exclude)
        decisions = []
        shared = [p.name for p in places if len(p.holders) > 1]
        if shared:
            raise ConstraintError("the weight is tied", node=shared[0], hint="leave it out with `exclude`")
        if kind.name == "random_subspace":
            listed = [(p.name, p.layer, p.weight) for p in places]
            facts = insert_subspace(listed, str(options["form"]), int(options["d"]), ctx.seed)
            decisions = [Decision(p.name, "reparametrized", "theta0 + P z", dict(facts)) for p in places]
        else:
            for p in places:
                facts = reparametrize(p.layer, p.weight, kind, options, p.name, _axis(p.layer, p.view), ctx.seed)
                decisions.append(Decision(p.name, "reparametrized", kind.name, facts))
        return Outcome(
            decisions=decisions, details={"weights": len(places), "kind": kind.name}, graph=graph_of(module, graph, ctx)
        )


def _axis(layer: nn.Module, view: Any) -> int:
    """The axis of the stored weight that counts outputs (of one group, in transposed convolutions)."""
    return 1 if view.transposed else 0


def reparametrize(
    layer: nn.Module, leaf: str, kind: Reparam, options: dict[str, Any], name: str, axis: int, seed: int
) -> dict[str, Any]:
    """Register the parametrizations of one weight in place; returns the facts for the report."""
    from torch.nn.utils import parametrize

    rng = np.random.Generator(np.random.Philox([seed, zlib.crc32(name.encode())]))
    made, facts = kind.make(Start(getattr(layer, leaf).detach(), axis, name, options, rng, seed))
    original = getattr(layer, leaf).detach().clone()
    for step in made:
        parametrize.register_parametrization(layer, leaf, step)
    if kind.exact(options):
        facts["error"] = float((getattr(layer, leaf).detach() - original).abs().max())
    return facts
