"""Which nodes of an FX graph become which operator of this backend, as data, with a reason where none does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...graph.ir import Node, Value
from .chains import activation_behind, kronecker, only_reader, requantized_behind, two_pass
from .constants import Constants
from .substitution import Operand, Options, Plan, Substitution
from .weights import ScaledIntegers, SignPlanes, dequantized, looked_up

if TYPE_CHECKING:
    from ...graph.fx import FXGraph


def plan(graph: FXGraph, options: Options) -> Plan:
    """Match every linear layer against the operators; the graph is only read."""
    constants = Constants(graph)
    found = Plan()
    for node in graph.nodes:
        if node.op in ("linear", "matmul"):
            made = _linear(constants, node, options)
        elif node.op == "matmul_nbits":
            made = _nbits(constants, node, options)
        elif node.op == "conv":
            made = _why_not_conv(constants, node)
        elif node.op == "quantize":
            made = kronecker(constants, node, options)
        elif node.op == "softmax" and options.two_pass_softmax:
            made = two_pass(node)
        else:
            continue
        if isinstance(made, Substitution):
            found.substitutions.append(made)
        elif made:
            found.left.append((node.name, made))
    return found


def _linear(constants: Constants, node: Node, options: Options) -> Substitution | str:
    """The substitution, or why there is none ("" where the product is not quantized at all)."""
    x, w = node.input(0), node.input(1)
    if x is None or w is None or constants.holds(x) or not constants.holds(w) or w.rank != 2:
        return _float_operand(node)
    transposed = node.op == "matmul" or bool(node.attrs.get("transposed_weight"))
    weight = dequantized(constants, w, transposed) or looked_up(constants, w, transposed)
    if any(node.attrs.get(key, 1.0) != 1.0 for key in ("alpha", "beta")):
        return "alpha or beta is not 1" if weight is not None else ""
    if weight is None:
        behind = w.producer is not None and w.producer.op == "dequantize"
        if behind:
            return "its weight's scales lie along the inputs, or its type has no kernel here"
        return _sparse(constants, node, x, w, transposed, options)
    bias = _bias(constants, node)
    if isinstance(bias, str):
        return bias
    if isinstance(weight, SignPlanes):
        return _binary(constants, node, x, weight, bias, options)
    if x.producer is not None and x.producer.op == "dequantize":
        return _both(constants, node, x.producer, weight, bias, options)
    return _weight_only(node, x, weight, bias, options)


def _float_operand(node: Node) -> str:
    if node.op == "matmul" and all(
        v is not None and v.producer is not None and v.producer.op == "dequantize" for v in node.inputs[:2]
    ):
        return "both operands are activations: products of two quantized activations have no kernel here"
    return ""


@dataclass(frozen=True)
class Bias:
    """One number per output, and the value behind which it has been added (of the addition, where that is a node)."""

    value: Value | None
    data: torch.Tensor | None
    behind: Value


def _bias(constants: Constants, node: Node) -> Bias | str:
    value, n = node.input(2), (node.output.hint or (None,))[-1]
    if value is not None:
        data = constants.get(value)
        if data is None or data.ndim != 1 or data.numel() != n:
            return "its bias is computed, or not one number per output"
        return Bias(value, data.float(), node.output)
    reader = only_reader(node.output)
    if reader is not None and reader.op == "add" and reader.attrs.get("alpha", 1) == 1:
        others = [v for v in reader.inputs if v is not None and v is not node.output]
        data = constants.get(others[0]) if len(others) == 1 else None
        if data is not None and data.shape == (n,) and reader.output.dtype == node.output.dtype:
            return Bias(others[0], data.float(), reader.output)
    return Bias(None, None, node.output)


def _both(
    constants: Constants,
    node: Node,
    dequantize: Node,
    weight: ScaledIntegers,
    bias: Bias,
    options: Options,
) -> Substitution | str:
    """Activations and weight are quantized: int8 or float8."""
    q = dequantize.input(0)
    scale, zero = constants.get(dequantize.input(1)), constants.get(dequantize.input(2))
    if q is None or scale is None or (dequantize.input(2) is not None and zero is None):
        return "the scale of its input is computed at run time"
    if scale.numel() != 1:
        return "its input is quantized per channel, along which the product sums"
    if weight.scales.shape[1] != 1:
        return "its input is quantized while its weight has scales per block: no kernel sums over both"
    floating = weight.codes.dtype.is_floating_point
    if bool(weight.zeros.any()):
        return "its weight has zero points; with a quantized input kernels take symmetric weights"
    if floating != (q.dtype == "float8_e4m3fn"):
        return f"its input is {q.dtype} and its weight {weight.codes.dtype}"
    last, activation = activation_behind(bias.behind)
    ws = weight.scales.squeeze(1).contiguous()
    xs = scale.float().reshape(())
    if floating:
        operands = (Operand(q), weight.codes, xs, ws, bias.data, activation, options.compute)
        return Substitution(node, last, "fp8_linear", operands, options.dtype == last.dtype, "float8 product")
    if q.dtype not in ("int8", "uint8") or weight.codes.dtype != torch.int8:
        return f"its input is {q.dtype} and its weight {weight.codes.dtype}; the kernel takes int8 weights"
    unsigned = q.dtype == "uint8"
    shift = (0 if zero is None else int(zero.reshape(()))) - (128 if unsigned else 0)
    offset = -shift * weight.codes.sum(1, dtype=torch.int64) if shift else None
    exact = _integer_bias(constants, bias.value, xs * ws)
    if exact is not None:
        offset = exact if offset is None else offset + exact
    if offset is not None and int(offset.abs().max()) >= 2**31:
        return "its zero point times the sum of its weights does not fit into int32"
    offset = None if offset is None else offset.to(torch.int32)
    result, out_scale = requantized_behind(constants, last)
    args = (
        Operand(q, shift=unsigned),
        weight.codes,
        xs,
        ws,
        offset,
        None if exact is not None else bias.data,
        out_scale,
        activation,
        options.compute,
    )
    about = "int8 product" + (", requantized in the kernel" if out_scale is not None else "")
    native = out_scale is not None or options.dtype == last.dtype
    return Substitution(node, result, "int8_linear", args, native, about)


def _integer_bias(constants: Constants, value: Value | None, scale: torch.Tensor) -> torch.Tensor | None:
    """The stored int32 bias, where its scale is that of the accumulator."""
    node = None if value is None else value.producer
    if node is None or node.op != "dequantize":
        return None
    stored, own, zero = (constants.get(node.input(i)) for i in range(3))
    if stored is None or own is None or stored.dtype != torch.int32 or (zero is not None and bool(zero.any())):
        return None
    return stored.long() if torch.allclose(own.float().expand(scale.shape), scale, rtol=1e-6, atol=0) else None


def _weight_only(node: Node, x: Value, weight: ScaledIntegers, bias: Bias, options: Options) -> Substitution | str:
    made = weight.as_uint4()
    if made is None:
        return "only its weight is quantized, to more than 16 levels: it is dequantized before a float product"
    from .ops.int4 import pack_int4

    last, activation = activation_behind(bias.behind)
    codes, zeros = made
    scales = weight.scales.t().contiguous()
    args = (
        Operand(x, options.compute),
        pack_int4(codes),
        scales,
        zeros.t().contiguous(),
        bias.data,
        weight.group,
        activation,
    )
    about = f"4-bit weight in groups of {weight.group}"
    return Substitution(node, last, "int4_linear", args, options.dtype == last.dtype, about)


def _binary(
    constants: Constants,
    node: Node,
    x: Value,
    weight: SignPlanes,
    bias: Bias,
    options: Options,
) -> Substitution | str:
    from .ops.binary import pack_signs

    k = weight.signs.shape[2]
    group = weight.group if weight.group < k else -(-k // 8) * 8
    if group % 8:
        return f"binary codes in blocks of {group}: tables take 8 inputs each"
    args = (Operand(x, options.compute), pack_signs(weight.signs), weight.alphas, bias.data, group)
    about = f"{weight.signs.shape[0]} planes of signs in groups of {group}"
    return Substitution(node, bias.behind, "binary_linear", args, options.dtype == node.output.dtype, about)


def _sparse(
    constants: Constants, node: Node, x: Value, w: Value, transposed: bool, options: Options
) -> Substitution | str:
    if not options.sparse24:
        return ""
    dense = constants.get(w)
    from .ops.sparse24 import compress24, violations

    if dense is None or not dense.is_floating_point():
        return ""
    dense = dense.t() if transposed else dense
    if wrong := violations(dense):
        half = (dense == 0).float().mean().item() >= 0.4
        return f"{wrong} runs of four inputs hold more than 2 nonzeros: the weight is not 2:4" if half else ""
    if options.dtype == "float32":
        return "its weight is 2:4, but sparse tensor cores take 16-bit types: lower with dtype='bfloat16'"
    bias = _bias(constants, node)
    if isinstance(bias, str):
        return bias
    last, activation = activation_behind(bias.behind)
    values, indices = compress24(dense.to(options.compute))
    args = (Operand(x, options.compute), values, indices, bias.data, dense.shape[0], activation)
    return Substitution(node, last, "sparse24_linear", args, False, "2:4 weight on sparse tensor cores")


def _nbits(constants: Constants, node: Node, options: Options) -> Substitution | str:
    from ...graph.fx.custom_nbits import unpack

    x, bits, k = node.input(0), int(node.attrs["bits"]), int(node.attrs["k"])
    packed, scales, zeros, bias = (constants.get(node.input(i)) for i in range(1, 5))
    if x is None or packed is None or scales is None or (node.input(3) is not None and zeros is None):
        return "an operand that describes the weight is computed at run time"
    n, groups = scales.shape
    codes = unpack(packed, bits).reshape(n, -1)[:, :k].contiguous()
    if zeros is None:
        points = torch.full((n, groups), 2 ** (bits - 1), dtype=torch.int32)
    else:
        points = unpack(zeros, bits)[:, :groups].int()
    weight = ScaledIntegers(codes, scales.float(), points, int(node.attrs["block"]))
    found = Bias(node.input(4), None if bias is None else bias.float(), node.output)
    return _weight_only(node, x, weight, found, options)


def _why_not_conv(constants: Constants, node: Node) -> str:
    operands = [v for v in node.inputs[:2] if v is not None and v.producer is not None]
    if operands and operands[-1].producer is not None and operands[-1].producer.op == "dequantize":
        return "there is no integer convolution here: it is dequantized before a float convolution (TensorRT has one)"
    return ""


def described(found: Plan) -> Iterator[str]:
    """One line per substitution and per product left alone."""
    for s in found.substitutions:
        yield f"{s.node.name}: {s.op} ({s.about})"
    for name, reason in found.left:
        yield f"{name}: not substituted, {reason}"
