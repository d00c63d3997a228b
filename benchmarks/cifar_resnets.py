"""ResNet-20/56 on CIFAR-10 through the whole pipeline, from PyTorch and from ONNX: accuracy right after each pass.

    python benchmarks/cifar_resnets.py --depth 20 --road both --images 2000 --steps 100

Needs the data folder (FOLDLINE_DATA, or ../shared/data beside the checkout). Starts from the networks fine-tuned on
the JPEG images; prints one row per pass with accuracy, parameters, multiply-accumulates and seconds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import foldline as fl
import numpy as np
import torch
import torch.nn.functional as F
from foldline import passes as P
from foldline.graph.execute import run_graph
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.data import cifar10, find_data, trained_resnet

BATCH = 100


def finetuner(steps: int, rate: float, batch: int = 128) -> Any:
    """A training loop of ``steps`` batches (flip and crop, Nesterov momentum, one-cycle rate)."""

    def train(model: torch.nn.Module) -> None:
        x, y = cifar10("train", steps * batch)
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.2)
        model.train()
        for batch_of in torch.randperm(len(x), generator=generator).split(batch):
            images = F.pad(x[batch_of], (4, 4, 4, 4))
            dy, dx, flip = torch.randint(0, 9, (3,), generator=generator).tolist()
            images = images[:, :, dy : dy + 32, dx : dx + 32]
            loss = F.cross_entropy(model(images.flip(3) if flip % 2 else images), y[batch_of])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()

    return train


def passes(args: argparse.Namespace) -> Iterator[tuple[str, fl.passes.Pass]]:
    """The pipeline's passes with the name of their row."""
    calibration = list(cifar10("train", 512)[0].split(BATCH))
    if not args.fold_last:
        yield "fold", P.Fold()
    yield f"prune to {args.macs:g} MACs", P.Prune(criterion=args.criterion, target=fl.macs(args.macs))
    if args.steps:
        yield f"fine-tune {args.steps} steps", P.FineTune(train=finetuner(args.steps, args.rate))
    if args.fold_last:
        yield "fold", P.Fold()
    yield "quantize int8", P.Quantize(target="onnxruntime-cpu", calibration=calibration)
    yield "lower to ONNX Runtime", P.Lower("onnxruntime")


def accuracy(result: Any, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of right answers of the lowered artifact if there is one, else of the graph."""
    right = 0
    for i in range(0, len(images), BATCH):
        x = images[i : i + BATCH]
        if result.artifact is not None:
            out = result.artifact.run(x)[0]
        else:
            out = run_graph(result.graph, result.graph.bind(x))[0][0]
        right += int((out.argmax(1) == labels[i : i + BATCH]).sum())
    return right / len(images)


def export(model: torch.nn.Module, example: torch.Tensor, path: Path) -> Path:
    """The network as an ONNX file, batch norms kept."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = torch.export.Dim("batch", min=1, max=4096)
        program = torch.onnx.export(
            model, (example,), dynamo=True, optimize=False, dynamic_shapes=({0: batch},), verbose=False
        )
    program.save(str(path))
    return path


def run(depth: int, road: str, args: argparse.Namespace, folder: Path) -> Table:
    """One network down one road."""
    images, labels = (t.numpy() for t in cifar10("test", args.images))
    model, example = trained_resnet(depth), torch.from_numpy(images[:BATCH])
    source: Any = export(model, example, folder / f"resnet{depth}.onnx") if road == "onnx" else model
    title = f"ResNet-{depth} from {road}, {len(images)} JPEG test images"
    table = Table("after", "accuracy", "parameters", "MACs", "error", "seconds", title=title)
    start = fl.cost(fl.load(source, example))
    plain = P.lower(source, example, backend="onnxruntime", verify=False)
    table.add_row(
        "trained", f"{100 * accuracy(plain, images, labels):.2f} %", f"{start.parameters:,}", f"{start.macs:,}", "", ""
    )
    state: Any = fl.load(source, example)
    for name, step in passes(args):
        began = time.perf_counter()
        result = fl.Pipeline([step]).run(state, example)
        seconds = time.perf_counter() - began
        state, after = result.graph, result.report.after
        found = accuracy(result, images, labels)
        verdict = result.report.passes[0].verdict
        table.add_row(
            name, f"{100 * found:.2f} %", f"{after.parameters:,}", f"{after.macs:,}", verdict, f"{seconds:.1f}"
        )
    times = result.artifact.benchmark(against=plain.artifact, inputs=images[:1])
    table.caption = f"latency of one image: {times['against']['median_ms']:.2f} -> {times['median_ms']:.2f} ms"
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, choices=(20, 56), action="append", help="default: both")
    parser.add_argument("--road", choices=("torch", "onnx", "both"), default="both")
    parser.add_argument("--images", type=int, default=2000, help="test images")
    parser.add_argument("--macs", type=float, default=0.5, help="share of the MACs that remains")
    parser.add_argument("--criterion", default="l2")
    parser.add_argument("--steps", type=int, default=100, help="fine-tuning batches of 128; 0: none")
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--fold-last", action="store_true", help="keep the batch norms while fine-tuning")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if find_data() is None:
        raise SystemExit("no data: set FOLDLINE_DATA to the folder that holds cifar10-jpeg.tar.xz")
    torch.set_num_threads(args.threads)
    roads = ("torch", "onnx") if args.road == "both" else (args.road,)
    with tempfile.TemporaryDirectory() as folder:
        for depth in args.depth or (20, 56):
            for road in roads:
                Console(width=max(Console().width, 110)).print(run(depth, road, args, Path(folder)))


if __name__ == "__main__":
    main()
