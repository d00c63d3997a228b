"""The demo (`make demo`): one trained network, from PyTorch and from its ONNX file, through the whole pipeline."""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import foldline as fl
import numpy as np
import torch
from digits import DigitsCnn, calibration_batches, load_digits
from foldline import passes as P
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

CHECKPOINT = Path(__file__).with_name("digits_cnn.safetensors")
ALLOWED_DROP = 0.01


def pipeline() -> fl.Pipeline:
    """Fold batch norms, remove half the multiply-accumulates, recover, quantize to int8, lower to ONNX Runtime.

    pipeline.yaml holds the same.
    """
    return fl.Pipeline(
        [
            P.Fold(),
            P.Prune(criterion="l2", target=fl.macs(0.5), round_to=8),
            P.FineTune(train="digits:finetune"),  # a function does too; a name can be written to a file
            P.Quantize(target="onnxruntime-cpu"),  # calibration batches are given to run()
            P.Lower("onnxruntime", threads=1),
        ],
        name="digits",
    )


def trained_model() -> DigitsCnn:
    """The network with the committed weights (train.py made them)."""
    model = DigitsCnn()
    model.load_state_dict(load_file(CHECKPOINT))
    return model.eval()


def export(model: torch.nn.Module, example: torch.Tensor, path: Path) -> Path:
    """The network as an ONNX file with its batch norms, its batch axis free, without the exporter's stack traces."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = torch.export.Dim("batch", min=1, max=4096)
        program = torch.onnx.export(
            model, (example,), dynamo=True, optimize=False, dynamic_shapes=({0: batch},), verbose=False
        )
    for node in program.model.graph:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    program.save(str(path))
    return path


def accuracy(artifact: Any) -> float:
    """Share of the 599 test images that an artifact gets right."""
    x, y = load_digits("test")
    return float(np.mean(artifact.run(x.numpy())[0].argmax(1) == y.numpy()))


def run(road: str, source: Any, example: torch.Tensor, out: Path, table: Table) -> float:
    """One road: two rows of the table; gives the drop in accuracy."""
    before = P.lower(source, example, backend="onnxruntime", threads=1)
    after = pipeline().run(source, example, calibration=calibration_batches())
    times = after.artifact.benchmark(runs=200, against=before.artifact, inputs=example.numpy())
    found = []
    speed = f" ({1 / times['ratio']:.1f}x)"
    for name, result, timed, remark in (
        ("trained", before, times["against"], ""),
        ("folded, pruned, int8", after, times, speed),
    ):
        folder = result.save(out / road.lower() / name.split(",")[0])
        found.append(accuracy(result.artifact))
        table.add_row(
            road,
            name,
            f"{100 * found[-1]:.2f} %",
            f"{(folder / 'artifact.onnx').stat().st_size / 1e3:.0f} kB",
            f"{result.report.after.macs / 1e6:.2f} M",
            f"{timed['median_ms']:.2f} ms{remark}",
        )
    table.add_section()
    return found[0] - found[1]


def main() -> int:
    """Run both roads, print one table, save models and reports; 1 if a road loses more than one point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/digits"), help="folder for models and reports")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not there; nobody asked
    console = Console()

    model, example = trained_model(), load_digits("test")[0][:64]
    onnx_file = export(model, example, out / "digits_cnn.onnx")
    table = Table("from", "model", "accuracy", "size", "MACs", "latency", title="digits, ONNX Runtime on one CPU core")
    table.caption = "accuracy on 599 test images, size of the .onnx file, MACs of one image, latency of 64 images"
    drops = [run(road, source, example, out, table) for road, source in (("PyTorch", model), ("ONNX", onnx_file))]
    console.print(table)
    for road in ("pytorch", "onnx"):
        console.print(f"report: {out / road / 'folded' / 'report.html'}", soft_wrap=True)
    if max(drops) > ALLOWED_DROP:
        console.print(f"accuracy fell by {100 * max(drops):.2f} points, more than {100 * ALLOWED_DROP:.0f}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
