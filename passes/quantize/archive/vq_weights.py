"""The pass: all weights as tokens of one codebook, in the container; for generators of parameters and as a codec."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from ....graph.errors import ConstraintError
from ....graph.ir import Graph
from ...base import Context, Contract, Decision, Outcome, Pass
from ..formats.codebook import kmeans_vectors
from ..formats.lookup import nearest_vectors
from ..numerics import sqnr_db
from .container import Archive


class VQWeights(Pass):
    """Weights cut into groups of ``step`` consecutive numbers, each a code of one codebook for the whole model.

    Every weight is divided by its deviation first, which is kept. The token view of weights that "Instruction-Guided
    Autoregressive Neural Network Parameter Generation" generates, with k-means in the place of a trained encoder; the
    artifact is the archive. Names, shapes and dtypes are restored exactly, numbers approximately.
    """

    name: ClassVar[str] = "vq_weights"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    bits: int = Field(default=8, ge=1, le=12)
    """The codebook has 2**bits entries."""
    step: int = Field(default=4, ge=1)
    """Numbers per code."""
    least: int | None = Field(default=None, ge=0)
    """Tensors with fewer numbers are stored as they are; None: those with fewer than the codebook has."""
    rounds: int = Field(default=25, ge=1)
    """Iterations of k-means."""

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        """Encode every float matrix and kernel that is large enough; the rest is stored as it is.

        Raises:
            ConstraintError: there is none.
        """
        least = self.step * 2**self.bits if self.least is None else self.least
        stored = [w for w in graph.weights.values() if w.dtype in ("float32", "float16", "bfloat16")]
        chosen = [w for w in stored if len(w.shape) > 1 and w.size >= least]
        if not chosen:
            raise ConstraintError(
                "there is no matrix to encode",
                node=graph.name,
                expected=f"one of {least} numbers",
                found="smaller ones",
            )
        archive = Archive()
        scales, groups, costs = {}, {}, []
        for weight in stored:
            if weight not in chosen:
                archive.add_raw(weight.name, weight.numpy())
                continue
            data = weight.numpy().astype(np.float32).ravel()
            scales[weight.name] = scale = np.float32(data.std() or 1.0)
            padded = np.pad(data / scale, (0, -len(data) % self.step))
            groups[weight.name] = padded.reshape(-1, self.step)
            # Every weight counts alike, however small it is: each carries one layer of the function.
            costs.append(np.full(len(groups[weight.name]), 1 / np.sqrt(len(padded))))
        table = kmeans_vectors(
            np.concatenate(list(groups.values())), np.concatenate(costs), 2**self.bits, self.rounds, ctx.seed
        )
        archive.codebooks["weights"] = table.astype(np.float32)
        decisions = []
        for weight in chosen:
            codes = nearest_vectors(groups[weight.name], table)[:, 0]
            archive.add_vq(weight.name, weight.numpy(), codes, float(scales[weight.name]), "weights", self.bits)
        restored = archive.tensors()
        for weight in chosen:
            quality = sqnr_db(weight.numpy(), restored[weight.name])
            facts = {"codes": len(groups[weight.name]), "weight_sqnr_db": quality}
            decisions.append(Decision(weight.name, "encoded", f"{facts['codes']} codes, {quality:.1f} dB", facts))
            graph.set_weight(weight, restored[weight.name])
        details = {"float_bytes": sum(w.numpy().nbytes for w in stored), "bytes": archive.nbytes}
        return Outcome(decisions=decisions, details=details, artifact=archive)
