"""Opening an inference session: providers that are there, threads, files the installed runtime can read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...graph.errors import BackendError
from ...graph.onnx import native, stream
from .kept import OPTIMIZER, quantized_behind_our_back

PREFERENCE = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
SLOWER_ON_CPU = ("SkipLayerNormFusion",)
"""Rewrites whose fused kernel takes longer on the CPU than the operators it stands for (measured with 1.31.1)."""
INLINE_LIMIT = 1_900_000_000
"""Bytes of weights up to which a file keeps them inside (protobuf ends at 2 GiB)."""


def providers(kind: str) -> list[str]:
    """ONNX Runtime's provider names for ``cpu``, ``cuda`` or ``tensorrt``, best first.

    Raises:
        BackendError: ONNX Runtime is not installed, or this build lacks the provider.
    """
    available = runtime().get_available_providers()
    wanted = PREFERENCE[kind]
    if wanted[0] not in available:
        raise BackendError(
            "this build of ONNX Runtime lacks the provider",
            node=f"onnxruntime-{kind}",
            expected=wanted[0],
            found=", ".join(available),
            hint="install onnxruntime-gpu on a machine with the device, or lower for onnxruntime-cpu",
        )
    return [p for p in wanted if p in available]


def defaults(name: str, folder: Path | None = None) -> dict[str, Any]:
    """Options for one provider that suit the files foldline writes.

    TensorRT: int8 and fp16 kernels allowed (Q/DQ pairs say where int8 applies), engines and timings kept beside the
    model where there is a folder. CUDA: convolution algorithms by heuristic, which opens in seconds, not minutes.
    """
    if name == "TensorrtExecutionProvider":
        cached = {} if folder is None else {
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": True,
            "trt_timing_cache_path": str(folder),
        }  # fmt: skip
        return {"trt_int8_enable": True, "trt_fp16_enable": True, **cached}
    if name == "CUDAExecutionProvider":
        return {"cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}
    return {}


def provider_choices(
    names: Sequence[str], given: Mapping[str, Mapping[str, Any]] | None, folder: Path | None
) -> list[tuple[str, dict[str, Any]]]:
    """Providers with their options, the user's over the defaults; short names (``"cuda"``) will do.

    Raises:
        BackendError: options were given for a provider that is not among them.
    """
    short = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
    chosen = {short.get(key, key): dict(options) for key, options in (given or {}).items()}
    wrong = sorted(set(chosen) - set(names))
    if wrong:
        raise BackendError(
            "options for a provider that is not used", node=wrong[0], expected=", ".join(names), found=wrong[0]
        )
    return [(name, {**defaults(name, folder), **chosen.get(name, {})}) for name in names]


def runtime() -> Any:
    """The onnxruntime module. Raises BackendError if it is not installed."""
    try:
        import onnxruntime
    except ImportError as exc:
        raise BackendError("ONNX Runtime is not installed", hint="pip install onnxruntime") from exc
    return onnxruntime


def default_threads() -> int:
    """Cores that this process may use, or OMP_NUM_THREADS where it is set."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    if named.isdigit() and int(named) > 0:
        return int(named)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_session(
    model: ir.Model | Path,
    provider_names: Sequence[str] = ("CPUExecutionProvider",),
    *,
    threads: int | None = None,
    optimized: Path | None = None,
    entries: Mapping[str, str] | None = None,
    profile: Path | None = None,
    provider_options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """An InferenceSession with all of ONNX Runtime's rewrites on, but for those that make CPU models slower.

    Args:
        model: in memory (up to 2 GB), or a file.
        provider_names: in order of preference.
        threads: inside one operator; the cores of this process when None.
        optimized: where to write the model as ONNX Runtime rewrote it.
        entries: session configuration entries by key, e.g. ``{"session.intra_op.allow_spinning": "0"}``.
        provider_options: options per provider, over the defaults.
        profile: where to write the profile (a prefix), if one is to be taken.

    Raises:
        BackendError: ONNX Runtime refuses the model, with what it said.
    """
    ort = runtime()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Left to itself ONNX Runtime takes every core of the machine, also those outside the process's affinity mask.
    options.intra_op_num_threads = default_threads() if threads is None else threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    source: Any = str(model) if isinstance(model, Path) else serialized(model)
    chosen = provider_choices(provider_names, provider_options, model.parent if isinstance(model, Path) else None)
    try:
        skipped = list(SLOWER_ON_CPU) if chosen[0][0] == "CPUExecutionProvider" else []
        if skipped and quantized_behind_our_back(ir.load(model) if isinstance(model, Path) else model):
            skipped.append(OPTIMIZER)
        return ort.InferenceSession(source, options, providers=chosen, disabled_optimizers=skipped)
    except Exception as exc:  # onnxruntime raises classes of its own that share only this base
        raise refused(exc) from exc


def refused(exc: Exception) -> BackendError:
    """ONNX Runtime's exception as a BackendError that names the node where its text does."""
    text = str(exc).strip().splitlines() or [type(exc).__name__]
    named = re.search(r"[Nn]ode:? ?\(?'?([^\s')]+)", text[0])
    hint = None
    if "IR version" in text[0]:
        hint = "the file is newer than the installed ONNX Runtime: lower it with foldline, which sets the version"
    return BackendError(
        "ONNX Runtime refused the model", node=named.group(1) if named else None, found=text[0][:400], hint=hint
    )


def serialized(model: ir.Model) -> bytes:
    """The model as bytes, weights inside."""
    return stream.serialized(native.inline(model.clone()))


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, subgraphs included."""
    tensors = (v.const_value for g in model.graphs() for v in g.initializers.values())
    return sum(t.nbytes for t in tensors if t is not None)


IR_VERSION = 10
"""Read by every ONNX Runtime that foldline supports."""
NEWER_TYPES = frozenset(t for t in ("FLOAT4E2M1", "FLOAT8E8M0", "UINT2", "INT2") if hasattr(ir.DataType, t))


def readable(model: ir.Model) -> None:
    """Lower the IR version to one that the runtime reads, unless the model stores types that need a newer one."""
    stored = {v.dtype.name for g in model.graphs() for v in g.initializers.values() if v.dtype is not None}
    if model.ir_version > IR_VERSION and not stored & NEWER_TYPES:
        model.ir_version = IR_VERSION
