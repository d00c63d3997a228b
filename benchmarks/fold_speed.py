"""Time and peak memory of one fold of an ONNX file, each tool in a process of its own, and what it leaves to run.

    OMP_NUM_THREADS=1 python benchmarks/fold_speed.py [--runs 3] [--folder DIR] [--tools ...] [MODEL ...]

Each tool reads the file, optimizes it and writes another: ``foldline run fold`` (numerical check off, as the others
have none by default), onnxslim, onnxsim, onnxoptimizer, onnxscript.optimizer, ONNX Runtime's offline "extended" level.
Seconds: the whole process, and the part after the imports (read, optimize, write), the best of the runs. MiB: peak
resident memory of the process. Nodes left, and milliseconds of one run in ONNX Runtime (one thread, its own
optimizations on), tools in turn, median. Models are exported by torch without its own optimizer, at random weights.
Needs the extras timm, transformers, bench, and the peers.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODELS = "resnet50 mobilenetv3_large_100 convnext_tiny vit_small_patch16_224 bert-base llama-8l".split()

READ = "import onnx; m = onnx.load(src)"
WRITE = "onnx.save(m, dst, save_as_external_data=m.ByteSize() > 1 << 30)"
TOOLS = {
    "foldline": ("from foldline import cli", "cli.main(['run', 'fold', src, '-o', dst + '.d', '-q', '--no-verify'])"),
    "onnxslim": ("import onnxslim, onnx", f"m = onnxslim.slim(src); {WRITE}"),
    "onnxsim": ("import onnxsim, onnx", f"{READ}; m, ok = onnxsim.simplify(m); {WRITE}"),
    "onnxoptimizer": ("import onnxoptimizer, onnx", f"{READ}; m = onnxoptimizer.optimize(m); {WRITE}"),
    "onnxscript": (
        "import onnx_ir, onnxscript.optimizer",
        "m = onnx_ir.load(src); onnxscript.optimizer.optimize(m); onnx_ir.save(m, dst)",
    ),
    "onnxruntime": (
        "import onnxruntime as o",
        "s = o.SessionOptions(); s.optimized_model_filepath = dst; s.log_severity_level = 3; "
        "s.graph_optimization_level = o.GraphOptimizationLevel.ORT_ENABLE_EXTENDED; o.InferenceSession(src, s)",
    ),
}
"""Tool -> (imports, what is timed); ``src`` and ``dst`` are file names."""

HARNESS = """
import sys, time
src, dst = sys.argv[1:3]
{imports}
start = time.perf_counter()
try:
    {work}
except SystemExit as done:
    assert not done.code, done.code
took = time.perf_counter() - start
# ru_maxrss would be that of the process that started this one
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("\\nTOOK", took, int(peak.split()[1]) / 1024)
"""


def export(name: str, path: Path) -> None:
    """Write the model as torch exports it, before any optimizer."""
    import torch
    from support import timm_models

    torch.manual_seed(0)
    if name in ("bert-base", "llama-8l"):
        hf = timm_models.transformers()
        ids = torch.randint(0, 1000, (1, 64))
        if name == "bert-base":
            model = hf.BertModel(hf.BertConfig(attn_implementation="eager"))
        else:
            sizes = dict(hidden_size=512, intermediate_size=1376, num_attention_heads=8, num_key_value_heads=4)
            model = hf.LlamaForCausalLM(hf.LlamaConfig(num_hidden_layers=8, vocab_size=8000, use_cache=False, **sizes))
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        program = torch.onnx.export(
            model.eval(), (), kwargs=inputs, dynamo=True, optimize=False, verbose=False, external_data=False
        )
    else:
        from fold_models import build

        model, image = build(name)
        program = torch.onnx.export(model, (image,), dynamo=True, optimize=False, verbose=False)
    assert program is not None
    program.save(str(path))


def once(tool: str, source: Path, target: Path) -> dict[str, Any]:
    """One process: its whole time, the time after its imports, its peak memory; or how it failed."""
    imports, work = TOOLS[tool]
    code = HARNESS.format(imports=imports, work=work)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(source), str(target)], capture_output=True, text=True
    )
    whole = time.perf_counter() - start
    told = [line for line in done.stdout.splitlines() if line.startswith("TOOK")]
    if done.returncode or not told:
        lines = (done.stderr.strip() or f"exit {done.returncode}").splitlines()
        return {"failed": lines[-1][:60].replace("|", "/")}
    inner, peak = map(float, told[0].split()[1:])
    return {"whole": whole, "inner": inner, "mib": peak}


def written(tool: str, target: Path) -> Path:
    return next(Path(f"{target}.d").glob("*.onnx")) if tool == "foldline" else target


def latency(files: dict[str, Path], rounds: int = 15) -> dict[str, float]:
    """Median milliseconds of a run per file, the files in turn."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    sessions = {k: ort.InferenceSession(str(f), options, providers=["CPUExecutionProvider"]) for k, f in files.items()}
    rng = np.random.default_rng(0)
    first = next(iter(sessions.values()))
    feeds = {
        i.name: rng.standard_normal(i.shape).astype(np.float32) if "float" in i.type else np.ones(i.shape, np.int64)
        for i in first.get_inputs()
    }
    times: dict[str, list[float]] = {k: [] for k in files}
    for _ in range(rounds):
        for key, session in sessions.items():
            start = time.perf_counter()
            session.run(None, feeds)
            times[key].append(1e3 * (time.perf_counter() - start))
    return {k: statistics.median(t[2:]) for k, t in times.items()}


def nodes(path: Path) -> int:
    import onnx

    return len(onnx.load(path, load_external_data=False).graph.node)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("out/fold_speed"), help="for the files; kept")
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("models", nargs="*", default=MODELS)
    args = parser.parse_args()
    import architectures  # noqa: F401  (puts tests/support on the path)

    args.folder.mkdir(parents=True, exist_ok=True)
    known = [t for t in args.tools if t != "foldline"]
    print(", ".join(f"{t} {version(t)}" for t in ["onnx", *known]) + f"; Python {sys.version.split()[0]}\n")
    print("| model | tool | process s | without imports s | peak MiB | nodes | run ms |\n|---|---|---|---|---|---|---|")
    for name in args.models:
        source = args.folder / f"{name}.onnx"
        if not source.exists():
            done = subprocess.run(
                [sys.executable, "-W", "ignore", __file__, "--export", name, str(source)], check=False
            )
            assert done.returncode == 0, f"{name} could not be exported"
        rows: dict[str, dict[str, Any]] = {}
        for tool in args.tools:
            target = args.folder / f"{name}.{tool}.onnx"
            tries = [once(tool, source, target) for _ in range(args.runs)]
            good = [t for t in tries if "failed" not in t]
            rows[tool] = min(good, key=lambda t: float(t["whole"])) if good else tries[0]
        files = {t: written(t, args.folder / f"{name}.{t}.onnx") for t, row in rows.items() if "failed" not in row}
        times = latency({"as exported": source, **files})
        print(f"| {name} | as exported | | | | {nodes(source)} | {times['as exported']:.1f} |")
        for tool, row in rows.items():
            if "failed" in row:
                print(f"| {name} | {tool} | fails: {row['failed']} | | | | |")
                continue
            print(
                f"| {name} | {tool} | {row['whole']:.2f} | {row['inner']:.2f} | {row['mib']:.0f} "
                f"| {nodes(files[tool])} | {times[tool]:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--export"]:  # in a process of its own, so that the exporter's memory is given back
        import architectures  # noqa: F401

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        export(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
