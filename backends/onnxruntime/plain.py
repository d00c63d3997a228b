"""A model computed as it is written: ONNX Runtime with all rewrites off, the reference for what rewrites change."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from .session import readable, refused, runtime, serialized


def run_plain(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name. Raises BackendError where ONNX Runtime refuses the model."""
    ort = runtime()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    copy = model.clone()
    readable(copy)
    try:
        session: Any = ort.InferenceSession(serialized(copy), options, providers=["CPUExecutionProvider"])
        names = [v.name for v in session.get_outputs()]
        wanted = {v.name for v in session.get_inputs()}
        return dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in wanted}), strict=True))
    except Exception as exc:  # onnxruntime raises classes of its own that share only this base
        raise refused(exc) from exc
