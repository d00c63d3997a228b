"""Scale-shift features (SSF) in vision models: what is left of them after folding, in nodes, latency and error.

    OMP_NUM_THREADS=1 python benchmarks/scale_shift.py [--rounds 30] [MODEL ...]

A scale and a shift per channel (random, some scales negative) stand behind every convolution, linear and normalization
of a timm model at random weights, as SSF trains them ("Scaling & Shifting Your Features: A New Baseline for Efficient
Model Tuning"). The model is exported by torch without its own optimizer and given to ``foldline run fold`` and to
onnxslim, onnxsim, onnxoptimizer, onnxscript.optimizer and ONNX Runtime's offline levels. "plain": the same model
without SSF, exported and folded by foldline: the bar. torch.fx fuse: ``torch.fx.experimental.optimization.fuse`` on
the module, then exported.
Nodes left; milliseconds of one run in ONNX Runtime (one thread, its own optimizations on, the tools in turn, median);
largest error over the outputs relative to their largest magnitude, against the exported model with SSF. Needs the
extras timm and bench, and the peers.
"""

from __future__ import annotations

import argparse
import copy
import io
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

MODELS = ("vit_tiny_patch16_224", "resnet18", "mobilenetv2_100", "mixer_s32_224")
WIDE = (nn.Conv2d, nn.Linear, nn.LayerNorm, nn.BatchNorm2d)


class ScaleShift(nn.Module):
    """A layer and a scale and shift of its output's channels."""

    def __init__(self, layer: nn.Module, channels: int, axis: int) -> None:
        super().__init__()
        self.layer = layer
        shape = (channels, *[1] * (-1 - axis))
        sign = torch.where(torch.rand(shape) < 0.2, -1.0, 1.0)
        self.scale = nn.Parameter(sign * (0.5 + torch.rand(shape)))
        self.shift = nn.Parameter(0.1 * torch.randn(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.scale + self.shift


def with_ssf(model: nn.Module) -> nn.Module:
    """A copy of the model with a scale and shift behind every layer of :data:`WIDE`."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, WIDE):
            image = isinstance(layer, (nn.Conv2d, nn.BatchNorm2d))
            channels = next(
                int(n)
                for n in (
                    getattr(layer, key, None)
                    for key in ("out_channels", "out_features", "num_features", "normalized_shape")
                )
                if n is not None
                for n in [n[-1] if isinstance(n, tuple) else n]
            )
            if isinstance(getattr(layer, "act", None), nn.Module):  # timm's norm and activation in one module
                layer.act = nn.Sequential(ScaleShift(nn.Identity(), channels, -3), layer.act)
                continue
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, ScaleShift(layer, channels, -3 if image else -1))
    return model.eval()


def vary(model: nn.Module) -> nn.Module:
    """Small random numbers for what starts at zero (biases, some heads), which an optimizer would rightly drop."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


def export(model: nn.Module, example: torch.Tensor) -> onnx.ModelProto:
    """The model as torch exports it, before any optimizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (example,), dynamo=True, optimize=False, verbose=False)
    buffer = io.BytesIO()
    program.save(buffer)
    return onnx.load_from_string(buffer.getvalue())


def _foldline(path: Path, out: Path, options: list[str]) -> None:
    from foldline import cli

    try:
        cli.main(["run", "fold", str(path), "-o", str(out) + ".d", "-q", *options])
    except SystemExit as done:
        if done.code:
            raise RuntimeError(f"foldline ended with {done.code}") from done
    found = sorted(Path(str(out) + ".d").rglob("*.onnx"))
    out.write_bytes(found[0].read_bytes())


def _onnxslim(path: Path, out: Path) -> None:
    import onnxslim

    onnx.save(onnxslim.slim(onnx.load(path)), out)


def _onnxsim(path: Path, out: Path) -> None:
    import onnxsim

    model, ok = onnxsim.simplify(onnx.load(path))
    if not ok:
        raise RuntimeError("onnxsim's own check failed")
    onnx.save(model, out)


def _onnxoptimizer(path: Path, out: Path) -> None:
    import onnxoptimizer

    onnx.save(onnxoptimizer.optimize(onnx.load(path)), out)


def _onnxscript(path: Path, out: Path) -> None:
    import onnx_ir
    import onnxscript.optimizer

    model = onnx_ir.load(path)
    onnxscript.optimizer.optimize(model)
    onnx_ir.save(model, out)


def _onnxruntime(level: str) -> Callable[[Path, Path], None]:
    def optimize(path: Path, out: Path) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
        options.optimized_model_filepath = str(out)
        options.log_severity_level = 3
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    return optimize


TOOLS: dict[str, Callable[[Path, Path], None]] = {
    "foldline": lambda path, out: _foldline(path, out, []),
    "onnxslim": _onnxslim,
    "onnxsim": _onnxsim,
    "onnxoptimizer": _onnxoptimizer,
    "onnxscript": _onnxscript,
    "ort basic": _onnxruntime("BASIC"),
    "ort extended": _onnxruntime("EXTENDED"),
    "ort all": _onnxruntime("ALL"),
}


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def nodes(path: Path) -> int:
    """Nodes of a file, constants that are spelled as nodes not counted."""
    return sum(node.op_type != "Constant" for node in onnx.load(path).graph.node)


def latencies(files: dict[str, Path], feed: dict[str, np.ndarray], rounds: int) -> dict[str, float]:
    """Median milliseconds per file, all files run in turn."""
    sessions = {name: session(path) for name, path in files.items()}
    times: dict[str, list[float]] = {name: [] for name in files}
    for turn in range(rounds + 3):
        for name, running in sessions.items():
            start = time.perf_counter()
            running.run(None, feed)
            if turn >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def fused_by_torch(model: nn.Module) -> nn.Module:
    from torch.fx.experimental.optimization import fuse

    fused = fuse(model)
    assert isinstance(fused, nn.Module)
    return fused.eval()


def measure(name: str, folder: Path, rounds: int) -> list[list[Any]]:
    """The rows of one model."""
    from support.timm_models import create

    torch.manual_seed(0)
    plain = vary(create(name))
    model = with_ssf(plain)
    size = getattr(plain, "default_cfg", {}).get("input_size", (3, 224, 224))
    example = torch.randn(1, *size)
    source, bar = folder / f"{name}.onnx", folder / f"{name}_plain.onnx"
    source.write_bytes(export(model, example).SerializeToString())
    bar.write_bytes(export(plain, example).SerializeToString())
    files = {"exported": source}
    failures: dict[str, str] = {}
    for tool, optimize in TOOLS.items():
        out = folder / f"{name}_{tool.replace(' ', '_')}.onnx"
        try:
            optimize(source, out)
            files[tool] = out
        except Exception as error:  # a peer's crash is a row of the table, not the end of it
            failures[tool] = f"{type(error).__name__}: {error}"[:80]
    try:
        out = folder / f"{name}_torch.onnx"
        out.write_bytes(export(fused_by_torch(model), example).SerializeToString())
        files["torch.fx fuse"] = out
    except Exception as error:  # as above
        failures["torch.fx fuse"] = f"{type(error).__name__}: {error}"[:80]
    files["plain"] = folder / f"{name}_plain_folded.onnx"
    TOOLS["foldline"](bar, files["plain"])
    first = session(source)
    feed = {first.get_inputs()[0].name: example.numpy()}
    (want,) = first.run(None, feed)
    times = latencies(files, feed, rounds)
    rows = []
    for tool, path in files.items():
        running = session(path)
        (got,) = running.run(None, {running.get_inputs()[0].name: example.numpy()})
        error = float(np.abs(got - want).max() / np.abs(want).max())
        rows.append([name, tool, nodes(path), f"{times[tool]:.2f}", "" if tool == "plain" else f"{error:.1e}"])
    return rows + [[name, tool, "failed", "", why] for tool, why in failures.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    torch.set_num_threads(1)
    tools = "torch onnx onnxruntime timm onnxslim onnxsim onnxoptimizer onnxscript".split()
    print(", ".join(f"{tool} {version(tool)}" for tool in tools))
    print("\n| model | tool | nodes | ms | relative error |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in given.models:
            for row in measure(name, Path(folder), given.rounds):
                print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
