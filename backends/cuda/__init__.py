"""NVIDIA GPUs and x86 CPUs through torch: Triton kernels as torch operators, AOTInductor packages, CUDA graphs."""

from .backend import Cuda, InductorCpu

__all__ = ["Cuda", "InductorCpu"]
