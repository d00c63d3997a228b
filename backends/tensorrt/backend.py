"""The TensorRT backends: int8, fp8 and int4 blocks; spec, static check, lowering to an engine."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from ...graph.errors import BackendError, ConfigError
from ...graph.ir import Graph
from ...graph.save import save
from ...passes.quantize.spec import BackendSpec
from ..base import Artifact, Backend, Diagnostic, renamed
from ..fix import EXACT, fix, rules_of
from ..onnxruntime.backend import onnx_model
from ..rules import OnnxFile, Where, run_rules
from .artifact import TensorRTArtifact
from .engine import EngineOptions, EngineReport, build, library
from .rules import RULES
from .script import write_script
from .torch_trt import compile_torch

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
        return renamed(self.check_file(OnnxFile(model), **options), graph)

    def check_file(self, file: OnnxFile, **options: Any) -> list[Diagnostic]:
        """The rules on a file. ``capability``: compute capability of the GPU, 89 for 8.9."""
        unknown = set(options) - {"capability"}
        if unknown:
            raise ConfigError("unknown option of this target", node=sorted(unknown)[0], expected="capability")
        return run_rules(RULES, Where(file, {"capability": self.capability, **options}))

    def lower(
        self,
        graph: Graph,
        example_inputs: Any = None,
        *,
        path: str | Path | None = None,
        engine: bool | None = None,
        via: Literal["onnx", "torch_tensorrt"] = "onnx",
        capability: int | None = None,
        profiles: dict[str, Any] | None = None,
        timing_cache: str | Path | None = None,
        workspace: int | None = None,
        library: str | None = None,
    ) -> Artifact:
        """Write a legal ONNX file, and build its engine where a TensorRT is installed.

        Args:
            graph: an ONNX graph, or an FX graph, which is exported. It is not changed.
            example_inputs: one call's arguments in the form ``Graph.bind`` takes.
            path: the ``.onnx`` file to write; the engine, and a script that builds it elsewhere, lie beside it. None
                writes into a temporary folder that lives as long as the artifact.
            engine: build (True), do not (False), or build where TensorRT is installed (None).
            via: ``torch_tensorrt`` compiles a float torch graph through that library instead.
            capability: compute capability to build for, 89 for 8.9 (TensorRT-RTX builds without a GPU).
            profiles: per dynamic input the (smallest, best, largest) shape; ``{name: (1x.., 8x.., 64x..)}`` by default.
            timing_cache: file that keeps kernel timings between builds.
            workspace: bytes of scratch memory at most.
            library: ``tensorrt``, ``tensorrt_rtx`` or ``tensorrt_rtx_bindings``; the first installed when None.

        Raises:
            BackendError: the model cannot be legal (says which rule and what to do), no TensorRT is installed although
                ``engine`` asks for one, or it refuses the file.
        """
        if via == "torch_tensorrt":
            return compile_torch(graph, example_inputs)
        options = EngineOptions(
            library=library,
            capability=self.capability if capability is None else capability,
            profiles=profiles or {},
            timing_cache=timing_cache,
            workspace=workspace,
        )
        model, notes = onnx_model(graph)
        model, more = legal(model, self.name, options.capability)
        folder: Any = None
        if path is None:
            folder = tempfile.TemporaryDirectory(prefix="foldline-")
        target = Path(folder.name) / "model.onnx" if path is None else Path(path)
        save(model, target)
        report, plan = _engine(target, options, engine)
        artifact = TensorRTArtifact(
            model,
            target,
            options,
            engine_path=plan,
            report=report,
            example_inputs=None if example_inputs is None else graph.bind(example_inputs),
            bind=graph.bind,
            folder=folder,
        )
        if path is not None:
            write_script(target, options)
        artifact.notes += [*notes, *more]
        if artifact.simulated:
            artifact.notes.append("no GPU here: run() computes the ONNX file as written, in ONNX Runtime")
        return artifact


def legal(model: ir.Model, target: str, capability: int) -> tuple[ir.Model, list[str]]:
    """The model with the fixes that change no number applied, its opset high enough, and what was done.

    Raises:
        BackendError: an error is left; names its node and the way out.
    """
    fixed, report = fix(model, target, only=EXACT, compare=False, capability=capability)
    left = next((d for d in report.after if d.severity == "error"), None)
    if left is not None:
        hint = left.fix
        if rules_of(target).get(left.rule):
            hint += f"; fl.fix(model, {target!r}) does so, at the cost it reports"
        raise BackendError(f"TensorRT would not take this model: {left.message}", node=left.node or None, hint=hint)
    return fixed, [f"{what}: {node}" for _, node, what in report.actions]


def _engine(path: Path, options: EngineOptions, wanted: bool | None) -> tuple[EngineReport | None, Path | None]:
    if wanted is False or (wanted is None and library(options.library) is None):
        return None, None
    plan = path.with_suffix(".engine")
    (report,) = build([path], options, engines=[plan])
    if not report.built:
        said = report.errors[0] if report.errors else ("", "", f"its process died with {report.crash}")
        raise BackendError(
            "TensorRT refused the model",
            node=said[0] or said[1] or None,
            found=said[2][:400],
            hint="fl.check did not foresee this: please report the model",
        )
    return report, plan


class TensorRTFp8(TensorRT):
    """float8 e4m3; compute capability 8.9 and later."""

    name: ClassVar[str] = "tensorrt-fp8"


class TensorRTInt4(TensorRT):
    """int4 weights in blocks, activations in float."""

    name: ClassVar[str] = "tensorrt-int4"
