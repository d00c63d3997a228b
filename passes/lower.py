"""Lower: hand the graph to a backend, which makes something that runs on its target."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from pydantic import Field

from ..graph.errors import ConfigError
from ..graph.ir import Graph
from ..graph.load import load
from .backend import backend as resolve_backend
from .base import BackendLike, Context, Contract, Decision, Outcome, Pass, nearest


class Lower(Pass):
    """Lower the model to a backend; ``result.artifact`` is what it made.

    The graph stays as it is: the backend's own numerics are its business, so the contract is APPROXIMATE and the
    artifact's outputs are compared with the graph's where it can run. What the backend says about single nodes
    becomes decisions.
    """

    name: ClassVar[str] = "lower"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    establishes: ClassVar[frozenset[str]] = frozenset({"lowered"})
    edits: ClassVar[bool] = False

    backend: str
    """Name of the target, e.g. onnxruntime (`foldline check MODEL --target NAME` tries one)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the backend's lower()."""

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
        """Check the graph against the backend's spec and lower it.

        Raises:
            BackendError: the backend refuses or fails; names the target and what it said.
        """
        backend = ctx.backends(self.backend)
        decisions = [
            Decision(
                subject=str(getattr(found, "node", None) or graph.name),
                action=str(getattr(found, "severity", "noted")),
                reason=str(getattr(found, "message", found)),
            )
            for found in backend.check(graph)
        ]
        artifact = backend.lower(graph, ctx.example_inputs, **self.options)
        details: dict[str, Any] = {"backend": self.backend}
        return Outcome(decisions=decisions, details=details, artifact=artifact)


def check(model: Any, target: str, example_inputs: Any = None) -> list[Any]:
    """What a backend would refuse or handle badly in a model, without lowering it.

    Args:
        model, example_inputs: anything ``fl.load`` takes.
        target: name of the backend.

    Returns:
        The backend's diagnostics, with node names; empty when there is nothing to say.

    Raises:
        ConfigError: there is no such backend.
    """
    found = resolve_backend(target)
    return found.check(load(model, example_inputs))
