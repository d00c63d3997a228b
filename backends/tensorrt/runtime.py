"""Running an engine on the GPU, with torch tensors as its memory."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...graph.errors import BackendError, ConstraintError
from .engine import library


def device_ready() -> bool:
    """Whether torch sees a CUDA device and a TensorRT is installed."""
    if library() is None or importlib.util.find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


class Engine:
    """An engine, loaded on the current CUDA device.

    Args:
        path: engine file.
        name: module to load it with; that which built it.

    Raises:
        BackendError: TensorRT does not take the engine (built by another version, or for another GPU).
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        found = library(name)
        if found is None:
            raise BackendError("no TensorRT is installed", node=str(path), hint="pip install tensorrt")
        trt = importlib.import_module(found)
        self._log = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._log)
        self.engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise BackendError(
                "TensorRT does not take this engine",
                node=str(path),
                hint="build it with this version, for this GPU",
            )
        self.context = self.engine.create_execution_context()
        self._trt = trt
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        mode = trt.TensorIOMode.INPUT
        self.inputs = [n for n in names if self.engine.get_tensor_mode(n) == mode]
        self.outputs = [n for n in names if self.engine.get_tensor_mode(n) != mode]

    def _dtype(self, name: str) -> Any:
        import torch

        kinds = {
            "FLOAT": torch.float32,
            "HALF": torch.float16,
            "BF16": torch.bfloat16,
            "INT8": torch.int8,
            "UINT8": torch.uint8,
            "INT32": torch.int32,
            "INT64": torch.int64,
            "BOOL": torch.bool,
            "FP8": torch.float8_e4m3fn,
        }
        return kinds[str(self.engine.get_tensor_dtype(name)).rsplit(".", 1)[-1]]

    def _bound(self, feeds: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Inputs and outputs on the device, their addresses set. Raises ConstraintError on a wrong set of inputs."""
        import torch

        if set(feeds) != set(self.inputs):
            raise ConstraintError("the inputs do not match", expected=self.inputs, found=sorted(feeds))
        given = {}
        for name in self.inputs:
            tensor = torch.as_tensor(feeds[name]).to("cuda", self._dtype(name)).contiguous()
            if not self.context.set_input_shape(name, tuple(tensor.shape)):
                raise ConstraintError(
                    "this shape is outside the engine's profile", node=name, found=tuple(tensor.shape)
                )
            self.context.set_tensor_address(name, tensor.data_ptr())
            given[name] = tensor
        made = {}
        for name in self.outputs:
            shape = tuple(self.context.get_tensor_shape(name))
            if any(d < 0 for d in shape):
                raise BackendError("an output's shape depends on data, which this runtime does not do", node=name)
            made[name] = torch.empty(shape, dtype=self._dtype(name), device="cuda")
            self.context.set_tensor_address(name, made[name].data_ptr())
        return given, made

    def _execute(self) -> None:
        import torch

        stream = torch.cuda.current_stream()
        if not self.context.execute_async_v3(stream.cuda_stream):
            raise BackendError("TensorRT failed to run the engine")
        stream.synchronize()

    def __call__(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """One call: arrays or tensors by name in, CUDA tensors by name out, finished."""
        given, made = self._bound(feeds)
        self._execute()
        del given  # alive until the engine is done with it
        return made

    def prepared(self, feeds: dict[str, Any]) -> Callable[[], Any]:
        """A call with all copies done beforehand."""
        held = self._bound(feeds)

        def call() -> dict[str, Any]:
            self._execute()
            return held[1]

        return call
