"""AdapterKind: what an adapter trains, how it starts and which weight it stands for; and the registry of all kinds.

A kind is four words of the survey literature (function, site, insertion, composition) and one formula. The formula is
written once, in operations that numpy arrays and torch tensors share: training evaluates it in torch, merging in
float64 numpy. Canonical weights are [out, in / groups, *kernel] whatever the layer stores (see ``view.View``).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from ...graph.errors import ConfigError, ConstraintError
from ..base import nearest

Array: TypeAlias = Any
"""A numpy array (merging, float64) or a torch tensor (training)."""
Tensors: TypeAlias = Mapping[str, Array]
Options: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Geometry:
    """Sizes of a canonical weight [out, inp, *kernel]; ``inp`` counts the inputs of one group."""

    out: int
    inp: int
    kernel: tuple[int, ...] = ()
    groups: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.out, self.inp, *self.kernel)

    @property
    def columns(self) -> int:
        """Columns of the weight as a matrix: inputs of one group times kernel positions."""
        return self.inp * math.prod(self.kernel)

    @property
    def small(self) -> int:
        """The largest rank that the weight can have as a matrix."""
        return min(self.out, self.columns)


@dataclass
class Start:
    """What an initialisation may look at.

    Attributes:
        weight: the canonical base weight, float64 [out, inp, *kernel]; bias: float64 [out] or None.
        geometry: its sizes.
        options: the kind's options, defaults filled in.
        rng: the only source of chance; numpy's Philox stream of the run's seed and the target's name.
        evidence: what was gathered from data for this target: ``"gradient"`` (loss by weight, canonical),
            ``"update"`` (a first step's change of the weight, canonical), ``"inputs"`` (right singular vectors of the
            layer's inputs, rows, [k, inp * kernel]).
    """

    weight: np.ndarray
    bias: np.ndarray | None
    geometry: Geometry
    options: Options
    rng: np.random.Generator
    evidence: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def matrix(self) -> np.ndarray:
        """The weight as [out, inp * kernel]."""
        return self.weight.reshape(self.geometry.out, -1)

    @property
    def rank(self) -> int:
        """The rank asked for.

        Raises:
            ConstraintError: it is less than one.
        """
        rank = int(self.options["rank"])
        if rank < 1:
            raise ConstraintError("a rank is at least one", node="rank", found=rank)
        return rank

    @property
    def spectral_rank(self) -> int:
        """The rank asked for, of a method that takes singular vectors of the weight.

        Raises:
            ConstraintError: the weight has fewer rows or columns than that.
        """
        if self.rank > self.geometry.small:
            raise ConstraintError(
                "the rank does not fit the weight",
                node="rank",
                expected=f"1 to {self.geometry.small} for a weight of {self.geometry.shape}",
                found=self.rank,
                hint="lower the rank, or leave this layer out of targets",
            )
        return self.rank

    def needed(self, what: str, initialisation: str) -> np.ndarray:
        """The evidence of that name.

        Raises:
            ConfigError: it was not gathered.
        """
        if what not in self.evidence:
            raise ConfigError(
                f"the initialisation {initialisation!r} needs {what} of this layer",
                node="init",
                found="none",
                hint="give calibration batches (and a loss) to insert_adapter",
            )
        return np.asarray(self.evidence[what], dtype=np.float64)


Initialise: TypeAlias = Callable[[Start], dict[str, np.ndarray]]
Delta: TypeAlias = Callable[[Tensors, Geometry, Options], Array]
NewWeight: TypeAlias = Callable[[Array, Tensors, Geometry, Options], Array]
NewBias: TypeAlias = Callable[[Array, Tensors, Options], Array]


@dataclass(frozen=True)
class AdapterKind:
    """One kind of adapter.

    Attributes:
        name: how options, checkpoints and errors call it.
        paper: title of its source.
        function: ``"linear"`` in the layer's input, or ``"nonlinear"``.
        site: what it changes: ``"weight"`` (of a linear op), ``"output"`` of a layer, or ``"attention"`` (its keys).
        insertion: ``"parallel"`` (reads the target's input) or ``"sequential"`` (reads its output).
        composition: ``"add"``, ``"scale"``, ``"transform"``, ``"magnitude"`` or ``"gate"``.
        init: start values of the stored tensors (float64, [out, ...] canonical), trained and fixed ones.
        delta: W' = W + delta(tensors), as [out, inp * kernel] or [out, inp, *kernel]; or
        weight: W' = weight(W, tensors).
        bias: b' = bias(b, tensors), b [out]; None where the bias stays. A layer without one starts from zeros.
        fixed: names of stored tensors that are not trained.
        ranks: tensor -> the axis that counts ranks, for growing and compacting; empty where there is none.
        penalty: of the trained tensors, a scalar to add to the loss while training; None where the paper has none.
        derived: tensors made anew from the options (a seed) instead of being stored.
        defaults: options and their defaults; nothing else is accepted.
        checked: refuses options or tensors that cannot be merged (raises ConstraintError).
        identity: insertion preserves the function, unless ``init`` is one of ``steps``.
        steps: initialisations that are a training step instead of the identity.
        exact: merging preserves the function (to rounding).
        why_not: for kinds that cannot be folded, why.
    """

    name: str
    paper: str
    init: Initialise
    delta: Delta | None = None
    weight: NewWeight | None = None
    bias: NewBias | None = None
    function: Literal["linear", "nonlinear"] = "linear"
    site: Literal["weight", "output", "attention"] = "weight"
    insertion: Literal["parallel", "sequential"] = "parallel"
    composition: Literal["add", "scale", "transform", "magnitude", "gate"] = "add"
    fixed: frozenset[str] = frozenset()
    ranks: Mapping[str, int] = field(default_factory=dict)
    penalty: Callable[[Tensors], Array] | None = None
    derived: Callable[[Geometry, Options], dict[str, np.ndarray]] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    checked: Callable[[Tensors, Options], None] | None = None
    identity: bool = True
    steps: frozenset[str] = frozenset()
    exact: bool = True
    why_not: str = ""

    @property
    def foldable(self) -> bool:
        """Whether it merges into the weight: a linear function of what the target reads."""
        return self.function == "linear" and (self.delta is not None or self.weight is not None)

    @property
    def flags(self) -> dict[str, bool]:
        """What can be done with it."""
        return {"insertable": True, "foldable": self.foldable, "exact": self.exact, "identity": self.identity}

    def keeps_function(self, o: Options) -> bool:
        """Whether inserting it with these options leaves the function as it was."""
        return self.identity and o.get("init") not in self.steps

    def options(self, given: Options) -> dict[str, Any]:
        """The given options with the defaults filled in.

        Raises:
            ConfigError: an unknown option (naming the nearest one).
        """
        for key in given:
            if key not in self.defaults:
                close = nearest(key, list(self.defaults))
                raise ConfigError(
                    f"the adapter kind {self.name!r} has no option {key!r}",
                    node=key,
                    expected=", ".join(self.defaults) or "no options",
                    found=key,
                    hint=f"did you mean {close!r}?" if close else None,
                )
        return {**self.defaults, **given}

    def new_weight(self, w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
        """W' from the canonical W: float64 numpy or torch, of W's shape.

        Raises:
            NotFoldable: the kind is no function of the weight alone.
        """
        if self.delta is not None:
            delta = self.delta(t, g, o)
            start = {k.removesuffix(STARTED): v for k, v in t.items() if k.endswith(STARTED)}
            if start:  # W + (now - start): the identity at insertion, to the last bit
                delta = delta - self.delta({**t, **start}, g, o)
            return w + delta.reshape(w.shape)
        if self.weight is None:
            raise NotFoldable(self)
        return self.weight(w, t, g, o).reshape(w.shape)


STARTED = "_start"
"""Suffix of a fixed copy of a trained tensor's start value; additive kinds subtract what it gives."""


class NotFoldable(ConstraintError):
    """An adapter that is no linear function of its target's input cannot be merged into a weight."""

    def __init__(self, kind: AdapterKind, node: str | None = None, why: str = "") -> None:
        super().__init__(
            f"an adapter of kind {kind.name!r} cannot be merged into a weight",
            node=node,
            expected="a function that is linear in, and reads, the input of its target",
            found=why or kind.why_not or f"{kind.function} function, {kind.insertion} insertion",
            hint="keep it in the model: it runs as it is",
        )


# ---- registry ------------------------------------------------------------------------------------------------------
_KINDS: dict[str, AdapterKind] = {}
_HOMES = ("low_rank", "low_rank_variants", "spectra", "factors", "transforms", "scales", "nonlinear")
_loaded = False


def register(kind: AdapterKind) -> AdapterKind:
    """Make a kind known by its name.

    Raises:
        ConfigError: the name is taken by another kind.
    """
    if _KINDS.get(kind.name, kind) != kind:
        raise ConfigError("an adapter kind needs a name of its own", node=kind.name, expected="a new name")
    _KINDS[kind.name] = kind
    return kind


def kinds() -> dict[str, AdapterKind]:
    """All kinds by name."""
    global _loaded
    if not _loaded:
        _loaded = True
        for home in _HOMES:
            importlib.import_module(f".{home}", __package__)
    return dict(_KINDS)


def kind_of(name: str) -> AdapterKind:
    """The kind of that name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name.startswith("peft_"):
        from .peft_kinds import peft_kind

        return peft_kind(name)
    known = kinds()
    if name not in known:
        close = nearest(name, known)
        raise ConfigError(
            f"there is no adapter kind {name!r}",
            node="kind",
            expected=", ".join(known),
            found=name,
            hint=f"did you mean {close!r}?" if close else None,
        )
    return known[name]


def xp(x: Array) -> Any:
    """The module whose functions take x: numpy or torch."""
    if isinstance(x, np.ndarray):
        return np
    import torch

    return torch
