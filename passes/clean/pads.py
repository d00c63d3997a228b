"""Pads that a convolution or pool can do itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from ...graph.ir import Graph, Node
from ...graph.windows import padding_is_fixed
from ..rewrite import Env, Refusal, Rewrite, Rule, Why
from .common import FLOATS
from .inverse_pairs import plain_pad

Pads = list[tuple[int, int]]


class PadIntoConv(Rule):
    """Let a convolution pad its input itself.

    Identity: ``conv(pad(x, p, 0), w, padding=q) = conv(x, w, padding=p + q)``.
    Conditions: a constant pad of spatial axes by known amounts, none negative, with zeros; a convolution that is not
    transposed and whose own padding does not follow the size of its input. Other readers of the pad keep it.
    Refuses: other values and modes, pads of batch or channels, transposed convolutions, and in an nn.Module amounts
    that differ on the two sides (ATen pads both alike).
    """

    name: ClassVar[str] = "pad_into_conv"
    ops: ClassVar[tuple[str, ...]] = ("conv",)

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        pad = _pad_before(node)
        if pad is None or pad.inputs[0] is None:
            return None
        if node.attrs["transposed"] or not _spatial(pad) or pad.attrs["value"] != 0 or not padding_is_fixed(node):
            return Refusal("not zeros on spatial axes, or not a plain convolution", pad.name, Why.BORDER)
        padding = _sum(pad, node)
        if env.graph.kind == "fx" and any(lo != hi for lo, hi in padding):
            return Refusal("ATen pads both sides alike", pad.name, Why.BORDER)
        return _moved(node, pad, padding)


class PadIntoPool(Rule):
    """Let a pool pad its input itself (ONNX).

    Identity: ``max_pool(pad(x, p, -inf)) = max_pool(x, padding=p)``, for a pool's padding never wins;
    ``avg_pool(pad(x, p, 0)) = avg_pool(x, padding=p, count_include_pad)``.
    Conditions: as pad_into_conv; less padding than the window is long; no rounding up of the output size; the pool
    pads nothing itself, or an average pool counts what it pads.
    Refuses: zeros before a max pool (a negative maximum would lose to them), an average without the padding counted.
    """

    name: ClassVar[str] = "pad_into_pool"
    ops: ClassVar[tuple[str, ...]] = ("max_pool", "avg_pool")

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        pad = _pad_before(node)
        if pad is None or pad.inputs[0] is None or env.graph.kind != "onnx":
            return None
        a, largest = node.attrs, node.op == "max_pool"
        wanted = -math.inf if largest else 0
        if not _spatial(pad) or pad.attrs["value"] != wanted or node.inputs[0].dtype not in FLOATS:  # type: ignore[union-attr]
            return Refusal(f"{node.op} pads with {wanted}, this pad does not", pad.name, Why.BORDER)
        own = any(tuple(p) != (0, 0) for p in a["padding"])
        if a["ceil"] or (own and not largest and not a["count_include_pad"]) or not padding_is_fixed(node):
            return Refusal("the pool rounds its size up, or does not count what it pads", node.name, Why.BORDER)
        padding = _sum(pad, node)
        if any(max(p) >= k for p, k in zip(padding, a["kernel"], strict=True)):
            return Refusal("more padding than the window is long", pad.name, Why.BORDER)
        return _moved(node, pad, padding, {} if largest else {"count_include_pad": True})


def _pad_before(node: Node) -> Node | None:
    x = node.input(0)
    made = None if x is None else x.producer
    return made if made is not None and made.op == "pad" and plain_pad(made) else None


def _spatial(pad: Node) -> bool:
    return all(tuple(p) == (0, 0) for p in pad.attrs["pads"][:2]) and len(pad.attrs["pads"]) > 2


def _sum(pad: Node, node: Node) -> Pads:
    pairs = zip(pad.attrs["pads"][2:], node.attrs["padding"], strict=True)
    return [(a + c, b + d) for (a, b), (c, d) in pairs]


def _moved(node: Node, pad: Node, padding: Pads, attrs: dict[str, bool] | None = None) -> Rewrite:
    x = pad.inputs[0]

    def apply(graph: Graph) -> Sequence[Node]:
        graph.set_input(node, 0, x)
        graph.set_attr(node, padding=padding, **(attrs or {}))
        return [node]

    return Rewrite([node, pad], apply, "merged", f"{node.name} pads by itself what {pad.name} did")


PAD_RULES: list[Rule] = [PadIntoConv(), PadIntoPool()]
