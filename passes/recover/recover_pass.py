"""Recover: correct a pruned network in closed form, without training."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from ...graph.errors import ConstraintError
from ...graph.ir import Graph
from ..base import Context, Contract, Needs, Outcome, Pass
from .absorb import absorb
from .walk import Settings, walk


class Recover(Pass):
    name: ClassVar[str] = "recover"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    needs: ClassVar[Needs] = Needs.CALIBRATION
    requires: ClassVar[frozenset[str]] = frozenset({"float", "pruned"})

    data: Literal["calibration", "synthetic", "moments"] = "calibration"
    calibration: Any = None
    ridge: float | Literal["auto"] = "auto"
    rows: int = 40_000
    sums: bool = True
    norms: bool = True

    def requirement(self) -> Needs:
        return Needs.CALIBRATION if self.data == "calibration" else Needs.NOTHING

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        if ctx.reference is None:
            raise ConstraintError("nothing was pruned", node=self.name)
        if self.data == "moments":
            found = absorb(graph, ctx.reference, 1e-3 if self.ridge == "auto" else self.ridge)
            return Outcome(decisions=found.decisions)
        s = Settings(self.ridge, self.rows, self.sums, self.norms, ctx.seed, ctx.progress)
        found = walk(graph, ctx.reference, self.batches(ctx), s)
        return Outcome(decisions=found.decisions)
