"""Rules of normalizations: which axes share statistics (selecting there changes them) and which gains ride along."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..ir import Node
from ..refine import factor
from ..space import UNIT
from .table import rule

if TYPE_CHECKING:
    from ..analysis import Analysis, Resize


@rule("batch_norm", linear=True)
def _batch_norm(an: Analysis, node: Node) -> None:
    x, *stats = node.inputs
    assert x is not None
    spaces = list(an.of(x))
    c = spaces[1]
    for i, v in enumerate(stats):
        if v is not None:
            c = an.tie(c, an.of(v)[0], node)
            # y = gain*(x-mean)/std + bias scales with s when mean and bias do; gain and variance stay.
            an.role(v, 0, 1 if i in (1, 2) else 0, node, stat=i >= 2)
    if any(v is not None and not an.is_const(v) for v in stats) or node.attrs.get("training"):
        an.no_scale(spaces, node, "batch norm with run-time statistics")
    an.no_scale([e for i, e in enumerate(spaces) if i != 1], node, "batch norm shifts along this axis")
    spaces[1] = c
    gains = [node.input(1), node.input(2)]
    fixed = all(v is not None and an.is_const(v) for v in gains)
    an.set(node.output, spaces, [i == 1 and fixed for i in range(len(spaces))])
    for extra in node.outputs[1:]:
        if extra.hint is not None and len(extra.hint) == 1 and extra.hint[0] == c.size:
            an.set(extra, [c])


@rule("instance_norm")
def _instance_norm(an: Analysis, node: Node) -> None:
    x, *stats = node.inputs
    assert x is not None
    spaces = list(an.of(x))
    for i, v in enumerate(stats):
        if v is not None:
            spaces[1] = an.tie(spaces[1], an.of(v)[0], node)
            an.role(v, 0, 0, node, stat=i >= 2)
    an.no_scale(spaces, node, "normalized")
    an.inexact(spaces[2:], node, "normalized over")
    fixed = all(an.is_const(node.input(i)) for i in (1, 2))
    an.set(node.output, spaces, [i == 1 and fixed for i in range(len(spaces))])


def _group_update(re: Resize, node: Node) -> dict[str, Any]:
    g = re.memo(node).get("G")
    if g is None or re.size_of(g) == node.attrs["groups"]:
        return {}
    return {"groups": re.size_of(g)}


@rule("group_norm", update=_group_update)
def _group_norm(an: Analysis, node: Node) -> None:
    x, scale, bias = node.inputs[0], node.input(1), node.input(2)
    assert x is not None
    spaces = list(an.of(x))
    for v in (scale, bias):
        if v is not None and an.of(v)[0].size == spaces[1].size:
            spaces[1] = an.tie(spaces[1], an.of(v)[0], node)
            an.role(v, 0, 0, node)
    g, inner = factor(spaces[1], spaces[1].size // node.attrs["groups"])
    an.memo[node] = {"G": g}
    an.inexact([inner, *spaces[2:]], node, "normalized over")
    an.no_scale(spaces, node, "normalized")
    fixed = an.is_const(scale) and an.is_const(bias)
    an.set(node.output, spaces, [i == 1 and fixed for i in range(len(spaces))])


def _normalized_shape(re: Resize, node: Node) -> dict[str, Any]:
    """Only the FX form bakes the sizes of the normalised axes; ONNX names axes and needs no change."""
    if "normalized_shape" not in node.attrs:
        return {}
    x = node.inputs[0]
    assert x is not None
    shape = [re.size(x, a) for a in node.attrs["axes"]]
    return {} if shape == list(node.attrs["normalized_shape"]) else {"normalized_shape": shape}


@rule("layer_norm", "rms_norm", update=_normalized_shape)
def _layer_norm(an: Analysis, node: Node) -> None:
    x, *gains = node.inputs
    assert x is not None
    spaces, axes = list(an.of(x)), node.attrs["axes"]
    for v in gains:
        if v is None:
            continue
        own = an.of(v)
        for i in range(len(own)):
            axis = len(spaces) - len(own) + i
            if own[i].size > 1:
                spaces[axis] = an.tie(spaces[axis], own[i], node)
            an.role(v, i, 0, node)
    an.inexact([spaces[a] for a in axes], node, "normalized over")
    an.no_scale(spaces, node, "normalized")
    wanted = node.inputs[1:2] if node.op == "rms_norm" else node.inputs[1:3]
    fixed = len(wanted) == (1 if node.op == "rms_norm" else 2) and all(v is not None and an.is_const(v) for v in wanted)
    plain = node.op == "rms_norm" and len([v for v in node.inputs[2:] if v is not None]) == 0
    zero = an.zeros(x)
    an.set(
        node.output,
        spaces,
        [(fixed or (plain and zero[i])) if i in axes else plain and zero[i] for i in range(len(spaces))],
    )
    for extra in node.outputs[1:]:
        if extra.hint is not None and len(extra.hint) == len(spaces):
            an.set(
                extra,
                [
                    an.frozen(n, "statistic", node) if n > 1 and i in axes else spaces[i] if n > 1 else UNIT
                    for i, n in enumerate(extra.hint)
                ],
            )


@rule("lp_normalize")
def _lp_normalize(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None
    spaces, axes = an.of(x), node.attrs["axes"]
    zero = an.zeros(x)
    # A zero slab adds nothing to the norm: selection is exact there.
    an.inexact([spaces[a] for a in axes if not zero[a]], node, "normalized over")
    an.no_scale(spaces, node, "normalized")
    an.set(node.output, spaces, zero)


@rule("local_response_norm")
def _lrn(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None
    spaces = an.of(x)
    an.freeze(spaces[1], "normalized over a window of neighbours", node)
    an.no_scale(spaces, node, "normalized")
    an.set(node.output, spaces, an.zeros(x))


@rule("softmax", "log_softmax")
def _softmax(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None
    spaces = an.of(x)
    an.freeze(spaces[node.attrs["axis"]], "normalized by softmax", node, ("select",))
    an.no_scale(spaces, node, "softmax does not commute with scaling")
    an.set(node.output, spaces, False)
