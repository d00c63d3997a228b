"""Learned rotations, all groups at once, by what they do to the network's outputs: KL divergence over top logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from ...graph.errors import ConstraintError
from .boundary import Boundary, environment
from .common import Scaler, sites_of
from .hadamard import ones_basis
from .learn import Learned, Problem, readers_of, within
from .learning import cayley
from .network import Env, Network, turned

if TYPE_CHECKING:
    from torch import Tensor

Turn = Callable[["Tensor", "Tensor"], "tuple[Tensor, Tensor]"]
"""Operand [.., in] and weight [out, in] -> both in another basis."""

CHECKED = 4
"""Batches on which the steps are compared."""


def learn_outputs(p: Problem) -> Learned:
    """Lower the divergence between the outputs of the float network and of the quantized one.

    The loss of ``OstQuant`` (KL-Top): both networks' logits at the positions of the float network's ``top`` largest,
    softmax over these alone. Every matrix moves along the Cayley map from its start, the diagonals beside them;
    rounding passes gradients on as they are. One batch a step; every ``steps / 8`` of them the mean loss of the first
    batches is looked at and the best is kept, the start included.

    Memory: one batch's activations with gradients, the top logits of all batches.
    """
    net = Network(p.graph, [s.boundary for s in sites_of(p.boundaries, [])], p.formats, p.options.float_inputs)
    envs = net.bind(p.batches)
    teachers = [_top(net, env, p.options.top) for env in envs]
    scaler = Scaler(p.graph, environment(p.graph, p.ctx))
    free, turns = {}, {}
    for group, found in p.chosen.items():
        n = group.size
        size = n - 1 if found.ones else n
        free[group] = torch.zeros((size, size), requires_grad=True)
        basis = torch.from_numpy(ones_basis(n)).float() if found.ones else None
        turns[group] = (torch.from_numpy(p.rotations[group]).float(), basis)
    logs: dict[Boundary, tuple[Tensor, Tensor]] = {}
    for boundary in dict.fromkeys(b for group in p.chosen for b in readers_of(p.groups, group, p.boundaries)):
        classes, refused = scaler.probe(boundary)
        if p.options.scale and refused is None:
            where = torch.arange(boundary.size) if classes is None else torch.from_numpy(classes)
            logs[boundary] = torch.zeros(int(where.max()) + 1, requires_grad=True), where

    fixed = {name: kronecker(left, right) for name, (left, right) in p.online.items()}

    def turn_of(b: Boundary) -> list[Turn]:
        return [*([scaled(*logs[b])] if b in logs else []), *([fixed[b.name]] if b.name in fixed else [])]

    def loss(i: int) -> Tensor:
        matrices = {g.atom: begin @ within(cayley(free[g]), basis) for g, (begin, basis) in turns.items()}
        env = dict(envs[i])
        maps = {b: chained(turn_of(b)) for b in net.boundaries if b in logs or b.name in p.online}
        net.execute(range(net.length), env, maps, turned(p.groups, matrices), free=True)
        return _divergence(net, env, teachers[i])

    def check() -> float:
        with torch.no_grad():
            return float(np.mean([float(loss(i)) for i in range(min(CHECKED, len(envs)))]))

    variables = [*free.values(), *(log for log, _ in logs.values())]
    optimizer = torch.optim.Adam(variables, lr=p.options.rate)
    best, kept = check(), [v.detach().clone() for v in variables]
    first, every = best, max(1, p.options.steps // 8)
    for step in range(1, p.options.steps + 1):
        optimizer.param_groups[0]["lr"] = p.options.rate * min(1.0, 2 * (1 - (step - 1) / p.options.steps))
        optimizer.zero_grad()
        loss((step - 1) % len(envs)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step % every == 0 or step == p.options.steps) and (now := check()) < best:
            best, kept = now, [v.detach().clone() for v in variables]
    result = Learned(dict(p.rotations), details={"layers": {}, "divergence_start": first, "divergence": best})
    for (group, found), value in zip(p.chosen.items(), kept[: len(free)], strict=True):
        wide = torch.from_numpy(ones_basis(group.size)) if found.ones else None
        final = torch.from_numpy(p.rotations[group]) @ within(cayley(value.double()), wide)
        result.rotations[group] = final.numpy()
    for (boundary, (_, where)), log in zip(logs.items(), kept[len(free) :], strict=True):
        result.scales.append((boundary, np.exp(log.double().numpy())[where.numpy()]))
    return result


def chained(turns: Sequence[Turn]) -> Turn:
    """One map after the other."""

    def turn(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        for each in turns:
            x, w = each(x, w)
        return x, w

    return turn


def kronecker(left: np.ndarray, right: np.ndarray) -> Turn:
    """``x (left kron right)`` for orthogonal matrices, the same for the weight."""
    first, second = (torch.from_numpy(m).float() for m in (left, right))

    def one(data: Tensor) -> Tensor:
        return (first.T @ data.reshape(*data.shape[:-1], len(first), len(second)) @ second).reshape(data.shape)

    return lambda x, w: (one(x), one(w))


def scaled(log: Tensor, where: Tensor) -> Turn:
    """``x / s`` and ``W s`` with ``s = exp(log)`` per class of channels."""

    def turn(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        s = log.exp()[where]
        return x / s, w * s

    return turn


def _top(net: Network, env: Env, count: int) -> list[tuple[Tensor, Tensor]]:
    """(indices, probabilities among them) of the float network's largest logits, per output."""
    run = dict(env)
    with torch.no_grad():
        net.execute(range(net.length), run, free=True)
    found = [v for v in net.outputs(run) if v.ndim >= 2]
    if not found:
        raise ConstraintError("there are no logits to compare", node=net.graph.name, expected="an output of rank 2")
    tops = [v.topk(min(count, v.shape[-1]), -1) for v in found]
    return [(t.indices, F.softmax(t.values, -1)) for t in tops]


def _divergence(net: Network, env: Env, teacher: list[tuple[Tensor, Tensor]]) -> Tensor:
    made = [v for v in net.outputs(env) if v.ndim >= 2]
    losses = []
    for logits, (at, wanted) in zip(made, teacher, strict=True):
        logs = F.log_softmax(logits.gather(-1, at), -1)
        losses.append((wanted * (wanted.clamp(min=1e-12).log() - logs)).sum(-1).mean())
    return torch.stack(losses).sum()
