"""A whole prune call against the peer's, per model: time and peak memory.

    OMP_NUM_THREADS=1 python benchmarks/prune_speed.py [--all] [--timeout 120] [--runs 3] [MODEL ...]

foldline: ``P.prune(model, x, ratio=0.5, verify=False)``: capture, analysis, choice, cut, and a new module of the same
class, checked by running it. The peer, torch-pruning 1.6.1: ``MagnitudePruner(pruning_ratio=0.5, ignored_layers=
[head])`` and ``step()``: build, init and step, in place. Both in a process of their own per model (10 GiB of address
space), one thread, after one call on a two-layer network (imports and first-call caches are not counted); the best of
the runs, each on a fresh copy of the model; memory is the growth of the process's peak over the calls. The side that
fails says how. Needs the extras timm, transformers, bench.
"""

from __future__ import annotations

import argparse
import copy
import gc
import resource
import time
from typing import Any

from architectures import MODELS, build, head_of, output_of
from coverage import isolated

DEFAULT = """
tv:squeezenet1_1 tv:mobilenet_v2 vgg11_bn resnet50 resnet152 resnext50_32x4d seresnet50 densenet201 regnety_004
mobilenetv3_large_100 efficientnet_b0 tv:mobilenet_v3_small tv:mnasnet0_5 resnet34 convnext_tiny mixer_s16_224
hf:bert hf:bert-base hf:distilbert-base hf:gpt2-small hf:llama resnest14d
swin_tiny_patch4_window7_224 maxvit_tiny_tf_224
""".split()


def peak() -> float:
    """The most memory this process has held, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def warm_net() -> Any:
    import torch
    from torch import nn

    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    return nn.Sequential(*layers).eval(), (torch.randn(1, 3, 8, 8),)


def ours(model: Any, inputs: Any) -> Any:
    from foldline import passes as P

    return P.prune(model, inputs, ratio=0.5, verify=False).model


def peer(model: Any, inputs: Any) -> Any:
    import torch_pruning as tp

    example = inputs if isinstance(inputs, dict) else inputs[0]
    importance = tp.importance.MagnitudeImportance(p=2)
    tp.pruner.MagnitudePruner(
        model, example, importance=importance, pruning_ratio=0.5, ignored_layers=[head_of(model)]
    ).step()
    return model


def one(side: str, name: str, runs: int) -> dict[str, Any]:
    call = {"ours": ours, "peer": peer}[side]
    call(*warm_net())
    model, inputs = build(name)
    shape = output_of(model, inputs).shape
    base, times = peak(), []
    for _ in range(runs):
        fresh = copy.deepcopy(model)
        gc.collect()
        start = time.perf_counter()
        pruned = call(fresh, inputs)
        times.append(time.perf_counter() - start)
    mib = peak() - base
    assert output_of(pruned, inputs).shape == shape, "another output shape"
    return {"seconds": min(times), "mib": mib}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=float, default=120)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--all", action="store_true", help="every model of architectures.py")
    parser.add_argument("models", nargs="*", default=DEFAULT)
    args = parser.parse_args()
    import torch
    from support import timm_models

    timm_models.timm(), timm_models.transformers()  # imported before the forks
    torch.set_num_threads(1)
    print("| model | foldline s | torch-pruning s | times faster | foldline MiB | torch-pruning MiB |")
    print("|---|---|---|---|---|---|")
    for name in MODELS if args.all else args.models:
        a, b = (isolated(one, side, name, args.runs, limit=args.timeout) for side in ("ours", "peer"))
        cells = [str(r.get("failed") or f"{r['seconds']:.2f}") for r in (a, b)]
        memory = ["" if "failed" in r else f"{r['mib']:.0f}" for r in (a, b)]
        ratio = "" if "failed" in a or "failed" in b else f"{b['seconds'] / a['seconds']:.1f}"
        print(f"| {name} | {cells[0]} | {cells[1]} | {ratio} | {memory[0]} | {memory[1]} |", flush=True)


if __name__ == "__main__":
    main()
