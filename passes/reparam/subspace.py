"""Random subspaces: theta = theta0 + P z, all chosen weights sharing one trained z; P is made from a seed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...graph.errors import ConstraintError
from .kinds import Reparam, Start, register

FORMS = ("dense", "sparse", "fastfood")


class Subspace(nn.Module):
    """theta0 -> theta0 + scale (P z), with z [d] shared between the weights of a model.

    ``dense``: P has normal entries, unit columns in expectation. ``sparse``: each entry is +-1 with probability
    1 / sqrt(n), else zero. ``fastfood``: P = crop(H G Pi H B pad(z)), all diagonal or permutations but the Hadamard H.
    """

    def __init__(self, shape: tuple[int, ...], form: str, z: nn.Parameter, seed: int, total: int) -> None:
        super().__init__()
        self.shape, self.form, self.seed, self.total = shape, form, seed, total
        self.z = z
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)
        for name, data in projection(form, int(np.prod(shape)), z.numel(), seed, total).items():
            self.register_buffer(name, torch.from_numpy(data), persistent=False)

    def forward(self, theta0: Tensor) -> Tensor:
        """theta0 + scale (P z)."""
        parts = {name: b for name, b in self._buffers.items() if b is not None}
        delta = project(self.form, parts, self.z, int(np.prod(self.shape)))
        return theta0 + (self.scale * delta).reshape(self.shape).to(theta0.dtype)

    def right_inverse(self, w: Tensor) -> Tensor:
        """theta0, while z is zero."""
        return w


def projection(form: str, count: int, width: int, seed: int, total: int) -> dict[str, np.ndarray]:
    """What P of [count, width] is made of, from the seed alone (numpy's Philox: the same in every process).

    Args:
        total: entries of all weights together, by which columns are normalised.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    if form == "dense":
        return {"p": (rng.standard_normal((count, width)) / np.sqrt(total)).astype(np.float32)}
    if form == "sparse":
        share = 1 / np.sqrt(total)
        filled = rng.binomial(count * width, share)
        places = np.unique(rng.integers(0, count * width, filled))
        signs = rng.integers(0, 2, places.size) * 2.0 - 1
        value = (signs / np.sqrt(total * share)).astype(np.float32)
        return {"row": places // width, "column": places % width, "value": value}
    size = 1 << max(0, (max(count, width) - 1).bit_length())  # padded to a power of two, cropped afterwards
    gauss = rng.standard_normal(size)
    return {
        "sign": (rng.integers(0, 2, size) * 2.0 - 1).astype(np.float32),
        "order": rng.permutation(size),
        "gauss": (gauss / np.sqrt(size * (gauss @ gauss) * total / size)).astype(np.float32),
    }


def project(form: str, parts: dict[str, Tensor], z: Tensor, count: int) -> Tensor:
    """P z, [count]."""
    if form == "dense":
        return parts["p"] @ z
    if form == "sparse":
        zero = torch.zeros(count, dtype=z.dtype, device=z.device)
        return zero.index_add(0, parts["row"], parts["value"] * z[parts["column"]])
    size = parts["sign"].numel()
    x = torch.nn.functional.pad(z, (0, size - z.numel())) * parts["sign"]
    return (hadamard(hadamard(x)[parts["order"]] * parts["gauss"]))[:count]


def hadamard(x: Tensor) -> Tensor:
    """The Walsh-Hadamard transform (entries +-1) of a vector whose length is a power of two."""
    size, step = x.numel(), 1
    while step < size:
        pairs = x.reshape(-1, 2, step)
        a, b = pairs[:, 0], pairs[:, 1]
        x = torch.stack([a + b, a - b], 1).reshape(-1)
        step *= 2
    return x


def insert_subspace(places: Iterable[tuple[str, nn.Module, str]], form: str, width: int, seed: int) -> dict[str, Any]:
    """Give all these weights (name, layer, parameter) one subspace; theta0 is frozen, z (zero) is trained."""
    if form not in FORMS:
        raise ConstraintError("no such projection", node="form", expected=", ".join(FORMS), found=form)
    listed = list(places)
    total = sum(getattr(layer, leaf).numel() for _, layer, leaf in listed)
    like = getattr(listed[0][1], listed[0][2])
    z = nn.Parameter(torch.zeros(width, dtype=torch.float32, device=like.device))
    for i, (_, layer, leaf) in enumerate(listed):
        shape = tuple(getattr(layer, leaf).shape)
        made = Subspace(shape, form, z, _seed_of(seed, i), total).to(like.device)
        parametrize.register_parametrization(layer, leaf, made)
        layer.parametrizations[leaf].original.requires_grad_(False)  # type: ignore[index, union-attr]
    return {"d": width, "entries": total, "seed": seed, "form": form}


def _seed_of(seed: int, i: int) -> int:
    return int(np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)[0] >> 2)


def subspaces(model: nn.Module) -> list[tuple[str, Subspace]]:
    """(weight name, parametrization) of every weight in a subspace, in the model's order."""
    found = []
    for path, layer in model.named_modules():
        if parametrize.is_parametrized(layer):
            for leaf, chain in layer.parametrizations.items():  # type: ignore[union-attr, operator]
                name = f"{path}.{leaf}" if path else leaf
                found += [(name, p) for p in chain if isinstance(p, Subspace)]
    return found


def save_subspace(model: nn.Module, path: str | Path) -> Path:
    """Write the checkpoint of a model in a subspace: z, scales and seeds. Its size does not depend on the model's.

    Raises:
        ConstraintError: the model has no subspace.
    """
    from safetensors.numpy import save_file

    found = subspaces(model)
    if not found:
        raise ConstraintError("the model has no random subspace", hint="Reparametrize(kind='random_subspace')")
    tensors = {"z": found[0][1].z.detach().cpu().numpy()}
    tensors["scales"] = np.array([float(p.scale) for _, p in found], np.float32)
    header = [{"weight": n, "form": p.form, "seed": p.seed, "total": p.total} for n, p in found]
    save_file(tensors, path, metadata={"format": "foldline-subspace-1", "weights": json.dumps(header)})
    return Path(path)


def load_subspace(state: dict[str, np.ndarray], path: str | Path) -> dict[str, np.ndarray]:
    """theta0 + P z for every weight of a checkpoint, float64 and cast once; the same bits in every process.

    Args:
        state: the base's weights by name (theta0).
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="numpy") as file:
        header, z = json.loads((file.metadata() or {})["weights"]), file.get_tensor("z")
        scales = file.get_tensor("scales")
    made = {}
    for item, scale in zip(header, scales, strict=True):
        base = state[item["weight"]]
        parts = projection(item["form"], base.size, z.size, item["seed"], item["total"])
        delta = _exact(item["form"], parts, z.astype(np.float64), base.size)
        made[item["weight"]] = (base.astype(np.float64) + float(scale) * delta.reshape(base.shape)).astype(base.dtype)
    return made


def _exact(form: str, parts: dict[str, np.ndarray], z: np.ndarray, count: int) -> np.ndarray:
    """P z in float64, summed in an order that does not depend on threads."""
    if form == "dense":
        rows = max(1, (1 << 22) // max(1, z.size))
        p = parts["p"]
        return np.concatenate([(p[i : i + rows] * z).sum(axis=1) for i in range(0, count, rows)])
    if form == "sparse":
        return np.bincount(parts["row"], parts["value"] * z[parts["column"]], minlength=count)
    x = np.zeros(parts["sign"].size)
    x[: z.size] = z
    inner = _hadamard(x * parts["sign"])[parts["order"]] * parts["gauss"]
    return _hadamard(inner)[:count]


def _hadamard(x: np.ndarray) -> np.ndarray:
    step = 1
    while step < x.size:
        pairs = x.reshape(-1, 2, step)
        x = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).reshape(-1)
        step *= 2
    return x


def _together(start: Start) -> tuple[list[nn.Module], dict[str, Any]]:
    raise ConstraintError("a subspace spans all its weights at once", node=start.name, hint="insert_subspace")


register(
    Reparam(
        "random_subspace",
        "Measuring the Intrinsic Dimension of Objective Landscapes; "
        "Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning",
        _together,
        defaults={"d": 1000, "form": "fastfood"},
    )
)
