"""What a pass is: its contract, its needs, the facts it relies on, what it is given and what it returns."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError

from ..graph.errors import ConfigError
from ..graph.ir import Graph

if TYPE_CHECKING:
    from ..graph.actions import Plan
    from .result import Result

Progress: TypeAlias = Callable[[Iterable[Any], str], Iterable[Any]]
"""Wraps an iterable to show how far it is: ``for batch in ctx.progress(batches, "calibrating"): ...``."""


class Contract(StrEnum):
    """What a pass promises about the function that the model computes."""

    EXACT = "exact"
    """The function is preserved; the pipeline verifies it to a relative 1e-5 in fp32."""
    APPROXIMATE = "approximate"
    """The function changes a little; the pipeline measures by how much, per output."""
    FRESH = "fresh"
    """The function is deliberately new (reinitialised, grown at random, trained)."""


class Needs(StrEnum):
    """What a pass needs besides the model."""

    NOTHING = "nothing"
    CALIBRATION = "calibration"
    """Batches of typical inputs."""
    GRADIENTS = "gradients"
    """Batches and a loss."""
    TRAINING = "training"
    """The user's own training loop."""


class BackendLike(Protocol):
    """The part of a backend that passes may use; the concrete ones live in the outer room ``backends``."""

    name: str
    spec: Any

    def check(self, graph: Graph) -> list[Any]: ...

    def lower(self, graph: Graph, example_inputs: Any = None, **options: Any) -> Any: ...

    def node_times(
        self, graph: Graph, example_inputs: Any = None, *, runs: int = 20, artifact: Any = None, **options: Any
    ) -> dict[str, float]: ...


BackendResolver: TypeAlias = Callable[[str], BackendLike]
"""Name of a target -> its backend. Injected by the pipeline's caller: passes know no concrete backend."""


@dataclass
class Decision:
    """One thing a pass did or refused to do, and why.

    Attributes:
        subject: the node, weight, layer or axis group concerned (its name, so that ``report.explain`` finds it).
        action: what happened, one or two words in the past tense (``"folded"``, ``"kept"``, ``"refused"``).
        reason: why, one sentence.
        data: numbers that belong to it (plain Python or numpy data).
    """

    subject: str
    action: str
    reason: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """What a pass returns.

    Attributes:
        decisions: what happened to which part, and why.
        details: facts for the report; ``details["groups"]``, a list of ``{name, size, kept, reason}``, and
            ``details["latency"]``, ``{before_ms, after_ms}``, are drawn.
        plan: what was selected, a ``graph.actions.Plan`` or its data ``{weight: {axis: kept indices}}``; None where
            nothing was selected.
        artifact: what a backend made.
        graph: a replacement for the graph the pass was given, where it made a new one instead of editing.
        comparison: errors the pass measured itself (as ``Comparison.to_dict()``), where the pipeline cannot.
    """

    decisions: list[Decision] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    plan: Any | None = None
    artifact: Any | None = None
    graph: Graph | None = None
    comparison: dict[str, Any] | None = None


def no_progress(items: Iterable[Any], label: str) -> Iterable[Any]:
    """The silent progress wrapper: the items themselves."""
    return items


def no_backends(name: str) -> BackendLike:
    """The resolver used where nobody injected one."""
    raise ConfigError("no backend resolver was given", node=name, hint="run the pass through fl.Pipeline")


@dataclass
class Reference:
    """The graph as it was before the first pass that cut it, and what has been selected since, in its terms.

    Passes that repair a cut (recovery, distillation) compare with it. The graph shares its weights with the run's.
    """

    graph: Graph
    plan: Plan


@dataclass
class Fuel:
    """How many rewrites the passes of a run may make, all together; ``taken`` tells which they made.

    A model that comes out wrong is right with no rewrite and wrong with all of them: see :mod:`..rewrite.bisect`.

    Attributes:
        limit: the number; None: no limit.
        taken: one decision per rewrite, in order.
    """

    limit: int | None = None
    taken: list[Decision] = field(default_factory=list)

    @property
    def left(self) -> bool:
        """Whether another rewrite may be made."""
        return self.limit is None or len(self.taken) < self.limit

    def take(self, decision: Decision) -> None:
        """Count one rewrite that is about to be made."""
        self.taken.append(decision)


@dataclass
class Context:
    """What the pipeline hands a pass besides the graph.

    Attributes:
        example_inputs: one call's arguments in the form that ``Graph.bind`` takes, or None.
        calibration: the run's batches (same form each), or None; read it with :meth:`Pass.batches`.
        seed: seed of every random choice; same seed, same bytes.
        verify: whether the caller wants numerical checks.
        progress: wraps long loops, ``progress(items, label)``.
        facts: what holds of the graph now (``"float"`` at the start; see ``Pass.establishes``).
        backends: name of a target -> its backend.
        original: the graph of the model that came in.
        inplace: whether the result goes back into the caller's module, which must then keep its class.
        untouched: the graph as it is before the pass that is running, whose clone ``apply`` edits.
        reference: what a pass that selects leaves for those that repair; None while nothing was cut.
        unquantized: the graph as it was before the first pass that quantized it, for those that correct or judge
            the result; None while it is float. It shares its weights with the run's.
        last: no pass comes after this one: nothing need be left for it.
        spare: nobody needs the graph as it was loaded: the one pass of the run edits it, and no clone.
        fuel: limits the rewrites of the passes that follow rules; None: no limit, nothing is counted.
        float_nodes: names of nodes that a pass inserted to compute in float whatever the target (the small products in
            front of a layer that flatten its inputs for quantization).
    """

    example_inputs: Any = None
    calibration: Any | None = None
    seed: int = 0
    verify: bool = True
    progress: Progress = no_progress
    facts: set[str] = field(default_factory=lambda: {"float"})
    backends: BackendResolver = no_backends
    original: Graph | None = None
    inplace: bool = False
    untouched: Graph | None = None
    reference: Reference | None = None
    unquantized: Graph | None = None
    last: bool = False
    spare: bool = False
    fuel: Fuel | None = None
    float_nodes: set[str] = field(default_factory=set)


class Pass(BaseModel):
    """One thing that can be done to a model. Fields are its options; the class says what it promises and needs.

    A concrete pass sets the class variables and writes :meth:`apply`. It edits the graph it is given: that graph is
    a clone, which the pipeline drops when the pass raises, so a pass need not undo anything.

    Class variables:
        name: how pipelines, the registry and the command line call it.
        contract: what it promises about the function (an instance may override :meth:`promise`).
        needs: what it needs besides the model.
        requires: facts that must hold before it (``"float"``: no quantization has been inserted).
        establishes, invalidates: facts that hold, or cease to hold, after it.
        edits: False for a pass that only reads the graph (it is then given the graph itself, not a clone).
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, frozen=True, use_attribute_docstrings=True)

    name: ClassVar[str] = ""
    contract: ClassVar[Contract] = Contract.EXACT
    needs: ClassVar[Needs] = Needs.NOTHING
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()
    invalidates: ClassVar[frozenset[str]] = frozenset()
    edits: ClassVar[bool] = True

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as exc:
            raise config_error(exc, type(self), f"pass {type(self).name!r}") from exc

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        """Edit ``graph`` in place (or return a replacement in ``Outcome.graph``) and say what was done.

        Raises:
            FoldlineError: naming node, value, expected, found and hint; the pipeline adds the pass.
        """
        raise NotImplementedError(f"pass {type(self).__name__} does not define apply()")

    def prepare(self, ctx: Context) -> None:
        """Cheap checks of the options before any model is loaded (does the target exist, can the function be found).

        Raises:
            FoldlineError: the pass could not run whatever the model.
        """

    def promise(self) -> Contract:
        """The contract under the options chosen; the class's own unless a subclass decides otherwise."""
        return self.contract

    def requirement(self) -> Needs:
        """What it needs under the options chosen; the class's own unless a subclass decides otherwise."""
        return self.needs

    def verified(self) -> bool:
        """Whether the pipeline compares the model before and after it (where the run is verified at all)."""
        return True

    def selects_only(self) -> bool:
        """Whether, under these options, it does nothing but select indices by weights and shapes.

        The graph of one recorded call is then enough: the pipeline captures a module cheaply if all its passes say so.
        """
        return False

    def batches(self, ctx: Context) -> Any:
        """The calibration batches: the pass's own option ``calibration`` if it has one, else those of the run.

        Raises:
            ConfigError: there are none.
        """
        own = getattr(self, "calibration", None)
        found = ctx.calibration if own is None else own
        if found is None:
            raise ConfigError(
                f"pass {self.name!r} needs calibration data",
                node=self.name,
                expected="an iterable of batches in the form the model is called with",
                found=None,
                hint="pass calibration=batches to the pass, to run(...), or --calibration on the command line",
            )
        return found


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that looks most like ``word``, or None when nothing comes close."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return found[0] if found else None


def config_error(exc: ValidationError, model: type[BaseModel], owner: str) -> ConfigError:
    """A pydantic ValidationError as a ConfigError that names the key and, for an unknown one, the nearest valid one."""
    problems = exc.errors(include_url=False)
    # A misspelt required option is both unknown and missing: the first says more.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    key = ".".join(str(part) for part in problem["loc"])
    said = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        options = sorted(model.model_fields)
        close = nearest(str(problem["loc"][-1]), options)
        return ConfigError(
            f"{owner} has no option {key!r}",
            node=key,
            expected=", ".join(options) or "no options",
            found=key,
            hint=f"did you mean {close!r}?" if close else "`foldline passes NAME` lists the options",
        )
    described = model.model_fields.get(str(problem["loc"][0])) if problem["loc"] else None
    if not key:  # the options contradict each other
        name = getattr(model, "name", None) or owner
        return ConfigError(f"{owner}: {said}", node=name, value=repr(problem.get("input"))[:120])
    return ConfigError(
        f"{owner}: invalid option {key!r}",
        node=key,
        value=repr(problem.get("input"))[:120],
        expected=said,
        hint=described.description if described is not None else None,
    )


RUN_OPTIONS = ("calibration", "verify", "seed", "inplace", "progress")


def as_function(cls: type[Pass]) -> Callable[..., Result]:
    """A pass as a function: ``prune(model, example_inputs, ratio=0.5)`` runs a pipeline of that one pass.

    The function takes ``model`` (anything ``fl.load`` takes), ``example_inputs``, the run's own options
    (``calibration``, ``verify``, ``seed``, ``inplace``, ``progress``) and the options of the pass. It returns a
    :class:`~foldline.passes.result.Result`.
    """

    def function(
        model: Any,
        example_inputs: Any = None,
        *,
        calibration: Any = None,
        verify: bool | str = True,
        seed: int = 0,
        inplace: bool = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> Result:
        from .pipeline import Pipeline

        if isinstance(verify, str):  # a word is the option of the pass, which says how; the run is then verified
            options["verify"], verify = verify, True
        pipe = Pipeline([cls(**options)], seed=seed, name=cls.name)
        return pipe.run(
            model, example_inputs, calibration=calibration, verify=verify, inplace=inplace, progress=progress
        )

    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    for key, info in cls.model_fields.items():
        if key not in RUN_OPTIONS:
            default = inspect.Parameter.empty if info.is_required() else info.get_default(call_default_factory=True)
            parameters.append(inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default))
    function.__name__ = function.__qualname__ = cls.name
    function.__doc__ = f"{inspect.getdoc(cls) or cls.name}\n\nRuns on a model of any kind and returns a Result."
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return function
