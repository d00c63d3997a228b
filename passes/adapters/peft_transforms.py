"""peft checkpoints that transform the weight: IA3, Bone/MiSS, OFT, BOFT, HRA, RoAd, GLoRA, DEFT, OSF, PEANuT."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...graph.errors import ConstraintError
from .kinds import Array, Geometry, Options, Tensors
from .peft_kinds import flat, method


def _block_diagonal(blocks: Array) -> Array:
    """[n b, n b] from [n, b, b]."""
    n, b = blocks.shape[:2]
    whole = np.zeros((n, b, n, b))
    whole[np.arange(n), :, np.arange(n)] = blocks
    return whole.reshape(n * b, n * b)


# ---- scales ---------------------------------------------------------------------------------------------------------
def _ia3_bias(b: Array, t: Tensors, o: Options) -> Array:
    return b if o["feedforward"] else b * np.asarray(t["ia3_l"]).reshape(b.shape)


@method(
    "IA3", "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", "ia3_",
    bias=_ia3_bias,
)  # fmt: skip
def ia3(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """diag(l) W, bias too; in a feed-forward layer W diag(l), which scales what it reads."""
    scale = np.asarray(t["ia3_l"]).reshape(-1)
    ones = [1] * (w.ndim - 2)
    return w * (scale.reshape(1, -1, *ones) if o["feedforward"] else scale.reshape(-1, 1, *ones))


def _path(t: Tensors, letter: str) -> Array:
    """One term of GLoRA: a product, a vector, a number, or nothing."""
    stem = f"glora_{letter}."
    if stem + "Xd" in t:
        return t[stem + "Xd"] @ t[stem + "Xu"]
    if stem + "X" in t:
        x = np.asarray(t[stem + "X"])
        return x[0] if x.size == 1 else x
    return np.zeros(())


def _glora_bias(b: Array, t: Tensors, o: Options) -> Array:
    """b + b D + E + W C, with the weight before."""
    moved = np.asarray(_path(t, "C"))
    shift = flat(t["base"]) @ moved.reshape(-1) if moved.ndim else 0.0
    return b + b * np.asarray(_path(t, "D")).reshape(-1) + np.asarray(_path(t, "E")).reshape(-1) + shift


@method("GLORA", "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", "glora_", bias=_glora_bias)
def glora(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W + W * A + B; b + b D + E + W C."""
    return w + w * _path(t, "A") + _path(t, "B")


# ---- blocks ---------------------------------------------------------------------------------------------------------
@method("MISS", "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", "miss_")
def miss(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W + one block repeated over the columns; "bat" (Bone): W + W_ij B_i + B_i for r x r blocks; "mini" tiles it."""
    b = t["miss_block"]
    if o["form"] == "bat":
        r = b.shape[-1]
        if g.out % r or g.inp % r:
            raise ConstraintError("the block does not divide the weight", expected=f"multiples of {r}", found=w.shape)
        blocks = w.reshape(g.out // r, r, g.inp // r, r).transpose(2, 0, 1, 3)
        return w + (blocks @ b + b).transpose(1, 2, 0, 3).reshape(w.shape)
    if o["form"] == "mini":
        b = np.tile(b, (1, g.out // b.shape[1]))
    columns = -(-g.inp // b.shape[0])
    return w + np.tile(b.T, (1, columns))[:, : g.inp]


BONE_PAPER = "Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models"


@method("BONE", BONE_PAPER, "bone_")
def bone(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """As saved by earlier versions of peft: the same two forms under another name."""
    return miss(w, {"miss_block": t["bone_block"]}, g, o)


# ---- rotations ------------------------------------------------------------------------------------------------------
def _skew(vectors: Array) -> Array:
    """Skew-symmetric [n, b, b] from the entries above the diagonal, [n, b (b - 1) / 2]."""
    b = int(round((1 + np.sqrt(1 + 8 * vectors.shape[1])) / 2))
    made = np.zeros((vectors.shape[0], b, b))
    rows, columns = np.triu_indices(b, 1)
    made[:, rows, columns] = vectors
    return made - made.transpose(0, 2, 1)


def _cayley(q: Array) -> Array:
    """(I - Q) (I + Q)^-1."""
    eye = np.eye(q.shape[-1])
    return np.linalg.solve((eye + q).transpose(0, 2, 1), (eye - q).transpose(0, 2, 1)).transpose(0, 2, 1)


def _neumann(q: Array, terms: int) -> Array:
    """I + 2 Q + 2 Q^2 + ... + Q^(terms - 1), which approximates the Cayley transform of -Q as peft trains it."""
    r = np.broadcast_to(np.eye(q.shape[-1]), q.shape).copy()
    if terms > 1:
        r += 2 * q
        if terms > 2:
            power = q @ q
            r += 2 * power
            for _ in range(3, terms - 1):
                power = power @ q
                r += 2 * power
            r += power @ q
    return r


@method("OFT", "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", "oft_")
def oft(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W R^T with R block-diagonal, each block a Cayley transform (or its series, as configured)."""
    name = next(k for k in t if k.startswith("oft_"))
    q = _skew(t[name])
    if o["constrained"]:
        limit = o["eps"] / np.sqrt(q.shape[0])
        norm = np.linalg.norm(q, axis=(1, 2), keepdims=True)
        q = np.where(norm <= limit, q, limit * q / np.maximum(norm, 1e-300))
    blocks = _neumann(q, o["terms"]) if o["series"] else _cayley(q)
    m = flat(w)
    if blocks.shape[0] == 1:
        blocks = np.repeat(blocks, m.shape[1] // blocks.shape[1], axis=0)
    r = _block_diagonal(blocks)
    return (m @ r if o.get("embedding") else m @ r.T).reshape(w.shape)


@method("BOFT", "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", "boft_")
def boft(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """diag(s) W M^T, with M a product of permuted block-diagonal Cayley transforms."""
    stages = t["boft_R"]  # [factors, blocks, b, b]
    m = flat(w)
    product: Array = None
    for i, stage in enumerate(stages):
        part = _block_diagonal(_cayley(0.5 * (stage - stage.transpose(0, 2, 1))))
        if len(stages) > 1:
            order = _butterfly(m.shape[1], stage.shape[0] // 2**i, stage.shape[1] // 2)
            back = np.argsort(order)
            part = part[np.ix_(back, back)] if o.get("inverse") else part[np.ix_(order, order)]
        product = part if product is None else part @ product
    return ((m @ product.T) * np.asarray(t["boft_s"]).reshape(-1, 1)).reshape(w.shape)


def _butterfly(n: int, blocks: int, run: int) -> np.ndarray:
    """Within each of ``blocks`` parts, runs of ``run`` entries: the even ones first, then the odd ones."""
    size = n // blocks
    runs = np.arange(size).reshape(-1, run)
    order = np.concatenate([runs[::2], runs[1::2]]).reshape(-1)
    return (np.arange(0, n, size)[:, None] + order).reshape(-1)


@method(
    "HRA", "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation", "hra_"
)
def hra(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W (I - 2 u_1 u_1^T) (I - 2 u_2 u_2^T) ..., or one reflection in the span where they are orthogonalised."""
    u, m = np.array(t["hra_u"]), flat(w)
    if o["orthogonalise"]:
        for i in range(u.shape[1]):
            for j in range(i):
                u[:, i] -= (u[:, j] @ u[:, i]) * u[:, j]
            u[:, i] /= np.linalg.norm(u[:, i])
        return (m - 2 * (m @ u) @ u.T).reshape(w.shape)
    u = u / np.linalg.norm(u, axis=0)
    for column in u.T:
        m = m - 2 * np.outer(m @ column, column)
    return m.reshape(w.shape)


def _road_columns(t: Tensors, o: Options) -> tuple[Array, Array]:
    """Diagonal and off-diagonal entries, [out] each."""
    half = o["group"] // 2
    theta, alpha = np.asarray(t["road_theta"]), np.asarray(t["road_alpha"])
    if o["form"] == "road_1":
        theta, alpha = (np.repeat(v.reshape(-1, half), 2, axis=0).reshape(-1) for v in (theta, alpha))
    if o["form"] in ("road_1", "road_2"):
        return alpha * np.cos(theta), alpha * np.sin(theta)
    theta, alpha = theta.reshape(-1, 2, o["group"]), alpha.reshape(-1, 2, o["group"])
    return (alpha[:, 0] * np.cos(theta[:, 0])).reshape(-1), (alpha[:, 1] * np.sin(theta[:, 1])).reshape(-1)


def _road(m: Array, t: Tensors, o: Options) -> Array:
    """Rotate pairs of rows (the halves of each group) of [out, ...]."""
    first, second = _road_columns(t, o)
    halves = m.reshape(-1, 2, o["group"] // 2, *m.shape[1:])
    turned = np.stack([-halves[:, 1], halves[:, 0]], axis=1).reshape(m.shape)
    ones = [1] * (m.ndim - 1)
    return m * first.reshape(-1, *ones) + turned * second.reshape(-1, *ones)


@method(
    "ROAD", "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability", "road_",
    bias=lambda b, t, o: _road(b, t, o),
)  # fmt: skip
def road(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """R W and R b, with R rotating and scaling pairs of outputs."""
    return _road(w, t, o)


# ---- functions of the base ------------------------------------------------------------------------------------------
@method("DEFT", "DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models", "deft_")
def deft(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W + P (s R - f(P)^T W), with f the rectifier or P's orthogonal factor (then for P too)."""
    p = t["deft_P"]
    left = right = np.linalg.qr(p)[0] if o["form"] == "qr" else p
    if o["form"] == "relu":
        right = np.maximum(p, 0)
    kept = right.T @ w
    return w - left @ kept if o["removal"] else w + left @ (o["scale"] * t["deft_R"] - kept)


@method("OSF", "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", "osf_")
def osf(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """The base's leading singular part, plus the trained rest U S V."""
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    low = t["osf_svd_params.S_low"]
    k = s.size - low.size
    return (u[:, :k] * s[:k]) @ vt[:k] + (t["osf_svd_params.U_low"] * low) @ t["osf_svd_params.V_low"]


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "linear": lambda x: x,
}


@method("PEANUT", "PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers", "peanut_")
def peanut(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W + s (a small network applied to W^T)^T."""
    if o["activation"] not in _ACTIVATIONS:
        raise ConstraintError("no such activation here", expected=", ".join(_ACTIVATIONS), found=o["activation"])
    f = _ACTIVATIONS[o["activation"]]
    x = f(w.T @ t["peanut_A.weight"].T)
    inner: list[Array] = []
    depth = sum(k.startswith("peanut_encoders") for k in t)
    for i in range(depth):
        inner.append(x)
        x = f(x @ t[f"peanut_encoders.{i}.weight"].T)
    for i in range(depth):
        x = f(x @ t[f"peanut_decoders.{i}.weight"].T) + inner[depth - 1 - i]
    return w + o["scale"] * (x @ t["peanut_B.weight"].T).T
