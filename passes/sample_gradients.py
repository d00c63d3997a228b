"""Gradients of every sample apart, and what is made of them: Fisher information, Kronecker factors, Hessian diagonals.

All sums run over samples, so no result depends on how the samples are batched or ordered (rounding apart).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..graph.groups import AxisGroups
from .gradients import Differentiable, Example, Loss, drawn_target, gradients, losses_of, no_samples, recorded
from .sites import SampleAxis, Site, lots, sites_of, uses_as_matrix

CHUNK = 1 << 26
"""Bytes of sample gradients held at a time."""


@recorded
def sample_gradients(
    groups: AxisGroups, weights: Iterable[str], data: Iterable[Example], loss: Loss = "cross_entropy", seed: int = 0
) -> Iterator[tuple[int, int, str, Tensor]]:
    """Yields (first sample of the batch, first sample of this portion, weight name, gradients [samples, *shape]).

    Samples are counted through all batches; one batch follows the other, and in it every weight comes with every
    sample once.

    Weights that only linear nodes and convolutions use take one backward pass per batch, as products of inputs and
    output gradients (the gradient of a sample is their sum over its positions); the others take one per sample.

    Raises:
        ConstraintError: there is no sample.
    """
    graph = groups.graph
    weights = list(dict.fromkeys(weights))
    axis = SampleAxis(groups)
    sites = {name: found for name in weights if (found := sites_of(graph.weights[name])) is not None}
    taps = [v.name for found in sites.values() for s in found for v in (s.x, s.y)]
    function = Differentiable(graph, weights, taps)
    seen = 0
    for example in data:
        outputs, values = function(example.inputs)
        losses = losses_of(outputs[0], example, loss, seed)
        count, first = len(losses), seen
        seen += count
        made = {s.y.name: values[s.y.name] for found in sites.values() for s in found}
        grads = gradients(losses.sum(), made, retain_graph=True) if made else {}
        alone: list[str] = []
        for name in weights:
            pairs = [_split(s, axis, values, grads, count) for s in sites.get(name, ())]
            if not pairs or any(p is None for p in pairs):
                alone.append(name)
                continue
            at = first
            for part in _products([p for p in pairs if p is not None], tuple(function.leaves[name].shape)):
                yield first, at, name, part
                at += len(part)
        for n in range(count if alone else 0):
            mine = {name: function.leaves[name] for name in alone}
            for name, grad in gradients(losses[n], mine, retain_graph=n < count - 1).items():
                yield first, first + n, name, grad[None]
    if not seen:
        raise no_samples()


def _split(
    site: Site, axis: SampleAxis, values: dict[str, Tensor], grads: dict[str, Tensor], count: int
) -> tuple[Tensor, Tensor] | None:
    """Left and right factors per sample, [N, blocks, rows or columns, T]; None where the samples cannot be told."""
    x = axis.first(site.x, values[site.x.name].detach(), count)
    grad = axis.first(site.y, grads[site.y.name], count)
    if x is None or grad is None:
        return None
    if not site.conv:
        return site.sample_factors(x, grad)
    left, right = site.sample_factors(x.flatten(0, 1), grad.flatten(0, 1))
    return (_regroup(left, count), _regroup(right, count))


def _regroup(factor: Tensor, count: int) -> Tensor:
    """[N * M, B, R, T] -> [N, B, R, M * T]."""
    return factor.unflatten(0, (count, -1)).permute(0, 2, 3, 1, 4).flatten(3)


def _products(pairs: Sequence[tuple[Tensor, Tensor]], shape: tuple[int, ...]) -> Iterator[Tensor]:
    size = int(np.prod(shape)) * 4
    step = max(1, CHUNK // max(size, 1))
    for start in range(0, len(pairs[0][0]), step):
        part: Tensor | None = None
        for left, right in pairs:
            product = left[start : start + step] @ right[start : start + step].transpose(2, 3)
            part = product if part is None else part + product
        assert part is not None
        yield part.reshape(-1, *shape)


@dataclass
class Kronecker:
    """The Fisher information of a weight at one site as ``left (x) right`` per block: [blocks, n, n] each, float64.

    ``left`` runs over axis 0 of a block of the weight, ``right`` over axis 1 times the kernel.
    """

    site: Site
    left: Tensor
    right: Tensor


@recorded
def kronecker_factors(
    groups: AxisGroups,
    weights: Iterable[str],
    data: Callable[[], Iterable[Example]],
    loss: Loss = "cross_entropy",
    seed: int = 0,
    memory: int = 1 << 30,
) -> Iterator[Kronecker]:
    """Gram matrices of inputs and of output gradients at every linear node and convolution that uses the weights.

    The Fisher information of a weight is approximated by the product of the two, ``E[sum_t a a^T] (x) E[mean_t g g^T]``
    ("Optimizing Neural Networks with Kronecker-factored Approximate Curvature"; for convolutions "A
    Kronecker-factored Approximate Fisher Matrix for Convolution Layers"), exact where inputs and gradients are
    independent. ``data`` is read once per portion of sites whose factors fit into ``memory`` bytes.

    Raises:
        ConstraintError: there is no sample.
    """
    found = [s for name in dict.fromkeys(weights) for s in uses_as_matrix(groups.graph.weights[name])]
    need = {s: 8 * s.blocks * (s.shape[1] ** 2 + s.shape[2] ** 2) for s in found}
    for lot in lots(found, need, memory):
        factors = {
            s: Kronecker(s, *(torch.zeros(s.blocks, n, n, dtype=torch.float64) for n in s.shape[1:])) for s in lot
        }
        names = [s.weight.name for s in lot]
        function = Differentiable(groups.graph, names, [v.name for s in lot for v in (s.x, s.y)])
        samples = 0
        rows = dict.fromkeys(lot, 0)
        for example in data():
            outputs, values = function(example.inputs)
            losses = losses_of(outputs[0], example, loss, seed)
            samples += len(losses)
            grads = gradients(losses.sum(), {s.y.name: values[s.y.name] for s in lot})
            for site, f in factors.items():
                left, right = site.factors(values[site.x.name].detach(), grads[site.y.name])
                rows[site] += left.shape[2]
                f.left += (left @ left.transpose(1, 2)).cpu()
                f.right += (right @ right.transpose(1, 2)).cpu()
        if not samples:
            raise no_samples()
        for site, f in factors.items():
            f.left /= samples
            f.right /= rows[site]  # which of the two is the input does not matter: only their product is used
            yield f


@recorded
def hessian_products(
    groups: AxisGroups,
    weights: Iterable[str],
    data: Iterable[Example],
    direction: Callable[[int, str, Tensor], Tensor],
    probes: int,
    loss: Loss = "cross_entropy",
    seed: int = 0,
) -> Iterator[tuple[int, str, Tensor, Tensor]]:
    """Yields (probe, weight name, direction z, H z) where H is the Hessian of the mean loss over all samples.

    Args:
        direction: (probe, weight name, weight) -> z, the same at every call, so that the products add up over batches.

    Raises:
        ConstraintError: there is no sample.
    """
    function = Differentiable(groups.graph, weights)
    z = [{n: direction(p, n, t.detach()) for n, t in function.leaves.items()} for p in range(probes)]
    total = [{n: torch.zeros_like(t, dtype=torch.float64) for n, t in function.leaves.items()} for _ in range(probes)]
    samples = 0
    twice = True
    # The fused attention kernels have no second derivative.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for example in data:
            losses = losses_of(function(example.inputs)[0][0], example, loss, seed)
            samples += len(losses)
            first = gradients(losses.sum(), function.leaves, create_graph=True) if twice else {}
            for p in range(probes):
                found: Mapping[str, Tensor] | None = _second(first, z[p], function.leaves) if twice else None
                if found is None:
                    twice = False
                    found = _difference(function, example, z[p], loss, seed)
                for name, hz in found.items():
                    total[p][name] += hz.detach()
    if not samples:
        raise no_samples()
    for p in range(probes):
        for name, hz in total[p].items():
            yield p, name, z[p][name], hz / samples


def _second(
    first: Mapping[str, Tensor], z: Mapping[str, Tensor], leaves: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    """H z by differentiating the gradients; None where an operator has no second derivative (hard sigmoid)."""
    along = sum(((first[n] * z[n]).sum() for n in first), torch.zeros(()))
    try:
        return gradients(along, leaves, retain_graph=True)
    except (RuntimeError, NotImplementedError) as error:
        if "not implemented" not in str(error):
            raise
        return None


def _difference(
    function: Differentiable, example: Example, z: Mapping[str, Tensor], loss: Loss, seed: int
) -> dict[str, Tensor]:
    """H z by a central difference of the gradients along z: a step of 1e-3 of the weights' size."""
    leaves = function.leaves
    before = {n: t.detach().clone() for n, t in leaves.items()}
    size = float(sum(t.double().square().sum() for t in before.values()))
    length = float(sum(t.double().square().sum() for t in z.values()))
    step = 1e-3 * (size / max(length, 1e-300)) ** 0.5 or 1e-3
    if example.target is None and isinstance(loss, str):  # the target must not move with the weights
        output = function(example.inputs)[0][0]
        example = Example(example.inputs, drawn_target(output, example.inputs, loss, seed))
    ends: list[dict[str, Tensor]] = []
    for sign in (1, -1):
        for n, t in leaves.items():
            t.data.copy_(before[n] + sign * step * z[n])
        losses = losses_of(function(example.inputs)[0][0], example, loss, seed)
        ends.append(gradients(losses.sum(), leaves))
    for n, t in leaves.items():
        t.data.copy_(before[n])
    return {n: (ends[0][n].double() - ends[1][n].double()) / (2 * step) for n in leaves}


def signs(seed: int, probe: int, key: str, size: int) -> np.ndarray:
    """Independent +1 and -1, float32 [size], the same for the same seed, probe and key."""
    rng = np.random.default_rng([seed, probe, zlib.crc32(key.encode())])
    return (2 * rng.integers(0, 2, size) - 1).astype(np.float32)


def hessian_diagonal(
    groups: AxisGroups,
    weights: Iterable[str],
    data: Iterable[Example],
    probes: int = 16,
    loss: Loss = "cross_entropy",
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Diagonal of the Hessian of the mean loss, estimated by Hutchinson's method as the mean of z * Hz over random
    signs z ("AdaHessian: An Adaptive Second Order Optimizer"): float64 per weight; unbiased, may be negative."""

    def direction(probe: int, name: str, weight: Tensor) -> Tensor:
        found = torch.from_numpy(signs(seed, probe, name, weight.numel()))
        return found.reshape(weight.shape).to(weight)

    total: dict[str, Any] = {}
    for _, name, z, hz in hessian_products(groups, weights, data, direction, probes, loss, seed):
        total[name] = total.get(name, 0) + (z * hz).cpu().numpy() / probes
    return total
