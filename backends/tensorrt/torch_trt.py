"""The other way to TensorRT: torch_tensorrt compiles a float torch graph and runs what it cannot convert in PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...graph.errors import BackendError
from ...graph.execute import to_numpy
from ...graph.ir import Graph
from ..base import Artifact


class TorchTensorRTArtifact(Artifact):
    """A module compiled by torch_tensorrt; ``module`` is called with CUDA tensors."""

    def __init__(self, module: Any, example: tuple[Any, ...]) -> None:
        self.module = module
        self._example = example

    def run(self, inputs: Any) -> list[np.ndarray]:
        import torch

        items = (
            inputs
            if isinstance(inputs, (tuple, list))
            else list(inputs.values())
            if isinstance(inputs, dict)
            else [inputs]
        )
        with torch.no_grad():
            found = self.module(*[torch.as_tensor(x).cuda() for x in items])
        return [to_numpy(x.cpu()) for x in (found if isinstance(found, (tuple, list)) else [found])]

    def example(self) -> Any:
        return self._example


def compile_torch(graph: Graph, example_inputs: Any) -> TorchTensorRTArtifact:
    """Compile an FX graph.

    Raises:
        BackendError: torch_tensorrt or a GPU is missing, the graph is no torch graph or is quantized (its Q/DQ nodes
            are foldline's own operators: lower through ONNX), or the compilation fails.
    """
    try:
        import torch_tensorrt
    except ImportError as exc:
        raise BackendError("torch_tensorrt is not installed", hint="pip install torch-tensorrt, or via='onnx'") from exc
    import torch

    if graph.kind != "fx":
        raise BackendError("torch_tensorrt takes torch models", found=graph.kind, hint="lower with via='onnx'")
    if any(node.op in ("quantize", "dequantize") for node in graph.nodes):
        raise BackendError("torch_tensorrt does not know these Q/DQ nodes", hint="lower with via='onnx'")
    if not torch.cuda.is_available():
        raise BackendError("torch_tensorrt compiles on the GPU that it is for, and none is here")
    if example_inputs is None:
        raise BackendError("torch_tensorrt needs example inputs", hint="lower(graph, example_inputs=...)")
    items = example_inputs if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    arguments = tuple(torch.as_tensor(x).cuda() for x in items)
    try:
        program = torch.export.export(graph.to_model().eval().cuda(), arguments)
        module = torch_tensorrt.dynamo.compile(program, arg_inputs=arguments)
    except Exception as exc:  # torch_tensorrt lets through what TensorRT and torch raise
        raise BackendError("torch_tensorrt failed", found=str(exc)[:400]) from exc
    return TorchTensorRTArtifact(module, arguments)
