"""Finding the first rewrite that breaks a tolerance: binary search over how many rewrites a pipeline may make."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...graph.errors import ConfigError, FoldlineError
from ...graph.ir import Graph
from ...graph.load import load
from ...graph.verify import compare
from ..backend import backend
from ..base import Context, Decision, Fuel
from ..checks import Inputs, check_graph, default_rtol
from ..order import START, after
from ..pipeline import Pipeline


@dataclass
class Culprit:
    """The rewrite that broke the tolerance.

    Attributes:
        index: its number, from 1, in the order in which the pipeline makes them; total: how many it makes.
        rule: name of the rule, ``nodes``: names of the nodes of its window, ``reason``: what it said.
        error: largest ``max |a - b| / max |a|`` of any output with it; ``before``: the same without it.
        value: the first value that differs, or the worst output; note: why the outputs cannot be compared.
    """

    index: int
    total: int
    rule: str
    nodes: list[str]
    reason: str
    error: float
    before: float
    value: str = ""
    note: str = ""


def bisect(
    model: Any, pipeline: Pipeline, example_inputs: Any = None, *, tolerance: float | None = None
) -> Culprit | None:
    """The first rewrite after which the model differs from itself by more than ``tolerance``; None if none does.

    The passes run again and again with fewer or more rewrites allowed (all passes share the count), about log2 of
    their number times, without their own checks. The outputs are compared on the example inputs and on made-up ones.

    Args:
        model: anything ``fl.load`` takes; it is left as it was.
        pipeline: passes that follow rules (``fold``, ``clean``); others run as they are and count no rewrites.
        example_inputs: one call's arguments; modules need them.
        tolerance: bound on ``max |a - b| / max |a|``; the bound of exact passes (1e-5 in fp32) if None.

    Raises:
        ConfigError: the model differs although no rewrite was made: another pass of the pipeline changes it.
        FoldlineError: from the front end or a pass.
    """
    given = load(model, example_inputs)
    inputs = Inputs(given, example_inputs, pipeline.seed)
    bound = default_rtol(given) if tolerance is None else tolerance

    def attempt(limit: int | None) -> tuple[float, str, str, list[Decision]]:
        graph, made = _run(given, pipeline, example_inputs, limit)
        try:
            check_graph(graph)
            found = compare(given, graph, inputs.arrays, bound)
        except FoldlineError as exc:
            return math.inf, str(exc.value or ""), exc.message, made
        worst = max(found.outputs.values(), key=lambda o: (bool(o.note), o.max_rel))
        error = math.inf if worst.note else worst.max_rel
        return error, found.first_divergence or worst.name, worst.note, made

    error, value, note, made = attempt(None)
    total = len(made)
    if error <= bound:
        return None
    low, high, before = 0, total, attempt(0)[0]
    if before > bound:
        raise ConfigError(
            "the outputs differ although no rewrite was made", expected=f"at most {bound:g}", found=f"{before:.3g}",
            hint="a pass of the pipeline changes the function by other means than rules",
        )  # fmt: skip
    while high - low > 1:  # good at low, bad at high
        middle = (low + high) // 2
        tried = attempt(middle)
        if tried[0] > bound:
            high, (error, value, note, made) = middle, tried
        else:
            low, before = middle, tried[0]
    last = made[high - 1]
    return Culprit(
        high, total, str(last.data.get("rule", "")), list(last.data.get("nodes", [])), last.reason, error, before,
        value, note,
    )  # fmt: skip


def _run(given: Graph, pipeline: Pipeline, example_inputs: Any, limit: int | None) -> tuple[Graph, list[Decision]]:
    """The graph after the pipeline with at most ``limit`` rewrites, and the rewrites made."""
    fuel = Fuel(limit)
    ctx = Context(
        example_inputs=example_inputs, seed=pipeline.seed, verify=False, facts=set(START), backends=backend,
        original=given, fuel=fuel,
    )  # fmt: skip
    graph = given
    for step in pipeline.passes:
        clone = graph.clone() if step.edits else graph
        ctx.untouched = graph
        outcome = step.apply(clone, ctx)
        graph = outcome.graph or clone
        ctx.facts = set(after(frozenset(ctx.facts), step))
    return graph, fuel.taken
