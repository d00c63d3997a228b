"""One walk through a quantized graph beside the float one, layer by layer, on the same batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....graph.ir import Graph, Node, Value
from ...base import Progress, no_progress
from ...recover.layers import LINEAR
from ...recover.runner import bound, runner


class PairWalk:
    """Both graphs executed in step; what is corrected is seen by everything after it.

    Memory: the live values of both graphs for all batches at once.

    Raises:
        ConstraintError: there is no batch, or one does not fit.
        UnsupportedOp: an ONNX operator has no torch implementation.
    """

    def __init__(self, graph: Graph, reference: Graph, batches: Iterable[Any]) -> None:
        fed = bound(graph, batches)
        self.graph, self.reference = graph, reference
        with torch.no_grad():
            self.here, self.there = runner(graph, LINEAR), runner(reference, LINEAR)
            self.here.start(fed)
            self.there.start(fed)

    def visit(
        self, pairs: Iterable[tuple[Node, Node]], progress: Progress = no_progress
    ) -> Iterator[tuple[Node, Node]]:
        """The pairs (node, float twin) in the order of execution, each right after both were executed."""
        placed = [(at, node, twin) for node, twin in pairs if (at := self.here.position(node)) is not None]
        placed.sort(key=lambda item: item[0])
        for at, node, twin in progress(placed, "correcting"):
            there = self.there.position(twin)
            if there is None:
                continue
            with torch.no_grad():
                self.there.advance(there + 1)
                self.here.advance(at + 1)
                yield node, twin

    def outputs(self, node: Node, twin: Node) -> tuple[list[Tensor], list[Tensor]] | None:
        """What the float graph and the quantized one gave, per batch."""
        wanted, now = self.there.values(twin.output), self.here.values(node.output)
        return None if wanted is None or now is None else (wanted, now)

    def change(self, value: Value, data: np.ndarray, result: Value | None = None) -> None:
        """Replace a weight, and make anew what is computed from it alone (``result``); :meth:`repeat` goes on."""
        self.here.set_weight(value, data)
        if result is not None and result is not value:
            with torch.no_grad():
                self.here.remake(result)

    def repeat(self) -> None:
        """Make the last call of the quantized graph again."""
        with torch.no_grad():
            self.here.repeat()


def channel_moments(tensors: Iterable[Tensor], axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance per index of ``axis`` over all batches, float64."""
    count = 0
    total: Any = 0.0
    squares: Any = 0.0
    for t in tensors:
        rows = t.movedim(axis, 0).flatten(1).double()
        total = total + rows.sum(1)
        squares = squares + rows.square().sum(1)
        count += rows.shape[1]
    mean = total / max(count, 1)
    return mean.numpy(), (squares / max(count, 1) - mean.square()).clamp_min(0).numpy()
