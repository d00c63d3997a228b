"""What stands around a product: the activation and the quantization behind it, a Kronecker product, a softmax."""

from __future__ import annotations

import torch

from ...graph.ir import Node, Value
from .constants import Constants
from .substitution import COMPUTE, Operand, Options, Substitution

FUSED = {"relu": "relu", "silu": "silu"}


def two_pass(node: Node) -> Substitution | str:
    x, axis = node.input(0), node.attrs.get("axis")
    if x is None or axis is None or x.dtype not in COMPUTE or x.dtype != node.output.dtype:
        return "the two-pass softmax takes a float input of the result's type"
    return Substitution(node, node.output, "two_pass_softmax", (Operand(x), int(axis)), True, "two-pass softmax")


def kronecker(constants: Constants, node: Node, options: Options) -> Substitution | str:
    """A symmetric int8 Q behind ``left^T X right`` of a token X, both sides square and at most 128."""
    join = None if node.inputs[0] is None else node.inputs[0].producer
    second = _behind(join, "reshape", 0)
    first = _behind(second, "linear", 0) or _behind(second, "matmul", 0)
    split = None if first is None or first.op != "matmul" or first.inputs[1] is None else first.inputs[1].producer
    value, scale = fixed_scale(constants, node)
    if join is None or second is None or first is None or split is None or split.op != "reshape" or scale is None:
        return ""
    left, right = constants.get(first.input(0)), constants.get(second.input(1))
    x = split.input(0)
    chain = (split, first, second, join)
    if x is None or x.hint is None or left is None or right is None or second.input(2) is not None:
        return ""
    if any(only_reader(n.output) is None for n in chain) or node.attrs.get("axis") is not None:
        return ""
    n1, n2 = left.shape[0], right.shape[0]
    if left.shape != (n1, n1) or right.shape != (n2, n2) or x.hint[-1] != n1 * n2 or split.output.hint is None:
        return ""
    if split.output.hint[-2:] != (n1, n2) or max(n1, n2) > 128 or join.output.hint != x.hint:
        return ""
    args = (Operand(x, options.compute), left.t().contiguous(), right.contiguous(), -128, 127, scale)
    about = f"{n1} x {n2} Kronecker product and quantization"
    names = tuple(n.name for n in chain)
    return Substitution(node, value, "kronecker_quantize", args, True, about, names, 0)


def _behind(node: Node | None, op: str, position: int) -> Node | None:
    """The node whose result ``node`` (of that op) reads at a position."""
    if node is None or node.op != op:
        return None
    value = node.input(position)
    return None if value is None else value.producer


def only_reader(value: Value) -> Node | None:
    """The single node that reads a value which nobody else needs."""
    if value.is_output or value.native is None or len(value.native.users) != 1:
        return None
    return next((n for n, _ in value.uses), None)


def activation_behind(value: Value) -> tuple[Value, str]:
    """(the value behind the activation fused, its name): the value itself where none follows directly."""
    reader = only_reader(value)
    if reader is None or reader.output.dtype != value.dtype:
        return value, "none"
    if reader.op in FUSED:
        return reader.output, FUSED[reader.op]
    if reader.op == "gelu":
        return reader.output, "gelu_tanh" if reader.attrs.get("approximate") == "tanh" else "gelu"
    return value, "none"


def requantized_behind(constants: Constants, value: Value) -> tuple[Value, torch.Tensor | None]:
    """(the int8 value behind a symmetric per-tensor quantize, its scale), or (value, None)."""
    reader = only_reader(value)
    if reader is None or reader.op != "quantize":
        return value, None
    made, scale = fixed_scale(constants, reader)
    return (value, None) if scale is None else (made, scale)


def fixed_scale(constants: Constants, node: Node) -> tuple[Value, torch.Tensor | None]:
    """(result, scale) of a symmetric int8 quantize with one scale; (result, None) for any other."""
    if node.output.dtype != "int8" or node.attrs.get("block") or node.attrs.get("dtype") != "int8":
        return node.output, None
    scale, zero = constants.get(node.input(1)), constants.get(node.input(2))
    if scale is None or scale.numel() != 1 or (node.input(2) is not None and (zero is None or bool(zero.any()))):
        return node.output, None
    return node.output, scale.float().reshape(())
