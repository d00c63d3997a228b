"""Adapters on the singular value decomposition of the weight: SVFit, VectorFit, SORSA. The residual never changes."""

from __future__ import annotations

import numpy as np

from ...graph.errors import ConfigError
from .kinds import AdapterKind, Array, Geometry, Options, Start, Tensors, register
from .low_rank import orthogonality


def rank_of_energy(values: np.ndarray, share: float) -> int:
    """The least r whose leading singular values hold at least ``share`` of the sum of squares.

    Args:
        values: singular values, descending; share: in (0, 1].
    """
    energy = np.cumsum(np.asarray(values, dtype=np.float64) ** 2)
    if energy[-1] == 0:
        return 1
    return min(int(np.searchsorted(energy, share * energy[-1])) + 1, len(energy))


def _svfit_start(start: Start) -> dict[str, np.ndarray]:
    u, s, vt = np.linalg.svd(start.matrix, full_matrices=False)
    rank, energy = start.options["rank"], start.options["energy"]
    if (rank is None) == (energy is None):
        raise ConfigError("give exactly one of rank and energy", node="rank", found=f"rank={rank}, energy={energy}")
    r = rank_of_energy(s, energy) if rank is None else start.spectral_rank
    return {"s": s[:r], "U": u[:, :r], "V": vt[:r], "s_start": s[:r].copy()}


def _sigma(t: Tensors, g: Geometry, o: Options) -> Array:
    """U diag(s) V."""
    return (t["U"] * t["s"]) @ t["V"]


def _sigma_difference(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W + U diag(s - s_start) V: the difference first, so that the insertion is the identity to the last bit."""
    return w.reshape(g.out, -1) + (t["U"] * (t["s"] - t["s_start"])) @ t["V"]


SVFIT = register(
    AdapterKind(
        name="svfit",
        paper="SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
        init=_svfit_start,
        weight=_sigma_difference,
        fixed=frozenset({"U", "V", "s_start"}),
        defaults={"rank": None, "energy": None},
    )
)


def _vectorfit_start(start: Start) -> dict[str, np.ndarray]:
    u, s, vt = np.linalg.svd(start.matrix, full_matrices=False)
    t = {"s": s, "U": u, "V": vt, "s_start": s.copy()}
    if start.bias is not None:
        t["bias_shift"] = np.zeros_like(start.bias)
    return t


def _moved_bias(b: Array, t: Tensors, o: Options) -> Array:
    return b + t["bias_shift"] if "bias_shift" in t else b


VECTORFIT = register(
    AdapterKind(
        name="vectorfit",
        paper="VectorFit : Adaptive Singular & Bias Vector Fine-Tuning of Pre-trained Foundation Models",
        init=_vectorfit_start,
        weight=_sigma_difference,
        bias=_moved_bias,
        fixed=frozenset({"U", "V", "s_start"}),
    )
)


def _sorsa_start(start: Start) -> dict[str, np.ndarray]:
    u, s, vt = np.linalg.svd(start.matrix, full_matrices=False)
    r = start.spectral_rank
    t = {"U": u[:, :r], "s": s[:r], "V": vt[:r]}
    return {**t, **{name + "_start": data.copy() for name, data in t.items()}}


def _orthonormal_vectors(t: Tensors) -> Array:
    """|U^T U - I|^2 + |V V^T - I|^2."""
    return orthogonality(t["U"].T) + orthogonality(t["V"])


SORSA = register(
    AdapterKind(
        name="sorsa",
        paper="SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models",
        init=_sorsa_start,
        delta=_sigma,
        penalty=_orthonormal_vectors,
        fixed=frozenset({"U_start", "s_start", "V_start"}),
        defaults={"rank": 8},
    )
)
