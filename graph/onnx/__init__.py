"""The ONNX front end, on onnx-ir: files and protos as graphs, written back without loss."""

from .later import import_onnx_ir

import_onnx_ir()  # before anything below does

from .graph import ONNXGraph, load_onnx  # noqa: E402

__all__ = ["ONNXGraph", "load_onnx"]
