"""TensorRT and TensorRT-RTX."""

from .backend import TensorRT, TensorRTFp8, TensorRTInt4

__all__ = ["TensorRT", "TensorRTFp8", "TensorRTInt4"]
