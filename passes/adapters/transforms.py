"""Adapters that multiply the weight: transform + residual W' = W0 T + Delta, and its special cases OFT and Bone."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...graph.errors import ConfigError, ConstraintError
from .adapter import Entry, evaluated
from .kinds import AdapterKind, Array, Geometry, Options, Start, Tensors, register, xp
from .low_rank import norms, zero


def _eye(n: int, like: Array) -> Array:
    module = xp(like)
    return np.eye(n) if module is np else module.eye(n, dtype=like.dtype, device=like.device)


# ---- transform + residual ("Transformed Low-rank Adaptation via Tensor Decomposition") -----------------------------
def ring_matrix(cores: list[Array]) -> Array:
    """The square matrix of a tensor ring: T[i1..id, j1..jd] = trace(G1[i1, j1] ... Gd[id, jd]).

    Args:
        cores: each [r, n_k, n_k, r]; the matrix has prod(n_k) rows.
    """
    module = xp(cores[0])
    product = cores[0]
    for core in cores[1:]:
        product = module.einsum("aijb,bklc->aikjlc", product, core)
        a, i, k, j, m, c = product.shape
        product = product.reshape((a, i * k, j * m, c))
    return module.einsum("aija->ij", product)


def _sizes(columns: int, asked: list[int] | None) -> list[int]:
    """The sizes of the ring's cores: as asked, else two factors near the square root."""
    if asked:
        if int(np.prod(asked)) != columns:
            raise ConstraintError("the ring's sizes do not multiply to the columns", expected=columns, found=asked)
        return list(asked)
    first = next(n for n in range(int(columns**0.5), 0, -1) if columns % n == 0)
    return [first, columns // first]


def _transform_start(start: Start) -> dict[str, np.ndarray]:
    """T = I as a ring (one entry of the bond carries the identity, the rest is zero), Delta = 0."""
    bond = int(start.options["ring_rank"])
    t = zero(start)
    for k, n in enumerate(_sizes(start.geometry.columns, start.options["sizes"])):
        core = np.zeros((bond, n, n, bond))
        core[0, :, :, 0] = np.eye(n)
        if bond > 1 and k == 0:  # the other bonds need one factor that is not zero to learn at all
            core[1:, :, :, 1:] = start.rng.normal(0, 0.02, (bond - 1, n, n, bond - 1))
        t[f"core{k}"] = core
    return t


def _transform(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W0 T + s B A."""
    ring = ring_matrix([t[f"core{k}"] for k in range(sum(name.startswith("core") for name in t))])
    return w.reshape(g.out, -1) @ ring + o["scale"] * (t["B"] @ t["A"])


TRANSFORM = register(
    AdapterKind(
        name="transform",
        paper="Transformed Low-rank Adaptation via Tensor Decomposition and Its Applications to Text-to-image Models",
        init=_transform_start,
        weight=_transform,
        composition="transform",
        ranks={"A": 0, "B": 1},
        defaults={"rank": 8, "scale": 1.0, "ring_rank": 2, "sizes": None},
    )
)


# ---- orthogonal block-diagonal (OFT) --------------------------------------------------------------------------------
def cayley(skew: Array) -> Array:
    """(I - S)(I + S)^-1 of S = (X - X^T) / 2, per leading index: orthogonal. X [..., b, b]."""
    s = (skew - skew.swapaxes(-1, -2)) / 2
    eye = _eye(s.shape[-1], s)
    # (I - S) and (I + S)^-1 commute
    return xp(s).linalg.solve(eye + s, eye - s)


def _oft_start(start: Start) -> dict[str, np.ndarray]:
    b, columns = int(start.options["block"]), start.geometry.columns
    if columns % b:
        raise ConstraintError(
            "the blocks do not divide the columns", node="block", expected=f"a divisor of {columns}", found=b
        )
    return {"skew": np.zeros((columns // b, b, b))}


def _oft(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W blockdiag(R_1 ... R_n), R_i = cayley(skew_i)."""
    r = cayley(t["skew"])
    blocks = w.reshape((g.out, r.shape[0], r.shape[1]))
    return xp(w).einsum("onb,nbc->onc", blocks, r).reshape((g.out, -1))


OFT = register(
    AdapterKind(
        name="oft",
        paper="Controlling Text-to-Image Diffusion by Orthogonal Finetuning",
        init=_oft_start,
        weight=_oft,
        composition="transform",
        defaults={"block": 8},
    )
)


# ---- Bone: block affine ---------------------------------------------------------------------------------------------
def _bone_start(start: Start) -> dict[str, np.ndarray]:
    r, g = int(start.options["rank"]), start.geometry
    mode = start.options["mode"]
    if mode not in ("affine", "plain"):
        raise ConfigError("no such mode of Bone", node="mode", expected="affine, plain", found=mode)
    if g.columns % r or g.out % r:
        raise ConstraintError(
            "the block does not divide the weight",
            node="rank",
            expected=f"a common divisor of {g.out} and {g.columns}",
            found=r,
            hint="choose another rank, or leave this layer out of targets",
        )
    return {"B": np.zeros((g.out // r, r, r))}


def _blocks(matrix: Array, r: int) -> Array:
    """[out, columns] as [out / r, columns / r, r, r]."""
    rows, columns = matrix.shape
    return matrix.reshape((rows // r, r, columns // r, r)).swapaxes(1, 2)


def _whole(blocks: Array) -> Array:
    rows, columns, r, _ = blocks.shape
    return blocks.swapaxes(1, 2).reshape((rows * r, columns * r))


def _bone(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """Block (j, i) becomes W_ji + W_ji B_j + B_j ("affine"), or W_ji + B_j ("plain")."""
    b = t["B"][:, None]
    blocks = _blocks(w.reshape((g.out, -1)), t["B"].shape[1])
    return _whole(blocks + b if o["mode"] == "plain" else blocks + blocks @ b + b)


BONE = register(
    AdapterKind(
        name="bone",
        paper="Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models",
        init=_bone_start,
        weight=_bone,
        composition="transform",
        defaults={"rank": 8, "mode": "affine"},
    )
)


def unfold_bone(merged: np.ndarray, b: np.ndarray, mode: str = "affine") -> np.ndarray:
    """The base weight of a merged one: (W' - B)(I + B)^-1 by blocks, or W' - B. float64; exact to rounding only.

    Args:
        merged: [out, columns]; b: [out / r, r, r].

    Raises:
        ConstraintError: I + B is singular, so that the base cannot be told from the merged weight.
    """
    blocks = _blocks(np.asarray(merged, dtype=np.float64), b.shape[1])
    wide = np.asarray(b, dtype=np.float64)[:, None]
    if mode == "plain":
        return _whole(blocks - wide)
    square = np.eye(b.shape[1]) + wide
    if np.linalg.cond(square).max() > 1e12:
        raise ConstraintError(
            "I + B is singular: the base weight is lost", found=f"cond {np.linalg.cond(square).max():.3g}"
        )
    return _whole(np.swapaxes(np.linalg.solve(np.swapaxes(square, -1, -2), np.swapaxes(blocks - wide, -1, -2)), -1, -2))


# ---- one form for all -----------------------------------------------------------------------------------------------
def as_transform(weight: np.ndarray, entry: Entry) -> tuple[np.ndarray, np.ndarray]:
    """The entry as W' = rows_j(W0) T_j + Delta: (T [n, columns, columns], Delta [out, columns]), float64.

    n is one, except for Bone, whose blocks of rows have a T each. DoRA must have a magnitude per input (``per="in"``):
    one per output multiplies from the left.

    Args:
        weight: stored base weight.

    Raises:
        ConstraintError: the kind has no such form.
    """
    kind = entry.definition()
    c = entry.view.canonical(np.asarray(weight).astype(np.float64))
    g = entry.view.geometry(weight.shape)
    t: dict[str, Any] = dict(evaluated(kind, entry.tensors, g, entry.options))
    o, n, matrix = entry.options, g.columns, c.reshape(c.shape[0], -1)
    none = np.zeros_like(matrix)
    if kind.composition == "add" and kind.delta is not None:
        return np.eye(n)[None], kind.new_weight(c, t, g, o).reshape(matrix.shape) - matrix
    if kind.name == "dora" and o["per"] == "in":
        moved = matrix + o["scale"] * (t["B"] @ t["A"])
        size = norms(moved, 0).reshape(-1)
        ratio = np.where(size > 0, t["magnitude"] / np.where(size > 0, size, 1), 0.0)
        return np.diag(ratio)[None], (moved - matrix) * ratio
    if kind.name == "oft":
        return _block_diagonal(cayley(t["skew"]))[None], none
    if kind.name == "bone":
        r = t["B"].shape[1]
        wide = np.tile(t["B"].transpose(0, 1, 2), (1, 1, n // r)).reshape(matrix.shape)
        if o["mode"] == "plain":
            return np.eye(n)[None], wide
        return np.stack([_block_diagonal(np.tile(np.eye(r) + b, (n // r, 1, 1))) for b in t["B"]]), wide
    if kind.name == "transform":
        ring = ring_matrix([t[f"core{k}"] for k in range(sum(name.startswith("core") for name in t))])
        return ring[None], o["scale"] * (t["B"] @ t["A"])
    raise ConstraintError("this kind has no form W0 T + Delta", node=entry.target, found=kind.name)


def transformed(weight: np.ndarray, t: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """rows_j(W0) T_j + Delta of a canonical weight, as [out, columns]."""
    matrix = np.asarray(weight, dtype=np.float64).reshape(weight.shape[0], -1)
    rows = matrix.reshape(t.shape[0], -1, matrix.shape[1])
    return (rows @ t).reshape(matrix.shape) + delta


def _block_diagonal(blocks: np.ndarray) -> np.ndarray:
    n, b, _ = blocks.shape
    whole = np.zeros((n * b, n * b))
    for i, block in enumerate(blocks):
        whole[i * b : (i + 1) * b, i * b : (i + 1) * b] = block
    return whole
