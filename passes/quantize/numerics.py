"""Arithmetic of quantization, bit for bit as ONNX defines it: scales, zero points, rounding, errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from .spec.formats import FLOAT_LIMITS, LIMITS, TensorFormat, numpy_dtype

LOT = 1 << 20
"""Elements worked on at a time, so that large weights are never copied whole."""

RoundingRule = Literal["divide", "reciprocal"]
"""``divide``: rint(x / scale), as ONNX defines it; ``reciprocal``: rint(x * (1 / scale)), as torch's kernels do.

The products differ from the quotients in the last bit, so that values near a tie may differ.
"""


@dataclass(frozen=True)
class QuantParams:
    """A grid: scale and zero point of one tensor.

    Attributes:
        scale: 0-d (per tensor); 1-d (one per index of ``axis``); or of the tensor's rank, with one entry per block of
            ``block`` indices along ``axis`` and one per index of the other axes.
        zero_point: of the scale's shape (or 0-d), in the stored dtype; 0 for floating types.
        axis: None per tensor.
        block: 0 without blocks. The last block may be shorter.
        low, high: the stored values used; None for all that the dtype holds.
        rule: division or reciprocal.
        ties: values halfway between two integers go to the even one, or to the one further from zero.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None = None
    block: int = 0
    low: float | None = None
    high: float | None = None
    rule: RoundingRule = "divide"
    ties: Literal["even", "away"] = "even"

    @property
    def dtype(self) -> str:
        return str(self.zero_point.dtype)

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest stored value."""
        name = self.dtype
        least, most = LIMITS[name] if name in LIMITS else (-FLOAT_LIMITS[name], FLOAT_LIMITS[name])
        return (least if self.low is None else self.low), (most if self.high is None else self.high)

    @property
    def narrow(self) -> bool:
        """Whether values are kept out that the type holds; that -128 alone is left out does not count."""
        return self.limits != replace(self, low=None, high=None).limits and self.limits not in ((-127, 127), (-7, 7))

    def spread(self, parameter: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Scale or zero point in a shape that broadcasts against a tensor of ``shape``."""
        if self.axis is None or parameter.ndim == 0:
            return parameter.reshape(())
        axis = self.axis % len(shape)
        if self.block:
            repeated = np.repeat(parameter, self.block, axis=axis)
            return repeated[(slice(None),) * axis + (slice(shape[axis]),)]
        return parameter.reshape([-1 if i == axis else 1 for i in range(len(shape))])

    def quantize(self, x: np.ndarray) -> np.ndarray:
        """clip(rint(x / scale) + zero_point) in float32, ties to even, as in QuantizeLinear; saturating.

        Floating types: x / scale rounded to the type (ties to even), saturating; NaN stays.

        Returns:
            An array of the stored dtype and x's shape. Memory while it works: a few float32 copies of ``LOT`` elements.
        """
        if x.ndim == 0 or x.size <= LOT:
            return self._quantize(x)
        found = np.empty(x.shape, self.zero_point.dtype)
        for rows, part in self.parts(x.shape):
            found[rows] = part._quantize(x[rows])
        return found

    def parts(self, shape: tuple[int, ...]) -> Iterator[tuple[slice, QuantParams]]:
        """A tensor of ``shape`` cut along its first axis into lots of about ``LOT`` elements, and the grid of each."""
        step = max(LOT // max(math.prod(shape[1:]), 1), 1)
        first = self.axis is not None and self.scale.ndim > 0 and self.axis % len(shape) == 0
        if self.block and first:
            step = -(-step // self.block) * self.block
        for start in range(0, shape[0], step):
            rows, cut = slice(start, min(start + step, shape[0])), None
            if self.block:
                cut = slice(rows.start // self.block, -(-rows.stop // self.block)) if first else rows
            elif first:
                cut = rows
            if cut is None:
                yield rows, self
            else:
                zero = self.zero_point[cut] if self.zero_point.ndim else self.zero_point
                yield rows, replace(self, scale=self.scale[cut], zero_point=zero)

    def _quantize(self, x: np.ndarray) -> np.ndarray:
        low, high = self.limits
        steps = self.steps(x)
        if self.dtype in FLOAT_LIMITS:
            return np.clip(steps, low, high, out=steps).astype(self.zero_point.dtype)
        if self.ties == "even":
            np.rint(steps, out=steps)
        else:
            # Adding a half first would round the largest value below a half up.
            whole = np.trunc(steps)
            steps = np.where(np.abs(steps - whole) >= 0.5, whole + np.sign(steps), whole)
        if self.dtype == "int32":  # float32 does not hold the ends of the range
            steps = steps.astype(np.float64)
        if self.zero_point.any():
            steps += self.spread(self.zero_point, x.shape).astype(steps.dtype)
        np.clip(steps, low, high, out=steps)
        return steps.astype(np.int8 if self.dtype in ("int4", "int2") else self.zero_point.dtype).astype(
            self.zero_point.dtype, copy=False
        )

    def steps(self, x: np.ndarray) -> np.ndarray:
        """x / scale (or x * (1 / scale)) in float32, not rounded: where the elements lie between the integers."""
        scale = self.spread(self.scale.astype(np.float32), x.shape)
        values = x.astype(np.float32, copy=False)
        if self.rule == "reciprocal":
            return np.asarray(np.multiply(values, np.float32(1) / scale))
        return np.asarray(np.divide(values, scale))

    def dequantize(self, q: np.ndarray) -> np.ndarray:
        """(q - zero_point) * scale, computed in float32; float16 and bfloat16 scales give their own dtype."""
        name = str(self.scale.dtype)
        values: np.ndarray = q.astype(np.float32)
        if self.zero_point.any():
            if self.dtype == "int32":
                centred = q.astype(np.int64) - self.spread(self.zero_point, q.shape).astype(np.int64)
                values = centred.astype(np.float32)
            else:
                values -= self.spread(self.zero_point, q.shape).astype(np.float32)
        scale = self.spread(self.scale, q.shape).astype(np.float32)
        values = np.asarray(values * scale)
        return values.astype(self.scale.dtype) if name in ("float16", "bfloat16") else values

    def apply(self, x: np.ndarray) -> np.ndarray:
        """What the quantized tensor stands for: dequantize(quantize(x))."""
        return self.dequantize(self.quantize(x))


def _rounded_scale(scale: np.ndarray, form: TensorFormat) -> np.ndarray:
    """Scales in their stored type, positive: a power of two is rounded up (nothing clips), others to the nearest."""
    if form.scale_dtype == "float32":
        found = scale.astype(np.float32)
        smallest = float(np.finfo(np.float32).smallest_subnormal)
    else:
        stored = numpy_dtype(form.scale_dtype)
        if form.scale_dtype == "float8_e8m0fnu":
            with np.errstate(divide="ignore"):
                exponent = np.ceil(np.log2(np.asarray(scale, np.float64)))
            found = np.exp2(np.clip(exponent, -127, 127)).astype(stored)
            smallest = 2.0**-127
        else:
            import ml_dtypes

            info = ml_dtypes.finfo(stored)
            found = np.clip(scale, 0, float(info.max)).astype(stored)
            smallest = float(info.smallest_subnormal)
    # A tensor of zeros keeps scale 1; a range that underflows the scale's type keeps its smallest value.
    found = np.maximum(found, np.asarray(smallest).astype(found.dtype))
    return np.where(np.asarray(scale) > 0, found, np.ones_like(found))


def grid(low: np.ndarray, high: np.ndarray, form: TensorFormat, axis: int | None = None, block: int = 0) -> QuantParams:
    """Parameters for tensors with values in [low, high], of any shape of scales; zero is always representable.

    Args:
        low, high: float arrays of one shape: 0-d, one per index of ``axis``, or one per block.
        form: the format; its ``granularity`` is not read here.
        axis, block: what the scales lie along, see :class:`QuantParams`.
    """
    qmin, qmax = form.limits
    low, high = np.minimum(np.asarray(low, np.float64), 0), np.maximum(np.asarray(high, np.float64), 0)
    zero_dtype = numpy_dtype(form.dtype)
    if form.symmetric or form.is_float:
        centre = form.centre
        scale = _rounded_scale(np.maximum(-low, high) / (qmax - centre), form)
        zero = np.full(scale.shape, centre, np.int64)
    else:
        scale = _rounded_scale((high - low) / (qmax - qmin), form)
        zero = np.clip(np.rint(qmin - low / scale.astype(np.float64)), qmin, qmax).astype(np.int64)
    ends = (None, None) if form.range is None else form.limits
    return QuantParams(np.asarray(scale), np.asarray(zero, zero_dtype), axis, block, *ends)


def range_params(low: float, high: float, form: TensorFormat) -> QuantParams:
    """Parameters of one tensor with values in [low, high]; zero is always exactly representable."""
    return grid(np.array(low), np.array(high), form)


def extremes(
    weight: np.ndarray, form: TensorFormat, out_axis: int, in_axis: int | None = None
) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Smallest and largest element per scale of a weight's format, and the axis that the scales lie along.

    Args:
        weight: float array.
        out_axis, in_axis: its output- and input-channel axes; ``in_axis`` is needed for in_channel and block.

    Raises:
        ConstraintError: the format needs an input-channel axis and the weight has none.
    """
    if form.granularity == "tensor":
        return weight.min(initial=0), weight.max(initial=0), None
    if form.granularity in ("in_channel", "block") and in_axis is None:
        from ...graph.errors import ConstraintError

        raise ConstraintError("this weight has no input-channel axis", expected=form.granularity, found=weight.shape)
    if form.granularity == "block":
        assert in_axis is not None
        starts = np.arange(0, weight.shape[in_axis], form.block)
        lows, highs = (f.reduceat(weight, starts, axis=in_axis) for f in (np.minimum, np.maximum))
        return lows, highs, in_axis
    axis = out_axis if form.granularity == "out_channel" else in_axis
    assert axis is not None
    others = tuple(i for i in range(weight.ndim) if i != axis)
    return weight.min(axis=others, initial=0), weight.max(axis=others, initial=0), axis


def weight_params(
    weight: np.ndarray,
    axis: int,
    form: TensorFormat,
    least: np.ndarray | None = None,
    *,
    in_axis: int | None = None,
) -> QuantParams:
    """Parameters of a weight that cover all of it.

    Args:
        weight: float array.
        axis: output-channel axis.
        form: its format, of any granularity.
        least: lower bound on the scale per output channel (keeps an int32 bias in range where the weights are tiny).
        in_axis: input-channel axis, for the granularities in_channel and block.
    """
    low, high, along = extremes(weight, form, axis, in_axis)
    params = grid(low, high, form, along, form.block)
    if least is None:
        return params
    bound = least if along == axis and not form.block else np.max(least)
    return replace(params, scale=np.maximum(params.scale, np.asarray(bound).astype(params.scale.dtype)))


def bias_params(x: QuantParams, weight: QuantParams, channels: int) -> QuantParams:
    """int32 bias on the accumulator's scale, f32(scale of x * scale of the weight), zero point 0."""
    scale = (x.scale.astype(np.float32) * weight.scale.astype(np.float32)).astype(np.float32)
    scale = np.broadcast_to(scale, (channels,)) if weight.axis is not None else scale
    return QuantParams(np.array(scale), np.zeros(scale.shape, np.int32), 0 if weight.axis is not None else None)


def least_weight_scale(bias: np.ndarray, x: QuantParams) -> np.ndarray:
    """Smallest weight scale per channel for which the bias fits into half the int32 range."""
    return (np.abs(bias).astype(np.float64) / float(x.scale) / 2**30).astype(np.float32)


def quality_db(weight: np.ndarray, integers: np.ndarray, params: QuantParams) -> float:
    """SQNR in decibel of stored integers against the weight they stand for, worked out lot by lot."""
    power = noise = 0.0
    parts = params.parts(weight.shape) if weight.ndim else [(slice(None), params)]
    for rows, part in parts:
        exact = weight[rows].astype(np.float64) if weight.ndim else weight.astype(np.float64)
        power += float(np.square(exact).sum())
        exact -= part.dequantize(integers[rows] if weight.ndim else integers)
        noise += float(np.square(exact, out=exact).sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(power / noise) if power > 0 else -math.inf


def sqnr_db(signal: np.ndarray, approximation: np.ndarray) -> float:
    """10 log10(sum s^2 / sum (s - a)^2) in decibel; inf when equal."""
    s = signal.astype(np.float64)
    noise = float(np.square(s - approximation.astype(np.float64)).sum())
    power = float(np.square(s).sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(power / noise) if power > 0 else -math.inf
