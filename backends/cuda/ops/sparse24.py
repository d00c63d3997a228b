"""foldline::sparse24_linear: weights with at most two of every four inputs nonzero, on the sparse tensor cores."""

from __future__ import annotations

import numpy as np
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from ....graph.errors import ConstraintError
from .registry import activated, expect, known_activation, operator

ROWS, COLUMNS = 32, 64
"""The compressed form wants output channels in multiples of 32 and inputs in multiples of 64: others are padded."""


def violations(weight: np.ndarray | torch.Tensor) -> int:
    """How many runs of four consecutive inputs of [N, K] hold more than two nonzeros (K is padded with zeros)."""
    found = np.asarray(weight.detach().to(torch.float32) if isinstance(weight, torch.Tensor) else weight) != 0
    padded = np.pad(found, ((0, 0), (0, -found.shape[1] % 4)))
    return int((padded.reshape(found.shape[0], -1, 4).sum(-1) > 2).sum())


def prune24(weight: torch.Tensor) -> torch.Tensor:
    """The weight [N, K] with the two smallest of every four consecutive inputs zeroed (the later one of equals)."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -k % 4)).reshape(n, -1, 4)
    kept = padded.abs().argsort(dim=-1, descending=True, stable=True)[..., :2]
    mask = torch.zeros_like(padded, dtype=torch.bool).scatter_(-1, kept, True)
    return torch.where(mask, padded, torch.zeros_like(padded)).reshape(n, -1)[:, :k]


def compress24(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [N', K'/2], indices int16 [N', K'/16]) of a 2:4 weight [N, K], N' and K' rounded up to 32 and 64.

    Raises:
        ConstraintError: the weight is not 2:4, or not float16 or bfloat16.
    """
    if weight.dtype not in (torch.float16, torch.bfloat16):
        raise ConstraintError(
            "sparse tensor cores take 16-bit floats here", expected="float16 or bfloat16", found=str(weight.dtype)
        )
    if wrong := violations(weight):
        raise ConstraintError(
            "the weight is not 2:4",
            expected="at most 2 nonzeros in every 4 consecutive inputs",
            found=f"{wrong} runs of four hold more",
            hint="prune24 keeps the two largest of every four",
        )
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -k % COLUMNS, 0, -n % ROWS)).contiguous()
    values, indices = sparse_semi_structured_from_dense_cutlass(padded)
    return values, indices


def _check(
    x: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    bias: torch.Tensor | None,
    outputs: int,
    activation: str,
) -> None:
    expect(x.dtype == values.dtype, "x and the weight must have one dtype")
    expect(-(-x.shape[-1] // COLUMNS) * COLUMNS == values.shape[1] * 2, "the compressed weight does not fit x")
    expect(values.shape[0] - ROWS < outputs <= values.shape[0], "outputs does not fit the compressed weight")
    known_activation(activation)


def _fake(
    x: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    bias: torch.Tensor | None,
    outputs: int,
    activation: str,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


@operator("sparse24_linear", _check, _fake)
def sparse24_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    bias: torch.Tensor | None,
    outputs: int,
    activation: str,
) -> torch.Tensor:
    """act(x @ W.T + bias) with a 2:4 weight W [outputs, K] as :func:`compress24` stores it.

    Args:
        x: [..., K] float16 or bfloat16.
        values, indices: the compressed weight.
        bias: [outputs] or None.
        outputs: rows of W (the stored form is padded).
        activation: none, relu, gelu, gelu_tanh or silu.
    """
    if not x.is_cuda:
        return reference(x, values, indices, bias, outputs, activation)
    rows = x.reshape(-1, x.shape[-1])
    # The sparse operand comes first: W x^T; the free dimension must be a multiple of 8.
    wide = torch.nn.functional.pad(rows, (0, values.shape[1] * 2 - rows.shape[1], 0, -rows.shape[0] % 8))
    y = torch._sparse_semi_structured_mm(values, indices, wide.t()).t()[: rows.shape[0], :outputs]
    if bias is not None or activation != "none":
        y = y.to(torch.float32) if bias is None else y.to(torch.float32) + bias.to(torch.float32)
        y = activated(y, activation)
    return y.to(x.dtype).reshape(*x.shape[:-1], outputs)


def reference(
    x: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    bias: torch.Tensor | None,
    outputs: int,
    activation: str,
) -> torch.Tensor:
    """The same with the weight written out, summed in float32."""
    dense = sparse_semi_structured_to_dense_cutlass(values, indices)[:outputs, : x.shape[-1]]
    y = torch.nn.functional.linear(x.to(torch.float32), dense.to(torch.float32))
    if bias is not None:
        y = y + bias.to(torch.float32)
    return activated(y, activation).to(x.dtype)
