"""One node of an ONNXGraph evaluated by itself, in the dtypes of the file or in the widest of each kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from ..errors import ConstraintError, FoldlineError
from ..execute import MOVES, to_numpy
from ..ir import Node
from . import as_torch  # noqa: F401  (registers the operators)
from . import native as onnx_native
from .as_torch import SUPPORTED_DTYPES, WIDE_UNSIGNED, _tensor
from .as_torch_data import DTYPES
from .as_torch_run import TORCH_OPS, Call, Step
from .single import takes

if TYPE_CHECKING:
    from .graph import ONNXGraph

WIDER = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Single:
    """Evaluates canonical nodes of an ONNX graph: in torch, else in ONNX Runtime in the dtypes of the file."""

    def __init__(self, graph: ONNXGraph) -> None:
        self.graph = graph
        imports = graph.model.graph.opset_imports
        self.opset = imports.get("", 0) or imports.get("ai.onnx", 0)

    def takes(self, node: Node) -> bool:
        """Whether the node is a deterministic standard operator over tensors."""
        return takes(node)

    @staticmethod
    def widened(result: Any) -> Any:
        """The same numbers as float64; integers and booleans as they are."""
        return result.to(WIDER.get(result.dtype, result.dtype)) if isinstance(result, torch.Tensor) else result

    def run(self, node: Node, known: Mapping[int, Any], *, widen: bool, runtime: bool = False) -> list[Any]:
        """One result per output of ``node``; ``known`` holds computed operands by ``id`` of their canonical value.

        ``runtime``: arithmetic in ONNX Runtime, to the last bit as the model computes it; moves in torch all the same.
        """
        native: ir.Node = node.native
        operands = {}
        for value in native.inputs:
            if value is not None:
                operands[value.name or ""] = self._operand(node, value, known, widen)
        try:
            if not self._in_torch(node) or (runtime and node.op not in MOVES):
                narrow = operands if not widen else {n: self._narrow(native, n, t) for n, t in operands.items()}
                results = self._in_runtime(native, narrow)
            else:
                call = Call(self._step(native, widen), operands, False)
                made = TORCH_OPS[native.op_type](call)
                results = list(made) if isinstance(made, (tuple, list)) else [made]
        except FoldlineError:
            raise
        except Exception as error:
            raise ConstraintError(
                f"the node cannot be evaluated: {str(error).strip().splitlines()[0][:200]}", node=node.name
            ) from error
        named = [r for r, output in zip(results, native.outputs, strict=False) if output.name]
        return [self.widened(r) for r in named] if widen else self._declared(node, named)

    def _in_torch(self, node: Node) -> bool:
        values = [*node.outputs, *(v for v in node.inputs if v is not None)]
        dtypes = {v.dtype for v in values if v.dtype}
        return node.native.op_type in TORCH_OPS and dtypes <= SUPPORTED_DTYPES and not dtypes & set(WIDE_UNSIGNED)

    def _operand(self, node: Node, value: ir.Value, known: Mapping[int, Any], widen: bool) -> Any:
        view = self.graph.value_of(value)
        if id(view) in known:
            return known[id(view)]
        stored = onnx_native.constant_tensor(value)
        data = view.literal if stored is None else stored.numpy()
        if data is None:
            raise ConstraintError("an operand has not been computed", node=node.name, value=view.name)
        tensor = _tensor(np.asarray(data)) if view.dtype in SUPPORTED_DTYPES else np.asarray(data)
        return self.widened(tensor) if widen else tensor

    def _step(self, native: ir.Node, widen: bool) -> Step:
        attrs: dict[str, Any] = {}
        for name, attr in native.attributes.items():
            if attr.type == ir.AttributeType.TENSOR:
                tensor = _tensor(attr.value.numpy())
                attrs[name] = self.widened(tensor) if widen else tensor
            else:
                attrs[name] = onnx_native.attribute(native, name)
        if widen:
            for name in ("to", "dtype"):
                made = DTYPES.get(attrs.get(name, 0))
                if made in WIDER:
                    attrs[name] = CODES[WIDER[made]]
            if native.op_type == "ConstantOfShape" and "value" not in attrs:
                attrs["value"] = torch.zeros(1, dtype=torch.float64)
        inputs = [None if v is None else v.name for v in native.inputs]
        outputs = [o.name or "" for o in native.outputs]
        return Step(native.op_type, native.name or native.op_type, inputs, outputs, attrs, self.opset)

    def _narrow(self, native: ir.Node, name: str, tensor: Any) -> Any:
        """An operand as the file declares it."""
        value = next(v for v in native.inputs if v is not None and v.name == name)
        dtype = getattr(torch, self.graph.value_of(value).dtype, None)
        return tensor.to(dtype) if isinstance(tensor, torch.Tensor) and isinstance(dtype, torch.dtype) else tensor

    def _declared(self, node: Node, results: list[Any]) -> list[Any]:
        """Results in the dtypes that the file declares (torch promotes where ONNX does not)."""
        made = []
        for value, result in zip(node.outputs, results, strict=False):
            dtype = getattr(torch, value.dtype, None) if value.dtype else None
            fits = not isinstance(result, torch.Tensor) or not isinstance(dtype, torch.dtype) or result.dtype == dtype
            made.append(result if fits else result.to(dtype))
        return made

    def _in_runtime(self, native: ir.Node, operands: Mapping[str, Any]) -> list[Any]:
        """The node alone in ONNX Runtime, in the dtypes of the file."""
        from .run import Session

        data = {n: to_numpy(v) for n, v in operands.items()}
        inputs = [ir.Value(name=n, type=ir.TensorType(onnx_native.dtype_of(d.dtype.name)), shape=ir.Shape(d.shape))
                  for n, d in data.items()]  # fmt: skip
        by_name = {v.name: v for v in inputs}
        attributes = [a for a in native.attributes.values()]
        twin = ir.Node(
            "", native.op_type, [None if v is None else by_name[v.name] for v in native.inputs], attributes,
            outputs=[ir.Value(name=o.name, type=o.type) for o in native.outputs],
        )  # fmt: skip
        outputs = [o for o in twin.outputs if o.name]
        alone = ir.Graph(inputs, outputs, nodes=[twin], opset_imports=dict(self.graph.model.graph.opset_imports))
        model = ir.Model(alone, ir_version=min(self.graph.model.ir_version or 10, onnx.IR_VERSION))
        found, _ = Session(model).run(data)
        named = iter(found)
        return [_carried(next(named)) if o.name else None for o in native.outputs]


def _carried(result: Any) -> Any:
    data = np.asarray(result)
    return _tensor(data) if data.dtype.name in SUPPORTED_DTYPES else data
