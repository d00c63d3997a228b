"""Inputs for every Triton kernel on awkward sizes, what the kernels make of them in Triton's interpreter, and formulas.

Run as a program (with TRITON_INTERPRET=1 set before it starts) it writes the kernels' results to a file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

INT8 = [(1, 1, 1), (45, 51, 70), (3, 33, 128), (33, 7, 31)]
INT4 = [(7, 19, 200, 32), (1, 5, 100, 16), (17, 33, 300, 128), (2, 3, 64, 64), (3, 40, 130, 1 << 20)]
BINARY = [(5, 41, 300, 128), (1, 3, 8, 8), (2, 33, 129, 64), (3, 20, 100, 104)]
KRONECKER = [(6, 12, 20), (1, 3, 5), (4, 32, 16), (2, 1, 17)]
SOFTMAX = [1.0, 10.0, 100.0, 1e3, 1e4]


def case_inputs() -> dict[str, tuple[str, dict[str, Any]]]:
    """Case name -> (kind of kernel, its arguments)."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=g).to(dtype)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=g) * 0.1 + 0.001

    found: dict[str, tuple[str, dict[str, Any]]] = {}
    activations = ["none", "relu", "gelu", "gelu_tanh", "silu"]
    for i, (m, n, k) in enumerate(INT8):
        for j, activation in enumerate(activations if i == 1 else activations[:1]):
            found[f"int8 {m}x{n}x{k} {activation}"] = (
                "int8",
                {
                    "x": integers(-128, 128, m, k, dtype=torch.int8),
                    "w": integers(-128, 128, n, k, dtype=torch.int8),
                    "xs": uniform(m) if (i + j) % 2 else uniform(1),
                    "ws": uniform(n) if j != 1 else uniform(1),
                    "offset": integers(-1000, 1000, n, dtype=torch.int32) if (i + j) % 2 else None,
                    "bias": normal(n) if j % 2 == 0 else None,
                    "out_scale": None,
                    "activation": activation,
                },
            )
    kind, arguments = found["int8 45x51x70 relu"]
    found["int8 requantized"] = kind, {**arguments, "out_scale": torch.tensor(0.37)}
    for m, n, k, group in INT4:
        groups = -(-k // group)
        for dtype in (torch.float32, torch.float16):
            found[f"int4 {m}x{n}x{k} group {group} {dtype}"] = (
                "int4",
                {
                    "x": normal(m, k).to(dtype),
                    "codes": integers(0, 16, n, k, dtype=torch.uint8),
                    "scales": uniform(groups, n),
                    "zeros": integers(0, 16, groups, n, dtype=torch.uint8),
                    "bias": normal(n) if m != 1 else None,
                    "group": group,
                    "activation": "gelu" if m == 7 else "none",
                },
            )
    for m, n, k, group in BINARY:
        for kernel in ("lookup", "dot"):
            for dtype in (torch.float32, torch.bfloat16 if kernel == "lookup" else torch.float16):
                found[f"binary {kernel} {m}x{n}x{k} group {group} {dtype}"] = (
                    f"binary {kernel}",
                    {
                        "x": normal(m, k).to(dtype),
                        "signs": integers(0, 2, 3, n, k, dtype=torch.int8) * 2 - 1,
                        "alphas": 2.0 ** integers(-4, 1, 3, n, -(-k // group), dtype=torch.float32),
                        "bias": normal(n) if m != 1 else None,
                        "group": group,
                    },
                )
    for tokens, n1, n2 in KRONECKER:
        for dtype in (torch.float32, torch.float16):
            x = normal(tokens, n1 * n2)
            if tokens > 2:
                x[2] = 0
            found[f"kronecker {tokens} tokens {n1}x{n2} {dtype}"] = (
                "kronecker",
                {
                    "x": x.to(dtype),
                    "left": normal(n1, n1),
                    "right": normal(n2, n2),
                    "levels": 127 if n1 != 32 else 7,
                    "scale": torch.tensor(0.3) if n1 == 3 else None,
                },
            )
    for scale in SOFTMAX:
        for columns in (1, 1000, 5000) if scale == 10 else (1, 1000):
            x = normal(7, columns) * scale
            if columns > 1:
                x[1, : columns // 2] = -np.inf
                x[2] = 3.0
                x[3] = -np.inf
                x[4, 7] = np.inf
                x[5, : columns - 3] = torch.finfo(torch.float32).min
                x[6] = torch.finfo(torch.float32).min
            found[f"softmax {columns} columns scale {scale:g}"] = "softmax", {"x": x}
    found["softmax bfloat16"] = "softmax", {"x": normal(3, 70).bfloat16()}
    return found


def run_int8(a: dict[str, Any]) -> list[torch.Tensor]:
    from foldline.backends.cuda.kernels.int8 import int8_linear

    out = torch.empty(len(a["x"]), len(a["w"]), dtype=torch.int8 if a["out_scale"] is not None else torch.float32)
    names = ("x", "w", "xs", "ws", "offset", "bias", "out_scale", "activation")
    return [int8_linear(*(a[n] for n in names), out)]


def run_int4(a: dict[str, Any]) -> list[torch.Tensor]:
    from foldline.backends.cuda.kernels.int4 import int4_linear
    from foldline.backends.cuda.ops import pack_int4

    out = torch.empty(len(a["x"]), len(a["codes"]), dtype=a["x"].dtype)
    packed = pack_int4(a["codes"])
    names = ("scales", "zeros", "bias", "group", "activation")
    return [int4_linear(a["x"], packed, *(a[n] for n in names), out)]


def run_lookup(a: dict[str, Any]) -> list[torch.Tensor]:
    from foldline.backends.cuda.kernels.binary import binary_lookup
    from foldline.backends.cuda.ops import pack_signs

    codes = pack_signs(a["signs"])
    out = torch.empty(len(a["x"]), codes.shape[1], dtype=a["x"].dtype)
    tables = torch.empty(len(a["x"]), codes.shape[2], 256)
    return [binary_lookup(a["x"], codes, a["alphas"], a["bias"], a["group"], tables, out)]


def run_dot(a: dict[str, Any]) -> list[torch.Tensor]:
    from foldline.backends.cuda.kernels.binary import binary_dot
    from foldline.backends.cuda.ops import pack_signs

    codes = pack_signs(a["signs"])
    out = torch.empty(len(a["x"]), codes.shape[1], dtype=a["x"].dtype)
    return [binary_dot(a["x"], codes, a["alphas"], a["bias"], a["group"], out)]


def run_kronecker(a: dict[str, Any]) -> list[torch.Tensor]:
    from foldline.backends.cuda.kernels.kronecker import kronecker_quantize

    fixed, levels = a["scale"] is not None, a["levels"]
    q, scale = torch.empty(a["x"].shape, dtype=torch.int8), torch.empty(len(a["x"]))
    scale = a["scale"].reshape(1) if fixed else scale
    kronecker_quantize(a["x"], a["left"], a["right"], -levels, levels, fixed, q, scale)
    return [q, scale]


def run_softmax(a: dict[str, Any]) -> list[torch.Tensor]:
    from foldline.backends.cuda.kernels.softmax import two_pass_softmax

    return [two_pass_softmax(a["x"], torch.empty_like(a["x"]))]


RUN: dict[str, Callable[[dict[str, Any]], list[torch.Tensor]]] = {
    "int8": run_int8,
    "int4": run_int4,
    "binary lookup": run_lookup,
    "binary dot": run_dot,
    "kronecker": run_kronecker,
    "softmax": run_softmax,
}


def activation64(y: np.ndarray, name: str) -> np.ndarray:
    """An activation in float64."""
    from scipy.special import erf

    with np.errstate(over="ignore"):
        if name == "gelu":
            return 0.5 * y * (1 + erf(y / np.sqrt(2)))
        if name == "gelu_tanh":
            return 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        if name == "silu":
            return y / (1 + np.exp(-y))
    return np.maximum(y, 0) if name == "relu" else y


def wide(t: torch.Tensor) -> np.ndarray:
    """The numbers in float64."""
    return t.double().numpy()


def spread(p: torch.Tensor, group: int, size: int, axis: int) -> np.ndarray:
    """Values per group along an axis, one per index."""
    return np.repeat(wide(p), min(group, size), axis).take(np.arange(size), axis)


def int8_formula(a: dict[str, Any]) -> np.ndarray:
    acc = a["x"].long().numpy() @ a["w"].long().numpy().T
    acc = acc + (0 if a["offset"] is None else a["offset"].long().numpy())
    y = acc * wide(a["xs"])[:, None] * wide(a["ws"])
    y = activation64(y + (0 if a["bias"] is None else wide(a["bias"])), a["activation"])
    return y if a["out_scale"] is None else np.clip(np.rint(y / float(a["out_scale"])), -128, 127)


def int4_formula(a: dict[str, Any]) -> np.ndarray:
    k = a["x"].shape[1]
    weight = (wide(a["codes"]) - spread(a["zeros"], a["group"], k, 0).T) * spread(a["scales"], a["group"], k, 0).T
    y = wide(a["x"]) @ weight.T + (0 if a["bias"] is None else wide(a["bias"]))
    return activation64(y, a["activation"])


def binary_formula(a: dict[str, Any]) -> np.ndarray:
    k = a["x"].shape[1]
    weight = (spread(a["alphas"], a["group"], k, 2) * wide(a["signs"])).sum(0)
    return wide(a["x"]) @ weight.T + (0 if a["bias"] is None else wide(a["bias"]))


def kronecker_formula(a: dict[str, Any]) -> np.ndarray:
    """The transformed tokens, before quantization."""
    return wide(a["x"]) @ np.kron(wide(a["left"]), wide(a["right"]))


def softmax_formula(a: dict[str, Any]) -> np.ndarray:
    return torch.softmax(a["x"].double(), -1).numpy()


def main(path: str) -> None:
    """Run every case and write {case: results} with torch.save."""
    torch.save({name: RUN[kind](arguments) for name, (kind, arguments) in case_inputs().items()}, path)


if __name__ == "__main__":
    main(sys.argv[1])
