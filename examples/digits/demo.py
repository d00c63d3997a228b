"""The demo (`make demo`): one trained network, from PyTorch and from its ONNX file, through the whole pipeline."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import foldline as fl
import numpy as np
import torch
from digits import DigitsCnn, calibration_batches, finetune, load_digits
from foldline import passes as P
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

CHECKPOINT = Path(__file__).with_name("digits_cnn.safetensors")
ALLOWED_DROP = 0.01


def pipeline() -> fl.Pipeline:
    """Fold batch norms, remove half the multiply-accumulates, recover, quantize to int8, lower to ONNX Runtime."""
    return fl.Pipeline(
        [
            P.Fold(),
            P.Prune(criterion="l2", target=fl.macs(0.5)),
            P.FineTune(train=finetune),
            P.Quantize(target="onnxruntime-cpu", calibration=calibration_batches()),
            P.Lower("onnxruntime"),
        ],
        name="digits",
    )


def trained_model() -> DigitsCnn:
    """The network with the committed weights (train.py made them)."""
    model = DigitsCnn()
    model.load_state_dict(load_file(CHECKPOINT))
    return model.eval()


def export(model: torch.nn.Module, example: torch.Tensor, path: Path) -> Path:
    """The network as an ONNX file with its batch norms, its batch axis free."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = torch.export.Dim("batch", min=1, max=4096)
        program = torch.onnx.export(
            model, (example,), dynamo=True, optimize=False, dynamic_shapes=({0: batch},), verbose=False
        )
    program.save(str(path))
    return path


def accuracy(artifact: Any) -> float:
    """Share of the 599 test images that an artifact gets right."""
    x, y = load_digits("test")
    return float(np.mean(artifact.run(x.numpy())[0].argmax(1) == y.numpy()))


def main() -> int:
    """Run both roads, print one table, save both results; 1 if a road loses more than one point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/digits"), help="folder for models and reports")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    torch.set_num_threads(1)

    model, example = trained_model(), load_digits("test")[0][:64]
    onnx_file = export(model, example, out / "digits_cnn.onnx")
    table = Table("from", "model", "accuracy", "size", "MACs", "latency of 64 images", title="digits, ONNX Runtime CPU")
    drops = []
    for road, source in (("PyTorch", model), ("ONNX", onnx_file)):
        before = P.lower(source, example, backend="onnxruntime")
        result = pipeline().run(source, example)
        result.save(out / road.lower())
        old, new = accuracy(before.artifact), accuracy(result.artifact)
        times = result.artifact.benchmark(against=before.artifact, inputs=example.numpy())
        drops.append(old - new)
        table.add_row(road, "trained", *row(old, before, times["against"]))
        table.add_row("", "folded, pruned, int8", *row(new, result, times), end_section=True)
    console.print(table)
    console.print(f"reports: {out}/pytorch/report.html, {out}/onnx/report.html")
    if max(drops) > ALLOWED_DROP:
        console.print(f"accuracy fell by {100 * max(drops):.2f} points: more than {100 * ALLOWED_DROP:.0f}")
        return 1
    return 0


def row(found: float, result: Any, times: dict[str, Any]) -> tuple[str, ...]:
    """Accuracy, size of the model file, multiply-accumulates per image, median latency."""
    size = Path(result.artifact.path).stat().st_size
    macs = result.report.after.macs
    return f"{100 * found:.2f} %", f"{size / 1e3:.0f} kB", f"{macs / 1e6:.2f} M", f"{times['median_ms']:.2f} ms"


if __name__ == "__main__":
    raise SystemExit(main())
