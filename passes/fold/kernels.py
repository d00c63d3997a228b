"""A linear operator over channels and taps as data: sums and compositions of such operators, with exact borders.

Convolution, linear, average pooling, a scale per channel and the identity are one thing here: output position ``o``
sums ``weight[out, in, t] * x[in, o * stride + first + step * t]`` over its taps ``t``, where ``x`` is zero outside its
range. Two operators over one input add tap by tap once both are laid on a common grid of taps and of groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Taps:
    """Which inputs one output sums along one spatial axis: ``o * stride + first + step * t`` for t < ``count``.

    Attributes:
        first: position of the first tap relative to ``o * stride``; minus the padding in front, so never positive.
        reach: ``padding in front + padding behind - step * (count - 1)``: an input of n gives
            ``(n + reach - 1) // stride + 1`` outputs.
    """

    stride: int
    first: int
    step: int
    count: int
    reach: int

    @property
    def last(self) -> int:
        """Position of the last tap relative to ``o * stride``."""
        return self.first + self.step * (self.count - 1)

    @property
    def padding(self) -> tuple[int, int]:
        return -self.first, self.reach + self.last

    @property
    def local(self) -> bool:
        """Whether an output reads the one input at ``o * stride``, and there is one for each."""
        return self.count == 1 and self.first == 0 and self.reach == 0

    def outputs(self, size: int) -> int:
        return (size + self.reach - 1) // self.stride + 1

    def grid(self, first: int, last: int, step: int, reach: int) -> Taps:
        """Taps from ``first`` to ``last`` at this stride."""
        count = (last - first) // step + 1
        return Taps(self.stride, first, step if count > 1 else 1, count, reach)

    def balanced(self) -> Taps:
        """The same taps and some zeros, so that both paddings are equal (torch pads both sides alike)."""
        low, high = self.padding
        step = math.gcd(self.step if self.count > 1 else 0, high - low) or 1
        return self.grid(self.first - max(high - low, 0), self.last + max(low - high, 0), step, self.reach)


def taps(kernel: int, stride: int, padding: tuple[int, int], dilation: int) -> Taps:
    """One axis of a convolution or pooling."""
    step = dilation if kernel > 1 else 1
    return Taps(stride, -padding[0], step, kernel, padding[0] + padding[1] - step * (kernel - 1))


@dataclass(frozen=True)
class Form:
    """What a kernel is apart from its numbers.

    Attributes:
        axes: one entry per spatial axis; none for a linear, which acts on the last axis.
        biased: whether it adds a constant per output channel.
    """

    inputs: int
    outputs: int
    groups: int
    axes: tuple[Taps, ...]
    biased: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight: [outputs, inputs / groups, taps...]."""
        return self.outputs, self.inputs // self.groups, *(axis.count for axis in self.axes)

    @property
    def size(self) -> int:
        """Elements of the weight, and multiply-accumulates for each output position."""
        return math.prod(self.shape)

    @property
    def local(self) -> bool:
        return all(axis.local for axis in self.axes)

    @property
    def diagonal(self) -> bool:
        """Whether it only scales each channel where it is."""
        same = self.groups == self.inputs == self.outputs
        return same and self.local and all(axis.stride == 1 for axis in self.axes)

    @property
    def padded(self) -> bool:
        return any(any(axis.padding) for axis in self.axes)


@dataclass(frozen=True, eq=False)
class Kernel:
    """A linear operator with its numbers.

    Attributes:
        weight: float64, of shape ``form.shape``.
        bias: float64 [outputs], or None.
    """

    form: Form
    weight: np.ndarray
    bias: np.ndarray | None = None


def channelwise(scale: np.ndarray, shift: np.ndarray | None, spatial: int) -> Kernel:
    """``scale[c] * x[c] + shift[c]`` as a kernel."""
    channels = len(scale)
    form = Form(channels, channels, channels, (Taps(1, 0, 1, 1, 0),) * spatial, shift is not None)
    return Kernel(form, scale.reshape(form.shape), shift)


# ---- sums --------------------------------------------------------------------------------------------------------
def sum_form(forms: Sequence[Form], sizes: Sequence[int | None]) -> Form | str:
    """Form of a sum of kernels over one input, or why there is none.

    Args:
        sizes: input sizes of the spatial axes, None where they vary; kernels that reach differently far agree only
            where the sizes are known.
    """
    head = forms[0]
    if any((f.inputs, f.outputs, len(f.axes)) != (head.inputs, head.outputs, len(head.axes)) for f in forms):
        return "the branches differ in their channels"
    axes = []
    for size, parts in zip(sizes, zip(*(f.axes for f in forms), strict=True), strict=True):
        if len({part.stride for part in parts}) > 1:
            return "the branches differ in their strides"
        if len({part.reach for part in parts}) > 1 and (size is None or len({p.outputs(size) for p in parts}) > 1):
            return "the branches do not align: their outputs have different sizes"
        axes.append(_union(parts))
    groups = math.gcd(*(f.groups for f in forms))
    return Form(head.inputs, head.outputs, groups, tuple(axes), any(f.biased for f in forms))


def _union(parts: Sequence[Taps]) -> Taps:
    first, last = min(p.first for p in parts), max(p.last for p in parts)
    step = math.gcd(*(p.first - first for p in parts), *(p.step for p in parts if p.count > 1)) or 1
    return parts[0].grid(first, last, step, max(p.reach for p in parts))


def add(kernels: Sequence[Kernel], factors: Sequence[float], form: Form) -> Kernel:
    """``sum_i factors[i] * kernels[i]`` in the form that :func:`sum_form` gave (or one with more taps)."""
    weight, bias = np.zeros(form.shape), None
    for kernel, factor in zip(kernels, factors, strict=True):
        _place(kernel, form, weight, factor)
        if kernel.bias is not None:
            bias = factor * kernel.bias + (0.0 if bias is None else bias)
    return Kernel(form if bias is not None or not form.biased else replace(form, biased=False), weight, bias)


def _place(kernel: Kernel, form: Form, into: np.ndarray, factor: float) -> None:
    """Add a kernel to a weight that has more taps and fewer, larger groups."""
    at = tuple(
        slice((own.first - to.first) // to.step, (own.last - to.first) // to.step + 1, max(own.step // to.step, 1))
        for own, to in zip(kernel.form.axes, form.axes, strict=True)
    )
    finer = kernel.form.groups // form.groups
    rows, columns = form.outputs // kernel.form.groups, form.inputs // kernel.form.groups
    if rows == columns == 1 and not at:
        index = np.arange(form.outputs)
        into[index, index % finer] += factor * kernel.weight[:, 0]
        return
    for group in range(kernel.form.groups):
        out = slice(group * rows, (group + 1) * rows)
        column = group % finer * columns
        into[(out, slice(column, column + columns), *at)] += factor * kernel.weight[out]


# ---- compositions ------------------------------------------------------------------------------------------------
def chain_form(outer: Form, inner: Form) -> Form | str:
    """Form of ``outer(inner(x))``, or why there is none.

    Where ``outer`` pads, it reads zeros; the composition would read what ``inner`` makes of the zeros round x. Both
    are zero only if ``inner`` has one tap along that axis and adds no constant.
    """
    if outer.inputs != inner.outputs or len(outer.axes) != len(inner.axes):
        return "the channels in between differ"
    for late, early in zip(outer.axes, inner.axes, strict=True):
        if any(late.padding) and early.count > 1:
            return "the second pads with zeros where the first sums several taps: the border would differ"
    if outer.padded and inner.biased:
        return "the second pads with zeros and the first adds a bias: the border would differ"
    axes = tuple(_behind(late, early) for late, early in zip(outer.axes, inner.axes, strict=True))
    groups = math.gcd(outer.groups, inner.groups)
    return Form(inner.inputs, outer.outputs, groups, axes, outer.biased or inner.biased)


def _behind(late: Taps, early: Taps) -> Taps:
    jump = early.stride
    steps = (early.step if early.count > 1 else 0, jump * late.step if late.count > 1 else 0)
    stretched = Taps(jump * late.stride, 0, 1, 1, 0)
    first, last = early.first + jump * late.first, early.last + jump * late.last
    return stretched.grid(first, last, math.gcd(*steps) or 1, early.reach + jump * late.reach)


def chain(outer: Kernel, inner: Kernel, form: Form) -> Kernel:
    """``outer(inner(x))`` in the form that :func:`chain_form` gave."""
    bias = outer.bias
    if inner.bias is not None:
        # every tap of an output channel sees the same constant: nothing is padded where there is one
        taps_summed = outer.weight.reshape(outer.form.outputs, -1, math.prod(outer.form.shape[2:])).sum(2)
        spread = inner.bias.reshape(outer.form.groups, -1)
        moved = np.einsum("gom,gm->go", _grouped(taps_summed, outer.form.groups), spread).reshape(-1)
        bias = moved if bias is None else bias + moved
    return Kernel(form, _chained(outer, inner, form), bias)


def _grouped(weight: np.ndarray, groups: int) -> np.ndarray:
    return weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])


def _chained(outer: Kernel, inner: Kernel, form: Form) -> np.ndarray:
    ones = (1,) * len(form.axes)
    if inner.form.diagonal:
        spread = inner.weight.reshape(outer.form.groups, 1, -1, *ones)
        return (_grouped(outer.weight, outer.form.groups) * spread).reshape(outer.weight.shape)
    if outer.form.diagonal:
        return inner.weight * outer.weight.reshape(-1, 1, *ones)
    late, early = _dense(outer, form.groups), _dense(inner, form.groups)
    result = np.zeros((form.groups, form.outputs // form.groups, form.inputs // form.groups, *form.shape[2:]))
    flat = early.reshape(early.shape[0], early.shape[1], -1)
    for tap in np.ndindex(*outer.form.shape[2:]):
        at = []
        for t, second, first, whole in zip(tap, outer.form.axes, inner.form.axes, form.axes, strict=True):
            start = (first.first + first.stride * (second.first + second.step * t) - whole.first) // whole.step
            stride = max(first.step // whole.step, 1) if first.count > 1 else 1
            at.append(slice(start, start + stride * (first.count - 1) + 1, stride))
        part = np.matmul(late[(..., *tap)], flat)
        result[(slice(None), slice(None), slice(None), *at)] += part.reshape(*part.shape[:2], *early.shape[2:])
    return result.reshape(form.shape)


def _dense(kernel: Kernel, groups: int) -> np.ndarray:
    """The weight as [groups, outputs / groups, inputs / groups, taps...] for fewer groups than the kernel has."""
    form = replace(kernel.form, groups=groups)
    weight = np.zeros(form.shape)
    _place(kernel, form, weight, 1.0)
    return _grouped(weight, groups)


def through(outer: Kernel, inner: Kernel, sizes: Sequence[int], made: Sequence[int]) -> Kernel:
    """A linear on the flattened output of a convolution, as a linear on the convolution's flattened input.

    Args:
        outer: weight [out, outputs of ``inner`` x positions].
        sizes, made: positions per spatial axis before and after ``inner``.
    """
    form, g = inner.form, inner.form.groups
    rows = outer.form.outputs
    late = outer.weight.reshape(rows, g, form.outputs // g, -1)
    pads = [axis.padding for axis in form.axes]
    wide = np.zeros((rows, g, form.inputs // g, *(n + low + high for n, (low, high) in zip(sizes, pads, strict=True))))
    early = _grouped(inner.weight, g)
    for tap in np.ndindex(*form.shape[2:]):
        part = np.einsum("rgop,goi->rgip", late, early[(..., *tap)], optimize=True)
        at = tuple(
            slice(t * axis.step, t * axis.step + axis.stride * (n - 1) + 1, axis.stride)
            for t, axis, n in zip(tap, form.axes, made, strict=True)
        )
        wide[(slice(None), slice(None), slice(None), *at)] += part.reshape(*part.shape[:3], *made)
    inside = tuple(slice(low, low + n) for n, (low, _) in zip(sizes, pads, strict=True))
    weight = wide[(slice(None), slice(None), slice(None), *inside)].reshape(rows, -1)
    bias = outer.bias
    if inner.bias is not None:
        moved = outer.weight.reshape(rows, form.outputs, -1).sum(2) @ inner.bias
        bias = moved if bias is None else bias + moved
    return Kernel(Form(weight.shape[1], rows, 1, (), bias is not None), weight, bias)


def stacked(kernels: Sequence[tuple[Kernel, float]], axis: int) -> Kernel:
    """Kernels times factors, stacked along their outputs (0) or, as terms of a sum, along their inputs (1)."""
    first = kernels[0][0].form
    weight = np.concatenate([factor * kernel.weight for kernel, factor in kernels], axis=axis)
    bias: np.ndarray | None = None
    if any(kernel.bias is not None for kernel, _ in kernels):
        parts = [factor * (0.0 if k.bias is None else k.bias) + np.zeros(k.form.outputs) for k, factor in kernels]
        bias = np.concatenate(parts) if axis == 0 else np.sum(parts, axis=0)
    return Kernel(Form(weight.shape[1], weight.shape[0], 1, first.axes, bias is not None), weight, bias)
