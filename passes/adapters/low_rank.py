"""LoRA and its direct kin: a product of two thin matrices, gated, normalised, or grown; as an adapter kind each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...graph.errors import ConfigError
from .kinds import STARTED, AdapterKind, Array, Geometry, Options, Start, Tensors, register, xp

LOW_RANK: dict[str, Any] = {"rank": 8, "scale": 1.0, "init": "zero"}


# ---- initialisations: (A [r, columns], B [out, r]) ------------------------------------------------------------------
def zero(start: Start) -> dict[str, np.ndarray]:
    """A uniform in +-sqrt(3 / columns), B zero ("LoRA: Low-Rank Adaptation of Large Language Models")."""
    n = start.geometry.columns
    a = start.rng.uniform(-1, 1, (start.rank, n)) * np.sqrt(3 / n)
    return {"A": a, "B": np.zeros((start.geometry.out, start.rank))}


def principal(start: Start) -> dict[str, np.ndarray]:
    """The leading singular triplets of the weight, split evenly ("PiSSA"); the rest of the weight stays frozen."""
    u, s, vt = np.linalg.svd(start.matrix, full_matrices=False)
    r, root = start.spectral_rank, np.sqrt(s[: start.spectral_rank] / start.options["scale"])
    return _from_start({"A": root[:, None] * vt[:r], "B": u[:, :r] * root})


def gradient(start: Start) -> dict[str, np.ndarray]:
    """A from the first, B from the next r singular directions of the loss's gradient, which are disjoint.

    "LoRA-GA: Low-Rank Adaptation with Gradient Approximation". The frozen part is W - s B0 A0; what is exported is
    B A - B0 A0. ``stable_gamma``: the paper's stable scale, |A0| = |B0| = out^(1/4) / sqrt(gamma).
    """
    r = start.rank
    if 2 * r > start.geometry.small:
        raise ConfigError(
            "init='gradient' takes 2 * rank singular directions",
            node="rank",
            expected=f"at most {start.geometry.small // 2} for a weight of {start.geometry.shape}",
            found=r,
        )
    u, _, vt = np.linalg.svd(start.needed("gradient", "gradient").reshape(start.matrix.shape), full_matrices=False)
    size = start.geometry.out**0.25 / np.sqrt(start.options.get("stable_gamma", 16))
    return _from_start({"A": vt[:r] * size, "B": u[:, r : 2 * r] * size})


def explained(start: Start) -> dict[str, np.ndarray]:
    """A = leading right singular vectors of the layer's inputs, B zero ("One Initialization to Rule them All", EVA)."""
    basis = start.needed("inputs", "eva")
    if len(basis) < start.rank:
        raise ConfigError("too few input directions for this rank", node="rank", expected=len(basis), found=start.rank)
    return {"A": basis[: start.rank].copy(), "B": np.zeros((start.geometry.out, start.rank))}


def _from_start(t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With fixed copies of the start values, whose product is subtracted for ever."""
    return {**t, **{name + STARTED: data.copy() for name, data in t.items()}}


INITIALISATIONS: dict[str, Callable[[Start], dict[str, np.ndarray]]] = {
    "zero": zero,
    "svd": principal,
    "gradient": gradient,
    "eva": explained,
}


def factors(start: Start) -> dict[str, np.ndarray]:
    """A and B by the option ``init``."""
    name = start.options.get("init", "zero")
    if name not in INITIALISATIONS:
        raise ConfigError("no such initialisation", node="init", expected=", ".join(INITIALISATIONS), found=name)
    return INITIALISATIONS[name](start)


# ---- formulas -------------------------------------------------------------------------------------------------------
def product(t: Tensors, g: Geometry, o: Options) -> Array:
    """s B A."""
    return o["scale"] * (t["B"] @ t["A"])


def gated_product(t: Tensors, g: Geometry, o: Options) -> Array:
    """s B diag(gate) A."""
    return o["scale"] * ((t["B"] * t["gate"]) @ t["A"])


def norms(matrix: Array, axis: int) -> Array:
    """Euclidean norms along ``axis`` of a matrix, kept as an axis of one."""
    return (matrix * matrix).sum(axis=axis, keepdims=True) ** 0.5


def normalised(matrix: Array, axis: int) -> Array:
    """Divided by the norms along ``axis``; what is all zeros stays all zeros (also its gradient is finite)."""
    square = (matrix * matrix).sum(axis=axis, keepdims=True)
    module = xp(matrix)
    empty = square == 0
    return matrix / module.where(empty, module.ones_like(square), square) ** 0.5


def _dora_start(start: Start) -> dict[str, np.ndarray]:
    axis = _norm_axis(start.options)
    return {**factors(start), "magnitude": norms(start.matrix, axis).reshape(-1)}


def _norm_axis(o: Options) -> int:
    """Axis summed over: the columns of each row for one magnitude per output, the rows of each column per input."""
    if o["per"] not in ("out", "in"):
        raise ConfigError(
            "a magnitude belongs to an output or an input", node="per", expected="out or in", found=o["per"]
        )
    return 1 if o["per"] == "out" else 0


def _dora(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    axis = _norm_axis(o)
    moved = w.reshape(g.out, -1) + _moved(t, g, o)
    return normalised(moved, axis) * t["magnitude"].reshape((-1, 1) if axis == 1 else (1, -1))


def _moved(t: Tensors, g: Geometry, o: Options) -> Array:
    delta = product(t, g, o)
    if "A" + STARTED in t:
        delta = delta - o["scale"] * (t["B" + STARTED] @ t["A" + STARTED])
    return delta


def _bora_start(start: Start) -> dict[str, np.ndarray]:
    return {
        **factors(start),
        "magnitude_in": norms(start.matrix, 0).reshape(-1),
        "magnitude_out": norms(start.matrix, 1).reshape(-1),
    }


def _bora(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    columns = normalised(w.reshape(g.out, -1) + _moved(t, g, o), 0) * t["magnitude_in"].reshape(1, -1)
    return normalised(columns, 1) * t["magnitude_out"].reshape(-1, 1)


def _adalora_start(start: Start) -> dict[str, np.ndarray]:
    g, r = start.geometry, start.rank
    return {
        "A": start.rng.normal(0, 0.02, (r, g.columns)),
        "B": start.rng.normal(0, 0.02, (g.out, r)),
        "gate": np.zeros(r),
    }


def _gated_start(start: Start) -> dict[str, np.ndarray]:
    return {**factors(start), "gate": np.ones(start.rank)}


def orthogonality(rows: Array) -> Array:
    """|X X^T - I|_F^2 of the rows of X [r, n]."""
    gram = rows @ rows.T
    module = xp(rows)
    eye = np.eye(len(gram)) if module is np else module.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return ((gram - eye) ** 2).sum()


def _orthogonal_factors(t: Tensors) -> Array:
    return orthogonality(t["A"]) + orthogonality(t["B"].T)


STARTS = frozenset({"A_start", "B_start"})
RANKS = {"A": 0, "B": 1}

LORA = register(
    AdapterKind(
        name="lora",
        paper="LoRA: Low-Rank Adaptation of Large Language Models",
        init=factors,
        delta=product,
        fixed=STARTS,
        ranks=RANKS,
        defaults={**LOW_RANK, "stable_gamma": 16.0},
    )
)
DORA = register(
    AdapterKind(
        name="dora",
        paper="DoRA: Weight-Decomposed Low-Rank Adaptation",
        init=_dora_start,
        weight=_dora,
        composition="magnitude",
        fixed=STARTS,
        ranks=RANKS,
        defaults={**LOW_RANK, "stable_gamma": 16.0, "per": "out"},
    )
)
BORA = register(
    AdapterKind(
        name="bora",
        paper="BoRA: Bi-dimensional Weight-Decomposed Low-Rank Adaptation",
        init=_bora_start,
        weight=_bora,
        composition="magnitude",
        fixed=STARTS,
        ranks=RANKS,
        defaults={**LOW_RANK, "stable_gamma": 16.0},
    )
)
ADALORA = register(
    AdapterKind(
        name="adalora",
        paper="Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
        init=_adalora_start,
        delta=gated_product,
        penalty=_orthogonal_factors,
        ranks={**RANKS, "gate": 0},
        defaults={"rank": 8, "scale": 1.0},
    )
)
INCRELORA = register(
    AdapterKind(
        name="increlora",
        paper="IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning",
        init=_adalora_start,
        delta=gated_product,
        penalty=_orthogonal_factors,
        ranks={**RANKS, "gate": 0},
        defaults={"rank": 1, "scale": 1.0},
    )
)
GATED = register(
    AdapterKind(
        name="gated_lora",
        paper="Sparse Low-rank Adaptation of Pre-trained Language Models",
        init=_gated_start,
        delta=gated_product,
        fixed=STARTS,
        ranks={**RANKS, "gate": 0},
        defaults={**LOW_RANK, "stable_gamma": 16.0},
    )
)
