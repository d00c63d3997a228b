"""Rules of reshape and its kin: products of axes are merged and factored, never guessed from equal lengths."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from ..ir import Node
from ..refine import Conflict, factor
from ..space import UNIT, Space, fresh, make_prod
from .table import rule

if TYPE_CHECKING:
    from ..analysis import Analysis, Resize


def segments(before: list[int], after: list[int]) -> list[tuple[range, range]]:
    """Split a reshape into independent pieces at every position where the cumulative products agree."""
    out = []
    i = j = 0
    while i < len(before) or j < len(after):
        i0, j0 = i, j
        a = b = 1
        if i < len(before):
            a, i = a * before[i], i + 1
        if j < len(after):
            b, j = b * after[j], j + 1
        while a != b:
            if a < b:
                if i >= len(before):
                    raise Conflict(f"reshape of {before} to {after}")
                a, i = a * before[i], i + 1
            else:
                if j >= len(after):
                    raise Conflict(f"reshape of {before} to {after}")
                b, j = b * after[j], j + 1
        out.append((range(i0, i), range(j0, j)))
    return out


def reshape_spaces(
    an: Analysis, node: Node, spaces: list[Space], zero: list[bool], after: list[int]
) -> tuple[list[Space], list[bool], list[int | None]]:
    """Spaces, zero flags and (where an axis passes unchanged) source axes of the reshaped value."""
    before = [e.size for e in spaces]
    if 0 in before or 0 in after:
        raise Conflict("reshape of an empty tensor")
    # Axes of length 1 carry no index; leaving them out makes the alignment unique.
    src = [i for i, n in enumerate(before) if n != 1]
    dst = [j for j, n in enumerate(after) if n != 1]
    out: list[Space] = [UNIT] * len(after)
    flags = [False] * len(after)
    origin: list[int | None] = [None] * len(after)
    for ins, outs in segments([before[i] for i in src], [after[j] for j in dst]):
        i_axes, j_axes = [src[i] for i in ins], [dst[j] for j in outs]
        if len(i_axes) == 1 and len(j_axes) == 1:
            out[j_axes[0]], flags[j_axes[0]], origin[j_axes[0]] = spaces[i_axes[0]], zero[i_axes[0]], i_axes[0]
            continue
        whole = make_prod([spaces[i] for i in i_axes])
        passing = all(zero[i] for i in i_axes)
        try:
            pieces: list[Space] = []
            for j in reversed(j_axes[1:]):
                whole, inner = factor(whole, after[j])
                pieces.append(inner)
            pieces.append(whole)
        except Conflict as c:
            an.freeze([spaces[i] for i in i_axes], f"reshaped across its structure: {c}", node)
            pieces = [an.frozen(after[j], "reshaped across its structure", node) for j in reversed(j_axes)]
        for j, e in zip(reversed(j_axes), pieces, strict=True):
            out[j], flags[j] = e, passing
    return out, flags, origin


def new_shape(re: Resize, node: Node) -> dict[str, Any]:
    """The ``shape`` that a node is told, with the sizes its output has now; those it is not told stay untold."""
    old = node.attrs.get("shape")
    if old is None:
        return {}
    new = re.shape(node.output)
    changed = [n if isinstance(o, int) and o != -1 else o for o, n in zip(old, new, strict=True)]
    return {} if changed == list(old) else {"shape": changed}


@rule("reshape", update=new_shape, linear=True)
def _reshape(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None and node.output.hint is not None
    spaces, zero, origin = reshape_spaces(an, node, list(an.of(x)), an.zeros(x), list(node.output.hint))
    an.set(node.output, spaces, zero)
    an.keep_root(x, node.output, origin)


@rule("squeeze", "unsqueeze", linear=True)
def _squeeze(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None and node.output.hint is not None
    spaces, zero = list(an.of(x)), an.zeros(x)
    axes = set(node.attrs["axes"])
    if node.op == "squeeze":
        keep = [i for i in range(len(spaces)) if i not in axes]
        source: list[int | None] = list(keep)
    else:
        rest = iter(range(len(spaces)))
        source = [None if j in axes else next(rest) for j in range(len(node.output.hint))]
    an.set(
        node.output,
        [UNIT if i is None else spaces[i] for i in source],
        [False if i is None else zero[i] for i in source],
    )
    an.keep_root(x, node.output, source)


@rule("expand", update=new_shape, linear=True)
def _expand(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None and node.output.hint is not None
    own, zero = an.of(x), an.zeros(x)
    lead = len(node.output.hint) - len(own)
    spaces: list[Space] = []
    flags: list[bool] = []
    origin: list[int | None] = []
    for j, n in enumerate(node.output.hint):
        i = j - lead
        if i >= 0 and own[i].size == n:
            spaces.append(own[i])
            flags.append(zero[i])
            origin.append(i)
        else:
            spaces.append(_copies(an, node, n))
            flags.append(False)
            origin.append(None)
    an.set(node.output, spaces, flags)
    an.keep_root(x, node.output, origin)


def _copies(an: Analysis, node: Node, n: int) -> Space:
    """A new axis of equal copies: no weight makes them apart, so they cannot be scaled apart."""
    e = fresh(n)
    an.no_scale(e, node, "copies of one slab")
    return e


def _repeats(re: Resize, node: Node) -> dict[str, Any]:
    memo = re.memo(node).get("repeats")
    if memo is None:
        return {}
    new = [re.size_of(e) for e in memo]
    if node.op == "tile":
        old = list(node.attrs["repeats"])
        new = [n if isinstance(o, int) else o for o, n in zip(old, new, strict=True)]
        return {} if new == old else {"repeats": new}
    return {} if new[0] == node.attrs["repeats"] else {"repeats": new[0]}


@rule("tile", update=_repeats, linear=True)
def _tile(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None and node.output.hint is not None
    own, zero = list(an.of(x)), an.zeros(x)
    lead = len(node.output.hint) - len(own)
    repeats: list[Space] = []
    spaces: list[Space] = []
    flags: list[bool] = []
    for j, n in enumerate(node.output.hint):
        e = own[j - lead] if j >= lead else UNIT
        r = _copies(an, node, n // max(e.size, 1))
        repeats.append(r)
        spaces.append(make_prod([r, e]))
        flags.append(j >= lead and zero[j - lead] and r.size == 1)  # a removed copy is not zero in the masked model
    an.memo[node] = {"repeats": repeats}
    an.set(node.output, spaces, flags)


@rule("repeat_interleave", update=_repeats, linear=True)
def _repeat_interleave(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None
    spaces, axis = list(an.of(x)), node.attrs["axis"]
    r = _copies(an, node, node.attrs["repeats"])
    an.memo[node] = {"repeats": [r]}
    spaces[axis] = make_prod([spaces[axis], r])
    an.set(node.output, spaces, [z and (i != axis or r.size == 1) for i, z in enumerate(an.zeros(x))])


@rule("pixel_shuffle", linear=True)
def _pixel_shuffle(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None
    *lead, c, h, w = an.of(x)
    r = node.attrs["factor"]
    if node.attrs.get("mode", "crd") == "crd":
        rest, rw = factor(c, r)
        co, rh = factor(rest, r)
    else:
        rest, co = factor(c, c.size // (r * r))
        rh, rw = factor(rest, r)
    an.freeze([rh, rw], "upscale factor", node)
    zero = an.zeros(x)
    at = len(lead)
    an.set(node.output, [*lead, co, make_prod([h, rh]), make_prod([w, rw])], [*zero[:at], zero[at], False, False])


@rule("pixel_unshuffle", linear=True)
def _pixel_unshuffle(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None
    *lead, c, h, w = an.of(x)
    r = node.attrs["factor"]
    (ho, rh), (wo, rw) = factor(h, r), factor(w, r)
    an.freeze([rh, rw], "downscale factor", node)
    order = [c, rh, rw] if node.attrs.get("mode", "crd") == "crd" else [rh, rw, c]
    zero = an.zeros(x)
    an.set(node.output, [*lead, make_prod(order), ho, wo], [*zero[: len(lead)], zero[len(lead)], False, False])


@rule("unfold", linear=True)
def _unfold(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None and node.output.hint is not None
    spaces, zero = an.of(x), an.zeros(x)
    an.freeze(spaces[2:], "window positions", node)
    taps = an.frozen(prod(node.attrs["kernel"]), "window positions", node)
    length = an.frozen(node.output.hint[-1], "window positions", node)
    an.set(node.output, [spaces[0], make_prod([spaces[1], taps]), length], [zero[0], zero[1], False])


@rule("fold", linear=True)
def _fold(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None and node.output.hint is not None
    spaces, zero = an.of(x), an.zeros(x)
    c, taps = factor(spaces[1], prod(node.attrs["kernel"]))
    an.freeze([taps, spaces[2]], "window positions", node)
    rest = [an.frozen(n, "window positions", node) for n in node.output.hint[2:]]
    an.set(node.output, [spaces[0], c, *rest], [zero[0], zero[1], *[False] * len(rest)])
