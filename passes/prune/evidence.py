"""What a criterion may look at besides the weights: statistics of activations and gradients, collected when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ...graph.errors import ConfigError
from ...graph.groups import AxisGroup, AxisGroups, Member
from ...graph.ir import Weight
from ..base import Progress, no_progress
from ..calibrate import S, collect
from .slabs import by_index, members_that_count, removals

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

    def chosen(self) -> list[AxisGroup]:
        """The groups that are judged."""
        return list(self.groups) if self.judged is None else self.judged

    @cached_property
    def weights(self) -> list[Weight]:
        """The weights of all judged members that count, each once, in graph order."""
        return list(dict.fromkeys(m.weight for g in self.chosen() for m in members_that_count(g) if _used(m.weight)))

    def _names(self) -> list[str]:
        return [w.name for w in self.weights]

    # ---- activations -------------------------------------------------------------------------------------------
    def statistics(self, wanted: Mapping[str, S]) -> Mapping[str, S]:
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

    def squared_slopes(self, g: AxisGroup) -> list[np.ndarray]:
        """For each set of ``slabs.removals(g)`` the mean over the samples of (sum of gradient * weight over the slabs)
        squared, [size]: the Fisher information of a gate on the index."""
        return self._per_sample[1][g]

    @cached_property
    def _per_sample(self) -> tuple[dict[str, np.ndarray], dict[AxisGroup, list[np.ndarray]]]:
        import torch

        from ..sample_gradients import sample_gradients

        parts = {(g, i): part for g in self.chosen() for i, part in enumerate(removals(g))}
        places: dict[str, list[tuple[tuple[AxisGroup, int], Member]]] = {}
        for key, part in parts.items():
            for m in part:
                places.setdefault(m.weight.name, []).append((key, m))
        values = {w.name: torch.from_numpy(_plain(w)) for w in self.weights}
        squares = {name: torch.zeros(v.shape, dtype=torch.float64) for name, v in values.items()}
        slopes = {key: np.zeros(key[0].size) for key in parts}
        batch: dict[tuple[AxisGroup, int], dict[int, np.ndarray]] = {key: {} for key in parts}
        last, samples = 0, 0
        for first, at, name, grads in sample_gradients(
            self.groups, self._names(), self.examples(), self.loss, self.seed
        ):
            if first != last:
                _flush(batch, slopes)
                last = first
            samples = max(samples, at + len(grads))
            grads = grads.detach().cpu().to(values[name].dtype)
            squares[name] += torch.einsum("n...,n...->...", grads, grads)
            product = grads * values[name] if name in places else grads
            for key, m in places.get(name, ()):
                rest = tuple(i + 1 for i in range(len(m.weight.shape)) if i != m.axis)
                along = (product.sum(rest, dtype=torch.float64) if rest else product.double()).numpy()
                for n, row in enumerate(by_index(along, m.positions(key[0].atom), key[0].size)):
                    batch[key][at + n] = batch[key].get(at + n, 0) + row
        _flush(batch, slopes)
        gates: dict[AxisGroup, list[np.ndarray]] = {}
        for (g, _), s in slopes.items():
            gates.setdefault(g, []).append(s / samples)
        return {name: (s / samples).numpy() for name, s in squares.items()}, gates

    @cached_property
    def hessian_diagonal(self) -> dict[str, np.ndarray]:
        """Diagonal of the Hessian of the mean loss by weight name, from ``probes`` random directions (unbiased)."""
        from ..sample_gradients import hessian_diagonal

        return hessian_diagonal(self.groups, self._names(), self.examples(), self.probes, self.loss, self.seed)

    def kronecker(self) -> Iterator[Kronecker]:
        """Kronecker factors of the Fisher information, one site after another, of the weights whose slabs remove an
        index (``slabs.removals``); large, so not kept."""
        from ..sample_gradients import kronecker_factors

        names = dict.fromkeys(m.weight.name for g in self.chosen() for part in removals(g) for m in part)
        return kronecker_factors(self.groups, names, self.examples, self.loss, self.seed)

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """The result of ``make``, computed at the first call with this key: a criterion's own statistic."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def _flush(batch: dict[Any, dict[int, np.ndarray]], slopes: dict[Any, np.ndarray]) -> None:
    """Add the squares of a batch's slopes, complete now over all members, to the totals."""
    for key, rows in batch.items():
        for row in rows.values():
            slopes[key] += row**2
        rows.clear()


def _used(weight: Weight) -> bool:
    return weight.value is not None and bool(weight.value.uses)


def _plain(weight: Weight) -> np.ndarray:
    """The weight in float32 or float64, its own memory."""
    data = weight.numpy()
    return np.array(data, dtype=np.float64 if data.dtype == np.float64 else np.float32)
