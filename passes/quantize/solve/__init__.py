"""The solver: a backend's spec applied to a graph, with the same decisions on torch and on ONNX."""

from .solver import Solver

__all__ = ["Solver"]
