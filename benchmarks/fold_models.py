"""timm's model list at random weights as torch modules: fold, call, compare. The ONNX road: onnx_models.py.

    OMP_NUM_THREADS=1 python benchmarks/fold_models.py [--minutes 30] [--json FILE] [NAME ...]

Every architecture once: of the variants that one module of timm defines, those with the fewest parameters first (all
of them come up if the time suffices), up to ``--parameters``; names may be those of architectures.py as well. Batch 2,
128 x 128 pixels where the model takes them, else its own size. Batch-norm statistics, gains and layer scales are
random, so that no branch is the identity or hidden behind a zero. ``P.fold`` on the module, then both are called in
torch. The error is relative to the largest output; "wrong" is above 1e-4 or another shape or NaN where there was none.
Each model runs in a process of its own. Needs the extras timm and bench.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import architectures
import numpy as np
from coverage import isolated

WRONG = 1e-4
PIXELS = 128
"""Image size tried first: large enough for strides of 64, a third of the work of 224."""


def names(limit: float) -> list[str]:
    """timm's models by (rank of size within their module, size), those above ``limit`` parameters left out."""
    import timm
    import torch

    by_module: dict[str, list[tuple[int, str]]] = {}
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            try:
                with torch.device("meta"):
                    model = timm.create_model(name, pretrained=False)
            except Exception as error:  # counted, not hidden: main prints them
                by_module.setdefault(module, []).append((-1, f"!{name}: {type(error).__name__}"))
                continue
            size = sum(p.numel() for p in model.parameters())
            if size <= limit:
                by_module.setdefault(module, []).append((size, name))
    ranked = [(rank, size, name) for found in by_module.values() for rank, (size, name) in enumerate(sorted(found))]
    return [name for _, _, name in sorted(ranked)]


def build(name: str) -> tuple[Any, Any]:
    """(module in eval mode with random statistics and gains, one image)."""
    import torch
    from support import timm_models

    torch.manual_seed(0)
    model = randomize(timm_models.create(name))
    channels, height, width = model.default_cfg["input_size"]
    return model.eval(), torch.randn(1, channels, height, width)


def randomize(model: Any) -> Any:
    """The same model with random statistics of batch norms, and constant parameters made random."""
    import torch
    from torch import nn

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        for p in model.parameters():
            if p.numel() > 1 and bool((p == p.flatten()[0]).all()):
                p.add_(0.1 * torch.randn_like(p))
    return model


def worst(before: list[np.ndarray], after: list[np.ndarray]) -> float:
    """The largest error relative to the largest number of its output; inf for another shape or new NaNs."""
    if len(before) != len(after):
        return float("inf")
    found = 0.0
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape or bool((np.isfinite(a) & ~np.isfinite(b)).any()):
            return float("inf")
        good = np.isfinite(a)
        found = max(found, float(np.abs(a - b)[good].max(initial=0) / max(np.abs(a[good]).max(initial=0), 1e-30)))
    return found


def fold_fx(name: str) -> dict[str, Any]:
    import foldline as fl
    import torch
    from foldline import passes as P
    from torch.utils import _pytree as pytree

    def run(m: Any, inputs: Any) -> list[np.ndarray]:
        with torch.no_grad():
            out = m(**inputs) if isinstance(inputs, dict) else m(*inputs)
        return [x.numpy() for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]

    for pixels in (PIXELS, None):
        try:
            model, inputs = architectures.build(name, pixels=pixels)
            before = run(randomize(model), inputs)
        except Exception:  # many take no other size than their own: that one is tried before giving up
            if pixels is None:
                raise
            continue
        break
    nodes = len(fl.load(model, inputs).nodes)
    start = time.process_time()
    result = P.fold(model, inputs, verify=False)
    seconds = time.process_time() - start
    error = worst(before, run(result.model, inputs))
    return {"nodes": [nodes, len(result.graph.nodes)], "error": error, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--parameters", type=float, default=40e6, help="models above this size are left out")
    parser.add_argument("--timeout", type=float, default=240)
    parser.add_argument(
        "--json", type=Path, help="append one line of JSON per model to this file; done ones are skipped"
    )
    parser.add_argument("models", nargs="*")
    args = parser.parse_args()
    import torch
    from support import timm_models

    timm_models.timm()
    torch.set_num_threads(1)
    start = time.monotonic()
    done = set()
    if args.json and args.json.exists():
        done = {json.loads(line)["model"] for line in args.json.read_text().splitlines()}
    listed = args.models or names(args.parameters)
    totals = {"good": 0, "wrong": 0, "failed": 0}
    for name in (n for n in listed if n not in done and not n.startswith("!")):
        if time.monotonic() - start > 60 * args.minutes:
            break
        found = isolated(fold_fx, name, limit=args.timeout)
        bad = "failed" not in found and not found["error"] <= WRONG
        totals["failed" if "failed" in found else "wrong" if bad else "good"] += 1
        told = found.get("failed") or f"{found['nodes'][0]} | {found['nodes'][1]} | {found['error']:.1e}"
        print(f"| {'WRONG ' if bad else ''}{name} | {told} |", flush=True)
        if args.json:
            with args.json.open("a") as out:
                out.write(json.dumps({"model": name, "fx": found}) + "\n")
    unbuildable = [n for n in listed if n.startswith("!")]
    print(f"{len(listed)} listed, {len(unbuildable)} not buildable; {totals}")


if __name__ == "__main__":
    main()
