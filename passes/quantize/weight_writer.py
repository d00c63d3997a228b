"""How an encoded weight gets into the graph: MatMulNBits, DequantizeLinear of a type the graph has, or packed codes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import ml_dtypes
import numpy as np

from ...graph.ir import Graph, Node, Value
from .formats.emit import Emitter
from .formats.lookup import LookupEncoded
from .formats.packing import pack
from .formats.plain import PlainEncoded
from .formats.protocol import Encoded
from .weight_sites import WeightSite

Storage: TypeAlias = Literal["auto", "matmul_nbits", "dequantize", "packed"]
NBITS_BLOCKS = (16, 32, 64, 128, 256)
"""Block sizes that ONNX Runtime's MatMulNBits takes."""
TYPES = {"int4": ml_dtypes.int4, "uint4": ml_dtypes.uint4, "int2": ml_dtypes.int2, "uint2": ml_dtypes.uint2,
         "int8": np.int8, "uint8": np.uint8, "e2m1": ml_dtypes.float4_e2m1fn}  # fmt: skip
OPSETS = {"int4": 21, "uint4": 21, "int2": 25, "uint2": 25, "e2m1": 23, "float8_e4m3fn": 19, "float8_e5m2": 19}


@dataclass
class WeightWriter:
    """Writes weights into one graph.

    ``why`` tells, per form, why the weight last offered cannot have it.
    """

    graph: Graph
    storage: Storage = "auto"
    emitter: Emitter = field(init=False)

    def __post_init__(self) -> None:
        self.emitter = Emitter(self.graph)

    def write(self, site: WeightSite, encoded: Encoded) -> tuple[str, str]:
        """Put one weight in; returns the form it took and, where that is not the one wanted, why."""
        reasons = {
            "matmul_nbits": no_matmul_nbits(site, encoded),
            "dequantize": no_dequantize(self.graph, site, encoded),
        }
        wanted = ["matmul_nbits", "packed"] if self.storage == "auto" else [self.storage, "packed"]
        if self.storage == "auto" and site.tables and self.graph.kind == "onnx" and encoded_block(encoded) >= 16:
            # Rows in blocks of a stored type can be looked up as integers (ONNX Runtime's GatherBlockQuantized).
            wanted = ["dequantize", "packed"]
        form = next(f for f in wanted if not reasons.get(f))
        why = "" if form == wanted[0] or self.storage == "auto" else f"not as {wanted[0]}: {reasons[wanted[0]]}"
        self.emitter.scope = (site.matrices or site.tables)[0].scope
        if form == "matmul_nbits":
            assert isinstance(encoded, LookupEncoded)
            self._matmul_nbits(site, encoded)
        else:
            value = self._dequantize(site, encoded) if form == "dequantize" else encoded.write(self.emitter, site.name)
            if site.weight.dtype != "float32":
                value = self.emitter.cast(value, site.weight.dtype)
            self._replace(site, value)
        return form, why

    def _replace(self, site: WeightSite, value: Value) -> None:
        old = site.weight.value
        assert old is not None
        for node, position in old.uses:
            self.graph.set_input(node, position, value)

    def _matmul_nbits(self, site: WeightSite, encoded: LookupEncoded) -> None:
        layout, name = encoded.layout, site.name
        blocks = -(-layout.columns // encoded.block)
        data = encoded.packed()[0].reshape(layout.rows, blocks, -1)
        assert encoded.scales is not None
        packed = self.emitter.store(f"{name}_packed", data)
        scales = self.emitter.store(f"{name}_scales", encoded.scales.numbers())
        zeros = None
        if encoded.zeros is not None:
            zeros = self.emitter.store(f"{name}_zero_points", pack(encoded.zeros, encoded.bits)[0])
        attrs = {"k": layout.columns, "n": layout.rows, "bits": encoded.bits, "block": encoded.block}
        for node in site.matrices:
            inputs: list[Value | None] = [node.inputs[0], packed, scales, zeros, node.input(2)]
            while inputs[-1] is None:
                inputs.pop()
            made = self.graph.insert(
                "matmul_nbits", inputs, attrs, name=f"{node.name}_nbits", after=node, scope=node.scope
            )
            self.graph.replace_uses(node.output, made.output)
            if self.emitter.last is node:
                self.emitter.last = made
            self.graph.erase(node)

    def _dequantize(self, site: WeightSite, encoded: Encoded) -> Value:
        emitter, layout, name = self.emitter, encoded.layout, site.name
        columns = layout.columns
        assert isinstance(encoded, (LookupEncoded, PlainEncoded)) and encoded.scales is not None
        codes, zeros = stored_codes(encoded, self.graph.kind == "fx")
        attrs: dict[str, Any] = {"axis": layout.axis, "dtype": "float32", "block": 0}

        def turned(a: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(a.T) if layout.axis == 1 else a

        scale = encoded.scales.numbers()
        if encoded.block and encoded.block < columns:
            attrs |= {"axis": 1 - layout.axis, "block": encoded.block}
            scale = turned(scale)
            zeros = None if zeros is None else turned(zeros)
        else:
            scale = scale.reshape(-1)
            zeros = None if zeros is None else zeros.reshape(-1)
        data = emitter.store(f"{name}_quantized", layout.tensor(codes))
        if encoded.scales.kind == "e4m3" and attrs["block"]:  # scales have a scale of their own
            stored = turned(encoded.scales.stored.view(ml_dtypes.float8_e4m3fn))
            factor = emitter.store(f"{name}_scale_factor", np.asarray(encoded.scales.tensor, np.float32))
            inner = [emitter.store(f"{name}_scale", stored), factor]
            number = emitter.node("dequantize", inner, {"axis": None, "dtype": "float32", "block": 0}, f"{name}_scales")
        else:
            number = emitter.store(f"{name}_scale", scale)
        operands: list[Value | None] = [data, number]
        if zeros is not None:
            operands.append(emitter.store(f"{name}_zero_point", zeros))
        return emitter.node("dequantize", operands, attrs, f"{name}_dequantize")


def encoded_block(encoded: Encoded) -> int:
    """Columns that share a scale; 0 where a whole row does or the format has none."""
    return encoded.block if isinstance(encoded, LookupEncoded) else 0


def stored_codes(encoded: LookupEncoded | PlainEncoded, wide: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Codes [rows, columns] and zero points [rows, blocks] in the type that DequantizeLinear reads.

    Args:
        wide: integers below 8 bits take a byte each (torch has no smaller type).
    """
    if isinstance(encoded, PlainEncoded):
        return encoded.codes, None
    dtype = TYPES[encoded.shared]
    if wide:
        dtype = np.int8 if encoded.shared.startswith("int") else np.uint8
    if encoded.shared == "e2m1":
        return encoded.codes.view(dtype), None
    if encoded.zeros is None:
        half = 2 ** (encoded.bits - 1)
        return (encoded.codes.astype(np.int8 if half < 128 else np.int16) - half).astype(np.int8).astype(dtype), None
    return encoded.codes.astype(dtype), encoded.zeros.astype(dtype)


def no_matmul_nbits(site: WeightSite, encoded: Encoded) -> str:
    """Why a weight cannot be read by MatMulNBits; empty if it can."""
    if not isinstance(encoded, LookupEncoded) or not encoded.shared.startswith(("int", "uint")):
        return "it multiplies with integers in blocks only"
    if encoded.bits not in (2, 4, 8):
        return f"it takes 2, 4 and 8 bits, not {encoded.bits}"
    if encoded.block not in NBITS_BLOCKS:
        return f"it takes blocks of {', '.join(map(str, NBITS_BLOCKS))}, not {encoded.block or 'a whole row'}"
    if not site.only_linear:
        return "the weight is read by other operators than matrix products"
    if site.weight.dtype != "float32":
        return f"the weight is {site.weight.dtype}"
    if any(_out_axis(n) != encoded.layout.axis for n in site.matrices):
        return "it is read in both orientations"
    if any(float(n.attrs.get(key, 1.0)) != 1.0 for n in site.matrices for key in ("alpha", "beta")):
        return "the product is scaled (alpha, beta)"
    return ""


def _out_axis(node: Node) -> int:
    return 1 if node.attrs.get("transposed_weight", False) else 0


def no_dequantize(graph: Graph, site: WeightSite, encoded: Encoded) -> str:
    """Why a weight cannot be a stored type behind DequantizeLinear; empty if it can."""
    if isinstance(encoded, PlainEncoded):
        name = encoded.codes.dtype.name
    elif isinstance(encoded, LookupEncoded) and encoded.shared in TYPES and encoded.scales is not None:
        name = encoded.shared
    else:
        return "ONNX has no type for this format"
    if encoded.block and len(site.weight.shape) != 2 and encoded.block < encoded.layout.columns:
        return "blocks of a kernel lie across its axes"
    if graph.kind == "onnx":
        from ...graph.onnx.attrs import opset_of

        blocks = 21 if encoded.block else 13
        least = max(OPSETS.get(name, 13), blocks, 21 if name == "int16" else 13)
        have = opset_of(graph)  # type: ignore[arg-type]
        return f"that needs opset {least}, the model has {have}" if have < least else ""
    return "torch has no such type" if name == "e2m1" else ""
