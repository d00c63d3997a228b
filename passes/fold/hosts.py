"""A convolution or linear that takes over a new kernel: which one can, and how the numbers are written into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...graph.ir import Graph, Node, Value, Weight
from ..rewrite import Refusal, Why
from .absorb import Absorbed, write
from .chains import WEIGHTED, Link
from .kernels import Form, Kernel
from .operands import BiasSlot, bias_slot, inputs_first, stored_weight


@dataclass(eq=False)
class Host:
    """The operator that is to hold a merged kernel.

    Attributes:
        node: the operator.
        weight: its weight, which nothing else uses.
        slot: where its bias is or goes.
    """

    node: Node
    weight: Weight
    slot: BiasSlot


def host_among(links: Sequence[Link], window: Sequence[Node], outputs: int) -> Host | Refusal | None:
    """The operator with the largest weight that may be changed; None where there is no convolution or linear.

    A linear must write ``outputs`` channels already: an addition may have to hold its bias.
    """
    refused: Refusal | None = None
    for item in sorted((x for x in links if x.node.op in WEIGHTED), key=lambda x: -x.form.size):
        if item.node.op == "linear" and item.form.outputs != outputs:
            continue
        stored = stored_weight(item.node)
        if not isinstance(stored, Weight):
            refused = refused or Refusal(stored.reason, stored.node, Why.TIED)
            continue
        slot = bias_slot(item.node, item.form.outputs)
        alpha = float(item.node.attrs.get("alpha", 1.0))
        if not isinstance(slot, BiasSlot) or alpha == 0.0:
            refused = refused or Refusal(f"the bias of {item.node.name} cannot be changed", item.node.name)
            continue
        if slot.holder is not item.node and slot.holder not in window:
            slot = BiasSlot(item.node, 2, item.node.input(2))
        return Host(item.node, stored, slot)
    return refused


def written_form(form: Form, graph: Graph) -> Form:
    """The form as the graph can spell it: torch pads both sides of an axis alike, so zeros join the taps."""
    if graph.kind != "fx":
        return form
    return replace(form, axes=tuple(axis.balanced() for axis in form.axes))


def prepare(host: Host, kernel: Kernel) -> Absorbed | Refusal:
    """The numbers in the layout in which ``host`` stores them; nothing is written yet."""
    node = host.node
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    beta = beta if host.slot.holder is node and beta != 0.0 else 1.0
    weight = kernel.weight / alpha
    bias = None if kernel.bias is None else kernel.bias / beta
    new = Absorbed(node, host.weight, host.slot, weight.T if inputs_first(node) else weight, bias)
    if not new.fits():
        return Refusal(f"the merged weight of {node.name} does not fit its dtype", node.name, Why.RANGE)
    return new


def take_over(graph: Graph, new: Absorbed, form: Form, source: Value, like: Value) -> Value:
    """Let the host compute ``new`` on ``source``; returns the value that holds the result, shaped as ``like`` is."""
    node, slot = new.node, new.slot
    if node.op == "conv":
        wanted = {
            "stride": [axis.stride for axis in form.axes],
            "padding": [axis.padding for axis in form.axes],
            "dilation": [axis.step for axis in form.axes],
            "groups": form.groups,
        }
        changed = {key: value for key, value in wanted.items() if node.attrs[key] != value}
        if changed:
            graph.set_attr(node, **changed)
    if node.inputs[0] is not source:
        graph.set_input(node, 0, source)
    if node.attrs.get("beta") == 0.0:
        graph.set_attr(node, beta=1.0)
    stale = node.output.shape != like.shape
    write(graph, new)
    if stale:
        graph.refresh()
    if new.bias is None:
        return node.output
    if slot.holder is not node:
        return slot.holder.output
    if node.input(2) is None:  # a plain matrix product has no bias operand: an addition stands behind it now
        return node.output.uses[0][0].output
    return node.output


def insert_kernel(graph: Graph, model: Node, source: Value, kernel: Kernel, after: Node | None = None) -> Node:
    """A new operator of the kind of ``model`` (convolution or linear, its dtype, its scope) that computes ``kernel``.

    It stands right behind ``model``, or behind ``after``. Returns the node whose output holds the result.
    """
    held = model.inputs[1]
    assert held is not None and held.weight is not None
    stored, form = held.weight, kernel.form
    dtype = stored.numpy().dtype
    stem = stored.name.removesuffix("weight")
    weight, attrs = kernel.weight, dict[str, object]()
    if model.op == "conv":
        attrs = {
            "stride": [axis.stride for axis in form.axes],
            "padding": [axis.padding for axis in form.axes],
            "dilation": [axis.step for axis in form.axes],
            "groups": form.groups,
        }
    else:  # torch adds a bias to x of any rank only with [out, in]; an ONNX product of tensors wants [in, out]
        attrs = {"transposed_weight": graph.kind != "fx"}
        weight = weight.T if attrs["transposed_weight"] else weight
    operands = [source, graph.add_weight(f"{stem}wide_weight", weight.astype(dtype), trainable=stored.trainable)]
    if kernel.bias is not None:
        operands.append(graph.add_weight(f"{stem}wide_bias", kernel.bias.astype(dtype), trainable=stored.trainable))
    return graph.insert(
        model.op, operands, attrs, name=f"{model.name}_wide", after=model if after is None else after, scope=model.scope
    )
