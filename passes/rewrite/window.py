"""Checking one rewrite alone: on a small graph cut out round it, before it touches the real one."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ...graph.errors import FoldlineError
from ...graph.execute import run_graph, synthesize_inputs
from ...graph.ir import Graph, Node
from ...graph.verify import difference
from .rule import Env, Refusal, Rewrite, Rule, Why

RTOL = {"float16": 1e-2, "bfloat16": 8e-2, "float32": 2e-5, "float64": 1e-9}
"""Bound on ``max |a - b| / max |a|`` of a window by the narrowest float in it; integers and booleans must be equal."""
LARGE = {"float16": 30.0}
"""Factor of the large inputs (1000 otherwise): what it gives must still be representable."""
STEP = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-22, "float64": 2.0**-50}
"""Relative change of the inputs that tells how well the window determines its own results."""
SLACK = 16.0
"""A window may differ by this many times what it changes by itself when its inputs change by one rounding."""

Arrays = dict[str, np.ndarray]


def check_window(graph: Graph, rule: Rule, node: Node, found: Rewrite, env: Env) -> Refusal | None:
    """Make the rewrite on a copy of its window and compare the numbers before and after; None where they agree.

    The inputs are random, negative, zero and large ones, and random ones under other symbolic sizes. A window whose
    own results move by as much when its inputs move by one rounding is given that much (ill-conditioned statistics).

    Returns:
        A refusal (``Why.WINDOW``) that names rule, nodes, kind of input and error; also where the window cannot be
        cut out, the rule does not find there what it found in the whole graph, or nothing can be run.
    """
    names = [n.name for n in found.nodes]
    try:
        before = graph.extract([node, *(n for n in found.nodes if n is not node)], readers=True)
        inputs = list(_inputs(before, env.ctx.seed))  # now: a rewrite that fixes a symbolic size does so everywhere
        after = before.clone()
        again = rule.match(after.node(node.name), Env(after, env.ctx, layers_only=env.layers_only))
        if not isinstance(again, Rewrite):
            why = again.reason if isinstance(again, Refusal) else "nothing is found there"
            return _refusal(rule, names, f"the rule does not apply to its window alone: {why}")
        from .engine import erase_dead

        again.apply(after)
        erase_dead(after, again.nodes)
        after.refresh()
    except FoldlineError as exc:
        return _refusal(rule, names, f"the window cannot be checked alone: {exc.message}")
    return _compare(before, after, inputs, rule, names, env.ctx.seed)


def _narrowest(graph: Graph) -> str:
    """The float dtype of the graph that has the fewest bits."""
    floats = [v.dtype for v in graph.values.values() if v.dtype in RTOL]
    return max(floats, key=lambda d: RTOL[d], default="float32")


def _compare(
    before: Graph, after: Graph, inputs: Sequence[tuple[str, Arrays]], rule: Rule, names: list[str], seed: int
) -> Refusal | None:
    narrow = _narrowest(before)
    scales: list[float] = []
    checked = 0
    for kind, arrays in inputs:
        try:
            a_list = _run(before, arrays)
        except FoldlineError as exc:  # the window itself takes no such input (an index out of range, another size)
            if kind == "random":
                return _refusal(rule, names, f"the window cannot be run alone: {exc.message}")
            continue
        try:
            b_list = _run(after, arrays)
        except FoldlineError as exc:
            return _refusal(rule, names, f"after the rewrite the window does not run: {exc.message}", kind)
        scales = scales or [_peak(a) for a in a_list]
        for i, (a, b) in enumerate(zip(a_list, b_list, strict=True)):
            error = _error(a, b, scales[i] if kind != "large" else 0.0)
            if error > RTOL[narrow] and error > SLACK * _condition(before, arrays, i, a, narrow, seed, scales[i]):
                name = before.outputs[i].name.removesuffix("_read")
                return _refusal(rule, names, f"{name} differs by {error:.3g} on {kind} inputs", kind, error)
        checked += 1
    if before.outputs and not checked:
        return _refusal(rule, names, "there are no inputs on which the window could be run")
    return None


def _refusal(rule: Rule, names: list[str], what: str, kind: str = "", error: float | None = None) -> Refusal:
    text = f"window check of {rule.name} on {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}: {what}"
    return Refusal(text, why=Why.WINDOW, data={"nodes": names, "inputs": kind, "error": error})


def _inputs(graph: Graph, seed: int) -> Iterator[tuple[str, Arrays]]:
    """Kinds of inputs with arrays for each input of the window."""
    random = synthesize_inputs(graph, seed)
    yield "random", random
    if any(_is_float(x) for x in random.values()):
        large = LARGE.get(_narrowest(graph), 1e3)
        yield "negative", _each_float(random, lambda x: -np.abs(x))
        yield "zero", _each_float(random, np.zeros_like)
        yield "large", _each_float(random, lambda x: (x.astype(np.float64) * large).astype(x.dtype))
    sizes = graph.other_sizes()
    if sizes:
        yield "resized", synthesize_inputs(graph, seed, sizes=sizes)


def _each_float(arrays: Arrays, change: Callable[[np.ndarray], np.ndarray]) -> Arrays:
    return {name: change(x) if _is_float(x) else x for name, x in arrays.items()}


def _is_float(x: np.ndarray) -> bool:
    return x.dtype.name in RTOL


def _run(graph: Graph, arrays: Arrays) -> list[np.ndarray]:
    return run_graph(graph, arrays)[0] if graph.outputs else []


def _peak(a: np.ndarray) -> float:
    wide = np.asarray(a, dtype=np.float64) if _is_float(a) else np.zeros(0)
    wide = wide[np.isfinite(wide)]
    return float(np.abs(wide).max()) if wide.size else 0.0


def _error(a: np.ndarray, b: np.ndarray, scale: float) -> float:
    """``max |a - b|`` over the larger of ``max |a|`` and ``scale``; inf where the two cannot be compared."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if not a.size or np.array_equal(a, b):
        return 0.0
    if not _is_float(a):
        return math.inf
    absolute, relative, note = difference(a, b)
    if note:
        return math.inf
    return min(relative, absolute / scale) if scale > 0 else relative


def _condition(graph: Graph, arrays: Arrays, i: int, a: np.ndarray, narrow: str, seed: int, scale: float) -> float:
    """How much output ``i`` of the window changes when its inputs change by one rounding."""
    rng = np.random.default_rng([seed, zlib.crc32(graph.outputs[i].name.encode())])

    def nudge(x: np.ndarray) -> np.ndarray:
        return (x.astype(np.float64) * (1 + STEP[narrow] * rng.choice((-1.0, 1.0), size=x.shape))).astype(x.dtype)

    error = _error(a, _run(graph, _each_float(arrays, nudge))[i], scale)
    return 0.0 if math.isinf(error) else error
