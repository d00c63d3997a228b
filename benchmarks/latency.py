"""Latency of pruned models on ONNX Runtime's CPU provider, timed against the unpruned ones in turn (A B A B).

    OMP_NUM_THREADS=1 python benchmarks/latency.py [--models resnet50 vit_small_patch16_224] [--runs 40] [--threads 1]

First table: half the multiply-accumulates with round_to=8 (bars: at least 1.7x faster for ResNet-50, at least 1.5x for
ViT-S), for each way of sharing the cut between layers, and torch-pruning's cut of the same model to half the MACs
exported by the same exporter. Second table: P.Prune(target=fl.latency(0.6)), predicted, as the pass measured it, and
measured once more by the benchmark (bar: within 5%), on the exported file (--front torch: on the module, exported anew
in every round, minutes more). Weights are random: latency does not depend on them.
Needs the extras timm and bench; without the peer its rows are left out, with a note.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BARS = {"resnet50": 1.7, "vit_small_patch16_224": 1.5}
SCOPES = ("uniform", "isomorphic", "global")


def build(name: str) -> tuple[Any, tuple[Any, ...]]:
    import torch

    from tests.support.timm_models import create

    torch.manual_seed(0)
    return create(name), (torch.randn(1, 3, 224, 224),)


def lower(model: Any, inputs: Any, threads: int) -> Any:
    import foldline as fl
    from foldline.backends.base import get

    return get("onnxruntime").lower(fl.load(model, inputs), inputs, threads=threads)


def peer(name: str) -> Any:
    """torch-pruning's BasePruner with L2 importance at the uniform ratio that leaves half the MACs, blocks of 8."""
    import torch
    import torch_pruning as tp

    low, high, best = 0.1, 0.7, None
    for _ in range(6):
        ratio = (low + high) / 2
        model, inputs = build(name)
        heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
        before, _ = tp.utils.count_ops_and_params(model, inputs[0])
        last = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
        pruner = tp.pruner.BasePruner(
            model,
            inputs[0],
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=[last],
            round_to=8,
            num_heads=heads,
            out_channel_groups={},  # its default is one dictionary for all pruners, which remembers earlier models
            prune_head_dims=True,
        )
        pruner.step()
        for m in model.modules():
            if getattr(m, "qkv", None) in heads:
                # Its pruner cuts the weights; the sizes that timm's attention holds in Python are the user's to set.
                m.num_heads = pruner.num_heads[m.qkv]
                m.attn_dim = m.qkv.out_features // 3
                m.head_dim = m.attn_dim // m.num_heads
                m.scale = m.head_dim**-0.5
        after, _ = tp.utils.count_ops_and_params(model, inputs[0])
        if best is None or abs(after / before - 0.5) < abs(best[1] - 0.5):
            best = model, after / before
        low, high = (ratio, high) if after / before > 0.5 else (low, ratio)
    assert best is not None
    return best


def half(name: str, threads: int, runs: int) -> None:
    import foldline as fl
    from foldline import passes as P

    model, inputs = build(name)
    whole = lower(model, inputs, threads)
    for scope in SCOPES:
        start = time.perf_counter()
        result = P.prune(model, inputs, target=fl.macs(0.5), scope=scope, round_to=8, verify=False)
        seconds = time.perf_counter() - start
        report(
            name,
            f"foldline {scope}",
            result.report.passes[0].details["reached"],
            result.model,
            inputs,
            whole,
            threads,
            runs,
        )
        print(f"<!-- {name} {scope}: pruned in {seconds:.1f} s -->")
    try:
        import torch_pruning  # noqa: F401
    except ImportError:
        print(f"| {name} | torch-pruning | not installed | | | | |")
        return
    try:
        pruned, share = peer(name)
        report(name, f"torch-pruning {version('torch-pruning')}", share, pruned, inputs, whole, threads, runs)
    except Exception as exc:  # the peer's failure is a result, whatever it raises
        print(f"| {name} | torch-pruning | failed: {str(exc).splitlines()[0][:80]} | | | | |", flush=True)


def report(name: str, who: str, share: float, model: Any, inputs: Any, whole: Any, threads: int, runs: int) -> None:
    found = lower(model, inputs, threads).benchmark(runs=runs, against=whole)
    fastest = found["against"]["min_ms"] / found["min_ms"]
    print(
        f"| {name} | {who} | {share:.3f} | {found['against']['median_ms']:.2f} | {found['median_ms']:.2f} "
        f"| {1 / found['ratio']:.2f}x (spread of ratios {found['ratio_spread']:.3f}, fastest calls {fastest:.2f}x) "
        f"| {BARS.get(name, '')} |",
        flush=True,
    )


def exported(model: Any, inputs: tuple[Any, ...]) -> Any:
    """The ONNX file's contents: exported once, so that every round of the target only cuts and times."""
    import torch

    program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto


def settled(name: str, threads: int, runs: int, front: str) -> None:
    import foldline as fl
    from foldline import passes as P

    model, inputs = build(name)
    if front == "onnx":
        model = exported(model, inputs)
    start = time.perf_counter()
    result = P.prune(
        model, inputs, target=fl.latency(0.6), round_to=8, backend_options={"threads": threads}, verify=False
    )
    seconds = time.perf_counter() - start
    facts = result.report.passes[0].details["latency_target"]
    again = lower(result.model, inputs, threads).benchmark(runs=runs, against=lower(model, inputs, threads))
    fastest = again["min_ms"] / again["against"]["min_ms"]
    print(
        f"| {name} | {facts['first_prediction']:.3f} | {facts['rounds'][0]['share']:.3f} | {len(facts['rounds'])} "
        f"| {facts['measured_share']:.3f} | {again['ratio']:.3f} (spread {again['ratio_spread']:.3f}; fastest calls "
        f"{fastest:.3f}) | {again['ratio'] / 0.6 - 1:+.1%} | {facts['table']['entries']} | {seconds:.0f} |",
        flush=True,
    )


def versions() -> str:
    found = [f"python {platform.python_version()}"]
    for package in ("torch", "onnx", "onnxruntime", "timm", "torch-pruning", "numpy"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(BARS))
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["half", "target"])
    parser.add_argument("--front", choices=["onnx", "torch"], default="onnx", help="what the target is asked of")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    print(f"{versions()}; {platform.machine()}, {args.threads} thread(s), {args.runs} pairs, batch 1\n")
    if args.only != "target":
        print("| model | pruned by | MACs left | unpruned ms | pruned ms | speed-up (median of pairs) | bar |")
        print("|---|---|---|---|---|---|---|")
        for name in args.models:
            half(name, args.threads, args.runs)
    if args.only != "half":
        print("\n| model | predicted | first measured | rounds | as reported | measured again | off | table | s |")
        print("|---|---|---|---|---|---|---|---|---|")
        for name in args.models:
            settled(name, args.threads, args.runs, args.front)


if __name__ == "__main__":
    main()
