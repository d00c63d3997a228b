"""NormTweak: only gains and biases of norms move, to the float model's channel statistics; any kind of norm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from foldline import Pipeline
from foldline import passes as P
from foldline.graph.errors import ConstraintError
from foldline.graph.execute import run_graph
from foldline.graph.ir import Graph
from foldline.passes.base import Context
from foldline.passes.quantize.correct.generate import generated_text
from foldline.passes.quantize.correct.norm_tweak import NormTweak, affine, channel_loss, gain_only
from foldline.passes.quantize.correct.norms import norms
from support.quantized import weights_as_integers
from support.small_nets import Mlp, conv_net, graph_of


def ids(seed: int = 0, rows: int = 16, length: int = 12) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 80, (rows, length)))


def net(kind: str, front: str = "fx") -> Graph:
    torch.manual_seed(1)
    model = Mlp(kind).eval()
    with torch.no_grad():
        for norm in model.norms:
            norm.weight.mul_(torch.rand_like(norm.weight) + 0.5)
    graph = graph_of(model, ids(), front)
    # the exporter transposes weights at run time: evaluated once, they are stored
    return Pipeline([P.Clean()]).run(graph, ids(), verify=False).graph if front == "onnx" else graph


def loss(before: Graph, after: Graph, batches: list[torch.Tensor]) -> list[float]:
    """The norm-tweaking loss of every norm's output, summed over channels."""
    names = [n.node.output.name for n in norms(before)]
    found = []
    for name in names:
        sides = []
        for graph in (before, after):
            x = np.concatenate([run_graph(graph, graph.bind(b), [name])[1][name] for b in batches])
            x = x.reshape(-1, x.shape[-1]).astype(np.float64)
            sides += [x.mean(0), x.var(0)]
        found.append(float(channel_loss(*sides).sum()))
    return found


@pytest.mark.parametrize("kind", ["layer", "plain", "rms"])
@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_only_norms_move_and_their_loss_falls(kind: str, front: str) -> None:
    before = net(kind, front)
    found = norms(before)
    assert len(found) == 3
    graph = weights_as_integers(before, 2)
    old = {n: w.numpy().tobytes() for n, w in graph.weights.items()}
    raw = loss(before, graph, [ids()])
    outcome = NormTweak(calibration=[ids()], strength=1.0).apply(graph, Context(unquantized=before))
    after = loss(before, graph, [ids()])
    gains = {v.weight.name for n in found for v in (n.gain, n.bias) if v is not None and v.weight is not None}
    moved = {n for n, w in graph.weights.items() if w.numpy().tobytes() != old[n]}
    assert moved and moved <= gains
    assert outcome.details["tweaked"] == 2  # the first norm reads what no quantized layer made
    if kind == "layer":  # mean and variance both reachable
        assert max(after[1:]) < 1e-3 * min(raw[1:])
    else:
        assert all(a < 0.9 * b for a, b in zip(after[1:], raw[1:], strict=True))


def test_sixteen_bit_weights_move_nothing() -> None:
    before = net("layer")
    graph = weights_as_integers(before, 16)
    old = {n: w.numpy().copy() for n, w in graph.weights.items()}
    NormTweak(calibration=[ids()], strength=1.0).apply(graph, Context(unquantized=before))
    for name, data in old.items():
        assert np.abs(graph.weights[name].numpy().astype(np.float64) - data).max() < 2e-5 * max(np.abs(data).max(), 1)
    y, z = (run_graph(g, g.bind(ids()))[0][0] for g in (before, graph))
    assert np.abs(y - z).max() < 1e-3 * np.abs(y).max()


def test_the_closed_forms_are_minima() -> None:
    rng = np.random.default_rng(0)
    mu_f, mu_q, (var_f, var_q) = rng.normal(size=50), rng.normal(size=50), rng.uniform(0.5, 1.5, (2, 50))
    s, t = affine(mu_f, var_f, mu_q, var_q)
    np.testing.assert_allclose(channel_loss(mu_f, var_f, s * mu_q + t, s**2 * var_q), 0, atol=1e-12)
    s = gain_only(mu_f, var_f, mu_q, var_q)
    best = channel_loss(mu_f, var_f, s * mu_q, s**2 * var_q)
    for other in np.linspace(0.5, 2, 301):
        assert (best <= channel_loss(mu_f, var_f, other * mu_q, other**2 * var_q) + 1e-12).all()


def test_text_that_the_model_writes_is_the_models_own() -> None:
    before = net("layer")
    made = generated_text(before, 8, 6, ids(), seed=1)
    again = generated_text(before, 8, 6, ids(), seed=1)
    (name,) = made[0]
    text = np.concatenate([b[name] for b in made])
    assert text.shape == (8, 6) and (text == np.concatenate([b[name] for b in again])).all()
    logits = run_graph(before, {name: made[0][name]})[0][0]
    np.testing.assert_array_equal(logits[:, 0].argmax(-1), made[0][name][:, 1])  # early tokens are the likeliest
    graph = weights_as_integers(before, 2)
    raw = loss(before, graph, [ids()])
    NormTweak(data="generated", samples=16, strength=1.0).apply(
        graph, Context(unquantized=before, example_inputs=ids())
    )
    assert sum(loss(before, graph, [ids()])) < sum(raw)


def test_it_says_what_it_lacks() -> None:
    model, batches = conv_net()
    before = graph_of(model, batches[0], "fx")
    with pytest.raises(ConstraintError, match="no norm to tweak"):
        NormTweak(calibration=batches).apply(weights_as_integers(before, 3), Context(unquantized=before))
    with pytest.raises(ConstraintError, match="writes no text"):
        generated_text(before, 4, None, batches[0])
