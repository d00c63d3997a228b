"""A trainable nn.Module that computes an ONNX graph, and the way back of its weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from ..errors import ConstraintError, UnsupportedOp
from ..execute import to_numpy
from . import (  # the families register their operators
    as_torch_attention,  # noqa: F401
    as_torch_control,  # noqa: F401
    as_torch_data,  # noqa: F401
    as_torch_math,  # noqa: F401
    as_torch_nn,  # noqa: F401
    as_torch_norm,  # noqa: F401
    as_torch_resize,  # noqa: F401
)
from . import native as onnx_native
from .as_torch_run import TORCH_OPS, Program, Step, execute
from .graph import ONNXGraph
from .weights import untie

SUPPORTED_DTYPES = frozenset(
    "float16 float32 float64 bfloat16 bool int8 uint8 int16 int32 int64 uint16 uint32 uint64".split()
)
WIDE_UNSIGNED = ("uint16", "uint32", "uint64")
CARRIERS = frozenset(
    "Cast CastLike QuantizeLinear DequantizeLinear Identity Reshape Transpose Unsqueeze Squeeze".split()
)
"""Torch does no arithmetic on wide unsigned integers; these operators need none."""


class ONNXModule(nn.Module):
    """Computes an ONNX graph with torch functions; gradients reach every float weight.

    Weights keep the semantics of the file: parameters are trainable Parameters, batch-norm statistics and integer
    tensors are buffers. In train mode batch norms use batch statistics and update the running ones, and Dropout
    nodes drop. Sizes are computed on the CPU whatever device the data is on.

    Attributes:
        weight_names: parameter or buffer name -> ``Weight.name`` in the graph it was made from.
        input_names, output_names: of the graph.
    """

    def __init__(self, program: Program, weights: Mapping[str, tuple[Tensor, bool, str]]) -> None:
        """``weights``: value name -> (tensor, trainable, name of the graph's weight)."""
        super().__init__()
        self.program = program
        self.weight_names: dict[str, str] = {}
        self.input_names = list(program.inputs)
        self.required = [n for n in program.inputs if n not in program.defaults]
        self.output_names = list(program.outputs)
        self._slots: dict[str, str] = {}
        for value, (tensor, trainable, weight) in weights.items():
            slot = self._slot(value)
            if trainable:
                self.register_parameter(slot, nn.Parameter(tensor))
            else:
                self.register_buffer(slot, tensor)
            self._slots[value] = slot
            self.weight_names.setdefault(slot, weight)

    def _slot(self, value: str) -> str:
        base = re.sub(r"\W", "_", value) or "w"
        base = f"w_{base}" if base[0].isdigit() or hasattr(self, base) else base
        slot, i = base, 1
        while hasattr(self, slot):
            slot, i = f"{base}_{i}", i + 1
        return slot

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Graph inputs by position or by name (or one dict of names); one tensor, or a tuple of all outputs.

        Raises ConstraintError naming a missing or unknown input.
        """
        positional = list(args)
        if len(positional) == 1 and isinstance(positional[0], Mapping):
            kwargs = {**positional.pop(), **kwargs}
        order = self.input_names if len(positional) > len(self.required) else self.required
        if len(positional) > len(order):
            raise ConstraintError("too many inputs", expected=order, found=len(positional))
        given: dict[str, Any] = {**dict(zip(order, positional, strict=False)), **kwargs}
        for name in given:
            if name not in self.input_names:
                raise ConstraintError("no such input", value=name, expected=self.input_names, found=list(given))
        for name in self.required:
            if name not in given:
                raise ConstraintError("an input is missing", value=name, expected=self.required, found=list(given))
        env: dict[str, Any] = {value: getattr(self, slot) for value, slot in self._slots.items()}
        env.update({n: _tensor(v) for n, v in self.program.defaults.items() if n not in given})
        env.update({n: v if isinstance(v, Tensor) else torch.as_tensor(v) for n, v in given.items()})
        outputs = execute(self.program, env, training=self.training)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def to_torch(graph: ONNXGraph) -> ONNXModule:
    """The graph as a module in eval mode; its weights are copies.

    Batch-norm statistics that several layers share (exporters merge equal tensors) are untied in ``graph`` first,
    which leaves its function as it was: each layer must keep its own in training.

    Raises:
        UnsupportedOp: an operator, mode or dtype has no torch implementation; names the node.
    """
    if graph.dirty or graph.moved:
        graph.refresh()
    _untie_statistics(graph)
    _check_types(graph)
    model = graph.model.clone()
    if model.functions:
        from onnx_ir.passes.common import InlinePass

        model = InlinePass()(model).model
    program = _compile(model.graph, model)
    weights: dict[str, tuple[Tensor, bool, str]] = {}
    for weight, carriers in graph.carriers.items():
        if weight.dtype not in SUPPORTED_DTYPES:
            continue
        tensor = _tensor(weight.numpy())
        weights[carriers[0].name or ""] = (tensor, weight.trainable and weight.kind == "parameter", weight.name)
        program.aliases.update({v.name or "": carriers[0].name or "" for v in carriers[1:]})
    program.constants = {n: t for n, t in program.constants.items() if n not in weights and n not in program.aliases}
    return ONNXModule(program, weights).eval()


def _check_types(graph: ONNXGraph) -> None:
    for value in graph.values.values():
        nodes = [n for n, _ in value.uses] + ([value.producer] if value.producer is not None else [])
        tensor = isinstance(value.native.type, (ir.TensorType, type(None)))
        wide = value.dtype in WIDE_UNSIGNED and any(n.origin not in CARRIERS for n in nodes)
        if nodes and (not tensor or wide or (value.dtype and value.dtype not in SUPPORTED_DTYPES)):
            found = value.dtype if tensor else str(value.native.type)
            raise UnsupportedOp(
                "no torch implementation for this type", node=nodes[0].name, value=value.name, found=found
            )


def write_back(module: ONNXModule, graph: ONNXGraph) -> None:
    """Set the graph's weights to those of the module (bit for bit; weights that did not change are left alone).

    Raises:
        ConstraintError: the graph has no such weight, or its shape differs.
    """
    for slot, name in module.weight_names.items():
        weight = graph.weight(name)
        data = to_numpy(getattr(module, slot))
        if data.shape != weight.shape:
            raise ConstraintError(
                "the module's tensor does not fit the weight", node=name, expected=weight.shape, found=data.shape
            )
        old = weight.numpy()
        if data.dtype != old.dtype:
            data = data.astype(old.dtype)
        if data.tobytes() != np.ascontiguousarray(old).tobytes():
            graph.set_weight(weight, data.copy())


def _untie_statistics(graph: ONNXGraph) -> None:
    shared = []
    for weight in graph.weights.values():
        uses = [use for v in graph.carriers.get(weight, []) for use in graph.view[v].uses]
        if len(uses) > 1 and any(n.op == "batch_norm" and i in (3, 4) for n, i in uses):
            shared.append(weight)
    if shared:
        untie(graph, shared)


def _tensor(data: np.ndarray) -> Tensor:
    """A torch tensor with its own memory; bfloat16 keeps its bits."""
    data = np.array(data, copy=True, order="C")
    if data.dtype.name == "bfloat16":
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(data)


def _compile(graph: ir.Graph, model: ir.Model) -> Program:
    """The graph as plain data (so that modules can be copied and pickled)."""
    opset = model.graph.opset_imports.get("", 0) or model.graph.opset_imports.get("ai.onnx", 0)
    steps: list[Step] = []
    constants: dict[str, Tensor] = {}
    defaults: dict[str, np.ndarray] = {}
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            continue
        if value.is_graph_input():
            defaults[value.name or ""] = tensor.numpy()
        elif onnx_native.dtype_name(tensor.dtype) in SUPPORTED_DTYPES:
            constants[value.name or ""] = _tensor(tensor.numpy())
    for node in graph:
        if onnx_native.is_constant_node(node):
            stored = onnx_native.constant_attribute(node)
            if stored is not None and onnx_native.dtype_name(stored.dtype) in SUPPORTED_DTYPES:
                constants[node.outputs[0].name or ""] = _tensor(stored.numpy())
            continue
        if node.domain not in onnx_native.STANDARD_DOMAINS or node.op_type not in TORCH_OPS:
            raise UnsupportedOp(
                "no torch implementation", node=node.name or (node.outputs[0].name if node.outputs else node.op_type),
                found=f"{node.domain}::{node.op_type}" if node.domain else node.op_type,
            )  # fmt: skip
        attrs: dict[str, Any] = {}
        for name, attr in node.attributes.items():
            if attr.type == ir.AttributeType.GRAPH:
                attrs[name] = _compile(attr.as_graph(), model)
            elif attr.type == ir.AttributeType.TENSOR:
                attrs[name] = _tensor(attr.value.numpy())
            else:
                attrs[name] = onnx_native.attribute(node, name)
        inputs = [None if v is None else v.name for v in node.inputs]
        outputs = [o.name if o.name and (o.uses() or o.is_graph_output()) else "" for o in node.outputs]
        steps.append(Step(node.op_type, node.name or node.op_type, inputs, outputs, attrs, opset))
    program = Program(
        [v.name or "" for v in graph.inputs], [v.name or "" for v in graph.outputs], steps, constants, defaults,
        [_torch_dtype(v) for v in graph.outputs],
    )  # fmt: skip
    program.plan_releases()
    return program


def _torch_dtype(value: ir.Value) -> torch.dtype | None:
    name = onnx_native.dtype_name(value.dtype) if isinstance(value.type, ir.TensorType) else ""
    return cast(torch.dtype, getattr(torch, name)) if name in SUPPORTED_DTYPES else None


def copy_of(module: ONNXModule) -> ONNXModule:
    """An independent copy, for teachers and averages."""
    return copy.deepcopy(module)
