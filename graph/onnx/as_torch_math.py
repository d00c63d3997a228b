"""Elementwise ONNX operators, reductions and searches in torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .as_torch_run import Call, torch_op

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Relu": F.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Softplus": F.softplus, "Softsign": F.softsign,
    "HardSwish": F.hardswish, "Mish": F.mish, "Erf": torch.erf, "Exp": torch.exp, "Log": torch.log, "Sqrt": torch.sqrt,
    "Reciprocal": torch.reciprocal, "Abs": torch.abs, "Neg": torch.neg, "Sign": torch.sign, "Floor": torch.floor,
    "Ceil": torch.ceil, "Round": torch.round, "Sin": torch.sin, "Cos": torch.cos, "Tan": torch.tan, "Asin": torch.asin,
    "Acos": torch.acos, "Atan": torch.atan, "Sinh": torch.sinh, "Cosh": torch.cosh, "Asinh": torch.asinh,
    "Acosh": torch.acosh, "Atanh": torch.atanh, "Not": torch.logical_not, "BitwiseNot": torch.bitwise_not,
    "IsNaN": torch.isnan, "Identity": lambda x: x,
}  # fmt: skip
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Equal": torch.eq, "Less": torch.lt, "LessOrEqual": torch.le,
    "Greater": torch.gt, "GreaterOrEqual": torch.ge, "And": torch.logical_and, "Or": torch.logical_or,
    "Xor": torch.logical_xor, "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor, "MatMul": torch.matmul,
}  # fmt: skip


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Call], Tensor]:
    return lambda c: function(c.x())


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Call], Tensor]:
    return lambda c: function(*c.all())


for _name, _unary_function in UNARY.items():
    torch_op(_name)(_unary(_unary_function))
for _name, _binary_function in BINARY.items():
    torch_op(_name)(_binary(_binary_function))


@torch_op("Div")
def div(c: Call) -> Tensor:
    """Integers divide towards zero."""
    a, b = c.all()
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@torch_op("Mod")
def mod(c: Call) -> Tensor:
    a, b = c.all()
    return torch.fmod(a, b) if c.attr("fmod", 0) else torch.remainder(a, b)


@torch_op("Pow")
def power(c: Call) -> Tensor:
    a, b = c.all()
    if b.is_floating_point() and not a.is_floating_point():
        return torch.pow(a.to(torch.float64), b).to(a.dtype)
    return torch.pow(a, b.to(a.dtype) if a.is_floating_point() else b).to(a.dtype)


@torch_op("BitShift")
def bit_shift(c: Call) -> Tensor:
    a, b = c.all()
    return torch.bitwise_left_shift(a, b) if c.attr("direction") == "LEFT" else torch.bitwise_right_shift(a, b)


@torch_op("Sum", "Mean", "Max", "Min")
def variadic(c: Call) -> Tensor:
    xs = c.all()
    binary: Any = {
        "Sum": torch.add,
        "Mean": torch.add,
        "Max": torch.maximum,
        "Min": torch.minimum,
    }[c.step.op]
    total = functools.reduce(binary, xs)
    return total / len(xs) if c.step.op == "Mean" else total


@torch_op("Where")
def where(c: Call) -> Tensor:
    cond, x, y = c.all()
    return torch.where(cond, x, y)


@torch_op("Clip")
def clip(c: Call) -> Tensor:
    low, high = c.scalar(1, "min"), c.scalar(2, "max")
    x = c.x()
    if low is not None and high is not None and low > high:
        return torch.full_like(x, high)
    return x if low is None and high is None else torch.clamp(x, low, high)


@torch_op("LeakyRelu")
def leaky_relu(c: Call) -> Tensor:
    return F.leaky_relu(c.x(), c.attr("alpha", 0.01))


@torch_op("PRelu")
def prelu(c: Call) -> Tensor:
    x, slope = c.all()
    return torch.where(x >= 0, x, x * slope)


@torch_op("Elu")
def elu(c: Call) -> Tensor:
    x, alpha = c.x(), c.attr("alpha", 1.0)
    return torch.where(x > 0, x, alpha * torch.expm1(torch.clamp(x, max=0)))


@torch_op("Celu")
def celu(c: Call) -> Tensor:
    return F.celu(c.x(), c.attr("alpha", 1.0))


@torch_op("Selu")
def selu(c: Call) -> Tensor:
    x = c.x()
    alpha, gamma = c.attr("alpha", 1.67326319217681884765625), c.attr("gamma", 1.05070102214813232421875)
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(torch.clamp(x, max=0)))


@torch_op("HardSigmoid")
def hard_sigmoid(c: Call) -> Tensor:
    return torch.clamp(c.x() * c.attr("alpha", 0.2) + c.attr("beta", 0.5), 0, 1)


@torch_op("ThresholdedRelu")
def thresholded_relu(c: Call) -> Tensor:
    return F.threshold(c.x(), c.attr("alpha", 1.0), 0.0)


@torch_op("Shrink")
def shrink(c: Call) -> Tensor:
    x, bias, lambd = c.x(), c.attr("bias", 0.0), c.attr("lambd", 0.5)
    zero = torch.zeros_like(x)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, zero)).to(x.dtype)


@torch_op("Gelu")
def gelu(c: Call) -> Tensor:
    return F.gelu(c.x(), approximate=c.attr("approximate", "none"))


@torch_op("Swish")
def swish(c: Call) -> Tensor:
    x = c.x()
    return x * torch.sigmoid(c.attr("alpha", 1.0) * x)


@torch_op("IsInf")
def is_inf(c: Call) -> Tensor:
    x = c.x()
    found = torch.zeros_like(x, dtype=torch.bool)
    if c.attr("detect_positive", 1):
        found = found | torch.isposinf(x)
    if c.attr("detect_negative", 1):
        found = found | torch.isneginf(x)
    return found


@torch_op("Softmax", "LogSoftmax", "Hardmax")
def softmax(c: Call) -> Tensor:
    x = c.x()
    axis = c.axis(-1 if c.opset >= 13 else 1, x.dim())
    shape = x.shape
    if c.opset < 13:  # normalises over all trailing axes at once
        x, axis = x.reshape(int(torch.tensor(shape[:axis]).prod()), -1), 1
    if c.step.op == "Softmax":
        y = torch.softmax(x, axis)
    elif c.step.op == "LogSoftmax":
        y = torch.log_softmax(x, axis)
    else:
        y = torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1)
    return y.reshape(shape)


REDUCE: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceMean": lambda x, a, k: x.mean(a, keepdim=k),
    "ReduceSum": lambda x, a, k: x.sum(a, keepdim=k, dtype=x.dtype),
    "ReduceMax": lambda x, a, k: _extreme(x, a, k, largest=True),
    "ReduceMin": lambda x, a, k: _extreme(x, a, k, largest=False),
    "ReduceProd": lambda x, a, k: _prod(x, a, k),
    "ReduceL1": lambda x, a, k: x.abs().sum(a, keepdim=k, dtype=x.dtype),
    "ReduceL2": lambda x, a, k: (x * x).sum(a, keepdim=k, dtype=x.dtype).double().sqrt().to(x.dtype)
    if not x.is_floating_point() else torch.linalg.vector_norm(x, 2, a, k),
    "ReduceSumSquare": lambda x, a, k: (x * x).sum(a, keepdim=k, dtype=x.dtype),
    "ReduceLogSum": lambda x, a, k: x.sum(a, keepdim=k).log(),
    "ReduceLogSumExp": lambda x, a, k: torch.logsumexp(x, a, k),
}  # fmt: skip


def _extreme(x: Tensor, axes: list[int], keep: bool, *, largest: bool) -> Tensor:
    if x.dtype == torch.bool:
        return _extreme(x.to(torch.uint8), axes, keep, largest=largest).bool()
    if any(x.shape[a] == 0 for a in axes):  # of nothing: the neutral element
        shape = [1 if i in axes else n for i, n in enumerate(x.shape)]
        info: Any = torch.finfo(x.dtype) if x.is_floating_point() else torch.iinfo(x.dtype)
        empty = (
            (float("-inf") if largest else float("inf"))
            if x.is_floating_point()
            else (info.min if largest else info.max)
        )
        full = torch.full(shape, empty, dtype=x.dtype, device=x.device)
        return full if keep else full.squeeze(axes)
    return x.amax(axes, keep) if largest else x.amin(axes, keep)


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep, dtype=x.dtype)
    return x


@torch_op(*REDUCE)
def reduce(c: Call) -> Tensor:
    x = c.x()
    axes = c.ints(1, "axes", [])
    if not axes:
        if c.attr("noop_with_empty_axes", 0):
            # no axis: the elementwise part alone
            return REDUCE[c.step.op](x.unsqueeze(0), [0], False)
        axes = list(range(x.dim()))
    axes = [a + x.dim() if a < 0 else a for a in axes]
    if not axes:  # a scalar
        return REDUCE[c.step.op](x.unsqueeze(0), [0], False)
    return REDUCE[c.step.op](x, axes, bool(c.attr("keepdims", 1)))


@torch_op("ArgMax", "ArgMin")
def argmax(c: Call) -> Tensor:
    x = c.x()
    axis, keep = c.axis(0, x.dim()), bool(c.attr("keepdims", 1))
    find = torch.argmax if c.step.op == "ArgMax" else torch.argmin
    if c.attr("select_last_index", 0):
        return x.shape[axis] - 1 - find(x.flip(axis), dim=axis, keepdim=keep)
    return find(x, dim=axis, keepdim=keep)


@torch_op("CumSum", "CumProd")
def cumulate(c: Call) -> Tensor:
    x, axis = c.x(), c.ints(1)[0]
    x = x.flip(axis) if c.attr("reverse", 0) else x
    sums = c.step.op == "CumSum"
    y = x.cumsum(axis, dtype=x.dtype) if sums else x.cumprod(axis, dtype=x.dtype)
    if c.attr("exclusive", 0):
        first = torch.full_like(y.narrow(axis, 0, 1), 0 if sums else 1)
        y = torch.cat([first, y.narrow(axis, 0, y.shape[axis] - 1)], axis)
    return y.flip(axis) if c.attr("reverse", 0) else y


@torch_op("TopK")
def topk(c: Call) -> tuple[Tensor, Tensor]:
    """Among equal elements the one with the lower index comes first, as in ONNX."""
    x = c.x()
    k = c.attr("k") if c.opset < 10 else c.ints(1)[0]
    axis = c.axis(-1, x.dim())
    values, indices = torch.sort(x, dim=axis, descending=bool(c.attr("largest", 1)), stable=True)
    return values.narrow(axis, 0, k), indices.narrow(axis, 0, k)


@torch_op("Einsum")
def einsum(c: Call) -> Tensor:
    return torch.einsum("".join(c.attr("equation").split()), *c.all())


@torch_op("Gemm")
def gemm(c: Call) -> Tensor:
    a, b, *rest = c.all()
    a = a.T if c.attr("transA", 0) else a
    b = b.T if c.attr("transB", 0) else b
    alpha, beta = c.attr("alpha", 1.0), c.attr("beta", 1.0)
    if not a.is_floating_point():
        product = a @ b
        return product + rest[0] if rest else product
    product = a @ b if alpha == 1.0 else alpha * (a @ b)
    if not rest:
        return product
    return product + (rest[0] if beta == 1.0 else beta * rest[0])


def _exported(dtype: torch.dtype) -> bool:
    """Whether Q/DQ of a type stay operators: in an exported program, where passes and backends look for them."""
    return torch.compiler.is_exporting() and dtype in (torch.int8, torch.uint8)


def _axis_and(c: Call, x: Tensor, scale: Tensor, dtype: str) -> tuple[int | None, str, int]:
    """Axis, type and block as foldline's own operators take them."""
    axis = None if scale.numel() == 1 and not c.attr("block_size", 0) else c.axis(1, x.dim())
    return axis, dtype, int(c.attr("block_size", 0))


@torch_op("QuantizeLinear")
def quantize(c: Call) -> Tensor:
    """Rounding passes gradients straight through; a result that carries one stays float, with integer values."""
    x, scale = c.x(), c.x(1)
    zero = c.maybe(2)
    target = torch.uint8 if zero is None else zero.dtype
    if zero is None and c.attr("output_dtype", 0):
        target = {3: torch.int8, 2: torch.uint8, 5: torch.int16, 4: torch.uint16}[c.attr("output_dtype")]
    if _exported(target):
        from ..fx.custom import quantize_linear

        return quantize_linear(x, scale, zero, *_axis_and(c, x, scale, str(target).removeprefix("torch.")))
    info = torch.iinfo(target)
    scale = _per_axis(c, scale, x)
    offset = 0 if zero is None else _per_axis(c, zero, x).to(scale.dtype)
    ratio = x / scale
    rounded = ratio + (torch.round(ratio) - ratio).detach() if ratio.requires_grad else torch.round(ratio)
    y = torch.clamp(rounded + offset, info.min, info.max)
    return y if y.requires_grad else y.to(torch.int32).to(target)


@torch_op("DequantizeLinear")
def dequantize(c: Call) -> Tensor:
    x, scale = c.x(), c.x(1)
    zero = c.maybe(2)
    if _exported(x.dtype) or (x.dtype == torch.int32 and torch.compiler.is_exporting()):
        from ..fx.custom import dequantize_linear

        return dequantize_linear(x, scale, zero, *_axis_and(c, x, scale, "float32"))
    scale = _per_axis(c, scale, x)
    shifted = x.to(scale.dtype) if zero is None else x.to(scale.dtype) - _per_axis(c, zero, x).to(scale.dtype)
    return shifted * scale


def _per_axis(c: Call, t: Tensor, x: Tensor) -> Tensor:
    """Scale or zero point in a shape that broadcasts to x: per tensor, per axis or per block."""
    t = t.to(x.device)
    block = c.attr("block_size", 0)
    axis = c.axis(1, x.dim()) if x.dim() else 0
    if block:
        return t.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    if t.numel() == 1:
        return t.reshape(())
    shape = [1] * x.dim()
    shape[axis] = t.numel()
    return t.reshape(shape)
