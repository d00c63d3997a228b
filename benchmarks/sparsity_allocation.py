"""How many zeros each layer gets: test accuracy of ResNet-20 by uniform, ERK, LAMP and measured distortion, untrained.

    OMP_NUM_THREADS=1 python benchmarks/sparsity_allocation.py [--sparsities 0.8 0.9] [--stages 1 4] [--images 1000]

Weights are thinned by magnitude in place ("Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural
Networks"), only the share per layer differs. One stage is the paper's method; more stages start
from the best of it and the three rules by joint distortion, and refine. Distortions are measured on 64 training images,
accuracies on the first test images. "re-estimated": batch norms' statistics taken anew on those 64 training images,
for every row alike. Needs the data folder (FOLDLINE_DATA).
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.metadata import version
from pathlib import Path

import foldline as fl
import torch
from foldline.passes.prune.levels import Outputs
from foldline.passes.prune.sparsity_levels import allocate_sparsity, erk, lamp, thinned, uniform

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.data import accuracy, cifar10, find_data, trained_resnet


@torch.no_grad()
def re_estimated(model: torch.nn.Module, x: torch.Tensor) -> torch.nn.Module:
    """The network with the statistics of its batch norms taken on ``x`` (in place)."""
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.reset_running_stats()
            m.momentum = None
    model.train()(x)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=64, help="training images on which distortions are measured")
    args = parser.parse_args()
    if find_data() is None:
        raise SystemExit("no data: set FOLDLINE_DATA to the folder that holds cifar10-jpeg.tar.xz")
    torch.set_num_threads(1)
    model = trained_resnet(20)
    images, _ = cifar10("train", args.samples)
    x, y = cifar10("test", args.images)
    graph = fl.load(model, (images,))
    names = [n for n, w in graph.weights.items() if len(w.shape) > 1 and w.kind == "parameter"]
    sizes = {n: graph.weight(n).size for n in names}
    outputs, total = Outputs(graph, [(images,)], args.samples), sum(sizes.values())
    print(f"torch {version('torch')}; {args.images} test images, unpruned {100 * accuracy(model, x, y):.1f} %\n")
    print("| zeros | shares by | zeros reached | distortion | accuracy | re-estimated | s |")
    print("|---|---|---|---|---|---|---|")
    for sparsity in args.sparsities:
        rules = {r.__name__: r for r in (uniform, erk, lamp)}
        for name in [*rules, *args.stages]:
            began = time.process_time()
            if isinstance(name, str):
                found, label = rules[name](graph, names, sparsity), name
            else:
                found = allocate_sparsity(graph, names, sparsity, outputs, stages=name)
                label = f"measured distortion, {name} stage{'s' if name > 1 else ''}"
            seconds = time.process_time() - began
            thin = thinned(graph, found)
            zeros = 1 - sum(round(d * sizes[n]) for n, d in found.items()) / total
            made = thin.to_model()
            plain = 100 * accuracy(made, x, y)
            again = 100 * accuracy(re_estimated(made, images), x, y)
            print(
                f"| {sparsity:.0%} | {label} | {zeros:.1%} | {outputs.distortion(thin):.3f} | {plain:.1f} % "
                f"| {again:.1f} % | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
