"""A whole prune call against the peer's, per model: time, peak memory, and whether the result is right.

    OMP_NUM_THREADS=1 python benchmarks/prune_speed.py [--both | --all] [--cpu] [--json FILE] [MODEL ...]

foldline: ``P.prune(model, x, ratio=0.5, verify=False)``: capture, analysis, choice, cut, and a new module of the same
class, proved to make the calls of the cut graph. The peer, torch-pruning 1.6.1: ``MagnitudePruner(pruning_ratio=0.5,
ignored_layers=[head])`` and ``step()``: build, init and step, in place. Both in a process of their own per model (10
GiB of address space), one thread, after one call on a two-layer network (imports and first-call caches are not
counted); their runs alternate, so that both meet the same machine; the best of the runs (no further one after
``--enough`` seconds), each on a fresh copy of the model. Memory is the growth of the process's peak, the copy it works
on included, over what it held before; pages of library files, which processes share, are not counted, and foldline's
own meter, which would reset the mark, is switched off. The side that fails says how. ``--right FILE``: what
masked.py found (its ``--json``): is the peer's result right? ``--both``: the models that both sides manage
(coverage.py), the small transformers at the sizes that are published, too. ``--cpu`` prints processor time instead of
wall time, for a machine with other jobs. ``--json`` keeps one line per model; what it holds already is printed again,
not run again. Needs the extras timm, transformers, bench.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

from architectures import MODELS, build, head_of, output_of

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


def resident(*keys: str) -> float:
    """The sum of some of the entries of this process's status (VmRSS, VmHWM, RssFile), MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(keys)) / 1024


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


def serve(side: str, name: str, orders: Any) -> None:
    """A side's process: prune a fresh copy of the model at each order and tell how long it took and the memory."""
    resource.setrlimit(resource.RLIMIT_AS, (10 << 30, 10 << 30))
    try:
        call = {"ours": ours, "peer": peer}[side]
        if side == "ours":
            from foldline.passes import meter

            meter._reset_peak = lambda: False  # the mark is this benchmark's
        call(*warm_net())
        model, inputs = build(name)
        shape = output_of(model, inputs).shape
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the mark starts at what is held now
        held, files = resident("VmRSS"), resident("RssFile")
        orders.send({})
        while orders.recv():
            gc.collect()
            fresh = copy.deepcopy(model)
            gc.collect()
            start, worked = time.perf_counter(), time.process_time()
            pruned = call(fresh, inputs)
            found = {"wall": time.perf_counter() - start, "cpu": time.process_time() - worked}
            found["mib"] = resident("VmHWM") - held - (resident("RssFile") - files)
            assert output_of(pruned, inputs).shape == shape, "another output shape"
            orders.send(found)
            fresh = pruned = None  # each run has the memory for itself
    except BaseException as error:  # whatever a side dies of is its result
        text = str(error).strip().splitlines()
        orders.send({"failed": f"{type(error).__name__}: {text[0] if text else ''}"[:80].replace("|", "/")})


class Side:
    """One side at work on one model."""

    def __init__(self, side: str, name: str, limit: float) -> None:
        context = multiprocessing.get_context("fork")
        self.line, there = context.Pipe()
        self.process = context.Process(target=serve, args=(side, name, there), daemon=True)
        self.process.start()
        there.close()
        self.left, self.spent = limit, 0.0
        self.runs: list[dict[str, float]] = []
        self.failed = self._hear().get("failed")

    def _hear(self) -> dict[str, Any]:
        start = time.perf_counter()
        answer: dict[str, Any] = {"failed": "over the time limit"}
        try:
            if self.line.poll(max(self.left, 0.0)):
                answer = self.line.recv()
        except EOFError:
            answer = {"failed": "out of memory or killed"}
        self.left -= time.perf_counter() - start
        return answer

    def run(self) -> None:
        """One more run, unless a run has failed."""
        if self.failed is None:
            self.line.send(True)
            answer = self._hear()
            self.failed = answer.get("failed")
            if self.failed is None:
                self.runs.append(answer)
                self.spent += answer["wall"]

    def result(self) -> dict[str, Any]:
        """The best of the runs; the memory of the last, by when every run has left its mark."""
        self.process.kill()
        self.process.join()
        if self.failed is not None:
            return {"failed": self.failed}
        best = {clock: min(r[clock] for r in self.runs) for clock in ("wall", "cpu")}
        return {**best, "mib": self.runs[-1]["mib"]}


def measured(name: str, runs: int, enough: float, limit: float) -> dict[str, Any]:
    """Both sides on one model, run by run in turn."""
    sides = {side: Side(side, name, limit) for side in ("ours", "peer")}
    for _ in range(runs):
        for side in sides.values():
            if side.spent <= enough:
                side.run()
    return {side: at_work.result() for side, at_work in sides.items()}


def row(name: str, found: dict[str, Any], clock: str, right: dict[str, Any] | None = None) -> str:
    """The model's line of the table; ``right``: what masked.py says of it."""
    sides = [found["ours"], found["peer"]]
    cells = [str(r.get("failed") or f"{r[clock]:.3f}") for r in sides]
    memory = ["" if "failed" in r else f"{r['mib']:.1f}" for r in sides]
    ratio = "" if any("failed" in r for r in sides) else f"{sides[1][clock] / sides[0][clock]:.2f}"
    verdict = "" if right is None or not ratio else f" {right['verdict']} |"
    return f"| {name} | {cells[0]} | {cells[1]} | {ratio} | {memory[0]} | {memory[1]} |{verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=float, default=60, help="seconds for all runs of one side of one model")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--enough", type=float, default=5, help="seconds after which no further run is started")
    parser.add_argument("--both", action="store_true", help="the models that both sides manage, and the hard ones")
    parser.add_argument("--all", action="store_true", help="every model of architectures.py")
    parser.add_argument("--cpu", action="store_true", help="processor time instead of wall time")
    parser.add_argument("--json", type=Path, help="one line per model; those in it are not run again")
    parser.add_argument("--right", type=Path, help="what masked.py wrote: whether the peer's results are right")
    parser.add_argument("models", nargs="*", default=[*BOTH, *HARD])
    args = parser.parse_args()
    import torch
    from support import timm_models

    timm_models.timm(), timm_models.transformers()  # imported before the forks
    torch.set_num_threads(1)
    known: dict[str, Any] = {}
    if args.json and args.json.exists():
        known = {(r := json.loads(line))["model"]: r for line in args.json.read_text().splitlines()}
    right: dict[str, Any] = {}
    if args.right:
        right = {(r := json.loads(line))["model"]: r for line in args.right.read_text().splitlines()}
    clock = "cpu" if args.cpu else "wall"
    more = " torch-pruning's result |" if right else ""
    print(f"| model | foldline s | torch-pruning s | times faster | foldline MiB | torch-pruning MiB |{more}")
    print("|---|---|---|---|---|---|" + "---|" * bool(right))
    both: list[dict[str, Any]] = []
    for name in MODELS if args.all else [*BOTH, *HARD] if args.both else args.models:
        found = known.get(name)
        if found is None:
            found = {"model": name, **measured(name, args.runs, args.enough, args.timeout)}
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps(found) + "\n")
        print(row(name, found, clock, right.get(name, {"verdict": ""}) if right else None), flush=True)
        if not any("failed" in found[s] for s in ("ours", "peer")):
            both.append(found)
    wrong = {name for name, r in right.items() if r["verdict"].startswith("wrong")}
    for title, some in (
        ("models on which both end", both),
        *(
            [("of them, models on which the peer's result is not wrong", [r for r in both if r["model"] not in wrong])]
            * bool(wrong)
        ),
    ):
        if some:
            ratios = sorted(r["peer"][clock] / r["ours"][clock] for r in some)
            lighter = sum(r["ours"]["mib"] <= r["peer"]["mib"] for r in some)
            print(
                f"\n{len(some)} {title}: not slower on {sum(x >= 1 for x in ratios)}, no more memory on {lighter}; ",
                end="",
            )
            print(f"median {ratios[len(ratios) // 2]:.1f} times, least {ratios[0]:.2f} times faster ({clock} time).")


if __name__ == "__main__":
    main()
