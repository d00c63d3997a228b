"""Bind: an input of the model is the same from now on (a task, a style, a prompt code)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from ...graph.errors import ConstraintError
from ...graph.ir import Graph
from ..base import Context, Contract, Decision, Outcome, Pass


class Bind(Pass):
    """Give inputs of the graph fixed values, so that what is computed from them alone can be materialised.

    Hypernetworks ("Polyhistor: Parameter-Efficient Multi-Task Adaptation for Dense Vision Tasks") compute adapter
    weights from a task's code: bound, they are constants. The inputs stay in the signature, unused, so that callers
    need not change; the function is that of the bound values whatever is passed (FRESH).

    Raises:
        ConstraintError: no such input, or a value of another shape or dtype.
    """

    name: ClassVar[str] = "bind"
    contract: ClassVar[Contract] = Contract.FRESH
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    values: dict[str, Any]
    """Input name -> its value (array, nested list or number)."""

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        known = {v.name: v for v in graph.inputs}
        decisions = []
        for name, given in self.values.items():
            if name not in known:
                raise ConstraintError("no such input", node=name, expected=", ".join(known), found=name)
            value = known[name]
            data = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given).astype(np.dtype(value.dtype))
            wanted = value.shape or ()
            fits = len(wanted) == data.ndim and all(
                isinstance(w, str) or w == d for w, d in zip(wanted, data.shape, strict=True)
            )
            if not fits:
                raise ConstraintError("the value does not fit the input", node=name, expected=wanted, found=data.shape)
            if value.is_output:
                raise ConstraintError("the input is an output too", node=name)
            stored = graph.add_weight(f"{name}_bound", data)
            graph.replace_uses(value, stored)
            decisions.append(Decision(name, "bound", f"{data.size} numbers", {"shape": list(data.shape)}))
        graph.refresh()
        return Outcome(decisions=decisions, details={"bound": len(decisions)})
