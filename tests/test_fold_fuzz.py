"""Random models with all folding rules on, judged by the model as it was. `make fuzz MINUTES=10` runs it for longer."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from foldline.graph.errors import BackendError
from foldline.graph.execute import run_graph
from foldline.graph.ir import Graph
from foldline.graph.load import load
from foldline.passes import Clean, Fold
from foldline.passes.base import Context
from foldline.passes.checks import check_graph
from support.fold_nets import random_model
from support.random_nets import KINDS, random_net

RTOL = 1e-4
NUDGE = 2.0**-22


def judge(before: Graph, after: Graph, x: np.ndarray, label: str, *, quantized: bool = False) -> None:
    """Every output agrees on random, negative, zero, large and resized inputs, as far as the model itself is sure."""
    check_graph(after)
    (name,) = (v.name for v in before.inputs)
    assert [v.name for v in after.inputs] == [name]
    assert [v.name for v in after.outputs] == [v.name for v in before.outputs], label
    rng = np.random.default_rng(0)
    resized = rng.standard_normal((3, *x.shape[1:])).astype(np.float32)
    inputs = {"random": x, "negative": -np.abs(x), "zero": 0 * x, "large": 100 * x, "resized": resized}
    for kind, data in inputs.items():
        try:
            want = run_graph(before, {name: data})[0]
        except BackendError:
            return  # the runtime fails on the model as it came: nothing to compare with
        got = run_graph(after, {name: data})[0]
        nudged = data * (1 + NUDGE * rng.choice((-1, 1), data.shape)).astype(np.float32)
        sure = run_graph(before, {name: nudged})[0]
        for value, a, b, c in zip(before.outputs, want, got, sure, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype, f"{label}: {value.name} on {kind} inputs"
            peak = float(np.abs(a).max()) if a.size else 0.0
            bound = (RTOL * peak + 32 * float(np.abs(a - c).max()) if a.size else 0.0) + 1e-7
            wrong = np.abs(a - b) > bound
            share = float(wrong.mean()) if a.size else 0.0
            # where the model quantizes, a value between two steps may fall on the other side
            assert share <= (0.05 if quantized else 0.0), (
                f"{label}: {value.name} on {kind} inputs: {float(np.abs(a - b).max()):.3g} of {peak:.3g}"
            )


def fuzz_onnx(seed: int) -> None:
    model, taken, quantized = random_model(seed)
    before = load(model)
    after = before.clone()
    label = f"ONNX seed {seed} ({', '.join(taken)})"
    try:
        Fold().apply(after, Context())
    except Exception as error:
        raise AssertionError(f"{label}: {error}") from error
    x = np.random.default_rng(seed).standard_normal((2, 4, 8, 6)).astype(np.float32)
    judge(before, after, x, label, quantized=quantized)
    again = after.clone()
    counts = Fold().apply(again, Context()).details
    assert not counts["folded"] and not counts["stored"], f"{label}: a second call still finds {counts}"
    onnx.checker.check_model(after.to_model())


def fuzz_fx(seed: int) -> None:
    rng = random.Random(seed)
    kinds = [rng.choice(KINDS) for _ in range(6)]
    model, (x,) = random_net(kinds, seed)
    label = f"FX seed {seed} ({', '.join(kinds)})"
    before = load(model, (x,))
    after = before.clone()
    try:
        Fold().apply(after, Context())
    except Exception as error:
        raise AssertionError(f"{label}: {error}") from error
    judge(before, after, x.numpy(), label)


@pytest.mark.parametrize("seed", range(40))
def test_random_onnx_models(seed: int) -> None:
    fuzz_onnx(seed)


@pytest.mark.parametrize("seed", range(4))
def test_random_modules(seed: int) -> None:
    torch.manual_seed(seed)
    fuzz_fx(seed)


@pytest.mark.parametrize("seed", range(3))
def test_windows_of_random_onnx_models_agree(seed: int) -> None:
    """Every rewrite on its own window: what fails there would be a wrong rule."""
    before = load(random_model(1000 + seed)[0])
    for step in (Fold(verify="window"), Clean(verify="window")):
        outcome = step.apply(before.clone(), Context())
        wrong = [d.reason for d in outcome.decisions if "differs by" in d.reason]
        assert not wrong


@pytest.mark.slow
def test_fuzz_by_the_clock() -> None:
    """New seeds for FUZZ_MINUTES (2 if unset); FUZZ_SEED starts elsewhere. All failures are listed at the end."""
    stop = time.monotonic() + 60 * float(os.environ.get("FUZZ_MINUTES", "2"))
    seed = int(os.environ.get("FUZZ_SEED", "10000"))
    failures: list[str] = []
    tried = 0
    while time.monotonic() < stop and len(failures) < 20:
        run: Callable[[int], None] = fuzz_fx if tried % 8 == 7 else fuzz_onnx
        try:
            run(seed)
        except AssertionError as error:
            failures.append(str(error).splitlines()[0])
        seed, tried = seed + 1, tried + 1
    print(f"{tried} random models, {len(failures)} failures")
    assert not failures, "\n".join(failures)
