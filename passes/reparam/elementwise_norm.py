"""Layer and RMS norms replaced by elementwise functions: x / sqrt(C + x^2) (ELN) or tanh(a x) (DyT), fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...graph.errors import ConstraintError
from ...graph.ir import Graph, Node, Value
from ..base import Context, Decision
from ..prune.blocks import drop, root
from ..transform.common import matches
from ..transform.samples import Rows, sample

ROWS = 1024
"""Rows per norm that a fit looks at."""
Function = Callable[[np.ndarray, float], np.ndarray]


def eln(x: np.ndarray, c: float) -> np.ndarray:
    """``x / sqrt(C + x^2)``."""
    return x / np.sqrt(c + x * x)


def dyt(x: np.ndarray, a: float) -> np.ndarray:
    """``tanh(a x)``."""
    return np.tanh(a * x)


FORMS: dict[str, Function] = {"eln": eln, "dyt": dyt}


@dataclass(frozen=True)
class Fit:
    """``n(x) ~ scale f(x, number) + shift``, n being the norm before its gain.

    Attributes:
        number: C of ELN, a of DyT.
        error: squared error over the squares of n.
    """

    number: float
    scale: float
    shift: float
    error: float


def fit(x: np.ndarray, wanted: np.ndarray, form: str, *, shifted: bool) -> Fit:
    """Least squares in scale and shift for every number of a grid around the scale of the data, then a finer one.

    Args:
        x, wanted: float64 [rows, channels], what goes into the norm and what it makes of it.
        shifted: whether there is a place for a shift.
    """
    function, power = FORMS[form], max(float(np.square(x).mean()), 1e-30)
    unit = power if form == "eln" else power**-0.5

    def at(number: float) -> Fit:
        f = function(x, number)
        mean_f, mean_n = (float(f.mean()), float(wanted.mean())) if shifted else (0.0, 0.0)
        spread = float(np.square(f - mean_f).mean())
        scale = float(((f - mean_f) * (wanted - mean_n)).mean()) / max(spread, 1e-30)
        shift = mean_n - scale * mean_f
        error = float(np.square(wanted - scale * f - shift).mean()) / max(float(np.square(wanted).mean()), 1e-30)
        return Fit(number, scale, shift, error)

    best = min((at(unit * 2.0**k) for k in np.arange(-8, 12.5, 1.0)), key=lambda found: found.error)
    return min((at(best.number * 2.0**k) for k in np.arange(-1, 1.01, 0.125)), key=lambda found: found.error)


@dataclass(frozen=True, eq=False)
class Site:
    """A norm over the last axis, one operator or written out.

    Attributes:
        node: whose output is the result, gain and bias included.
        x: what is normalised.
        gain, bias: stored vectors, or None.
        centred: whether the mean is subtracted (a layer norm).
    """

    node: Node
    x: Value
    gain: Value | None
    bias: Value | None
    eps: float
    centred: bool


def sites(graph: Graph) -> list[Site]:
    """All layer and RMS norms over the last axis with stored gains, in graph order."""
    found = []
    for node in graph.nodes:
        site = _operator(node) if node.op in ("layer_norm", "rms_norm") else _written_out(node)
        if site is not None and all(v is None or v.is_const for v in (site.gain, site.bias)):
            found.append(site)
    return found


def _operator(node: Node) -> Site | None:
    x, axes = node.inputs[0], node.attrs.get("axes")
    if x is None or x.rank is None or axes is None or [a % x.rank for a in axes] != [x.rank - 1]:
        return None
    eps = float(node.attrs.get("eps") or 0.0)
    return Site(node, x, node.input(1), node.input(2), eps, node.op == "layer_norm")


def _written_out(node: Node) -> Site | None:
    """``x rsqrt(mean(x^2) + eps)``, with a gain and a bias behind it; x may be ``z - mean(z)``."""
    found = _quotient(node)
    if found is None:
        return None
    x, eps = found
    made = x.producer
    centred = False
    if made is not None and made.op == "sub" and (z := made.inputs[0]) is not None:
        mean = None if made.inputs[1] is None else root(made.inputs[1]).producer
        if mean is not None and mean.op == "mean" and _last_axis(mean) and mean.inputs[0] is z:
            x, centred = z, True
    gain = bias = None
    for op in ("mul", "add"):
        following = _vector_after(node, op)
        if following is not None and (op == "mul" or gain is not None):
            node, other = following
            gain, bias = (other, None) if op == "mul" else (gain, other)
    return Site(node, x, gain, bias, eps, centred)


def _quotient(node: Node) -> tuple[Value, float] | None:
    """(x, eps) of ``x * rsqrt(mean(x^2) + eps)`` or ``x / sqrt(mean(x^2) + eps)``."""
    if node.op not in ("mul", "div"):
        return None
    for i in (0, 1) if node.op == "mul" else (0,):
        x, other = node.inputs[i], node.inputs[1 - i]
        if x is None or other is None or x.is_const or other.is_const:
            continue
        below = root(other).producer
        if below is not None and below.op == "reciprocal" and node.op == "mul" and below.inputs[0] is not None:
            below = below.inputs[0].producer
            below = below if below is not None and below.op == "sqrt" else None
        elif below is not None and below.op != ("rsqrt" if node.op == "mul" else "sqrt"):
            below = None
        found = None if below is None or below.inputs[0] is None else _mean_square(below.inputs[0])
        if found is not None and found[0] is root(x):
            return found
    return None


def _mean_square(value: Value) -> tuple[Value, float] | None:
    """(x, eps) of ``mean(x^2) + eps`` over the last axis."""
    made, eps = value.producer, 0.0
    if made is not None and made.op == "add":
        number = next((v.const() for v in made.inputs if v is not None and v.is_const), None)
        rest = next((v for v in made.inputs if v is not None and not v.is_const), None)
        if number is None or number.size != 1 or rest is None:
            return None
        made, eps = rest.producer, float(number.reshape(-1)[0])
    if made is None or made.op != "mean" or not _last_axis(made) or made.inputs[0] is None:
        return None
    square = made.inputs[0].producer
    if square is None or square.inputs[0] is None:
        return None
    other = square.input(1)
    power = None if other is None or not other.is_const else other.const()
    twice = square.op == "mul" and other is square.inputs[0]
    if square.op == "square" or twice or (square.op == "pow" and power is not None and (power == 2).all()):
        return root(square.inputs[0]), eps
    return None


def _last_axis(node: Node) -> bool:
    x, axes = node.inputs[0], node.attrs.get("axes")
    rank = None if x is None else x.rank
    return (
        rank is not None
        and axes is not None
        and [a % rank for a in axes] == [rank - 1]
        and bool(node.attrs.get("keepdims"))
    )


def _vector_after(node: Node, op: str) -> tuple[Node, Value] | None:
    """(reader, vector) where all that reads a result is one product (sum) with a stored vector along its last axis."""
    value = node.output
    users = [u for u, _ in value.uses if u.op != "shape_of"]
    while len(users) == 1 and users[0].op in ("identity", "cast") and not value.is_output:
        value = users[0].output
        users = [u for u, _ in value.uses if u.op != "shape_of"]
    if len(users) != 1 or users[0].op != op or value.is_output or value.hint is None:
        return None
    other = next((v for v in users[0].inputs if v is not None and v.weight is not None), None)
    stored = other is not None and other.weight is not None and other.weight.size == value.hint[-1]
    return (users[0], other) if other is not None and stored else None


def replace_norms(
    graph: Graph, form: str, batches: Any, ignore: Sequence[str], ctx: Context
) -> tuple[list[Decision], dict[str, Any]]:
    """Fit and replace every layer and RMS norm over the last axis; decisions, and the errors of both forms."""
    found = [s for s in sites(graph) if not matches(s.node, ignore)]
    if not found:
        raise ConstraintError(
            "there is no norm to replace", node=graph.name, expected="layer or RMS norms over the last axis",
            found="none, or all ignored",
        )  # fmt: skip
    places = {s.x.name: (s.x.rank or 1) - 1 for s in found}
    rows = sample(graph, batches, places, Rows, ROWS, ctx.progress)
    decisions, errors = [], {}
    for site in found:
        x = rows[site.x.name].rows.astype(np.float64)
        fits = {name: fit(x, _normal(site, x), name, shifted=site.centred) for name in FORMS}
        name, errors[site.node.name] = site.node.name, {k: f.error for k, f in fits.items()}
        _write(graph, site, form, fits[form])
        data = {"number": fits[form].number, **{f"error_{k}": f.error for k, f in fits.items()}}
        reason = f"its norm became {form}, relative error {fits[form].error:.3g} of the normalised rows"
        decisions.append(Decision(name, "replaced", reason, data))
    graph.refresh()
    return decisions, {"replaced": len(found), "errors": errors}


def _normal(site: Site, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(1, keepdims=True) if site.centred else x
    return centred / np.sqrt(np.square(centred).mean(1, keepdims=True) + site.eps)


def _write(graph: Graph, site: Site, form: str, found: Fit) -> None:
    """The function, then gain and bias with scale and shift in them: products and sums that folding absorbs."""
    node, x = site.node, site.x
    assert x.hint is not None
    gain, bias = (None if v is None else v.const() for v in (site.gain, site.bias))
    width, dtype = x.hint[-1], np.dtype(x.dtype)
    old = np.ones(width) if gain is None else gain.astype(np.float64).reshape(-1)
    shift = found.shift * old + (0 if bias is None else bias.astype(np.float64).reshape(-1))
    at = x.producer

    def put(op: str, inputs: list[Any], part: str) -> Any:
        nonlocal at
        at = graph.insert(op, inputs, {}, name=f"{node.name}_{part}", after=at, scope=node.scope)
        return at.output

    def weight(data: Any, part: str) -> Any:
        return graph.add_weight(f"{node.name}.{part}", np.asarray(data, dtype), trainable=True)

    if form == "eln":
        power = put("add", [put("mul", [x, x], "square"), weight(found.number, "c")], "square_plus_c")
        y = put("mul", [x, put("rsqrt", [power], "rsqrt")], "eln")
    else:
        y = put("tanh", [put("mul", [x, weight(found.number, "a")], "steep")], "dyt")
    y = put("mul", [y, weight(found.scale * old, "gain")], "gained")
    if bias is not None or found.shift:
        y = put("add", [y, weight(np.broadcast_to(shift, (width,)), "shift")], "shifted")
    drop(graph, [(y.name, node.output.name)])
