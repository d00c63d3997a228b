"""A matrix product and the addition of its bias as one Gemm (ONNX)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ...graph.ir import Graph, Node, Value
from ..rewrite import Env, Refusal, Rewrite, Rule, Why

DTYPES = ("float32", "float64")
"""Those for which every runtime has a Gemm; integer products stay what they are."""


class MatMulAddToGemm(Rule):
    """Make a matrix product of two axes and the addition of its bias one Gemm.

    Identity: ``x @ w + b = Gemm(x, w, b)`` for matrices x.
    Conditions: ONNX; float32 or float64; x has two axes, w is a stored matrix; b is a stored vector that broadcasts
    along the rows (one number for each column, or one for all); nobody else reads the product.
    Refuses: other ranks and dtypes, a bias that differs from row to row, a product with a second reader.
    """

    name: ClassVar[str] = "matmul_add_to_gemm"
    ops: ClassVar[tuple[str, ...]] = ("add",)

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        if env.graph.kind != "onnx":
            return None
        for i, j in ((0, 1), (1, 0)):
            product, bias = node.inputs[i], node.inputs[j]
            if product is None or bias is None or product.producer is None or bias.weight is None:
                continue
            matmul = product.producer
            if matmul.op != "linear" or len(matmul.inputs) != 2 or matmul.attrs["alpha"] != 1.0:
                continue
            x, w = matmul.inputs
            if x is None or w is None or x.rank != 2 or product.dtype not in DTYPES or w.shape is None:
                continue
            columns = w.shape[1 if matmul.attrs["transposed_weight"] else 0]
            if not isinstance(columns, int) or tuple(bias.shape or ()) not in ((columns,), (1, columns), (1,)):
                return Refusal("the addend is no bias", node.name, Why.SHAPE)
            blocked = env.sole_reader(product, node)
            if blocked is not None or id(node.output) in env.captured:
                return blocked or Refusal(f"{node.output.name} is read by a subgraph", why=Why.CAPTURED)
            return _gemm(node, matmul, [x, w, bias])
        return None


def _gemm(node: Node, matmul: Node, operands: Sequence[Value]) -> Rewrite:
    attrs = {"transposed_weight": matmul.attrs["transposed_weight"], "alpha": 1.0, "beta": 1.0}

    def apply(graph: Graph) -> Sequence[Node]:
        made = graph.insert("linear", operands, attrs, name=f"{node.name}_gemm", after=node, scope=node.scope)
        graph.replace_uses(node.output, made.output)
        return [made]

    return Rewrite([node, matmul], apply, "merged", "a matrix product and its bias are one Gemm")


GEMM_RULES: list[Rule] = [MatMulAddToGemm()]
