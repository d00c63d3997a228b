"""Time of fl.axis_groups beside torch-pruning's dependency graph and get_all_groups, and its growth with depth.

    OMP_NUM_THREADS=1 python benchmarks/analysis_speed.py [--quick] [--timeout 120]

Tracing is timed apart. Every model runs in its own process, so that one that hangs or exhausts memory is reported
as such; both sides get 10 GiB of address space, the peer --timeout seconds. Needs the extras timm, transformers, bench.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MODELS = ["densenet201", "resnet152", "vit_base_patch16_224", "swin_tiny_patch4_window7_224", "llama32"]
DEPTHS = ["llama8", "llama16", "llama32", "llama64", "llama128"]


def build(name: str) -> tuple[Any, Any]:
    import torch

    torch.manual_seed(0)
    if name.startswith("llama"):
        from tests.support.timm_models import transformers

        layers, big = (32, True) if name == "llama7b" else (int(name[5:]), False)
        config = transformers().LlamaConfig(
            hidden_size=4096 if big else 256,
            intermediate_size=11008 if big else 688,
            num_hidden_layers=layers,
            num_attention_heads=32 if big else 8,
            num_key_value_heads=8 if big else 2,
            vocab_size=32000 if big else 1000,
            use_cache=False,
        )
        with torch.device("meta" if big else "cpu"):
            model = transformers().LlamaForCausalLM(config).eval()
            ids = torch.zeros(2, 16, dtype=torch.long)
        return model, {"input_ids": ids}
    from tests.support.timm_models import create

    return create(name), (torch.randn(2, 3, 224, 224),)


def ours(name: str) -> dict[str, Any]:
    import foldline as fl

    model, inputs = build(name)
    t0 = time.perf_counter()
    graph = fl.load(model, inputs)
    t1 = time.perf_counter()
    times = []
    for _ in range(3):
        t = time.perf_counter()
        groups = fl.axis_groups(graph)
        times.append(time.perf_counter() - t)
    free = sum(g.can("select") for g in groups)
    return {"trace_s": t1 - t0, "groups_s": min(times), "groups": len(groups), "free": free, "nodes": len(graph.nodes)}


def peer(name: str) -> dict[str, Any]:
    model, inputs = build(name)
    import torch_pruning as tp

    t0 = time.perf_counter()
    graph = tp.DependencyGraph().build_dependency(
        model, example_inputs=inputs if isinstance(inputs, dict) else inputs[0]
    )
    t1 = time.perf_counter()
    count = sum(1 for _ in graph.get_all_groups())
    return {"build_s": t1 - t0, "groups_s": time.perf_counter() - t1, "groups": count}


def limit_memory(gigabytes: int = 10) -> None:
    """A side that wants more address space than this fails instead of taking the machine down."""
    resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, gigabytes << 30))


def isolated(side: str, name: str, limit: float) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--one", side, name], capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"over {limit:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"failed": lines[-1][:90] if lines else f"exit {done.returncode}"}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "MODEL"), help="run one side in this process, print JSON")
    parser.add_argument("--timeout", type=float, default=120)
    parser.add_argument("--quick", action="store_true", help="only the models, not the depths")
    args = parser.parse_args()
    if args.one:
        limit_memory()
        print(json.dumps({"ours": ours, "peer": peer}[args.one[0]](args.one[1])))
        return
    print("| model | nodes | trace s | axis_groups s | groups (free) | torch-pruning build s | get_all_groups s |")
    print("|---|---|---|---|---|---|---|")
    for name in MODELS + ["llama7b"] + ([] if args.quick else DEPTHS):
        a = isolated("ours", name, 600)
        b = isolated("peer", name, args.timeout) if name in MODELS else {"failed": "not run"}
        left = (
            f"| {name} | {a['failed']} | | | |"
            if "failed" in a
            else (f"| {name} | {a['nodes']} | {a['trace_s']:.2f} | {a['groups_s']:.3f} | {a['groups']} ({a['free']}) |")
        )
        right = f" {b['failed']} | |" if "failed" in b else f" {b['build_s']:.2f} | {b['groups_s']:.2f} |"
        print(left + right, flush=True)


if __name__ == "__main__":
    main()
