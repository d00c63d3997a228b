"""The cuda backend's operators on a GPU: right (against float64), and how fast against torch's bf16 and the ceilings.

    python benchmarks/cuda_kernels.py [--parts ceilings kernels package compile] [--only int8 int4 ...] [--quick]

Ceilings are measured first, on the same device in the same run: a large copy (bytes read plus written) and 8192^3
products in bfloat16, int8 (torch._int_mm) and float8 (torch._scaled_mm), on random data. A kernel's floor is the larger
of its bytes over the bandwidth and its operations over the ceiling of its type; "share" is floor over median time. The
column bf16 is torch.nn.functional.linear (cuBLAS) of the same shape, or the plain torch functions where there is none.
``package`` quantizes a two-layer network, compiles it with AOTInductor and runs it, with and without CUDA graphs.
``compile`` compiles every kernel with every block size that tuning may choose for sm_80, sm_89 and sm_90 (no GPU
needed, minutes). Without a GPU the operators' CPU references are checked and nothing is timed. Exits with 1 if a check
fails.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LINEAR = [(1, 4096, 4096), (16, 4096, 4096), (512, 4096, 4096), (4096, 4096, 4096), (4096, 14336, 4096)]
QUICK = [(16, 1024, 1024), (512, 1024, 1024)]
AWKWARD = (37, 200, 300)
"""No size is a multiple of a block: timed like the others, and a check of every mask."""


@dataclass
class Ceilings:
    """Measured rates: bytes per second and operations per second by type."""

    bandwidth: float
    rates: dict[str, float]


@dataclass
class Case:
    """One operator at one shape.

    ``run`` calls it; ``exact`` gives the result in float64; ``compare`` maps both results to what is compared;
    ``peers`` are other ways to the same result, by name.
    """

    kernel: str
    shape: str
    run: Callable[[], Any]
    exact: Callable[[], torch.Tensor]
    tolerance: float
    operations: float
    type: str
    bytes: float
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)
    compare: Callable[[Any], torch.Tensor] = lambda y: y


def median_ms(function: Callable[[], Any]) -> float:
    """Median time of one call in milliseconds, the L2 cache flushed before each."""
    from triton.testing import do_bench

    return float(do_bench(function, warmup=25, rep=100, return_mode="median"))


def ceilings() -> Ceilings:
    """Measure the device."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rates = {"bf16": 2 * n**3 / median_ms(lambda: a @ b) * 1e3}
    i8 = [torch.randint(-127, 128, (n, n), device="cuda", dtype=torch.int8) for _ in range(2)]
    rates["int8"] = 2 * n**3 / median_ms(lambda: torch._int_mm(i8[0], i8[1].t())) * 1e3
    if torch.cuda.get_device_capability() >= (8, 9):
        f8, one = [t.to(torch.float8_e4m3fn) for t in (a, b)], torch.ones((), device="cuda")
        product = lambda: torch._scaled_mm(  # noqa: E731
            f8[0], f8[1].t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16
        )
        rates["fp8"] = 2 * n**3 / median_ms(product) * 1e3
    source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return Ceilings(2 * source.nbytes / median_ms(lambda: target.copy_(source)) * 1e3, rates)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def linear_bf16(m: int, n: int, k: int) -> Callable[[], Any]:
    x, w, b = normal(m, k, dtype=torch.bfloat16), normal(n, k, dtype=torch.bfloat16), normal(n, dtype=torch.bfloat16)
    return lambda: torch.nn.functional.linear(x, w, b)


def int8_case(m: int, n: int, k: int) -> Case:
    x = torch.randint(-128, 128, (m, k), device="cuda", dtype=torch.int8)
    w = torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8)
    xs, ws, bias = torch.tensor(0.01, device="cuda"), torch.rand(n, device="cuda") * 0.01, normal(n)

    def cublas() -> torch.Tensor:
        return (torch._int_mm(x, w.t()).float() * (xs * ws) + bias).bfloat16()

    return Case(
        "int8_linear", f"{m} x {n} x {k}",
        lambda: torch.ops.foldline.int8_linear(x, w, xs, ws, None, bias, None, "none", torch.bfloat16),
        lambda: (x.double() @ w.double().t()) * (xs.double() * ws.double()) + bias.double(),
        4e-3, 2 * m * n * k, "int8", m * k + n * k + 2 * m * n,
        {"bf16": linear_bf16(m, n, k)} | ({"cuBLAS int8": cublas} if m > 16 and k % 8 == 0 and n % 8 == 0 else {}),
    )  # fmt: skip


def int4_case(m: int, n: int, k: int) -> Case:
    from foldline.backends.cuda import ops

    group = 128
    codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)
    groups = -(-k // group)
    scales = torch.rand(groups, n, device="cuda") * 0.01 + 0.001
    zeros = torch.randint(0, 16, (groups, n), device="cuda", dtype=torch.uint8)
    x, packed, bias = normal(m, k, dtype=torch.bfloat16), ops.pack_int4(codes), normal(n)

    def exact() -> torch.Tensor:
        scale, zero = (p.double().repeat_interleave(group, 0)[:k].t() for p in (scales, zeros))
        return x.double() @ ((codes.double() - zero) * scale).t() + bias.double()

    return Case(
        "int4_linear g128", f"{m} x {n} x {k}",
        lambda: torch.ops.foldline.int4_linear(x, packed, scales, zeros, bias, group, "none"),
        exact, 8e-3, 2 * m * n * k, "bf16", 2 * m * k + n * k / 2 + 5 * groups * n + 2 * m * n,
        {"bf16": linear_bf16(m, n, k)},
    )  # fmt: skip


def fp8_case(m: int, n: int, k: int) -> Case:
    x, w = normal(m, k).to(torch.float8_e4m3fn), normal(n, k).to(torch.float8_e4m3fn)
    xs, ws, bias = torch.rand(m, 1, device="cuda") + 0.1, torch.rand(n, device="cuda") + 0.1, normal(n)
    return Case(
        "fp8_linear", f"{m} x {n} x {k}",
        lambda: torch.ops.foldline.fp8_linear(x, w, xs, ws, bias, "none", torch.bfloat16),
        lambda: (x.double() @ w.double().t()) * xs.double() * ws.double() + bias.double(),
        1e-2, 2 * m * n * k, "fp8", m * k + n * k + 2 * m * n, {"bf16": linear_bf16(m, n, k)},
    )  # fmt: skip


def sparse_case(m: int, n: int, k: int) -> Case:
    from foldline.backends.cuda import ops

    w = ops.prune24(normal(n, k)).bfloat16()
    values, indices = ops.compress24(w.cpu())
    values, indices = values.cuda(), indices.cuda()
    x, bias = normal(m, k, dtype=torch.bfloat16), normal(n)
    peers = {"bf16": linear_bf16(m, n, k)}
    if m % 8 == 0 and hasattr(torch, "_cslt_compress"):
        packed = torch._cslt_compress(w)
        peers["cuSPARSELt"] = lambda: torch._cslt_sparse_mm(packed, x.t()).t()
    return Case(
        "sparse24_linear", f"{m} x {n} x {k}",
        lambda: torch.ops.foldline.sparse24_linear(x, values, indices, bias, n, "none"),
        lambda: x.double() @ w.double().t() + bias.double(),
        8e-3, m * n * k, "bf16", 2 * m * k + n * k * 1.125 + 2 * m * n, peers,
    )  # fmt: skip


def binary_case(m: int, n: int, k: int) -> Case:
    from foldline.backends.cuda import ops

    q, group = 3, 128
    signs = torch.randint(0, 2, (q, n, k), dtype=torch.int8) * 2 - 1
    codes = ops.pack_signs(signs).cuda()
    alphas = 2.0 ** torch.randint(-6, -2, (q, n, -(-k // group)), device="cuda").float()
    x = normal(m, k, dtype=torch.bfloat16)
    kind = "lookup" if m <= 8 else "dot"
    return Case(
        f"binary_linear {kind} q3", f"{m} x {n} x {k}",
        lambda: torch.ops.foldline.binary_linear(x, codes, alphas, None, group),
        lambda: x.double() @ ops.decode_binary(codes, alphas, k, group).double().t(),
        8e-3, 2 * q * m * n * k if m > 8 else 0, "bf16",
        2 * m * k + codes.numel() + alphas.nbytes + 2 * m * n, {"bf16": linear_bf16(m, n, k)},
    )  # fmt: skip


def kronecker_case(tokens: int, n1: int, n2: int) -> Case:
    x, left, right = normal(tokens, n1 * n2, dtype=torch.bfloat16), normal(n1, n1), normal(n2, n2)
    a, b = left.bfloat16(), right.bfloat16()

    def plain() -> tuple[torch.Tensor, torch.Tensor]:
        y = (a.t() @ (x.reshape(-1, n1, n2) @ b)).reshape(tokens, -1).float()
        scale = y.abs().amax(-1, keepdim=True) / 127
        return torch.round(y / scale).to(torch.int8), scale

    return Case(
        "kronecker_quantize", f"{tokens} x ({n1} x {n2})",
        lambda: torch.ops.foldline.kronecker_quantize(x, left, right, -127, 127, None),
        lambda: (a.double().t() @ (x.double().reshape(-1, n1, n2) @ b.double())).reshape(tokens, -1),
        2e-2, 2 * tokens * n1 * n2 * (n1 + n2), "bf16", 3 * tokens * n1 * n2 + 4 * tokens, {"bf16": plain},
        lambda y: y[0].double() * y[1].double(),
    )  # fmt: skip


def softmax_case(rows: int, columns: int, dtype: torch.dtype) -> Case:
    x = (torch.randn(rows, columns, device="cuda") * 8).to(dtype)
    size = x.element_size()
    return Case(
        f"two_pass_softmax {str(dtype).removeprefix('torch.')}", f"{rows} x {columns}",
        lambda: torch.ops.foldline.two_pass_softmax(x, -1),
        lambda: torch.softmax(x.double(), -1), 1e-6 if size == 4 else 4e-3, 0, "bf16", 2 * rows * columns * size,
        {"torch": lambda: torch.softmax(x, -1)},
    )  # fmt: skip


def cases(only: list[str] | None, quick: bool) -> Iterator[Callable[[], Case]]:
    """Makers of cases, so that one case's tensors are in memory at a time."""
    shapes = [*(QUICK if quick else LINEAR), AWKWARD]
    makers: dict[str, list[Callable[[], Case]]] = {
        "int8": [lambda s=s: int8_case(*s) for s in shapes],
        "int4": [lambda s=s: int4_case(*s) for s in shapes],
        "fp8": [lambda s=s: fp8_case(*s) for s in shapes] if torch.cuda.get_device_capability() >= (8, 9) else [],
        "sparse": [lambda s=s: sparse_case(*s) for s in shapes],
        "binary": [lambda s=s: binary_case(*s) for s in shapes if s[1] <= 4096],
        "kronecker": [lambda s=s: kronecker_case(*s) for s in ((4096, 64, 64), (1024, 112, 128), (33, 12, 20))],
        "softmax": [
            lambda s=s, d=d: softmax_case(*s, d)
            for s in ((4096, 4096), (512, 50257), (16, 2**20))
            for d in (torch.float32, torch.bfloat16)
        ],
    }
    for name, found in makers.items():
        if not only or name in only:
            yield from found


def checked(case: Case) -> tuple[float, bool]:
    """(relative error of the result, whether it is within bounds); freed memory is poisoned before the run."""
    exact = case.exact()
    poison = torch.full((exact.numel() * 2 + 2**20,), float("nan"), device="cuda")
    del poison
    found = case.compare(case.run()).double()
    error = float((found - exact).norm() / exact.norm())
    return error, error <= case.tolerance  # NaN is not


def kernel_table(top: Ceilings, only: list[str] | None, quick: bool) -> bool:
    """Print one row per kernel and shape; whether all were right."""
    print("| kernel | shape | error | ms | rate | share of the ceiling | bf16 ms | times bf16 | other ms |")
    print("|---|---|---|---|---|---|---|---|---|")
    good = True
    for make in cases(only, quick):
        case: Case | None = None
        try:
            case = make()
            error, right = checked(case)
            taken = median_ms(case.run)
            peers = {name: median_ms(run) for name, run in case.peers.items()}
        except Exception as exc:  # one kernel that fails must not cost the figures of the others
            good = False
            named = f"{case.kernel} | {case.shape}" if case else "? | ?"
            print(
                f"| {named} | FAILED {type(exc).__name__}: {' '.join(str(exc).split())[:300]} | | | | | | |", flush=True
            )
            continue
        finally:
            torch.cuda.empty_cache()
        good = good and right
        by_bytes, by_operations = case.bytes / top.bandwidth, case.operations / top.rates[case.type]
        rate = (
            f"{case.bytes / taken / 1e6:.0f} GB/s" if by_bytes > by_operations
            else f"{case.operations / taken / 1e9:.0f} T{'' if case.type == 'int8' else 'FL'}OP/s"
        )  # fmt: skip
        share = max(by_bytes, by_operations) * 1e3 / taken
        base = peers.pop("bf16", peers.pop("torch", float("nan")))
        other = ", ".join(f"{name} {t:.3f}" for name, t in peers.items())
        print(
            f"| {case.kernel} | {case.shape} | {error:.1e}{'' if right else ' WRONG'} | {taken:.4f} | {rate} | "
            f"{share:.0%} | {base:.4f} | {base / taken:.2f} | {other} |",
            flush=True,
        )
    return good


def _text(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}".replace("|", "/")


def package_table() -> bool:
    """A quantized two-layer network as a package on the GPU: right, and how fast."""
    from foldline.backends import get
    from foldline.graph.fx import load_torch
    from foldline.passes.base import Context
    from foldline.passes.quantize import Quantize

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2048, 8192), torch.nn.GELU(), torch.nn.Linear(8192, 2048)).eval()
    batches = [torch.randn(512, 2048) for _ in range(2)]
    graph = load_torch(model, batches[0])
    Quantize(target="cuda").apply(graph, Context(calibration=batches, backends=get))
    backend = get("cuda")
    expected = backend.lower(graph, device="cpu", package=False).run(batches[0])[0]
    half = model.cuda().bfloat16()
    x = batches[0].cuda()
    base = median_ms(lambda: half(x.bfloat16()))
    print("| form | error | ms | times bf16 |\n|---|---|---|---|")
    print(f"| torch bf16, uncompiled | | {base:.4f} | 1.00 |")
    good = True
    forms: list[tuple[str, dict[str, Any]]] = [
        ("module", {"package": False}),
        ("package", {}),
        ("package, CUDA graphs", {"cuda_graphs": True}),
    ]
    for name, options in forms:
        try:
            start = time.time()
            artifact = backend.lower(graph, batches[0], dtype="bfloat16", **options)
            spent = time.time() - start
            found = torch.from_numpy(artifact.run(batches[0])[0]).double()
            error = float((found - torch.from_numpy(expected)).norm() / torch.from_numpy(expected).double().norm())
            tensors = artifact.tensors(batches[0])
            taken = median_ms(lambda a=artifact, t=tensors: a.run_tensors(t))
        except Exception as exc:  # the other forms are still wanted
            good = False
            print(f"| {name} | FAILED {_text(exc)} | | |", flush=True)
            continue
        right = error < 2e-2
        good = good and right
        verdict = f"{error:.1e}{'' if right else ' WRONG'}"
        print(f"| {name} (lowered in {spent:.0f} s) | {verdict} | {taken:.4f} | {base / taken:.2f} |", flush=True)
    return good


def compile_table() -> bool:
    """Every kernel in every configuration for three architectures."""
    from foldline.backends.cuda.kernels.ahead import CAPABILITIES, compile_variant, variants
    from foldline.graph.errors import BackendError

    good, count, start = True, 0, time.time()
    for variant in variants(every_config=True):
        for capability in CAPABILITIES:
            try:
                made = compile_variant(variant, capability)
                # What one block may use: 163 KiB on sm_80, 99 on sm_89, 227 on sm_90. Tuning skips what is more.
                limit = {80: 163, 89: 99, 90: 227}[capability] * 1024
                if made.metadata.shared > limit:
                    print(f"- {variant.name} {variant.config}: too much shared memory for sm_{capability}", flush=True)
            except BackendError as exc:
                good = False
                print(f"- FAILED {variant.name} sm_{capability}: {exc}", flush=True)
            count += 1
    print(f"{count} kernels compiled in {time.time() - start:.0f} s")
    return good


def references() -> bool:
    """Without a GPU: the operators' CPU references against float64 formulas."""
    from foldline.backends.cuda import ops

    from tests.support import kernel_cases as kc

    call = torch.ops.foldline
    good = True
    for name, (kind, a) in kc.case_inputs().items():
        if kind == "int8" and a["out_scale"] is None:
            y = call.int8_linear(
                a["x"], a["w"], a["xs"], a["ws"], a["offset"], a["bias"], None, a["activation"], torch.float32
            )
            expected = kc.int8_formula(a)
        elif kind == "int4":
            group = min(a["group"], a["x"].shape[1])
            packed = ops.pack_int4(a["codes"])
            y = call.int4_linear(a["x"], packed, a["scales"], a["zeros"], a["bias"], group, a["activation"])
            expected = kc.int4_formula(a)
        elif kind == "binary lookup":
            y = call.binary_linear(a["x"], ops.pack_signs(a["signs"]), a["alphas"], a["bias"], a["group"])
            expected = kc.binary_formula(a)
        else:
            continue
        error = float((y.double() - torch.from_numpy(expected)).norm() / max(float((expected**2).sum()) ** 0.5, 1e-30))
        if not error < 1e-2:
            good = False
            print(f"- WRONG {name}: {error:.1e}")
    print("CPU references: " + ("right" if good else "wrong"))
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = ("ceilings", "kernels", "package", "compile")
    parser.add_argument("--parts", nargs="+", choices=parts, default=["ceilings", "kernels", "package"])
    parser.add_argument("--only", nargs="+", help="int8 int4 fp8 sparse binary kronecker softmax")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    options = parser.parse_args()
    import foldline.backends.cuda.ops  # noqa: F401  (registers the operators)

    good = True
    versions = f"torch {torch.__version__}, python {platform.python_version()}"
    if not torch.cuda.is_available():
        print(f"There is no GPU here ({versions}): nothing is timed.\n")
        good = references()
    else:
        import triton

        torch.manual_seed(0)
        today = time.strftime("%Y-%m-%d", time.gmtime())
        print(f"{torch.cuda.get_device_name()}, {versions}, triton {triton.__version__}, {today}\n")
        if "kernels" in options.parts or "ceilings" in options.parts:
            top = ceilings()
            rates = ", ".join(f"{name} {rate / 1e12:.0f} T/s" for name, rate in top.rates.items())
            print(f"Measured ceilings: copy {top.bandwidth / 1e9:.0f} GB/s, {rates}.\n", flush=True)
        if "kernels" in options.parts:
            good &= kernel_table(top, options.only, options.quick)
            print()
        if "package" in options.parts:
            good &= package_table()
    if "compile" in options.parts:
        good &= compile_table()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
