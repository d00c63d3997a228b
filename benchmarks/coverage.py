"""Which architectures a generic prune call handles, beside torch-pruning: no per-model code, ratio 0.5, head kept.

    OMP_NUM_THREADS=1 python benchmarks/coverage.py [--peer] [--timeout 120] [--json FILE] [MODEL ...]

Each model and each side runs in a process of its own (10 GiB of address space). foldline: ``P.prune(model, x,
ratio=0.5, verify=True)``; "error" is masked against sliced, relative to the largest output; then the pruned module is
called and its output compared in shape. The peer: ``MagnitudePruner(pruning_ratio=0.5, ignored_layers=[head])`` and
``step()``, then one call. Models: ``architectures.py``, random weights; from their ONNX files: ``onnx_models.py``.
Needs the extras timm, transformers, bench.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from architectures import MODELS, build, head_of, output_of


def count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def ours(name: str) -> dict[str, Any]:
    from foldline import passes as P

    model, inputs = build(name)
    shape, before = output_of(model, inputs).shape, count(model)
    result = P.prune(model, inputs, ratio=0.5, verify=True)
    assert output_of(result.model, inputs).shape == shape
    return {
        "share": count(result.model) / before,
        "error": result.report.passes[0].details["identity"].get("relative_error"),
        "same_class": type(result.model) is type(model) and not any("GraphModule" in n for n in result.graph.notes),
    }


def peer(name: str) -> dict[str, Any]:
    import torch_pruning as tp

    model, inputs = build(name)
    shape, before = output_of(model, inputs).shape, count(model)
    example = inputs if isinstance(inputs, dict) else inputs[0]
    importance = tp.importance.MagnitudeImportance(p=2)
    tp.pruner.MagnitudePruner(
        model, example, importance=importance, pruning_ratio=0.5, ignored_layers=[head_of(model)]
    ).step()
    assert output_of(model, inputs).shape == shape, "another output shape"
    return {"share": count(model) / before}


SIDES = {"ours": ours, "peer": peer}


def isolated(work: Callable[..., dict[str, Any]], *args: Any, limit: float) -> dict[str, Any]:
    """What a function returns in a process of its own (forked: imports are paid once), or ``{"failed": why}``."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (10 << 30, 10 << 30))
        try:
            there.send(work(*args))
        except BaseException as error:  # whatever a side dies of is its result
            text = str(error).strip().splitlines()
            there.send({"failed": f"{type(error).__name__}: {text[0] if text else ''}"[:80].replace("|", "/")})

    process = context.Process(target=child)
    process.start()
    there.close()
    found = {"failed": f"over {limit:.0f} s"}
    if here.poll(limit):
        try:
            found = here.recv()
        except EOFError:
            found = {"failed": "out of memory or killed"}
    process.kill()
    process.join()
    return found


def described(found: dict[str, Any]) -> str:
    """One cell: what is left of the parameters and the error, or how it failed."""
    if "failed" in found:
        return str(found["failed"])
    if "error" not in found:
        return f"{found['share']:.2f}"
    error = "statistics only" if found["error"] is None else f"{found['error']:.0e}"
    return f"{found['share']:.2f}, {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true", help="run torch-pruning too")
    parser.add_argument("--timeout", type=float, default=120)
    parser.add_argument("--json", type=Path, help="append one line of JSON per model to this file")
    parser.add_argument("models", nargs="*", default=MODELS)
    args = parser.parse_args()
    import torch
    from support import timm_models

    timm_models.timm(), timm_models.transformers()  # imported before the forks
    torch.set_num_threads(1)
    sides = ["ours", *(["peer"] if args.peer else [])]
    print("| model | foldline: left, error | comes back as |" + "".join(f" {s} |" for s in sides[1:]))
    print("|---|---|---|" + "---|" * (len(sides) - 1))
    good = dict.fromkeys(sides, 0)
    for name in args.models:
        found = {s: isolated(SIDES[s], name, limit=args.timeout) for s in sides}
        for side, result in found.items():
            good[side] += "failed" not in result
        kind = (
            ""
            if "failed" in found["ours"]
            else "its class"
            if found["ours"]["same_class"]
            else "partly or all GraphModule"
        )
        cells = "".join(f" {described(found[s])} |" for s in sides[1:])
        print(f"| {name} | {described(found['ours'])} | {kind} |{cells}", flush=True)
        if args.json:
            with args.json.open("a") as out:
                out.write(json.dumps({"model": name, **found}) + "\n")
    print(f"\n{len(args.models)} architectures: " + ", ".join(f"{s} {n}" for s, n in good.items()))


if __name__ == "__main__":
    main()
