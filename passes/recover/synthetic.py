"""Inputs made without data: coloured noise, shaped until the batch norms see the statistics they remember."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...graph.execute import batches_of, synthesize_inputs
from ...graph.ir import Graph, Node, Value
from ..base import Progress, no_progress
from .layers import LINEAR
from .runner import runner
from .tokens import made_up_tokens

BATCH = 64
SHARED = 0.8
"""Share of the noise's standard deviation that all channels of an image have in common."""


def synthetic_inputs(
    graph: Graph,
    samples: int = 256,
    *,
    examples: Any = None,
    steps: int = 100,
    rate: float = 0.05,
    seed: int = 0,
    progress: Progress = no_progress,
) -> list[dict[str, np.ndarray]]:
    """Batches of made-up inputs, {graph input name: array}, the same for the same seed.

    Image-like inputs (floats with a channel axis and at least one more) are noise with a power spectrum of 1/f^2, as
    natural images have, with correlated channels and unit variance. Token ids (looked up in a stored table) follow the
    examples' rows: their length, mask and special tokens and half of their words, the others drawn by Zipf's law from
    the trained rows of the table; without examples integers are drawn from what their consumers can index. See
    :func:`synthesize_inputs` for the rest. If the graph has batch norms, ``steps`` steps of Adam then change
    the images until mean and variance before each batch norm are those it stores ("ZeroQ: A Novel Zero Shot
    Quantization Framework"; the same term in "Dreaming to Distill").

    Args:
        samples: how many in all; rounded up to whole batches where the batch size is fixed in the model.
        examples: one call's inputs as ``Graph.bind`` takes them; only token models look at them.
        steps, rate: of Adam; 0 steps leave the noise as it is.
    """
    images = [v for v in graph.inputs if v.rank is not None and v.rank >= 3 and v.dtype.startswith("float")]
    free = all(v.shape and isinstance(v.shape[0], str) for v in graph.inputs)
    size = min(BATCH, samples) if free else max(1, int((graph.inputs[0].hint or (1,))[0]))
    batches = []
    model = None if examples is None else next(iter(batches_of(graph, [examples])))
    for i in range(-(-samples // size)):
        tokens = None if model is None else made_up_tokens(graph, model, size, seed + i)
        if tokens is not None:
            batches.append(tokens)
            continue
        made = synthesize_inputs(graph, seed + i)
        for k in range(1, -(-size // len(made[graph.inputs[0].name])) if free else 1):
            more = synthesize_inputs(graph, seed + 7919 * k + i)
            made = {n: np.concatenate([a, more[n]]) for n, a in made.items()}
        made = {n: a[:size] for n, a in made.items()} if free else made
        for v in images:
            made[v.name] = coloured_noise((size, *made[v.name].shape[1:]), seed + i).astype(made[v.name].dtype)
        batches.append(made)
    norms = [n for n in graph.nodes if n.op == "batch_norm" and stored_statistics(n) is not None]
    if not (norms and images and steps):
        return batches
    return [_shaped(graph, b, images, norms, steps, rate) for b in progress(batches, "dreaming up inputs")]


def coloured_noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Noise [N, C, ...] whose amplitude falls as 1/frequency along the axes from 2 on; zero mean and unit variance."""
    rng = np.random.default_rng(seed)
    axes = tuple(range(2, len(shape)))
    grids = np.meshgrid(*(np.fft.fftfreq(n) * n for n in shape[2:]), indexing="ij")
    falloff = 1 / np.maximum(np.sqrt(sum(g**2 for g in grids)), 1.0)
    common, own = rng.standard_normal((shape[0], 1, *shape[2:])), rng.standard_normal(shape)
    mixed = SHARED * common + np.sqrt(1 - SHARED**2) * own
    noise = np.fft.ifftn(np.fft.fftn(mixed, axes=axes) * falloff, axes=axes).real
    return np.asarray((noise - noise.mean()) / noise.std())


def stored_statistics(node: Node) -> tuple[Tensor, Tensor] | None:
    """Running mean and standard deviation of a batch norm, float32; None where they are not stored."""
    mean, var = node.input(3), node.input(4)
    if node.attrs.get("training") or mean is None or var is None:
        return None
    mu, square = mean.const(), var.const()
    if mu is None or square is None:
        return None
    std = np.sqrt(np.asarray(square, dtype=np.float64) + node.attrs["eps"])
    return torch.from_numpy(np.array(mu, dtype=np.float32)), torch.from_numpy(std.astype(np.float32))


def _shaped(
    graph: Graph, batch: dict[str, np.ndarray], images: list[Value], norms: list[Node], steps: int, rate: float
) -> dict[str, np.ndarray]:
    """Adam on one batch of images; the loss compares means and deviations, in units of the stored deviation."""
    run = runner(graph, LINEAR)
    order = sorted(((at, n) for n in norms if (at := run.position(n)) is not None), key=lambda pair: pair[0])
    pixels = {v.name: torch.from_numpy(batch[v.name].astype(np.float32)).requires_grad_() for v in images}
    adam = torch.optim.Adam(list(pixels.values()), lr=rate)
    wanted = {n.name: stored_statistics(n) for n in norms}
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = rate * 0.5 * (1 + np.cos(np.pi * step / steps))
        run.start([{**batch, **pixels}])
        loss = torch.zeros(())
        for at, node in order:
            run.advance(at + 1)
            found, target = run.values(node.inputs[0]), wanted[node.name]  # type: ignore[arg-type]
            if found is None or target is None:
                continue
            x = found[0].movedim(1, 0).flatten(1)
            mu, std = target
            loss = loss + ((x.mean(1) - mu) / std).square().mean() + (x.std(1) / std - 1).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return {**batch, **{n: p.detach().numpy().astype(batch[n].dtype) for n, p in pixels.items()}}
