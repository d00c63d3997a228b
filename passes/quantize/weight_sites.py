"""Which stored weights a weight-only quantization takes: matrices, kernels and embedding tables, tied ones once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from ...graph.ir import Graph, Node, Value, Weight
from ..base import Decision

FLOATS = ("float32", "float16", "bfloat16")


@dataclass
class WeightSite:
    """One stored weight and everything that reads it.

    Attributes:
        axis: output channels (rows of an embedding table).
        matrices: linear nodes and convolutions that multiply with it.
        tables: gathers that look rows of it up.
        others: nodes that read it otherwise (a transpose, a cast); they read the dequantized numbers.
    """

    weight: Weight
    axis: int
    matrices: list[Node] = field(default_factory=list)
    tables: list[Node] = field(default_factory=list)
    others: list[Node] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def subject(self) -> str:
        """The node a reader of the report looks for."""
        return (self.matrices or self.tables)[0].name

    @property
    def input(self) -> Value | None:
        """What the weight multiplies, where that is one value of one kind (linear nodes, all rows in a row)."""
        values = {id(n.inputs[0]): n.inputs[0] for n in self.matrices}
        linear = all(n.op == "linear" for n in self.matrices)
        return next(iter(values.values())) if len(values) == 1 and linear else None

    @property
    def only_linear(self) -> bool:
        return not self.tables and not self.others and all(n.op == "linear" for n in self.matrices)


def find_sites(
    graph: Graph, ignored: Collection[str], *, embeddings: bool, convolutions: bool, inserted: Collection[str] = ()
) -> tuple[list[WeightSite], list[Decision]]:
    """The weights to quantize in the order of their first use, and why others are not.

    Args:
        ignored: names of nodes whose weights stay as they are.
        inserted: names of nodes that an earlier pass inserted to compute in float; theirs stay, too.
        embeddings: take tables that a gather reads, too (and matrices tied to one).
        convolutions: take kernels too.
    """
    found: list[WeightSite] = []
    decisions: list[Decision] = []
    for weight in _in_order(graph):
        site = _site(weight)
        if site is None:
            continue
        reason = ""
        if any(n.name in ignored for n in (*site.matrices, *site.tables)):
            reason = "it is on the ignore list"
        elif any(n.name in inserted for n in (*site.matrices, *site.tables)):
            reason = "an earlier pass inserted it to compute in float"
        elif weight.dtype not in FLOATS:
            reason = f"it is stored as {weight.dtype}"
        elif site.tables and not embeddings:
            tied = "a table that a matrix is tied to" if site.matrices else "an embedding table"
            reason = f"it is {tied}; the option embeddings takes it"
        elif any(n.op == "conv" for n in site.matrices) and not convolutions:
            reason = "it is the kernel of a convolution; the option convolutions takes it"
        if reason:
            decisions.append(Decision(site.subject, "kept in float", reason, {"weight": weight.name}))
        else:
            found.append(site)
    return found, decisions


def _in_order(graph: Graph) -> list[Weight]:
    seen: dict[int, Weight] = {}
    for node in graph.nodes:
        for value in node.inputs:
            if value is not None and value.weight is not None and value is value.weight.value:
                seen.setdefault(id(value.weight), value.weight)
    return list(seen.values())


def _site(weight: Weight) -> WeightSite | None:
    assert weight.value is not None
    matrices, tables, others, axes = [], [], [], set()
    for node, position in weight.value.uses:
        x = node.input(0)
        if node.op in ("linear", "conv") and position == 1 and x is not None and not x.is_const:
            matrices.append(node)
            axes.add(_out_axis(node))
        elif node.op == "gather" and position == 0 and node.attrs.get("axis") == 0 and len(weight.shape) == 2:
            tables.append(node)
            axes.add(0)
        else:
            others.append(node)
    if not axes or len(weight.shape) < 2:
        return None
    # Where readers disagree about the output axis (a table read transposed), rows of the table are the blocks' rows.
    axis = 0 if tables or len(axes) > 1 else axes.pop()
    return WeightSite(weight, axis, matrices, tables, others)


def _out_axis(node: Node) -> int:
    swapped = node.attrs.get("transposed" if node.op == "conv" else "transposed_weight", False)
    return 1 if swapped else 0


def retie(graph: Graph) -> list[Decision]:
    """Let matrices that are the transpose of an embedding table read the table itself again.

    Exporters write a tied output matrix transposed, as a tensor of its own.
    """
    decisions = []
    tables = {}
    for node in graph.nodes:
        value = node.inputs[0] if node.op == "gather" and node.attrs.get("axis") == 0 else None
        if value is not None and value.weight is not None and len(value.weight.shape) == 2:
            tables[value.weight.name] = value.weight
    for node in list(graph.nodes):
        value = node.input(1) if node.op == "linear" and node.attrs.get("transposed_weight") else None
        if value is None or value.weight is None or len(value.uses) != 1:
            continue
        own = value.weight
        for table in tables.values():
            if own.shape == table.shape[::-1] and own.dtype == table.dtype and table is not own:
                if np.array_equal(own.numpy(), table.numpy().T):
                    turned = graph.insert("transpose", [table.value], {"perm": [1, 0]}, name=f"{table.name}_transposed")
                    graph.set_input(node, 1, turned.output)
                    reason = f"its weight is the transpose of {table.name}"
                    decisions.append(Decision(node.name, "tied", reason, {"bytes": own.size * 4}))
                    break
    if decisions:
        graph.refresh()
    return decisions
