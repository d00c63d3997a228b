"""Rules of pooling and resizing: channels pass, spatial positions are mixed and frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ir import Node
from .shaping import new_shape
from .table import rule

if TYPE_CHECKING:
    from ..analysis import Analysis


def _spatial(an: Analysis, node: Node, axes: list[int]) -> None:
    x = node.inputs[0]
    assert x is not None and node.output.hint is not None
    spaces, zero = list(an.of(x)), list(an.zeros(x))
    an.freeze([spaces[a] for a in axes], f"spatial axis of {node.op}", node)
    for v in node.outputs:
        assert v.hint is not None
        out = [
            an.frozen(v.hint[i], f"spatial axis of {node.op}", node) if i in axes else e for i, e in enumerate(spaces)
        ]
        an.set(v, out, [z and i not in axes for i, z in enumerate(zero)])


@rule("max_pool", "avg_pool", homogeneous=True, zero=True)
def _pool(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None
    rank, spatial = len(an.of(x)), len(node.attrs["kernel"])
    _spatial(an, node, list(range(rank - spatial, rank)))


@rule("adaptive_avg_pool", "adaptive_max_pool", homogeneous=True, zero=True)
def _adaptive(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None
    rank, spatial = len(an.of(x)), len(node.attrs["output_size"])
    _spatial(an, node, list(range(rank - spatial, rank)))


@rule("resize", update=new_shape, linear=True)
def _resize(an: Analysis, node: Node) -> None:
    _spatial(an, node, list(node.attrs["axes"]))
