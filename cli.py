"""The foldline command: run, prune, inspect, check, fix, diff, passes, version."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from .cli_models import ModelArgument, batches, example_inputs, load_model
from .cli_prune import Atoms, Criterion, Equal, Goal, Ignore, MinKeep, PlanFile, Ratio, Round, Scope, prune_step
from .cli_rewrite import Bisect, Tolerance, VerifyOption, show_culprit, with_verify
from .graph.errors import FoldlineError
from .graph.version import VERSION

app = typer.Typer(
    name="foldline",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# A pipe has no width of its own; 80 columns would wrap the names of layers.
out = Console(soft_wrap=False, width=None if sys.stdout.isatty() else 140)
err = Console(stderr=True)

Model = Annotated[str, typer.Argument(metavar="MODEL", help=ModelArgument)]
Shape = Annotated[
    list[str] | None,
    typer.Option("--input-shape", help="1x3x224x224, or NAME=1x3x224x224; once per input. Inputs are made up."),
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of every random choice.")]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Folder for the result.")]
Calibration = Annotated[
    Path | None,
    typer.Option(help="A .npz (arrays by input name, samples along axis 0) or a folder of .npy/.npz batches."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples per batch taken from a .npz.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Skip the numerical checks.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Do not print the report.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def progress(items: Iterable[Any], label: str) -> Iterable[Any]:
    """A progress bar on a terminal; nothing elsewhere."""
    if not err.is_terminal:
        return items
    from rich.progress import track

    return track(items, description=label, console=err, transient=True)


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from (any place).")] = False,
) -> None:
    """Prune, fold, quantize and lower PyTorch and ONNX models.

    Exit code 0: fine; 1: refused, failed or different; 2: wrong usage.
    """


@app.command()
def run(
    pipeline: Annotated[
        str,
        typer.Argument(metavar="PIPELINE", help="A .yaml, .json or .toml pipeline file, or the name of one pass."),
    ],
    model: Model,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="OUT", help="Folder for the result.")] = None,
    input_shape: Shape = None,
    calibration: Calibration = None,
    batch_size: BatchSize = 32,
    seed: Seed = None,
    no_verify: NoVerify = False,
    verify: VerifyOption = None,
    bisect: Bisect = False,
    tolerance: Tolerance = None,
    quiet: Quiet = False,
) -> None:
    """Run a pipeline, or one pass by its name (`foldline run fold m.onnx -o out`), and save the result and report."""
    from .passes.pipeline import Pipeline

    if output is None and not bisect:
        raise typer.BadParameter("a folder for the result is needed", param_hint="--output")
    pipe = Pipeline.named(pipeline)
    if seed is not None:
        pipe = Pipeline(pipe.passes, seed=seed, name=pipe.name)
    if verify is not None:
        pipe = with_verify(pipe, verify)
    if output is None or bisect:
        loaded, example = load_model(model)
        example = example_inputs(loaded, example, input_shape, pipe.seed)
        raise typer.Exit(int(show_culprit(pipe, loaded, example, tolerance, out)))
    data = None if calibration is None else batches(calibration, batch_size)
    _execute(pipe, model, output, input_shape, data, not no_verify, quiet)


@app.command()
def prune(
    model: Model,
    output: Output,
    ratio: Ratio = None,
    target: Goal = None,
    plan: PlanFile = None,
    criterion: Criterion = None,
    scope: Scope = None,
    round_to: Round = None,
    min_keep: MinKeep = None,
    ignore: Ignore = None,
    atoms: Atoms = None,
    equal: Equal = False,
    input_shape: Shape = None,
    calibration: Calibration = None,
    batch_size: BatchSize = 32,
    seed: Seed = None,
    no_verify: NoVerify = False,
    quiet: Quiet = False,
) -> None:
    """Prune a model by ratio, to a target, or as a plan says; save it with plan.json and report."""
    from .passes.pipeline import Pipeline

    step = prune_step(
        plan,
        target,
        ratio=ratio,
        criterion=criterion,
        scope=scope,
        round_to=round_to,
        min_keep=min_keep,
        ignore=ignore,
        atoms=atoms,
        equal=equal,
    )
    data = None if calibration is None else batches(calibration, batch_size)
    _execute(Pipeline([step], seed=seed or 0, name="prune"), model, output, input_shape, data, not no_verify, quiet)


@app.command()
def inspect(
    model: Model,
    input_shape: Shape = None,
    as_json: Json = False,
    top: Annotated[int, typer.Option(min=0, help="Nodes shown, the costliest; 0 shows all.")] = 20,
    everything: Annotated[bool, typer.Option("--all", help="Show kernel axes too.")] = False,
) -> None:
    """Show what a model costs, its axis groups, and which axes are frozen and why."""
    from .cli_show import cost_table, group_table, inspect_data
    from .graph.cost import cost
    from .graph.groups import axis_groups
    from .graph.load import load

    loaded, example = load_model(model)
    graph = load(loaded, example_inputs(loaded, example, input_shape, 0))
    found, groups = cost(graph), axis_groups(graph)
    if as_json:
        _print_json(inspect_data(graph, found, groups))
        return
    out.print(cost_table(graph, found, top))
    out.print(group_table(groups, everything))


@app.command()
def check(
    model: Model,
    target: Annotated[str, typer.Option("--target", "-t", help="Name of the backend.")],
    input_shape: Shape = None,
    as_json: Json = False,
) -> None:
    """Say what a target would refuse or run badly, without the target. Exit code 1 if there is an error."""
    from .backends.check import check as check_model

    loaded, example = load_model(model)
    found = check_model(loaded, target, example_inputs(loaded, example, input_shape, 0))
    if as_json:
        _print_json([d.to_dict() for d in found])
    elif not found:
        out.print(f"{target}: nothing to say about {model}", highlight=False)
    else:
        table = Table(title=f"{model} on {target}", title_justify="left")
        for heading in ("severity", "rule", "node", "message", "fix"):
            table.add_column(heading, overflow="fold")
        style = {"error": "red", "warning": "yellow"}
        for d in found:
            table.add_row(d.severity, d.rule, d.node, d.message, d.fix, style=style.get(d.severity, ""))
        out.print(table)
    if any(d.severity == "error" for d in found):
        raise typer.Exit(1)


@app.command()
def fix(
    model: Model,
    target: Annotated[str, typer.Option("--target", "-t", help="Name of the backend.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="The .onnx file to write.")],
    as_json: Json = False,
) -> None:
    """Apply the mechanical fixes for what check finds in an ONNX file. Exit code 1 if an error is left."""
    from .backends.fix import fix as fix_model
    from .graph.save import save

    fixed, report = fix_model(model, target)
    save(fixed, output)
    if as_json:
        _print_json(report.to_dict())
    else:
        out.print(str(report), markup=False, highlight=False)
    if any(d.severity == "error" for d in report.after):
        raise typer.Exit(1)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="The model to compare with.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The model to compare.")],
    input_shape: Shape = None,
    rtol: Annotated[float | None, typer.Option(min=0, help="Bound on max |a - b| / max |a|; 1e-5 for fp32.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of made-up inputs.")] = 0,
    as_json: Json = False,
) -> None:
    """Compare the outputs and costs of two models. Exit code 0: equal within the bound; 1: different."""
    from .cli_show import diff_tables
    from .graph.cost import cost
    from .graph.load import load
    from .graph.verify import compare
    from .passes.checks import Inputs, default_rtol

    one, example = load_model(a)
    two, other = load_model(b)
    example = example_inputs(one, example, input_shape, seed)
    before = load(one, example)
    after = load(two, example if other is None else other)
    found = compare(before, after, Inputs(before, example, seed).arrays, default_rtol(before) if rtol is None else rtol)
    costs = cost(before), cost(after)
    if as_json:
        _print_json({"comparison": found.to_dict(), "before": _totals(costs[0]), "after": _totals(costs[1])})
    else:
        for table in diff_tables(found, *costs):
            out.print(table)
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def passes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One pass: its options and documentation.")
    ] = None,
    as_json: Json = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of pipeline files.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/passes.md.")] = False,
) -> None:
    """List the passes, or describe one."""
    from .cli_show import pass_data, pass_details, pass_markdown, pass_table
    from .passes import config, registry

    if schema:
        _print_json(config.json_schema())
    elif markdown:
        sys.stdout.write(pass_markdown([registry.get(n) for n in registry.names()]))
    elif name is None:
        classes = [registry.get(n) for n in registry.names()]
        if as_json:
            _print_json([pass_data(cls) for cls in classes])
        else:
            out.print(pass_table(classes))
    elif as_json:
        _print_json(pass_data(registry.get(name)))
    else:
        for part in pass_details(registry.get(name)):
            out.print(part)


@app.command()
def version() -> None:
    """Print the version."""
    out.print(VERSION, highlight=False)


def _execute(
    pipe: Any, model: str, output: Path, shapes: list[str] | None, data: Any, verify: bool, quiet: bool
) -> None:
    loaded, example = load_model(model)
    example = example_inputs(loaded, example, shapes, pipe.seed)
    result = pipe.run(loaded, example, calibration=data, verify=verify, progress=progress)
    folder = result.save(output)
    if not quiet:
        out.print(result.report)
        out.print(f"\n{folder / 'report.html'}", highlight=False)


def _totals(found: Any) -> dict[str, int]:
    return {"parameters": found.parameters, "bytes": found.bytes, "macs": found.macs}


def _print_json(data: Any) -> None:
    from .passes.report import jsonable

    sys.stdout.write(json.dumps(jsonable(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def main(argv: list[str] | None = None) -> NoReturn:
    """The command: run ``argv`` (the process's arguments when None) and exit with 0, 1 or 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in arguments
    arguments = [a for a in arguments if a != "--traceback"]
    try:
        app(args=arguments, prog_name="foldline")
    except FoldlineError as exc:
        if traceback:
            raise
        err.print(f"[bold red]{type(exc).__name__}[/]: ", end="")
        err.print(str(exc), markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
    raise SystemExit(0)


if __name__ == "__main__":
    main()
