"""Text that a language model writes itself, as calibration data where there is none."""

from __future__ import annotations

from typing import Any

import numpy as np

from ....graph.errors import ConstraintError
from ....graph.execute import batches_of, run_graph, synthesize_inputs
from ....graph.ir import Graph
from ...recover.tokens import token_inputs

GREEDY = 4
"""The first tokens after the random one are the likeliest ones, later ones are drawn: text starts well, then varies."""


def generated_text(
    graph: Graph, samples: int, length: int | None, examples: Any = None, seed: int = 0
) -> list[dict[str, np.ndarray]]:
    """``samples`` sequences written by the model, one batch each of at most 8: {graph input name: array}.

    Each begins with a token drawn over the whole vocabulary. All sequences are written side by side at their full
    length: causal attention does not see what is not yet written. Masks are ones.

    Args:
        graph: causal: int token ids [N, T] in, logits [N, T, V] out.
        length: tokens per sequence; that of the examples (or of the graph's hints) when None.

    Raises:
        ConstraintError: the graph does not look like a causal language model.
    """
    model = next(iter(batches_of(graph, [examples]))) if examples is not None else synthesize_inputs(graph, seed)
    tokens = [n for n, table in token_inputs(graph).items() if model[n].ndim == 2 and len(table) >= 64]
    rank = graph.outputs[0].rank
    if len(tokens) != 1 or rank != 3:
        raise ConstraintError(
            "this model writes no text", node=graph.name, expected="one input of token ids, logits [N, T, V] out",
            found=f"token inputs {tokens}, an output of rank {rank}", hint="pass calibration batches instead",
        )  # fmt: skip
    name = tokens[0]
    rows, given = model[name].shape
    free = graph.inputs[0].shape is not None and isinstance(graph.inputs[0].shape[0], str)
    size = min(8, samples) if free else rows
    steps = given if length is None else length
    table = token_inputs(graph)[name]
    found = []
    for start in range(0, samples, size):
        rng = np.random.default_rng([seed, start])
        ids = np.zeros((size, steps), dtype=model[name].dtype)
        ids[:, 0] = rng.integers(0, len(table), size)
        batch = {n: _sized(a, size, steps, rows, given) for n, a in model.items()}
        for t in range(1, steps):
            batch[name] = ids
            logits = run_graph(graph, batch)[0][0][:, t - 1].astype(np.float64)
            noise = rng.gumbel(size=logits.shape) if t > GREEDY else 0.0
            ids = ids.copy()
            ids[:, t] = (logits + noise).argmax(-1)
        found.append({**batch, name: ids})
    return found


def _sized(a: np.ndarray, size: int, steps: int, rows: int, given: int) -> np.ndarray:
    """An example input (mask, positions) for other numbers of rows and tokens."""
    if a.ndim == 0 or a.shape[0] not in (1, rows):
        return a
    wide = np.repeat(a[:1], size, axis=0) if a.shape[0] == rows else a
    if wide.ndim < 2 or wide.shape[1] != given or steps == given:
        return wide
    if steps < given:
        return wide[:, :steps]
    row = wide[0].reshape(given, -1)[:, 0]
    if bool((np.diff(row) == 1).all()):  # positions
        return np.repeat((row[0] + np.arange(steps, dtype=a.dtype))[None], len(wide), axis=0)
    return np.concatenate([wide, np.repeat(wide[:, -1:], steps - given, axis=1)], axis=1)
