"""Weight-only quantized copies of a graph, for tests of what comes after quantization."""

from __future__ import annotations

from foldline.graph.ir import Graph
from foldline.passes.quantize.choices import narrowed
from foldline.passes.quantize.sensitivity.layers import layers
from foldline.passes.quantize.spec import TensorFormat

WEIGHTS = TensorFormat("int8", symmetric=True, granularity="out_channel")

STORED = ("int16",)


def weights_as_integers(graph: Graph, bits: int, form: TensorFormat = WEIGHTS) -> Graph:
    """A copy whose layers read dequantized integers, rounded to the nearest; activations and biases stay float."""
    copy = graph.clone()
    for layer in layers(copy):
        params = layer.params(narrowed(form, bits, STORED))
        name = layer.weight.name
        stored = copy.add_weight(f"{name}_quantized", params.quantize(layer.data()))
        scale = copy.add_weight(f"{name}_scale", params.scale)
        zero = copy.add_weight(f"{name}_zero_point", params.zero_point)
        attrs = {"axis": params.axis, "dtype": "float32", "block": params.block}
        made = copy.insert("dequantize", [stored, scale, zero], attrs, name=f"{name}_dequantize", after=None)
        for node in layer.nodes:
            position = next(i for i, v in enumerate(node.inputs) if v is layer.value)
            copy.set_input(node, position, made.output)
    copy.refresh()
    return copy
