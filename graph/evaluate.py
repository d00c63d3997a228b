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
        from .onnx.single import Single
    elif graph.kind == "fx":
        from .fx.single import Single  # type: ignore[assignment]
    else:
        raise ConstraintError("nodes of this graph cannot be evaluated", node=node.name, found=type(graph).__name__)
    single = Single(graph)  # type: ignore[arg-type]
    if not single.takes(node):
        raise ConstraintError("the operator is no function of its operands", node=node.name, found=node.origin)
    with np.errstate(all="ignore"):
        results = single.run(node, {}, widen=False)
    return [None if r is None else to_numpy(r) for r in results]
