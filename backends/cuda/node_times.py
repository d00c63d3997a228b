"""Times of single nodes: the rewritten module run call by call in torch, with a clock around each."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from .artifact import TorchArtifact


class _Timed(fx.Interpreter):
    """Runs a module and keeps, for every run, the milliseconds of each node (a substitution under what it replaced)."""

    def __init__(self, module: fx.GraphModule, device: torch.device) -> None:
        super().__init__(module)
        self.device = device
        self.runs: list[dict[str, float]] = []

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        start = self._now()
        result = super().run_node(n)
        self.runs[-1][n.meta.get("stands_for", n.name)] += (self._now() - start) * 1e3
        return result

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def node_times(artifact: TorchArtifact, runs: int, warmup: int = 3) -> dict[str, float]:
    """Median milliseconds of each node of the artifact's module over ``runs`` calls, by node name.

    Includes torch's own overhead of a few microseconds per call; on a GPU the device is synchronised around each.
    """
    module = artifact.module
    assert isinstance(module, fx.GraphModule)
    timed = _Timed(module, artifact.device)
    tensors = artifact.tensors(artifact.example())
    with torch.no_grad():
        for _ in range(warmup + runs):
            timed.runs.append(defaultdict(float))
            timed.run(*tensors)
    kept = timed.runs[warmup:]
    return {name: statistics.median(r[name] for r in kept) for name in kept[0]}
