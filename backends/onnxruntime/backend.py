"""The backends onnxruntime-cpu, -cuda and -tensorrt: spec, static check, lowering."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from ...graph.errors import BackendError, ConfigError
from ...graph.execute import synthesize_inputs
from ...graph.ir import Graph
from ...graph.save import save
from ...passes.quantize.spec import BackendSpec
from ..base import Artifact, Backend, Diagnostic
from ..rules import OnnxFile
from .artifact import OnnxRuntimeArtifact
from .host import cpu_target
from .node_times import node_times
from .rules import check_file, check_graph
from .session import INLINE_LIMIT, open_session, providers, readable, weight_bytes
from .tune import tune

SPECS = Path(__file__).parent / "specs"


@cache
def _spec(name: str) -> BackendSpec:
    return BackendSpec.from_yaml(SPECS / f"{name}.yaml")


class _OnnxRuntime(Backend):
    """What the three targets share; ``kind`` chooses the providers."""

    kind: ClassVar[str] = ""

    def check(self, graph: Graph) -> list[Diagnostic]:
        spec = self.spec
        return [] if spec is None else check_graph(graph, spec)

    def check_file(self, file: OnnxFile, **options: Any) -> list[Diagnostic]:
        """See :meth:`Backend.check_file`; the CPU is in the target's name, so there are no options."""
        if options:
            raise ConfigError("this target has no options", node=sorted(options)[0], hint="the target's name tells all")
        return [] if self.spec is None else check_file(file, self.spec.name)

    def lower(
        self,
        graph: Graph,
        example_inputs: Any = None,
        *,
        path: str | Path | None = None,
        threads: int | None = None,
        provider_options: dict[str, dict[str, Any]] | None = None,
        entries: dict[str, str] | None = None,
    ) -> OnnxRuntimeArtifact:
        """Save (if asked), open, and hand back the artifact.

        Args:
            graph: an ONNX graph, or an FX graph, which is exported with its dynamic dimensions. It is not changed.
            example_inputs: one call's arguments in the form ``Graph.bind`` takes; used by ``benchmark``.
            path: file to write (``.onnx``); weights above 1.9 GB go beside it. None keeps the model in memory,
                or in a temporary file that lives as long as the artifact.
            threads: inside one operator; the cores of this process when None.
            provider_options: options per provider (``{"tensorrt": {"trt_max_workspace_size": 1 << 30}}``), over
                defaults that suit quantized files.
            entries: session configuration entries of ONNX Runtime by key.

        Raises:
            BackendError: export failed, the provider is missing, or ONNX Runtime refuses the model.
        """
        names = providers(self.kind)
        model, notes = onnx_model(graph)
        tune(model, graph.values if graph.kind == "onnx" else None)
        readable(model)
        folder: Any = None
        target = None if path is None else Path(path)
        if target is None and weight_bytes(model) > INLINE_LIMIT:
            folder = tempfile.TemporaryDirectory(prefix="foldline-")
            target = Path(folder.name) / "model.onnx"
        if target is not None:
            save(model, target)
        session = open_session(
            model if target is None else target,
            names,
            threads=threads,
            entries=entries,
            provider_options=provider_options,
        )
        artifact = OnnxRuntimeArtifact(
            model, target, session, threads, _arguments(graph, example_inputs), folder, graph.bind
        )
        artifact.notes += notes
        artifact.entries, artifact.provider_options = dict(entries or {}), dict(provider_options or {})
        return artifact

    def node_times(
        self,
        graph: Graph,
        example_inputs: Any = None,
        *,
        runs: int = 20,
        artifact: Artifact | None = None,
        **options: Any,
    ) -> dict[str, float]:
        """See :meth:`Backend.node_times`: ONNX Runtime's profiler, with its own overhead of microseconds per kernel."""
        options = {key: value for key, value in options.items() if key != "path"}
        made = self.lower(graph, example_inputs, **options) if artifact is None else artifact
        if not isinstance(made, OnnxRuntimeArtifact):
            raise BackendError("this artifact is another backend's", node=self.name, found=type(made).__name__)
        source = made.model if made.path is None else made.path
        return node_times(graph, source, made.model, made.example(), made.providers, threads=made.threads, runs=runs)


def onnx_model(graph: Graph) -> tuple[ir.Model, list[str]]:
    """The graph as an onnx_ir model of its own, whichever front end it has, and notes on what changed on the way."""
    notes: list[str] = []
    if graph.kind == "fx":
        from .export import export

        model, notes = export(graph)
    elif graph.kind == "onnx":
        found = graph.to_model()
        model = found.clone() if isinstance(found, ir.Model) else ir.serde.deserialize_model(found)
    else:
        raise BackendError("only torch and ONNX graphs can be lowered", node=graph.name, found=type(graph).__name__)
    tune(model, graph.values if graph.kind == "onnx" else None)
    return model, notes


def _arguments(graph: Graph, example_inputs: Any) -> dict[str, np.ndarray] | None:
    if example_inputs is not None:
        return graph.bind(example_inputs)
    if any(v.hint is None for v in graph.inputs):
        return None
    return synthesize_inputs(graph)


class OnnxRuntimeCpu(_OnnxRuntime):
    """ONNX Runtime on x86 CPUs: uint8 activations, int8 weights per channel."""

    name: ClassVar[str] = "onnxruntime-cpu"
    kind: ClassVar[str] = "cpu"

    @property
    def spec(self) -> BackendSpec:
        return _spec(self.name)


class OnnxRuntimeCpuAvx2(OnnxRuntimeCpu):
    """ONNX Runtime on x86 CPUs without VNNI: weights of 7 bits, for the products there saturate."""

    name: ClassVar[str] = "onnxruntime-cpu-avx2"


class OnnxRuntimeArm(OnnxRuntimeCpu):
    """ONNX Runtime on ARM64 CPUs: int8 activations and weights."""

    name: ClassVar[str] = "onnxruntime-arm"


class OnnxRuntimeHost(OnnxRuntimeCpu):
    """ONNX Runtime on this machine's CPU: the spec of the three above that fits its instruction set."""

    name: ClassVar[str] = "onnxruntime-cpu-host"

    @property
    def spec(self) -> BackendSpec:
        return _spec(cpu_target())


class OnnxRuntimeCuda(_OnnxRuntime):
    """ONNX Runtime's CUDA provider; it has no int8 convolutions: its spec quantizes weights alone, in blocks."""

    name: ClassVar[str] = "onnxruntime-cuda"
    kind: ClassVar[str] = "cuda"

    @property
    def spec(self) -> BackendSpec:
        return _spec(self.name)


class OnnxRuntimeTensorrt(_OnnxRuntime):
    """ONNX Runtime's TensorRT provider, with CUDA for what TensorRT does not take."""

    name: ClassVar[str] = "onnxruntime-tensorrt"
    kind: ClassVar[str] = "tensorrt"
