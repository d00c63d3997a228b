"""Time and peak memory of calibration and quantization of an ONNX file, each tool in a process of its own.

    OMP_NUM_THREADS=1 python benchmarks/quantize_memory.py [--peers PYTHON] [--samples 32] [--tools ...] [MODEL ...]

Same file, same calibration data, same method of choosing ranges: extremes, a percentile, entropy. Seconds: reading,
calibrating, quantizing, writing, without the imports, the best of the runs; CPU seconds
say more on a busy machine. MiB: peak resident memory of the process,
imports included. Needs the extras timm, transformers,
bench, and the peers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import architectures  # noqa: F401  (puts tests/support on the path)
from quantize_files import TOOLS, once, prepare

MODELS = "resnet20 resnet18 vit_tiny_patch16_224 minilm".split()
METHODS = {
    "extremes": ["foldline", "ort u8s8", "nncf"],
    "percentile": ["foldline percentile", "ort percentile"],
    "entropy": ["foldline entropy", "ort entropy"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=sys.executable, help="interpreter that has the peers")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--tools", nargs="+", default=None, help=f"of {', '.join(TOOLS)}")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("out/quantize_memory"), help="for the files; kept")
    parser.add_argument("models", nargs="*", default=MODELS)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    code = (
        "from importlib.metadata import version as v; print(', '.join(f'{p} {v(p)}' for p in ('onnxruntime', 'nncf')))"
    )
    told = subprocess.run([args.peers, "-c", code], capture_output=True, text=True).stdout.strip()
    print(f"{told or 'no peers'}; Python {sys.version.split()[0]}; {args.samples} samples in batches of {args.batch}\n")
    print("| model | ranges | tool | s | CPU s | peak MiB |\n|---|---|---|---|---|---|")
    for name in args.models:
        source, data = prepare(name, args.folder, args.samples, args.batch)
        for method in args.methods:
            for tool in METHODS[method]:
                if args.tools is not None and tool not in args.tools:
                    continue
                target = args.folder / f"{name}.{tool.replace(' ', '_')}.onnx"
                tries = [once(tool, source, data, target, args.peers) for _ in range(args.runs)]
                good = [t for t in tries if "failed" not in t]
                if not good:
                    print(f"| {name} | {method} | {tool} | fails: {tries[0]['failed']} | | |", flush=True)
                    continue
                best = min(good, key=lambda t: float(t["inner"]))
                print(
                    f"| {name} | {method} | {tool} | {best['inner']:.1f} | {best['cpu']:.1f} | {best['mib']:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
