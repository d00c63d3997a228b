"""Reading ONNX files with one clear error for each way they can be broken, and binding a batch to graph inputs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ..errors import ConstraintError, ModelFileError
from . import native, stream

KIND = "pkg.torch.export.graph_signature.InputSpec.kind"


def read(model: str | Path | onnx.ModelProto | ir.Model) -> tuple[ir.Model, str, Path | None]:
    """(private copy of the model sharing its tensors, form it came in, file it came from)."""
    if isinstance(model, ir.Model):
        return model.clone(), "ir", None
    if isinstance(model, onnx.ModelProto):
        return _deserialize(model, None), "proto", None
    if not isinstance(model, (str, os.PathLike)):
        raise ConstraintError(
            "not an ONNX model", expected="path, ModelProto or onnx_ir.Model", found=type(model).__name__
        )
    path = Path(model)
    if not path.is_file():
        raise ModelFileError("no such model file", value=str(path), hint="check the path")
    if path.stat().st_size == 0:
        raise ModelFileError("the model file is empty", value=str(path))
    try:
        proto, large = stream.parse(path)
    except (DecodeError, ValueError, UnicodeDecodeError, ModelFileError) as error:
        raise ModelFileError(
            "not an ONNX file, or a truncated one", value=str(path), found=str(error).strip()[:200],
            hint="export or download it again",
        ) from error  # fmt: skip
    model = _deserialize(proto, path)
    stream.attach(model, proto, large)
    return model, "ir", path


def _deserialize(proto: onnx.ModelProto, path: Path | None) -> ir.Model:
    where = "the ModelProto" if path is None else str(path)
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output or proto.graph.initializer):
        raise ModelFileError("not an ONNX model: it holds no graph", value=where, hint="export or download it again")
    if proto.graph.sparse_initializer or proto.training_info:
        what = "sparse initializers" if proto.graph.sparse_initializer else "training information"
        raise ModelFileError(
            f"the model holds {what}, which foldline cannot write back",
            value=where,
            hint="remove them or make them dense",
        )
    try:
        model = native.deserialize(proto)
    except Exception as error:  # onnx_ir wraps what it meets in an error class of each kind
        cause = error.__cause__ or error
        raise ModelFileError("the ONNX model cannot be read", value=where, found=str(cause).strip()[:300]) from error
    if path is not None:
        for graph in native.graphs(model):
            ir.external_data.set_base_dir(graph, os.path.dirname(os.path.abspath(path)))
    _check_external(model, where)
    _check_wiring(model, where)
    _in_order(model, where)
    return model


def _in_order(model: ir.Model, where: str) -> None:
    """Nodes come after what they read: converters that append casts at the end leave files that ONNX Runtime takes
    and the standard does not."""
    for graph in native.graphs(model):
        seen: set[ir.Node] = set()
        for node in graph:
            makers = (value.producer() for value in node.inputs if value is not None)
            if any(p is not None and p.graph is graph and p not in seen for p in makers):
                try:
                    model.graph.sort()  # every subgraph, too
                except ValueError as error:
                    raise ModelFileError(
                        "the nodes of the model form a cycle", node=node.name or node.op_type, value=where,
                        hint="export it again",
                    ) from error  # fmt: skip
                return
            seen.add(node)


def _check_wiring(model: ir.Model, where: str) -> None:
    """Every operand of the main graph must be made by something."""
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.producer() is None and value.graph is not model.graph:
                raise ModelFileError(
                    "a node reads a value that nothing makes", node=node.name or node.op_type, value=value.name,
                    expected="a graph input, an initializer or the output of a node", found=f"neither, in {where}",
                )  # fmt: skip


def _check_external(model: ir.Model, where: str) -> None:
    """Every external tensor must lie inside its file; nothing is read for that."""
    sizes: dict[str, int] = {}
    for graph in native.graphs(model):
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            if tensor.path not in sizes:
                if not os.path.isfile(tensor.path):
                    raise ModelFileError(
                        "external data file is missing", node=value.name, value=tensor.path,
                        hint=f"put it beside {where}",
                    )  # fmt: skip
                sizes[tensor.path] = os.path.getsize(tensor.path)
            end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
            short = tensor.length is not None and tensor.length < tensor.nbytes
            if end > sizes[tensor.path] or short:
                raise ModelFileError(
                    "external data file is truncated", node=value.name, value=tensor.path,
                    expected=f"at least {max(end, (tensor.offset or 0) + tensor.nbytes)} bytes",
                    found=f"{sizes[tensor.path]} bytes", hint="export or download it again",
                )  # fmt: skip


def kind_of(value: ir.Value, tensor: ir.TensorProtocol) -> str:
    """``parameter``, ``buffer`` or ``constant``, from what the exporter recorded or from how the value is used."""
    if value.producer() is not None:
        return "constant"
    recorded = value.metadata_props.get(KIND, "")
    if recorded in ("PARAMETER", "BUFFER"):
        return recorded.lower()
    roles = {(use.node.op_type, use.idx) for use in value.uses()}
    if roles and all(_is_statistic(op, i) for op, i in roles):
        return "buffer"
    if len(tensor.shape) == 0:
        return "constant"  # an exponent, an epsilon; learned scalars carry the exporter's mark
    if tensor.dtype.is_floating_point() or ("DequantizeLinear", 0) in roles:
        return "parameter"
    return "constant"


def _is_statistic(op: str, position: int) -> bool:
    if op == "BatchNormalization":
        return position in (3, 4)
    return op in ("QuantizeLinear", "DequantizeLinear") and position in (1, 2)


def bind(batch: Any, graph: ir.Graph) -> dict[str, np.ndarray]:
    """One call's arguments as {graph input: array}; see ``Graph.bind``."""
    names = [v.name or "" for v in graph.inputs]
    required = [n for n in names if n not in graph.initializers]
    positional, named = _arguments(batch, names)
    if len(positional) > len(names):
        raise ConstraintError("too many inputs", expected=names, found=f"{len(positional)} arrays")
    order = names if len(positional) > len(required) else required
    bound = dict(zip(order, positional, strict=False))
    for name, value in named.items():
        if name not in names:
            raise ConstraintError("no such graph input", value=name, expected=names, found=list(named))
        bound[name] = value
    missing = [n for n in required if n not in bound]
    if missing:
        raise ConstraintError("a graph input is missing", value=missing[0], expected=required, found=list(bound))
    for name in names:
        if name not in bound:  # an input with a default: the caller did not override it
            tensor = graph.initializers[name].const_value
            assert tensor is not None
            bound[name] = tensor.numpy()
    specs = {v.name: v for v in graph.inputs}
    return {name: _array(bound[name], specs[name]) for name in names}


def _arguments(batch: Any, names: list[str]) -> tuple[list[Any], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return [], dict(batch)
    if isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[0], tuple) and isinstance(batch[1], Mapping):
        return _flat(batch[0]), dict(batch[1])
    if isinstance(batch, (tuple, list)):
        return _flat(batch), {}
    return [batch], {}


def _flat(items: Any) -> list[Any]:
    """Nested tuples and lists of arrays in order, as exporters flatten them."""
    out: list[Any] = []
    for item in items:
        if isinstance(item, (tuple, list)):
            out.extend(_flat(item))
        elif isinstance(item, Mapping):
            out.extend(_flat(item.values()))
        elif item is not None:
            out.append(item)
    return out


def _array(value: Any, spec: ir.Value) -> Any:
    if hasattr(value, "detach"):  # a torch tensor, without importing torch
        tensor = value.detach().cpu().contiguous()
        if spec.dtype == ir.DataType.BFLOAT16 and str(tensor.dtype) == "torch.bfloat16":
            value = tensor.view(dtype=_int16(tensor)).numpy().view(ir.DataType.BFLOAT16.numpy())
        else:
            value = tensor.numpy()
    if not isinstance(spec.type, (ir.TensorType, type(None))):
        return value
    scalar = isinstance(value, (bool, int, float))
    array = np.asarray(value)
    if scalar and spec.dtype is not None and spec.dtype != ir.DataType.STRING:
        array = array.astype(native.dtype_name(spec.dtype))
    return array


def _int16(tensor: Any) -> Any:
    import torch

    return torch.int16
