"""Where a stored matrix multiplies activations: its two operands as rows, for Gram matrices and sample gradients.

At a linear node or convolution the gradient of the weight is ``sum over rows t of left_t right_t^T``: for a linear
node and an ordinary convolution ``left`` holds the output's gradient and ``right`` the input (its patches); with the
weight stored the other way round (a transposed weight, a transposed convolution) they swap. Both are kept in the
layout of the weight: ``[blocks, axis 0 of a block, axis 1 of a block times the kernel]``, where a block is a
convolution's group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from ..graph.groups import AxisGroups
from ..graph.ir import Graph, Node, Value, Weight
from ..graph.space import Atom, Leaf, Space, Sum, norm

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Site:
    """One use of a weight as the matrix of a linear node or the kernel of a convolution.

    Attributes:
        swapped: axis 0 of the weight reads the input (transposed weight or convolution) instead of making the output.
    """

    node: Node
    weight: Weight

    @property
    def x(self) -> Value:
        """The input."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def y(self) -> Value:
        """The output."""
        return self.node.output

    @property
    def conv(self) -> bool:
        return self.node.op == "conv"

    @property
    def swapped(self) -> bool:
        return bool(self.node.attrs.get("transposed" if self.conv else "transposed_weight", False))

    @property
    def blocks(self) -> int:
        return int(self.node.attrs.get("groups", 1)) if self.conv else 1

    @property
    def in_axis(self) -> int:
        """Axis of the weight that reads the input."""
        return 0 if self.swapped else 1

    @property
    def x_axis(self) -> int:
        """Axis of the input that the weight reads."""
        return 1 if self.conv else len(self.x.hint or ()) - 1

    @property
    def y_axis(self) -> int:
        """Axis of the output that the weight makes."""
        return 1 if self.conv else len(self.y.hint or ()) - 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """(blocks, rows of a block, columns of a block times the kernel) of the weight."""
        first, *rest = self.weight.shape
        return self.blocks, first // self.blocks, prod(rest)

    def factors(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """``left`` [blocks, rows, T] and ``right`` [blocks, columns, T] with one entry per position of all samples."""
        left, right = self.sample_factors(x, grad)
        return left.permute(1, 2, 0, 3).flatten(2), right.permute(1, 2, 0, 3).flatten(2)

    def sample_factors(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The same with a leading axis (what is axis 0 of x and grad): [N, blocks, rows, T], [N, blocks, columns, T].

        The product over T is the gradient of the weight for each n.
        """
        if not self.conv:
            scale = float(self.node.attrs.get("alpha", 1.0))
            made, read = (t.reshape(t.shape[0], 1, -1, t.shape[-1]).transpose(2, 3) for t in (grad * scale, x))
            return (read, made) if self.swapped else (made, read)
        plain, patched = (x, grad) if self.swapped else (grad, x)
        left = plain.unflatten(1, (self.blocks, -1)).flatten(3)
        patches = self._patches(patched, tuple(plain.shape[2:]))
        return left, patches

    def _patches(self, x: Tensor, places: tuple[int, ...]) -> Tensor:
        """[N, C, *spatial] -> [N, blocks, C / blocks * kernel, places]: what the kernel sees at each place."""
        import torch.nn.functional as F

        attrs = self.node.attrs
        kernel = self.weight.shape[2:]
        pads = [p for pair in reversed(attrs["padding"]) for p in pair]
        if any(p > 0 for p in pads):
            x = F.pad(x, [max(p, 0) for p in pads])
        for i, (k, stride, dilation) in enumerate(zip(kernel, attrs["stride"], attrs["dilation"], strict=True)):
            reach = (k - 1) * dilation + 1
            missing = (places[i] - 1) * stride + reach - x.shape[2 + i]
            if missing > 0:  # output_padding of a transposed convolution, ceil-like shapes
                x = F.pad(x, [0, 0] * (x.dim() - 3 - i) + [0, missing])
            x = x.unfold(2 + i, reach, stride).narrow(2 + i, 0, places[i])[..., ::dilation]
        n, c = x.shape[:2]
        rank = len(kernel)
        x = x.reshape(n, self.blocks, c // self.blocks, *x.shape[2:])
        order = [0, 1, 2, *range(3 + rank, 3 + 2 * rank), *range(3, 3 + rank)]
        return x.permute(order).reshape(n, self.blocks, (c // self.blocks) * prod(kernel), prod(places))


def uses_as_matrix(weight: Weight) -> list[Site]:
    """Every use of a weight as the matrix of a linear node or the kernel of a convolution."""
    found = []
    for node, position in weight.value.uses if weight.value is not None else ():
        x = node.input(0)
        if node.op not in ("linear", "conv") or position != 1 or x is None or x.is_const:
            continue
        if x.hint is not None and len(x.hint) > 1 and node.output.hint is not None:
            found.append(Site(node, weight))
    return found


def sites_of(weight: Weight) -> list[Site] | None:
    """Every use of a weight; None if it is also used otherwise (or not at all), so that the sites do not say all."""
    found = uses_as_matrix(weight)
    uses = weight.value.uses if weight.value is not None else []
    return found if found and len(found) == len(uses) else None


class SampleAxis:
    """Where the samples of a batch lie in an inner value, read off the index spaces: windows may be split off, the
    sequence may come first."""

    def __init__(self, groups: AxisGroups) -> None:
        self.spaces = groups.analysis.spaces
        self.atom = _batch_atom(groups.graph, groups)

    def first(self, value: Value, x: Tensor, samples: int) -> Tensor | None:
        """``x`` with the samples on a new axis 0 and the axis they were taken from behind it; None where unknown."""
        if self.atom is None or value not in self.spaces:
            return None
        place = None
        for axis, e in enumerate(self.spaces[value]):
            around = _around(norm(e), self.atom)
            if around is None or place is not None and around != ():
                return None
            if around:
                place = axis, *around
        if place is None:
            return None
        axis, before, after = place
        if x.shape[axis] != before * samples * after:
            return None
        split = x.unflatten(axis, (before, samples, after)).movedim(axis + 1, 0)
        return split.flatten(1 + axis, 2 + axis)


def _batch_atom(graph: Graph, groups: AxisGroups) -> Atom | None:
    spaces = groups.analysis.spaces
    if not graph.outputs or graph.outputs[0] not in spaces or not spaces[graph.outputs[0]]:
        return None
    out = norm(spaces[graph.outputs[0]][0])
    for value in graph.inputs:
        if spaces.get(value):
            e = norm(spaces[value][0])
            if isinstance(e, Leaf) and isinstance(out, Leaf) and e.atom is out.atom and e.perm is out.perm is None:
                return e.atom
    return None


def _around(e: Space, atom: Atom) -> tuple[int, int] | tuple[()] | None:
    """Sizes of the factors before and after the atom; () where it does not occur, None where it is not a factor."""
    if isinstance(e, Leaf):
        return () if e.atom is not atom else ((1, 1) if e.perm is None else None)
    if isinstance(e, Sum):
        return () if all(_around(t, atom) == () for t in e.terms) else None
    found = [i for i, f in enumerate(e.factors) if _around(norm(f), atom) != ()]
    if not found:
        return ()
    if len(found) > 1 or _around(norm(e.factors[found[0]]), atom) != (1, 1):
        return None
    at = found[0]
    return prod(f.size for f in e.factors[:at]), prod(f.size for f in e.factors[at + 1 :])


def lots(sites: list[Site], need: dict[Site, int], memory: int) -> Iterator[list[Site]]:
    """Sites in portions whose needs (bytes) stay under ``memory``; a single larger one is a portion of its own."""
    lot: list[Site] = []
    size = 0
    for site in sites:
        if lot and size + need[site] > memory:
            yield lot
            lot, size = [], 0
        lot.append(site)
        size += need[site]
    if lot:
        yield lot


def pair_sums(metric: Tensor, rows: Tensor, other: Tensor, at: Tensor, size: int) -> Tensor:
    """``s_i = sum of metric[r, s] * (rows[r] . other[s])`` over the pairs r, s that stand for index i; float64 [size].

    Args:
        metric: [n, n].
        rows, other: [n, m].
        at: index of each row, -1 for none; int64 [n].
    """
    import torch

    counts = torch.bincount(at[at >= 0], minlength=size)
    order = torch.argsort(at, stable=True)[int((at < 0).sum()) :]
    found = torch.zeros(size, dtype=torch.float64)
    present = torch.nonzero(counts).reshape(-1)
    for count in torch.unique(counts[present]).tolist():
        mine = present[counts[present] == count]
        starts = (torch.cumsum(counts, 0) - counts)[mine]
        index = order[starts[:, None] + torch.arange(count)[None, :]]
        products = torch.bmm(rows[index], other[index].transpose(1, 2))
        found[mine] = (products * metric[index[:, :, None], index[:, None, :]]).sum((1, 2))
    return found
