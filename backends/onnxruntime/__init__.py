"""ONNX Runtime: an ONNX graph is saved and opened, an FX graph is exported first; CPU, CUDA or TensorRT provider."""

from .artifact import OnnxRuntimeArtifact, Profile
from .backend import OnnxRuntimeCpu, OnnxRuntimeCuda, OnnxRuntimeTensorrt

__all__ = ["OnnxRuntimeArtifact", "OnnxRuntimeCpu", "OnnxRuntimeCuda", "OnnxRuntimeTensorrt", "Profile"]
