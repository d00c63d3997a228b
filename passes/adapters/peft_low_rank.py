"""peft checkpoints whose update is a product of factors: LoRA and variants, AdaLoRA, VeRA, LoHa, LoKr, VB-LoRA, ..."""

from __future__ import annotations

import numpy as np

from ...graph.errors import ConstraintError
from .kinds import Array, Geometry, Options, Tensors
from .peft_kinds import flat, like, method, transpose_if, whole


def _product(t: Tensors, o: Options, a: str, b: str, scale: float = 1.0) -> Array:
    """A new array scale B A, [out, in * kernel] (embeddings: [rows, width])."""
    return transpose_if((scale * flat(t[b])) @ flat(t[a]), o)


def _names(t: Tensors, stem: str) -> tuple[str, str]:
    """Names of the factors A and B, of a linear layer or of an embedding."""
    for a, b in ((f"{stem}_A.weight", f"{stem}_B.weight"), (f"{stem}_embedding_A", f"{stem}_embedding_B")):
        if a in t and b in t:
            return a, b
    return f"{stem}_A", f"{stem}_B"


def _plain_convolution(g: Geometry) -> None:
    if g.groups > 1:
        raise ConstraintError(
            "the factors of a grouped convolution have no agreed layout", expected="groups = 1", found=g.groups
        )


def _lora_bias(b: Array, t: Tensors, o: Options) -> Array:
    """b' = b + s (bias of B); a bias trained whole replaces it."""
    b = np.asarray(t["bias"]) if "bias" in t else b
    return b + o["scale"] * t["lora_B.bias"] if "lora_B.bias" in t else b


@method("LORA", "LoRA: Low-Rank Adaptation of Large Language Models", "lora_", bias=_lora_bias)
def lora(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W + s B A; DoRA: m (W + s B A) / norm of its rows; PiSSA, OLoRA: W without what the factors started from."""
    _plain_convolution(g)
    new = like(_product(t, o, *_names(t, "lora"), o["scale"]), w)
    new += _residual(w, o)
    magnitude = next((t[k] for k in t if k.startswith("lora_magnitude_vector")), None)
    if magnitude is None:
        return new
    rows = new.T if o.get("embedding") else flat(new)
    norm = np.sqrt((rows * rows).sum(axis=1))
    factor = np.asarray(magnitude).reshape(-1) / norm
    return new * (factor if o.get("embedding") else factor.reshape(-1, *[1] * (w.ndim - 1)))


def _residual(w: Array, o: Options) -> Array:
    """The base without the factors' start, which peft takes off it when it loads such a checkpoint."""
    start, rank = o.get("start"), int(o.get("rank", 0))
    if not start:
        return w
    m = flat(w).T if o.get("embedding") else flat(w)
    if start == "pissa":
        u, s, vt = np.linalg.svd(m, full_matrices=False)
        return w - like((u[:, :rank] * s[:rank]) @ vt[:rank], w)
    q, r = np.linalg.qr(m)
    return w - like(o["scale"] * q[:, :rank] @ r[:rank], w)


@method("ADALORA", "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", "lora_")
def adalora(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W + alpha / (ranks + 1e-5) B (E A), over the ranks that were kept."""
    kept = np.asarray(o.get("kept") or np.ones(t["lora_A"].shape[0]), dtype=bool)
    a, b, e = t["lora_A"], t["lora_B"], t["lora_E"]
    if a.shape[0] == kept.size:
        a, b, e = a[kept], b[:, kept], e[kept]
    return w + like(b @ (a * e) * (o["alpha"] / (a.shape[0] + 1e-5)), w)


@method("VERA", "VeRA: Vector-based Random Matrix Adaptation", "vera_lambda", shared=("vera_A", "vera_B"))
def vera(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W + diag(b) B diag(d) A, with A and B cut to the layer's size."""
    b, a = t["vera_B"][: g.out], t["vera_A"][:, : g.inp]
    return w + (t["vera_lambda_b"][:, None] * b) @ (t["vera_lambda_d"][:, None] * a)


@method(
    "PVERA", "PVeRA: Probabilistic Vector-Based Random Matrix Adaptation", "pvera_lambda", shared=("pvera_A", "pvera_B")
)
def pvera(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """VeRA with the mean of its distribution, the first half of A and d."""
    half = t["pvera_lambda_d"].shape[0] // 2
    a = t["pvera_A"][: t["pvera_A"].shape[0] // 2, : g.inp]
    return w + (t["pvera_lambda_b"][:, None] * t["pvera_B"][: g.out]) @ (t["pvera_lambda_d"][:half, None] * a)


@method("LOHA", "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", "hada_")
def loha(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W + s (A1 B1) * (A2 B2); for convolutions each product is a Tucker form."""
    parts = []
    for i in (1, 2):
        a, b, core = t[f"hada_w{i}_a"], t[f"hada_w{i}_b"], t.get(f"hada_t{i}")
        parts.append(a @ b if core is None else np.einsum("ijkl,jr,ip->prkl", core, b, a))
    return w + like(o["scale"] * parts[0] * parts[1], w)


@method("LOKR", "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", "lokr_")
def lokr(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W + s (W1 kron W2), each whole or in factors."""
    first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        second = t["lokr_w2"]
    elif "lokr_t2" in t:
        second = np.einsum("ijkl,ip,jr->prkl", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        second = t["lokr_w2_a"] @ t["lokr_w2_b"]
    first = first.reshape(*first.shape, *[1] * (second.ndim - 2))
    return w + like(o["scale"] * np.kron(first, second), w)


def _from_bank(t: Tensors, side: str, o: Options) -> Array:
    """[rows, tiles, length]: each tile a softmax mixture of its top k vectors of the bank."""
    logits = t.get(f"vblora_logits_{side}")
    bank = t["vblora_vector_bank"]
    if logits is None:  # only the weights of the chosen were saved, all but the last, which makes their sum one
        index = whole(t, f"vblora_logits_{side}_topk_indices")
        weights = t[f"vblora_logits_{side}_topk_weights"]
        weights = np.concatenate([weights, 1 - weights.sum(-1, keepdims=True)], -1)
    else:
        index = np.argsort(-logits, axis=-1, kind="stable")[..., : o["topk"]]
        chosen = np.take_along_axis(logits, index, -1)
        weights = np.exp(chosen - chosen.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
    return (weights[..., None] * bank[index]).sum(-2)


@method(
    "VBLORA", "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", "vblora_logits",
    shared=("vblora_vector_bank",),
)  # fmt: skip
def vblora(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W + B A, whose sub-vectors are mixtures of a shared bank."""
    a, b = _from_bank(t, "A", o), _from_bank(t, "B", o)
    return w + b.transpose(0, 2, 1).reshape(-1, b.shape[1]) @ a.reshape(a.shape[0], -1)


@method(
    "UNILORA", "Uni-LoRA: One Vector is All You Need", "unilora_indices", "unilora_scales", shared=("unilora_theta_d",)
)
def unilora(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W + B A, gathered from one vector by stored indices."""
    a, b = (t["unilora_theta_d"][whole(t, f"unilora_indices_{s}")] * t[f"unilora_scales_{s}"] for s in "AB")
    return w + b @ a


@method(
    "RANDLORA", "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", "randlora_",
    shared=("randlora_A", "randlora_B"),
)  # fmt: skip
def randlora(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W + s sum_j B_j diag(lambda_j) A_j diag(gamma_j), random bases cut to the layer's size."""
    small, large = min(g.out, g.inp), max(g.out, g.inp)
    scale, gamma = t["randlora_lambda"], t["randlora_gamma"]
    count = scale.shape[1]
    a, b = t["randlora_A"][:, :count, :small], t["randlora_B"][:large, :count, :]
    mixed = (scale[:, :, None] * a * gamma[None, :, :small]).reshape(-1, small)
    delta = b.reshape(large, -1) @ mixed  # peft orders (basis, rank) on the left and (rank, basis) on the right
    return w + o["scale"] * (delta if small == g.inp else delta.T)


@method("DELORA", "Decoupling Angles and Strength in Low-rank Adaptation", "delora_")
def delora(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W + lambda / r  B diag(1 / (norms of A's rows times norms of B's columns)) A, times the base's column norms."""
    a, b = t["delora_A"], t["delora_B"]
    norms = np.maximum(np.linalg.norm(a, axis=1), 1e-4) * np.maximum(np.linalg.norm(b, axis=0), 1e-4)
    delta = (b * (t["delora_lambda"] / a.shape[0] / norms)) @ a
    return w + delta * t["delora_w_norm"]


@method("GRALORA", "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning", "gralora_")
def gralora(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W + s (k x k blocks, block (n, m) of rank r / k), and a plain low-rank term."""
    a, b = t["gralora_A"], t["gralora_B"]  # [k, in / k, r], [k, r, out / k]
    k, rank = a.shape[0], a.shape[2] // a.shape[0]
    delta = np.zeros((g.out, g.inp))
    rows, columns = g.out // k, g.inp // k
    for n in range(k):
        for m in range(k):
            left = b[m][n * rank : (n + 1) * rank]  # [rank, rows]
            right = a[n][:, m * rank : (m + 1) * rank]  # [columns, rank]
            delta[m * rows : (m + 1) * rows, n * columns : (n + 1) * columns] = left.T @ right.T
    if "gralora_A_general.weight" in t:
        delta = delta + t["gralora_B_general.weight"] @ t["gralora_A_general.weight"]
    return w + o["scale"] * delta


@method(
    "TINYLORA", "Learning to Reason in 13 Parameters", "tinylora_A", "tinylora_B", "tinylora_P", shared=("tinylora_v",)
)
def tinylora(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W + B (sum_i v_i P_i) A, with A and B from an SVD of the base that the checkpoint holds."""
    vectors = [k for k in t if k.startswith("tinylora_v")]
    if len(vectors) != 1:
        raise ConstraintError(
            "which vector belongs to which layer is not in the checkpoint", expected="one vector", found=len(vectors)
        )
    return w + t["tinylora_B"] @ np.einsum("i,ijk->jk", t[vectors[0]], t["tinylora_P"]) @ t["tinylora_A"]


@method("HIRA", "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", "hira_")
def hira(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W + W * (B A), elementwise."""
    _plain_convolution(g)
    return w + w * like(_product(t, o, *_names(t, "hira")), w)
