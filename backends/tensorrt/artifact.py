"""What lowering for TensorRT gives: the ONNX file, the engine where one was built, and how each layer computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...graph.errors import BackendError
from ..base import Artifact
from .engine import EngineOptions, EngineReport
from .runtime import Engine, device_ready
from .script import trtexec


@dataclass(frozen=True)
class Profile:
    """How an engine computes.

    Attributes:
        counts: precision -> number of convolutions and matrix products.
        products: ONNX node -> precision it is multiplied in.
        layers: name -> types read and written, of every layer.
        bytes: size of the engine.
    """

    counts: dict[str, int] = field(default_factory=dict)
    products: dict[str, str] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)
    bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"counts": self.counts, "products": self.products, "layers": self.layers, "bytes": self.bytes}


class TensorRTArtifact(Artifact):
    """A TensorRT-legal ONNX file, and its engine where one could be built.

    Attributes:
        path: the ONNX file.
        engine_path: the engine, or None.
        report: what TensorRT said when building, or None where none is installed.
        options: how the engine was, or is to be, built.
        notes: what the user should know.
        simulated: True without a GPU: :meth:`run` then computes the file as written in ONNX Runtime, which is what
            the engine computes up to the rounding of its accumulators; :meth:`benchmark` refuses.
    """

    path: Path

    def __init__(
        self,
        model: ir.Model,
        path: Path,
        options: EngineOptions,
        *,
        engine_path: Path | None = None,
        report: EngineReport | None = None,
        example_inputs: dict[str, np.ndarray] | None = None,
        bind: Callable[[Any], dict[str, np.ndarray]] | None = None,
        folder: Any = None,
    ) -> None:
        self.model = model
        self.path = path
        self.options = options
        self.engine_path = engine_path
        self.report = report
        self.notes: list[str] = []
        self.input_names = [str(v.name) for v in model.graph.inputs]
        self.output_names = [str(v.name) for v in model.graph.outputs]
        self.simulated = engine_path is None or not device_ready()
        self._example = example_inputs
        self._bind = bind
        self._folder = folder
        self._engine: Engine | None = None

    @property
    def command(self) -> str:
        """The trtexec command line that builds and times this file."""
        return trtexec(self.path, self.options)

    def feeds(self, inputs: Any) -> dict[str, np.ndarray]:
        """One call's inputs by name."""
        if isinstance(inputs, dict) and set(inputs) == set(self.input_names):
            return {k: _array(v) for k, v in inputs.items()}
        if self._bind is not None:
            return dict(self._bind(inputs))
        items = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
        if len(items) != len(self.input_names):
            raise BackendError("the inputs do not match", expected=", ".join(self.input_names), found=len(items))
        return {name: _array(v) for name, v in zip(self.input_names, items, strict=True)}

    def run(self, inputs: Any) -> list[np.ndarray]:
        """One call; see ``simulated``."""
        feeds = self.feeds(inputs)
        if self.simulated:
            from ..onnxruntime.plain import run_plain

            found = run_plain(self.model, feeds)
            return [found[name] for name in self.output_names]
        return [found.cpu().numpy() for found in self._opened()(feeds).values()]

    def run_torch(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """One call with CUDA tensors by name, which stay on the device. Raises BackendError without a GPU."""
        return self._opened()(inputs)

    def ready(self, inputs: Any) -> Callable[[], Any]:
        return self._opened().prepared(self.feeds(inputs))

    def facts(self) -> dict[str, Any]:
        """What a report says of this artifact."""
        found: dict[str, Any] = {"file": self.path.name, "simulated": self.simulated, "notes": self.notes}
        if self.report is None:
            return {**found, "build": self.command}
        return {**found, "tensorrt": self.report.version, "engine": self.profile().to_dict()}

    def _opened(self) -> Engine:
        if self.engine_path is None or self.simulated:
            raise BackendError(
                "engines run on a GPU alone, and none is here",
                node=str(self.path),
                hint=f"take the file to the device and run: {self.command}",
            )
        if self._engine is None:
            self._engine = Engine(self.engine_path, self.options.library)
        return self._engine

    def example(self) -> dict[str, np.ndarray]:
        if self._example is None:
            return dict(super().example())
        return self._example

    def profile(self) -> Profile:
        """Precision of every product and types of every layer. Raises BackendError where no engine was built."""
        if self.report is None or not self.report.built:
            raise BackendError("no engine was built", node=str(self.path), hint=f"build it: {self.command}")
        products = {n.name or "" for n in self.model.graph.all_nodes() if n.op_type in ("Conv", "Gemm", "MatMul")}
        kinds = {name: self.report.precision(name) for name in sorted(products)}
        layers = {f"{layer.name} ({layer.type})": _types(layer) for layer in self.report.layers}
        return Profile(
            self.report.counts(), {k: v for k, v in kinds.items() if v is not None}, layers, self.report.bytes
        )


def _types(layer: Any) -> str:
    return f"{', '.join(layer.inputs) or 'constants'} -> {', '.join(layer.outputs)}"


def _array(value: Any) -> np.ndarray:
    from ...graph.execute import to_numpy

    return np.ascontiguousarray(to_numpy(value))
