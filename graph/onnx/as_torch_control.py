"""If, Loop and Scan of ONNX in torch: nested programs over the outer values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .as_torch_run import Call, Program, execute, torch_op


def _run(c: Call, body: Program, given: list[Any]) -> list[Any]:
    env = dict(c.env)
    env.update(zip(body.inputs, given, strict=True))
    return execute(body, env, training=c.training)


@torch_op("If")
def if_(c: Call) -> tuple[Any, ...]:
    branch = "then_branch" if bool(c.x().reshape(-1)[0]) else "else_branch"
    return tuple(_run(c, c.attr(branch), []))


@torch_op("Loop")
def loop(c: Call) -> tuple[Any, ...]:
    body: Program = c.attr("body")
    trips, go = c.maybe(0), c.maybe(1)
    limit = None if trips is None else int(trips)
    running = True if go is None else bool(go)
    carried: list[Any] = [c.x(i) for i in range(2, len(c.step.inputs))]
    scans: list[list[Tensor]] = [[] for _ in range(len(body.outputs) - 1 - len(carried))]
    i = 0
    while running and (limit is None or i < limit):
        state = torch.tensor(i, dtype=torch.int64), torch.tensor(running)
        keep_going, *results = _run(c, body, [*state, *carried])
        running = bool(keep_going)
        carried, made = results[: len(carried)], results[len(carried) :]
        for rows, row in zip(scans, made, strict=True):
            rows.append(row)
        i += 1
    if any(not rows for rows in scans):
        raise c.refuse("a scan output of a loop that never runs")
    return (*carried, *(torch.stack(rows) for rows in scans))


@torch_op("Scan")
def scan(c: Call) -> tuple[Any, ...]:
    if c.opset < 9:
        raise c.refuse("the batched form of opset 8")
    body: Program = c.attr("body")
    count = c.attr("num_scan_inputs")
    values = c.all()
    carried, streams = values[: len(values) - count], values[len(values) - count :]
    axes = c.attr("scan_input_axes", [0] * count)
    backwards = c.attr("scan_input_directions", [0] * count)
    made: list[list[Tensor]] = [[] for _ in range(len(body.outputs) - len(carried))]
    length = streams[0].shape[axes[0]]
    for t in range(length):
        rows = [
            s.select(axis, length - 1 - t if back else t)
            for s, axis, back in zip(streams, axes, backwards, strict=True)
        ]
        results = _run(c, body, [*carried, *rows])
        carried, new = results[: len(carried)], results[len(carried) :]
        for row, collected in zip(new, made, strict=True):
            collected.append(row)
    out_axes = c.attr("scan_output_axes", [0] * len(made))
    out_back = c.attr("scan_output_directions", [0] * len(made))
    stacked = [
        torch.stack(list(reversed(rows)) if back else rows, axis)
        for rows, axis, back in zip(made, out_axes, out_back, strict=True)
    ]
    return (*carried, *stacked)
