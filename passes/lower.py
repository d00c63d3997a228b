"""Lower: hand the graph to a backend, which makes something that runs on its target."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from pydantic import Field

from ..graph.errors import ConfigError
from ..graph.execute import run_graph, synthesize_inputs
from ..graph.ir import Graph
from .base import BackendLike, Context, Contract, Decision, Outcome, Pass, nearest
from .checks import compare_arrays


class Lower(Pass):
    """Lower the model to a backend; ``result.artifact`` is what it made.

    The graph stays as it is. The backend has numerics of its own, so the contract is APPROXIMATE: the artifact's
    outputs are compared with the graph's. What the backend says about single nodes becomes decisions.
    """

    name: ClassVar[str] = "lower"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    establishes: ClassVar[frozenset[str]] = frozenset({"lowered"})
    edits: ClassVar[bool] = False

    backend: str
    """Name of the target, e.g. onnxruntime (`foldline check MODEL --target NAME` tries one)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the backend's lower(); may be written beside these."""
    benchmark: bool = False
    """Time the result against the model that came in, lowered the same way; the report shows both."""

    def __init__(self, backend: str | None = None, **options: Any) -> None:
        if backend is not None:
            options["backend"] = backend
        own = {key: options.pop(key) for key in list(options) if key in type(self).model_fields}
        if options:
            own["options"] = {**own.get("options", {}), **options}
        super().__init__(**own)

    def prepare(self, ctx: Context) -> None:
        """The backend exists and knows the options."""
        self._check_options(ctx.backends(self.backend))

    def _check_options(self, backend: BackendLike) -> None:
        parameters = inspect.signature(backend.lower).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return
        known = [name for name in parameters if name not in ("graph", "example_inputs")]
        for key in self.options:
            if key not in known:
                close = nearest(key, known)
                raise ConfigError(
                    f"backend {self.backend!r} has no option {key!r}",
                    node=key,
                    expected=", ".join(known) or "no options",
                    found=key,
                    hint=f"did you mean {close!r}?" if close else None,
                )

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        """Lower the graph, check what the backend makes of it, and compare the artifact with the graph.

        Raises:
            BackendError: the backend refuses or fails; names the target and what it said.
        """
        backend = ctx.backends(self.backend)
        artifact = backend.lower(graph, ctx.example_inputs, **self.options)
        # What was lowered is at hand: judging it spares a second export.
        judge = getattr(backend, "check_lowered", None)
        decisions = [
            _decision(found, graph) for found in (backend.check(graph) if judge is None else judge(graph, artifact))
        ]
        details: dict[str, Any] = {"backend": self.backend}
        if hasattr(artifact, "facts"):
            details["artifact"] = artifact.facts()
        inputs = _inputs(graph, ctx) if ctx.verify or self.benchmark else None
        measured = None
        if ctx.verify and inputs is not None:
            expected, _ = run_graph(graph, inputs)
            names = [v.name for v in graph.outputs]
            measured = compare_arrays(names, expected, artifact.run(tuple(inputs.values())))
        if self.benchmark and inputs is not None:
            details["latency"] = self._latency(backend, artifact, inputs, ctx)
        return Outcome(decisions=decisions, details=details, artifact=artifact, comparison=measured)

    def _latency(self, backend: BackendLike, artifact: Any, inputs: dict[str, Any], ctx: Context) -> dict[str, float]:
        """Median milliseconds of the model that came in and of this one, timed in turn."""
        options = {key: value for key, value in self.options.items() if key != "path"}
        before = backend.lower(ctx.original, ctx.example_inputs, **options) if ctx.original is not None else None
        found = artifact.benchmark(against=before, inputs=tuple(inputs.values()))
        timed = {"after_ms": found["median_ms"], "after_spread_ms": found["spread_ms"]}
        if before is not None:
            timed = {"before_ms": found["against"]["median_ms"], **timed, "ratio": found["ratio"]}
        return timed


def _decision(found: Any, graph: Graph) -> Decision:
    fix = getattr(found, "fix", "")
    reason = f"{found.message} ({fix})" if fix else str(found.message)
    return Decision(found.node or graph.name, f"{found.severity}: {found.rule}", reason)


def _inputs(graph: Graph, ctx: Context) -> dict[str, Any]:
    """One call's inputs in the order of the graph's."""
    found = synthesize_inputs(graph, ctx.seed) if ctx.example_inputs is None else graph.bind(ctx.example_inputs)
    return {v.name: found[v.name] for v in graph.inputs}
