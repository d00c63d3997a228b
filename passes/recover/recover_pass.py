"""Recover: correct a pruned network in closed form, without training, from data, made-up data or norms' statistics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from ...graph.errors import ConstraintError
from ...graph.ir import Graph
from ..base import Context, Contract, Needs, Outcome, Pass, Progress, Reference, no_progress

if TYPE_CHECKING:
    from .walk import Walk

Ridge = float | Literal["auto"]
MOMENTS_RIDGE = 1e-3


class Recover(Pass):
    """Least squares after pruning: each layer is fitted to what the original gave, on its own, corrected inputs.

    In one walk through the pruned network beside the original, each linear operator (convolution, linear, attention
    projections) whose output differs gets W' = argmin |Y - W X - b|^2 + ridge |W - W_S|^2, with W_S the sliced weights,
    X its inputs in the pruned network as corrected so far and Y the original's outputs at the kept positions; the last
    operator of a residual branch aims at the original sum. A shift of the mean goes into the bias or the next batch
    norm's running mean; normalizations are re-estimated. Exact (to rounding) where every removed channel is a linear
    combination of kept ones and the ridge is small. Sources: the optimal update of "Structurally Prune Anything"
    (OBSPA) and of "Channel Pruning for Accelerating Very Deep Neural Networks", on streaming Gram matrices.

    Memory: the live activations of both networks for all samples, and one layer's Gram matrix (8 D^2 bytes for D
    inputs per output position). Layers whose outputs do not differ are not touched.

    Raises:
        ConstraintError: nothing was pruned, the graph was rewritten since, or the data is empty or does not fit.
        ConfigError: data="calibration" and no batches were given.
        UnsupportedOp: an ONNX operator has no torch implementation; names the node.
    """

    name: ClassVar[str] = "recover"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    needs: ClassVar[Needs] = Needs.CALIBRATION
    requires: ClassVar[frozenset[str]] = frozenset({"float", "pruned"})

    data: Literal["calibration", "synthetic", "moments"] = "calibration"
    """"calibration": typical inputs; "synthetic": inputs made until batch norms see what they remember (noise where
    there are none; random words in the form of the example inputs for token models), on top of "moments"; "moments":
    no forward run, only the statistics that norms store."""
    calibration: Any = None
    """Batches of model inputs for data="calibration" (those of the run, if None); for data="synthetic" inputs made
    before with ``synthetic_inputs``, which depend on the original alone and serve for any ratio."""
    ridge: Ridge = "auto"
    """Relative to the mean diagonal of a layer's Gram matrix; "auto": what does best on rows left out (data="moments":
    0.001)."""
    rows: int = Field(20_000, ge=1)
    """Output positions per layer that enter its Gram matrix, at least 8 per column where there are so many; drawn by
    the run's seed."""
    sums: bool = True
    """Whether the last operator of a residual branch also makes up for what the skip carries wrongly."""
    norms: bool = True
    """Whether normalizations are re-estimated."""
    samples: int = Field(256, ge=1)
    """Made-up inputs (data="synthetic")."""
    steps: int = Field(100, ge=0)
    """Steps of Adam that shape them; 0: coloured noise."""

    def requirement(self) -> Needs:
        return Needs.CALIBRATION if self.data == "calibration" else Needs.NOTHING

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        if ctx.reference is None:
            raise ConstraintError(
                "nothing was pruned, so there is nothing to recover",
                node=self.name,
                expected="a pass before it that cuts the model",
                found="the model as it came in",
                hint="put P.Prune(...) before P.Recover() in one pipeline",
            )
        batches: Iterable[Any] = ()
        if self.data == "calibration":
            batches = self.batches(ctx)
        elif self.data == "synthetic" and self.calibration is not None:
            batches = self.calibration
        found = recover_graph(
            graph, ctx.reference, batches, data=self.data, ridge=self.ridge, rows=self.rows, sums=self.sums,
            norms=self.norms, samples=self.samples, steps=self.steps, examples=ctx.example_inputs, seed=ctx.seed,
            progress=ctx.progress,
        )  # fmt: skip
        errors = list(found.errors.values())
        details: dict[str, Any] = {"data": self.data, "corrected": len(errors)}
        details["left"] = sum(d.action == "left" for d in found.decisions)
        if errors:
            details["mean_error_before"] = float(np.mean([e[0] for e in errors]))
            details["mean_error_after"] = float(np.mean([e[1] for e in errors]))
        return Outcome(decisions=found.decisions, details=details)


def recover_graph(
    graph: Graph,
    reference: Reference,
    batches: Iterable[Any] = (),
    *,
    data: Literal["calibration", "synthetic", "moments"] = "calibration",
    ridge: Ridge = "auto",
    rows: int = 20_000,
    sums: bool = True,
    norms: bool = True,
    samples: int = 256,
    steps: int = 100,
    examples: Any = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Walk:
    """What :class:`Recover` does, on a graph, for other passes: corrects ``graph`` in place; options as there.

    Args:
        graph: the pruned graph; its nodes have the names they have in ``reference.graph``.
        reference: the graph before the cut and what the cut kept (``ctx.reference``).
        batches: model inputs as ``Graph.bind`` takes them (data="calibration"), or made-up ones (data="synthetic",
            made here if there are none).
        examples: one call's inputs, whose form made-up token ids follow.

    Returns:
        Decisions, and per corrected weight (relative error before, after).
    """
    from .absorb import absorb  # these bring torch along: not before a graph is there
    from .synthetic import synthetic_inputs
    from .walk import Settings, walk

    if data == "moments":
        return absorb(graph, reference, MOMENTS_RIDGE if ridge == "auto" else float(ridge))
    if data == "synthetic":
        # Made-up inputs say less than real ones: what they say is fitted on top of what the norms' moments say.
        absorb(graph, reference, MOMENTS_RIDGE)
        batches = batches or synthetic_inputs(
            reference.graph, samples, examples=examples, steps=steps, seed=seed, progress=progress
        )
    return walk(graph, reference, batches, Settings(ridge, rows, sums, norms, seed, progress))
