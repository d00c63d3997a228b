"""The proof of a selection: the sliced model against the masked original, on synthesised inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...graph.actions import mask, select
from ...graph.errors import VerificationError
from ...graph.execute import run_graph, synthesize_inputs
from ...graph.groups import AxisGroups, axis_groups
from ...graph.ir import Graph
from .select import Kept

IDENTITY_TOLERANCE = 1e-4


def identity_check(groups: AxisGroups, cut: Kept, seed: int) -> Callable[[Graph], dict[str, Any]]:
    """Run the masked original now; the returned check compares the sliced model with it."""
    exact = {g: k for g, k in cut.items() if g.exact}
    if not exact:
        return lambda graph: {"checked": False, "reason": "every cut axis carries a statistic"}
    inputs = synthesize_inputs(groups.graph, seed)
    masked, _ = run_graph(mask(groups, exact), inputs)
    partial: Graph | None = None
    if len(exact) < len(cut):
        partial = groups.graph.clone()
        again = axis_groups(partial)
        select(again, {again[g.name]: k for g, k in exact.items()})

    def check(graph: Graph) -> dict[str, Any]:
        sliced, _ = run_graph(graph if partial is None else partial, inputs)
        error = 0.0
        for value, a, b in zip(graph.outputs, masked, sliced, strict=True):
            x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
            if x.shape != y.shape:
                raise VerificationError(
                    "pruning changed the shape of an output", value=value.name, expected=x.shape, found=y.shape
                )
            finite = np.isfinite(x)
            if not finite.any():
                continue
            top = max(float(np.abs(x[finite]).max()), 1e-12)
            error = max(error, float(np.abs(x - y)[finite].max()) / top)
        if not error <= IDENTITY_TOLERANCE:
            raise VerificationError(
                "the pruned model is not the masked original",
                expected=f"relative error of at most {IDENTITY_TOLERANCE}",
                found=error,
                hint="please report this model; `ignore` the groups concerned meanwhile",
            )
        if partial is not None:
            run_graph(graph, inputs)
        return {
            "checked": True,
            "relative_error": error,
            "groups": len(exact),
            "inexact_groups": len(cut) - len(exact),
        }

    return check
