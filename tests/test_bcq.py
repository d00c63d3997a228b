"""Binary-coded weights: errors fall plane by plane, scales are powers of two, lookups give the dense product."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foldline.graph.errors import ConfigError
from foldline.graph.fx import load_torch
from foldline.passes.allocate import allocate
from foldline.passes.base import Context
from foldline.passes.quantize.formats import BinaryCoded, Integers, compensated, lut_matmul
from foldline.passes.quantize.weight_only import WeightOnly
from torch import nn


def weights(rows: int = 32, columns: int = 192) -> np.ndarray:
    return (np.random.default_rng(0).standard_t(6, (rows, columns)) * 0.1).astype(np.float32)


def error(fmt: Any, w: np.ndarray, cost: np.ndarray | None = None) -> float:
    off = np.square(fmt.fit(w, importance=cost).decode() - w, dtype=np.float64)
    return float((off if cost is None else off * cost).sum())


@pytest.mark.parametrize("powers", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_error_falls_with_planes_and_refinement_never_raises_it(powers: bool, weighted: bool) -> None:
    w = weights()
    cost = np.random.default_rng(1).uniform(0.1, 4, 192) if weighted else None
    refined = [error(BinaryCoded(bits=q, block=32, powers=powers), w, cost) for q in (1, 2, 3, 4)]
    greedy = [error(BinaryCoded(bits=q, block=32, powers=powers, rounds=0), w, cost) for q in (1, 2, 3, 4)]
    assert all(b < 0.75 * a for a, b in zip(refined, refined[1:], strict=False))
    assert all(r <= g * (1 + 1e-9) for r, g in zip(refined, greedy, strict=True))
    assert refined[2] < 0.95 * greedy[2]


def test_every_block_is_refined_not_only_their_sum() -> None:
    w = weights()
    each = []
    for rounds in (0, 6):
        off = np.square(BinaryCoded(bits=3, block=32, rounds=rounds).fit(w).decode() - w)
        each.append(off.reshape(32, 6, 32).sum(2))
    # A block may end in another local optimum; the alternation itself never raises its error.
    assert (each[1] <= each[0] * 1.3).all() and (each[1] <= each[0] * (1 + 1e-6)).mean() > 0.97


def test_scales_are_powers_of_two_and_rounding_at_the_end_is_worse() -> None:
    w = weights()
    inside = BinaryCoded(bits=3, block=32).fit(w)
    assert inside.scales.kind == "e8m0"
    assert (np.frexp(inside.alphas())[0] == 0.5).all()
    free = BinaryCoded(bits=3, block=32, powers=False).fit(w)
    rounded = np.exp2(np.rint(np.log2(free.alphas())))
    after = np.zeros_like(w)
    for i in range(3):
        after += np.where((free.codes >> i) & 1, 1, -1) * np.repeat(rounded[i], 32, axis=1)
    assert np.square(inside.decode() - w).sum() < 0.85 * np.square(after - w).sum()
    assert np.square(free.decode() - w).sum() < np.square(inside.decode() - w).sum()


@pytest.mark.parametrize(("bits", "block", "columns"), [(3, 32, 192), (2, 0, 200), (4, 64, 150), (1, 8, 64)])
@pytest.mark.parametrize("powers", [True, False])
def test_lookups_give_the_dense_product(bits: int, block: int, columns: int, powers: bool) -> None:
    w = weights(24, columns)
    encoded = BinaryCoded(bits=bits, block=block, powers=powers).fit(w)
    x = np.random.default_rng(2).standard_normal((7, columns)).astype(np.float32)
    dense = x @ encoded.decode().T
    np.testing.assert_allclose(lut_matmul(x, encoded), dense, rtol=1e-5, atol=1e-5 * np.abs(dense).max())


def test_bytes_are_planes_and_one_byte_per_scale() -> None:
    encoded = BinaryCoded(bits=3, block=64).fit(weights(32, 192))
    assert encoded.nbytes == 3 * (32 * 192 // 8 + 32 * 3)
    with pytest.raises(ConfigError, match="multiple of 8"):
        lut_matmul(np.zeros((1, 192), np.float32), BinaryCoded(bits=2, block=12).fit(weights()))
    with pytest.raises(ConfigError, match="1 to 4"):
        BinaryCoded(bits=5)


def test_more_levels_than_a_uniform_grid_of_two_bits() -> None:
    w = weights()
    assert error(BinaryCoded(bits=2, block=32, powers=False), w) < error(Integers(bits=2, block=32), w)


def test_mixed_planes_beat_uniform_ones() -> None:
    """2.2 planes on average, given to the layers that need them, against 2 everywhere, by output error."""
    rng = np.random.default_rng(0)
    layers = {f"l{i}": (weights(16, 64) * (1 + 2 * i), rng.standard_normal((200, 64)) * (4 - i)) for i in range(4)}
    items, uniform = {}, 0.0
    for name, (w, x) in layers.items():
        levels = []
        for q in (1, 2, 3, 4):
            decoded = BinaryCoded(bits=q, block=32).fit(w).decode()
            levels.append((q * w.size, float(np.square(x @ (decoded - w).T).sum())))
        uniform += levels[1][1]
        items[name] = levels
    total = sum(w.size for w, _ in layers.values())
    chosen = allocate(items, 2.2 * total)
    assert chosen.loss <= uniform and chosen.cost[0] <= 2.2 * total
    assert allocate(items, 2.0 * total).loss <= uniform * (1 + 1e-9)


class Tiny(nn.Module):
    """A language model of two blocks over 64 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 64), nn.Linear(64, 64)
        self.mix = nn.ModuleList([nn.Linear(128, 256) for _ in range(2)])
        self.back = nn.ModuleList([nn.Linear(256, 64) for _ in range(2)])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for mix, back in zip(self.mix, self.back, strict=True):
            before = F.pad(x, (0, 0, 1, 0))[:, :-1]
            x = x + back(torch.relu(mix(torch.cat([x, before], -1))))
        return self.head(x)


def chain(count: int, seed: int) -> torch.Tensor:
    """Sequences in which two tokens decide the next with a little noise; 64 symbols, a few much more frequent."""
    g = torch.Generator().manual_seed(seed)
    ids = (torch.rand((count, 33), generator=g) ** 3 * 64).long()
    for t in range(2, 33):
        noise = torch.rand(count, generator=g) < 0.15
        ids[:, t] = torch.where(noise, ids[:, t], (ids[:, t - 1] * 3 + ids[:, t - 2]) % 64)
    return ids


def trained() -> Tiny:
    torch.manual_seed(0)
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for step in range(250):
        ids = chain(64, step)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
def test_output_aware_codes_have_the_lower_perplexity() -> None:
    model, held_out = trained(), chain(256, 10_000)
    ids = held_out[:, :-1]

    @torch.no_grad()
    def perplexity(m: nn.Module) -> float:
        return float(F.cross_entropy(m(ids).flatten(0, 1), held_out[:, 1:].flatten()).exp())

    found = {"float": perplexity(model)}
    for method in ("rtn", "gptq"):
        graph = load_torch(model, ids[:2])
        options = {"format": "bcq", "bits": 3, "block": 32, "method": method}
        WeightOnly(**options).apply(graph, Context(calibration=[chain(64, 20_000)[:, :-1]]))
        found[method] = perplexity(graph.to_model())
    assert found["float"] < found["gptq"] < found["rtn"]
    assert found["gptq"] - found["float"] < 0.7 * (found["rtn"] - found["float"])


def test_compensation_keeps_the_scales_powers_of_two() -> None:
    x = np.random.default_rng(0).standard_normal((300, 192))
    encoded = compensated(BinaryCoded(bits=2, block=32), weights(), 0, x.T @ x)
    assert (np.frexp(encoded.alphas())[0] == 0.5).all() and encoded.alphas().shape == (2, 32, 6)
