"""ReplaceNorm with elementwise functions: which one fits better, where gains go, no statistics at run time."""

from __future__ import annotations

import foldline as fl
import numpy as np
import pytest
import torch
from foldline import passes as P
from foldline.graph.errors import ConstraintError
from foldline.graph.execute import run_graph
from foldline.passes.base import Context
from foldline.passes.reparam.elementwise_norm import eln, fit
from support import trained_language as language
from support.digits_vit import digits_vit
from support.frontends import FRONT_ENDS, load, toy_graph
from support.language_shapes import batches, language_graph


def test_a_planted_function_is_found() -> None:
    x = np.random.default_rng(0).normal(size=(200, 16)) * 3
    found = fit(x, 1.7 * eln(x, 4.0) + 0.2, "eln", shifted=True)
    assert found.error < 1e-3 and found.scale == pytest.approx(1.7, rel=0.02) and abs(found.shift - 0.2) < 0.01


def test_one_coordinate_of_a_layer_norm_is_an_eln_where_the_others_stay() -> None:
    """y_i = x_i sqrt(D) / sqrt(C + x_i^2), C the others' sum of squares: exact for the RMS norm's coordinate."""
    rng = np.random.default_rng(0)
    others, moving = rng.normal(size=15), np.linspace(-9, 9, 101)
    rows = np.concatenate([np.tile(others, (101, 1)), moving[:, None]], 1)
    wanted = rows / np.sqrt(np.square(rows).mean(1, keepdims=True))
    np.testing.assert_allclose(4 * eln(moving, np.square(others).sum()), wanted[:, -1], rtol=1e-12)


@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("form", ["eln", "dyt"])
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_gains_fold_and_no_mean_is_left(shape: str, form: str, front: str) -> None:
    graph = language_graph(shape, front)
    outcome = P.ReplaceNorm(form=form).apply(graph, Context(calibration=batches()))
    assert outcome.details["replaced"] == 5
    assert not [n for n in graph.nodes if n.op in ("layer_norm", "rms_norm", "mean", "var", "std")]
    example = batches()[0]
    folded = fl.Pipeline([P.Fold()]).run(graph, example).graph
    one, two = (run_graph(g, g.bind(example))[0][0] for g in (graph, folded))
    assert np.abs(one - two).max() < 1e-5 * np.abs(one).max()
    left = [n.name for n in folded.nodes if n.name.endswith(("_gained", "_shifted"))]
    # the final norm's gain goes into the head; a shift needs a bias there, which neither head has
    assert len(left) <= (1 if shape == "gpt2" else 0), left


def test_no_norm_is_said() -> None:
    x = toy_graph("plain_cnn", "fx")
    with pytest.raises(ConstraintError, match="no norm to replace"):
        P.ReplaceNorm(form="eln").apply(x, Context(calibration=[]))
    with pytest.raises(ConstraintError, match="no norm to replace"):
        P.ReplaceNorm(form="dyt", ignore=["*"]).apply(language_graph("gpt2", "fx"), Context(calibration=batches()))


def fits(graph: object, calibration: list) -> list[tuple[float, float]]:
    outcome = P.ReplaceNorm(form="eln").apply(graph, Context(calibration=calibration))  # type: ignore[arg-type]
    return [(e["eln"], e["dyt"]) for e in outcome.details["errors"].values()]


def test_eln_fits_better_than_dyt_in_a_trained_vision_transformer() -> None:
    model, (images, _), _ = digits_vit()
    found = fits(load(model, (images[:64],), "fx"), [(images[i : i + 64],) for i in range(0, 256, 64)])
    assert sum(a < b for a, b in found) > len(found) / 2, found


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_eln_fits_better_than_dyt_in_a_trained_language_model(shape: str) -> None:
    model, calibration = language.trained(shape), language.calibration()
    found = fits(load(model, calibration[0], "fx"), calibration)
    assert len(found) == 7 and sum(a < b for a, b in found) > len(found) / 2, found


def test_torch_is_what_it_trains() -> None:
    """The result is a module whose C, gains and shifts are parameters."""
    model, (images, _), _ = digits_vit()
    made = P.replace_norm(model, (images[:16],), form="eln", calibration=[(images[:64],)]).model
    assert sum(name.endswith((".c", "_c")) or "_c" in name for name, _ in made.named_parameters()) >= 1
    assert all(torch.isfinite(p).all() for p in made.parameters())
