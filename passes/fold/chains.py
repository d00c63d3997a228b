"""Nodes read as kernels: which of them are linear operators, and the chain of such operators that makes a value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...graph.ir import Node, Value, Weight
from ..rewrite import Env, Refusal, Why
from .affine import Affine
from .kernels import Form, Kernel, Taps, chain, chain_form, channelwise, taps
from .operands import FLOATS, channels, groups, inputs_first, spatial
from .sources import affine_of_norm

WEIGHTED = ("conv", "linear")
SUMS = ("add", "sub")


@dataclass(eq=False)
class Link:
    """One node of a chain as a linear operator on its data operand.

    Attributes:
        source: the data operand.
        load: reads the numbers; the form is known without them.
        weight: the tensor a convolution or linear stores, None for other ops.
        work: multiply-accumulates at the hint shapes, an average or a scale counted like a depthwise convolution.
    """

    node: Node
    source: Value
    form: Form
    load: Callable[[], Kernel]
    weight: Weight | None = None

    @property
    def work(self) -> int:
        return self.form.size * positions(self.node.output, self.form.outputs)

    @property
    def stored(self) -> int:
        return self.form.size if self.weight is not None else 0


def positions(value: Value, outputs: int) -> int:
    """How many output vectors a value holds at its hint shape."""
    assert value.hint is not None
    return math.prod(value.hint) // max(outputs, 1)


def data_operand(node: Node) -> Value | None:
    """The operand on which a node acts linearly (up to a constant), None for a node that is no such operator."""
    if node.op in ("conv", "linear", "avg_pool", "batch_norm", "neg", "identity", "pad"):
        return node.inputs[0] if node.inputs else None
    if node.op in ("mul", "add", "sub", "div") and len(node.inputs) == 2:
        left, right = node.inputs
        if left is None or right is None or left.is_const == right.is_const:
            return None
        if right.is_const:
            return left
        return right if node.op != "div" else None
    return None


def spatial_axes(node: Node) -> int | None:
    """Number of spatial axes of a node that has an opinion on it."""
    if node.op == "linear":
        return 0
    if node.op == "conv":
        return spatial(node)
    return len(node.attrs["kernel"]) if node.op == "avg_pool" else None


def walk(value: Value, reader: Node, env: Env) -> Iterator[Node]:
    """The nodes that make ``value`` by linear operators alone, nearest first, each read by the next one alone."""
    axes: int | None = None
    while value.producer is not None and env.sole_reader(value, reader) is None:
        if any(user is not reader for user, _ in value.uses):
            break  # its size is read: it would have to stay
        node = value.producer
        source = data_operand(node)
        own = spatial_axes(node)
        if source is None or len(node.outputs) > 1 and node.op != "batch_norm":
            break
        if own is not None and axes is not None and own != axes:
            break
        axes = axes if own is None else own
        yield node
        value, reader = source, node


# ---- one node ----------------------------------------------------------------------------------------------------
def link(node: Node, axes: int) -> Link | Refusal:
    """``node`` as a linear operator over ``axes`` spatial axes (0: on the last axis)."""
    source = data_operand(node)
    if source is None:
        return Refusal(f"{node.name} is no linear operator", node.name, Why.COMMUTE)
    if source.dtype != node.output.dtype or source.dtype not in FLOATS:
        return Refusal(f"{node.name} computes in {node.output.dtype}", node.name, Why.DTYPE)
    if source.rank is None or source.rank <= axes or node.output.hint is None:
        return Refusal(f"the shapes at {node.name} are unknown", node.name, Why.SHAPE)
    if node.op in WEIGHTED:
        return _weighted(node, source, axes)
    assert source.shape is not None
    axis = source.rank - 1 - axes
    size = source.shape[axis]
    if not isinstance(size, int):
        return Refusal(f"the number of channels of {source.name} varies", node.name, Why.SHAPE)
    if node.op == "avg_pool":
        return _pool(node, source, axes, size)
    if node.op == "pad":
        return _pad(node, source, axes, size)
    if node.op == "batch_norm":
        affine = affine_of_norm(node)
        if not isinstance(affine, Affine):
            return affine
        vector = affine.vector(axis, size)
        if vector is None:
            return Refusal(f"{node.name} acts on another axis", node.name, Why.SHAPE)
        kernel = channelwise(vector[0], vector[1] if affine.has_shift else None, axes)
        return Link(node, source, kernel.form, lambda: kernel)
    return _elementwise(node, source, axes, axis, size)


def _weighted(node: Node, source: Value, axes: int) -> Link | Refusal:
    held = node.input(1)
    if held is None or held.weight is None:
        return Refusal(f"the weight of {node.name} is computed at run time", node.name, Why.NOT_CONSTANT)
    weight = held.weight
    if weight.dtype != source.dtype:
        return Refusal(f"the weight of {node.name} is stored as {weight.dtype}", node.name, Why.DTYPE)
    bias = node.input(2)
    ins, outs = channels(node, weight.shape)
    if bias is not None and (bias.const() is None or math.prod(bias.hint or ()) not in (1, outs)):
        return Refusal(f"the bias of {node.name} is no constant per channel", node.name, Why.NOT_CONSTANT)
    windows: tuple[Taps, ...] = ()
    if node.op == "conv":
        a = node.attrs
        if a.get("transposed"):
            return Refusal(f"{node.name} is transposed", node.name, Why.OTHER)
        if _size_dependent(node, source):
            return Refusal(f"the padding of {node.name} follows a size that varies", node.name, Why.SHAPE)
        sizes = zip(weight.shape[2:], a["stride"], a["padding"], a["dilation"], strict=True)
        windows = tuple(taps(k, s, (int(p[0]), int(p[1])), d) for k, s, p, d in sizes)
        if any(min(window.padding) < 0 for window in windows):
            return Refusal(f"{node.name} crops its input", node.name, Why.BORDER)
    form = Form(ins, outs, groups(node), windows, bias is not None)
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))

    def load() -> Kernel:
        data = weight.numpy().astype(np.float64)
        data = data.T if inputs_first(node) else data
        if alpha != 1.0:
            data = alpha * data
        constant = None if bias is None else bias.const()
        if constant is None:
            return Kernel(form, data)
        return Kernel(form, data, beta * np.broadcast_to(constant.astype(np.float64).reshape(-1), (outs,)))

    return Link(node, source, form, load, weight)


def _size_dependent(node: Node, source: Value) -> bool:
    """Whether an ONNX auto_pad makes padding out of a size that is known at run time only."""
    attributes = getattr(node.native, "attributes", None)
    auto = attributes.get("auto_pad") if attributes is not None else None
    if auto is None or auto.value in ("NOTSET", "VALID") or source.shape is None:
        return False
    strided = zip(source.shape[-spatial(node) :], node.attrs["stride"], strict=True)
    return any(step != 1 and not isinstance(size, int) for size, step in strided)


def _pool(node: Node, source: Value, axes: int, size: int) -> Link | Refusal:
    a = node.attrs
    dilation = a.get("dilation") or [1] * axes
    windows = tuple(
        taps(k, s, (int(p[0]), int(p[1])), d)
        for k, s, p, d in zip(a["kernel"], a["stride"], a["padding"], dilation, strict=True)
    )
    padded = any(any(window.padding) for window in windows)
    if padded and not a.get("count_include_pad"):
        return Refusal(f"{node.name} averages fewer inputs at the border", node.name, Why.BORDER)
    if _size_dependent_pool(node, source, windows):
        return Refusal(f"{node.name} rounds its size up: its last window may be cut off", node.name, Why.BORDER)
    form = Form(size, size, size, windows, False)
    share = 1.0 / math.prod(a["kernel"])
    return Link(node, source, form, lambda: Kernel(form, np.full(form.shape, share)))


def _pad(node: Node, source: Value, axes: int, size: int) -> Link | Refusal:
    pads = node.attrs.get("pads")
    if node.attrs.get("mode", "constant") != "constant" or node.attrs.get("value") not in (0, None) or pads is None:
        return Refusal(f"{node.name} pads with something else than zeros", node.name, Why.BORDER)
    lows = [-1 if pad is None or None in pad else min(pad) for pad in pads]
    if len(node.inputs) > 1 or min(lows) < 0 or any(any(pad) for pad in pads[: len(pads) - axes]):
        return Refusal(f"{node.name} pads other axes, or crops", node.name, Why.BORDER)
    windows = tuple(taps(1, 1, (int(low), int(high)), 1) for low, high in pads[len(pads) - axes :])
    form = Form(size, size, size, windows, False)
    return Link(node, source, form, lambda: Kernel(form, np.ones(form.shape)))


def _size_dependent_pool(node: Node, source: Value, windows: Sequence[Taps]) -> bool:
    attributes = getattr(node.native, "attributes", None)
    auto = attributes.get("auto_pad") if attributes is not None else None
    made_up = auto is not None and auto.value not in ("NOTSET", "VALID")
    if not node.attrs.get("ceil") and not made_up:
        return False
    if source.shape is None or node.output.shape is None:
        return True
    sizes = zip(source.shape[-len(windows) :], node.output.shape[-len(windows) :], windows, strict=True)
    return any(not isinstance(before, int) or window.outputs(before) != after for before, after, window in sizes)


def _elementwise(node: Node, source: Value, axes: int, axis: int, size: int) -> Link | Refusal:
    if node.op in ("identity", "neg"):
        kernel = channelwise(np.full(size, -1.0 if node.op == "neg" else 1.0), None, axes)
        return Link(node, source, kernel.form, lambda: kernel)
    position = next(i for i, operand in enumerate(node.inputs) if operand is not source)
    other = node.inputs[position]
    assert other is not None and source.rank is not None
    shape = other.shape
    if shape is None or len(shape) > source.rank:
        return Refusal(f"{node.name} broadcasts its operand", node.name, Why.SHAPE)
    aligned = (1,) * (source.rank - len(shape)) + tuple(shape)
    if any(length != 1 and (i != axis or length != size) for i, length in enumerate(aligned)):
        return Refusal(f"{node.name} does not act per channel", node.name, Why.SHAPE)
    data = other.const()
    assert data is not None
    vector = np.broadcast_to(np.asarray(data).astype(np.float64).reshape(-1), (size,))
    alpha = float(node.attrs.get("alpha", 1))
    one = np.ones(size)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale, shift = {
            "mul": (vector, None),
            "div": (1.0 / vector, None),
            "add": (one, alpha * vector) if position else (alpha * one, vector),
            "sub": (one, -alpha * vector) if position else (-alpha * one, vector),
        }[node.op]
    if not np.isfinite(scale).all() or shift is not None and not np.isfinite(shift).all():
        return Refusal(f"the constant of {node.name} is not finite", node.name, Why.RANGE)
    kernel = channelwise(scale, shift, axes)
    return Link(node, source, kernel.form, lambda: kernel)


# ---- a chain -----------------------------------------------------------------------------------------------------
@dataclass(eq=False)
class Chain:
    """Linear operators one behind the other, nearest to the result first; none of them is the identity.

    Attributes:
        form: form of the whole.
    """

    links: list[Link]
    form: Form

    @property
    def nodes(self) -> list[Node]:
        return [item.node for item in self.links]

    @property
    def work(self) -> int:
        return sum(item.work for item in self.links)

    @property
    def stored(self) -> int:
        return sum(item.stored for item in self.links)

    def load(self) -> Kernel:
        """The kernel of the whole, in float64."""
        if not self.links:
            return channelwise(np.ones(self.form.outputs), None, len(self.form.axes))
        made = self.links[-1].load()
        for item in reversed(self.links[:-1]):
            form = chain_form(item.form, made.form)
            assert isinstance(form, Form)
            made = chain(item.load(), made, form)
        return made


def chain_of(nodes: Sequence[Node], source: Value, axes: int) -> Chain | Refusal:
    """The nodes that :func:`walk` gave, as far as ``source``, as one linear operator on ``source``."""
    links: list[Link] = []
    for node in nodes:
        found = link(node, axes)
        if isinstance(found, Refusal):
            return found
        links.append(found)
    if not links:
        if source.rank is None or source.rank <= axes or source.shape is None:
            return Refusal(f"the shape of {source.name} is unknown", why=Why.SHAPE)
        size = source.shape[source.rank - 1 - axes]
        if not isinstance(size, int):
            return Refusal(f"the number of channels of {source.name} varies", why=Why.SHAPE)
        return Chain([], channelwise(np.ones(size), None, axes).form)
    form = links[-1].form
    for item in reversed(links[:-1]):
        longer = chain_form(item.form, form)
        if isinstance(longer, str):
            return Refusal(f"{item.node.name}: {longer}", item.node.name, Why.BORDER)
        form = longer
    return Chain(links, form)
