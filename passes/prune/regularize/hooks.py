"""regularize: a context in which any PyTorch training loop drives axis groups of its model towards zero."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ....graph.actions import Plan, groups_of_plan, select
from ....graph.errors import ConfigError, ConstraintError
from ....graph.groups import AxisGroup, Member, axis_groups
from ...backend import backend
from ...base import Context
from ..candidates import candidates
from ..prune_pass import Prune
from .absorb import Cut, gain
from .live import graph_of, live_parameters
from .terms import Kind, Place, Term

if TYPE_CHECKING:
    from ...result import Result

Mode: TypeAlias = Literal["gradient", "penalty", "proximal"]
MASKED = ("masked_l1", "growing")
GAINS = ("bn_l1", "masked_l1")


class Regularizer:
    """Sparsity-inducing training of one module; see :func:`regularize`. Enter it round the training loop.

    Attributes:
        terms: the penalty of each axis group that takes part.
        strength: weight of the penalty now ("growing": it rises).
        steps: optimizer steps seen.
        unjudged: groups that may be cut but hold nothing this kind penalises (no gain of a norm), by name.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        kind: Kind,
        strength: float,
        prune: Prune,
        mode: Mode,
        every: int,
        ceiling: float,
        seed: int,
        calibration: Any,
    ) -> None:
        self.model, self.example_inputs, self.kind, self.mode = model, example_inputs, kind, mode
        self.prune_pass, self.every, self.ceiling, self.seed = prune, every, ceiling, seed
        self.growth = strength
        self.strength = 0.0 if kind == "growing" else strength
        self.steps = 0
        self.calibration = calibration
        self._handles: list[Any] = []
        self.graph = graph_of(model, example_inputs)
        self.groups = axis_groups(self.graph)
        self._kept = self._choose() if kind in MASKED else {}
        self.unjudged: list[str] = []
        self.terms = self._collect()
        self._parameters = {id(p.parameter) for t in self.terms for p in t.places}
        if not self.terms:
            raise ConstraintError(
                f"nothing to regularize by {kind!r}",
                expected="a prunable axis group" + (" with the gain of a normalization" if kind in GAINS else ""),
                found=", ".join(self.unjudged) or "no prunable group",
                hint="kind='group_lasso' and kind='growing' need no normalization; `foldline inspect` shows the groups",
            )

    # ---- what is penalised ---------------------------------------------------------------------------------------
    def _choose(self) -> dict[AxisGroup, np.ndarray]:
        """The kept sets that ``prune`` chooses on the module as it is now."""
        ctx = Context(None, self.calibration, seed=self.seed, verify=False, backends=backend)
        plan = self.prune_pass.apply(self.graph.clone(), ctx).plan
        return groups_of_plan(self.groups, plan) if isinstance(plan, Plan) else {}

    def _collect(self) -> list[Term]:
        live = live_parameters(self.model)
        prune = self.prune_pass
        chosen = candidates(self.groups, prune.ignore, prune.atoms, [], prune.ignore_types)
        terms = []
        for g in chosen:
            if self.kind in MASKED and g not in self._kept:
                continue
            members = [m for m in g.members if (gain(m) if self.kind in GAINS else not m.stat)]
            places = [place for m in members if (place := _place(g, m, live)) is not None]
            if not places:
                self.unjudged.append(g.name)
                self._kept.pop(g, None)
                continue
            masked = torch.ones(g.size, dtype=torch.bool)
            if self.kind in MASKED:
                masked[torch.as_tensor(self._kept[g])] = False
            terms.append(Term(g.name, g.size, places, masked))
        return terms

    def penalty(self) -> Tensor:
        """The penalty now, a scalar to add to the loss (mode "penalty"); differentiable."""
        return torch.stack([t.value(self.kind, self.strength) for t in self.terms]).sum()

    def norms(self) -> dict[str, np.ndarray]:
        """Euclidean norm of what is penalised, per index of each group: float32 [size]."""
        return {t.name: t.norms().detach().cpu().numpy() for t in self.terms}

    def advance(self) -> None:
        """Count one training step. Optimizers of ``torch.optim`` do it by themselves."""
        self.steps += 1
        if self.kind == "growing" and self.steps % self.every == 0:
            self.strength = min(self.strength + self.growth, self.ceiling)

    # ---- the hooks -------------------------------------------------------------------------------------------------
    def __enter__(self) -> Regularizer:
        if self._handles:
            raise ConfigError("this context is already entered", node="regularize", hint="make another one")
        # Hooks on the optimizers: however often a loop accumulates gradients, the penalty counts once per step.
        self._handles.append(register_optimizer_step_pre_hook(self._before))
        self._handles.append(register_optimizer_step_post_hook(self._after))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _held(self, optimizer: torch.optim.Optimizer) -> dict[int, float]:
        """Learning rates of our parameters that this optimizer holds."""
        return {
            id(p): float(group.get("lr", 0.0))
            for group in optimizer.param_groups
            for p in group["params"]
            if id(p) in self._parameters
        }

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        held = self._held(optimizer)
        if held and self.mode == "gradient":
            # A fused optimizer under GradScaler divides the gradients by this itself.
            scale = getattr(optimizer, "grad_scale", None)
            for term in self.terms:
                term.add_gradient(self.kind, self.strength, set(held), 1.0 if scale is None else float(scale))

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        held = self._held(optimizer)
        if not held:
            return
        if self.mode == "proximal":
            for term in self.terms:
                term.proximal(self.kind, self.strength, set(held), lambda p: held[id(p)])
        self.advance()

    # ---- what follows --------------------------------------------------------------------------------------------
    def kept(self) -> dict[str, list[int]]:
        """Kept indices per group name: the preset mask's, or what ``prune`` would keep of the module as it is now."""
        found = self._kept
        if self.kind not in MASKED:
            self.graph = graph_of(self.model, self.example_inputs)
            self.groups = axis_groups(self.graph)
            found = self._choose()
        return {g.name: [int(i) for i in k] for g, k in found.items()}

    def plan(self) -> Plan:
        """The cut as a plan: ``fl.apply_plan(model, hooks.plan(), example_inputs)``."""
        groups = axis_groups(self.graph.clone())
        return select(groups, {groups[name]: np.asarray(k) for name, k in self.kept().items()})

    def prune(self, *, absorb: bool = True, verify: bool = True) -> Result:
        """Cut the trained module: the preset mask, or by ``prune``. The module itself stays as it is.

        Args:
            absorb: move what the cut indices still carry, their constant part, into what reads them first
                (:func:`~foldline.passes.prune.regularize.absorb_removed`).
        """
        from ...pipeline import Pipeline

        pipe = Pipeline([Cut(kept=self.kept(), absorb=absorb)], seed=self.seed, name="regularize")
        if hasattr(self.model, "weight_names"):  # made from ONNX: ONNX comes back
            return pipe.run(graph_of(self.model, self.example_inputs).to_model(), verify=verify)
        return pipe.run(self.model, self.example_inputs, verify=verify)


def regularize(
    model: nn.Module,
    example_inputs: Any,
    kind: Kind = "group_lasso",
    strength: float = 1e-4,
    *,
    prune: Prune | None = None,
    ratio: float | None = None,
    ignore: Sequence[str] = (),
    mode: Mode = "gradient",
    every: int = 10,
    ceiling: float = 1.0,
    seed: int = 0,
    calibration: Any = None,
) -> Regularizer:
    """Sparsity-inducing training, as a context round any PyTorch loop.

    ``with P.regularize(model, x, "group_lasso", 1e-4) as hooks: train(model)`` and then ``hooks.prune()``.

    Args:
        model: the module that the loop trains; its parameters are penalised where they are.
        example_inputs: one call's arguments, to find the axis groups; for the module that ``P.finetune`` makes of an
            ONNX model, that ONNX model.
        kind: "group_lasso": sum over groups and indices of sqrt(elements) * ||slab over all members||_2 ("Learning
            Structured Sparsity in Deep Neural Networks", over whole groups as in "DepGraph: Towards Any Structural
            Pruning"); "bn_l1": L1 of the gains of normalizations ("Learning Efficient Convolutional Networks through
            Network Slimming"); "masked_l1": the same, only on the indices that ``prune`` chooses to cut at the start
            ("Pruning-aware Sparse Regularization for Network Pruning"); "growing": weight decay on what ``prune``
            chooses to cut, which rises by ``strength`` every ``every`` steps up to ``ceiling`` ("Neural Pruning via
            Growing Regularization").
        strength: weight of the penalty; its increment for "growing".
        prune: what to cut and how to choose it, a ``P.Prune``; by default one of ``ratio`` (0.5) and ``ignore``, with
            the criterion "norm_scale" for the two kinds on gains, "l2" for the others.
        mode: "gradient" (the loop stays as it is: the (sub)gradient is added before each step of an optimizer that
            holds the parameters, once per step however gradients are accumulated), "penalty" (the loop adds
            ``hooks.penalty()`` to its loss), "proximal" (a soft threshold after each step, with the optimizer's
            learning rate: exact zeros).

    Raises:
        ConfigError: an unknown kind or mode, a strength that is not positive, both ``prune`` and ``ratio``.
        ConstraintError: no group has what this kind penalises, or what ``prune`` raises.
    """
    for name, value, known in (("kind", kind, get_args(Kind)), ("mode", mode, get_args(Mode))):
        if value not in known:
            raise ConfigError(f"unknown {name} of regularization", node=name, expected=", ".join(known), found=value)
    for name, number in (("strength", strength), ("every", every), ("ceiling", ceiling)):
        if not 0 < number < float("inf"):
            raise ConfigError(f"{name} must be positive", node=name, expected="a positive number", found=number)
    if prune is not None and (ratio is not None or ignore):
        raise ConfigError("give either prune or ratio and ignore", node="prune", expected="one of them", found="both")
    if not isinstance(model, nn.Module):
        raise ConfigError("only an nn.Module can be trained", node="model", found=type(model).__name__)
    if prune is None:
        criterion = "norm_scale" if kind in GAINS else "l2"
        prune = Prune(criterion=criterion, ratio=0.5 if ratio is None else ratio, ignore=list(ignore))
    return Regularizer(
        model, example_inputs, kind=kind, strength=strength, prune=prune, mode=mode, every=every, ceiling=ceiling,
        seed=seed, calibration=calibration,
    )  # fmt: skip


def _place(g: AxisGroup, m: Member, live: dict[str, nn.Parameter]) -> Place | None:
    """The live parameter of a member, if it is one that is trained."""
    found = next((live[n] for n in (m.weight.name, *m.weight.aliases) if n in live), None)
    if found is None or not found.requires_grad or not found.is_floating_point():
        return None
    if tuple(found.shape) != tuple(m.weight.shape):
        raise ConstraintError(
            "the module is not that of the graph", node=m.weight.name, expected=m.weight.shape, found=tuple(found.shape)
        )
    return Place(found, m.axis, torch.as_tensor(m.positions(g.atom)))
