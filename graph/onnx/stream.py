"""An onnx_ir model from and to the bytes of a file, with at most one copy of each large weight in memory."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx.serialization import registry

from . import native, wire

LEAST = 1024
"""Weights from this many bytes on are kept apart from the message around them."""


def parse(path: Path) -> tuple[onnx.ModelProto, dict[int, np.ndarray]]:
    """The model in a file, and the data left out of it: position among the main graph's initializers -> bytes.

    Each weight is read into memory of its own, which is given back as soon as nobody holds that weight.

    Raises:
        ModelFileError, DecodeError, ValueError: it is no ONNX file.
    """
    if registry.get_format_from_file_extension(path.suffix) not in (None, "protobuf"):
        return onnx.load(str(path), load_external_data=False), {}
    with path.open("rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            small, spans = wire.lift(data, LEAST)
        proto = onnx.ModelProto.FromString(small)
        large: dict[int, np.ndarray] = {}
        for position, (start, end) in spans.items():
            tensor = proto.graph.initializer[position]
            content = np.empty(end - start, np.uint8)
            file.seek(start)
            if file.readinto(content) != content.size:  # type: ignore[arg-type]
                raise ValueError(f"the file ended within the initializer {tensor.name}")
            if _plain(tensor, content.size):
                large[position] = content
            else:
                tensor.raw_data = content.tobytes()
    return proto, large


def _plain(tensor: onnx.TensorProto, size: int) -> bool:
    """Whether the bytes are an array as numpy holds it: no strings, no packed elements, no wrong length."""
    dtype = ir.DataType(tensor.data_type)
    if not tensor.name or dtype in (ir.DataType.UNDEFINED, ir.DataType.STRING) or dtype.bitwidth < 8:
        return False
    external = tensor.HasField("data_location") and tensor.data_location == onnx.TensorProto.EXTERNAL
    return not external and size == prod(tensor.dims) * dtype.numpy().itemsize


def attach(model: ir.Model, proto: onnx.ModelProto, large: Mapping[int, np.ndarray]) -> None:
    """Give the initializers of a model made of ``proto`` the data that was left out; nothing is copied."""
    for position, data in large.items():
        tensor = proto.graph.initializer[position]
        value = model.graph.initializers[tensor.name]
        dtype = ir.DataType(tensor.data_type)
        array = data.view(dtype.numpy()).reshape(tuple(tensor.dims))
        array.setflags(write=False)
        value.const_value = ir.Tensor(
            array, dtype, shape=ir.Shape(array.shape), name=tensor.name, doc_string=tensor.doc_string or None,
            metadata_props={p.key: p.value for p in tensor.metadata_props},
        )  # fmt: skip


class _Apart(ir.LazyTensor):
    """Stands for a tensor whose data is written by itself: all but the data."""

    def __init__(self, tensor: ir.TensorProtocol) -> None:
        super().__init__(
            lambda: tensor, tensor.dtype, ir.Shape(native.tensor_shape(tensor)), name=tensor.name,
            doc_string=tensor.doc_string, metadata_props=dict(tensor.metadata_props),
        )  # fmt: skip

    def tobytes(self) -> bytes:
        return b""

    def __len__(self) -> int:
        return self.nbytes

    def content(self) -> memoryview:
        """The data as bytes; for a tensor that is computed when read, computed now."""
        return np.ascontiguousarray(self.numpy()).reshape(-1).view(np.uint8).data


def _parts(model: ir.Model) -> list[wire.Part]:
    copy = model.clone()
    large: dict[int, wire.Part] = {}
    # a value without data is not written, so it has no position
    stored = [value for value in copy.graph.initializers.values() if value.const_value is not None]
    for position, value in enumerate(stored):
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.nbytes < LEAST:
            continue
        if tensor.dtype != ir.DataType.STRING and tensor.dtype.bitwidth >= 8:
            large[position] = value.const_value = _Apart(tensor)
    return wire.lay(native.serialize(copy).SerializeToString(), large)


def write(model: ir.Model, path: Path) -> None:
    """Write a model to a file, one weight at a time. It is not changed; external tensors stay references."""
    with path.open("wb") as file:
        for part in _parts(model):
            file.write(part.content() if isinstance(part, _Apart) else part)


def serialized(model: ir.Model) -> bytes:
    """The bytes of that file."""
    return b"".join(part.content() if isinstance(part, _Apart) else part for part in _parts(model))
