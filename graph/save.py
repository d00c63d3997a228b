"""fl.save: a model or graph to a file, by suffix; written beside its place and renamed, so never half there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .ir import Graph
from .load import is_onnx_model, is_torch_model

TORCH_SUFFIXES = (".pt", ".pth", ".pt2", ".safetensors")


def save(model: Any, path: str | Path) -> Path:
    """Write a model and return its path.

    Args:
        model: an ``nn.Module``, an ``ExportedProgram``, an ``onnx.ModelProto``, an ``onnx_ir.Model`` or a graph.
        path: ``.onnx`` for ONNX models (weights above the format's limit go beside it as external data); for
            modules ``.pt`` or ``.pth`` (pickled module, which needs its class to be importable) or ``.safetensors``
            (weights only); ``.pt2`` for exported programs.

    Raises:
        ConfigError: the suffix does not fit the kind of model, or the module cannot be pickled.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if isinstance(model, Graph) and model.kind == "fx":
        model = model.to_model()
    if isinstance(model, Graph) or is_onnx_model(model):
        _expect(suffix, (".onnx",), path, "an ONNX model")
        return _save_onnx(model, path)
    if is_torch_model(model):
        import torch

        program = isinstance(model, torch.export.ExportedProgram)
        _expect(suffix, (".pt2",) if program else (".pt", ".pth", ".safetensors"), path, type(model).__name__)
        with replacing(path) as scratch:
            if program:
                torch.export.save(model, str(scratch))
            elif suffix == ".safetensors":
                _save_state(model, scratch)
            else:
                _pickle(model, scratch)
        return path
    raise ConfigError("this is no model that foldline can save", expected="a module, program, ONNX model or graph")


def _expect(suffix: str, allowed: tuple[str, ...], path: Path, kind: str) -> None:
    if suffix not in allowed:
        raise ConfigError(
            f"{kind} cannot be saved under this suffix", node=str(path), expected=" or ".join(allowed), found=suffix
        )


def _save_onnx(model: Any, path: Path) -> Path:
    from .onnx.save import save_onnx

    save_onnx(model, path)
    return path


def _save_state(module: Any, path: Path) -> None:
    from safetensors.torch import save_model

    save_model(module, str(path))
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)  # safetensors makes its files private


def _pickle(module: Any, path: Path) -> None:
    import pickle

    import torch

    try:
        torch.save(module, path)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as exc:
        raise ConfigError(
            f"this module cannot be pickled: {exc}",
            node=type(module).__name__,
            hint="save its weights (.safetensors), or define its class at the top level of a module",
        ) from exc


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch path beside ``path`` with the same suffix that takes its place when the block ends well.

    The scratch path does not exist yet; the block makes it a file or a folder. When the block raises, what was at
    ``path`` is left as it was and the scratch is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    scratch = folder / path.name
    try:
        yield scratch
        if path.is_dir() and not path.is_symlink():
            old = folder / "old"
            os.rename(path, old)
            try:
                os.rename(scratch, path)
            except OSError:
                os.rename(old, path)
                raise
        else:
            os.replace(scratch, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
