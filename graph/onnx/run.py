"""Running an ONNX model in ONNX Runtime with any intermediate value as an extra output."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..errors import BackendError, ConstraintError
from . import native, stream

if TYPE_CHECKING:
    from .shapes import ShapeTable

INLINE_LIMIT = 1_900_000_000
"""Bytes of weights up to which a model is passed in memory (protobuf ends at 2 GiB)."""


class OrtError(BackendError):
    """ONNX Runtime refused the model or failed on it."""


class Session:
    """One inference session whose graph rewrites are off, so that taps see exactly the values of the file.

    Args:
        model: any model; it is not modified.
        taps: names of values to return besides the graph outputs.

    Raises:
        OrtError: ONNX Runtime does not take the model.
    """

    def __init__(self, model: ir.Model, taps: Sequence[str] = ()) -> None:
        clone = model.clone()
        self.outputs = [v.name or "" for v in clone.graph.outputs]
        known = {v.name: v for n in clone.graph for v in n.outputs}
        extra: list[str] = []
        for name in dict.fromkeys(taps):
            if name in known and name not in self.outputs:
                clone.graph.outputs.append(known[name])
                extra.append(name)
        self.taps = list(taps)
        self._computed = set(extra) | set(self.outputs)
        self._constants = {
            v.name: v.const_value for v in clone.graph.initializers.values() if v.const_value is not None
        }
        self.inputs = {v.name or "": v for v in clone.graph.inputs}
        self.required = [v.name or "" for v in clone.graph.inputs if v.name not in clone.graph.initializers]
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._session = self._open(clone)

    def _open(self, model: ir.Model) -> Any:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise OrtError("ONNX Runtime is not installed", hint="pip install onnxruntime") from error
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        tensors = [v.const_value for g in model.graphs() for v in g.initializers.values() if v.const_value is not None]
        inline = sum(t.nbytes for t in tensors) <= INLINE_LIMIT
        for attempt in (0, 1):
            try:
                if inline:
                    source: Any = stream.serialized(native.inline(model))
                else:
                    self._folder = tempfile.TemporaryDirectory(prefix="foldline-")
                    source = str(Path(self._folder.name) / "model.onnx")
                    ir.save(native.inline(model, 256), source, external_data="model.onnx.data")
                return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime raises classes of its own that share only this base
                limit = re.search(r"max supported IR version:? *(\d+)", str(error))
                if limit is None or attempt:
                    raise OrtError(
                        "ONNX Runtime refused the model", found=_first_line(error), node=_named(error)
                    ) from error
                model.ir_version = int(limit.group(1))
        raise AssertionError("unreachable")

    def run(self, inputs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """(graph outputs in order, {tap name: array}). Raises ConstraintError for inputs that do not fit."""
        for name in self.required:
            if name not in inputs:
                raise ConstraintError(
                    "a graph input is missing", value=name, expected=self.required, found=list(inputs)
                )
        feeds = {}
        for name, array in inputs.items():
            if name not in self.inputs:
                raise ConstraintError("no such graph input", value=name, expected=list(self.inputs), found=name)
            feeds[name] = self._feed(name, array)
        names = [*self.outputs, *(n for n in self.taps if n in self._computed and n not in self.outputs)]
        names = list(dict.fromkeys(names))
        try:
            results = self._session.run_with_ort_values(names, feeds) if self._plain(feeds) else None
            arrays = [_array(r) for r in results] if results is not None else self._session.run(names, feeds)
        except Exception as error:  # see above
            raise OrtError(
                "ONNX Runtime failed to run the model", found=_first_line(error), node=_named(error)
            ) from error
        by_name = dict(zip(names, arrays, strict=True))
        taps: dict[str, Any] = {}
        for name in self.taps:
            if name in by_name:
                taps[name] = by_name[name]
            elif name in inputs:
                taps[name] = np.asarray(inputs[name])
            elif name in self._constants:
                taps[name] = self._constants[name].numpy()
            else:
                raise ConstraintError("no such value to tap", value=name, hint="names are those of graph.values")
        return [by_name[n] for n in self.outputs], taps

    def _plain(self, feeds: Mapping[str, Any]) -> bool:
        import onnxruntime as ort

        return all(isinstance(v, ort.OrtValue) for v in feeds.values())

    def _feed(self, name: str, array: Any) -> Any:
        """Arrays as OrtValues, so that bfloat16 and float8 pass too; sequences and strings as they are."""
        import onnxruntime as ort

        value = self.inputs[name]
        dtype = value.dtype
        if not isinstance(value.type, ir.TensorType) or dtype is None or dtype == ir.DataType.STRING:
            return array
        array = np.asarray(array)
        expected = native.dtype_name(dtype)
        if array.dtype.name != expected:
            raise ConstraintError(
                "a graph input has the wrong dtype", value=name, expected=expected, found=array.dtype.name
            )
        array = np.ascontiguousarray(array).reshape(array.shape)  # it makes 0-d arrays 1-d
        if array.dtype.kind == "V" or array.dtype.isbuiltin != 1:
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(_carrier(array), dtype.value)
        return ort.OrtValue.ortvalue_from_numpy(array)


def _carrier(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint8)


def _array(result: Any) -> Any:
    """An OrtValue as numpy (ml_dtypes where numpy has no such type), a sequence as a list, None as None."""
    if not result.has_value():
        return None
    if not result.is_tensor():
        return result.numpy() if hasattr(result, "numpy") else result
    kind = ir.DataType(result.element_type())
    if kind in (ir.DataType.BFLOAT16, *_FLOAT8):
        carrier = np.uint16 if kind == ir.DataType.BFLOAT16 else np.uint8
        return _raw(result, carrier).view(kind.numpy())
    return result.numpy()


_FLOAT8 = (
    ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E4M3FNUZ, ir.DataType.FLOAT8E5M2, ir.DataType.FLOAT8E5M2FNUZ,
)  # fmt: skip


def _raw(result: Any, carrier: Any) -> np.ndarray:
    import ctypes

    shape = tuple(result.shape())
    count = int(np.prod(shape)) * np.dtype(carrier).itemsize
    return np.frombuffer(ctypes.string_at(result.data_ptr(), count), carrier).reshape(shape)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def _named(error: Exception) -> str | None:
    match = re.search(r"[Nn]ame: ?'([^']+)'", str(error)) or re.search(r"[Nn]ode \(([^)\s]+)\)", str(error))
    return match.group(1) if match else None


def made_up_inputs(table: ShapeTable) -> dict[str, np.ndarray] | None:
    """Inputs of the hinted shapes: small random floats, zeros for integers (valid indices), True for booleans."""
    rng = np.random.default_rng(0)
    inputs: dict[str, np.ndarray] = {}
    for value in table.model.graph.inputs:
        if value.name in table.model.graph.initializers:
            continue
        info = table.info[value]
        if info.a is None or not isinstance(value.type, ir.TensorType) or value.dtype is None:
            return None
        if value.dtype == ir.DataType.STRING:
            return None
        dtype = value.dtype.numpy()
        if value.dtype.is_floating_point():
            inputs[value.name or ""] = rng.standard_normal(info.a).astype(dtype)
        else:
            fill = 1 if value.dtype == ir.DataType.BOOL else 0
            inputs[value.name or ""] = np.full(info.a, fill, dtype)
    return inputs
