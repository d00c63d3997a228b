"""Hash sharing: a weight gathered in contiguous blocks, with signs, from a smaller vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .kinds import Reparam, Start, out_of_range, register


class HashShare(nn.Module):
    """W[i] = g(i) M[h(i)], with h mapping whole blocks and g their signs; both are made from a seed, not stored.

    Every entry of M serves at most ceil(n / m) entries of W. With m = n every entry serves one, and W is met bit for
    bit; with fewer, M starts as the mean of what it serves.
    """

    index: Tensor
    sign: Tensor

    def __init__(self, shape: tuple[int, ...], size: int, block: int, seed: int) -> None:
        super().__init__()
        self.shape, self.size, self.block, self.seed = shape, size, block, seed
        index, sign = hash_blocks(int(np.prod(shape)), size, block, seed)
        self.register_buffer("index", torch.from_numpy(index), persistent=False)
        self.register_buffer("sign", torch.from_numpy(sign), persistent=False)

    def forward(self, m: Tensor) -> Tensor:
        """M [size] -> W."""
        count = int(np.prod(self.shape))
        rows = m.reshape(-1, self.block).index_select(0, self.index) * self.sign.to(m.dtype)[:, None]
        return rows.reshape(-1)[:count].reshape(self.shape)

    def right_inverse(self, w: Tensor) -> Tensor:
        """The M that comes nearest (least squares)."""
        padded = torch.zeros(self.index.numel() * self.block, dtype=torch.float64)
        known = torch.zeros_like(padded)
        padded[: w.numel()], known[: w.numel()] = w.detach().double().cpu().reshape(-1), 1.0
        signed = padded.reshape(-1, self.block) * self.sign.cpu().double()[:, None]
        shape = (self.size // self.block, self.block)
        total = torch.zeros(shape, dtype=torch.float64).index_add_(0, self.index.cpu(), signed)
        count = torch.zeros(shape, dtype=torch.float64).index_add_(0, self.index.cpu(), known.reshape(-1, self.block))
        return (total / count.clamp(min=1)).reshape(-1).to(w.dtype).to(w.device)


def hash_blocks(count: int, size: int, block: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(block of M, sign) of every block of W, from the seed alone: permutations of M's blocks, one after another."""
    wanted, own = -(-count // block), size // block
    rng = np.random.Generator(np.random.Philox(seed))
    rounds = [rng.permutation(own) for _ in range(-(-wanted // own))]
    sign = rng.integers(0, 2, wanted, dtype=np.int8) * 2 - 1
    return np.concatenate(rounds)[:wanted].astype(np.int64), sign.astype(np.int8)


def _hash_share(start: Start) -> tuple[list[nn.Module], dict[str, Any]]:
    count, block = start.weight.numel(), int(start.options["block"])
    ratio = float(start.options["ratio"])
    size = max(block, round(count * ratio / block) * block)
    if not 0 < ratio <= 1:
        raise out_of_range(start, "0 < ratio <= 1", ratio, "the share of the entries that is stored")
    if ratio == 1:
        size = -(-count // block) * block
    seed = int(start.rng.integers(2**62))
    made = HashShare(tuple(start.weight.shape), size, block, seed)
    return [made], {"entries": count, "stored": size, "seed": seed}


register(
    Reparam(
        "hash_share",
        "In defense of parameter sharing for model-compression",
        _hash_share,
        exact=lambda options: float(options["ratio"]) == 1,
        defaults={"ratio": 0.1, "block": 32},
    )
)
