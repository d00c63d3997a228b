"""Importance of every index of an axis group: a criterion's scores of the members, reduced over them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import numpy as np

from ...graph.errors import ConfigError
from ...graph.groups import AxisGroup, AxisGroups
from ..base import Needs
from . import activation_criteria, gradient_criteria, lora_criteria, spectral, weight_criteria  # noqa: F401  (register)
from .criterion import CRITERIA
from .evidence import Evidence
from .slabs import members_that_count, slabs_of

__all__ = ["NAMES", "Reduction", "Scores", "importance", "members_that_count", "needs_of", "slabs_of"]

Scores: TypeAlias = dict[AxisGroup, np.ndarray]
"""One float64 score per index of each group; higher is more important."""
UserCriterion: TypeAlias = Callable[..., Any]
"""A user's own criterion: (group, all groups), (group, evidence) or (group, all groups, evidence) -> one score per
index. It is given the evidence as second argument where that parameter is called ``evidence`` or annotated so."""
Reduction: TypeAlias = Literal["mean", "sum", "max", "first", "product"]

NAMES = (*CRITERIA, "random")


def needs_of(criterion: str | UserCriterion) -> Needs:
    """What a criterion needs besides the model; a callable's needs are unknown, hence nothing."""
    return CRITERIA[criterion].needs if isinstance(criterion, str) and criterion in CRITERIA else Needs.NOTHING


def importance(
    groups: AxisGroups,
    chosen: Iterable[AxisGroup],
    criterion: str | UserCriterion,
    seed: int,
    reduction: Reduction = "mean",
    evidence: Evidence | None = None,
) -> Scores:
    """Scores of every index of the chosen groups (groups that a criterion cannot judge are left out).

    Where members have different units, each one's scores are divided by their mean, so that wide and narrow members
    count alike; then they are reduced over the members. ``"random"`` is the baseline: same seed, same scores.

    Raises:
        ConfigError: unknown criterion, evidence that it needs is missing (says what to pass), or a user's criterion
            that does not return one finite score per index.
    """
    chosen = list(chosen)
    evidence = Evidence(groups, seed=seed) if evidence is None else evidence
    evidence.judged = chosen
    if callable(criterion):
        judge = _two_arguments(criterion, groups, evidence)
        return {g: _checked(g, judge(g)) for g in chosen}
    if criterion == "random":
        rng = np.random.default_rng(seed)
        return {g: rng.random(g.size) for g in chosen}
    if criterion not in CRITERIA:
        raise ConfigError("unknown criterion", value=criterion, expected=", ".join(NAMES) + " or a callable")
    known = CRITERIA[criterion]
    scores: Scores = {}
    for g in chosen:
        parts = known.parts(g, evidence)
        if parts:
            rows = _relative(np.stack(parts)) if known.relative else np.stack(parts)
            scores[g] = _checked(g, _reduce(rows, reduction))
    return scores


def _two_arguments(criterion: UserCriterion, groups: AxisGroups, evidence: Evidence) -> Callable[[AxisGroup], Any]:
    """A user's criterion as a function of the group alone."""
    try:
        parameters = list(inspect.signature(criterion).parameters.values())
    except (TypeError, ValueError):  # builtins without a signature
        parameters = []
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return lambda g: criterion(g, groups)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    if len(positional) > 1 and _wants_evidence(positional[1]):
        return lambda g: criterion(g, evidence)
    if len(required) > 2 or len(positional) > 2 and _wants_evidence(positional[2]):
        return lambda g: criterion(g, groups, evidence)
    return lambda g: criterion(g, groups)


def _wants_evidence(p: inspect.Parameter) -> bool:
    return p.name == "evidence" or p.annotation is Evidence or str(p.annotation).split(".")[-1] == "Evidence"


def _checked(g: AxisGroup, scores: Any) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (g.size,) or not np.isfinite(scores).all():
        raise ConfigError(
            "the criterion must return one finite score per index",
            node=g.name,
            expected=f"shape {(g.size,)}",
            found=f"shape {scores.shape}" if scores.shape != (g.size,) else "NaN or infinity",
        )
    return scores


def _relative(parts: np.ndarray) -> np.ndarray:
    """Each member's scores (a row) over their mean."""
    means = parts.mean(axis=1, keepdims=True)
    means[~(means > 0)] = 1
    return np.asarray(parts / means)


def _reduce(parts: np.ndarray, reduction: Reduction) -> np.ndarray:
    if reduction == "first":
        return np.asarray(parts[0])
    function = {"product": np.multiply, "max": np.maximum}.get(reduction, np.add)
    found = function.reduce(parts, axis=0)
    return np.asarray(found / len(parts) if reduction == "mean" else found)
