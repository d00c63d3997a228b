"""Adapters whose update is a tensor product: Tucker in N dimensions (FLoRA) and sums of Kronecker products."""

from __future__ import annotations

import numpy as np

from ...graph.errors import ConfigError, ConstraintError
from .kinds import AdapterKind, Array, Geometry, Options, Start, Tensors, register, xp


# ---- Tucker ("FLoRA: Low-Rank Core Space for N-dimension") ---------------------------------------------------------
def _tucker_start(start: Start) -> dict[str, np.ndarray]:
    """Core G zero, so that the update is zero; a factor [size, rank] per axis, orthonormal columns."""
    sizes = start.geometry.shape
    asked = start.options["ranks"] or [start.options["rank"]] * 2
    ranks = [min(int(r), n) for r, n in zip([*asked, *sizes[len(asked) :]], sizes, strict=False)]
    t: dict[str, np.ndarray] = {"core": np.zeros(ranks)}
    for i, (n, r) in enumerate(zip(sizes, ranks, strict=True)):
        if r < 1:
            raise ConfigError("a rank is at least one", node="ranks", found=ranks)
        t[f"factor{i}"] = np.eye(n) if r == n and i >= 2 else np.linalg.qr(start.rng.standard_normal((n, r)))[0]
    return t


def tucker(core: Array, factors: list[Array]) -> Array:
    """core x_0 F_0 x_1 F_1 ... (for four axes abcd,oa,ib,hc,wd->oihw), one axis after the other as a matrix product."""
    for factor in factors:  # the leading axis is multiplied and goes to the end: after all, the order is as before
        rest = tuple(core.shape[1:])
        core = (factor @ core.reshape((core.shape[0], -1))).swapaxes(0, 1).reshape((*rest, factor.shape[0]))
    return core


def _tucker(t: Tensors, g: Geometry, o: Options) -> Array:
    """s G x_out F0 x_in F1 x_kernel ...; for a matrix s F0 G F1^T."""
    return o["scale"] * tucker(t["core"], [t[f"factor{i}"] for i in range(t["core"].ndim)])


TUCKER = register(
    AdapterKind(
        name="tucker",
        paper="FLoRA: Low-Rank Core Space for N-dimension",
        init=_tucker_start,
        delta=_tucker,
        defaults={"rank": 8, "ranks": None, "scale": 1.0},
    )
)


# ---- sums of Kronecker products ("Compacter") ----------------------------------------------------------------------
def _kron_start(start: Start) -> dict[str, np.ndarray]:
    """A [terms, p, p], B_i = left_i right_i^T; left zero. p must divide rows and columns."""
    n, p, r = int(start.options["terms"]), int(start.options["size"]), int(start.options["rank"])
    rows, columns = start.geometry.out, start.geometry.columns
    if rows % p or columns % p:
        raise ConstraintError(
            "the Kronecker block does not divide the weight",
            node="size",
            expected=f"a common divisor of {rows} and {columns}",
            found=p,
        )
    right = start.rng.uniform(-1, 1, (n, r, columns // p)) * np.sqrt(3 * p / columns)
    a = start.rng.standard_normal((n, p, p)) / p
    return {"A": a, "left": np.zeros((n, rows // p, r)), "right": right}


def kron_sum(a: Array, b: Array) -> Array:
    """sum_i a_i kron b_i, [p q, m n] from a [k, p, m] and b [k, q, n]."""
    both = xp(a).einsum("kpm,kqn->pqmn", a, b)
    return both.reshape((a.shape[1] * b.shape[1], a.shape[2] * b.shape[2]))


def kron_apply(a: Array, b: Array, x: Array) -> Array:
    """x (sum_i a_i kron b_i)^T as a reshape and two small products, x [..., m n] -> [..., p q]."""
    lead = tuple(x.shape[:-1])
    grid = x.reshape((*lead, a.shape[2], b.shape[2]))
    module = xp(a)
    half = module.einsum("...mn,kqn->...kmq", grid, b)
    return module.einsum("kpm,...kmq->...pq", a, half).reshape((*lead, a.shape[1] * b.shape[1]))


def _kron(t: Tensors, g: Geometry, o: Options) -> Array:
    """s sum_i A_i kron (left_i right_i)."""
    return o["scale"] * kron_sum(t["A"], t["left"] @ t["right"])


KRON = register(
    AdapterKind(
        name="kron",
        paper="Compacter: Efficient Low-Rank Hypercomplex Adapter Layers",
        init=_kron_start,
        delta=_kron,
        ranks={"left": 2, "right": 1},
        defaults={"terms": 4, "size": 4, "rank": 1, "scale": 1.0, "share": []},
    )
)


def factorise_kron(matrix: np.ndarray, size: tuple[int, int], terms: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The nearest sum of ``terms`` Kronecker products, by the SVD of Van Loan's rearrangement.

    Args:
        matrix: [p q, m n]; size: (p, m) of the left factors; terms: at most min(p m, q n).

    Returns:
        a [terms, p, m], b [terms, q, n] (float64) and the relative Frobenius error. Best in that norm; where the
        matrix is such a sum of no more terms, it is recovered (error at rounding level).

    Raises:
        ConstraintError: the factors' size does not divide the matrix.
    """
    (p, m), (rows, columns) = size, matrix.shape
    if rows % p or columns % m:
        raise ConstraintError(
            "the factors do not divide the matrix", expected=f"divisors of {matrix.shape}", found=size
        )
    q, n = rows // p, columns // m
    grid = np.asarray(matrix, dtype=np.float64).reshape(p, q, m, n).transpose(0, 2, 1, 3).reshape(p * m, q * n)
    u, s, vt = np.linalg.svd(grid, full_matrices=False)
    root = np.sqrt(s[:terms])
    a = (u[:, :terms] * root).T.reshape(-1, p, m)
    b = (root[:, None] * vt[:terms]).reshape(-1, q, n)
    total = float(np.linalg.norm(s))
    return a, b, float(np.linalg.norm(s[terms:])) / total if total else 0.0
