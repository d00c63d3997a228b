"""The formats under which a transform measures a layer's error, and the quantized layer itself in numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...graph.errors import ConfigError
from ..base import Context
from ..quantize.numerics import grid, weight_params
from ..quantize.spec import BackendSpec, TensorFormat


@dataclass(frozen=True)
class Formats:
    """Formats of a linear layer's operands; ``activation`` None leaves the activations in float (weight-only)."""

    weight: TensorFormat
    activation: TensorFormat | None
    per_token: bool = False

    def weights(self, matrix: np.ndarray) -> np.ndarray:
        """A weight [out, in] as its integers stand for it, float32."""
        matrix = matrix.astype(np.float32, copy=False)
        return weight_params(matrix, 0, self.weight, in_axis=1).apply(matrix)

    def activations(self, rows: np.ndarray, low: np.ndarray | float, high: np.ndarray | float) -> np.ndarray:
        """Rows [n, in] as their integers stand for them; ``low`` and ``high``: of all the data (per tensor)."""
        if self.activation is None:
            return rows
        if self.per_token:
            return grid(rows.min(1), rows.max(1), self.activation, 0).apply(rows)
        return grid(np.min(low), np.max(high), self.activation).apply(rows)


def formats_of(
    ctx: Context,
    target: str | None,
    weight_bits: int | None,
    activation_bits: int | None,
    block: int = 0,
    *,
    symmetric: bool | None = None,
    per_token: bool = False,
) -> Formats:
    """The formats of a target, or those of the given widths where no target is named.

    Args:
        target: a backend; its spec's formats for activations and weights.
        weight_bits, activation_bits: instead of the target's; 16 activation bits or more leave activations in float.
        block: input channels that share a weight scale (0: one scale per output channel).
        symmetric: weights without zero points or with them; None: as the target has them, without if there is none.
        per_token: activations get a range per row, found at run time, instead of one per tensor.
    """
    weight = TensorFormat("int8", True, "out_channel")
    activation: TensorFormat | None = TensorFormat("uint8")
    if target is not None:
        spec = ctx.backends(target).spec
        if not isinstance(spec, BackendSpec):
            raise ConfigError("this backend has no quantization spec", node=target, expected="a BackendSpec")
        weight, activation = spec.weights, spec.activations
    if weight_bits is not None:
        most = 2 ** (weight_bits - 1)
        weight = TensorFormat("int8", True, "out_channel", range=(-most, most - 1) if weight_bits < 8 else None)
    if symmetric is False:
        low, high = weight.limits
        weight = TensorFormat("uint8", False, weight.granularity, weight.block, (0, int(high - low)))
    elif symmetric and not weight.symmetric:
        half = int(weight.limits[1] - weight.limits[0] + 1) // 2
        weight = TensorFormat("int8", True, weight.granularity, weight.block, (-half, half - 1))
    if block:
        weight = TensorFormat(weight.dtype, weight.symmetric, "block", block, weight.range)
    if activation_bits is not None and activation_bits >= 16:
        activation = None
    elif activation_bits is not None:
        base = TensorFormat("uint8") if activation is None else activation
        half = 2 ** (activation_bits - 1)
        wide = (0, 2 * half - 1) if base.dtype == "uint8" else (-half, half - 1)
        activation = TensorFormat(base.dtype, base.symmetric, range=wide if activation_bits < 8 else None)
    return Formats(weight, activation, per_token)


def layer_error(reference: np.ndarray, rows: np.ndarray, matrices: list[np.ndarray]) -> float:
    """Squared error of ``rows @ matrix.T`` of all matrices side by side, against ``reference`` [n, sum of outs]."""
    made = np.concatenate([rows @ m.T for m in matrices], 1)
    return float(np.square(made - reference).sum(dtype=np.float64))
