"""Static rules for quantized graphs on ONNX Runtime's CPU provider: what it miscompiles, leaves in float, or slows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ...graph.ir import Graph, Node, Value
from ...passes.quantize.placement import output_axis, result
from ...passes.quantize.spec import BackendSpec, OpPlacement
from ..base import Diagnostic

Rule = Callable[[Node, OpPlacement, BackendSpec], Iterator[Diagnostic]]
Found = Iterator[Diagnostic]


def check_graph(graph: Graph, spec: BackendSpec) -> list[Diagnostic]:
    """Every rule on every node that the spec would compute in integers; nothing is said about float graphs."""
    found: list[Diagnostic] = []
    for node in graph.nodes:
        if node.op in ("quantize", "dequantize"):
            found += _zero_point(node)
            continue
        placement, _ = spec.placement(node)
        if placement is None or placement.role != "anchor":
            continue
        for rule in ANCHOR_RULES:
            found += rule(node, placement, spec)
    return found


def dequantized(value: Value | None) -> Node | None:
    """The dequantize node behind an operand, if any."""
    node = None if value is None else value.producer
    return node if node is not None and node.op == "dequantize" else None


def _stored_dtype(dq: Node) -> str:
    stored = dq.inputs[0]
    return "" if stored is None else stored.dtype


def _quantized(node: Node, rule: OpPlacement) -> tuple[Node | None, Node | None]:
    """Dequantize nodes of the activation and of the weight."""
    return dequantized(node.input((rule.data or (0,))[0])), dequantized(node.input(rule.weight or 1))


def activation_type(node: Node, rule: OpPlacement, spec: BackendSpec) -> Found:
    """int8 activations: most kernels exist, but few patterns fuse, and they run slower than float."""
    x, w = _quantized(node, rule)
    if x is not None and w is not None and _stored_dtype(x) != spec.activations.dtype:
        yield Diagnostic(
            "activation-type",
            "warning",
            node.name,
            f"activations are {_stored_dtype(x)}; this target is fast with {spec.activations.dtype} only",
            f"quantize activations as asymmetric {spec.activations.dtype} (P.Quantize(target={spec.name!r}))",
        )


def weight_type(node: Node, rule: OpPlacement, spec: BackendSpec) -> Found:
    """uint8 weights with uint8 activations run at half the speed of int8 weights."""
    x, w = _quantized(node, rule)
    if x is not None and w is not None and _stored_dtype(w) != spec.weights.dtype:
        yield Diagnostic(
            "weight-type",
            "warning",
            node.name,
            f"weights are {_stored_dtype(w)}; {spec.weights.dtype} ones are twice as fast",
            f"store weights as symmetric {spec.weights.dtype}",
        )


def weight_axis(node: Node, rule: OpPlacement, spec: BackendSpec) -> Found:
    """A per-channel scale off the output-channel axis: wrong results without a word when the weight is square."""
    _, w = _quantized(node, rule)
    if w is None:
        return
    axis, scale = w.attrs.get("axis"), w.inputs[1]
    wanted = output_axis(node)
    if axis is None or axis == wanted or scale is None or (scale.hint is not None and int(np.prod(scale.hint)) == 1):
        return
    yield Diagnostic(
        "weight-axis",
        "error",
        node.name,
        f"the weight's scales lie on axis {axis}; the kernel reads them as scales of output channels (axis {wanted})",
        f"quantize the weight along axis {wanted}",
    )


def input_missing(node: Node, rule: OpPlacement, spec: BackendSpec) -> Found:
    """A quantized weight under a float activation is dequantized in every run."""
    x, w = _quantized(node, rule)
    if w is not None and x is None:
        yield Diagnostic(
            "input-q",
            "warning",
            node.name,
            "the weight is quantized and the activation is not: it computes in float, dequantizing first",
            "quantize the activation too, or keep the weight in float",
        )


def output_missing(node: Node, rule: OpPlacement, spec: BackendSpec) -> Found:
    """A convolution without Q on its output stays a float convolution between DQ nodes."""
    x, w = _quantized(node, rule)
    if rule.output != "required" or x is None or w is None:
        return
    end = result(node, rule)
    readers = [user for user, _ in end.uses]
    pairs = [user for user in readers if user.op == "quantize"]
    if not pairs:
        yield Diagnostic(
            "output-q",
            "warning",
            node.name,
            "no QuantizeLinear reads its result, so it is not fused into an integer kernel",
            "insert a Q/DQ pair on its output",
        )
    elif len(readers) > len(pairs) or end.is_output:
        others = [user.name for user in readers if user.op != "quantize"] or ["a graph output"]
        yield Diagnostic(
            "fan-out",
            "warning",
            node.name,
            f"{', '.join(others[:3])} reads its result past the QuantizeLinear, which prevents the integer kernel",
            "let every consumer read the DequantizeLinear",
        )


def bias_type(node: Node, rule: OpPlacement, spec: BackendSpec) -> Found:
    """The kernel adds an int32 bias on the accumulator's scale; any other bias prevents it or is read wrongly."""
    x, w = _quantized(node, rule)
    bias = node.input(rule.bias) if rule.bias is not None else None
    if bias is None or rule.bias_dtype != "int32" or x is None or w is None:
        return
    dq = dequantized(bias)
    if dq is None or _stored_dtype(dq) != "int32":
        yield Diagnostic(
            "bias-type",
            "warning",
            node.name,
            "its bias is not int32, so it is not fused into an integer kernel",
            "store it as int32 with scale = activation scale times weight scale",
        )
        return
    scales = [v.const() if v is not None else None for v in (x.inputs[1], w.inputs[1], dq.inputs[1])]
    if any(s is None for s in scales):
        return
    xs, ws, bs = (np.asarray(s, np.float64).reshape(-1) for s in scales)
    if not np.allclose(bs, xs * ws, rtol=1e-3):
        yield Diagnostic(
            "bias-scale",
            "error",
            node.name,
            "the bias scale is not activation scale times weight scale; the kernel ignores it and assumes that",
            "requantize the bias with that scale",
        )


def _zero_point(node: Node) -> Found:
    if node.input(2) is None:
        yield Diagnostic(
            "zero-point",
            "warning",
            node.name,
            f"{node.op} has no zero point: the type defaults to uint8 and the fusions look for one",
            "write the zero point, also where it is 0",
        )


ANCHOR_RULES: tuple[Rule, ...] = (
    activation_type,
    weight_type,
    weight_axis,
    input_missing,
    output_missing,
    bias_type,
)
