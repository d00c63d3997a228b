"""Triton kernels: in Triton's interpreter against float64 formulas, and compiled for three GPUs without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import kernel_cases as kc

triton = pytest.importorskip("triton", reason="triton (extra cuda) is not installed")
CASES = kc.case_inputs()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[torch.Tensor]]:
    """What the kernels gave in a process that interprets Triton (the variable must be set before it is imported)."""
    path = tmp_path_factory.mktemp("kernels") / "results.pt"
    tests = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "support.kernel_cases", str(path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[torch.Tensor]] = torch.load(path)
    assert set(found) == set(CASES)
    return found


def of(kind: str) -> list[str]:
    return [name for name, (k, _) in CASES.items() if k == kind]


def error(found: torch.Tensor, expected: np.ndarray) -> float:
    """Largest difference over the largest number."""
    return float(np.abs(kc.wide(found) - expected).max() / max(np.abs(expected).max(), 1e-30))


def rounding(a: dict[str, Any]) -> float:
    return {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}[a["x"].dtype]


@pytest.mark.parametrize("name", of("int8"))
def test_int8(name: str, results: dict[str, list[torch.Tensor]]) -> None:
    arguments = CASES[name][1]
    expected = kc.int8_formula(arguments)
    if arguments["out_scale"] is not None:
        difference = np.abs(kc.wide(results[name][0]) - expected)
        assert results[name][0].dtype == torch.int8 and difference.max() <= 1 and (difference > 0).mean() < 1e-3
        assert len(np.unique(expected)) > 50
    else:
        assert error(results[name][0], expected) < 1e-6


@pytest.mark.parametrize("name", of("int4"))
def test_int4(name: str, results: dict[str, list[torch.Tensor]]) -> None:
    arguments = CASES[name][1]
    assert error(results[name][0], kc.int4_formula(arguments)) < rounding(arguments)


@pytest.mark.parametrize("name", [*of("binary lookup"), *of("binary dot")])
def test_binary(name: str, results: dict[str, list[torch.Tensor]]) -> None:
    arguments = CASES[name][1]
    assert error(results[name][0], kc.binary_formula(arguments)) < rounding(arguments)


@pytest.mark.parametrize("name", of("kronecker"))
def test_kronecker(name: str, results: dict[str, list[torch.Tensor]]) -> None:
    arguments = CASES[name][1]
    y, levels = kc.kronecker_formula(arguments), arguments["levels"]
    q, scale = results[name]
    peak = np.abs(y).max(1)
    if arguments["scale"] is not None:
        expected = np.clip(np.rint(y / 0.3), -levels, levels)
        assert np.abs(kc.wide(q) - expected).max() <= 1 and len(np.unique(expected)) > 5
        return
    wanted = np.where(peak > 0, peak / levels, 1)
    narrow = arguments["x"].dtype == torch.float16
    np.testing.assert_allclose(kc.wide(scale), wanted, rtol=4e-3 if narrow else 1e-5)
    away = np.abs(kc.wide(q) - y / wanted[:, None])
    assert away.max() <= 0.5 + (0.6 if narrow else 1e-3) and np.abs(kc.wide(q)).max() <= levels
    assert (np.abs(kc.wide(q)).max(1)[peak > 0] == levels).all() and (kc.wide(q)[peak == 0] == 0).all()


@pytest.mark.parametrize("name", of("softmax"))
def test_two_pass_softmax(name: str, results: dict[str, list[torch.Tensor]]) -> None:
    x = CASES[name][1]["x"]
    expected, found = kc.softmax_formula(CASES[name][1]), kc.wide(results[name][0])
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    if x.dtype == torch.bfloat16:
        np.testing.assert_allclose(found, expected, rtol=8e-3)
        return
    assert np.nan_to_num(np.abs(found - expected)).max() < 5e-8  # float32 numbers next to 1 are 6e-8 apart
    if x.shape[1] > 1:
        assert np.isnan(found[3]).all() and np.isnan(found[4]).all()
        np.testing.assert_allclose(found[[2, 6]], 1 / x.shape[1], rtol=1e-6)
        assert (found[1, : x.shape[1] // 2] == 0).all()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets Triton")
def test_a_kernel_compiles_without_a_gpu_and_uses_tensor_cores() -> None:
    from foldline.backends.cuda.kernels.ahead import compile_variant, variants

    found = {v.name: v for v in variants()}
    softmax = compile_variant(found["two_pass_softmax fp32"], 90)
    assert ".target sm_90" in softmax.asm["ptx"] and softmax.asm["cubin"][:4] == b"\x7fELF"
    int4 = compile_variant(found["int4_linear bf16 group 128"], 80)
    assert ".target sm_80" in int4.asm["ptx"] and "mma.sync" in int4.asm["ptx"]


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper_and_the_int8_product_uses_wgmma() -> None:
    from foldline.backends.cuda.kernels.ahead import compile_variant, variants

    seen = set()
    for variant in variants():
        if "128 x 128" in variant.name or variant.name.startswith("int4_linear fp32"):
            continue  # the widest take ten seconds each; benchmarks/cuda_kernels.py --compile has them all
        made = compile_variant(variant, 90)
        assert ".target sm_90" in made.asm["ptx"] and made.metadata.shared <= 227 * 1024
        if variant.name.startswith("int8_linear"):
            assert "wgmma" in made.asm["ptx"] and "s32.s8.s8" in made.asm["ptx"]
        seen.add(variant.kernel.__name__)
    assert len(seen) == 7
