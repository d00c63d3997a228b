"""Building engines: which TensorRT is here, what to build for, and what came of it, layer by layer."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...graph.errors import BackendError, ConfigError

LIBRARIES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
"""Python modules that build engines, best first. The last is TensorRT-RTX as PyPI has it, and needs no GPU to build."""
WORKER = Path(__file__).with_name("worker.py")
PRODUCTS = ("gemm", "correlation", "deconv", "runtime_fusion", "convolution")
NARROW = {"Int8": "int8", "FP8": "fp8", "FP4E2M1": "fp4", "FP4": "fp4"}


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built.

    Attributes:
        library: module to build with; the first of :data:`LIBRARIES` that is installed when None.
        capability: compute capability to build for, as 89 for 8.9 (TensorRT-RTX; TensorRT builds for the GPU here).
        profiles: per dynamic input the smallest, best and largest shape. Inputs without one get 1, 8 and 64.
        timing_cache: file that keeps measured kernel times between builds.
        workspace: bytes of scratch memory at most; the library's default when None.
        timeout: seconds for one file.
    """

    library: str | None = None
    capability: int = 89
    profiles: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    timing_cache: str | Path | None = None
    workspace: int | None = None
    timeout: float = 1800.0


@dataclass(frozen=True)
class Layer:
    """One layer of an engine: element types of what it reads and writes, and the ONNX nodes it computes."""

    name: str
    type: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]
    tactic: str = ""

    @property
    def precision(self) -> str:
        """Type that a product multiplies in: ``int8``, ``fp8``... where both its operands have it, else ``float``."""
        if self.type not in PRODUCTS or self.type == "runtime_fusion":
            return "float"
        # What else a layer reads, such as a residual, comes after its operands.
        kind = self.inputs[0] if self.inputs else ""
        if kind not in NARROW:
            return "float"
        both = kind in self.constants or (len(self.inputs) > 1 and self.inputs[1] == kind)
        return NARROW[kind] if both else "float"

    @property
    def label(self) -> str:
        """The precision, and the type of narrow weights that a float product dequantizes in registers."""
        stored = next((c for c in self.constants if c in ("Int4", *NARROW)), None)
        if self.precision == "float" and self.type == "runtime_fusion" and stored is not None:
            return f"float, {stored.lower()} weights"
        return self.precision


@dataclass(frozen=True)
class EngineReport:
    """What TensorRT said to a file.

    Attributes:
        library, version: that said it.
        parsed, built: how far it came.
        crash: signal (negative) or exit code of a process that died, else None.
        errors: (node, op, text) of every complaint.
        layers: of the engine.
        bytes: size of the engine.
        warnings: what else was said.
    """

    library: str
    version: str = ""
    parsed: bool = False
    built: bool = False
    crash: int | None = None
    errors: tuple[tuple[str, str, str], ...] = ()
    layers: tuple[Layer, ...] = ()
    bytes: int = 0
    warnings: tuple[str, ...] = ()
    inputs: tuple[dict[str, Any], ...] = ()
    outputs: tuple[dict[str, Any], ...] = ()

    @property
    def accepted(self) -> bool:
        return self.built

    def precision(self, node: str) -> str | None:
        """In what type the engine multiplies for a convolution or matrix product; None where it has no such layer."""
        found = [layer.precision for layer in self.layers if node in layer.nodes and layer.type in PRODUCTS]
        if not found:
            return None
        return next((p for p in found if p != "float"), "float")

    def counts(self) -> dict[str, int]:
        """Number of products per label (see :class:`Layer`)."""
        found: dict[str, int] = {}
        for layer in self.layers:
            if layer.type in PRODUCTS:
                found[layer.label] = found.get(layer.label, 0) + 1
        return dict(sorted(found.items()))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def library(wanted: str | None = None) -> str | None:
    """The module to build with, or None where no TensorRT is installed.

    Raises:
        BackendError: the wanted one is not installed.
    """
    if wanted is not None:
        if importlib.util.find_spec(wanted) is None:
            raise BackendError(
                "this TensorRT is not installed", node=wanted, hint="pip install 'foldline[tensorrt-oracle]'"
            )
        return wanted
    return next((name for name in LIBRARIES if importlib.util.find_spec(name) is not None), None)


def build(
    models: Sequence[str | Path],
    options: EngineOptions | None = None,
    *,
    engines: Sequence[str | Path] | None = None,
) -> list[EngineReport]:
    """Parse and build files, each in a process of its own.

    Args:
        models: ONNX files.
        options: how.
        engines: where to write the engines, one per file.

    Raises:
        BackendError: no TensorRT is installed, or the worker could not run.
        ConfigError: an unknown compute capability.
    """
    options = options or EngineOptions()
    name = library(options.library)
    if name is None:
        raise BackendError(
            "no TensorRT is installed",
            expected=" or ".join(LIBRARIES),
            hint="pip install 'foldline[tensorrt-oracle]' (builds without a GPU), or tensorrt on the device",
        )
    if not 50 <= options.capability <= 200:
        raise ConfigError("a compute capability is written as 89 for 8.9", node="capability", found=options.capability)
    jobs = [
        {
            "library": name,
            "model": str(Path(model).resolve()),
            "engine": None if engines is None else str(Path(engines[i]).resolve()),
            "capability": options.capability,
            "profiles": {k: [list(s) for s in v] for k, v in options.profiles.items()},
            "timing_cache": None if options.timing_cache is None else str(Path(options.timing_cache).resolve()),
            "workspace": options.workspace,
        }
        for i, model in enumerate(models)
    ]
    with tempfile.TemporaryDirectory(prefix="foldline-") as folder:
        source, target = Path(folder) / "jobs.json", Path(folder) / "answers.json"
        source.write_text(json.dumps(jobs))
        try:
            done = subprocess.run(
                [sys.executable, str(WORKER), str(source), str(target)],
                capture_output=True,
                text=True,
                timeout=options.timeout * max(1, len(jobs)),
            )
        except subprocess.TimeoutExpired as exc:
            raise BackendError("TensorRT did not finish", node=name, found=f"{exc.timeout:.0f} s") from exc
        if not target.exists():
            raise BackendError(
                "TensorRT's process failed",
                node=name,
                found=(done.stderr or done.stdout).strip()[-400:] or done.returncode,
            )
        answers = json.loads(target.read_text())
    return [_report(name, answer) for answer in answers]


def _report(name: str, answer: dict[str, Any]) -> EngineReport:
    def types(tensors: list[dict[str, str]]) -> tuple[str, ...]:
        return tuple(t["dtype"] for t in tensors)

    made = tuple(
        Layer(
            entry["name"],
            entry["type"],
            types(entry["inputs"]),
            types(entry["constants"]),
            types(entry["outputs"]),
            tuple(entry["nodes"]),
            entry["tactic"],
        )
        for entry in answer["layers"]
    )
    return EngineReport(
        name,
        answer.get("version", ""),
        answer["parsed"],
        answer["built"],
        answer.get("crash"),
        tuple((e["node"], e["op"], e["text"]) for e in answer["errors"]),
        made,
        answer.get("bytes", 0),
        tuple(answer.get("warnings", ())),
        tuple(answer.get("inputs", ())),
        tuple(answer.get("outputs", ())),
    )
