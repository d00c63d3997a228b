"""A whole prune call against the peer's, per model: time and peak memory.

    OMP_NUM_THREADS=1 python benchmarks/prune_speed.py [--both | --all] [--cpu] [--json FILE] [MODEL ...]

foldline: ``P.prune(model, x, ratio=0.5, verify=False)``: capture, analysis, choice, cut, and a new module of the same
class, proved to make the calls of the cut graph. The peer, torch-pruning 1.6.1: ``MagnitudePruner(pruning_ratio=0.5,
ignored_layers=[head])`` and ``step()``: build, init and step, in place. Both in a process of their own per model (10
GiB of address space), one thread, after one call on a two-layer network (imports and first-call caches are not
counted); the best of the runs (no further one after ``--enough`` seconds), each on a fresh copy of the model; memory is
the growth of the process's peak over one call, the copy it works on included. The side that fails says how. ``--both``:
the models that both sides manage (coverage.py), the small transformers at the sizes that are published, too. ``--cpu``
prints processor time instead of wall time, for a machine with other jobs. ``--json`` keeps one line per model; what it
holds already is printed again, not run again. Needs the extras timm, transformers, bench.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import resource
import time
from pathlib import Path
from typing import Any

from architectures import MODELS, build, head_of, output_of
from coverage import isolated

BOTH = """
tv:alexnet tv:vgg16_bn tv:resnet18 tv:googlenet tv:squeezenet1_1 tv:mobilenet_v2 tv:mobilenet_v3_small tv:mnasnet0_5
tv:regnet_y_400mf tv:densenet121 tv:inception_v3 tv:convnext_tiny vgg11_bn resnet34 resnet50 resnet50d resnet152
wide_resnet50_2 resnext50_32x4d seresnet50 resnetv2_50 resnetrs50 darknet53 dla34 hrnet_w18_small selecsls42b
regnetx_004 regnety_004 ese_vovnet19b_dw xception41 inception_v4 inception_resnet_v2 mnasnet_100 mobilenetv3_large_100
mobilenetv4_conv_small efficientnet_b0 tf_efficientnetv2_b0 fbnetc_100 spnasnet_100 lcnet_050 tinynet_a hardcorenas_a
ghostnet_100 ghostnetv2_100 repghostnet_050 repvgg_a0 repvit_m1 mobileone_s0 starnet_s1 hgnetv2_b0 rdnet_tiny
convnext_tiny convnextv2_atto beit_base_patch16_224 samvit_base_patch16_224 hf:bert hf:bert-base hf:distilbert
hf:roberta hf:electra hf:albert hf:mpnet hf:gpt2 hf:opt hf:bart hf:vit hf:convnextv2 hf:clip_vision
hf:distilbert-base hf:roberta-base hf:electra-small hf:electra-base hf:albert-base hf:mpnet-base hf:gpt2-small
hf:opt-125m hf:bart-base hf:vit-base hf:clip_vision-base
""".split()
HARD = "densenet201 swin_tiny_patch4_window7_224 maxvit_tiny_tf_224 resnest14d hf:llama".split()
"""Models on which the peer takes long or fails."""


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


def one(side: str, name: str, runs: int, enough: float) -> dict[str, Any]:
    call = {"ours": ours, "peer": peer}[side]
    call(*warm_net())
    model, inputs = build(name)
    shape = output_of(model, inputs).shape
    base, wall, cpu = peak(), [], []
    fresh = pruned = None
    for _ in range(runs):
        fresh = pruned = None  # each run has the memory for itself
        gc.collect()
        fresh = copy.deepcopy(model)
        gc.collect()
        start, worked = time.perf_counter(), time.process_time()
        pruned = call(fresh, inputs)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - worked)
        if sum(wall) > enough:
            break
    mib = peak() - base
    assert output_of(pruned, inputs).shape == shape, "another output shape"
    return {"wall": min(wall), "cpu": min(cpu), "mib": mib}


def row(name: str, found: dict[str, Any], clock: str) -> str:
    """The model's line of the table."""
    sides = [found["ours"], found["peer"]]
    cells = [str(r.get("failed") or f"{r[clock]:.3f}") for r in sides]
    memory = ["" if "failed" in r else f"{r['mib']:.0f}" for r in sides]
    ratio = "" if any("failed" in r for r in sides) else f"{sides[1][clock] / sides[0][clock]:.1f}"
    return f"| {name} | {cells[0]} | {cells[1]} | {ratio} | {memory[0]} | {memory[1]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=float, default=60, help="seconds for all runs of one side of one model")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--enough", type=float, default=5, help="seconds after which no further run is started")
    parser.add_argument("--both", action="store_true", help="the models that both sides manage, and the hard ones")
    parser.add_argument("--all", action="store_true", help="every model of architectures.py")
    parser.add_argument("--cpu", action="store_true", help="processor time instead of wall time")
    parser.add_argument("--json", type=Path, help="one line per model; those in it are not run again")
    parser.add_argument("models", nargs="*", default=[*BOTH, *HARD])
    args = parser.parse_args()
    import torch
    from support import timm_models

    timm_models.timm(), timm_models.transformers()  # imported before the forks
    torch.set_num_threads(1)
    known: dict[str, Any] = {}
    if args.json and args.json.exists():
        known = {(r := json.loads(line))["model"]: r for line in args.json.read_text().splitlines()}
    clock = "cpu" if args.cpu else "wall"
    print("| model | foldline s | torch-pruning s | times faster | foldline MiB | torch-pruning MiB |")
    print("|---|---|---|---|---|---|")
    ratios = []
    for name in MODELS if args.all else [*BOTH, *HARD] if args.both else args.models:
        found = known.get(name)
        if found is None:
            sides = {s: isolated(one, s, name, args.runs, args.enough, limit=args.timeout) for s in ("ours", "peer")}
            found = {"model": name, **sides}
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps(found) + "\n")
        print(row(name, found, clock), flush=True)
        if not any("failed" in found[s] for s in ("ours", "peer")):
            ratios.append((found["peer"][clock] / found["ours"][clock], found["ours"]["mib"] <= found["peer"]["mib"]))
    if ratios:
        faster, lighter = sum(r >= 1 for r, _ in ratios), sum(ok for _, ok in ratios)
        middle = sorted(r for r, _ in ratios)[len(ratios) // 2]
        print(f"\n{len(ratios)} models that both manage: not slower on {faster}, no more memory on {lighter}; ", end="")
        print(f"median {middle:.1f} times, least {min(r for r, _ in ratios):.2f} times faster ({clock} time).")


if __name__ == "__main__":
    main()
