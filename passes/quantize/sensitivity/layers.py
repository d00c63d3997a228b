"""What can be given bits of its own: the stored weights of a graph's layers, with formats of any width."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ....graph.errors import ConstraintError
from ....graph.ir import Graph, Node, Value, Weight
from ..numerics import QuantParams, weight_params
from ..spec.formats import BITS, LIMITS, TensorFormat

OPS = ("conv", "linear", "matmul")


@dataclass
class Layer:
    """A stored weight and the layers that read it (several where it is tied: they share its bits).

    Attributes:
        name: of the first layer's node.
        axis, in_axis: output- and input-channel axes of the weight.
    """

    name: str
    weight: Weight
    value: Value
    nodes: list[Node] = field(default_factory=list)
    axis: int = 0
    in_axis: int = 1

    @property
    def scope(self) -> str:
        return self.nodes[0].scope or self.name

    def params(self, form: TensorFormat) -> QuantParams:
        """The grid that covers the whole weight."""
        return weight_params(self.data(), self.axis, form, in_axis=self.in_axis)

    def data(self) -> np.ndarray:
        return np.asarray(self.weight.numpy(), dtype=np.float32)

    def rounded(self, form: TensorFormat) -> np.ndarray:
        """The weight rounded to the nearest points of its grid, float32."""
        return np.asarray(self.params(form).apply(self.data()), dtype=np.float32)

    def bytes(self, form: TensorFormat) -> float:
        """Bytes as stored: the bits that the integers need, packed, and the scales (no zero points if symmetric)."""
        scales = self.scales(form)
        width = 4 if form.scale_dtype == "float32" else 1 if form.scale_dtype.startswith("float8") else 2
        return self.weight.size * form.bits / 8 + scales * (width + (0 if form.symmetric else form.bits / 8))

    def scales(self, form: TensorFormat) -> int:
        """How many scales a format takes."""
        shape = self.weight.shape
        if form.granularity == "tensor":
            return 1
        if form.granularity == "out_channel":
            return shape[self.axis]
        if form.granularity == "in_channel":
            return shape[self.in_axis]
        return self.weight.size // shape[self.in_axis] * -(-shape[self.in_axis] // form.block)


def layers(graph: Graph, only: set[str] | None = None) -> list[Layer]:
    """The layers with stored float weights, in graph order; ``only`` names of nodes."""
    found: dict[int, Layer] = {}
    for node in graph.nodes:
        if node.op not in OPS or (only is not None and node.name not in only):
            continue
        for value in node.inputs[:2]:
            weight = None if value is None else value.weight
            if value is None or weight is None or not weight.dtype.startswith(("float", "bfloat")):
                continue
            if len(weight.shape) < 2:
                continue
            out, into = _axes(node, weight)
            layer = found.setdefault(id(weight), Layer(node.name, weight, value, [], out, into))
            layer.nodes.append(node)
            break
    return list(found.values())


def _axes(node: Node, weight: Weight) -> tuple[int, int]:
    if node.op == "conv":
        return (1, 0) if node.attrs.get("transposed") else (0, 1)
    last = len(weight.shape) - 1
    if node.op == "matmul":
        return last, last - 1
    return (1, 0) if node.attrs.get("transposed_weight") else (0, 1)


def with_bits(form: TensorFormat, bits: int) -> TensorFormat:
    """The same format with another width: the narrowest integer type that holds it, its range cut where it is wider.

    Symmetric weights of fewer than 8 bits use all their integers, -2^(b-1) .. 2^(b-1) - 1, with the scale fitted to the
    larger positive side. Signedness stays.

    Raises:
        ConstraintError: no integer type holds so many bits, or the format is floating.
    """
    signed = form.dtype.startswith("int")
    names = [n for n in ("int2", "int4", "int8", "int16") if LIMITS[n][1] - LIMITS[n][0] >= 2**bits - 1]
    if form.is_float or bits < 2 or not names:
        raise ConstraintError(
            "no integer type of this width", node="bits", expected="2 to 16 bits of an integer type",
            found=f"{bits} bits of {form.dtype}",
        )  # fmt: skip
    if bits == form.bits:
        return form
    # A type that the target does not compute in must not be chosen for it: only the stored range narrows.
    name = names[0] if signed else f"u{names[0]}"
    wide = BITS[form.dtype] >= bits and form.dtype in ("int8", "uint8")
    name = form.dtype if wide else name
    span = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    whole = LIMITS[name] == span
    return TensorFormat(
        dtype=name,  # type: ignore[arg-type]
        symmetric=form.symmetric,
        granularity=form.granularity,
        block=form.block,
        range=None if whole else span,
        scale_dtype=form.scale_dtype,
    )
