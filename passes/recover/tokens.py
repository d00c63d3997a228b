"""Token ids made without data: words drawn from the trained rows of a table, in the form of a model's examples."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...graph.ir import Graph, Value

THROUGH = ("identity", "cast", "reshape", "unsqueeze", "squeeze", "flatten")
TRAINED = 0.5
"""Rows of an embedding table shorter than this share of the median row count as never trained (reserved ids)."""
OFFSET = 20.0
"""The k-th id is drawn with probability 1 / (k + OFFSET): Zipf's law with Mandelbrot's correction."""
VOCABULARY = 64
"""Rows below which a table beside a larger one holds no words; the largest may be as small (letters, notes, bases)."""
KEPT = 0.5
"""Share of the examples' words that stay in their places: the company that words keep is not made up."""


def token_inputs(graph: Graph) -> dict[str, np.ndarray]:
    """The inputs that are looked up in a stored table, with the table [rows, width]."""
    found = {}
    for value in graph.inputs:
        if value.dtype.startswith(("int", "uint")) and (value.rank or 0) >= 2:
            table = _table(value)
            if table is not None:
                found[value.name] = table
    return found


def _table(value: Value) -> np.ndarray | None:
    for node, position in value.uses:
        if node.op == "gather" and position == 1:
            source = node.inputs[0]
            data = None if source is None else source.const()
            if data is not None and data.ndim == 2 and node.attrs.get("axis", 0) == 0:
                return np.asarray(data, dtype=np.float64)
        elif node.op in THROUGH and position == 0 and (found := _table(node.output)) is not None:
            return found
    return None


def probabilities(table: np.ndarray) -> np.ndarray:
    """How often each id is drawn, [rows]: vocabularies list frequent pieces first, so Zipf's law over the rows that
    were trained ("An Informational Theory of the Statistical Structure of Language")."""
    lengths = np.linalg.norm(table, axis=1)
    trained = lengths >= TRAINED * np.median(lengths)
    weight = np.where(trained, 1.0 / (np.cumsum(trained) + OFFSET), 0.0)
    return np.asarray(weight / weight.sum())


def framed(ids: np.ndarray) -> np.ndarray:
    """Which places of example rows [N, L] hold no words: padding (a run of one id at the end), and before it whatever
    all rows begin or end with; of a single row its first and its last."""
    rows, length = ids.shape
    ends = np.full(rows, length)
    for i, row in enumerate(ids):
        run = int(np.argmin((row == row[-1])[::-1])) if (row != row[-1]).any() else length
        if run > 1:
            ends[i] = length - run
    most = 1 if rows == 1 else int(ends.min()) // 2
    first = last = 0
    while first < most and len(np.unique(ids[:, first])) == 1:
        first += 1
    while last < most and len(np.unique(ids[np.arange(rows), ends - 1 - last])) == 1:
        last += 1
    at = np.arange(length)
    return np.asarray((at < first) | (at >= (ends - last)[:, None]))


def made_up_tokens(
    graph: Graph, examples: Mapping[str, np.ndarray], count: int, seed: int
) -> dict[str, np.ndarray] | None:
    """``count`` samples modelled on examples, {input name: array}; None if no input is looked up in a table, or the
    examples are not rows of samples.

    Each sample copies one example row, masks and all, and replaces each word with probability 1 - ``KEPT`` by an id
    drawn at random.
    """
    tables = {n: t for n, t in token_inputs(graph).items() if n in examples and examples[n].ndim == 2}
    sizes = {len(a) for a in examples.values() if a.ndim}
    if not tables or len(sizes) != 1 or 0 in sizes:
        return None
    rows = np.arange(count) % sizes.pop()
    made = {n: a[rows] if a.ndim else a for n, a in examples.items()}
    most = max(len(table) for table in tables.values())
    for k, (name, table) in enumerate(sorted(tables.items())):
        given = examples[name]
        side = len(table) < VOCABULARY and len(table) < most
        if side or np.unique(given).size < 3 or bool((np.diff(given, axis=1) == 1).all()):
            continue  # token types or positions: as the examples have them
        chance = probabilities(table)
        rng = np.random.default_rng([seed, k])
        drawn = rng.choice(len(table), size=(count, given.shape[1]), p=chance)
        stays = framed(given)[rows] | (rng.random(drawn.shape) < KEPT)
        made[name] = np.where(stays, made[name], drawn).astype(given.dtype)
    return made
