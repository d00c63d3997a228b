"""Prune: cut the least important indices of axis groups, everywhere they occur, and prove it equals masking them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from ...graph.actions import select
from ...graph.errors import ConfigError, ConstraintError
from ...graph.groups import AxisGroup, AxisGroups, axis_groups
from ...graph.ir import Graph
from ...graph.quantized import dequantizer
from ..base import Context, Contract, Decision, Needs, Outcome, Pass, nearest
from ..plan import remember
from ..targets import Target
from .automatic import inputs_without_data, settled
from .candidates import candidates
from .choose import Chooser
from .evidence import Evidence
from .importance import NAMES, Reduction, importance, needs_of
from .kinds import kinds
from .oracle import identity_check
from .select import Kept, Normalizer


def _known(criterion: Any) -> Any:
    if isinstance(criterion, str) and criterion not in (*NAMES, "auto"):
        near = nearest(criterion, (*NAMES, "auto"))
        raise ValueError(f"unknown criterion {criterion!r}" + (f": did you mean {near!r}?" if near else ""))
    return criterion


class Prune(Pass):
    """Structured pruning: select the most important indices of each axis group and drop the rest.

    Identity: with S the kept indices, ``pruned(x) == original(x) with the removed slabs zeroed``, to 1e-4 of the
    largest output, wherever no statistic (norm, mean) is taken over the cut axis; checked on every run with
    ``verify``. Approximate as a whole: what the removed slabs contributed is lost, and the report says how much.

    Raises:
        ConstraintError: the ratio is out of range, the target cannot be reached, an ignore pattern matches nothing,
            or nothing at all could be pruned.
    """

    name: ClassVar[str] = "prune"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    needs: ClassVar[Needs] = Needs.NOTHING
    establishes: ClassVar[frozenset[str]] = frozenset({"pruned"})

    criterion: Annotated[str | Callable[..., Any], AfterValidator(_known)] = "l2"
    """By weights: "l1", "l2", "linf", "lamp", "fpgm" (distance to the others), "cosine" (distance to the nearest copy),
    "norm_scale" (gains of normalizations), "spectral", "random"; by activations: "wanda", "activation", "apoz"; by
    gradients: "taylor", "taylor_elements", "fisher", "obd", "obd_kfac", "hessian", "lora", "lora_elements"; or a
    callable (group, groups[, evidence]) -> one score per index. "auto" (like scope "auto"): what lost least accuracy
    with what is at hand, l2 and "layerwise" with data, "fisher" and "global" on made-up inputs without."""
    calibration: Any = None
    """Batches of model inputs for criteria that look at activations (those of the run, if None). Where there are
    neither these nor ``data``, and batch norms store statistics, what needs inputs gets images made up from them
    (``synthetic_inputs``; takes seconds)."""
    data: Any = None
    """Pairs (batch of model inputs, target) for criteria that take gradients of ``loss``."""
    loss: str | Callable[..., Any] = "cross_entropy"
    """"cross_entropy" (class indices), "mse", or a function (output, target) -> scalar tensor."""
    reduction: Reduction = "mean"
    """How the scores of a group's members (each divided by its mean) become one."""
    normalizer: Normalizer = "mean"
    """How a group's scores are brought to a scale on which groups compare, where they compete (scope)."""
    ratio: float | None = None
    """Share of each prunable axis that goes (scope "uniform"), or of all indices (scope "global"); in (0, 1)."""
    target: Target | None = None
    """What is to remain instead: macs(0.5), params(0.5), bytes(1e6), or latency(0.6) measured on ``backend``."""
    scope: Literal["uniform", "global", "isomorphic", "layerwise", "auto"] = "uniform"
    """"uniform": every group loses the same share; "global": all indices are ranked together; "isomorphic": indices
    are ranked together with those of groups of the same structure; "layerwise": the output's distortion is measured
    at several levels of every group alone, and a knapsack finds the levels of least total distortion ("Efficient Joint
    Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks"; on calibration inputs, or made-up ones)."""
    overrides: dict[str, float] = Field(default_factory=dict)
    """Ratios of single groups by name pattern, e.g. {"layer3.*": 0.2, "head": 0}: they hold whatever the scope and the
    target, 0 keeps a group whole; the first pattern that matches decides."""
    round_to: Annotated[int, Field(ge=1)] | str = 1
    """Every cut axis stays a multiple of this (8, 16, 32), at least one block; shorter axes are left whole. The name of
    a backend stands for the multiple that its spec asks for."""
    min_keep: int = Field(1, ge=1)
    """Indices that each group keeps at least."""
    ignore: list[str] = Field(default_factory=list)
    """Patterns (fnmatch) of weight names, module paths or group names whose groups stay whole."""
    ignore_types: list[str] = Field(default_factory=list)
    """Patterns of layer types whose groups stay whole: module classes ("Conv2d", "SelfAttention"), ONNX or ATen
    operators ("Gemm", "conv2d"), foldline's ("conv", "depthwise_conv", "linear")."""
    atoms: str | list[str] = "outer"
    """"outer": of nested groups (heads and head dim, groups and channels) only the outermost; "all": both; or a list
    of kinds, nested ones included: heads, kv_groups, head_dim_qk, head_dim_v, head_dim (a fused qkv ties all three),
    hidden (LSTM, GRU), residual, ffn, channels. Kinds are told from the graph's structure, never from names."""
    equal: bool | list[str] = False
    """Groups that keep the same number of indices, each its own best: True (all groups of one kind and size), or a list
    of kinds ("heads", "head_dim*") and name patterns; what a configuration with one number for all layers needs."""
    samples: int = Field(64, ge=1)
    """Inputs that scope "layerwise" looks at."""
    stages: int = Field(1, ge=1)
    """Scope "layerwise": 1 measures around the whole network only; more go to the target over that many milder
    selections and measure anew around each, which takes as many times longer and pays where much is cut."""
    repair: bool = False
    """Scope "layerwise": distortions are measured after the correction that ``Recover(data="moments")`` makes, for
    selections that a Recover follows; it pays most where the inputs are made up."""
    solver: Literal["dp", "milp"] = "dp"
    """How scope "layerwise" allocates: dynamic programming, or an exact integer program."""
    backend: str = "onnxruntime"
    """Where a latency target is measured."""
    backend_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the backend's lower(), e.g. {"threads": 1}."""

    @model_validator(mode="after")
    def _one_goal(self) -> Prune:
        if (self.ratio is None) == (self.target is None):
            raise ValueError("give exactly one of ratio and target")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ConstraintError(
                "the ratio is out of range",
                node="ratio",
                expected="a number between 0 and 1: the share of each prunable axis that goes",
                found=self.ratio,
                hint="give what is to remain as a target instead, e.g. target=fl.macs(0.5)",
            )
        return self

    @property
    def block(self) -> int:
        """``round_to`` as a number."""
        return 1 if isinstance(self.round_to, str) else self.round_to

    def prepare(self, ctx: Context) -> None:
        """The backend whose multiple is wanted has a spec."""
        self._rounded(ctx)

    def _rounded(self, ctx: Context) -> Prune:
        """The same pass with the multiple of the backend that ``round_to`` names."""
        if not isinstance(self.round_to, str):
            return self
        spec = ctx.backends(self.round_to).spec
        if spec is None:
            raise ConfigError("this backend's spec names no multiple of channels", node="round_to", found=self.round_to)
        return self.model_copy(update={"round_to": spec.channel_multiple})

    def selects_only(self) -> bool:
        """True where the choice is made by weights and shapes alone."""
        named = isinstance(self.criterion, str) and self.criterion != "auto"
        weights_only = named and needs_of(self.criterion) is Needs.NOTHING
        counted = self.scope not in ("layerwise", "auto") and (self.target is None or self.target.metric != "latency")
        return weights_only and counted and self.data is None and self.calibration is None

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        if isinstance(self.round_to, str):
            return self._rounded(ctx).apply(graph, ctx)
        if "auto" in (self.criterion, self.scope):
            return settled(self, graph, ctx).apply(graph, ctx)
        separated = graph.separate_shared()
        groups = axis_groups(graph)
        decisions: list[Decision] = []
        chosen = candidates(groups, self.ignore, self.atoms, decisions, self.ignore_types)
        if not chosen:
            raise ConstraintError(
                "nothing was pruned: no axis group can be cut",
                found=_most_common(d.reason for d in decisions),
                hint="shorten ignore, allow nested groups with atoms='all'; `foldline inspect` says why each is frozen",
            )
        self._check_floating(chosen)
        evidence = self._evidence(groups, ctx, decisions)
        scores = importance(groups, chosen, self.criterion, ctx.seed, self.reduction, evidence)
        decisions += [
            Decision(g.name, "kept", f"{self._criterion_name()} finds nothing to judge it by", {"size": g.size})
            for g in chosen
            if g not in scores
        ]

        if chosen and not scores:
            raise ConstraintError(
                f"{self._criterion_name()} finds nothing to judge any group by",
                node="criterion",
                found=f"{len(chosen)} groups that could be cut, such as {chosen[0].name}",
                hint="take another criterion: l2 judges every group that has floating (or QDQ) weights",
            )
        details: dict[str, Any] = {}
        chooser = Chooser(self, groups, scores, evidence, ctx, decisions, details, len(chosen) - len(scores))
        kept = chooser.choose()
        whole = {g: chooser.why_whole(g) for g, k in kept.items() if len(k) == g.size}
        self._record(kept, whole, decisions)
        cut = {g: k for g, k in kept.items() if len(k) < g.size}
        if not cut:
            raise ConstraintError(
                "nothing was pruned",
                found=f"{len(chosen)} prunable groups, none of which loses an index",
                hint=f"{'raise the ratio' if self.target is None else 'lower the target'}, lower round_to or min_keep, "
                "shorten ignore; `foldline inspect` shows the frozen",
            )
        kind_of = kinds(groups)
        oracle = identity_check(groups, cut, ctx.seed) if ctx.verify else None
        before = graph.clone() if not ctx.last and (separated or ctx.untouched is None) else ctx.untouched
        plan = select(groups, cut)
        remember(ctx, before, plan)
        if oracle is not None:
            details["identity"] = oracle(graph)
        details["groups"] = [
            {
                "name": g.name,
                "kind": kind_of[g],
                "size": g.size,
                "kept": len(kept[g]) if g in kept else g.size,
                "reason": "" if g in cut else whole.get(g, g.why()),
            }
            for g in groups
        ]
        return Outcome(decisions=decisions, details=details, plan=plan)

    def _record(self, kept: Kept, whole: dict[AxisGroup, str], decisions: list[Decision]) -> None:
        for g, k in kept.items():
            size = {"size": g.size, "kept": len(k), "members": [m.label for m in g.members]}
            if g in whole:
                decisions.append(Decision(g.name, "kept", whole[g], size))
                continue
            note = "" if g.exact else f"; changes a statistic: {g.why('inexact')}"
            why = f"kept {len(k)} of {g.size} by {self._criterion_name()}{note}"
            decisions.append(Decision(g.name, "cut", why, size))

    def _check_floating(self, chosen: list[AxisGroup]) -> None:
        """Gradients and activations are looked at on floating weights only; weights alone are judged either way."""
        if callable(self.criterion) or needs_of(self.criterion) is Needs.NOTHING:
            return
        for g in chosen:
            stored = next((m for m in g.members if dequantizer(m.weight) is not None), None)
            if stored is not None:
                raise ConstraintError(
                    f"criterion {self.criterion!r} cannot judge quantized weights",
                    node=g.name,
                    found=f"{stored.label} of {stored.weight.dtype}",
                    hint="prune before quantizing, or take a criterion that looks at weights only (l2, l1, fpgm)",
                )

    def _evidence(self, groups: AxisGroups, ctx: Context, decisions: list[Decision] | None = None) -> Evidence:
        batches = ctx.calibration if self.calibration is None else self.calibration
        if batches is None and self.data is None:
            batches = inputs_without_data(self, groups.graph, ctx, decisions)
        return Evidence(groups, batches, self.data, self.loss, ctx.seed, ctx.progress)

    def _criterion_name(self) -> str:
        return self.criterion if isinstance(self.criterion, str) else getattr(self.criterion, "__name__", "criterion")


def _most_common(reasons: Iterable[str]) -> str:
    """The three most frequent reasons, with how often each was given."""
    counted = Counter(reasons)
    more = len(counted) - 3
    shown = [f"{reason} ({n} group{'s' if n > 1 else ''})" for reason, n in counted.most_common(3)]
    return "; ".join(shown) + (f"; and {more} other reasons" if more > 0 else "")
