"""Saving ONNX models: complete under a temporary name first, then renamed; large weights beside the model."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from ..errors import ModelFileError
from . import native as onnx_native
from . import stream

if TYPE_CHECKING:
    from .graph import ONNXGraph

INLINE_LIMIT = 1_900_000_000
"""Bytes of weights above which they go to an external file (protobuf ends at 2 GiB)."""
SMALL = 1024
"""Tensors up to this many bytes stay in the model file."""


def save_onnx(model: ONNXGraph | ir.Model | onnx.ModelProto, path: str | Path, *, external: bool | None = None) -> Path:
    """Write a model so that ``path`` holds either the old file or the complete new one, never a part.

    Args:
        model: graph, onnx_ir.Model or ModelProto; it is not modified.
        path: target; weights go to ``<name>.data`` beside it when ``external``.
        external: None decides: external where the model's weights already are, or where they exceed protobuf's limit.

    Raises:
        ModelFileError: the folder is missing or not writable, or a weight cannot be read.
    """
    native = _as_ir(model)
    path = Path(path)
    if not path.parent.is_dir():
        raise ModelFileError("no such folder", value=str(path.parent), hint="create it first")
    tensors = [v.const_value for g in native.graphs() for v in g.initializers.values() if v.const_value is not None]
    if external is None:
        external = (
            any(onnx_native.stored_in(t) is not None for t in tensors) or sum(t.nbytes for t in tensors) > INLINE_LIMIT
        )
    data_name = path.name + ".data"
    for tensor in tensors:
        stored = onnx_native.stored_in(tensor)
        if stored is not None and _same_file(stored.path, path.parent / data_name):
            stored.numpy()  # maps the old file, so that it stays readable after the rename
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ModelFileError("the folder cannot be written", value=str(path.parent), found=str(error)) from error
    try:
        target = folder / path.name
        copy = onnx_native.inline(native.clone(), SMALL if external else None)
        if external:
            ir.external_data.unload_from_model(copy, folder, data_name, size_threshold_bytes=SMALL)
        stream.write(copy, target)
        if external and (folder / data_name).exists():
            os.replace(folder / data_name, path.parent / data_name)
        os.replace(target, path)
    except (OSError, ValueError) as error:
        raise ModelFileError("the model could not be saved", value=str(path), found=str(error)[:300]) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return path


def _as_ir(model: ONNXGraph | ir.Model | onnx.ModelProto) -> ir.Model:
    if isinstance(model, ir.Model):
        return model
    if isinstance(model, onnx.ModelProto):
        return onnx_native.deserialize(model)
    if model.dirty or model.moved or model.idle:
        model.refresh()
    return model.model


def _same_file(a: str | Path, b: str | Path) -> bool:
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)
