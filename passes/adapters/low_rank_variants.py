"""Further low-rank kinds: triangular, grouped, gated concepts, bases from a seed (NOLA), a small inner matrix (XS)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...graph.errors import ConfigError
from .kinds import AdapterKind, Array, Geometry, NotFoldable, Options, Start, Tensors, register, xp
from .low_rank import factors


# ---- triangular ("TriAdaptLoRA") -----------------------------------------------------------------------------------
def _triangle(rows: int, columns: int, lower: bool, like: Array) -> Array:
    """Ones where the trapezoid of a triangular factor is, zeros elsewhere."""
    mask = np.tril(np.ones((rows, columns))) if lower else np.triu(np.ones((rows, columns)))
    module = xp(like)
    return mask if module is np else module.as_tensor(mask, dtype=like.dtype, device=like.device)


def _triangular(t: Tensors, g: Geometry, o: Options) -> Array:
    """s (B * lower) (A * upper): entries outside the triangles never count and get no gradient."""
    a, b = t["A"], t["B"]
    lower, upper = _triangle(b.shape[0], b.shape[1], True, b), _triangle(a.shape[0], a.shape[1], False, a)
    return o["scale"] * ((b * lower) @ (a * upper))


def _triangular_start(start: Start) -> dict[str, np.ndarray]:
    t = factors(start)
    return {"A": np.triu(t["A"]), "B": np.tril(t["B"])}


TRIANGULAR = register(
    AdapterKind(
        name="triangular_lora",
        paper="TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient "
        "Fine-Tuning",
        init=_triangular_start,
        delta=_triangular,
        ranks={"A": 0, "B": 1},
        defaults={"rank": 8, "scale": 1.0, "init": "zero"},
    )
)


# ---- groups of adapters ("Learn to Preserve and Diversify") ---------------------------------------------------------
def _group_start(start: Start) -> dict[str, np.ndarray]:
    n, r, g = int(start.options["count"]), start.rank, start.geometry
    a = start.rng.uniform(-1, 1, (n, r, g.columns)) * np.sqrt(3 / g.columns)
    return {"A": a, "B": np.zeros((n, g.out, r))}


def _group(t: Tensors, g: Geometry, o: Options) -> Array:
    """s sum_n B_n A_n."""
    return o["scale"] * xp(t["A"]).einsum("nor,nri->oi", t["B"], t["A"])


def _apart(t: Tensors) -> Array:
    """sum over pairs of adapters of |A_n A_m^T|_F^2: what they read is kept orthogonal."""
    cross = xp(t["A"]).einsum("nri,msi->nmrs", t["A"], t["A"]) ** 2
    n = t["A"].shape[0]
    return cross.sum() - sum(cross[i, i].sum() for i in range(n))


GROUP = register(
    AdapterKind(
        name="group_lora",
        paper="Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization for Domain "
        "Generalization",
        init=_group_start,
        delta=_group,
        penalty=_apart,
        ranks={"A": 1, "B": 2},
        defaults={"rank": 4, "scale": 1.0, "count": 2},
    )
)


# ---- rank-1 concepts with gates ("One-dimensional Adapter to Rule Them All") ---------------------------------------
def _concept_start(start: Start) -> dict[str, np.ndarray]:
    k, g = int(start.options["count"]), start.geometry
    u = start.rng.uniform(-1, 1, (k, g.columns)) * np.sqrt(3 / g.columns)
    gates = np.asarray(start.options["gates"] or [1.0] * k, dtype=np.float64)
    if gates.shape != (k,):
        raise ConfigError("each concept needs one gate", node="gates", expected=k, found=gates.shape)
    return {"u": u, "v": np.zeros((k, g.out)), "gate": gates}


def _concepts(t: Tensors, g: Geometry, o: Options) -> Array:
    """s sum_c gate_c v_c u_c^T."""
    return o["scale"] * ((t["v"].T * t["gate"]) @ t["u"])


def _constant_gates(t: Tensors, o: Options) -> None:
    if o["dynamic"]:
        raise NotFoldable(CONCEPTS, why="gates that depend on the input (dynamic=True)")


CONCEPTS = register(
    AdapterKind(
        name="concept_lora",
        paper="One-dimensional Adapter to Rule Them All: Concepts, Diffusion Models and Erasing Applications",
        init=_concept_start,
        delta=_concepts,
        composition="gate",
        fixed=frozenset({"gate"}),
        ranks={"u": 0, "v": 0, "gate": 0},
        checked=_constant_gates,
        defaults={"count": 1, "scale": 1.0, "gates": None, "dynamic": False},
    )
)


# ---- linear combinations of random bases (NOLA) ---------------------------------------------------------------------
def uniform_stream(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [-1, 1) from Philox's raw 64-bit words: the same bits in every process, thread and numpy version.

    They are multiples of 2^-23, so that float32 holds them exactly.
    """
    words = np.random.Philox(key=np.uint64(seed)).random_raw(int(np.prod(shape)))
    return ((words >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1.0).reshape(shape)


def _nola_bases(g: Geometry, o: Options) -> dict[str, np.ndarray]:
    r, k, seed = int(o["rank"]), int(o["bases"]), int(o["seed"])
    return {
        "bases_A": uniform_stream(2 * seed, (k, r, g.columns)),
        "bases_B": uniform_stream(2 * seed + 1, (k, g.out, r)),
    }


def _nola_start(start: Start) -> dict[str, np.ndarray]:
    k = int(start.options["bases"])
    return {"a": start.rng.uniform(-1, 1, k) / np.sqrt(k), "b": np.zeros(k)}


def _nola(t: Tensors, g: Geometry, o: Options) -> Array:
    """s (sum_j b_j B_j) (sum_i a_i A_i), the bases of unit variance over sqrt(columns) and sqrt(rank)."""
    module = xp(t["a"])
    b, a = module.einsum("k,kor->or", t["b"], t["bases_B"]), module.einsum("k,kri->ri", t["a"], t["bases_A"])
    return o["scale"] * 3 / (g.columns * int(o["rank"])) ** 0.5 * (b @ a)


NOLA = register(
    AdapterKind(
        name="nola",
        paper="NOLA: Networks as Linear Combination of Low Rank Random Basis",
        init=_nola_start,
        delta=_nola,
        derived=_nola_bases,
        defaults={"rank": 8, "scale": 1.0, "bases": 64, "seed": 0},
    )
)


# ---- a small trained matrix between fixed bases (XS, SB) -----------------------------------------------------------
def _xs_start(start: Start) -> dict[str, np.ndarray]:
    """Bases from the SVD of the weight (R zero) or of a first step's update (R its singular values)."""
    how: Any = start.options["init"]
    r, scale = start.spectral_rank, start.options["scale"]
    if how == "weight_svd":
        u, s, vt = np.linalg.svd(start.matrix, full_matrices=False)
        return {"A": s[:r, None] * vt[:r], "B": u[:, :r], "R": np.zeros((r, r))}
    if how == "update_svd":
        update = start.needed("update", "update_svd").reshape(start.matrix.shape)
        u, s, vt = np.linalg.svd(update, full_matrices=False)
        return {"A": vt[:r], "B": u[:, :r], "R": np.diag(s[:r] / scale)}
    raise ConfigError("no such initialisation", node="init", expected="weight_svd, update_svd", found=how)


def _xs(t: Tensors, g: Geometry, o: Options) -> Array:
    """s B R A."""
    return o["scale"] * (t["B"] @ t["R"] @ t["A"])


XS = register(
    AdapterKind(
        name="xs",
        paper="LoRA-XS; Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank "
        "Fine-Tuning",
        init=_xs_start,
        delta=_xs,
        fixed=frozenset({"A", "B"}),
        defaults={"rank": 8, "scale": 1.0, "init": "weight_svd"},
        steps=frozenset({"update_svd"}),
    )
)
