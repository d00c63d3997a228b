"""A model opened in ONNX Runtime: run it, time it, and see which nodes became integer kernels."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...graph.errors import BackendError, ConstraintError
from ...graph.execute import to_numpy
from ..base import Artifact
from .node_times import kernel_times
from .session import open_session, refused

INTEGER_OPS = frozenset(
    "QLinearConv ConvInteger QLinearMatMul MatMulInteger MatMulIntegerToFloat DynamicQuantizeMatMul QGemm QAttention "
    "QLinearAdd QLinearMul QLinearSub QLinearConcat QLinearAveragePool QLinearGlobalAveragePool QLinearLeakyRelu "
    "QLinearSigmoid QLinearSoftmax QLinearReduceMean QLinearWhere".split()
)
MATRIX_OPS = frozenset("Conv FusedConv ConvTranspose Gemm FusedGemm MatMul FusedMatMul NhwcFusedConv LSTM GRU".split())


@dataclass
class Profile:
    """What ONNX Runtime made of the graph.

    Attributes:
        counts: op type -> number of nodes in the rewritten graph.
        integer: (name, op type) of nodes that compute in integers.
        float_matrix: (name, op type) of convolutions and matrix products left in float.
        quantize, dequantize: QuantizeLinear and DequantizeLinear nodes that remain.
        times: (name, op type, milliseconds) of each kernel in order of execution, where they were measured.
    """

    counts: dict[str, int] = field(default_factory=dict)
    integer: list[tuple[str, str]] = field(default_factory=list)
    float_matrix: list[tuple[str, str]] = field(default_factory=list)
    quantize: int = 0
    dequantize: int = 0
    times: list[tuple[str, str, float]] = field(default_factory=list)

    def by_op(self) -> dict[str, float]:
        """Milliseconds per op type, the longest first; empty where no times were measured."""
        total: dict[str, float] = {}
        for _, op, ms in self.times:
            total[op] = total.get(op, 0.0) + ms
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


class OnnxRuntimeArtifact(Artifact):
    """An open inference session.

    Args:
        model: what was lowered; kept for :meth:`profile` when there is no file.
        path: the file it was saved to, or None.
        session: the open session.
        threads: operator threads of the session.
        example_inputs: one call's inputs by name, for :meth:`benchmark`.
        folder: a temporary folder that holds the file; it lives as long as the artifact.
        bind: one call's arguments as {input name: array}, for models that take nested containers (``Graph.bind``).

    ``notes`` says what the user should know, e.g. a dimension that could not stay dynamic.
    """

    def __init__(
        self,
        model: ir.Model,
        path: Path | None,
        session: Any,
        threads: int | None,
        example_inputs: dict[str, np.ndarray] | None = None,
        folder: Any = None,
        bind: Callable[[Any], dict[str, np.ndarray]] | None = None,
    ) -> None:
        self.model = model
        self.path = path
        self.session = session
        self.threads = threads
        self._example = example_inputs
        self._folder = folder
        self._bind = bind
        self.notes: list[str] = []
        self.entries: dict[str, str] = {}
        self.provider_options: dict[str, dict[str, Any]] = {}
        self.input_names = [v.name for v in session.get_inputs()]
        self.output_names = [v.name for v in session.get_outputs()]
        self.providers = list(session.get_providers())

    def feeds(self, inputs: Any) -> dict[str, np.ndarray]:
        """One call's inputs by name, as contiguous numpy; they come by name, or as the model itself is called."""
        if self._bind is not None and _nested(inputs):
            found = dict(self._bind(inputs))
        elif isinstance(inputs, dict):
            found = dict(inputs)
        else:
            items = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
            if len(items) > len(self.input_names):
                raise ConstraintError("too many inputs", expected=self.input_names, found=len(items))
            found = dict(zip(self.input_names, items, strict=False))
        if set(found) != set(self.input_names):
            raise ConstraintError(
                "the inputs do not match the model's", expected=self.input_names, found=sorted(map(str, found))
            )
        return {name: np.ascontiguousarray(to_numpy(x)) for name, x in found.items()}

    def run(self, inputs: Any) -> list[np.ndarray]:
        return self._run(self.feeds(inputs))

    def ready(self, inputs: Any) -> Callable[[], Any]:
        feeds = self.feeds(inputs)
        return lambda: self._run(feeds)

    def _run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        try:
            return list(self.session.run(self.output_names, feeds))
        except Exception as exc:  # onnxruntime raises classes of its own that share only this base
            raise refused(exc) from exc

    def example(self) -> dict[str, np.ndarray]:
        if self._example is None:
            return dict(super().example())
        return self._example

    def profile(self, runs: int = 0, inputs: Any = None) -> Profile:
        """Which nodes became integer kernels, and (with ``runs``) how long each kernel takes.

        The model is opened once more to write ONNX Runtime's rewritten graph, and again with its profiler.

        Args:
            runs: profiled calls; 0 measures no times.
            inputs: one call's inputs; :meth:`example` when absent.

        Raises:
            BackendError: a provider compiled the graph, so that no ONNX graph can be written.
        """
        with tempfile.TemporaryDirectory(prefix="foldline-") as folder:
            target = Path(folder) / "optimized.onnx"
            source = self.path if self.path is not None else self.model
            # Weights that were packed or constant-folded may exceed what one protobuf holds.
            entries = {
                "session.optimized_model_external_initializers_file_name": "optimized.data",
                "session.optimized_model_external_initializers_min_size_in_bytes": "4096",
            }
            open_session(
                source,
                self.providers,
                threads=self.threads,
                optimized=target,
                entries={**self.entries, **entries},
                provider_options=self.provider_options,
            )
            if not target.exists():
                raise BackendError("this provider writes no optimized graph", node=self.providers[0])
            found = sort_nodes(ir.load(target))
        if runs:
            feeds = self.feeds(self.example() if inputs is None else inputs)
            found.times = kernel_times(
                source, feeds, self.providers, threads=self.threads, runs=runs, provider_options=self.provider_options
            )
        return found


def sort_nodes(model: ir.Model) -> Profile:
    """The profile of a rewritten model."""
    found = Profile()
    counts: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        counts[node.op_type] += 1
        if node.op_type in INTEGER_OPS:
            found.integer.append((node.name or "", node.op_type))
        elif node.op_type in MATRIX_OPS:
            found.float_matrix.append((node.name or "", node.op_type))
    found.quantize = counts["QuantizeLinear"]
    found.dequantize = counts["DequantizeLinear"]
    found.counts = dict(sorted(counts.items()))
    return found


def _nested(inputs: Any) -> bool:
    """Whether a call holds containers within its tuple or dict of arguments."""
    items = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, (tuple, list)) else ()
    return any(isinstance(x, (tuple, list, dict)) for x in items)
