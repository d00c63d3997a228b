"""check(): what a target would say about a model or file, without lowering it and without the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..graph.errors import FoldlineError, ModelFileError
from ..graph.load import is_onnx_model, load
from .base import Diagnostic, get


def check(model: Any, target: str, example_inputs: Any = None) -> list[Diagnostic]:
    """Diagnostics of a target for a model.

    Args:
        model: anything ``fl.load`` takes; an ONNX model or file is checked for validity first, and when it is not
            valid that is all that is said.
        target: name of the backend.
        example_inputs: one call's arguments, for an ``nn.Module``.

    Returns:
        Errors first, then warnings, then infos; within these in the order of the graph. Empty when all is well.

    Raises:
        ConfigError: there is no such backend. ModelFileError: there is no such file.
    """
    backend = get(target)
    if isinstance(model, (str, Path)) and not Path(model).exists():
        raise ModelFileError("there is no such model file", node=str(model))
    found = validity(model)
    if not any(d.severity == "error" for d in found):
        try:
            found += backend.check(load(model, example_inputs))
        except FoldlineError as exc:
            if not _is_onnx(model):
                raise
            found.append(Diagnostic("load", "error", exc.node or "", exc.message, exc.hint or ""))
    order = ("error", "warning", "info")
    return sorted(found, key=lambda d: order.index(d.severity))


def _is_onnx(model: Any) -> bool:
    return is_onnx_model(model) or (isinstance(model, (str, Path)) and Path(model).suffix.lower() == ".onnx")


def validity(model: Any) -> list[Diagnostic]:
    """What ONNX's own checker says about a model or file; nothing for other kinds."""
    if not _is_onnx(model):
        return []
    import onnx

    if isinstance(model, (str, Path)):
        subject: Any = str(model)
    elif isinstance(model, onnx.ModelProto):
        subject = model
    else:
        import onnx_ir as ir

        subject = ir.serde.serialize_model(model)
    try:
        onnx.checker.check_model(subject)
    except Exception as exc:  # ValidationError, DecodeError, OSError: whatever is wrong with the file
        text = " ".join(str(exc).split())
        return [Diagnostic("onnx", "error", "", text[:400], "the file is not valid ONNX: export it again")]
    return []
