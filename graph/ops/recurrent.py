"""Rule of LSTM, GRU and RNN: the hidden size is one atom behind every gate, layer and direction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..ir import Node, Value
from ..refine import Conflict, factor
from ..space import Space, fresh, make_sum, norm
from .movement import _isolate_all
from .table import rule

if TYPE_CHECKING:
    from ..analysis import Analysis, Resize


def _update(re: Resize, node: Node) -> dict[str, Any]:
    h = re.memo(node).get("hidden")
    if h is None or re.size_of(h) == node.attrs.get("hidden"):
        return {}
    return {"hidden": re.size_of(h)}


def _gates(an: Analysis, node: Node, e: Space, hidden: Space, count: int) -> None:
    """Axis of ``count * H`` rows: the gates stay, each carries the hidden atom."""
    outer, inner = factor(e, e.size // count)
    _isolate_all(outer)
    an.tie(inner, hidden, node)


@rule("lstm", "gru", "rnn", update=_update)
def _recurrent(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None and node.output.hint is not None
    onnx_form = node.attrs.get("layout", "torch") == "onnx"
    gates, dirs = node.attrs["gates"], 2 if node.attrs.get("bidirectional") else 1
    h0, c0 = node.input(1), node.input(2)
    weights = list(node.inputs[3:])
    hidden = fresh(_hidden_size(an, weights, gates, onnx_form))
    an.memo[node] = {"hidden": hidden}
    zero_state = True
    rank = len(an.of(x))
    batch = an.of(x)[0 if node.attrs.get("batch_first") else 1] if rank == 3 else None
    for state in (h0, c0):
        if state is not None:
            if batch is not None:
                an.tie(an.of(state)[1], batch, node)
            an.freeze(an.of(state)[:-1], "layers, directions or batch of a recurrent op", node)
            an.tie(an.of(state)[-1], hidden, node)
            zero_state = zero_state and an.zeros(state)[-1]
    source = norm(an.of(x)[-1])
    if onnx_form:
        _onnx_weights(an, node, weights, source, hidden, gates)
    else:
        _torch_weights(an, node, weights, source, hidden, gates, dirs)
    for e in (*an.of(x), hidden):
        an.no_scale(e, node, "gates are not linear")
    hidden = norm(hidden)
    lead = [norm(e) for e in an.of(x)[:-1]]
    y = node.outputs[0]
    assert y.hint is not None
    if onnx_form:
        t = lead[0] if len(lead) > 1 else fresh(1)
        b = lead[1] if len(lead) > 1 else fresh(1)
        an.set(y, [t, _const(an, node, y.hint[1]), b, hidden], [False, False, False, zero_state])
    else:
        last = hidden if dirs == 1 else make_sum([hidden, hidden])
        an.set(y, [*lead, norm(last)], [*[False] * len(lead), zero_state])
    for v in node.outputs[1:]:
        if v.hint is not None:
            rest = [_const(an, node, n) for n in v.hint[:-1]]
            an.set(v, [*rest, hidden], [*[False] * len(rest), zero_state])


def _const(an: Analysis, node: Node, n: int) -> Space:
    return an.frozen(n, "layers, directions or batch of a recurrent op", node)


def _hidden_size(an: Analysis, weights: list[Value | None], gates: int, onnx_form: bool) -> int:
    first = weights[0]
    if first is None:
        raise Conflict("recurrent op without weights")
    return an.of(first)[1 if onnx_form else 0].size // gates


def _torch_weights(
    an: Analysis, node: Node, weights: list[Value | None], source: Space, hidden: Space, gates: int, dirs: int
) -> None:
    per = 4 if node.attrs.get("has_biases", True) else 2
    if len(weights) != per * dirs * node.attrs.get("layers", 1):
        raise Conflict("projected or irregular recurrent weights")
    step = per * dirs
    for start in range(0, len(weights), step):
        for at in range(start, start + step, per):
            w_ih, w_hh, *biases = weights[at : at + per]
            assert w_ih is not None and w_hh is not None
            an.tie(an.of(w_ih)[1], source, node)
            an.tie(an.of(w_hh)[1], hidden, node)
            for v in (w_ih, w_hh, *biases):
                if v is not None:
                    _gates(an, node, an.of(v)[0], hidden, gates)
                    an.role(v, 0, 1, node)
            an.role(w_ih, 1, -1, node)
            an.role(w_hh, 1, -1, node)
        hidden = norm(hidden)
        source = hidden if dirs == 1 else norm(make_sum([hidden, hidden]))


def _onnx_weights(
    an: Analysis, node: Node, weights: list[Value | None], source: Space, hidden: Space, gates: int
) -> None:
    w, r, b = [*weights, None, None][:3]
    assert w is not None and r is not None
    an.tie(an.of(w)[2], source, node)
    an.tie(an.of(r)[2], hidden, node)
    for v, count in ((w, gates), (r, gates), (b, 2 * gates)):
        if v is not None:
            an.freeze(an.of(v)[0], "directions of a recurrent op", node)
            _gates(an, node, an.of(v)[1], hidden, count)
            an.role(v, 1, 1, node)
    an.role(w, 2, -1, node)
    an.role(r, 2, -1, node)
