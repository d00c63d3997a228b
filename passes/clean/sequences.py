"""A sequence of pieces whose readers take one piece each is a split (ONNX)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ...graph.ir import Graph, Node
from ..rewrite import Env, Refusal, Rewrite, Rule, Why


class SequenceToSplit(Rule):
    """Write a split into a sequence, of which every reader takes one piece, as a split of several outputs.

    Identity: ``SequenceAt(SplitToSequence(x, sizes, axis), i) = Split(x, sizes, axis)[i]``, without the axis where
    ``keepdims`` is 0.
    Conditions: the sizes of the pieces are the same in every run; nobody reads the sequence but SequenceAt at known
    positions; no piece is read by a subgraph.
    Refuses: sequences that leave the graph, enter a subgraph or another sequence operator, positions out of range.
    """

    name: ClassVar[str] = "sequence_to_split"
    ops: ClassVar[tuple[str, ...]] = ("split_to_sequence",)

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        x, pieces, sizes = node.inputs[0], node.output, node.attrs["sizes"]
        if x is None or pieces.is_output or id(pieces) in env.captured:
            return Refusal(f"{pieces.name} leaves the graph or enters a subgraph", node.name, Why.GRAPH_OUTPUT)
        readers = [reader for reader, _ in pieces.uses]
        if not readers or not sizes:
            return None
        for reader in readers:
            if reader.op != "sequence_at":
                return Refusal(f"{reader.name} ({reader.origin}) reads the sequence", node.name, Why.SECOND_CONSUMER)
            if not -len(sizes) <= reader.attrs["index"] < len(sizes):
                return Refusal(f"{reader.name} reads past the end of the sequence", node.name, Why.SHAPE)
            if id(reader.output) in env.captured:
                return Refusal(f"{reader.output.name} is read by a subgraph", node.name, Why.CAPTURED)

        def apply(graph: Graph) -> Sequence[Node]:
            axis, scope = node.attrs["axis"], node.scope
            split = graph.insert(
                "split", [x], {"axis": axis, "sizes": sizes}, name=f"{node.name}_split", after=node, scope=scope
            )
            made = [split]
            for reader in readers:
                piece = split.outputs[reader.attrs["index"]]
                if not node.attrs["keepdims"]:
                    name = f"{reader.name}_squeezed"
                    made.append(
                        graph.insert("squeeze", [piece], {"axes": [axis]}, name=name, after=made[-1], scope=scope)
                    )
                    piece = made[-1].output
                graph.replace_uses(reader.output, piece)
            return made

        return Rewrite([node, *readers], apply, "merged", "a sequence of pieces is a split")


SEQUENCE_RULES: list[Rule] = [SequenceToSplit()]
