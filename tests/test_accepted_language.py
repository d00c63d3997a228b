"""What the methods for language models promise, judged by the perplexity of models trained here for some seconds."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import foldline as fl
import pytest
import torch
from foldline import passes as P
from foldline.graph.execute import run_graph
from foldline.graph.ir import Graph
from foldline.passes.base import Context
from support import trained_language as language
from support.frontends import load
from support.quantized import weights_as_integers
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import quantize_language_models as benchmark

pytestmark = pytest.mark.slow


@functools.cache
def float_graph(shape: str) -> Graph:
    return load(language.trained(shape), language.calibration(1)[0], "fx")


def perplexity(graph: Graph) -> float:
    return language.perplexity(graph.to_model())


# ---- F4-03 -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_norm_tweaking_lowers_the_perplexity_at_3_and_2_bits(shape: str) -> None:
    """F4-03: W3 and W2 perplexity falls, with RMS norms and layer norms; text that the model writes serves as well.

    The closed form as it is (strength 1) lowers it at 3 bits and raises it at 2: there a norm's variance is in good
    part rounding noise. Small shares of the way are what the source takes, and what "auto" finds.
    """
    before, batches = float_graph(shape), language.calibration()
    for bits in (3, 2):
        plain = weights_as_integers(before, bits)
        tweaked, whole = plain.clone(), plain.clone()
        ctx = Context(unquantized=before, calibration=batches, example_inputs=batches[0])
        outcome = P.NormTweak().apply(tweaked, ctx)
        P.NormTweak(strength=1.0).apply(whole, ctx)
        found = perplexity(tweaked)
        assert found < perplexity(plain), (bits, outcome.details)
        assert (found <= perplexity(whole) + 1e-9) and outcome.details["tweaked"] == 6
    generated = weights_as_integers(before, 3)
    P.NormTweak(data="generated", samples=32).apply(generated, Context(unquantized=before, example_inputs=batches[0]))
    assert perplexity(generated) < perplexity(weights_as_integers(before, 3))


# ---- F8-09 -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_pre_calibration_does_no_harm(shape: str) -> None:
    """F8-09: W4 perplexity at most that of rounding to nearest, within what the text can tell (0.05 %).

    The source's gain was not found: what brings a distribution nearer at 4 bits moves next to nothing (the largest
    shrinkage that is taken is 6e-5 of the largest weight squared), and the perplexity falls by 0.02 % on one model and
    rises by as much on the other. At 2 bits the divergence alone would choose shrinkages under which it rises to 37 and
    more; the guards on the weights' error keep it within 3 %.
    """
    before = float_graph(shape)
    for bits, bound in ((4, 1.0005), (2, 1.03)):
        shrunk = before.clone()
        outcome = P.PreCalibrate(bits=bits).apply(shrunk, Context())
        found, plain = (perplexity(weights_as_integers(g, bits)) for g in (shrunk, before))
        assert found <= bound * plain, (bits, outcome.details)
        assert all(d.data["kl_after"] <= d.data["kl_before"] for d in outcome.decisions)


# ---- F6-03, F6-04 ------------------------------------------------------------------------------------------------
def with_outliers() -> nn.Module:
    """The Llama with a few channels twenty times as large, at every place where large models have them; same function.

    Behind both norms of a layer (in the gain; the readers' columns are divided), in the values and in the gated
    product before the last matrix (rows of one matrix, columns of the next).
    """
    model: Any = language.trained("llama")
    generator = torch.Generator().manual_seed(0)

    def factors(size: int) -> torch.Tensor:
        s = torch.ones(size)
        s[torch.randperm(size, generator=generator)[: size // 20]] = 20.0
        return s

    with torch.no_grad():
        for layer in model.model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
                (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
            ):
                s = factors(64)
                norm.weight.mul_(s)
                for reader in readers:
                    reader.weight.div_(s)
            for up, down in ((attention.v_proj, attention.o_proj), (mlp.up_proj, mlp.down_proj)):
                s = factors(len(up.weight))
                up.weight.mul_(s[:, None])
                down.weight.div_(s)
    return model


SIMULATED: dict[str, Any] = {
    "weight_bits": 4, "activation_bits": 4, "block": 0, "symmetric": True, "per_token": True, "clip": False,
}  # fmt: skip
ONLINE = benchmark.ONLINE


def w4a4(model: nn.Module, *steps: P.Pass) -> tuple[float, list[dict[str, Any]]]:
    """Perplexity with weights per output channel and activations per token at 4 bits, and what the passes reported."""
    batches = language.calibration()
    pipe = fl.Pipeline([*steps, P.WeightOnly(bits=4, block=0, symmetric=True)])
    result = pipe.run(model, batches[0], calibration=batches, verify=False)
    low = benchmark.with_quantized_inputs(result.model, 4, "lm_head")
    return language.perplexity(low), [p.details for p in result.report.passes]


def test_transforms_at_4_bits_in_the_order_that_is_published() -> None:
    """F6-03, F6-04: W4A4 perplexity of a model with outlier channels: RTN > Hadamard > learned; no operator is left.

    Rotations alone that no operator remembers, those with one at run time before the last matrix (QuaRot), learned
    rotations and diagonals by the outputs (OSTQuant), learned Kronecker maps by the layers (FlatQuant).
    """
    model = with_outliers()
    whole = language.perplexity(model)
    assert whole == pytest.approx(language.perplexity(language.trained("llama")), rel=1e-4)  # the same function
    found = {
        "rtn": w4a4(model)[0],
        "merged": w4a4(model, P.Rotate())[0],
        "hadamard": w4a4(model, P.Rotate(online=ONLINE))[0],
        "ostquant": w4a4(
            model,
            P.Rotate(
                method="learned", objective="outputs", steps=40, online=ONLINE, float_inputs=["*lm_head"], **SIMULATED
            ),
        )[0],
        "flatquant": w4a4(model, P.FlatTransform(ignore=["*lm_head"], **SIMULATED))[0],
    }
    assert found["rtn"] > found["merged"] > found["hadamard"], found
    assert found["hadamard"] > found["ostquant"] and found["hadamard"] > found["flatquant"], found
    assert found["flatquant"] - whole < 0.1 * (found["rtn"] - whole), found  # nine tenths of the loss are gone


def test_learned_transforms_keep_the_function_before_rounding() -> None:
    """F6-03, F6-04: exact to 1e-4 without rounding; orthogonal to 1e-5; two products per input, conditions told."""
    model, batches = with_outliers(), language.calibration(2)
    graph = load(model, batches[0], "fx")
    logits = run_graph(graph, graph.bind(batches[0]))[0][0]
    learned, flat = graph.clone(), graph.clone()
    ctx = Context(calibration=batches)
    rotated = P.Rotate(method="learned", steps=10, objective="outputs", **SIMULATED).apply(learned, ctx)
    mapped = P.FlatTransform(steps=10, **SIMULATED).apply(flat, ctx)
    for after in (learned, flat):
        off = run_graph(after, after.bind(batches[0]))[0][0] - logits
        assert abs(off).max() < 1e-4 * abs(logits).max()
    said = [d.data for d in rotated.decisions if d.action == "rotated"]
    assert said and max(d["off_orthogonal"] for d in said) < 1e-5
    assert products(learned) == products(graph)
    sites = [d.data for d in mapped.decisions if d.action == "transformed"]
    assert sites and mapped.details["products"] == 2 * len(sites) and all(d["condition"] >= 1 for d in sites)
    assert products(flat) == products(graph) + 2 * len(sites)


def products(graph: Graph) -> int:
    return sum(n.op in ("linear", "matmul") for n in graph.nodes)
