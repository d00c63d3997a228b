"""Pipeline: runs passes in order on a clone, checks every promise, and leaves everything as it was on failure."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..graph.actions import Plan
from ..graph.errors import ConfigError, ConstraintError, FoldlineError
from ..graph.garbage import undisturbed
from ..graph.ir import Graph
from ..graph.version import VERSION
from . import config, registry
from .backend import backend
from .base import Context, Contract, Needs, Outcome, Pass, Progress, no_progress
from .checks import Inputs, Measurement, check_graph, measure
from .inplace import is_module, put
from .meter import Meter
from .order import START, after, check_order
from .plan import complete, compose, sizes
from .report import CostSummary, PassRecord, Report
from .result import Result

LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxruntime", "numpy")


class Pipeline:
    """Passes in order, validated when built: unknown options and an illegal order are found before any model.

    Args:
        passes: the passes.
        seed: seed of every random choice; same model and seed, same bytes.
        name: what the report calls it.

    Raises:
        ConfigError: no passes, or something that is not a pass.
        ConstraintError: a pass comes before what it requires, or after what undoes it.
    """

    def __init__(self, passes: Sequence[Pass], *, seed: int = 0, name: str = "pipeline") -> None:
        self.passes: tuple[Pass, ...] = tuple(passes)
        self.seed = seed
        self.name = name
        if not self.passes:
            raise ConfigError("a pipeline needs at least one pass", node="passes", expected="a list of passes")
        for i, step in enumerate(self.passes):
            if not isinstance(step, Pass):
                hint = f"write {step.__name__}() with parentheses" if isinstance(step, type) else None
                raise ConfigError("not a pass", node=f"passes[{i}]", value=step, expected="a Pass", hint=hint)
        check_order(self.passes)

    def __repr__(self) -> str:
        return f"Pipeline([{', '.join(map(repr, self.passes))}], seed={self.seed}, name={self.name!r})"

    # ---- as data -------------------------------------------------------------------------------------------
    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Pipeline:
        """The pipeline described by ``{name, seed, passes: [name | {name: options}]}``; see :meth:`json_schema`."""
        name, seed, passes = config.parse(data)
        return cls(passes, seed=seed, name=name)

    @classmethod
    def named(cls, spec: str | Path) -> Pipeline:
        """The pipeline of a file; or, where no such file exists, of the one pass of that name at its defaults.

        Raises:
            ConfigError: neither a file nor a pass (naming the nearest), or the file is no valid pipeline.
        """
        if Path(spec).exists() or Path(spec).suffix:
            return cls.from_file(spec)
        return cls([registry.get(str(spec))()], name=str(spec))

    @classmethod
    def from_file(cls, path: str | Path) -> Pipeline:
        """The pipeline in a .yaml, .yml, .json or .toml file.

        Raises:
            ConfigError: naming the file, the key and the nearest valid one.
            ConstraintError: an illegal order.
        """
        data = config.read(path)
        try:
            return cls.from_dict({"name": Path(path).stem, **data})
        except FoldlineError as exc:
            exc.message = f"{path}: {exc.message}"
            raise

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :meth:`from_dict` reads back.

        Raises:
            ConfigError: an option is a Python object without a text form (it is named).
        """
        return config.dump(self.name, self.seed, self.passes)

    def to_yaml(self) -> str:
        """:meth:`to_dict` as YAML text."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """JSON schema of pipeline files, over all registered passes."""
        return config.json_schema()

    # ---- running -------------------------------------------------------------------------------------------
    def run(
        self,
        model: Any,
        example_inputs: Any = None,
        *,
        calibration: Any = None,
        verify: bool = True,
        inplace: bool = False,
        progress: Progress | None = None,
        rtol: float | None = None,
    ) -> Result:
        """Run all passes.

        Args:
            model: anything ``fl.load`` takes; it is left as it was unless ``inplace``.
            example_inputs: one call's arguments; modules need them, ONNX models may do without.
            calibration: iterable of batches (same form), for passes that need data and have none of their own.
            verify: check EXACT passes and measure the others on the example inputs and on synthesised ones.
            inplace: put the resulting weights and attributes into the caller's nn.Module.
            progress: wraps long loops, ``progress(items, label)``.
            rtol: bound of EXACT checks, ``max |a - b| / max |a|``; 1e-5 for fp32, wider for half precision, if None.

        Raises:
            FoldlineError: from a pass (its name in ``pass_name``), a check, or the front end. The caller's model
                and files are then as they were.
        """
        from ..graph.load import load

        if inplace and not is_module(model):
            raise ConfigError("only an nn.Module can be changed in place", found=type(model).__name__)
        ctx = Context(
            example_inputs=example_inputs,
            calibration=calibration,
            seed=self.seed,
            verify=verify,
            progress=progress or no_progress,
            facts=set(START),
            backends=backend,
            inplace=inplace,
        )
        self._prepare(ctx)
        brief = calibration is None and all(step.selects_only() for step in self.passes)
        with undisturbed() if brief or (calibration is None and self._builds_once(model)) else nullcontext():
            graph = load(model, example_inputs, static=brief)
            # one pass, and nothing to compare with: it may edit what was loaded for it alone (a module's captured
            # program shares more with the module than a recorded call does)
            alone = graph is not model and (brief or graph.kind == "onnx")
            ctx.spare = alone and not verify and len(self.passes) == 1
            return self._run(graph, model, ctx, inplace, rtol)

    def _builds_once(self, model: Any) -> bool:
        """Whether a run makes little but what lives on: one pass over an ONNX model, without data."""
        from ..graph.load import is_onnx_model

        native = is_onnx_model(model) or (isinstance(model, (str, Path)) and Path(model).suffix.lower() == ".onnx")
        return native and len(self.passes) == 1 and self.passes[0].requirement() is Needs.NOTHING

    def _run(self, graph: Graph, model: Any, ctx: Context, inplace: bool, rtol: float | None) -> Result:
        verify, calibration, example_inputs = ctx.verify, ctx.calibration, ctx.example_inputs
        given, start = graph, _cost(graph)
        ctx.original = given
        inputs = Inputs(graph, example_inputs, self.seed, calibration) if verify else None
        report = self._report(model, graph, start, verify)
        plans: list[Any] = []
        artifact, cost, edited_first = None, start, False
        for i, step in enumerate(self.passes):
            new, outcome, record = self._one(i, step, graph, ctx, inputs, cost, rtol)
            graph, cost = new, record.after
            ctx.facts = set(after(frozenset(ctx.facts), step))
            report.passes.append(record)
            artifact = outcome.artifact if outcome.artifact is not None else artifact
            if outcome.plan is not None:
                plans.append(outcome.plan)
            edited_first = edited_first or (not plans and new is not given)
        report.after = cost
        if inputs is not None:
            report.notes += inputs.notes
            report.comparison = _overall(report, given, graph, inputs)
        plan = plans[0] if ctx.spare and plans else self._plan(plans, given, edited_first, report) if plans else None
        result_model = graph.to_model()
        report.notes += [note for note in graph.notes if note not in report.notes]
        if inplace:
            result_model = put(model, result_model)
        return Result(model=result_model, graph=graph, report=report, pipeline=self, plan=plan, artifact=artifact)

    def _prepare(self, ctx: Context) -> None:
        """Everything that can be found wrong before a model is loaded."""
        for i, step in enumerate(self.passes):
            try:
                step.prepare(ctx)
                if step.requirement() is Needs.CALIBRATION:
                    step.batches(ctx)
            except FoldlineError as exc:
                self._blame(exc, i, step)
                raise

    def _blame(self, exc: FoldlineError, i: int, step: Pass) -> None:
        """Let the error carry the pass it came from."""
        if exc.pass_name is None:
            exc.pass_name = f"{step.name} ({i + 1} of {len(self.passes)})"
            exc.args = (str(exc),)

    def _one(
        self,
        i: int,
        step: Pass,
        graph: Graph,
        ctx: Context,
        inputs: Inputs | None,
        before: CostSummary,
        rtol: float | None,
    ) -> tuple[Graph, Outcome, PassRecord]:
        """Run one pass on a clone and check what came of it."""
        checking = Meter(memory=False)
        try:
            with Meter() as meter:
                ctx.last = i + 1 == len(self.passes)
                clone = graph.clone() if step.edits and not ctx.spare else graph
                ctx.untouched = None if ctx.spare else graph
                if "float" in ctx.facts and "quantized" in step.establishes and not ctx.last:
                    ctx.unquantized = graph
                outcome = step.apply(clone, ctx)
            new = outcome.graph or clone
            with checking:
                check_graph(new)
                measured = _measure(step, graph, new, inputs, rtol, outcome)
                cost = before if new is graph and not ctx.spare else _cost(new)
        except FoldlineError as exc:
            self._blame(exc, i, step)
            raise
        except Exception as exc:
            exc.add_note(f"in pass {step.name!r} ({i + 1} of {len(self.passes)}) of pipeline {self.name!r}")
            raise
        record = PassRecord(
            name=step.name,
            options={key: str(value) for key, value in config.chosen(step).items()},
            contract=step.promise().value,
            needs=step.requirement().value,
            before=before,
            after=cost,
            seconds=meter.seconds,
            check_seconds=checking.seconds,
            peak_bytes=meter.peak_bytes,
            comparison=measured.comparison,
            compared_on=measured.on,
            why_not=measured.why_not or measured.note,
            decisions=outcome.decisions,
            details=outcome.details,
            layers=measured.layers,
            selected=sizes(outcome.plan, graph),
        )
        return new, outcome, record

    def _plan(self, plans: list[Any], given: Graph, edited_first: bool, report: Report) -> Plan:
        """The plans of all passes as one, for the model that came in."""
        plan = compose(plans, given)
        if not edited_first:
            return plan
        try:
            return complete(plan, given)
        except ConstraintError as exc:
            report.notes.append(f"the plan lists only weights that the selecting pass saw: {exc.message}")
            return plan

    def _report(self, given: Any, graph: Graph, cost: CostSummary, verify: bool) -> Report:
        names = {*graph.weights, *(n.name for n in graph.nodes), *(n.scope for n in graph.nodes if n.scope)}
        model = {
            "name": Path(given).stem if isinstance(given, (str, Path)) else graph.name,
            "kind": graph.kind,
            "inputs": [_signature(v) for v in graph.inputs],
            "outputs": [_signature(v) for v in graph.outputs],
        }
        return Report(
            pipeline=self.name,
            seed=self.seed,
            verify=verify,
            model=model,
            versions=_versions(),
            before=cost,
            after=cost,
            notes=list(graph.notes),
            names=frozenset(names),
        )


def _cost(graph: Graph) -> CostSummary:
    from ..graph.cost import cost

    return CostSummary.of(cost(graph))


def _signature(value: Any) -> dict[str, Any]:
    return {"name": value.name, "shape": None if value.shape is None else list(value.shape), "dtype": value.dtype}


def _versions() -> dict[str, str]:
    found = {"foldline": VERSION, "python": platform.python_version()}
    return {**found, **{name: _version(name) for name in LIBRARIES}}


@cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _measure(
    step: Pass, before: Graph, after: Graph, inputs: Inputs | None, rtol: float | None, outcome: Outcome
) -> Measurement:
    if outcome.comparison is not None:
        return Measurement(outcome.comparison, ["example" if inputs is None else inputs.names[0]])
    if inputs is None or not step.verified():
        return Measurement(why_not="not verified")
    if after is before:
        return Measurement(why_not="graph unchanged")
    return measure(before, after, inputs, exact=step.promise() is Contract.EXACT, rtol=rtol)


def _overall(report: Report, before: Graph, after: Graph, inputs: Inputs) -> dict[str, Any] | None:
    """The model that went out against the one that came in; the one pass's own numbers where only one compared."""
    changed = [r for r in report.passes if r.comparison is not None]
    if len(changed) <= 1:
        return changed[0].comparison if changed else None
    return measure(before, after, inputs, exact=False, rtol=None).comparison
