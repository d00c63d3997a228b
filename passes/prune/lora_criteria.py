"""Importance from the gradients of low-rank adapters alone: the weights of the model get no gradient buffer.

A weight W runs beside an adapter, ``y = W x + s B (A x)``, and only A and B are differentiated. One descent step of
unit rate takes the adapter from ``BA`` to ``(B - dB)(A - dA)``, so that the step it stands for on the weight is
``G = s (dB A + B dA - dB dA)``, with dB and dA the gradients. The gradient of the weight itself is never formed: it
would be the product of output gradients and inputs, of which the adapter only sees projections on its rank.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...graph.groups import AxisGroup
from ...graph.ir import Graph, Node, Value, Weight
from ..base import Needs
from ..sites import Site, sites_of
from .criterion import Parts, criterion
from .evidence import Evidence
from .slabs import members_that_count, removals, slab_sums

RANK = 8
"""Rank of the adapters that are attached where the model has none."""
DECAY = 0.9
"""Share of the past in the moving average over steps."""


@dataclass
class Adapter:
    """A low-rank branch beside one weight.

    Attributes:
        a, b: names of its weights, [r, in, kernel...] and [out, r, 1...] (per group of a convolution).
        scale: the constant s of ``y = W x + s B (A x)``.
        blocks: groups of the convolution; the product is taken per block.
        swapped: the weight is stored as [in, out].
        own: the model's own adapter, which is read as it is.
    """

    weight: Weight
    a: str
    b: str
    scale: float
    blocks: int
    swapped: bool
    own: bool

    def product(self, b: Any, a: Any) -> Any:
        """B A per block, in the layout of the weight."""
        first = b.reshape(self.blocks, b.shape[0] // self.blocks, -1)
        second = a.reshape(self.blocks, a.shape[0] // self.blocks, -1)
        found = first @ second
        return found[0].T if self.swapped else found.reshape(self.weight.shape)


@criterion("lora", Needs.GRADIENTS, relative=False)
def lora(g: AxisGroup, evidence: Evidence) -> Parts:
    """``|sum of G * (W + s B A)|`` over the slabs that read the index, G the step of low-rank adapters, as a moving
    average over the batches: the gradients of the weights are never computed. The importance of "LoRAPrune: Structured
    Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning" for a slab as a whole, as "taylor" is. Adapters that the
    model already has are read; other linear nodes and convolutions get one of rank 8 with B = 0 and A drawn anew for
    every batch, a random projection of the gradient: more batches, better scores. Each batch is a step: unlike other
    criteria this one depends on how the samples are batched."""
    slopes = adapter_importance(evidence)[0]
    parts = []
    for part in removals(g):
        known = [slab_sums(g, m, slopes[m.weight.name]) for m in part if m.weight.name in slopes]
        if known:
            parts.append(np.abs(np.sum(known, axis=0)))
    return parts


@criterion("lora_elements", Needs.GRADIENTS)
def lora_elements(g: AxisGroup, evidence: Evidence) -> Parts:
    """``sum of (G * (W + s B A))^2`` over the slab of every member that counts, G as for "lora": the formula of
    "LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning", element by element."""
    squares = adapter_importance(evidence)[1]
    return [slab_sums(g, m, squares[m.weight.name]) for m in members_that_count(g) if m.weight.name in squares]


def adapter_importance(evidence: Evidence) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Moving averages of G * (W + s B A) and of its square by weight name, float64, in the weight's shape."""
    from ..gradients import recorded

    found: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
    found = evidence.once("lora", lambda: recorded(_steps)(evidence))
    return found


def _steps(evidence: Evidence) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    import torch

    from ..gradients import Differentiable, gradients, losses_of, no_samples

    graph = evidence.groups.graph.clone()
    adapters = attach(graph, [w.name for w in evidence.weights])
    if not adapters:
        return {}, {}
    function = Differentiable(graph, [n for ad in adapters for n in (ad.a, ad.b)])
    leaves = function.leaves
    base = {ad.weight.name: torch.from_numpy(np.array(ad.weight.numpy(), dtype=np.float32)) for ad in adapters}
    moving: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    steps = 0
    for example in evidence.examples():
        for ad in adapters:
            if not ad.own:
                a = leaves[ad.a]
                a.data.copy_(torch.from_numpy(_directions(ad, tuple(a.shape), evidence.seed, steps)))
        outputs, _ = function(example.inputs)
        grads = gradients(losses_of(outputs[0], example, evidence.loss, evidence.seed).mean(), leaves)
        steps += 1
        for ad in adapters:
            a, b = leaves[ad.a].detach().float().cpu(), leaves[ad.b].detach().float().cpu()
            da, db = grads[ad.a].float().cpu(), grads[ad.b].float().cpu()
            step = ad.scale * (ad.product(db, a) + ad.product(b, da) - ad.product(db, da))
            w = base[ad.weight.name]
            slope = (step * (w + ad.scale * ad.product(b, a))).double()
            for average, now in zip(moving, (slope, slope.square()), strict=True):
                average[ad.weight.name] = DECAY * average.get(ad.weight.name, 0) + (1 - DECAY) * now
    if not steps:
        raise no_samples()
    slopes, squares = ({n: (m / (1 - DECAY**steps)).numpy() for n, m in average.items()} for average in moving)
    return slopes, squares


def _directions(adapter: Adapter, shape: tuple[int, ...], seed: int, step: int) -> np.ndarray:
    """Random values of A, float64: entries of variance 1 / rank, so that on average A^T A is the identity and the step
    dB A the gradient of the weight."""
    rng = np.random.default_rng([seed, step, zlib.crc32(adapter.weight.name.encode())])
    return rng.uniform(-1, 1, shape) * np.sqrt(3 * adapter.blocks / shape[0])


def attach(graph: Graph, names: list[str]) -> list[Adapter]:
    """The adapters of the named weights: those that the graph has, and new ones (zero: the function stays).

    Weights used otherwise than by linear nodes and plain convolutions get none.
    """
    own = {}
    for name in names:
        sites = sites_of(graph.weights[name])
        if sites is not None and len(sites) == 1 and (found := _own_adapter(sites[0])) is not None:
            own[name] = found
    theirs = {n for ad in own.values() for n in (ad.a, ad.b)}
    adapters = list(own.values())
    for name in names:
        sites = sites_of(graph.weights[name])
        if name in own or name in theirs or sites is None or not all(_plain(s) for s in sites):
            continue
        adapters.append(_new_adapter(graph, sites))
    return adapters


def _plain(site: Site) -> bool:
    attrs = site.node.attrs
    if site.conv:
        return not site.swapped and all(lo == hi for lo, hi in attrs["padding"])
    return float(attrs.get("alpha", 1.0)) == 1.0


def _new_adapter(graph: Graph, sites: list[Site]) -> Adapter:
    weight = sites[0].weight
    blocks, rows, columns = sites[0].shape
    swapped = sites[0].swapped
    made, read = (columns, rows) if swapped else (rows, columns)
    rank = min(RANK, made, read)
    kernel = tuple(weight.shape[2:]) if sites[0].conv else ()
    dtype = weight.numpy().dtype
    shape = (blocks * rank, weight.shape[1], *kernel) if sites[0].conv else (rank, read)
    first = graph.add_weight(f"{weight.name}.lora_a", np.zeros(shape, dtype), trainable=True)
    second = graph.add_weight(
        f"{weight.name}.lora_b", np.zeros((blocks * made, rank, *[1] * len(kernel)), dtype), trainable=True
    )
    for site in sites:
        _branch(graph, site, first, second, len(kernel))
    assert first.weight is not None and second.weight is not None
    return Adapter(weight, first.weight.name, second.weight.name, 1.0, blocks, swapped, own=False)


def _branch(graph: Graph, site: Site, a: Value, b: Value, spatial: int) -> None:
    """y becomes y + B (A x)."""
    node = site.node
    if site.conv:
        keys = ("stride", "padding", "dilation", "groups")
        down = {**{k: node.attrs[k] for k in keys}, "transposed": False, "output_padding": [0] * spatial}
        ones = {"stride": [1] * spatial, "padding": [(0, 0)] * spatial, "dilation": [1] * spatial}
        up = {**down, **ones}
    else:
        down = up = {"transposed_weight": False, "alpha": 1.0, "beta": 1.0}
    low = graph.insert(node.op, [site.x, a], down, name=f"{node.name}_lora_a", after=node)
    high = graph.insert(node.op, [low.output, b], up, name=f"{node.name}_lora_b", after=low)
    total = graph.insert("add", [node.output, high.output], name=f"{node.name}_lora", after=high)
    graph.replace_uses(node.output, total.output, except_nodes=[total])


def _own_adapter(site: Site) -> Adapter | None:
    """The model's adapter beside a linear node: y added to s B (A x), with x seen through dropouts and scalings."""
    if site.conv:
        return None
    for total, position in site.y.uses:
        other = total.input(1 - position) if total.op == "add" and position in (0, 1) else None
        high, after = _through(other)
        low, between = _through(None if high is None else high.input(0))
        start, before = (None, 1.0) if low is None else _source(low.input(0))
        if high is None or low is None or start is not site.x:
            continue
        b, a = _matrix(high), _matrix(low)
        if a is None or b is None or a.shape[0] >= min(site.weight.shape):
            continue
        return Adapter(site.weight, a.name, b.name, after * between * before, 1, site.swapped, own=True)
    return None


def _matrix(node: Node) -> Weight | None:
    """The weight [out, in] of a linear node without bias."""
    weight = node.inputs[1].weight if node.inputs[1] is not None else None
    plain = node.input(2) is None and not node.attrs.get("transposed_weight") and node.attrs.get("alpha", 1.0) == 1.0
    return weight if plain else None


def _through(value: Value | None) -> tuple[Node | None, float]:
    """The linear node behind a value and the scalars that multiply it on the way."""
    found, scale = _source(value)
    node = None if found is None else found.producer
    return (node if node is not None and node.op == "linear" else None), scale


def _source(value: Value | None) -> tuple[Value | None, float]:
    scale = 1.0
    while value is not None and value.producer is not None:
        node = value.producer
        if node.op == "identity":
            value = node.inputs[0]
        elif node.op == "mul" and (c := _scalar(node)) is not None:
            value, scale = node.inputs[c[0]], scale * c[1]
        else:
            break
    return value, scale


def _scalar(node: Node) -> tuple[int, float] | None:
    """(position of the other operand, the scalar) of a multiplication by a constant."""
    for i in (0, 1):
        other = node.input(1 - i)
        if other is not None and other.literal is not None and other.literal.size == 1:
            return i, float(other.literal.reshape(-1)[0])
    return None
