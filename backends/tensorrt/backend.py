"""The TensorRT backends: int8, fp8 and int4 blocks; spec, static check, lowering to an engine."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from ...graph.errors import ConfigError
from ...graph.ir import Graph
from ...passes.quantize.spec import BackendSpec
from ..base import Backend, Diagnostic
from ..onnxruntime.backend import onnx_model
from ..rules import OnnxFile, Where, run_rules
from .rules import RULES

SPECS = Path(__file__).parent / "specs"


@cache
def _spec(name: str) -> BackendSpec:
    return BackendSpec.from_yaml(SPECS / f"{name}.yaml")


class TensorRT(Backend):
    """NVIDIA TensorRT and TensorRT-RTX: strongly typed ONNX with symmetric Q/DQ, built into an engine."""

    name: ClassVar[str] = "tensorrt"
    capability: ClassVar[int] = 89

    @property
    def spec(self) -> BackendSpec:
        return _spec(self.name)

    def check(self, graph: Graph, **options: Any) -> list[Diagnostic]:
        """The rules on the file that the graph would be lowered to."""
        model, _ = onnx_model(graph)
        return self.check_file(OnnxFile(model), **options)

    def check_file(self, file: OnnxFile, **options: Any) -> list[Diagnostic]:
        """The rules on a file. ``capability``: compute capability of the GPU, 89 for 8.9."""
        unknown = set(options) - {"capability"}
        if unknown:
            raise ConfigError("unknown option of this target", node=sorted(unknown)[0], expected="capability")
        return run_rules(RULES, Where(file, {"capability": self.capability, **options}))

    def lower(self, graph: Graph, example_inputs: Any = None, **options: Any) -> Any:
        raise NotImplementedError


class TensorRTFp8(TensorRT):
    """float8 e4m3; compute capability 8.9 and later."""

    name: ClassVar[str] = "tensorrt-fp8"


class TensorRTInt4(TensorRT):
    """int4 weights in blocks, activations in float."""

    name: ClassVar[str] = "tensorrt-int4"
