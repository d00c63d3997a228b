"""A reference executor of quantized graphs: what ONNX Runtime's integer kernels compute, in numpy, bit for bit."""

from .execute import Executor, run
from .fuse import Kernel, find_kernels

__all__ = ["Executor", "Kernel", "find_kernels", "run"]
