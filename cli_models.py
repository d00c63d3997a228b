"""What the command line calls MODEL, its inputs and its calibration data, as Python objects."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .graph.errors import ConfigError, FoldlineError
from .passes.base import nearest

ModelArgument = (
    "An .onnx file, a .pt2 exported program, or module:callable or file.py:callable, "
    "which returns an nn.Module and its example inputs."
)


def load_model(text: str) -> tuple[Any, Any]:
    """The model that MODEL names, and the example inputs it comes with (None for files).

    Raises:
        ConfigError: the callable cannot be found, fails, or returns something else.
        ModelFileError: there is no such file (raised later, by ``fl.load``).
    """
    source, colon, name = text.rpartition(":")
    if not colon or Path(text).exists() or "/" in name or "\\" in name:
        return Path(text), None
    function = _find(source, name, text)
    try:
        found = function()
    except FoldlineError:
        raise
    except Exception as exc:
        raise ConfigError(f"{text} failed: {type(exc).__name__}: {exc}", node=text, hint="try --traceback") from exc
    if isinstance(found, tuple) and len(found) == 2:
        return found
    return found, None


def _find(source: str, name: str, text: str) -> Any:
    module = _from_file(Path(source), text) if source.endswith(".py") else _from_path(source, text)
    function = getattr(module, name, None)
    if not callable(function):
        callables = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        close = nearest(name, callables)
        raise ConfigError(
            f"{source} has no function {name!r}",
            node=text,
            found=name,
            hint=f"did you mean {close!r}?" if close else None,
        )
    return function


def _from_file(path: Path, text: str) -> Any:
    if not path.is_file():
        raise ConfigError("there is no such Python file", node=text, value=str(path))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    loader, module = spec.loader, importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # so that its classes can be pickled under their name
    sys.path.insert(0, str(path.resolve().parent))
    _imported(lambda: loader.exec_module(module), text)
    return module


def _from_path(name: str, text: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return _imported(lambda: importlib.import_module(name), text)


def _imported(load: Any, text: str) -> Any:
    try:
        return load()
    except Exception as exc:
        raise ConfigError(
            f"the module of {text} cannot be imported: {type(exc).__name__}: {exc}",
            node=text,
            expected=ModelArgument,
            hint="try --traceback, or set PYTHONPATH",
        ) from exc


def example_inputs(model: Any, example: Any, shapes: Sequence[str] | None, seed: int) -> Any:
    """The example inputs that a model came with, or made-up ones of the shapes given.

    Args:
        model: as :func:`load_model` returned it.
        example: what it came with.
        shapes: ``--input-shape`` options: ``1x3x224x224`` or ``NAME=1x3x224x224``.
        seed: of the made-up values.

    Returns:
        For files a dictionary by input name; for modules a tuple of float32 tensors (keyword arguments where named).

    Raises:
        ConfigError: a shape cannot be read, or names no input.
    """
    if not shapes:
        return example
    parsed = [_shape(text) for text in shapes]
    if isinstance(model, Path):
        return _for_file(model, parsed, seed)
    import torch

    made = [(n, torch.randn(s, generator=torch.Generator().manual_seed(seed + i))) for i, (n, s) in enumerate(parsed)]
    return tuple(t for n, t in made if not n), {n: t for n, t in made if n}


def _for_file(path: Path, shapes: list[tuple[str, tuple[int, ...]]], seed: int) -> dict[str, np.ndarray]:
    from .graph.execute import synthesize_inputs
    from .graph.load import load

    graph = load(path)
    names = [v.name for v in graph.inputs]
    for i, (name, shape) in enumerate(shapes):
        name = name or (names[i] if i < len(names) else "")
        if name not in names:
            close = nearest(name, names)
            raise ConfigError(
                "--input-shape names no input of the model",
                node="--input-shape",
                expected=", ".join(names),
                found=name or "one shape too many",
                hint=f"did you mean {close!r}?" if close else None,
            )
        value = graph.inputs[names.index(name)]
        _check_fixed(value, shape)
        value.hint = shape
    return synthesize_inputs(graph, seed)


def _check_fixed(value: Any, shape: tuple[int, ...]) -> None:
    declared = value.shape
    if declared is None:
        return
    fits = len(declared) == len(shape) and all(
        not isinstance(d, int) or d == s for d, s in zip(declared, shape, strict=True)
    )
    if not fits:
        expected = "x".join(map(str, declared))
        raise ConfigError(
            "--input-shape contradicts the model", node=value.name, expected=expected, found="x".join(map(str, shape))
        )


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, equals, sizes = text.rpartition("=")
    try:
        shape = tuple(int(part) for part in sizes.replace(",", "x").split("x") if part.strip())
    except ValueError:
        shape = ()
    if any(size < 1 for size in shape) or (not shape and sizes):
        raise ConfigError(
            "this is no shape", node="--input-shape", expected="1x3x224x224 or NAME=1x3x224x224", found=text
        )
    return name if equals else "", shape


class Batches(Sequence[Any]):
    """Calibration batches in files, read when asked for, so that they need not fit into memory together."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Batches(self.files[index])
        path = self.files[index]
        return dict(_npz(path)) if path.suffix == ".npz" else _npy(path)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


def batches(path: Path, size: int) -> Sequence[Any]:
    """Calibration data: a .npz split into batches of ``size`` samples, or a folder with one .npy/.npz per batch.

    Raises:
        ConfigError: there is nothing to read, or the arrays have different numbers of samples.
    """
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".npy", ".npz"))
        if not files:
            raise ConfigError("the calibration folder holds no .npy or .npz", node=str(path))
        return Batches(files)
    if path.suffix == ".npy":
        arrays = {"": _npy(path)}
    elif path.suffix == ".npz":
        arrays = _npz(path)
    else:
        raise ConfigError("unknown kind of calibration data", node=str(path), expected=".npz, .npy or a folder of them")
    counts = {name: a.shape[0] if a.ndim else 0 for name, a in arrays.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ConfigError(
            "calibration arrays must hold the same number of samples along axis 0", node=str(path), found=counts
        )
    starts = range(0, next(iter(counts.values())), size)
    single = next(iter(arrays.values())) if len(arrays) == 1 else None
    if single is not None:
        return [single[i : i + size] for i in starts]
    return [{name: a[i : i + size] for name, a in arrays.items()} for i in starts]


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as found:
            return {name: found[name] for name in found.files}
    except (OSError, ValueError) as exc:
        raise ConfigError(f"the calibration file cannot be read: {exc}", node=str(path)) from exc


def _npy(path: Path) -> np.ndarray:
    try:
        found: np.ndarray = np.load(path)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"the calibration file cannot be read: {exc}", node=str(path)) from exc
    return found
