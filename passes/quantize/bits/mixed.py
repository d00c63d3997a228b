"""MixedPrecision: bits per layer from the loss of each width and an exact integer program under budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ....graph.errors import ConfigError
from ....graph.ir import Graph
from ...base import Progress, config_error, no_progress
from ..choices import BitChoice, narrowed
from ..placement import Placement, WeightSite
from ..spec import BackendSpec, TensorFormat
from .costs import Budget, activation_bits, bit_operations, budgets, site_bytes, site_macs
from .losses import Losses, losses_of_points, losses_of_weights
from .whole import Chooser, Group, Pick, best_of

COMBINATIONS = 128
"""Where activations and the weights they meet are chosen together: most combinations that are listed; beyond that the
weights of one activation share their bits."""


class MixedPrecision(BaseModel):
    """The option ``bits`` of ``Quantize``: each layer gets the width that the budget is best spent on.

    The loss of each layer at each width is measured (or given), losses of several layers are taken to add up, and the
    widths are the exact solution of min sum loss subject to the budgets: an integer program (HiGHS), as in "Improving
    Post Training Neural Quantization: Layer-wise Calibration and Integer Programming". Losses add up only as long as
    they are small, so the choice is then measured as a whole, beside uniform widths, and improved (``compare``,
    ``rounds``): on the samples it is never worse than the widest uniform choice within the budgets. Where weights are
    tied, or points share a scale, they share their bits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    choices: tuple[int, ...] = Field(default=(2, 4, 8), min_length=1)
    """Widths of weights."""
    activations: tuple[int, ...] = ()
    """Widths of activations; empty: they keep theirs."""
    budget: Any = 4.0
    """Average bits per weight as a number; or bits(4), bytes(70000), bitops(0.25), latency(1.5); or several, mapped."""
    sensitivity: Literal["sqnr", "kl", "pqi", "fisher", "weights"] | dict[str, dict[int, float]] = "sqnr"
    """Loss of each layer at each width: energy of the error at the outputs ("sqnr"), KL divergence of the output
    distribution ("kl"), post-quantization integral ("pqi"), Fisher information times squared error ("fisher",
    importance by gradients), squared error of the weights ("weights", no data); or numbers, {layer: {bits: loss}}."""
    packed: bool = True
    """Count bytes of weights packed to their bits; False: in the types that the target holds them in."""
    latency: dict[str, dict[int, float]] = Field(default_factory=dict)
    """Milliseconds, {layer: {bits: ms}}, for a latency budget (see ``latency_table``)."""
    keep: dict[str, int] = Field(default_factory=dict)
    """Widths that are settled, by layer name: {"conv2d": 8}."""
    samples: int = Field(default=128, ge=1)
    """Calibration samples that the losses are measured on."""
    method: Literal["milp", "dp"] = "milp"
    """Solver; dp takes one budget."""
    compare: bool = True
    """Measure the choice as a whole on the samples, beside the widest uniform one within the budgets and the one by
    the weights' own errors, and take what costs least at the outputs; False, or where losses are given: the integer
    program's, as it is."""
    rounds: int = Field(default=2, ge=0)
    """After the comparison: how often losses are measured again around the best choice and the program is solved with
    them, as long as that helps."""

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as exc:
            raise config_error(exc, type(self), "MixedPrecision") from exc

    @field_validator("budget")
    @classmethod
    def _is_budget(cls, wish: Any) -> Any:
        budgets(wish)
        return wish

    def choose(
        self,
        graph: Graph,
        placement: Placement,
        spec: BackendSpec,
        batches: list[Any],
        *,
        seed: int = 0,
        progress: Progress = no_progress,
    ) -> BitChoice:
        """Formats per site and point, for ``Quantize``; ``details`` has losses, costs and the expected total.

        Raises:
            ConstraintError: no choice meets the budgets.
            ConfigError: a width that the target has not, or a layer without a loss.
        """
        batches = first_samples(graph, batches, self.samples)
        limits = budgets(self.budget)
        tied = _tied(placement)
        forms = {s.node.name: {b: narrowed(s.form, b, spec.weight_dtypes) for b in self._widths(s)} for s in tied}
        weight_losses = self._losses(graph, tied, forms, batches, seed, progress)
        point_forms = self._point_forms(placement, spec)
        point_losses = losses_of_points(graph, placement, point_forms, batches, self._metric(), progress)
        groups = _groups(placement, tied, forms, point_forms)
        for group in groups:
            group.costs = [self._cost(graph, placement, group, p, limits) for p in group.picks]
        total = [self._limit(b, groups, i, tied) for i, b in enumerate(limits)]
        chooser = Chooser(
            graph, placement, groups, total, tied, forms, point_forms, batches, self._metric(), self.method, progress
        )
        chosen, found = chooser.solved(weight_losses, point_losses)
        facts: dict[str, Any] = {"expected_loss": found.loss}
        if self.compare and batches and not isinstance(self.sensitivity, dict):
            candidates = {"program": chosen, **chooser.uniform()}
            if self.sensitivity in ("sqnr", "kl"):
                cheap = losses_of_weights(graph, tied, forms, batches, "weights", seed, progress)
                # An activation's loss has no like among those of weights alone: both are shares of their most.
                candidates["program by weights"] = chooser.solved(_shares(cheap), _shares(point_losses))[0]
            chosen, losses, best = best_of(chooser, candidates, self.rounds)
            facts |= {"measured": losses, "taken": best}
        formats: dict[str, TensorFormat] = {}
        for group in groups:
            pick = group.picks[chosen[group.name]]
            formats |= {site: forms[site][bits] for site, bits in pick.weights.items()}
            formats |= {root: point_forms[root][bits] for root, bits in pick.points.items()}
        for site in placement.weights:  # nodes that share a weight
            first = next(s for s in tied if s.weight is site.weight)
            formats.setdefault(site.node.name, formats[first.node.name])
        spent = np.sum([np.atleast_1d(g.costs[chosen[g.name]]) for g in groups], axis=0)
        facts["budgets"] = {
            b.kind: {"limit": t, "spent": float(c)} for b, t, c in zip(limits, total, spent, strict=True)
        }
        facts["losses"] = {k: dict(v) for k, v in {**weight_losses, **point_losses}.items()}
        return BitChoice(formats, {**self._details(placement, formats), **facts})

    def _widths(self, site: WeightSite) -> tuple[int, ...]:
        known = [self.keep[k] for k in (site.node.name, site.node.scope, site.weight.name) if k in self.keep]
        return (known[0],) if known else tuple(sorted(set(self.choices)))

    def _metric(self) -> Literal["sqnr", "kl"]:
        return "kl" if self.sensitivity == "kl" else "sqnr"

    def _losses(
        self,
        graph: Graph,
        sites: Sequence[WeightSite],
        forms: Mapping[str, Mapping[int, TensorFormat]],
        batches: list[Any],
        seed: int,
        progress: Progress,
    ) -> dict[str, dict[int, float]]:
        if not isinstance(self.sensitivity, dict):
            return losses_of_weights(graph, sites, forms, batches, self.sensitivity, seed, progress)
        found = {}
        for site in sites:
            names = (site.node.name, site.node.scope, site.weight.name)
            given = next((self.sensitivity[k] for k in names if k in self.sensitivity), None)
            missing = [b for b in forms[site.node.name] if given is None or b not in given]
            if given is None or missing:
                raise ConfigError(
                    "no sensitivity was given for this layer", node=site.node.name,
                    expected=f"a loss for each of {sorted(forms[site.node.name])} bits", found=f"none for {missing}",
                )  # fmt: skip
            found[site.node.name] = {b: float(given[b]) for b in forms[site.node.name]}
        return found

    def _point_forms(self, placement: Placement, spec: BackendSpec) -> dict[str, dict[int, TensorFormat]]:
        roots = {p.root: placement.points[p.root].form for p in placement.points.values()}
        widths = sorted(set(self.activations))
        return {r: {b: narrowed(f, b, spec.activation_dtypes) for b in widths} for r, f in roots.items() if widths}

    def _cost(
        self, graph: Graph, placement: Placement, group: Group, pick: Pick, limits: Sequence[Budget]
    ) -> float | tuple[float, ...]:
        costs = []
        for limit in limits:
            total = 0.0
            for site in group.sites:
                bits = pick.weights[site.node.name]
                if limit.kind == "bits":
                    total += site.weight.size * bits
                elif limit.kind == "bytes":
                    total += site_bytes(site, group.forms[site.node.name][bits], self.packed)
                elif limit.kind == "latency":
                    total += self._milliseconds(site, bits)
                else:
                    point = placement.points.get(site.x.name)
                    wide = pick.points.get(point.root) if point is not None else None
                    acts = activation_bits(placement, site) if wide is None else wide
                    total += sum(
                        bit_operations(site_macs(graph, s), bits, acts)
                        for s in placement.weights
                        if s.weight is site.weight
                    )
            costs.append(total)
        return costs[0] if len(costs) == 1 else tuple(costs)

    def _milliseconds(self, site: WeightSite, bits: int) -> float:
        table = next((self.latency[k] for k in (site.node.name, site.node.scope) if k in self.latency), None)
        if table is None or bits not in table:
            raise ConfigError(
                "a latency budget needs a time for each layer and width", node=site.node.name,
                expected=f"latency={{{site.node.name!r}: {{{bits}: milliseconds}}}}", found=table,
                hint="foldline.passes.quantize.bits.latency.latency_table measures one",
            )  # fmt: skip
        return float(table[bits])

    def _limit(self, budget: Budget, groups: Sequence[Group], i: int, sites: Sequence[WeightSite]) -> float:
        if budget.kind == "bits":
            return budget.value * sum(s.weight.size for s in sites)
        if budget.value > 1:
            return budget.value
        return budget.value * sum(max(float(np.atleast_1d(cost)[i]) for cost in g.costs) for g in groups)

    def _details(self, placement: Placement, formats: Mapping[str, TensorFormat]) -> dict[str, Any]:
        sites = _tied(placement)
        size = sum(s.weight.size for s in sites)
        return {
            "widths": {name: int(form.bits) for name, form in formats.items()},
            "average_weight_bits": sum(s.weight.size * formats[s.node.name].bits for s in sites) / size,
            "weight_bytes": sum(site_bytes(s, formats[s.node.name], self.packed) for s in sites),
            "sensitivity": "given" if isinstance(self.sensitivity, dict) else self.sensitivity,
        }


def _shares(losses: Losses) -> Losses:
    """Losses over the largest of them."""
    most = max((x for widths in losses.values() for x in widths.values()), default=0.0) or 1.0
    return {n: {b: x / most for b, x in widths.items()} for n, widths in losses.items()}


def _tied(placement: Placement) -> list[WeightSite]:
    """The first site of each weight."""
    return list({id(s.weight): s for s in reversed(placement.weights)}.values())[::-1]


def _groups(
    placement: Placement,
    sites: Sequence[WeightSite],
    forms: Mapping[str, dict[int, TensorFormat]],
    point_forms: Mapping[str, dict[int, TensorFormat]],
) -> list[Group]:
    groups: list[Group] = []
    for root, widths in point_forms.items():
        mine = [s for s in sites if s.x.name in placement.points and placement.points[s.x.name].root == root]
        own = {s.node.name: forms[s.node.name] for s in mine}
        picks = [Pick(dict(zip(own, w, strict=True)), {root: a}) for a in widths for w in _combined(own, len(widths))]
        groups.append(Group(root, mine, own, picks))
    taken = {s.node.name for g in groups for s in g.sites}
    for site in sites:
        name = site.node.name
        if name not in taken:
            groups.append(Group(name, [site], {name: forms[name]}, [Pick({name: b}) for b in forms[name]]))
    return groups


def _combined(forms: Mapping[str, Mapping[int, TensorFormat]], times: int) -> list[tuple[int, ...]]:
    """Combinations of widths, all of them while they are few; else all weights alike as far as they can be."""
    count = times
    for widths in forms.values():
        count *= len(widths)
    if count <= COMBINATIONS or not forms:
        return list(product(*forms.values()))
    every = sorted({b for widths in forms.values() for b in widths})
    rows = [tuple(min(widths, key=lambda b: (abs(b - want), b)) for widths in forms.values()) for want in every]
    return list(dict.fromkeys(rows))


def first_samples(graph: Graph, batches: Sequence[Any], samples: int) -> list[dict[str, np.ndarray]]:
    """As many samples, bound; whole batches except the last, which is cut where axis 0 is the batch."""
    from ....graph.execute import batches_of

    found, left = [], samples
    for batch in batches_of(graph, batches):
        sizes = {a.shape[0] for a in batch.values() if a.ndim}
        free = all(v.shape and isinstance(v.shape[0], str) for v in graph.inputs)
        if len(sizes) == 1 and free and sizes != {left} and max(sizes) > left:
            batch = {k: a[:left] if a.ndim else a for k, a in batch.items()}
        found.append(batch)
        left -= max(sizes, default=1)
        if left <= 0:
            break
    return found
