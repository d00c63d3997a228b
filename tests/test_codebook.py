"""Codebooks: k-means of numbers and of groups; PV-tuning on digits never leaves the codebook and lowers the loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from foldline import passes as P
from foldline.graph.errors import ConfigError
from foldline.graph.fx import load_torch
from foldline.graph.onnx import load_onnx
from foldline.passes.base import Context
from foldline.passes.quantize.formats import Codebook
from foldline.passes.quantize.formats.codebook import kmeans_numbers, kmeans_vectors
from support.digits_nets import accuracy, digits, lenet


def test_kmeans_of_numbers_is_a_fixed_point_and_better_than_quantiles() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal(4000), rng.uniform(0.1, 2, 4000)
    centres = kmeans_numbers(x, w, 8, 300)
    assert (np.diff(centres) > 0).all()
    code = np.abs(x[:, None] - centres).argmin(1)
    np.testing.assert_allclose([np.average(x[code == k], weights=w[code == k]) for k in range(8)], centres, atol=1e-6)

    def error(c: np.ndarray) -> float:
        return float((w * np.square(x[:, None] - c).min(1)).sum())

    assert error(centres) < 0.9 * error(np.quantile(x, (np.arange(8) + 0.5) / 8))


def test_kmeans_of_groups_finds_clusters_and_uses_every_code() -> None:
    rng = np.random.default_rng(0)
    centres = rng.uniform(-1, 1, (16, 2))
    points = (centres[rng.integers(0, 16, 3000)] + rng.normal(0, 0.02, (3000, 2))).astype(np.float32)
    found = kmeans_vectors(points, np.ones(3000), 16, 40, 0)
    assert np.square(points[:, None] - found).sum(2).min(1).mean() < 0.01
    np.testing.assert_array_equal(found, kmeans_vectors(points, np.ones(3000), 16, 40, 0))


def test_groups_of_correlated_numbers_beat_single_ones_at_equal_bits() -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((64, 128, 1))
    w = (base + 0.3 * rng.standard_normal((64, 128, 2))).reshape(64, 256).astype(np.float32)
    errors = [np.square(Codebook(bits=2 * s, step=s).fit(w).decode() - w).mean() for s in (1, 2)]
    assert errors[1] < 0.8 * errors[0]
    assert Codebook(bits=4, step=2).fit(w).codes.shape == (64, 128)


# ---- PV-tuning ----------------------------------------------------------------------------------------------------
def tuned(graph, **options):
    x, y, _, _ = digits()
    data = [(x[i : i + 150], y[i : i + 150]) for i in range(0, 300, 150)]
    tuning = P.FinetuneQuantized(format="kmeans", bits=2, convolutions=True, data=data, rounds=4, steps=4, **options)
    return tuning.apply(graph, Context())


def test_codes_and_codebooks_in_turns_beat_codebooks_alone() -> None:
    losses = {}
    for name, share in (("codebook", 0.0), ("pv", 0.05)):
        graph = load_torch(lenet(), digits()[0][:2])
        outcome = tuned(graph, share=share)
        history = outcome.details["loss"]
        assert all(b <= a for a, b in zip(history, history[1:], strict=False))
        losses["start"], losses[name] = history[0], history[-1]
        weights = {k: w for k, w in graph.weights.items() if k.endswith("_table") and "foldline" not in k}
        assert len(weights) == 5 and all(w.shape == (4,) for w in weights.values())  # values stay in the codebook
        losses[f"{name} accuracy"] = accuracy(graph.to_model())
    assert losses["pv"] <= losses["codebook"] < losses["start"]
    assert losses["pv"] < 0.9 * losses["codebook"]


@pytest.mark.slow
def test_onnx_and_torch_are_tuned_alike() -> None:
    x = digits()[0][:2]
    program = torch.onnx.export(
        lenet(), (x,), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    found = []
    for graph in (load_torch(lenet(), x), load_onnx(program.model_proto)):
        found.append(tuned(graph, share=0.05).details["loss"])
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-3)
    assert found[1][-1] < found[1][0] and abs(found[0][-1] - found[1][-1]) < 0.2 * found[0][0]


def test_scales_are_trained_where_there_is_no_codebook() -> None:
    graph = load_torch(lenet(), digits()[0][:2])
    x, y, _, _ = digits()
    outcome = P.FinetuneQuantized(
        format="int", bits=2, block=16, convolutions=True, data=[(x[:200], y[:200])], rounds=2, steps=4, share=0.05
    ).apply(graph, Context())
    assert outcome.details["loss"][-1] < 0.95 * outcome.details["loss"][0]
    graph = load_torch(lenet(), digits()[0][:2])
    with pytest.raises(ConfigError, match="cannot be trained"):
        P.FinetuneQuantized(format="bcq", bits=2, data=[(x[:9], y[:9])]).apply(graph, Context())
