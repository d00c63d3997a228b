"""What a weight operand is stored as: integers with scales, packed codes, sums of signs, float8, or 2:4 floats."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...graph.ir import Node, Value
from .constants import Constants

MOVES = ("reshape", "slice", "transpose", "identity", "unsqueeze", "squeeze")


@dataclass(frozen=True)
class ScaledIntegers:
    """W[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g], g = k // group. Integers of at most 8 bits, or float8.

    Attributes:
        codes: [N, K] int8, uint8 or float8_e4m3fn.
        scales: float32 [N, G].
        zeros: int32 [N, G].
        group: inputs per scale; K where a row has one.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    group: int

    def dense(self) -> torch.Tensor:
        """float32 [N, K]."""
        k = self.codes.shape[1]
        zeros = self.zeros.repeat_interleave(self.group, 1)[:, :k]
        return (self.codes.float() - zeros.float()) * self.scales.repeat_interleave(self.group, 1)[:, :k]

    def as_uint4(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(codes uint8 [N, K], zeros uint8 [N, G]) in 0..15 with the same numbers, if every group spans 16 levels."""
        n, k = self.codes.shape
        if self.codes.dtype.is_floating_point:
            return None
        wide = self.codes.int()
        missing = -k % self.group
        padded = torch.cat([wide, wide[:, -1:].expand(n, missing)], 1).reshape(n, -1, self.group)
        low, high = padded.amin(-1), padded.amax(-1)
        # Both the codes and the zero point must fit: the shift is the same for both.
        floor = torch.minimum(low, self.zeros)
        if bool((torch.maximum(high, self.zeros) - floor > 15).any()):
            return None
        floor = torch.where((floor >= -8) & (high <= 7) & (self.zeros <= 7), torch.full_like(floor, -8), floor)
        floor = torch.where((low >= 0) & (high <= 15) & (self.zeros >= 0), torch.zeros_like(floor), floor)
        codes = wide - floor.repeat_interleave(self.group, 1)[:, :k]
        return codes.to(torch.uint8), (self.zeros - floor).to(torch.uint8)


@dataclass(frozen=True)
class SignPlanes:
    """W = sum_i alphas[i, n, k // group] * signs[i, n, k].

    Attributes:
        signs: int8 [q, N, K] of -1 and 1.
        alphas: float32 [q, N, G].
    """

    signs: torch.Tensor
    alphas: torch.Tensor
    group: int


def dequantized(constants: Constants, value: Value | None, transposed: bool) -> ScaledIntegers | None:
    """A weight [N, K] (or stored transposed) behind a dequantize node; None where it is no such thing."""
    node = None if value is None else value.producer
    while node is not None and node.op in ("transpose", "identity") and node.inputs and node.inputs[0] is not None:
        transposed ^= node.op == "transpose" and list(node.attrs.get("perm") or ()) == [1, 0]
        node = node.inputs[0].producer
    if node is None or node.op != "dequantize":
        return None
    codes, scale, zero = (constants.get(node.input(i)) for i in range(3))
    if codes is None or scale is None or codes.ndim != 2 or (node.input(2) is not None and zero is None):
        return None
    if codes.dtype not in (torch.int8, torch.uint8, torch.float8_e4m3fn):
        return None
    axis, block = node.attrs.get("axis"), int(node.attrs.get("block") or 0)
    axis = None if axis is None else axis % 2
    scale = scale.float()
    zero = torch.zeros_like(scale, dtype=torch.int32) if zero is None else zero.int().expand(scale.shape)
    if transposed:
        codes, axis = codes.t(), None if axis is None else 1 - axis
        scale, zero = (scale.t(), zero.t()) if scale.ndim == 2 else (scale, zero)
    n, k = codes.shape
    if scale.numel() == 1 and not block:
        scale, zero = scale.reshape(1, 1).expand(n, 1), zero.reshape(1, 1).expand(n, 1)
    elif block and axis == 1:
        scale, zero = scale.reshape(n, -1), zero.reshape(n, -1)
    elif not block and axis == 0:
        scale, zero = scale.reshape(n, 1), zero.reshape(n, 1)
    else:
        return None  # along the inputs, or blocks of outputs: no kernel sums over different scales
    return ScaledIntegers(codes.contiguous(), scale.contiguous(), zero.contiguous(), block or k)


def looked_up(constants: Constants, value: Value | None, transposed: bool) -> ScaledIntegers | SignPlanes | None:
    """A weight computed from packed codes by tables (as the passes write formats without an ONNX type).

    Its last step is a product of numbers and scales per block: where the numbers are small whole numbers, or sums of
    planes of signs, that is what the weight is. The result is checked against the weight as computed.
    """
    if value is None or value.is_const or not constants.holds(value):
        return None
    found = _planes(constants, value) or _blocks(constants, value)
    dense = constants.get(value)
    if found is None or dense is None or dense.ndim != 2:
        return None
    dense = dense.t() if transposed else dense
    n, k = dense.shape
    if isinstance(found, SignPlanes):
        if found.signs.shape[1] != n or found.signs.shape[2] < k:
            return None
        found = SignPlanes(found.signs[:, :, :k].contiguous(), found.alphas, found.group)
        spread = found.alphas.repeat_interleave(found.group, 2)[:, :, :k]
        same = torch.allclose((found.signs.float() * spread).sum(0), dense.float(), rtol=1e-5, atol=1e-6)
        return found if same else None
    if found.codes.shape[0] != n or found.codes.shape[1] < k:
        return None
    found = ScaledIntegers(found.codes[:, :k].contiguous(), found.scales, found.zeros, min(found.group, k))
    return found if torch.equal(found.dense(), dense.float()) else None


def _up(value: Value) -> Node | None:
    """The node behind ops that only move elements."""
    node = value.producer
    while node is not None and node.op in MOVES and node.inputs and node.inputs[0] is not None:
        node = node.inputs[0].producer
    return node


def _product(constants: Constants, node: Node | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(numbers [..., blocks, width], scales [..., blocks, 1]) of the product that a node is."""
    if node is None or node.op != "mul":
        return None
    a, b = (constants.get(v) for v in node.inputs[:2])
    if a is None or b is None or a.ndim < 3 or a.ndim != b.ndim:
        return None
    a, b = (b, a) if a.shape[-1] == 1 else (a, b)
    return (a, b) if b.shape == (*a.shape[:-1], 1) else None


def _blocks(constants: Constants, value: Value) -> ScaledIntegers | None:
    pair = _product(constants, _up(value))
    if pair is None or pair[0].ndim != 3:
        return None
    numbers, scales = pair
    if bool((numbers != numbers.round()).any()) or float(numbers.abs().max()) > 127:
        return None
    zeros = torch.zeros(scales.shape[:2], dtype=torch.int32)
    return ScaledIntegers(numbers.to(torch.int8).flatten(1), scales.float().squeeze(-1), zeros, numbers.shape[-1])


def _planes(constants: Constants, value: Value) -> SignPlanes | None:
    node = _up(value)
    selected: list[Node] = []
    while node is not None and node.op == "add":
        left, right = (None if v is None else v.producer for v in node.inputs[:2])
        if right is None or right.op != "select":
            return None
        selected.append(right)
        node = left
    if node is None or node.op != "select":
        return None
    selected.append(node)
    sources = {n.inputs[0].producer for n in selected if n.inputs[0] is not None}
    indices = sorted(n.attrs.get("index", -1) for n in selected)
    if len(sources) != 1 or any(n.attrs.get("axis") != 0 for n in selected) or indices != list(range(len(indices))):
        return None
    pair = _product(constants, sources.pop())
    if pair is None or pair[0].ndim != 4 or pair[0].shape[0] != len(indices) or bool((pair[0].abs() != 1).any()):
        return None
    signs, alphas = pair
    return SignPlanes(signs.to(torch.int8).flatten(2), alphas.float().squeeze(-1), signs.shape[-1])
