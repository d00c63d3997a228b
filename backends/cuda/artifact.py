"""What the torch backends make: a compiled package or a rewritten module, run eagerly or as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...graph.errors import BackendError, ConstraintError
from ...graph.execute import to_numpy
from ...graph.fx.tensors import from_numpy
from ..base import Artifact


class TorchArtifact(Artifact):
    """A callable over flat tensors, with the names and types of its inputs.

    Attributes:
        path: the ``.pt2`` package, or None.
        notes: what became of each quantized product, and what else the user should know.
        module: the rewritten module (float reference of the substituted operators in torch).
        device: where it runs.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Sequence[tuple[str, torch.dtype]],
        device: torch.device,
        *,
        module: torch.nn.Module,
        path: Path | None = None,
        bind: Callable[[Any], dict[str, Any]] | None = None,
        example_inputs: dict[str, Any] | None = None,
        folder: Any = None,
        cuda_graphs: bool = False,
    ) -> None:
        self.function = function
        self.inputs = list(inputs)
        self.device = device
        self.module = module
        self.path = path
        self.notes: list[str] = []
        self._bind = bind
        self._example = example_inputs
        self._folder = folder
        self._graphs: CudaGraphs | None = CudaGraphs(function) if cuda_graphs else None

    def tensors(self, inputs: Any) -> tuple[torch.Tensor, ...]:
        """One call's inputs in order, on the device, in the types that the program takes."""
        names = [name for name, _ in self.inputs]
        if isinstance(inputs, dict) and set(inputs) == set(names):
            given = inputs
        elif self._bind is not None:
            given = self._bind(inputs)
        else:
            items = inputs if isinstance(inputs, (tuple, list)) else [inputs]
            if len(items) != len(names):
                raise ConstraintError("the inputs do not match the model's", expected=names, found=len(items))
            given = dict(zip(names, items, strict=True))
        return tuple(_tensor(given[name]).to(self.device, dtype).contiguous() for name, dtype in self.inputs)

    def run(self, inputs: Any) -> list[np.ndarray]:
        return [to_numpy(t) for t in self.run_tensors(self.tensors(inputs))]

    def run_tensors(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One call on tensors that are on the device already; the outputs stay there.

        With CUDA graphs the outputs are the graph's own memory, overwritten by the next call of the same shapes.
        """
        with torch.no_grad():
            found = self._graphs(tensors) if self._graphs is not None else self.function(*tensors)
        return list(found) if isinstance(found, (tuple, list)) else [found]

    def ready(self, inputs: Any) -> Callable[[], Any]:
        tensors = self.tensors(inputs)
        if self.device.type != "cuda":
            return lambda: self.run_tensors(tensors)

        def call() -> None:
            self.run_tensors(tensors)
            torch.cuda.synchronize(self.device)

        return call

    def example(self) -> Any:
        return super().example() if self._example is None else self._example


class CudaGraphs:
    """Captures one CUDA graph per combination of shapes and replays it: no launch costs but one.

    Args:
        function: takes tensors by position; its kernels must not synchronise with the host.
        most: combinations kept; the one used longest ago goes.
    """

    def __init__(self, function: Callable[..., Any], most: int = 8) -> None:
        self.function = function
        self.most = most
        self._kept: dict[tuple[tuple[int, ...], ...], tuple[Any, list[torch.Tensor], Any]] = {}

    def __call__(self, tensors: Sequence[torch.Tensor]) -> Any:
        key = tuple(tuple(t.shape) for t in tensors)
        if key not in self._kept:
            self._kept[key] = self._capture(tensors)
        graph, held, outputs = self._kept[key] = self._kept.pop(key)
        if len(self._kept) > self.most:
            del self._kept[next(iter(self._kept))]
        for into, t in zip(held, tensors, strict=True):
            into.copy_(t)
        graph.replay()
        return outputs

    def _capture(self, tensors: Sequence[torch.Tensor]) -> tuple[Any, list[torch.Tensor], Any]:
        if not torch.cuda.is_available():
            raise BackendError("CUDA graphs need a GPU", hint="lower with cuda_graphs=False")
        held = [t.clone() for t in tensors]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # kernels are tuned and workspaces allocated before the capture
                self.function(*held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.function(*held)
        return graph, held, outputs


def _tensor(item: Any) -> torch.Tensor:
    return item.detach() if isinstance(item, torch.Tensor) else from_numpy(np.asarray(item))
