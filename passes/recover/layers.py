"""A linear operator as rows and columns: its patches, its weight as a matrix, where a shift of its output can go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...graph.ir import Node, Value

NORM_GAINS = ("layer_norm", "rms_norm", "group_norm", "instance_norm")
LINEAR = ("conv", "linear")
UNSUPPORTED = ("matmul", "einsum", "lstm", "gru", "rnn")
"""Ops with weights that no rule here treats as rows times columns."""


@dataclass
class LinearOp:
    """A convolution (1-3d, grouped, depthwise, strided, dilated, padded, transposed) or a linear map.

    As a matrix it is, per channel group, Y [rows, O] = X [rows, D] W^T [D, O] + shift, where a row is one output
    position (convolution) or one vector (linear) and X holds the input patch under it.

    Attributes:
        groups: G; the matrix form of the weight is [G, O, D].
    """

    node: Node
    groups: int

    @property
    def data(self) -> Value:
        found = self.node.inputs[0]
        assert found is not None
        return found

    @property
    def weight(self) -> Value:
        found = self.node.inputs[1]
        assert found is not None
        return found

    @property
    def channel_axis(self) -> int:
        """The axis of the output that the weight's rows make."""
        return 1 if self.node.op == "conv" else (self.node.output.rank or 1) - 1

    def matrix(self, w: np.ndarray) -> Tensor:
        """The weight as [G, O, D] in float64, so that Y = X W^T whatever alpha and layout the node has."""
        t = torch.from_numpy(np.array(w, dtype=np.float64))
        if self.node.op == "linear":
            t = t.t() if self.node.attrs["transposed_weight"] else t
            return (t * self.node.attrs["alpha"])[None].contiguous()
        if self.node.attrs["transposed"]:
            t = t.unflatten(0, (self.groups, -1)).transpose(1, 2)  # [G, O, I, k...]
            return t.flip(list(range(3, t.dim()))).flatten(2).contiguous()
        return t.unflatten(0, (self.groups, -1)).flatten(2).contiguous()

    def tensor(self, matrix: Tensor, like: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`matrix`: an array of the shape and dtype of ``like``."""
        if self.node.op == "linear":
            t = matrix[0] / self.node.attrs["alpha"]
            t = t.t() if self.node.attrs["transposed_weight"] else t
        elif self.node.attrs["transposed"]:
            t = matrix.unflatten(2, (-1, *like.shape[2:]))
            t = t.flip(list(range(3, t.dim()))).transpose(1, 2).flatten(0, 1)
        else:
            t = matrix.flatten(0, 1).reshape(like.shape)
        return np.ascontiguousarray(t.contiguous().numpy().reshape(like.shape).astype(like.dtype))

    def rows_in(self, y: Tensor) -> int:
        """How many rows an output tensor has."""
        return y.numel() // max(y.shape[self.channel_axis], 1)

    def outputs(self, y: Tensor, picks: Tensor | None) -> Tensor:
        """The picked rows of an output tensor as [G, R, O], float64."""
        rows = y.movedim(1, -1) if self.node.op == "conv" else y
        rows = rows.reshape(-1, rows.shape[-1])
        rows = rows if picks is None else rows[picks]
        return rows.double().unflatten(1, (self.groups, -1)).transpose(0, 1)

    def patches(self, x: Tensor, out: Tensor, picks: Tensor | None) -> Tensor:
        """The picked rows of the input as [G, R, D], float64; ``out`` is the output they belong to."""
        if self.node.op == "linear":
            rows = x.reshape(-1, x.shape[-1])
            return (rows if picks is None else rows[picks]).double()[None]
        windows = self.windows(x, out)
        n = windows.dim() // 2 - 1  # [B, C, o..., k...]
        spatial = windows.shape[2 : 2 + n]
        count = windows.shape[0] * math.prod(spatial)
        flat = torch.arange(count) if picks is None else picks
        index = torch.unravel_index(flat, (windows.shape[0], *spatial))
        rows = windows.movedim(1, 1 + n)[index]  # [R, C, k...]
        return rows.double().flatten(1).unflatten(1, (self.groups, -1)).transpose(0, 1)

    def windows(self, x: Tensor, out: Tensor) -> Tensor:
        """Every window of the padded input, as a view [B, C, o..., k...]."""
        attrs, w = self.node.attrs, self.weight.weight
        assert w is not None
        kernel, dilation = w.shape[2:], attrs["dilation"]
        stride, padding = list(attrs["stride"]), list(attrs["padding"])
        if attrs["transposed"]:
            # A transposed convolution is a plain one, with flipped taps, over the input spread out by its stride.
            spread = [(s - 1) * step + 1 for s, step in zip(x.shape[2:], stride, strict=True)]
            wide = x.new_zeros(*x.shape[:2], *spread)
            at: tuple[Any, ...] = (..., *(slice(None, None, step) for step in stride))
            wide[at] = x
            reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            padding = [
                (r - lo, out.shape[2 + i] - spread[i] + lo)
                for i, (r, (lo, _)) in enumerate(zip(reach, padding, strict=True))
            ]
            x, stride = wide, [1] * len(stride)
        if any(lo or hi for lo, hi in padding):
            x = F.pad(x, [int(p) for lo, hi in reversed(padding) for p in (lo, hi)])
        for i, (k, d, step) in enumerate(zip(kernel, dilation, stride, strict=True)):
            x = x.unfold(2 + i, (k - 1) * d + 1, step)[..., ::d]
        return x


def linear_op(node: Node, shared: bool = False) -> LinearOp | str:
    """The node as rows and columns, or the reason why it is not treated so; ``shared`` weights only to be read."""
    if node.op not in LINEAR:
        return f"{node.op} is not treated as rows times columns"
    weight = node.inputs[1]
    if weight is None or weight.weight is None:
        return "its weight is computed at run time"
    if not weight.weight.dtype.startswith(("float", "bfloat")):
        return f"its weight is {weight.dtype}"
    if not shared and (len({n.name for n, _ in weight.uses}) > 1 or weight.is_output):
        return "its weight is shared with another operator"
    if len(weight.weight.shape) != (2 if node.op == "linear" else node.inputs[0].rank):  # type: ignore[union-attr]
        return "its weight has an unusual rank"
    return LinearOp(node, int(node.attrs["groups"]) if node.op == "conv" else 1)


@dataclass
class Sink:
    """A stored vector to which a shift of an operator's output can be added: its own bias, a bias added right after
    it, or the running mean of the batch norm that follows.

    Attributes:
        sign: +1 where the vector is added, -1 where it is subtracted (a running mean).
    """

    value: Value
    sign: float

    def shifted(self, shift: np.ndarray) -> np.ndarray:
        """The vector after the operator's output must grow by ``shift``, one number per channel."""
        old = self.value.const()
        assert old is not None
        new = old.astype(np.float64) + self.sign * shift.reshape(old.shape)
        return new.astype(old.dtype)


def own_vector(value: Value | None, size: int) -> bool:
    """Whether a stored float vector of this length belongs to one operator alone."""
    return (
        value is not None
        and value.weight is not None
        and value.weight.size == size
        and value.weight.dtype.startswith(("float", "bfloat"))
        and len(value.uses) == 1
    )


def followers(node: Node) -> list[Node]:
    """The operators that the output goes through one after the other, as long as it has one reader."""
    found: list[Node] = []
    value = node.outputs[0]
    while len(value.uses) == 1 and not value.is_output and len(found) < 8:
        reader = value.uses[0][0]
        if len(reader.outputs) != 1:
            break
        found.append(reader)
        value = reader.outputs[0]
    return found


def shift_sink(op: LinearOp) -> Sink | None:
    """Where a shift of the operator's output can go, or None."""
    node, size = op.node, int(op.node.output.hint[op.channel_axis]) if op.node.output.hint else 0
    bias, beta = node.input(2), node.attrs.get("beta", 1.0)
    if bias is not None and own_vector(bias, size) and beta != 0:
        return Sink(bias, 1.0 / beta)
    value = node.output
    for reader in followers(node):
        if reader.op == "identity":
            value = reader.output
            continue
        if reader.op == "batch_norm" and reader.inputs[0] is value and not reader.attrs.get("training"):
            return Sink(reader.inputs[3], -1.0) if own_vector(reader.inputs[3], size) else None  # type: ignore[arg-type]
        if reader.op == "add":
            other = reader.inputs[1] if reader.inputs[0] is value else reader.inputs[0]
            along = along_channels(other, op.channel_axis, node.output.rank or 0, size)
            return Sink(other, 1.0) if along and own_vector(other, size) else None  # type: ignore[arg-type]
        return None
    return None


def along_channels(value: Value | None, axis: int, rank: int, size: int) -> bool:
    """Whether a stored operand, broadcast to ``rank`` axes, varies along the channel axis only."""
    if value is None or value.weight is None:
        return False
    shape = (1,) * (rank - len(value.weight.shape)) + tuple(value.weight.shape)
    return len(shape) == rank and all(n == (size if i == axis else 1) for i, n in enumerate(shape))


@dataclass
class Sum:
    """The residual addition at the end of a branch: sum = gain * output + constant + skip.

    Attributes:
        gain: per channel, or 1.
        skip: the other operand.
    """

    gain: np.ndarray
    skip: Value


def residual_sum(op: LinearOp) -> Sum | None:
    """The addition that the operator's output reaches through affine operators only, or None."""
    node = op.node
    axis, rank = op.channel_axis, node.output.rank or 0
    size = int(node.output.hint[axis]) if node.output.hint else 0
    gain, value = np.ones(size), node.output
    for reader in followers(node):
        at = 0 if reader.inputs[0] is value else 1
        other = reader.input(1 - at) if len(reader.inputs) == 2 else None
        if reader.op == "batch_norm":
            factor = norm_factor(reader)
            if at or factor is None:
                return None
            gain = gain * factor
        elif reader.op in ("mul", "add") and other is not None and other.is_const:
            data = other.const()
            assert data is not None
            if data.size != 1 and not along_channels(other, axis, rank, size):
                return None
            if reader.op == "mul":
                gain = gain * data.astype(np.float64).reshape(-1)
        elif reader.op == "add" and other is not None and other.hint == node.output.hint and other is not value:
            return Sum(gain, other)
        elif reader.op != "identity":
            return None
        value = reader.outputs[0]
    return None


def norm_factor(node: Node) -> np.ndarray | None:
    """What a batch norm in eval mode multiplies each channel by; None where that is not stored."""
    scale, var = node.input(1), node.input(4)
    if (
        node.attrs.get("training")
        or var is None
        or var.const() is None
        or (scale is not None and scale.const() is None)
    ):
        return None
    std = np.sqrt(np.asarray(var.const(), dtype=np.float64) + node.attrs["eps"])
    return (1.0 if scale is None else np.asarray(scale.const(), dtype=np.float64)) / std
