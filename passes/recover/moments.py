"""Mean and covariance of activations without data: from batch norms' statistics, carried on under a Gaussian model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...graph.ir import Graph, Node, Value
from .layers import LINEAR, along_channels, followers, linear_op

NEIGHBOURS = 0.6
"""Correlation of a channel with itself one position further, assumed where nothing says more."""
ORDERS = 4
"""Terms of the Hermite series of an activation; the last one more has an even power, as a rectifier's have."""
CHANNELS = 0.6
"""Correlation of the channels of an input image, as of coloured photographs."""

ACTIVATIONS: dict[str, Callable[[Tensor, Node], Tensor]] = {
    "relu": lambda x, n: x.relu(),
    "leaky_relu": lambda x, n: F.leaky_relu(x, n.attrs.get("slope", 0.01)),
    "clip": lambda x, n: x.clamp(n.attrs.get("min"), n.attrs.get("max")),
    "gelu": lambda x, n: F.gelu(x, approximate=n.attrs.get("approximate", "none")),
    "silu": lambda x, n: F.silu(x),
    "mish": lambda x, n: F.mish(x),
    "sigmoid": lambda x, n: x.sigmoid(),
    "tanh": lambda x, n: x.tanh(),
    "hardswish": lambda x, n: F.hardswish(x),
    "hardsigmoid": lambda x, n: F.hardsigmoid(x),
    "elu": lambda x, n: F.elu(x, n.attrs.get("alpha", 1.0)),
    "selu": lambda x, n: F.selu(x),
    "softplus": lambda x, n: F.softplus(x),
    "abs": lambda x, n: x.abs(),
}
PASSED = ("identity", "cast", "max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "resize")
"""Ops that leave mean and covariance along the channels roughly as they are (averaging narrows all of them alike)."""


@dataclass
class Moments:
    """Mean [C] and covariance [C, C], float64, of the vectors along one axis of a value.

    Attributes:
        measured: the mean goes back to what batch norms saw. A layer norm says nothing of its channels' means over
            many inputs: that they are its bias is a guess.
    """

    mean: Tensor
    cov: Tensor
    axis: int
    measured: bool = False

    @property
    def std(self) -> Tensor:
        return self.cov.diagonal().clamp_min(0).sqrt()

    def scaled(self, factor: Tensor, shift: Tensor | float = 0.0) -> Moments:
        """Those of factor * x + shift."""
        cov = self.cov * factor[:, None] * factor[None, :]
        return Moments(self.mean * factor + shift, cov, self.axis, self.measured)

    def with_std(self, std: Tensor) -> Moments:
        """The same correlations under other deviations."""
        own = self.std
        factor = torch.where(own > 1e-12, std / own.clamp_min(1e-12), torch.zeros(()))
        cov = self.cov * factor[:, None] * factor[None, :]
        cov.diagonal().copy_(std**2)
        return Moments(self.mean, cov, self.axis, self.measured)


class Propagation:
    """Moments of every value of a graph, node by node; what no rule follows is unknown (absent).

    Linear ops map them exactly for Gaussian inputs whose positions are correlated as neighbours in an image are; batch
    norms know the mean and the variance of their input, so only its correlations are taken from the model ("Data-Free
    Quantization Through Weight Equalization and Bias Correction" for the rectified Gaussian's mean); activations by
    quadrature, their covariances by the Hermite series; sums as if independent.
    """

    def __init__(self, graph: Graph) -> None:
        self.known: dict[str, Moments] = {}
        self._last = {v.name: n.name for n in graph.nodes for v in n.inputs if v is not None}
        for value in graph.inputs:
            if value.rank is not None and value.rank >= 3 and value.hint and value.dtype.startswith("float"):
                cov = torch.full((value.hint[1],) * 2, CHANNELS, dtype=torch.float64)
                cov.diagonal().fill_(1.0)
                self.known[value.name] = Moments(torch.zeros(value.hint[1], dtype=torch.float64), cov, 1)

    def of(self, value: Value | None) -> Moments | None:
        """Moments of a value, if they are known and it is still to be read."""
        return None if value is None else self.known.get(value.name)

    def visit(self, node: Node) -> None:
        """Take in one node; its operands' moments are dropped after their last reader."""
        if len(node.outputs) == 1 and (found := self._rule(node)) is not None:
            size = None if node.output.hint is None else node.output.hint[found.axis]
            if size == len(found.mean) and bool(torch.isfinite(found.cov).all()):
                self.known[node.output.name] = found
        for v in node.inputs:
            if v is not None and self._last.get(v.name) == node.name:
                self.known.pop(v.name, None)

    def _rule(self, node: Node) -> Moments | None:
        x = self.of(node.input(0))
        if node.op == "batch_norm":
            return _batch_norm(node, x)
        if node.op in ("layer_norm", "rms_norm"):
            return _layer_norm(node, x)
        if node.op in ("add", "sub", "mul", "div"):
            return self._binary(node)
        if node.op == "concat":
            return self._concat(node)
        if x is None:
            return None
        if node.op in LINEAR:
            return _linear(node, x)
        if node.op in ACTIVATIONS:
            return activated(x, lambda t: ACTIVATIONS[node.op](t, node))
        if node.op in PASSED:
            return x
        return _moved(node, x)

    def _binary(self, node: Node) -> Moments | None:
        a, b = node.inputs[0], node.inputs[1]
        x, y = self.of(a), self.of(b)
        if node.op == "add" and x is not None and y is not None and x.axis == y.axis and len(x.mean) == len(y.mean):
            return Moments(x.mean + y.mean, x.cov + y.cov, x.axis, x.measured and y.measured)
        if x is None and node.op in ("add", "mul"):
            x, b = y, a
        if x is None or b is None or not b.is_const:
            return None
        data = b.const()
        assert data is not None
        if data.size != 1 and not along_channels(b, x.axis, node.output.rank or 0, len(x.mean)):
            return None
        number = torch.from_numpy(np.array(data, dtype=np.float64).reshape(-1)).expand(len(x.mean))
        one = torch.ones_like(x.mean)
        if node.op in ("add", "sub"):
            return x.scaled(one, number if node.op == "add" else -number)
        return x.scaled(number if node.op == "mul" else 1 / number)

    def _concat(self, node: Node) -> Moments | None:
        parts = [self.of(v) for v in node.inputs]
        found = [p for p in parts if p is not None and p.axis == node.attrs["axis"]]
        if len(found) != len(parts):
            return None
        mean, cov = torch.cat([p.mean for p in found]), torch.block_diag(*(p.cov for p in found))
        return Moments(mean, cov, node.attrs["axis"], all(p.measured for p in found))


def _batch_norm(node: Node, x: Moments | None) -> Moments | None:
    """Mean and deviation of the output are the bias and the gain, whatever the model says."""
    if node.attrs.get("training"):
        return None
    scale, bias, mean, var = (node.input(i) for i in range(1, 5))
    if mean is None or var is None or mean.const() is None or var.const() is None:
        return None
    square = torch.from_numpy(np.array(var.const(), dtype=np.float64))
    size = len(square)
    gain, beta = _vector(scale, size, 1.0), _vector(bias, size, 0.0)
    if gain is None or beta is None:
        return None
    unit = x.with_std(torch.ones(size, dtype=torch.float64)).cov if x is not None else torch.eye(size).double()
    factor = gain * (square / (square + node.attrs["eps"])).sqrt()
    return Moments(beta, unit * factor[:, None] * factor[None, :], 1, True)


def _layer_norm(node: Node, x: Moments | None) -> Moments | None:
    """Over one trailing axis: the bias and the gain, uncorrelated where the input is unknown."""
    rank = node.output.rank
    if rank is None or node.output.hint is None or list(node.attrs["axes"]) != [rank - 1]:
        return None
    size = node.output.hint[-1]
    gain, bias = _vector(node.input(1), size, 1.0), _vector(node.input(2), size, 0.0)
    if gain is None or bias is None:
        return None
    unit = torch.eye(size, dtype=torch.float64)
    if x is not None and x.axis == rank - 1:
        unit = x.cov / x.cov.diagonal().mean().clamp_min(1e-30)
    return Moments(bias, unit * gain[:, None] * gain[None, :], rank - 1)


def _vector(value: Value | None, size: int, default: float) -> Tensor | None:
    if value is None:
        return torch.full((size,), default, dtype=torch.float64)
    data = value.const()
    return None if data is None or data.size != size else torch.from_numpy(np.array(data, dtype=np.float64).reshape(-1))


def _linear(node: Node, x: Moments) -> Moments | None:
    """W x + b over whole patches; the correlation of positions decays with their distance."""
    op = linear_op(node, shared=True)
    if isinstance(op, str) or node.attrs.get("transposed"):
        return None
    axis = 1 if node.op == "conv" else (node.output.rank or 1) - 1
    if x.axis != (1 if node.op == "conv" else (node.inputs[0].rank or 1) - 1):  # type: ignore[union-attr]
        return None
    data = op.weight.const()
    assert data is not None
    w = op.matrix(data)
    groups, outputs, columns = w.shape
    width = len(x.mean) // groups
    taps = columns // width
    w = w.reshape(groups, outputs, width, taps)
    mean = torch.einsum("goct,gc->go", w, x.mean.reshape(groups, width)).reshape(-1)
    near, vectors = torch.linalg.eigh(_positions(node, taps))
    cov = torch.zeros(groups * outputs, groups * outputs, dtype=torch.float64)
    blocks = x.cov.reshape(groups, width, groups, width)
    for value, vector in zip(near.tolist(), vectors.T, strict=True):
        u = w @ vector  # [G, O, C]
        if groups == 1:
            cov += value * (u[0] @ x.cov @ u[0].T)
        else:
            cov += value * torch.einsum("goc,gchd,hpd->gohp", u, blocks, u).reshape(cov.shape)
    bias = _vector(node.input(2), len(mean), 0.0)
    if bias is None:
        # Computed at run time (exporters write a zero bias so): a batch norm knows the mean whatever it is.
        readers = followers(node)
        if not readers or readers[0].op != "batch_norm":
            return None
        bias = torch.zeros_like(mean)
    return Moments(mean + bias * node.attrs.get("beta", 1.0), cov, axis, x.measured)


def _positions(node: Node, taps: int) -> Tensor:
    """Correlation of the positions under a kernel, [taps, taps]."""
    if taps == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    weight = node.inputs[1]
    assert weight is not None and weight.weight is not None
    kernel = weight.weight.shape[2:]
    steps = [torch.arange(k, dtype=torch.float64) * d for k, d in zip(kernel, node.attrs["dilation"], strict=True)]
    at = torch.cartesian_prod(*steps).reshape(taps, -1)
    return NEIGHBOURS ** torch.cdist(at, at)


def activated(x: Moments, function: Callable[[Tensor], Tensor]) -> Moments:
    """Moments of f(x) for Gaussian x: mean and variance by quadrature, covariances by Hermite series.

    What the first ``ORDERS`` terms leave of the variances goes into one term more, so that copies stay copies.
    """
    z = torch.linspace(-6, 6, 241, dtype=torch.float64)
    weight = torch.exp(-z.square() / 2)
    weight /= weight.sum()
    std = x.std
    y = function(x.mean[:, None] + std[:, None] * z)
    mean = y @ weight
    var = (y - mean[:, None]).square() @ weight
    rho = x.with_std(torch.ones_like(std)).cov
    cov, left = torch.zeros_like(rho), var.clone()
    before, polynomial = torch.ones_like(z), z
    for k in range(1, ORDERS + 1):
        share = y @ (weight * polynomial) / math.sqrt(math.factorial(k))
        cov += share[:, None] * share * rho**k
        left -= share.square()
        before, polynomial = polynomial, z * polynomial - k * before
    rest = left.clamp_min(0).sqrt()
    cov += rest[:, None] * rest * rho ** (ORDERS + 2)
    cov.diagonal().copy_(var)
    return Moments(mean, cov, x.axis, x.measured)


def _moved(node: Node, x: Moments) -> Moments | None:
    """Shape ops that leave the channel axis whole, select of it, or pad it."""
    source, rank = node.inputs[0], node.output.rank
    assert source is not None
    if source.hint is None or node.output.hint is None or rank is None:
        return None
    before, after = source.hint, node.output.hint
    if node.op == "transpose":
        return Moments(x.mean, x.cov, list(node.attrs["perm"]).index(x.axis), x.measured)
    if node.op in ("mean", "squeeze", "unsqueeze", "reshape", "flatten"):
        if node.op == "mean" and x.axis in node.attrs["axes"]:
            return None
        # The channel axis keeps its place and length, and what is left of the others lies after it or is gone.
        same = len(after) > x.axis and after[: x.axis + 1] == before[: x.axis + 1]
        last = node.op == "reshape" and x.axis == len(before) - 1 and after[-1] == before[-1]
        if last and not same:
            return Moments(x.mean, x.cov, rank - 1, x.measured)
        return x if same and math.prod(before[x.axis + 1 :]) >= math.prod(after[x.axis + 1 :]) else None
    if node.op == "slice":
        for axis, start, end, step in zip(*(node.attrs[k] for k in ("axes", "starts", "ends", "steps")), strict=True):
            if axis == x.axis:
                keep = torch.arange(before[axis])[slice(start, end, step)]
                x = Moments(x.mean[keep], x.cov[keep][:, keep], axis, x.measured)
        return x
    if node.op == "pad" and node.attrs["mode"] == "constant" and not node.attrs.get("value"):
        low, high = node.attrs["pads"][x.axis]
        return Moments(F.pad(x.mean, (low, high)), F.pad(x.cov, (low, high, low, high)), x.axis, x.measured)
    return None
