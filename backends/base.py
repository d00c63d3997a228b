"""What a backend is: its spec, its check, its lowering; what an artifact is: run and benchmark; and the registry."""

from __future__ import annotations

import abc
import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from ..graph.errors import BackendError, ConfigError
from ..graph.ir import Graph
from ..passes.base import nearest
from ..passes.quantize.spec import BackendSpec

GROUP = "foldline.backends"

BUILTIN: dict[str, tuple[str, str]] = {
    "onnxruntime": (".onnxruntime", "OnnxRuntimeCpu"),
    "onnxruntime-cpu": (".onnxruntime", "OnnxRuntimeCpu"),
    "onnxruntime-cpu-avx2": (".onnxruntime", "OnnxRuntimeCpuAvx2"),
    "onnxruntime-arm": (".onnxruntime", "OnnxRuntimeArm"),
    "onnxruntime-cpu-host": (".onnxruntime", "OnnxRuntimeHost"),
    "onnxruntime-cuda": (".onnxruntime", "OnnxRuntimeCuda"),
    "onnxruntime-tensorrt": (".onnxruntime", "OnnxRuntimeTensorrt"),
    "cuda": (".cuda", "Cuda"),
    "inductor-cpu": (".cuda", "InductorCpu"),
    "tensorrt": (".tensorrt", "TensorRT"),
    "tensorrt-rtx": (".tensorrt", "TensorRT"),
    "tensorrt-fp8": (".tensorrt", "TensorRTFp8"),
    "tensorrt-int4": (".tensorrt", "TensorRTInt4"),
}
"""Name -> (module, class), loaded when first asked for."""


@dataclass(frozen=True)
class Diagnostic:
    """One thing a backend has to say about a model.

    Attributes:
        rule: short stable name of the rule, e.g. ``"conv-output-q"``.
        severity: ``error`` (refused, or wrong results), ``warning`` (slow or inaccurate), ``info``.
        node: name of the node concerned, or "" for the whole model.
        message: what is wrong.
        fix: what to do about it.
        consequence: ``error`` (refused), ``silently wrong``, ``inaccurate`` or ``slow``; "" where none is known.
    """

    rule: str
    severity: Literal["error", "warning", "info"]
    node: str
    message: str
    fix: str = ""
    consequence: str = ""

    def to_dict(self) -> dict[str, str]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        where = f" {self.node}:" if self.node else ""
        return f"{self.severity} [{self.rule}]{where} {self.message}" + (f" ({self.fix})" if self.fix else "")


class Artifact(abc.ABC):
    """What a backend made of a model.

    Attributes:
        path: the file or folder that holds it, or None when it lives in memory only.
    """

    path: Path | None = None

    @abc.abstractmethod
    def run(self, inputs: Any) -> list[np.ndarray]:
        """One call: ``inputs`` by name or by position, numpy or torch; the outputs in order, numpy."""

    def ready(self, inputs: Any) -> Callable[[], Any]:
        """A function of no arguments that makes the call once more, with the conversion of inputs already done."""
        return lambda: self.run(inputs)

    def example(self) -> Any:
        """Inputs to benchmark with. Raises BackendError if there are none."""
        raise BackendError("this artifact knows no example inputs", hint="call benchmark(inputs=...)")

    def benchmark(
        self, runs: int = 50, warmup: int = 10, against: Artifact | None = None, inputs: Any = None
    ) -> dict[str, Any]:
        """Time single calls; with ``against``, in turn A B A B, so that both see the same state of the machine.

        Args:
            runs, warmup: timed and untimed calls (of each).
            against: another artifact that takes the same inputs.
            inputs: one call's inputs; :meth:`example` when absent.

        Returns:
            ``median_ms``, ``spread_ms`` (interquartile range), ``min_ms``, ``runs``; with ``against`` also
            ``against`` (the same for the other), ``ratio`` (median over the pairs of this / other: below 1 is
            faster) and ``ratio_spread`` (its interquartile range).
        """
        if runs < 1:
            raise ConfigError("a benchmark needs runs", node="runs", expected="at least 1", found=runs)
        inputs = self.example() if inputs is None else inputs
        calls = [self.ready(inputs)] + ([] if against is None else [against.ready(inputs)])
        for _ in range(warmup):
            for call in calls:
                call()
        times: list[list[float]] = [[] for _ in calls]
        for _ in range(runs):
            for call, kept in zip(calls, times, strict=True):
                start = time.perf_counter()
                call()
                kept.append((time.perf_counter() - start) * 1e3)
        found = _summary(times[0])
        if against is not None:
            ratios = [a / b for a, b in zip(*times, strict=True)]
            low, middle, high = _quartiles(ratios)
            found |= {"against": _summary(times[1]), "ratio": middle, "ratio_spread": high - low}
        return found


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, high = np.percentile(values, [25, 75])
    return float(low), statistics.median(values), float(high)


def _summary(times: list[float]) -> dict[str, Any]:
    low, middle, high = _quartiles(times)
    return {"median_ms": middle, "spread_ms": high - low, "min_ms": min(times), "runs": len(times)}


def renamed(found: list[Diagnostic], graph: Graph) -> list[Diagnostic]:
    """Diagnostics of an exported file under the graph's names: the exporter writes ``node_conv2d`` for ``conv2d``."""
    own = {node.name for node in graph.nodes}
    names = {d.node: d.node.removeprefix("node_") for d in found if d.node not in own}
    return [replace(d, node=names[d.node]) if names.get(d.node) in own else d for d in found]


class Backend(abc.ABC):
    """A target. Instances are cheap and hold no model.

    Class variables:
        name: how pipelines and the command line call it.
    """

    name: ClassVar[str] = ""

    @property
    def spec(self) -> BackendSpec | None:
        """Where this target wants Q/DQ pairs; None if it runs no quantized graphs."""
        return None

    @abc.abstractmethod
    def check(self, graph: Graph) -> list[Diagnostic]:
        """What the target would refuse, miscompile or run slowly; static, so the target need not be here."""

    def check_file(self, file: Any, **options: Any) -> list[Diagnostic]:
        """What the target would say about an ONNX file (a ``rules.OnnxFile``), decided on the file alone.

        Args:
            options: facts of the target beyond its name, e.g. ``capability=86`` or ``vnni=False``.
        """
        from ..graph.load import load

        return self.check(load(file.model))

    def check_lowered(self, graph: Graph, artifact: Artifact) -> list[Diagnostic]:
        """What :meth:`check` says of a graph, by the file that :meth:`lower` made of it where it keeps one."""
        model = getattr(artifact, "model", None)
        if model is None or graph.kind != "fx":
            return self.check(graph)
        from .rules import OnnxFile

        return renamed(self.check_file(OnnxFile(model)), graph)

    @abc.abstractmethod
    def lower(self, graph: Graph, example_inputs: Any = None) -> Artifact:
        """Make something that runs. Concrete backends add their options as keyword arguments.

        Raises:
            BackendError: the target refuses or fails; it says what.
        """

    def node_times(
        self,
        graph: Graph,
        example_inputs: Any = None,
        *,
        runs: int = 20,
        artifact: Artifact | None = None,
        **options: Any,
    ) -> dict[str, float]:
        """Milliseconds that each node of the graph takes in one call on this target, by node name.

        Args:
            runs: profiled calls.
            artifact: what :meth:`lower` made of this very graph, to spare a second lowering.
            options: of :meth:`lower`.

        Raises:
            BackendError: the target tells no times of single nodes.
        """
        raise BackendError(
            "this backend tells no times of single nodes", node=self.name, hint="choose another backend, or target MACs"
        )


@cache
def _third_party() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in BUILTIN}


def names() -> list[str]:
    """Names of all backends, foldline's own first."""
    return [*BUILTIN, *sorted(_third_party())]


def get(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ConfigError: no such backend (naming the nearest), or its entry point gives none.
    """
    if name in BUILTIN:
        module, attribute = BUILTIN[name]
        found = getattr(importlib.import_module(module, __package__), attribute)
    elif name in _third_party():
        point = _third_party()[name]
        try:
            found = point.load()
        except (ImportError, AttributeError) as exc:
            raise ConfigError(f"the backend {name!r} cannot be loaded: {exc}", node=name, value=point.value) from exc
    else:
        close = nearest(name, names())
        raise ConfigError(
            f"there is no backend {name!r}",
            node=name,
            expected=", ".join(names()),
            found=name,
            hint=f"did you mean {close!r}?" if close else None,
        )
    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise ConfigError(f"the entry point {name!r} gives no Backend", node=name, expected="a Backend class")
    return found()
