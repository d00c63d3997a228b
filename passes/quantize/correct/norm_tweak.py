"""Norm tweaking: after quantization only the gains and biases of norms move, until channels look as in the float."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from ....graph.errors import ConstraintError
from ....graph.execute import batches_of, run_graph
from ....graph.ir import Graph, Node, Value
from ...base import Context, Contract, Decision, Needs, Outcome, Pass
from .norms import Norm, norms
from .sites import float_reference

if TYPE_CHECKING:
    from .walk import PairWalk

MOST = 2.0
"""Largest factor by which a gain moves, either way."""
SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)
"""Shares of the way that ``strength="auto"`` compares."""
CHECKED = 8
"""Batches on which it compares them."""
SAME = 1e-6
"""Norms whose output differs by less (relative to its largest element) are left as they are."""


class NormTweak(Pass):
    """Update only norm gains and biases, layer by layer, to match the float model's channel statistics.

    In one walk through both models, in order of execution, the loss of each norm's output is the sum over channels of
    |mean_q - mean_float| + |var_q - var_float|, taken over all tokens or positions. Its minimum is known: with
    s = sd_float / sd_q and t = mean_float - s mean_q the tweaked norm gives s y + t, so gain *= s and
    bias = s bias + t, and the loss is zero. Without a bias (RMSNorm) only s is free, and its best
    value is one of a few candidates (:func:`gain_only`). Gains move by at most a factor of 2. Every other tensor keeps
    its bytes, no operator is added. At 16 bits or more nothing moves by more than rounding. Source: "Norm
    Tweaking: High-performance Low-bit Quantization of Large Language Models" (its gradient steps replaced by the
    closed form).

    Matching every channel is not the aim itself: at 2 bits a norm's variance is in good part rounding noise, and what
    matches it harms the outputs. The source keeps to tiny steps; ``strength="auto"`` goes the share of the way, out of
    a few and nothing, after which the outputs (taken as logits) have the least KL divergence from the float model's on
    the same data.

    ``data="generated"``: calibration text that the float model writes itself (a causal language model: token ids in,
    logits [N, T, V] out), from a first token drawn over the vocabulary, the next ones by the model's own
    distribution.

    Raises:
        ConfigError: no float model is known, or there is no data.
        ConstraintError: there is no norm of the same name in both, or the model writes no text.
        UnsupportedOp: an ONNX operator has no torch implementation.
    """

    name: ClassVar[str] = "norm_tweak"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    needs: ClassVar[Needs] = Needs.CALIBRATION
    requires: ClassVar[frozenset[str]] = frozenset({"quantized"})

    data: Literal["calibration", "generated"] = "calibration"
    """Where the statistics come from: calibration batches, or text that the float model writes itself."""
    calibration: Any = Field(default=None, exclude=True, repr=False)
    """Batches of typical inputs; the run's own when absent."""
    samples: int = Field(default=16, ge=1)
    """Sequences written for data="generated"."""
    length: int | None = Field(default=None, ge=2)
    """Their length in tokens; that of the example inputs when absent."""
    strength: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"
    """Share of the way towards the closed form that each norm goes; "auto": the one that serves the outputs best."""
    reference: Any = Field(default=None, exclude=True, repr=False)
    """The float model (anything fl.load takes, or a graph), where P.Quantize ran elsewhere."""

    def requirement(self) -> Needs:
        return Needs.CALIBRATION if self.data == "calibration" else Needs.NOTHING

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        reference = float_reference(ctx, self.reference, self.name)
        twins = {norm.node.name: norm.node for norm in norms(reference)}
        found = {n.node.name: n for n in norms(graph) if n.node.name in twins}
        if not found:
            raise ConstraintError(
                "there is no norm to tweak",
                node=self.name,
                expected="layer, RMS, group or instance norms with a gain of their own",
                found=", ".join(sorted({n.op for n in graph.nodes if "norm" in n.op})) or "none",
                hint="batch norms are P.BnRetune's",
            )
        if self.data == "generated":
            from .generate import generated_text

            batches: Any = generated_text(reference, self.samples, self.length, ctx.example_inputs, ctx.seed)
        else:
            batches = self.batches(ctx)
        strength: Any = self.strength
        tried: dict[float, float] = {}
        if strength == "auto":
            batches = list(batches)
            strength, tried = _best_share(graph, reference, batches, ctx)
        decisions = tweaked(graph, reference, batches, strength, ctx) if strength else []
        if not strength:
            decisions = [
                Decision(name, "left", "every tweak moves the outputs away from the float ones") for name in found
            ]
        moved = [d for d in decisions if d.action == "tweaked"]
        details: dict[str, Any] = {"tweaked": len(moved), "left": len(decisions) - len(moved), "strength": strength}
        return Outcome(decisions=decisions, details=details | ({"divergences": tried} if tried else {}))


def tweaked(graph: Graph, reference: Graph, batches: Any, strength: float, ctx: Context) -> list[Decision]:
    """Tweak every norm that both graphs have, in order of execution."""
    from .walk import PairWalk

    walk = PairWalk(graph, reference, batches)
    twins = {norm.node.name: norm.node for norm in norms(reference)}
    found = {n.node.name: n for n in norms(graph) if n.node.name in twins}
    pairs = [(norm.node, twins[name]) for name, norm in found.items()]
    return [_tweak(walk, found[node.name], twin, strength) for node, twin in walk.visit(pairs, ctx.progress)]


def _best_share(graph: Graph, reference: Graph, batches: list[Any], ctx: Context) -> tuple[float, dict[float, float]]:
    """The share after which the outputs are nearest to the float ones (the least among equals), and what was found."""
    inputs = list(islice(batches_of(reference, batches), CHECKED))
    wanted = [run_graph(reference, one)[0] for one in inputs]
    found: dict[float, float] = {}
    for share in SHARES:
        trial = graph.clone() if share else graph
        if share:
            tweaked(trial, reference, batches, share, ctx)
        made = [run_graph(trial, one)[0] for one in inputs]
        found[share] = sum(
            output_divergence(a, b) for xs, ys in zip(wanted, made, strict=True) for a, b in zip(xs, ys, strict=True)
        )
    return min(found, key=lambda share: (found[share], share)), found


def output_divergence(wanted: np.ndarray, made: np.ndarray) -> float:
    """Mean KL divergence of the softmax over the last axis, in nats; relative squared error where it is short."""
    if wanted.dtype.kind != "f":
        return 0.0
    a, b = wanted.astype(np.float64), made.astype(np.float64)
    if a.ndim < 2 or a.shape[-1] < 2:
        return float(np.square(a - b).sum() / max(np.square(a).sum(), 1e-30))
    logs = [x - x.max(-1, keepdims=True) for x in (a, b)]
    logs = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logs]
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean())


def channel_loss(mu_f: np.ndarray, var_f: np.ndarray, mu_q: np.ndarray, var_q: np.ndarray) -> np.ndarray:
    """|mean_q - mean_float| + |var_q - var_float| per channel."""
    return np.asarray(np.abs(mu_q - mu_f) + np.abs(var_q - var_f))


def affine(mu_f: np.ndarray, var_f: np.ndarray, mu_q: np.ndarray, var_q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(s, t) per channel such that s y + t has the float mean and variance; s = 1 where a channel is constant."""
    alive = (var_q > 1e-20) & (var_f > 1e-20)
    s = np.where(alive, np.sqrt(var_f / np.where(alive, var_q, 1.0)), 1.0)
    s = np.clip(s, 1 / MOST, MOST)
    return s, mu_f - s * mu_q


def gain_only(mu_f: np.ndarray, var_f: np.ndarray, mu_q: np.ndarray, var_q: np.ndarray) -> np.ndarray:
    """The s > 0 per channel with the least |s mean_q - mean_float| + |s^2 var_q - var_float|.

    The loss is piecewise quadratic in s: its least value within [1/2, 2] lies at an end, at a kink, or where the
    derivative of a piece vanishes.
    """
    one = np.ones_like(mu_f)
    with np.errstate(divide="ignore", invalid="ignore"):
        inner = [mu_f / mu_q, np.sqrt(var_f / var_q), np.abs(mu_q) / (2 * var_q)]
        candidates = np.stack([one, one / MOST, one * MOST, *inner])
    candidates = np.clip(np.where(np.isfinite(candidates) & (candidates > 0), candidates, 1.0), 1 / MOST, MOST)
    losses = np.abs(candidates * mu_q - mu_f) + np.abs(candidates**2 * var_q - var_f)
    return np.asarray(np.take_along_axis(candidates, losses.argmin(0)[None], 0)[0])


def _tweak(walk: PairWalk, norm: Norm, twin: Node, strength: float) -> Decision:
    from .walk import channel_moments

    node, axis = norm.node, norm.axis
    both = walk.outputs(node, twin)
    if both is None:
        return Decision(node.name, "left", "its output is not computed by itself")
    size = both[0][0].shape[axis]
    gain, bias = norm.gain, norm.bias
    if not own(gain, size):
        return Decision(node.name, "left", "its gain is not a vector of its own (absent, shared or over several axes)")
    top = max(float(y.abs().max()) for y in both[0])
    if max(float((y - z).abs().max()) for y, z in zip(*both, strict=True)) <= SAME * top:
        return Decision(node.name, "left", "its output is the float model's")
    (mu_f, var_f), (mu_q, var_q) = (channel_moments(side, axis) for side in both)
    before = float(channel_loss(mu_f, var_f, mu_q, var_q).sum())
    shifts = own(bias, size)
    if shifts:
        s, t = affine(mu_f, var_f, mu_q, var_q)
    else:
        s, t = gain_only(mu_f, var_f, mu_q, var_q), np.zeros(size)
    s, t = 1 + strength * (s - 1), strength * t
    after = float(channel_loss(mu_f, var_f, s * mu_q + t, s**2 * var_q).sum())
    if not after < before:
        return Decision(node.name, "left", "its channels already have the float model's statistics")
    _write(walk, gain, lambda old: old * s.reshape(old.shape))
    if shifts:
        _write(walk, bias, lambda old: old * s.reshape(old.shape) + t.reshape(old.shape))
    if gain not in node.inputs:  # a norm that is written out, with a bias: its product comes before its sum
        assert gain is not None
        walk.here.remake(gain.uses[0][0].output)
    walk.repeat()
    what = "gain and bias" if shifts else "gain (it has no bias)"
    return Decision(
        node.name,
        "tweaked",
        f"{what}: |dmean| + |dvar| {before:.3g} -> {after:.3g}",
        {"before": before, "after": after},
    )


def _write(walk: PairWalk, value: Value | None, change: Any) -> None:
    data = None if value is None else value.const()
    assert value is not None and data is not None
    walk.change(value, change(data.astype(np.float64)).astype(data.dtype))


def own(value: Value | None, size: int) -> bool:
    """Whether a stored float vector of this length belongs to one operator alone."""
    if value is None or value.weight is None or value.weight.size != size:
        return False
    return value.weight.dtype.startswith(("float", "bfloat")) and len(value.uses) == 1
