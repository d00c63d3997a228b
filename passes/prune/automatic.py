"""What to prune by when nothing is said: criterion and scope "auto", and inputs made up where no data was given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...graph.ir import Graph
from ..base import Context, Decision, Needs
from .importance import needs_of

if TYPE_CHECKING:
    from .prune_pass import Prune

MADE, STEPS = 64, 30
"""Made-up inputs, and the steps of Adam that shape them."""


def remembers_inputs(graph: Graph) -> bool:
    """True where batch norms store statistics to which made-up inputs can be shaped."""
    from ..recover.synthetic import stored_statistics

    return any(n.op == "batch_norm" and stored_statistics(n) is not None for n in graph.nodes)


def settled(prune: Prune, graph: Graph, ctx: Context) -> Prune:
    """The same pass with criterion and scope named where they are "auto".

    With data: l2 and "layerwise", whose measured distortions lose least. Without any: Fisher information and one global
    ranking on inputs shaped by the batch norms' statistics; the distortion of the output on such inputs misleads once
    much is cut, gradients of the answers that the model itself gives on them do not. Without batch norms: l2 and
    "uniform". Measured in benchmarks/prune_without_training.py.
    """
    if prune.criterion != "auto" and prune.scope != "auto":
        return prune
    if not all(d is None for d in (prune.calibration, prune.data, ctx.calibration)):
        criterion, scope = "l2", "layerwise"
    elif remembers_inputs(graph):
        criterion, scope = "fisher", "global"
    else:
        criterion, scope = "l2", "uniform"
    named: dict[str, Any] = {}
    if prune.criterion == "auto":
        named["criterion"] = criterion
    if prune.scope == "auto":
        named["scope"] = scope
    return prune.model_copy(update=named)


def inputs_without_data(prune: Prune, graph: Graph, ctx: Context, decisions: list[Decision] | None) -> Any:
    """Batches made up for a choice that looks at activations or gradients and was given none; None where it looks at
    weights alone, or where no batch norm tells what inputs look like (the choice then says what it is missing)."""
    criterion, count = prune.criterion, MADE
    blind = callable(criterion) or needs_of(criterion) is Needs.NOTHING
    if blind and prune.scope == "layerwise":
        count = prune.samples
    elif blind:
        return None
    if not remembers_inputs(graph):
        return None
    from ..recover.synthetic import synthetic_inputs

    made = synthetic_inputs(graph, count, examples=ctx.example_inputs, steps=STEPS, seed=ctx.seed)
    if decisions is not None:
        why = "no data was given: inputs were made up and shaped until the batch norms see what they remember"
        decisions.append(Decision("calibration", "made up", why, {"samples": count, "steps": STEPS}))
    return made
