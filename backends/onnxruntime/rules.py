"""Rules for ONNX Runtime's CPU provider on quantized files: what it miscompiles, leaves in float, or slows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...graph.ir import Graph
from ...passes.quantize.spec import BackendSpec
from ..base import Diagnostic, renamed
from ..rules.onnx_file import OnnxFile, name_of
from ..rules.qdq import PRODUCTS, Q, dequantizer, is_op, pairs, readers, stored
from ..rules.rule import Finder, Hit, Rule, Where, run_rules
from ..rules.validity import zero_shape
from .flow import Fusion, bias_scale_fits, fusion, wrong_axis
from .rules_cuda import RULES as CUDA_RULES

JOINS = ("Add", "Mul", "Concat", "GlobalAveragePool", "AveragePool")


def check_graph(graph: Graph, spec: BackendSpec) -> list[Diagnostic]:
    """The rules on the file that a graph would be lowered to."""
    from .backend import onnx_model

    if not any(node.op in ("quantize", "dequantize") for node in graph.nodes):
        return []
    model, _ = onnx_model(graph)
    return renamed(check_file(OnnxFile(model), spec.name), graph)


def check_file(file: OnnxFile, target: str = "onnxruntime-cpu") -> list[Diagnostic]:
    """The rules on a file. ``target`` tells the provider and the instruction set (``onnxruntime-cpu-avx2``)."""
    if "cuda" in target:
        return run_rules(CUDA_RULES, Where(file))
    return run_rules(RULES, Where(file, {"arm": "arm" in target, "vnni": "avx2" not in target}))


def _products(where: Where, *reasons: str) -> Iterator[tuple[str, Fusion]]:
    for node in where.file.of(*PRODUCTS):
        found = fusion(where.file, node, bool(where.options.get("arm")))
        if found is not None and found.reason in reasons:
            yield name_of(node), found


def _said(*reasons: str) -> Finder:
    def find(where: Where) -> Iterator[Hit]:
        for name, found in _products(where, *reasons):
            yield name, found.details

    return find


def _weight_axis(where: Where) -> Iterator[Hit]:
    for node in where.file.of(*PRODUCTS):
        found = fusion(where.file, node, bool(where.options.get("arm")))
        axis = None if found is None or found.w is None else wrong_axis(where.file, node, found.w)
        if axis is not None and found is not None and found.x is not None:
            yield name_of(node), f"they lie on axis {axis}"


def _bias_scale(where: Where) -> Iterator[Hit]:
    for node in where.file.of("Gemm"):
        found = fusion(where.file, node, bool(where.options.get("arm")))
        bias = dequantizer(where.file, node.inputs[2]) if len(node.inputs) > 2 else None
        if bias is None or found is None or not found.integer or found.x is None or found.w is None:
            continue
        if not bias_scale_fits(bias, found.x, found.w):
            yield name_of(node), "the kernel ignores it"


def _unsigned_weights(where: Where) -> Iterator[Hit]:
    if where.options.get("arm"):
        return
    for name, found in _products(where, ""):
        if found.w is not None and found.x is not None and found.w.dtype == "uint8" and stored(where.file, found.w):
            yield name, "its weight is uint8"


def _saturation(where: Where) -> Iterator[Hit]:
    if where.options.get("vnni", True) or where.options.get("arm"):
        return
    for name, found in _products(where, ""):
        data = None if found.w is None or found.x is None else where.file.const(found.w.data)
        if data is None or data.dtype != np.int8:
            continue
        peak = int(np.abs(data.astype(np.int16)).max(initial=0))
        if peak > 64:
            yield name, f"its weights reach {peak}"


def _zero_point(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        if pair.zero is None and pair.quantizes and pair.dtype == "uint8":
            yield pair.name, "none is written"


def _joins(where: Where) -> Iterator[Hit]:
    """Sums and pools of dequantized values whose result nobody quantizes, or something reads past the Q."""
    for node in where.file.of(*JOINS):
        moving = [v for v in node.inputs if v is not None and not where.file.is_static(v)]
        parts = [dequantizer(where.file, v) for v in moving]
        if not moving or len(moving) != len([v for v in node.inputs if v is not None]) or None in parts:
            continue
        if any(p is not None and stored(where.file, p) for p in parts):
            continue
        result = node.outputs[0]
        users = readers(result)
        if any(is_op(n, Q) for n in users):
            past = [name_of(n) for n in users if not is_op(n, Q)]
            if past or result.is_graph_output():
                yield (
                    name_of(node),
                    f"{past[0] if past else 'the graph output'} reads its result past the QuantizeLinear",
                )


RULES: tuple[Rule, ...] = (
    Rule(
        "float8",
        "error",
        "float8 around a product makes ONNX Runtime build an invalid graph, which it refuses",
        "use uint8 activations and int8 weights",
        _said("float8"),
    ),
    Rule(
        "zero-point-shape",
        "error",
        "zero points must be as many as scales",
        "give each scale a zero point",
        zero_shape,
        "zero_points",
    ),
    Rule(
        "weight-axis",
        "silently wrong",
        "scales off the output channels are read as scales of output channels",
        "quantize the weight per output channel",
        _weight_axis,
        "weight_axis",
    ),
    Rule(
        "bias-scale",
        "silently wrong",
        "a Gemm's bias must have activation scale times weight scale",
        "requantize the bias with that scale",
        _bias_scale,
        "bias_scale",
    ),
    Rule(
        "saturation",
        "silently wrong",
        "without VNNI, products of uint8 and int8 are added in 16 bits, which saturates beyond 7-bit weights",
        "quantize weights to -64..64 (target onnxruntime-cpu-avx2)",
        _saturation,
    ),
    Rule(
        "weight-float",
        "inaccurate",
        "a float weight under a quantized activation",
        "quantize the weight per output channel",
        _said("weight-float"),
        "quantize_weights",
    ),
    Rule(
        "activation-type",
        "slow",
        "int8 activations become uint8 where one node reads them; elsewhere the product stays in float (x86)",
        "quantize activations as asymmetric uint8",
        _said("int8"),
        "uint8",
    ),
    Rule(
        "input-q",
        "slow",
        "a product computes in float unless activation and weight are quantized",
        "quantize both, or neither",
        _said("input"),
    ),
    Rule(
        "output-q",
        "slow",
        "a convolution without a Q on its result is not fused into an integer kernel",
        "insert a Q/DQ pair on its result",
        _said("output-q"),
    ),
    Rule(
        "fan-out",
        "slow",
        "a result that something reads past its QuantizeLinear is not fused into an integer kernel",
        "let every reader take the dequantized value",
        _said("fan-out"),
        "single_reader",
    ),
    Rule(
        "relu-zero-point",
        "slow",
        "Relu or Clip between a product and its Q stays, and keeps it in float, unless the integers cut alike",
        "quantize its result asymmetrically, so that the least integer stands for 0",
        _said("relu"),
        "uint8",
    ),
    Rule(
        "bias-type",
        "slow",
        "a bias that is not int32 keeps the product in float",
        "store it as int32",
        _said("bias"),
        "int32_bias",
    ),
    Rule(
        "bias-scale-conv",
        "slow",
        "a convolution's int32 bias off the accumulator's scale keeps it in float",
        "requantize the bias with activation scale times weight scale",
        _said("bias-scale"),
        "bias_scale",
    ),
    Rule(
        "activation-axis",
        "slow",
        "an activation with a scale per channel keeps the product in float",
        "one scale per activation",
        _said("activation-axis"),
        "per_tensor",
    ),
    Rule(
        "dynamic-scale",
        "slow",
        "a scale computed at run time keeps a product with a bias in float",
        "calibrate, and store the scale",
        _said("dynamic"),
    ),
    Rule(
        "type",
        "slow",
        "no integer kernel for these types; it dequantizes in every run",
        "uint8 activations and int8 weights",
        _said("type"),
    ),
    Rule("alpha", "slow", "a Gemm that scales stays in float", "fold alpha and beta into the weight", _said("alpha")),
    Rule(
        "transposed-conv",
        "slow",
        "a transposed convolution dequantizes in every run",
        "keep it in float",
        _said("transposed"),
        "strip_float",
    ),
    Rule(
        "weight-type",
        "slow",
        "uint8 weights run at half the speed of int8 ones (VNNI)",
        "store weights as symmetric int8",
        _unsigned_weights,
        "int8_weights",
    ),
    Rule(
        "join-fan-out",
        "slow",
        "a sum, concatenation or pool whose result is read past its Q stays in float",
        "let every reader take the dequantized value",
        _joins,
        "single_reader",
    ),
    Rule(
        "zero-point",
        "slow",
        "a QuantizeLinear without zero point means uint8",
        "write the zero point, also where it is 0",
        _zero_point,
        "zero_points",
        severity="info",
    ),
)
