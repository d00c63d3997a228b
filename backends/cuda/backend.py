"""The backends cuda and inductor-cpu: spec, static check, lowering of torch graphs to AOTInductor packages."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...graph.errors import BackendError, FoldlineError
from ...graph.execute import synthesize_inputs
from ...graph.ir import Graph
from ...passes.quantize.spec import BackendSpec
from ..base import Artifact, Backend, Diagnostic

if TYPE_CHECKING:
    from ...graph.fx import FXGraph
    from .artifact import TorchArtifact

SPECS = Path(__file__).parent / "specs"


@cache
def _spec(name: str) -> BackendSpec:
    return BackendSpec.from_yaml(SPECS / f"{name}.yaml")


def as_fx(graph: Graph) -> FXGraph:
    """The graph itself if it is a torch graph; an ONNX graph through its torch form.

    Raises:
        BackendError: an operator has no torch form, or torch.export cannot follow it; says what to do.
    """
    if graph.kind == "fx":
        return graph  # type: ignore[return-value]
    if graph.kind != "onnx":
        raise BackendError("only torch and ONNX graphs can be lowered", node=graph.name, found=type(graph).__name__)
    import torch

    from ...graph.fx import load_torch
    from ...graph.onnx.as_torch import to_torch

    try:
        module = to_torch(graph.clone())  # type: ignore[arg-type]
        example = tuple(torch.from_numpy(a) for a in synthesize_inputs(graph).values())
        return load_torch(module, example)
    except FoldlineError as exc:
        first: BaseException = exc
        while first.__cause__ is not None and isinstance(first.__cause__, FoldlineError):
            first = first.__cause__
        cause = first if isinstance(first, FoldlineError) else exc
        raise BackendError(
            "this ONNX graph has no torch form", node=cause.node, value=cause.value,
            found=f"{cause.message}: {cause.found}",
            hint="lower it for onnxruntime-cuda or tensorrt, or quantize the PyTorch model itself",
        ) from exc  # fmt: skip


class _TorchBackend(Backend):
    """What the two targets share."""

    @property
    def spec(self) -> BackendSpec:
        return _spec(self.name)

    def node_times(
        self,
        graph: Graph,
        example_inputs: Any = None,
        *,
        runs: int = 20,
        artifact: Artifact | None = None,
        **options: Any,
    ) -> dict[str, float]:
        """See :meth:`Backend.node_times`: the rewritten module runs node by node in torch, each node timed.

        A package is one function without nodes, so these are times of torch's kernels; what a substitution replaced
        is counted under the node that it stands for.
        """
        from .node_times import node_times

        options = {**options, "package": False}
        options.pop("path", None)
        made = self.lower(graph, example_inputs, **options)
        return node_times(made, runs)  # type: ignore[arg-type]


class Cuda(_TorchBackend):
    """NVIDIA GPUs through torch: AOTInductor packages with Triton kernels of foldline's own for quantized layers."""

    name: ClassVar[str] = "cuda"

    def check(self, graph: Graph) -> list[Diagnostic]:
        """What becomes of every quantized product: an operator of this backend, or why not."""
        from .plan import plan
        from .substitution import Options

        try:
            found = plan(as_fx(graph), Options())
        except BackendError as exc:
            return [Diagnostic("torch-form", "error", exc.node or "", f"{exc.message}: {exc.found}", exc.hint or "")]
        return [
            Diagnostic("no-kernel", "warning", name, reason, "it runs in float, on dequantized operands")
            for name, reason in found.left
        ]

    def lower(
        self,
        graph: Graph,
        example_inputs: Any = None,
        *,
        path: str | Path | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        device: str | None = None,
        dynamic: bool = True,
        max_autotune: bool = False,
        cuda_graphs: bool = False,
        sparse24: bool = False,
        two_pass_softmax: bool = False,
        package: bool = True,
    ) -> TorchArtifact:
        """Substitute quantized layers, export, compile.

        Args:
            graph: a torch graph, or an ONNX graph that has a torch form. It is not changed.
            example_inputs: one call's arguments in the form ``Graph.bind`` takes; used by ``benchmark``.
            path: package to write (``.pt2``); None keeps it in a temporary folder while the artifact lives.
            dtype: type of float matrix products and of the operators' results. Inputs and outputs keep theirs.
            device: ``"cuda"`` or ``"cpu"``; by default the GPU where there is one. On the CPU the operators'
                references are compiled: the same numbers to float rounding, without the kernels' speed.
            dynamic: keep symbolic dimensions symbolic.
            max_autotune: let Inductor time alternatives for every matrix product (minutes).
            cuda_graphs: capture and replay a CUDA graph per combination of input shapes.
            sparse24: put 2:4 weights on the sparse tensor cores (with a 16-bit ``dtype``).
            two_pass_softmax: softmax by the two-pass kernel.
            package: False runs the rewritten module in torch instead: no compilation, no C++ compiler.

        Raises:
            BackendError: no GPU where one is asked for, no C++ compiler, or export or compilation fails.
        """
        import torch

        from .module import flat_module, substitute
        from .plan import described, plan
        from .precision import narrow_products
        from .substitution import Options

        where = _device(device)
        fx_graph = as_fx(graph)
        if cuda_graphs and where.type != "cuda":
            raise BackendError("CUDA graphs need a GPU", node=self.name, found=str(where))
        found = plan(fx_graph, Options(dtype, sparse24, two_pass_softmax))
        module = flat_module(fx_graph)
        substitute(module, found)
        narrow_products(module, getattr(torch, dtype))
        settings: dict[str, Any] = {"max_autotune": max_autotune}
        notes = [*described(found)]
        if where.type == "cpu":
            notes.append("compiled for the CPU: foldline's operators run as torch functions, not as Triton kernels")
        job = Job(graph, fx_graph, module, where, settings, notes, example_inputs)
        return job.finish(path, dynamic=dynamic, package=package, cuda_graphs=cuda_graphs)


class InductorCpu(_TorchBackend):
    """x86 CPUs through torch: AOTInductor packages in which quantized layers call oneDNN's int8 kernels."""

    name: ClassVar[str] = "inductor-cpu"

    def check(self, graph: Graph) -> list[Diagnostic]:
        """What Inductor's int8 patterns would not take: see :mod:`.inductor_rules`."""
        from .inductor_rules import check_graph

        return check_graph(graph)

    def lower(
        self,
        graph: Graph,
        example_inputs: Any = None,
        *,
        path: str | Path | None = None,
        dynamic: bool = True,
        max_autotune: bool = False,
        package: bool = True,
    ) -> TorchArtifact:
        """Write Q/DQ as Inductor's patterns want them, export, compile with weights packed ahead.

        Args:
            graph, example_inputs, dynamic, max_autotune, package: see :meth:`Cuda.lower`.
            path: package to write; None compiles in this process with torch.compile, once more for every new shape.

        Raises:
            BackendError: no C++ compiler, or export or compilation fails, or the package computes something else than
                the graph. (torch 2.13's packages do so where int8 convolutions follow one another, unless Inductor's
                layout optimization is off, as it is here.)
        """
        import torch

        from .inductor import decomposed_quantization
        from .module import flat_module

        fx_graph = as_fx(graph)
        module = flat_module(fx_graph)
        written = decomposed_quantization(fx_graph, module)
        notes = [f"{count} calls of quantized_decomposed.{name}" for name, count in sorted(written.items())]
        # Freezing folds and packs the weights; the int8 patterns apply only then.
        settings: dict[str, Any] = {"freezing": True, "max_autotune": max_autotune}
        if path is not None:  # with its channels-last layouts, torch 2.13's packages chain int8 convolutions wrongly
            settings["layout_optimization"] = False
        job = Job(graph, fx_graph, module, torch.device("cpu"), settings, notes, example_inputs, in_process=True)
        return job.finish(path, dynamic=dynamic, package=package, cuda_graphs=False)


def _device(name: str | None) -> Any:
    import torch

    here = torch.cuda.is_available()
    if name is None:
        return torch.device("cuda" if here else "cpu")
    found = torch.device(name)
    if found.type == "cuda" and not here:
        raise BackendError(
            "there is no GPU here", node="cuda", expected=name, found="torch.cuda.is_available() is False",
            hint="lower with device='cpu', which compiles the operators' references, or on the machine with the GPU",
        )  # fmt: skip
    if found.type not in ("cuda", "cpu"):
        raise BackendError("unknown device", node="cuda", expected="cuda or cpu", found=name)
    return found


@dataclass
class Job:
    """A rewritten module on its way to an artifact."""

    graph: Graph
    fx_graph: FXGraph
    module: Any
    device: Any
    settings: dict[str, Any]
    notes: list[str]
    example_inputs: Any
    in_process: bool = False
    """Without a path, compile in this process (torch.compile) instead of writing a package."""

    def finish(self, path: str | Path | None, *, dynamic: bool, package: bool, cuda_graphs: bool) -> TorchArtifact:
        """Export and compile (or not), and wrap what runs."""
        import torch

        from .artifact import TorchArtifact
        from .package import (
            check_package,
            compile_module,
            compile_package,
            exported,
            load_package,
            require_compiler,
        )

        if package:
            require_compiler()
        module = self.module.to(self.device)
        folder: Any = None
        target: Path | None = None
        function = module
        if package and self.in_process and path is None:
            function = compile_module(module, self.settings)
        elif package:
            program = exported(module, self.fx_graph.inputs, self.device, dynamic)
            if path is None:
                folder = tempfile.TemporaryDirectory(prefix="foldline-")
            wanted = Path(folder.name) / "model.pt2" if path is None else Path(path)
            target = compile_package(program, wanted, self.settings)
            function = load_package(target)
            check_package(function, module, self.fx_graph, self.device)
        types = [getattr(torch, v.dtype) for v in self.fx_graph.inputs]
        artifact = TorchArtifact(
            function,
            list(zip([v.name for v in self.graph.inputs], types, strict=True)),
            self.device,
            module=module,
            path=target,
            bind=self.graph.bind,
            example_inputs=_arguments(self.graph, self.example_inputs),
            folder=folder,
            cuda_graphs=cuda_graphs,
        )
        artifact.notes += self.notes
        return artifact


def _arguments(graph: Graph, example_inputs: Any) -> dict[str, Any] | None:
    if example_inputs is not None:
        return graph.bind(example_inputs)
    if any(v.hint is None for v in graph.inputs):
        return None
    return dict(synthesize_inputs(graph))
