"""int8 against fp32 in ONNX Runtime on the CPU, in turn in one process: integer kernels, milliseconds, ratio.

    OMP_NUM_THREADS=1 python benchmarks/quantize_speed.py [--peers PYTHON] [--tools ...] [MODEL ...]

Each tool quantizes the same float file with the same calibration data (foldline: Fold, Quantize, Lower; peers at
their defaults, and onnxruntime.quantization with uint8 activations and int8 weights per channel). ResNet-20 and -56
and MiniLM have trained weights, the others random ones. All files of a model run in turn, one image (one sentence of
32 tokens), one thread. The order changes from round to round and each timed call follows an untimed one of the same
file: what ran before would otherwise have emptied the caches for it (in a fixed order the file behind fp32 came out
8 % slower). Median and least milliseconds; median over the rounds of fp32's time over the tool's: above 1 is faster.
Kernels: integer kernels in the graph as the runtime rewrites it, and products and convolutions left in float.
Needs the extras timm, transformers, bench, and the peers.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import architectures  # noqa: F401  (puts tests/support on the path)
import numpy as np
from quantize_files import once, prepare

MODELS = (
    "resnet20 resnet56 resnet18 mobilenetv2_100 mobilenetv3_large_100 efficientnet_b0 convnext_femto convnext_tiny "
    "vit_tiny_patch16_224 minilm densenet121 regnety_002 ghostnet_100 mnasnet_100 repvgg_a0 levit_128s"
).split()
SPEED_TOOLS = ["foldline", "ort", "ort u8s8", "nncf"]


def sessions(files: dict[str, Path]) -> dict[str, Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    found = {}
    for tool, path in files.items():
        try:
            found[tool] = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # a file that a tool wrote and the runtime refuses is a result
            print(f"{path.name}: {str(error).splitlines()[0][:100]}", file=sys.stderr)
    return found


def timed(
    files: dict[str, Path], feeds: dict[str, np.ndarray], seconds: float
) -> dict[str, tuple[float, float, float, float]]:
    """Median and least milliseconds; median over the rounds of fp32's time over this one's, and ratio of the least."""
    opened = sessions(files)
    named = {t: {i.name: v for i, v in zip(s.get_inputs(), feeds.values(), strict=True)} for t, s in opened.items()}
    times: dict[str, list[float]] = {tool: [] for tool in opened}
    for session, feed in zip(opened.values(), named.values(), strict=True):
        for _ in range(5):
            session.run(None, feed)
    stop = time.perf_counter() + seconds
    order, turn = list(opened.items()), 0
    while time.perf_counter() < stop or len(times["fp32"]) < 11:
        turn += 1
        for tool, session in order[turn % len(order) :] + order[: turn % len(order)]:
            session.run(None, named[tool])
            start = time.perf_counter()
            session.run(None, named[tool])
            times[tool].append(1e3 * (time.perf_counter() - start))
    base = times["fp32"]
    found = {}
    for tool, t in times.items():
        ratio = statistics.median(b / a for a, b in zip(t, base, strict=True))
        found[tool] = (statistics.median(t), min(t), ratio, min(base) / min(t))
    return found


def lower(path: Path) -> None:
    """What ``P.Lower("onnxruntime")`` makes of the quantized file, written over it."""
    import foldline as fl
    from foldline.backends import get

    get("onnxruntime-cpu").lower(fl.load(str(path)), path=path)


def kernels(path: Path, folder: Path) -> str:
    """Integer kernels + products left in float, as the runtime rewrites the file."""
    import onnxruntime as ort
    from foldline.backends.onnxruntime.artifact import sort_nodes

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    target = folder / "optimized.onnx"
    options.optimized_model_filepath = str(target)
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    import onnx_ir

    profile = sort_nodes(onnx_ir.load(target))
    target.unlink()
    return f"{len(profile.integer)} + {len(profile.float_matrix)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=sys.executable, help="interpreter that has the peers")
    parser.add_argument("--tools", nargs="+", default=SPEED_TOOLS)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing per model")
    parser.add_argument("--folder", type=Path, default=Path("out/quantize_speed"), help="for the files; kept")
    parser.add_argument("--again", action="store_true", help="quantize anew where a file is there already")
    parser.add_argument("models", nargs="*", default=MODELS)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    code = (
        "from importlib.metadata import version as v; print(', '.join(f'{p} {v(p)}' for p in ('onnxruntime', 'nncf')))"
    )
    told = subprocess.run([args.peers, "-c", code], capture_output=True, text=True).stdout.strip()
    print(f"{told or 'no peers'}; Python {sys.version.split()[0]}\n")
    print(
        "| model | tool | integer kernels + float products | ms | least ms | times as fast as fp32 | by least |\n"
        "|---|---|---|---|---|---|---|"
    )
    for name in args.models:
        source, data = prepare(name, args.folder, args.samples, 4)
        files, failed = {"fp32": source}, {}
        for tool in args.tools:
            target = args.folder / f"{name}.{tool.replace(' ', '_')}.onnx"
            if args.again or not target.exists():
                found = once(tool, source, data, target, args.peers)
                if "failed" in found:
                    failed[tool] = found["failed"]
                    continue
                if tool.startswith("foldline"):
                    lower(target)
            files[tool] = target
        stored = np.load(data)
        feeds = {k: stored[k][:1] for k in stored.files if k.startswith("0/")}
        for tool, (ms, least, ratio, by_least) in timed(files, feeds, args.seconds).items():
            made = kernels(files[tool], args.folder)
            print(f"| {name} | {tool} | {made} | {ms:.2f} | {least:.2f} | {ratio:.2f} | {by_least:.2f} |", flush=True)
        for tool, why in failed.items():
            print(f"| {name} | {tool} | fails: {why} | | | | |", flush=True)


if __name__ == "__main__":
    main()
