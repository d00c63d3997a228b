"""InsertAdapter: put adapters of one kind into a model; the base is frozen, the function mostly as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ...graph.errors import ConfigError, ConstraintError
from ...graph.ir import Graph
from ..base import Context, Contract, Decision, Needs, Outcome, Pass
from .kinds import AdapterKind, kind_of
from .weights_graph import WeightsGraph

if TYPE_CHECKING:
    from torch import nn

    from ..result import Result

EVIDENCE = {"gradient": "gradient", "eva": "inputs", "update_svd": "update"}
"""Initialisation -> what it needs gathered from data."""


class InsertAdapter(Pass):
    """Insert adapters of a registered kind on chosen weights; train the result in plain PyTorch; merge when done.

    On an ``nn.Module`` every layer keeps its place, its class (by a subclass of the same name) and the names of its
    parameters; the adapter is a submodule (``layer.weight_adapter.A``) whose parameters are the only ones that
    require gradients. On ONNX the adapter is a branch of nodes (low-rank kinds, IA3, SSF, bottlenecks).
    ``foldline.passes.adapters.kinds()`` lists the kinds with their papers; docs/adapters.md describes them.

    Exact (the function is preserved) except for ``init="update_svd"``, which is a training step.

    Raises:
        ConfigError: an unknown kind, option or pattern (the nearest is named), or missing calibration data.
        ConstraintError: a rank or block does not fit a weight (named).
    """

    name: ClassVar[str] = "insert_adapter"
    contract: ClassVar[Contract] = Contract.EXACT
    needs: ClassVar[Needs] = Needs.NOTHING
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    establishes: ClassVar[frozenset[str]] = frozenset({"adapters"})

    kind: str = "lora"
    """Name of the adapter kind."""
    targets: list[str] | dict[str, dict[str, Any]] | None = None
    """Patterns of layers, weights or modules (name, parts of it, or glob; ``qkv[1/3]`` or ``qkv[64:128]`` for some
    outputs), or pattern -> options of its own. None: every linear layer and convolution."""
    exclude: list[str] = Field(default_factory=list)
    """Patterns of what is left out."""
    rank: int | None = Field(None, ge=1)
    """Rank, for kinds that have one; the kind's default if None."""
    alpha: float | None = None
    """Scale alpha / rank, for kinds that have one; the kind's default scale if None."""
    init: str | None = None
    """Initialisation, for kinds that have several: zero, svd, gradient, eva; weight_svd, update_svd."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further options of the kind."""
    train: list[str] = Field(default_factory=list)
    """Patterns of base parameters that stay trainable (a new head)."""
    dtype: str | None = None
    """dtype of the adapter's tensors (``"float32"`` on a bfloat16 base); that of the weight if None."""
    allocate: bool = False
    """With ``init="eva"``: ranks by explained variance over all layers, rank times their number in sum."""
    calibration: Any = None
    """Batches for initialisations that look at data; the run's, if None."""
    loss: Any = None
    """(output, batch) -> scalar tensor, for gradients; ``module:function`` in files. batch is what was fed."""
    step: float = Field(1e-3, gt=0)
    """Step size of the first update, for ``init="update_svd"``."""

    def promise(self) -> Contract:
        kind = kind_of(self.kind)
        return Contract.EXACT if kind.keeps_function(self.chosen(kind)) else Contract.FRESH

    def requirement(self) -> Needs:
        return Needs.CALIBRATION if self.init in EVIDENCE else Needs.NOTHING

    def prepare(self, ctx: Context) -> None:
        """The kind and its options exist."""
        kind = kind_of(self.kind)
        kind.options(self.chosen(kind))
        if self.allocate and self.init != "eva":
            raise ConfigError("ranks are allocated with init='eva'", node="allocate", found=self.init)
        if self.init in ("gradient", "update_svd") and self.loss is None:
            raise ConfigError("this initialisation needs a loss", node="loss", expected="a function (output, batch)")

    def chosen(self, kind: AdapterKind) -> dict[str, Any]:
        """The kind's options as this pass sets them."""
        options = dict(self.options)
        if self.rank is not None:
            options["rank"] = self.rank
        if self.init is not None:
            options["init"] = self.init
        if self.alpha is not None:
            options["scale"] = self.alpha / options.get("rank", kind.defaults.get("rank") or 1)
        return options

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        kind = kind_of(self.kind)
        if graph.kind == "onnx":
            from .insert_graph import insert_branches

            return insert_branches(graph, kind, self.targets, self.exclude, self.chosen(kind), ctx.seed)
        module = module_of(graph)
        done = self._insert(module, kind, ctx)
        reason = f"{self.kind}, {{}} trained elements"
        decisions = [Decision(d.target, "inserted", reason.format(d.trainable), {"module": d.name}) for d in done]
        details = {"adapters": len(done), "trainable": sum(d.trainable for d in done), "kind": self.kind}
        return Outcome(decisions=decisions, details=details, graph=graph_of(module, graph, ctx))

    def _insert(self, module: nn.Module, kind: AdapterKind, ctx: Context) -> list[Any]:
        import torch

        from .insert_module import insert, places_for

        places = places_for(module, kind, self.targets, self.exclude)
        evidence: dict[str, dict[str, Any]] = {}
        if self.init in EVIDENCE:
            from .gather import allocate_ranks, gather

            batches = list(self.batches(ctx))
            evidence = gather(module, places, EVIDENCE[self.init], batches, _function(self.loss), self.step)
            if self.allocate:
                places = allocate_ranks(places, evidence, self.chosen(kind).get("rank", kind.defaults["rank"]))
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        return insert(
            module, kind, places, self.chosen(kind), seed=ctx.seed, dtype=dtype, evidence=evidence, train=self.train
        )


def _function(loss: Any) -> Any:
    if isinstance(loss, str):
        from ..finetune import resolve

        return resolve(loss)
    return loss


def module_of(graph: Graph) -> nn.Module:
    """A module of its own for a graph that came from one."""
    from torch import nn

    model = copy.deepcopy(graph.source) if isinstance(graph, WeightsGraph) and not graph.new else graph.to_model()
    if not isinstance(model, nn.Module):
        raise ConstraintError(
            "adapters are inserted into an nn.Module or an ONNX graph", found=type(model).__name__,
            hint="merge_adapter takes state dicts"
        )  # fmt: skip
    return model


def graph_of(module: nn.Module, like: Graph, ctx: Context) -> Graph:
    """The graph of a changed module, captured as ``like`` was."""
    if like.kind == "weights":
        return WeightsGraph(module)
    from ...graph.fx import load_torch

    return load_torch(module, ctx.example_inputs)


def insert_adapter(
    model: Any,
    example_inputs: Any = None,
    *,
    kind: str = "lora",
    targets: Sequence[str] | Mapping[str, Mapping[str, Any]] | None = None,
    calibration: Any = None,
    loss: Callable[[Any, Any], Any] | str | None = None,
    verify: bool = True,
    seed: int = 0,
    inplace: bool = False,
    **options: Any,
) -> Result:
    """Insert adapters; see :class:`InsertAdapter` for the options.

    A module needs no example inputs: it is then changed without being captured as a graph, and nothing is verified.

    Returns:
        ``result.model``: a module of the same class (a copy, unless ``inplace``), or ONNX.
    """
    step = InsertAdapter(kind=kind, targets=targets, loss=loss, **options)
    return run_pass(step, model, example_inputs, calibration=calibration, verify=verify, seed=seed, inplace=inplace)


def run_pass(
    step: Pass,
    model: Any,
    example_inputs: Any,
    *,
    calibration: Any = None,
    verify: bool = True,
    seed: int = 0,
    inplace: bool = False,
) -> Result:
    """A pipeline of one pass, on the bare weights where a module comes without example inputs, or a state dict."""
    from ..inplace import is_module, put
    from ..pipeline import Pipeline

    pipe = Pipeline([step], seed=seed, name=step.name)
    if (is_module(model) and example_inputs is None) or isinstance(model, Mapping):
        result = pipe.run(WeightsGraph(model), calibration=calibration, verify=False)
        if inplace:
            result.model = put(model, result.model)
        return result
    return pipe.run(model, example_inputs, calibration=calibration, verify=verify, inplace=inplace)
