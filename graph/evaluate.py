"""One node over constant operands, computed in the dtypes of the model."""

from __future__ import annotations

import numpy as np

from .errors import ConstraintError
from .execute import to_numpy
from .ir import Graph, Node


def evaluate(graph: Graph, node: Node) -> list[np.ndarray | None]:
    """The outputs of a node whose operands are all constants, one array per output of the view.

    Raises:
        ConstraintError: an operand is not constant, or the operator cannot be evaluated by itself.
    """
    if graph.kind == "onnx":
        from .onnx.single import move

        moved = move(graph, node, {})  # type: ignore[arg-type]
        if moved is not None:
            named = (x for x, made in zip(moved, node.native.outputs, strict=True) if made.name)
            return [np.ascontiguousarray(x).reshape(x.shape) for x in named]
        from .onnx.single_torch import Single as OfOnnx

        native = OfOnnx(graph)  # type: ignore[arg-type]
        _check(native.takes(node), node)
        with np.errstate(all="ignore"):
            results = native.run(node, {}, widen=False, runtime=True)
    elif graph.kind == "fx":
        from .fx.single import Single as OfFx

        call = OfFx(graph)  # type: ignore[arg-type]
        _check(call.takes(node), node)
        results = call.run(node, {}, widen=False)
    else:
        raise ConstraintError("nodes of this graph cannot be evaluated", node=node.name, found=type(graph).__name__)
    return [None if r is None else to_numpy(r) for r in results]


def _check(takes: bool, node: Node) -> None:
    if not takes:
        raise ConstraintError("the operator is no function of its operands", node=node.name, found=node.origin)
