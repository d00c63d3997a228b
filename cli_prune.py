"""The command `foldline prune`: one structured pruning from options, or a plan made earlier, without a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .graph.errors import ConfigError

Ratio = Annotated[float | None, typer.Option(help="Share of each prunable axis that goes, between 0 and 1.")]
Goal = Annotated[
    str | None,
    typer.Option("--target", help="What is to remain instead: macs=0.5, params=0.5, bytes=1e6, latency=0.6."),
]
Criterion = Annotated[str | None, typer.Option(help="How indices are judged; `foldline passes prune` lists them.")]
Scope = Annotated[str | None, typer.Option(help="uniform, global, isomorphic, layerwise or auto.")]
Round = Annotated[int | None, typer.Option("--round-to", min=1, help="Cut axes stay multiples of this.")]
MinKeep = Annotated[int | None, typer.Option("--min-keep", min=1, help="Indices that each group keeps at least.")]
Ignore = Annotated[list[str] | None, typer.Option(help="Name pattern whose groups stay whole; may be repeated.")]
Atoms = Annotated[list[str] | None, typer.Option(help="outer, all, or a kind (heads, ffn ...); may be repeated.")]
Equal = Annotated[bool, typer.Option("--equal", help="Groups of one kind and size keep equally many indices.")]
PlanFile = Annotated[Path | None, typer.Option(metavar="PLAN", help="A plan.json to apply, instead of choosing anew.")]


def prune_step(plan: Path | None, target: str | None, **options: Any) -> Any:
    """The pass that the options ask for: Select with a plan, else Prune.

    Raises:
        ConfigError: a plan together with other options, or an option that the pass refuses.
        ConstraintError: a ratio out of range, or a plan that cannot be read.
    """
    from .passes.prune import Prune
    from .passes.prune.select_pass import Select

    given = {k: v for k, v in options.items() if v is not None and v is not False}
    if plan is not None:
        if given or target is not None:
            raise ConfigError(
                "a plan already says what is kept",
                node="--plan",
                found="--" + next(iter([*given, "target"])).replace("_", "-"),
                hint="give --plan alone, or leave it out",
            )
        return Select(plan=plan)
    if "atoms" in given and len(given["atoms"]) == 1:
        given["atoms"] = given["atoms"][0]
    if target is not None:
        given["target"] = dict([target.split("=", 1)]) if "=" in target else target
    return Prune(**given)
