"""ResNet-20/56 on CIFAR-10 with weights of few bits: uniform widths against mixed ones at equal bytes, and corrections.

    python benchmarks/quantize_bits.py --depth 20 56 --images 10000         # tables, about 10 minutes on one core
    python benchmarks/quantize_bits.py --depth 20 --parts mixed --images 2000

Needs the data folder (FOLDLINE_DATA, or ../shared/data beside the checkout). Activations are 8 bits, placement is the
onnxruntime-cpu spec's, rounding is to the nearest: what differs is the widths alone. dB: SQNR of the logits against
the float network over the test images. "bytes": packed integers and scales.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from foldline import Pipeline
from foldline import passes as P
from foldline.graph.execute import run_graph
from foldline.graph.ir import Graph
from foldline.graph.version import VERSION
from foldline.passes.quantize.bits import MixedPrecision
from foldline.passes.quantize.bits.costs import stored_bytes
from foldline.passes.quantize.choices import narrowed
from foldline.passes.quantize.sensitivity.layers import layers
from foldline.passes.quantize.spec import TensorFormat

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.data import cifar10, trained_resnet

BATCH = 100
CHOICES = (2, 3, 4, 5, 6, 7, 8)
FORM = TensorFormat("int8", symmetric=True, granularity="out_channel")


class Judge:
    """Accuracy and SQNR on the test images."""

    def __init__(self, graph: Graph, images: int) -> None:
        x, y = cifar10("test", images)
        self.batches, self.labels = list(x.split(BATCH)), y.numpy()
        self.wanted = self.logits(graph)

    def logits(self, graph: Graph) -> np.ndarray:
        return np.concatenate([run_graph(graph, graph.bind(b))[0][0] for b in self.batches])

    def __call__(self, graph: Graph) -> tuple[float, float]:
        found = self.logits(graph)
        noise = float(np.square(found - self.wanted).sum())
        decibel = 10 * np.log10(float(np.square(self.wanted).sum()) / noise)
        return 100 * float((found.argmax(1) == self.labels).mean()), decibel


def uniform_bytes(graph: Graph, bits: int) -> float:
    return sum(layer.bytes(narrowed(FORM, bits)) for layer in layers(graph))


def mixed_rows(args: argparse.Namespace, graph: Graph) -> Iterator[tuple[str, list[Any]]]:
    for bits in args.bits:
        size = uniform_bytes(graph, bits)
        yield f"uniform {bits} bits", [P.Quantize(weight_bits=bits)]
        for sensitivity in args.sensitivity:
            mixed = MixedPrecision(choices=CHOICES, budget=f"bytes({size})", sensitivity=sensitivity, samples=64)
            yield f"mixed, {sensitivity}", [P.Quantize(bits=mixed)]


def correction_rows(args: argparse.Namespace, graph: Graph) -> Iterator[tuple[str, list[Any]]]:
    for bits in args.bits:
        quantize = P.Quantize(weight_bits=bits)
        yield f"{bits} bits", [quantize]
        yield f"{bits} bits, pre-calibrated", [P.PreCalibrate(bits=bits), quantize]
        for method in ("moments", "fast", "full"):
            yield f"{bits} bits, bias correction {method}", [quantize, P.BiasCorrection(method=method)]
        yield f"{bits} bits, BN re-tuning", [quantize, P.BnRetune()]
        yield f"{bits} bits, BN re-tuning, bias correction full", [quantize, P.BnRetune(), P.BiasCorrection()]
        mixed = MixedPrecision(choices=CHOICES, budget=f"bytes({uniform_bytes(graph, bits)})", samples=64)
        yield f"mixed {bits}, BN re-tuning, bias correction full", [
            P.Quantize(bits=mixed), P.BnRetune(), P.BiasCorrection(),
        ]  # fmt: skip


def table(name: str, rows: Iterator[tuple[str, list[Any]]], graph: Graph, judge: Judge, batches: list[Any]) -> None:
    print(f"\n{name}\n\n| | accuracy % | dB | weight bytes | widths | seconds |\n|---|---|---|---|---|---|", flush=True)
    for label, passes in rows:
        began = time.process_time()
        run = Pipeline(passes).run(graph, batches[0], calibration=batches, verify=False)
        seconds = time.process_time() - began
        record = next(p for p in run.report.passes if p.name == "quantize")
        widths = [d["weight_bits"] for d in record.details["layers"].values()]
        names = {layer.name: layer for layer in layers(graph)}
        size = sum(
            stored_bytes(names[n].weight.shape, names[n].axis, names[n].in_axis, narrowed(FORM, d["weight_bits"]), True)
            for n, d in record.details["layers"].items()
        )
        count = ", ".join(f"{widths.count(b)}x{b}" for b in sorted(set(widths)))
        accuracy, decibel = judge(run.graph)
        print(f"| {label} | {accuracy:.2f} | {decibel:.1f} | {size:,.0f} | {count} | {seconds:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, nargs="+", default=[20, 56], choices=[20, 56])
    parser.add_argument("--images", type=int, default=10000, help="test images")
    parser.add_argument("--calibration", type=int, default=256, help="training images")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4, 5, 6])
    parser.add_argument("--sensitivity", nargs="+", default=["sqnr", "kl", "weights"])
    parser.add_argument("--parts", nargs="+", default=["mixed", "corrections"], choices=["mixed", "corrections"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    batches = list(cifar10("train", args.calibration)[0].split(64))
    for depth in args.depth:
        graph = Pipeline([P.Fold()]).run(trained_resnet(depth), batches[0], verify=False).graph
        judge = Judge(graph, args.images)
        accuracy = 100 * float((judge.wanted.argmax(1) == judge.labels).mean())
        print(f"\n### ResNet-{depth}, float {accuracy:.2f} % on {args.images} test images", flush=True)
        if "mixed" in args.parts:
            table("Widths at equal bytes", mixed_rows(args, graph), graph, judge, batches)
        if "corrections" in args.parts:
            table("Corrections", correction_rows(args, graph), graph, judge, batches)
    versions = ", ".join(f"{n} {version(n)}" for n in ("torch", "numpy", "scipy"))
    print(f"\nSeconds: of the process, one thread. foldline {VERSION}, {versions}")


if __name__ == "__main__":
    main()
