"""fl.load: any model as a graph, by the kind of what it is given."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .errors import ConfigError, ModelFileError
from .ir import Graph

KINDS = "nn.Module, torch ExportedProgram, onnx ModelProto, onnx_ir.Model, or the path of an .onnx or .pt2 file"


def load(model: Any, example_inputs: Any = None, *, static: bool = False) -> Graph:
    """The graph of a model; the model itself is never changed.

    Args:
        model: an ``nn.Module`` (needs ``example_inputs``), a torch ``ExportedProgram``, an ``onnx.ModelProto``, an
            ``onnx_ir.Model``, a path (``.onnx``; ``.pt2``: a saved exported program), or a graph, returned as it is.
        example_inputs: one call's arguments, as ``Graph.bind`` takes them.
        static: an ``nn.Module`` may be captured by recording one call instead of torch.export: many times faster, but
            every size is that of the example (the batch too), and of all edits only selecting, permuting and scaling
            axis groups can be written back. Enough for looking at axis groups and for pruning by weights.

    Raises:
        ConfigError: this kind of object cannot be loaded.
        ModelFileError: the file is missing, truncated or not what its name says.
        TraceError: the module cannot be captured.
    """
    if isinstance(model, Graph):
        return model
    if isinstance(model, (str, Path)):
        return _load_file(Path(model), example_inputs)
    if is_torch_model(model):
        from .fx import load_torch

        return load_torch(model, example_inputs, static=static)
    if is_onnx_model(model):
        from .onnx import load_onnx

        return load_onnx(model)
    raise ConfigError("this is not a model that foldline can load", expected=KINDS, found=type(model).__name__)


def _load_file(path: Path, example_inputs: Any) -> Graph:
    suffix = path.suffix.lower()
    if not path.exists():
        raise ModelFileError("there is no such model file", node=str(path), expected=KINDS)
    if path.is_dir():
        raise ModelFileError("this is a folder, not a model file", node=str(path), expected=KINDS)
    if suffix == ".onnx":
        from .onnx import load_onnx

        return load_onnx(path)
    if suffix == ".pt2":
        from .fx import load_torch

        return load_torch(_exported_program(path), example_inputs)
    hint = "rename the file by its contents"
    if suffix in (".pt", ".pth", ".bin", ".safetensors"):
        hint = "a checkpoint holds no program: build the module in Python, load its weights, and pass the module"
    raise ModelFileError("unknown kind of model file", node=str(path), expected=KINDS, found=suffix, hint=hint)


def _exported_program(path: Path) -> Any:
    import torch

    try:
        return torch.export.load(str(path))
    except Exception as exc:  # torch raises many kinds here: zip, JSON, pickle and schema errors among them
        raise ModelFileError(
            f"torch cannot read this exported program: {exc}",
            node=str(path),
            hint="write it again with torch.export.save",
        ) from exc


def is_torch_model(model: Any) -> bool:
    """Whether this is an nn.Module or an ExportedProgram (torch is not imported to find out)."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    return isinstance(model, (torch.nn.Module, torch.export.ExportedProgram))


def is_onnx_model(model: Any) -> bool:
    """Whether this is an onnx.ModelProto or an onnx_ir.Model (neither library is imported to find out)."""
    onnx, ir = sys.modules.get("onnx"), sys.modules.get("onnx_ir")
    return (onnx is not None and isinstance(model, onnx.ModelProto)) or (ir is not None and isinstance(model, ir.Model))
