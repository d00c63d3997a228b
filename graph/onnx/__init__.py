"""The ONNX front end, on onnx-ir: files and protos as graphs, written back without loss."""

from .graph import ONNXGraph, load_onnx

__all__ = ["ONNXGraph", "load_onnx"]
