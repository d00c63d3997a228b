"""Sensitivity by measurement: one tensor quantized at a time, and only what comes after it computed again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ....graph.errors import ConstraintError
from ....graph.ir import Graph, Value
from ...base import Progress, no_progress
from ...recover.layers import LINEAR
from ...recover.runner import Runner, bound, runner

Metric = Literal["sqnr", "kl", "loss"]


@dataclass
class Trial:
    """One tensor and the ways to change it.

    Attributes:
        name: how the result is called.
        value: a weight's value, or an activation (a graph input or the result of a node).
        choices: labels; ``change(label, tensor)`` gives the tensor under that choice (numpy in, numpy out).
    """

    name: str
    value: Value
    choices: Sequence[Hashable]
    change: Callable[[Any, np.ndarray], np.ndarray]


def measure(
    graph: Graph,
    trials: Sequence[Trial],
    batches: Iterable[Any],
    metric: Metric | Callable[[list[list[Tensor]], list[list[Tensor]]], float] = "sqnr",
    progress: Progress = no_progress,
    others: Mapping[str, Any] | None = None,
) -> dict[str, dict[Any, float]]:
    """What each choice of each trial costs at the outputs, all else in float or as chosen: {name: {choice: loss}}.

    The float network is executed once, from front to back; at each trial its choices branch off: only the calls from
    there on are made again, with the values computed so far shared. On average that is half a run per choice. Under
    the additive model the losses of several changes are their sum: noises of different layers are taken as
    uncorrelated (``sqnr``), their effects as small.

    Args:
        metric: "sqnr": energy of the error over that of the outputs, summed over all floating outputs (10 log10(1/x)
            is the SQNR in dB); "kl": mean KL divergence in nats between the softmax over the last axis of the first
            output, float against changed; or a function (outputs in float, outputs changed) -> loss, each a list over
            the batches of lists of tensors.
        others: name of a trial -> the choice under which it stands while another one is tried; absent ones are float.

    Raises:
        ConstraintError: there is no batch, a value is not in the graph, or an output is not finite.
        UnsupportedOp: an ONNX operator has no torch implementation.
    """
    loss, run, wanted = _float_run(graph, batches, metric)
    found: dict[str, dict[Any, float]] = {}
    with torch.no_grad():
        plan = _planned(run, trials, others or {})
        for i, step in enumerate(progress(plan, "sensitivity")):
            run.advance(step.at)
            losses = found.setdefault(step.trial.name, {})
            for choice in step.trial.choices:
                with _branch(run):
                    _change(run, step.trial, choice)
                    losses[choice] = _finished(loss(wanted, _outputs(run, plan[i + 1 :])), step.trial.name, choice)
            step.take(run)
    return {t.name: found[t.name] for t in trials}


def measure_together(
    graph: Graph,
    trials: Sequence[Trial],
    sets: Sequence[Mapping[str, Any]],
    batches: Iterable[Any],
    metric: Metric | Callable[[list[list[Tensor]], list[list[Tensor]]], float] = "sqnr",
) -> list[float]:
    """What each set of choices, {name of a trial: choice}, costs at the outputs when all of it is done at once.

    One run of the network each; metrics and errors are those of :func:`measure`.
    """
    loss, run, wanted = _float_run(graph, batches, metric)
    found = []
    with torch.no_grad():
        for chosen in sets:
            with _branch(run):
                outputs = _outputs(run, _planned(run, trials, chosen))
            found.append(_finished(loss(wanted, outputs), "all together", dict(chosen)))
    return found


def _float_run(graph: Graph, batches: Iterable[Any], metric: Any) -> tuple[Callable[..., float], Runner, Any]:
    """The loss, a runner at its start, and the outputs in float."""
    loss = metric if callable(metric) else {"sqnr": noise_ratio, "kl": divergence}[metric]
    run = runner(graph, LINEAR)
    with torch.no_grad():
        run.start(bound(graph, batches))
        with _branch(run):
            wanted = _outputs(run, [])
    return loss, run, wanted


@dataclass
class _Step:
    """A trial at its place in the run, and the choice under which it stands while others are tried (if any)."""

    at: int
    trial: Trial
    stands: bool = False
    choice: Any = None

    def take(self, run: Runner) -> None:
        """Make the change; the run is at its place. Weights are changed before the run begins."""
        if self.stands and not self.trial.value.is_const:
            _change(run, self.trial, self.choice)


def _planned(run: Runner, trials: Sequence[Trial], others: Mapping[str, Any]) -> list[_Step]:
    """The trials in the order of their places; weights among ``others`` are changed at once."""
    order = sorted((_place(run, t.value), i) for i, t in enumerate(trials))
    plan = [_Step(at, trials[i], trials[i].name in others, others.get(trials[i].name)) for at, i in order]
    for step in plan:
        if step.stands and step.trial.value.is_const:
            _change(run, step.trial, step.choice)
    return plan


def _finished(loss: float, name: str, choice: Any) -> float:
    if not np.isfinite(loss):
        raise ConstraintError("the outputs are not finite", value=name, found=choice)
    return loss


class _branch:
    """What is done inside leaves the runner as it was."""

    def __init__(self, run: Runner) -> None:
        self.run = run

    def __enter__(self) -> None:
        self.at, self.envs, self.stored = self.run.at, self.run.envs, self.run.stored
        self.run.envs = [dict(env) for env in self.envs]
        self.run.stored = dict(self.stored)

    def __exit__(self, *_: Any) -> None:
        self.run.at, self.run.envs, self.run.stored = self.at, self.envs, self.stored


def _place(run: Runner, value: Value) -> int:
    """How many calls have been made when a value may be changed: before its first reader, after its writer."""
    if value.is_const:
        key = run.key(value)
        at = next((i for i, k in enumerate(run.order) if key in run.calls[k][0]), None)
        if at is None:
            raise ConstraintError("no node that is executed reads this weight", value=value.name)
        return at
    if value.is_input:
        return 0
    assert value.producer is not None
    at = run.position(value.producer)
    if at is None:
        raise ConstraintError("this value is not computed by itself", value=value.name)
    return at + 1


def _change(run: Runner, trial: Trial, choice: Any) -> None:
    key = run.key(trial.value)
    if trial.value.is_const:
        old = trial.value.const()
        assert old is not None
        run.stored[key] = torch.from_numpy(np.ascontiguousarray(trial.change(choice, np.asarray(old))))
        return
    for env in run.envs:
        x = env[key]
        env[key] = torch.from_numpy(np.ascontiguousarray(trial.change(choice, x.numpy()))).to(x.dtype)


def _outputs(run: Runner, rest: Sequence[_Step]) -> list[list[Tensor]]:
    """All floating outputs of every batch, after the rest of the calls with what stands changed among them."""
    for step in rest:
        run.advance(step.at)
        step.take(run)
    run.advance(len(run.order))
    keys = [run.key(v) for v in run.graph.outputs if v.dtype.startswith(("float", "bfloat")) and not v.is_const]
    return [[env[key].float() for key in keys] for env in run.envs]


def noise_ratio(wanted: list[list[Tensor]], now: list[list[Tensor]]) -> float:
    """Energy of the error over the energy of the outputs."""
    signal = noise = 0.0
    for a_list, b_list in zip(wanted, now, strict=True):
        for a, b in zip(a_list, b_list, strict=True):
            signal += float(a.double().square().sum())
            noise += float((a - b).double().square().sum())
    return noise / (signal or 1.0)


def divergence(wanted: list[list[Tensor]], now: list[list[Tensor]]) -> float:
    """Mean KL(softmax(wanted) | softmax(now)) over the rows of the first output, in nats."""
    total, rows = 0.0, 0
    for a_list, b_list in zip(wanted, now, strict=True):
        p, q = (t[0].double().log_softmax(-1) for t in (a_list, b_list))
        total += float((p.exp() * (p - q)).sum())
        rows += p.numel() // p.shape[-1]
    return max(total / max(rows, 1), 0.0)
