"""ONNX Runtime: an ONNX graph is saved and opened, an FX graph is exported first; CPU, CUDA or TensorRT provider."""

from .artifact import OnnxRuntimeArtifact, Profile
from .backend import (
    OnnxRuntimeArm,
    OnnxRuntimeCpu,
    OnnxRuntimeCpuAvx2,
    OnnxRuntimeCuda,
    OnnxRuntimeHost,
    OnnxRuntimeTensorrt,
)

__all__ = [
    "OnnxRuntimeArm",
    "OnnxRuntimeArtifact",
    "OnnxRuntimeCpu",
    "OnnxRuntimeCpuAvx2",
    "OnnxRuntimeCuda",
    "OnnxRuntimeHost",
    "OnnxRuntimeTensorrt",
    "Profile",
]
