"""Learned rotations: each group's matrix (and a diagonal) lowers the error of the quantized layers that read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...graph.groups import AxisGroup, AxisGroups
from ...graph.ir import Graph
from ...graph.rotate import Freedom
from ...graph.space import Leaf, Prod, norm
from ..base import Context
from ..fold.operands import inputs_first
from .boundary import Boundary, environment
from .common import Scaler, Site, layer_name, sites_of
from .grids import Formats
from .hadamard import ones_basis
from .learning import cayley, fake_quantize, qsur
from .samples import Rows, sample

if TYPE_CHECKING:
    from torch import Tensor

    from .rotate import Rotate


@dataclass(frozen=True)
class Problem:
    """What is to be learned, and on what.

    Attributes:
        chosen: the groups to rotate and what their rotation may be; ``rotations``: their matrices at the start.
        boundaries: of all linear layers of the graph.
        online: the two factors of rotations at run time, by the name of their boundary.
        formats: that the layers are rounded to meanwhile.
    """

    graph: Graph
    groups: AxisGroups
    chosen: Mapping[AxisGroup, Freedom]
    rotations: Mapping[AxisGroup, np.ndarray]
    boundaries: Sequence[Boundary]
    online: Mapping[str, tuple[np.ndarray, np.ndarray]]
    options: Rotate
    formats: Formats
    batches: Any
    ctx: Context


@dataclass
class Learned:
    """What learning found.

    Attributes:
        rotations: group -> float64 orthogonal matrix.
        scales: (boundary, factors that divide it in the rotated basis).
        details: for the report: per layer the loss before and after, and QSUR.
    """

    rotations: dict[AxisGroup, np.ndarray]
    scales: list[tuple[Boundary, np.ndarray]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class _Reader:
    """A boundary that reads a group: channels are (outer, index of the group)."""

    site: Site
    rows: np.ndarray
    classes: np.ndarray | None
    scalable: bool


def learn(p: Problem) -> Learned:
    """Lower, for every group on its own, the summed relative squared error of its readers' quantized outputs.

    Ranges may shrink meanwhile, as those of a quantizer that clips do. The matrix moves along the Cayley map from its
    start; of all steps the best is kept, the start included. Groups whose readers hold the indices otherwise than as
    the inner factor of their input channels keep their start. Rotations at run time (``online``) are not
    simulated.
    """
    scaler = Scaler(p.graph, environment(p.graph, p.ctx))
    readers = {group: readers_of(p.groups, group, p.boundaries) for group in p.chosen}
    wanted = {b.name: b.axis for found in readers.values() for b in found}
    rows = sample(p.graph, p.batches, wanted, Rows, p.options.rows, p.ctx.progress)
    result = Learned(dict(p.rotations), details={"layers": {}})
    for group in p.ctx.progress(list(p.chosen), "learning rotations"):
        sites = [_reader(scaler, b, rows[b.name], p.options.scale) for b in readers[group]]
        if sites:
            _one(result, group, p.chosen[group], sites, p.options, p.formats, p.ctx.seed)
    return result


def readers_of(groups: AxisGroups, group: AxisGroup, boundaries: Sequence[Boundary]) -> list[Boundary]:
    """The boundaries whose readers' input channels are (outer, index of the group)."""
    found = []
    for boundary in boundaries:
        node = boundary.readers[0][0]
        weight = node.inputs[1]
        if weight is None or weight not in groups.analysis.spaces or node.op == "conv":
            continue
        e = norm(groups.analysis.of(weight)[0 if node.op == "matmul" or inputs_first(node) else 1])
        inner = e.factors[-1] if isinstance(e, Prod) and e.factors else e
        if isinstance(inner, Leaf) and inner.atom is group.atom and inner.perm is None:
            found.append(boundary)
    return found


def _reader(scaler: Scaler, boundary: Boundary, rows: Rows, scale: bool) -> _Reader:
    classes, refused = scaler.probe(boundary)
    return _Reader(sites_of([boundary], [])[0], rows.rows, classes, scale and refused is None)


def _one(
    result: Learned,
    group: AxisGroup,
    found: Freedom,
    readers: list[_Reader],
    options: Rotate,
    formats: Formats,
    seed: int,
) -> None:
    import torch

    torch.manual_seed(seed)
    n = group.size
    begin = torch.from_numpy(result.rotations[group]).float()
    free = torch.zeros((n - 1, n - 1) if found.ones else (n, n), requires_grad=True)
    basis = torch.from_numpy(ones_basis(n)).float() if found.ones else None
    logs = [torch.zeros(_classes(r), requires_grad=r.scalable) for r in readers]
    data = [
        (torch.from_numpy(r.rows), torch.from_numpy(np.concatenate(r.site.matrices).astype(np.float32)))
        for r in readers
    ]
    clips = torch.full((len(readers), 2), 4.0 if options.clip else 40.0, requires_grad=options.clip)  # by a sigmoid
    optimizer = torch.optim.Adam([p for p in (free, clips, *logs) if p.requires_grad], lr=options.rate)
    first: list[float] = []
    best: tuple[float, list[float], Tensor, list[Tensor]] | None = None
    for step in range(options.steps + 1):
        turn = begin @ within(cayley(free), basis)
        losses = [
            _loss(x, w, turn, _spread(log, r.classes), torch.sigmoid(cut), formats)
            for (x, w), log, cut, r in zip(data, logs, clips, readers, strict=True)
        ]
        total = torch.stack(losses).sum()
        now = [float(v.detach()) for v in losses]
        first = first or now
        if best is None or sum(now) < best[0]:
            best = sum(now), now, free.detach().clone(), [log.detach().clone() for log in logs]
        if step < options.steps:
            optimizer.zero_grad()
            total.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert best is not None
    exact = cayley(best[2].double())
    wide = None if basis is None else torch.from_numpy(ones_basis(n))
    final = torch.from_numpy(result.rotations[group]) @ within(exact, wide)
    result.rotations[group] = final.numpy()
    for reader, log, before, after in zip(readers, best[3], first, best[1], strict=True):
        factors = np.exp(_spread(log.double(), reader.classes).numpy())
        if reader.scalable:
            result.scales.append((reader.site.boundary, factors))
        turned = reader.rows.reshape(-1, reader.rows.shape[1] // n, n) @ final.float().numpy()
        turned = turned.reshape(reader.rows.shape) / factors.astype(np.float32)
        name = ", ".join(dict.fromkeys(layer_name(node) for node, _ in reader.site.boundary.readers))
        result.details["layers"][name] = {
            "loss_start": before, "loss": after, "qsur_before": qsur(reader.rows), "qsur_after": qsur(turned),
        }  # fmt: skip


def within(inner: Tensor, basis: Tensor | None) -> Tensor:
    """The matrix itself, or the one that keeps the ones and acts as ``inner`` on the rest."""
    import torch

    if basis is None:
        return inner
    return basis.T @ torch.block_diag(torch.ones(1, 1, dtype=inner.dtype), inner) @ basis


def _classes(reader: _Reader) -> int:
    return reader.site.boundary.size if reader.classes is None else int(reader.classes.max()) + 1


def _spread(log: Tensor, classes: np.ndarray | None) -> Tensor:
    import torch

    return log if classes is None else log[torch.from_numpy(classes)]


def _loss(x: Tensor, w: Tensor, turn: Tensor, log: Tensor, clip: Tensor, formats: Formats) -> Tensor:
    """``|Q(x R / s) Q(W R s)^T - x W^T|^2`` over the power of the output; ``clip``: shares of both ranges used."""
    n = len(turn)
    s = log.exp()
    turned = (x.reshape(len(x), -1, n) @ turn).reshape(x.shape) / s
    weight = (w.reshape(len(w), -1, n) @ turn).reshape(w.shape) * s
    made_x = fake_quantize(turned, formats.activation, per_row=formats.per_token, clip=clip[0])
    made_w = fake_quantize(weight, formats.weight, per_row=True, clip=clip[1])
    made = made_x @ made_w.T
    reference = x @ w.T
    return (made - reference).square().mean() / reference.square().mean().clamp(min=1e-12)
