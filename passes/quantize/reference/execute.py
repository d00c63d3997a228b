"""Runs a Q/DQ graph as ONNX Runtime's CPU provider does: integer kernels where it has them, the rest node by node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ....graph.errors import ConstraintError
from ....graph.execute import to_numpy
from ....graph.ir import Graph, Node, Value
from . import kernels as k
from .fuse import Kernel, find_kernels, grid_of, source


def run(graph: Graph, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of a Q/DQ graph in the integer arithmetic of ONNX Runtime's CPU provider.

    Which nodes become integer kernels is decided by :func:`..fuse.find_kernels`. Every other node is computed by itself
    in the graph's own engine: ONNX Runtime for ONNX graphs, torch for FX graphs. Where such nodes exist, ONNX Runtime's
    fusions of float operators (layer norm, GELU, ...) may differ from it in the last bits; a graph of integer kernels
    alone is reproduced to the last bit.

    Args:
        graph: FX or ONNX, with its Q/DQ pairs. Only read.
        inputs: one array per graph input, by name.

    Raises:
        ConstraintError: an input is missing, or a node cannot be computed by itself.
    """
    return Executor(graph).run(inputs)


class Executor:
    """One graph, ready to run; :attr:`kernels` says which nodes are integer kernels."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.kernels: dict[str, Kernel] = find_kernels(graph)
        self._covered = {
            n.name for kernel in self.kernels.values() for n in (*kernel.absorbed, kernel.quantize) if n is not None
        }
        self._single = _evaluator(graph)

    def run(self, inputs: Mapping[str, np.ndarray], taps: Mapping[str, Any] | None = None) -> list[np.ndarray]:
        """See :func:`run`; results of the kernels go into ``taps`` by node name where a dictionary is given."""
        missing = [v.name for v in self.graph.inputs if v.name not in inputs]
        if missing:
            raise ConstraintError(
                "a graph input is missing", value=missing[0], expected=[v.name for v in self.graph.inputs]
            )
        env: dict[int, Any] = {id(v): np.asarray(inputs[v.name]) for v in self.graph.inputs}
        for node in self.graph.nodes:
            if node.name in self._covered:
                continue
            kernel = self.kernels.get(node.name)
            if kernel is not None:
                found = self._kernel(kernel, env)
                env[id(kernel.result)] = found
                if taps is not None:
                    taps[node.name] = found  # type: ignore[index]
            elif node.op == "quantize":
                env[id(node.output)] = _quantize(node, self._array(node.inputs[0], env))
            elif node.op == "dequantize":
                env[id(node.output)] = _dequantize(node, self._array(node.inputs[0], env))
            else:
                env |= {id(v): r for v, r in zip(node.outputs, self._single(node, env), strict=True)}
        return [self._array(v, env) for v in self.graph.outputs]

    def _array(self, value: Value | None, env: dict[int, Any]) -> np.ndarray:
        assert value is not None
        return np.asarray(value.const()) if id(value) not in env else to_numpy(env[id(value)])

    def _operand(self, value: Value | None, env: dict[int, Any]) -> k.Quantized:
        dq = source(value)
        assert dq is not None
        grid = grid_of(dq)
        return k.Quantized(self._array(dq.inputs[0], env), grid.scale, grid.zero)

    def _kernel(self, kernel: Kernel, env: dict[int, Any]) -> np.ndarray:
        node = kernel.node
        grid = None if kernel.quantize is None else grid_of(kernel.quantize)
        if node.op in ("linear", "matmul"):
            return self._product(kernel, grid, env)
        assert grid is not None
        operands = [self._operand(v, env) for v in node.inputs if source(v) is not None]
        if node.op == "conv":
            bias = None if node.input(2) is None else self._array(source(node.input(2)).inputs[0], env)  # type: ignore[union-attr]
            names = ("stride", "padding", "dilation", "groups")
            return k.qlinear_conv(operands[0], operands[1], bias, grid, **{n: node.attrs[n] for n in names})
        if node.op == "add":
            return k.qlinear_add(operands[0], operands[1], grid)
        if node.op == "hardsigmoid":
            slope, shift = node.attrs.get("alpha", 1 / 6), node.attrs.get("beta", 0.5)
            scaled, constant = k.hard_sigmoid_terms(operands[0], slope, shift)
            return k.qlinear_add(scaled, constant, grid)
        if node.op == "mul":
            return k.qlinear_mul(operands[0], operands[1], grid)
        if node.op == "concat":
            return k.qlinear_concat(operands, grid, node.attrs["axis"])
        if node.op in ("adaptive_avg_pool", "mean"):
            return k.qlinear_global_average_pool(operands[0], grid)
        if node.op == "avg_pool":
            return k.qlinear_average_pool(
                operands[0],
                grid,
                kernel=node.attrs["kernel"],
                stride=node.attrs["stride"],
                padding=node.attrs["padding"],
                count_include_pad=bool(node.attrs.get("count_include_pad")),
            )
        if node.op == "leaky_relu":
            return k.table(operands[0], grid, lambda x: k.leaky_relu(x, node.attrs["slope"]))[0]
        return k.table(operands[0], grid, k.sigmoid)[0]

    def _product(self, kernel: Kernel, grid: k.Grid | None, env: dict[int, Any]) -> np.ndarray:
        node = kernel.node
        x, w = self._operand(node.inputs[0], env), self._operand(node.inputs[1], env)
        if node.op == "linear" and not node.attrs.get("transposed_weight"):
            w = k.Quantized(w.data.T, w.scale, w.zero)
        stored = source(node.input(2))
        for extra in kernel.absorbed:
            if extra.op == "add":
                stored = next(dq for v in extra.inputs if (dq := source(v)) is not None and dq.inputs[0].is_const)  # type: ignore[union-attr]
        bias = None if stored is None else self._array(stored.inputs[0], env)
        if kernel.op == "MatMulIntegerToFloat" and bias is not None:
            assert stored is not None
            return k.qgemm_float(x, w) + k.dequantize(bias, grid_of(stored).scale, 0)
        return k.qgemm_float(x, w, bias) if grid is None else k.qlinear_matmul(x, w, grid, bias)


def _params(node: Node, rank: int) -> Any:
    from ..numerics import QuantParams

    scale, zero = grid_of(node).scale, grid_of(node).zero
    axis = node.attrs.get("axis") if scale.ndim else None
    return QuantParams(scale, zero, None if axis is None else axis % max(rank, 1), node.attrs.get("block") or 0)


def _quantize(node: Node, x: np.ndarray) -> np.ndarray:
    return np.asarray(_params(node, x.ndim).quantize(x))


def _dequantize(node: Node, q: np.ndarray) -> np.ndarray:
    return np.asarray(_params(node, q.ndim).dequantize(q))


def _evaluator(graph: Graph) -> Any:
    """node, env -> one result per output, computed by the graph's own engine."""
    if graph.kind == "onnx":
        from ....graph.onnx.single_torch import Single as OfOnnx

        onnx = OfOnnx(graph)  # type: ignore[arg-type]
        return lambda node, env: onnx.run(node, _tensors(env, node), widen=False, runtime=True)
    if graph.kind == "fx":
        from ....graph.fx.single import Single as OfFx

        fx = OfFx(graph)  # type: ignore[arg-type]
        return lambda node, env: fx.run(node, _tensors(env, node), widen=False)
    raise ConstraintError("this kind of graph cannot be executed", node=graph.name, found=type(graph).__name__)


def _tensors(env: dict[int, Any], node: Node) -> dict[int, Any]:
    import torch

    found = {}
    for v in (*node.inputs, *node.dynamic):
        if v is not None and id(v) in env:
            held = env[id(v)]
            found[id(v)] = (
                torch.from_numpy(np.ascontiguousarray(held).reshape(held.shape))
                if isinstance(held, np.ndarray)
                else held
            )
    return found
