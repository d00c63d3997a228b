"""Materialise: every weight that is computed from parameters and constants alone becomes a stored one."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ...graph.ir import Graph
from ..base import Context, Contract, Outcome, Pass


class Materialise(Pass):
    """Evaluate parametrized weights in float64, round once, and store them; the tensors they came from go.

    ``Fold`` does the same with a guard against growth; this pass stores what it finds up to ``budget`` bytes in all,
    which undoes hash sharing, hypernetworks and subspaces too.
    """

    name: ClassVar[str] = "materialise"
    contract: ClassVar[Contract] = Contract.EXACT
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    budget: int = Field(1 << 33, ge=0)
    """Bytes that the model may grow by in all."""
    within: str = ""
    """Only what layers under this path read."""
    everywhere: bool = True
    """Also what no layer stores (position biases, decay rates): an ``nn.Module`` then comes back as a GraphModule."""

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        from ..clean.sweeps import DeadCode
        from ..fold.constants import ConstantSubgraph
        from ..rewrite import Env, rewrite

        rule = ConstantSubgraph(free=self.budget, budget=self.budget, within=self.within, everywhere=self.everywhere)
        log = rewrite(graph, [DeadCode(), rule], Env(graph, ctx))
        if log.applied:
            graph.refresh()
        stored = sum(len(d.data["values"]) for d in log.applied if d.action == "stored")
        return Outcome(decisions=log.decisions, details={"stored": stored, "refused": len(log.refused)})
