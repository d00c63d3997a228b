"""Options of `foldline run` about rewrites: how each is verified, and which one breaks a tolerance."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console

from .graph.errors import ConfigError


class Verify(StrEnum):
    """What the rewriting passes check."""

    WINDOW = "window"
    MODEL = "model"
    OFF = "off"


VerifyOption = Annotated[
    Verify | None,
    typer.Option("--verify", help="What fold and clean check: every rewrite on its window too, the model, nothing."),
]
Bisect = Annotated[
    bool, typer.Option("--bisect", help="Find the first rewrite that breaks --tolerance; nothing is saved.")
]
Tolerance = Annotated[
    float | None, typer.Option(min=0, help="Bound of --bisect on max |a - b| / max |a|; 1e-5 for fp32.")
]


def with_verify(pipeline: Any, verify: Verify) -> Any:
    """The pipeline with the option ``verify`` of every pass that has it.

    Raises:
        ConfigError: no pass has it.
    """
    from .passes.pipeline import Pipeline

    if not any("verify" in type(step).model_fields for step in pipeline.passes):
        raise ConfigError("no pass of the pipeline has the option verify", node=pipeline.name, expected="fold or clean")
    steps = [
        step.model_copy(update={"verify": verify.value}) if "verify" in type(step).model_fields else step
        for step in pipeline.passes
    ]
    return Pipeline(steps, seed=pipeline.seed, name=pipeline.name)


def show_culprit(pipeline: Any, model: Any, example: Any, tolerance: float | None, out: Console) -> bool:
    """Search, print what was found, and tell whether there was anything."""
    from .passes.rewrite.bisect import bisect

    found = bisect(model, pipeline, example, tolerance=tolerance)
    if found is None:
        out.print("no rewrite breaks the tolerance", highlight=False)
        return False
    error = found.note or f"{found.error:.3g} (max |a - b| / max |a|)"
    lines = [
        f"rewrite {found.index} of {found.total} is the first that breaks the tolerance",
        f"rule:   {found.rule}",
        f"nodes:  {', '.join(found.nodes)}",
        f"reason: {found.reason}",
        f"error:  {error}, first at {found.value}; before it {found.before:.3g}",
        f"`disable: [{found.rule}]` runs the pass without this rule",
    ]
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    return True
