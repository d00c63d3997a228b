"""Passes on the toy graph: one exact, one that lies about being exact, one that selects, one that fails."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from foldline import passes as P
from foldline.graph.errors import ConstraintError


class Swap(P.Pass):
    """Permute the first hidden layer; with ``wrong`` forget the consumer."""

    name: ClassVar[str] = "toyswap"
    wrong: bool = False
    """Forget the consumer."""

    def apply(self, graph: Any, ctx: Any) -> Any:
        order = np.random.default_rng(ctx.seed).permutation(graph.weight("fc0.weight").shape[0])
        axes = {"fc0.weight": 0, "fc0.bias": 0} | ({} if self.wrong else {"fc1.weight": 1})
        for name, axis in axes.items():
            graph.slice_weight(graph.weight(name), {axis: order})
        graph.refresh()
        return P.Outcome([P.Decision("fc0", "permuted", "the order of hidden units is free", {"order": order})])


class ToyCut(P.Pass):
    """Keep every ``step``-th unit of the first hidden layer."""

    name: ClassVar[str] = "toycut"
    contract: ClassVar[P.Contract] = P.Contract.APPROXIMATE
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    step: int = 2
    """Keep every step-th unit."""

    def apply(self, graph: Any, ctx: Any) -> Any:
        total = graph.weight("fc0.weight").shape[0]
        kept = np.arange(0, total, self.step)
        plan = {"fc0.weight": {0: kept}, "fc0.bias": {0: kept}, "fc1.weight": {1: kept}}
        for name, axes in plan.items():
            graph.slice_weight(graph.weight(name), axes)
        graph.refresh()
        group = {"name": "fc0.weight:0", "size": total, "kept": len(kept), "reason": f"every {self.step}. unit"}
        whole = {"name": "fc1.weight:0", "size": 4, "kept": 4, "reason": "graph output <fc1>"}
        reason = f"every {self.step}. unit stays"
        decision = P.Decision("fc0.weight:0", "cut", reason, {"kept": len(kept), "members": ["fc0.weight", "fc0.bias"]})
        return P.Outcome([decision], {"groups": [group, whole]}, plan)


class Round(P.Pass):
    """Round weights to a grid: makes a quantized graph."""

    name: ClassVar[str] = "toyround"
    contract: ClassVar[P.Contract] = P.Contract.APPROXIMATE
    needs: ClassVar[P.Needs] = P.Needs.CALIBRATION
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    establishes: ClassVar[frozenset[str]] = frozenset({"quantized"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"float"})
    calibration: Any = None
    bits: int = 6

    def apply(self, graph: Any, ctx: Any) -> Any:
        count = sum(1 for _ in ctx.progress(self.batches(ctx), "calibrating"))
        for name in list(graph.weights):
            data = graph.weight(name).numpy()
            step = np.abs(data).max() / 2 ** (self.bits - 1)
            graph.set_weight(graph.weight(name), (np.round(data / step) * step).astype(np.float32))
        return P.Outcome(details={"batches": count})


class Fail(P.Pass):
    """Edit the graph, then raise."""

    name: ClassVar[str] = "toyfail"
    bug: bool = False

    def apply(self, graph: Any, ctx: Any) -> Any:
        graph.set_weight(graph.weight("fc0.weight"), np.zeros((1, 1), np.float32))
        if self.bug:
            raise ZeroDivisionError("a bug")
        raise ConstraintError("cannot be done", node="fc0", value=3, expected=4, found=3, hint="ask for less")


class Break(P.Pass):
    """Leave a graph that breaks an invariant."""

    name: ClassVar[str] = "toybreak"

    def apply(self, graph: Any, ctx: Any) -> Any:
        graph.nodes.reverse()
        return P.Outcome()


class NeedsInt(P.Pass):
    """Requires what only toyround establishes."""

    name: ClassVar[str] = "toypack"
    requires: ClassVar[frozenset[str]] = frozenset({"quantized"})

    def apply(self, graph: Any, ctx: Any) -> Any:
        return P.Outcome()


ALL = (Swap, ToyCut, Round, Fail, Break, NeedsInt)
