"""Rules of the rest: quantization nodes, constant factories, shape readers, control flow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ir import Node
from ..space import fresh
from .shaping import new_shape
from .table import rule

if TYPE_CHECKING:
    from ..analysis import Analysis


@rule("quantize", "dequantize", "fake_quantize")
def _quantize(an: Analysis, node: Node) -> None:
    x, *parameters = node.inputs
    assert x is not None
    spaces, axis = list(an.of(x)), node.attrs.get("axis")
    for v in parameters:
        if v is None:
            continue
        own = an.of(v)
        if len(own) == 1 and own[0].size > 1 and axis is not None:
            spaces[axis] = an.tie(spaces[axis], own[0], node)
            an.role(v, 0, 0, node, stat=True)  # a scale of zero would be no mask but a division by zero
        elif len(own) > 1:
            for i, e in enumerate(own):
                if e.size == spaces[i].size:
                    spaces[i] = an.tie(spaces[i], e, node)
                else:
                    an.freeze([spaces[i], e], "quantized in blocks", node)
    an.no_scale(spaces, node, "rounding does not commute with scaling")
    an.set(node.output, spaces, an.zeros(x))
    an.keep_root(x, node.output, list(range(len(spaces))))


@rule("full", update=new_shape)
def _full(an: Analysis, node: Node) -> None:
    out = node.output
    assert out.hint is not None
    shape = node.attrs.get("shape")
    spaces = []
    for i, n in enumerate(out.hint):
        dynamic = shape is None or not isinstance(shape[i], int)
        spaces.append(an.frozen(n, "length computed at run time", node) if dynamic else fresh(n))
    zero = node.attrs.get("value") == 0
    if not zero:
        an.no_scale(spaces, node, "filled with a value that does not scale")
    an.set(out, spaces, zero)


@rule("full_like")
def _full_like(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None
    zero = node.attrs.get("value") == 0
    if not zero:
        an.no_scale(an.of(x), node, "filled with a value that does not scale")
    an.set(node.output, an.of(x), zero)


@rule("arange")
def _arange(an: Analysis, node: Node) -> None:
    assert node.output.hint is not None
    an.set(node.output, [an.frozen(n, "positions", node) for n in node.output.hint])


@rule("shape_of")
def _shape_of(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None
    spaces = an.of(x)
    axes = node.attrs.get("axes")
    read = [spaces[a] for a in (range(len(spaces)) if axes is None else axes)]
    for v in node.outputs:
        an.sizes_read[v] = read
        if v.hint is not None:
            an.set(v, [an.frozen(n, "rank of a tensor", node) for n in v.hint])


@rule("scalar")
def _scalar(an: Analysis, node: Node) -> None:
    read = [e for v in node.inputs if v is not None for e in an.sizes_read.get(v, ())]
    for v in node.outputs:
        if read:
            an.sizes_read[v] = read
        if v.hint is not None:
            an.set(v, [an.frozen(n, "shape arithmetic", node) for n in v.hint])
    if any(v.dtype.startswith(("float", "bfloat")) for v in node.outputs):
        an.freeze(read, "its length is used as a number at run time", node)


@rule("if", "loop", "scan")
def _control(an: Analysis, node: Node) -> None:
    an.block(node, f"enters the body of {node.op}")


@rule("random", "opaque", "split_to_sequence", "sequence_at")
def _opaque(an: Analysis, node: Node) -> None:
    an.block(node, f"no rule for {node.origin or node.op}")
