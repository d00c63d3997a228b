"""What a criterion may look at besides the weights: statistics of activations and gradients, collected when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ...graph.errors import ConfigError
from ...graph.groups import AxisGroup, AxisGroups, Member
from ...graph.ir import Weight
from ..base import Progress, no_progress
from ..calibrate import Statistic, collect
from .slabs import by_index, members_that_count

if TYPE_CHECKING:
    from ..gradients import Example
    from ..sample_gradients import Kronecker


@dataclass
class Evidence:
    """The data of one run and what is learnt from it, for all groups that are judged in one pass over the data.

    Every property is computed at its first use and kept. All are means over samples, float64, and do not depend on
    how the samples are batched or ordered, rounding apart. Weights that no judged group has as a member that counts
    (see ``slabs.members_that_count``) are left out.

    Attributes:
        groups: axis groups of the graph that is judged.
        batches: model inputs, each as ``Graph.bind`` takes them, or None.
        data: pairs (model inputs, target), or None. Iterators are kept in memory as lists, since they are read often.
        loss: name of a loss or a function (output, target) -> scalar; see ``passes.gradients.losses_of``.
        judged: the groups whose statistics are wanted; all of them if None.
        probes: random directions for estimates of the Hessian.
    """

    groups: AxisGroups
    batches: Iterable[Any] | None = None
    data: Iterable[Any] | None = None
    loss: str | Callable[..., Any] = "cross_entropy"
    seed: int = 0
    progress: Progress = no_progress
    judged: list[AxisGroup] | None = None
    probes: int = 16
    _kept: dict[str, Any] = field(default_factory=dict, repr=False)

    # ---- data --------------------------------------------------------------------------------------------------
    def examples(self) -> Iterator[Example]:
        """Batches with targets; from ``batches``, with targets to be drawn from the model itself, if there is no data.

        Raises:
            ConfigError: there is neither.
        """
        from ..gradients import examples

        self._settle()
        return examples(self.groups.graph, self.data, self.batches, self.progress)

    def inputs(self) -> Iterator[Any]:
        """Batches of model inputs: ``batches``, else the inputs of ``data``.

        Raises:
            ConfigError: there is neither.
        """
        self._settle()
        if self.batches is not None:
            return iter(self.batches)
        if self.data is not None:
            return (e.inputs for e in self.examples())
        raise ConfigError(
            "this criterion looks at activations",
            node="calibration",
            expected="batches of typical model inputs",
            found=None,
            hint="pass calibration=[batch, ...], or data=[(batch, target), ...]",
        )

    def _settle(self) -> None:
        for name in ("batches", "data"):
            found = getattr(self, name)
            if found is not None and iter(found) is found:
                setattr(self, name, list(found))

    def members(self) -> Iterator[tuple[AxisGroup, Member]]:
        """The members that count of every judged group, floating ones only."""
        for g in self.groups if self.judged is None else self.judged:
            for m in members_that_count(g):
                if m.weight.value is not None and m.weight.value.uses:
                    yield g, m

    @cached_property
    def weights(self) -> list[Weight]:
        """The weights of all judged members, each once, in graph order."""
        return list(dict.fromkeys(m.weight for _, m in self.members()))

    def _names(self) -> list[str]:
        return [w.name for w in self.weights]

    # ---- activations -------------------------------------------------------------------------------------------
    def statistics(self, wanted: dict[str, Statistic]) -> dict[str, Statistic]:
        """Feeds the statistics (by value name) with the activations of one pass over the inputs, and returns them."""
        if wanted:
            collect(self.groups.graph, self.inputs(), wanted, progress=self.progress)
        return wanted

    # ---- gradients ---------------------------------------------------------------------------------------------
    @cached_property
    def gradients(self) -> dict[str, np.ndarray]:
        """d mean loss / d weight, by weight name, in the weight's shape."""
        from ..gradients import mean_gradients

        return mean_gradients(self.groups.graph, self._names(), self.examples(), self.loss, self.seed)[0]

    @cached_property
    def squared_gradients(self) -> dict[str, np.ndarray]:
        """Mean over the samples of the squared gradient of each sample's loss: the diagonal of the empirical Fisher
        information (of the true one where the targets are drawn from the model), by weight name."""
        return self._per_sample[0]

    def squared_slopes(self, g: AxisGroup, member: Member) -> np.ndarray:
        """Mean over the samples of (sum over the slab of gradient * weight) squared, [size]: the Fisher information of
        a gate on the slab."""
        return self._per_sample[1][g, member.weight.name, member.axis]

    @cached_property
    def _per_sample(self) -> tuple[dict[str, np.ndarray], dict[tuple[AxisGroup, str, int], np.ndarray]]:
        import torch

        from ..sample_gradients import sample_gradients

        members: dict[str, list[tuple[AxisGroup, Member]]] = {}
        for g, m in self.members():
            members.setdefault(m.weight.name, []).append((g, m))
        values = {w.name: torch.from_numpy(_plain(w)) for w in self.weights}
        squares = {w.name: torch.zeros(w.shape, dtype=torch.float64) for w in self.weights}
        slopes = {(g, m.weight.name, m.axis): np.zeros(g.size) for g, m in self.members()}
        seen = dict.fromkeys(squares, 0)
        for name, grads in sample_gradients(self.groups, self._names(), self.examples(), self.loss, self.seed):
            grads = grads.detach().cpu().float()
            seen[name] += len(grads)
            squares[name] += torch.einsum("n...,n...->...", grads, grads)
            product = grads.mul_(values[name])
            for g, m in members[name]:
                rest = tuple(i + 1 for i in range(len(m.weight.shape)) if i != m.axis)
                along = product.sum(rest, dtype=torch.float64).numpy() if rest else product.double().numpy()
                at = m.positions(g.atom)
                for row in along:
                    slopes[g, name, m.axis] += by_index(row, at, g.size) ** 2
        return (
            {name: (s / seen[name]).numpy() for name, s in squares.items()},
            {key: s / seen[key[1]] for key, s in slopes.items()},
        )

    @cached_property
    def hessian_diagonal(self) -> dict[str, np.ndarray]:
        """Diagonal of the Hessian of the mean loss by weight name, from ``probes`` random directions (unbiased)."""
        from ..sample_gradients import hessian_diagonal

        return hessian_diagonal(self.groups, self._names(), self.examples(), self.probes, self.loss, self.seed)

    def kronecker(self) -> Iterator[Kronecker]:
        """Kronecker factors of the Fisher information, one site after another; large, so not kept."""
        from ..sample_gradients import kronecker_factors

        return kronecker_factors(self.groups, self._names(), self.examples, self.loss, self.seed)

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """The result of ``make``, computed at the first call with this key: a criterion's own statistic."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def _plain(weight: Weight) -> np.ndarray:
    """The weight in float32 or float64, its own memory."""
    data = weight.numpy()
    return np.array(data, dtype=np.float64 if data.dtype == np.float64 else np.float32)
