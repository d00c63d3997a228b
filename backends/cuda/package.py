"""From a module to an AOTInductor package and back: torch.export, compilation to machine code, loading."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...graph.errors import BackendError, ConstraintError
from ...graph.execute import synthesize_inputs
from ...graph.fx.tensors import from_numpy
from ...graph.ir import Value

if TYPE_CHECKING:
    from ...graph.fx import FXGraph


def require_compiler() -> str:
    """The C++ compiler that AOTInductor calls. Raises BackendError where there is none."""
    import os

    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    for name in wanted:
        if found := shutil.which(name):
            return found
    raise BackendError(
        "AOTInductor needs a C++ compiler", expected=" or ".join(wanted), found="none on the path",
        hint="install g++, or lower with package=False to run the rewritten module in torch",
    )  # fmt: skip


def example_tensors(inputs: Sequence[Value], device: torch.device) -> tuple[torch.Tensor, ...]:
    """One tensor of the hint shape per input. Raises BackendError where a shape is unknown."""
    found = []
    for v in inputs:
        if v.hint is None:
            raise BackendError("an input's shape is unknown", value=v.name)
        found.append(torch.zeros(v.hint, dtype=getattr(torch, v.dtype), device=device))
    return tuple(found)


def exported(
    module: fx.GraphModule, inputs: Sequence[Value], device: torch.device, dynamic: bool
) -> torch.export.ExportedProgram:
    """The program of a flat module; foldline's Q/DQ operators are written out as plain torch functions.

    Raises:
        BackendError: torch.export refuses the module.
    """
    arguments = example_tensors(inputs, device)
    shapes = tuple(
        {i: torch.export.Dim.DYNAMIC for i, d in enumerate(v.shape or ()) if isinstance(d, str) and dynamic}
        for v in inputs
    )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)
            return program.run_decompositions(written_out())
        except Exception as exc:  # torch.export wraps failures in classes of many modules
            raise BackendError(
                "torch.export refuses the rewritten graph",
                found=_text(exc),
                hint="try dynamic=False: a fixed size may be needed" if any(shapes) else None,
            ) from exc


def written_out() -> dict[Any, Any]:
    """foldline's operators that have no kernel of their own -> the functions that define them."""
    from ...graph.fx import custom
    from ...graph.fx.custom_nbits import _matmul_nbits, matmul_nbits

    return {
        custom.quantize_linear: custom._quantize,
        custom.dequantize_linear: custom._dequantize,
        matmul_nbits: _matmul_nbits,
    }


def compile_package(program: torch.export.ExportedProgram, path: Path, settings: dict[str, Any]) -> Path:
    """Compile and write ``path`` (``.pt2``).

    Raises:
        BackendError: Inductor or the C++ compiler fails.
    """
    require_compiler()
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            made = torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs=dict(settings)
            )
        except Exception as exc:  # Inductor's and the compiler's classes share only this base
            raise BackendError("AOTInductor failed", node=path.name, found=_text(exc)) from exc
    return Path(made)


def compile_module(module: fx.GraphModule, settings: dict[str, Any]) -> Callable[..., Any]:
    """The module compiled by torch.compile at its first call (and again for other shapes)."""
    from torch._inductor import config

    compiled = torch.compile(module, dynamic=False)

    def call(*tensors: torch.Tensor) -> Any:
        with config.patch(**settings), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return compiled(*tensors)

    return call


def check_package(function: Any, module: fx.GraphModule, graph: FXGraph, device: torch.device) -> None:
    """Run a package and the module that it was made of on the same made-up inputs.

    Raises:
        BackendError: they differ by more than rounding (a signal-to-noise ratio below 15 dB).
    """
    try:
        made = synthesize_inputs(graph)
    except ConstraintError:
        return  # an input that sets a size cannot be made up
    inputs = [from_numpy(made[v.name]).to(device) for v in graph.inputs]
    with torch.no_grad():
        found, expected = function(*inputs), module(*inputs)
    found = list(found) if isinstance(found, (tuple, list)) else [found]
    for value, ours, theirs in zip(graph.outputs, found, expected, strict=True):
        if not theirs.is_floating_point() or theirs.numel() == 0:
            continue
        a, b = theirs.double(), ours.double()
        noise, power = float((a - b).square().sum()), float(a.square().sum())
        if not noise <= 10**-1.5 * power + 1e-12 and not bool(torch.isnan(a).any()):
            share = noise / max(power, 1e-30)
            raise BackendError(
                "the package computes something else than the graph", value=value.name,
                expected="the rewritten module's output", found=f"noise of {share:.2g} of the signal",
                hint="a defect of torch's AOTInductor: lower without a path, which compiles in this process",
            )  # fmt: skip


def load_package(path: str | Path) -> Any:
    """The callable of a package: tensors by position -> a tensor or a list of them.

    Raises:
        BackendError: there is no such file, or this torch cannot load it.
    """
    path = Path(path)
    if not path.is_file():
        raise BackendError("there is no such package", node=str(path))
    try:
        return torch._inductor.aoti_load_package(str(path))
    except Exception as exc:  # the loader raises RuntimeError and OSError of its own making
        raise BackendError("the package cannot be loaded here", node=path.name, found=_text(exc)) from exc


def _text(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {' '.join(str(exc).split())[:600]}"
