"""fl.check: what a target would say about a model or file, without lowering it and without the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..graph.errors import ConfigError, FoldlineError, ModelFileError
from ..graph.load import is_onnx_model, load
from .base import Diagnostic, get
from .rules.onnx_file import OnnxFile
from .rules.validity import checker, standard

ORDER = ("error", "warning", "info")


def check(model: Any, target: str, example_inputs: Any = None, **options: Any) -> list[Diagnostic]:
    """Diagnostics of a target for a model.

    An ONNX model is judged as it is, by its attributes and stored numbers; a module is exported first.

    Args:
        model: anything ``fl.load`` takes; an ONNX model or file is checked for validity first, and when it is not
            valid that is all that is said.
        target: name of the backend, or ``"onnx"`` for validity alone.
        example_inputs: one call's arguments, for an ``nn.Module``.
        options: facts of the target beyond its name: ``capability=86`` (TensorRT), ``vnni=False`` (ONNX Runtime).

    Returns:
        Errors first, then warnings, then infos; within these in the order of the rules and of the graph. Empty when
        all is well.

    Raises:
        ConfigError: there is no such backend. ModelFileError: there is no such file.
    """
    backend = None if target == "onnx" else get(target)
    if isinstance(model, (str, Path)) and not Path(model).exists():
        raise ModelFileError("there is no such model file", node=str(model))
    found = validity(model)
    if backend is not None and not any(d.severity == "error" for d in found):
        try:
            if is_onnx(model):
                found += backend.check_file(OnnxFile(model), **options)
            else:
                found += backend.check(load(model, example_inputs))
        except FoldlineError as exc:
            if isinstance(exc, ConfigError) or not is_onnx(model):
                raise
            found.append(Diagnostic("load", "error", exc.node or "", exc.message, exc.hint or "", "error"))
    return sorted(found, key=lambda d: ORDER.index(d.severity))


def is_onnx(model: Any) -> bool:
    """Whether this is an ONNX model or the path of one."""
    return is_onnx_model(model) or (isinstance(model, (str, Path)) and Path(model).suffix.lower() == ".onnx")


def validity(model: Any) -> list[Diagnostic]:
    """What the standard says about an ONNX model or file; nothing for other kinds."""
    if not is_onnx(model):
        return []
    found = checker(model)
    return found or standard(OnnxFile(model))
