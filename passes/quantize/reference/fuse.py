"""Which nodes of a Q/DQ graph ONNX Runtime's CPU provider turns into integer kernels, decided from the graph alone.

The runtime's selectors look for an operator all of whose data operands come out of DequantizeLinear and, for most,
whose result goes into QuantizeLinear. The same conditions are written down here per canonical op; tests compare the
counts with the optimized graph that the runtime writes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ....graph.errors import ConstraintError
from ....graph.ir import Graph, Node, Value
from .kernels import Grid, ends_at_0_and_1

SIDES = {
    "conv": (0,),
    "linear": (0,),
    "matmul": (0, 1),
    "add": (0, 1),
    "mul": (0, 1),
    "sigmoid": (0,),
    "hardsigmoid": (0,),
    "leaky_relu": (0,),
    "avg_pool": (0,),
    "adaptive_avg_pool": (0,),
    "mean": (0,),
}
"""Canonical op -> the operands that must come out of a dequantize node per tensor; concat: all."""
FLOAT_RESULT = ("linear", "matmul")
"""Ops whose kernels exist with a float result too."""
WITH_ACTIVATION = ("conv", "linear", "add", "matmul")


@dataclass
class Kernel:
    """One integer kernel.

    Attributes:
        op: the runtime's operator, e.g. ``"QLinearConv"``.
        node: the operation it computes.
        absorbed: activations behind it that the result's range makes superfluous, and the bias addition of a Gemm.
        quantize: the node whose integers the kernel gives; None for a float result.
    """

    op: str
    node: Node
    absorbed: list[Node] = field(default_factory=list)
    quantize: Node | None = None

    @property
    def result(self) -> Value:
        """The value that the kernel computes."""
        if self.quantize is not None:
            return self.quantize.output
        return (self.absorbed[-1] if self.absorbed else self.node).output


NAMES = {
    "conv": "QLinearConv",
    "add": "QLinearAdd",
    "mul": "QLinearMul",
    "concat": "QLinearConcat",
    "sigmoid": "QLinearSigmoid",
    "hardsigmoid": "QLinearAdd",
    "leaky_relu": "QLinearLeakyRelu",
    "avg_pool": "QLinearAveragePool",
    "adaptive_avg_pool": "QLinearGlobalAveragePool",
    "mean": "QLinearGlobalAveragePool",
}
"""Canonical op -> operator. In lowered models a mean over the spatial axes is a global pool, a hard sigmoid a sum."""


def find_kernels(graph: Graph) -> dict[str, Kernel]:
    """The integer kernels of a graph, by the name of the node each computes."""
    found = {}
    for node in graph.nodes:
        kernel = _kernel(node)
        if kernel is not None:
            found[node.name] = kernel
    return found


def source(value: Value | None) -> Node | None:
    """The dequantize node that a value comes out of, if it does."""
    node = None if value is None else value.producer
    return node if node is not None and node.op == "dequantize" else None


def _kernel(node: Node) -> Kernel | None:
    sides = tuple(range(len(node.inputs))) if node.op == "concat" else SIDES.get(node.op)
    if sides is None or len(node.outputs) != 1 or not sides:
        return None
    for i in sides:
        dq = source(node.input(i))
        if dq is None or not _per_tensor(dq) or not _byte(dq.input(0)):
            return None
    if not _fits(node):
        return None
    absorbed: list[Node] = []
    value = node.output
    gemm = False
    if node.op == "linear":
        added = _bias_addition(node)
        gemm = _is_gemm(node, added)
        if gemm and added is not None:
            absorbed, value = [added], added.output
        elif not gemm and node.input(2) is not None:
            return Kernel("MatMulIntegerToFloat", node)  # exported as a product and a float addition
    merged = list(absorbed)
    quantize = _result(node, value, absorbed)
    if node.op == "hardsigmoid" and quantize is not None and not ends_at_0_and_1(grid_of(quantize)):
        return None
    if quantize is not None:
        return Kernel(NAMES.get(node.op) or ("QGemm" if gemm else "QLinearMatMul"), node, absorbed, quantize)
    if node.op not in FLOAT_RESULT:
        return None
    return Kernel("QGemm" if gemm else "MatMulIntegerToFloat", node, merged)


def _is_gemm(node: Node, added: Node | None) -> bool:
    """Whether the runtime sees a Gemm.

    One in the file; a torch linear layer on a matrix, which exports to one; or a product and the addition of its bias,
    which the runtime merges where it knows the shapes.
    """
    x = node.input(0)
    if node.origin == "Gemm" or x is None or x.shape is None:
        return node.origin == "Gemm"
    if node.origin != "MatMul" and x.rank == 2:
        return True
    biased = added is not None or node.input(2) is not None
    return biased and (x.rank == 2 or all(isinstance(d, int) for d in x.shape))


def _per_tensor(dq: Node) -> bool:
    scale = dq.input(1)
    return scale is not None and scale.is_const and scale.hint is not None and int(np.prod(scale.hint)) == 1


def _byte(value: Value | None) -> bool:
    return value is not None and value.dtype in ("uint8", "int8")


def _fits(node: Node) -> bool:
    """Conditions on the operation itself: stored weights, biases, attributes that the kernels know."""
    if node.op in ("conv", "linear"):
        dq = source(node.input(1))
        if dq is None or dq.input(0) is None or not dq.inputs[0].is_const or not _byte(dq.input(0)):  # type: ignore[union-attr]
            return False
        bias = node.input(2)
        if bias is not None:
            stored = source(bias)
            if stored is None or stored.input(0) is None or stored.inputs[0].dtype != "int32":  # type: ignore[union-attr]
                return False
        if node.op == "conv":
            return not node.attrs.get("transposed")
        return node.attrs.get("alpha", 1.0) == 1.0 and node.attrs.get("beta", 1.0) == 1.0
    if node.op == "avg_pool":
        return not node.attrs.get("ceil") and all(d == 1 for d in node.attrs.get("dilation") or ())
    if node.op == "adaptive_avg_pool":
        return all(size == 1 for size in node.attrs.get("output_size") or (0,))
    if node.op == "mean":
        x = node.inputs[0]
        spatial = x is not None and x.rank is not None and sorted(node.attrs["axes"]) == [*range(2, x.rank)]
        return spatial and bool(node.attrs.get("keepdims"))
    return node.op != "add" or node.attrs.get("alpha", 1) in (1, None)


def _bias_addition(node: Node) -> Node | None:
    """The addition of a stored int32 bias behind a product, if that is all that reads it."""
    value = node.output
    if node.input(2) is not None or value.is_output or len(value.uses) != 1:
        return None
    user, position = value.uses[0]
    if user.op != "add" or len(user.inputs) != 2:
        return None
    dq = source(user.input(1 - position))
    stored = None if dq is None else dq.input(0)
    return user if stored is not None and stored.is_const and stored.dtype == "int32" else None


def _result(node: Node, value: Value, absorbed: list[Node]) -> Node | None:
    """The quantize node behind a result, past activations that it makes superfluous; they join ``absorbed``."""
    passed: list[Node] = []
    while not value.is_output and len(value.uses) == 1:
        user, position = value.uses[0]
        if user.op == "quantize" and position == 0:
            if not _per_tensor(user) or not _byte(user.output):
                return None
            if all(_superfluous(n, user) for n in passed):
                absorbed += passed
                return user
            return None
        if user.op not in ("relu", "clip") or node.op not in WITH_ACTIVATION:
            return None
        passed.append(user)
        value = user.output
    return None


def _superfluous(activation: Node, quantize: Node) -> bool:
    """Whether clipping to the integers' range already does what the activation does."""
    y = grid_of(quantize)
    info = np.iinfo(y.zero.dtype)
    low, high = ((end - int(y.zero)) * float(y.scale) for end in (info.min, info.max))
    if activation.op == "relu":
        return low >= 0
    least, most = activation.attrs.get("min"), activation.attrs.get("max")
    return (least is None or least <= low) and (most is None or most >= high)


def grid_of(node: Node) -> Grid:
    """Scale (float32) and zero point of a quantize or dequantize node, 0-d where there is one.

    Raises:
        ConstraintError: they are computed at run time.
    """
    scale = _constant(node, 1).astype(np.float32)
    stored = node.output.dtype if node.op == "quantize" else node.inputs[0].dtype  # type: ignore[union-attr]
    zero = np.zeros(scale.shape, stored) if node.input(2) is None else _constant(node, 2).astype(stored)
    return Grid(scale.reshape(()), zero.reshape(())) if scale.size == 1 else Grid(scale, zero)


def _constant(node: Node, position: int) -> np.ndarray:
    value = node.input(position)
    data = None if value is None else value.const()
    if data is None:
        raise ConstraintError("a scale or zero point is computed at run time", node=node.name, expected="a constant")
    return np.asarray(data)
