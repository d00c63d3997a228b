"""MiniLM (real weights) in int8 for ONNX Runtime's CPU provider and for TensorRT, beside what other tools make of it.

    python benchmarks/quantize_minilm.py                    # everything: a few minutes
    python benchmarks/quantize_minilm.py --only foldline    # no peers
    python benchmarks/quantize_minilm.py --only smooth ort-u8s8 --rounds 20

The embedding module is exported once (opset 17, dynamic batch and length). Every tool quantizes that file in a process
of its own (time and peak memory are that process's), calibrated on 200 sentences; the other 200 are embedded with the
result. Spearman: rank correlation of all pairwise similarities with fp32's. Latency: one thread, all files in turn in
every round, in an order that changes, each timed call behind an untimed one of the same file; median, in sessions with
ONNX Runtime's defaults and as foldline opens them. Tools that are not installed are left out with a note.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

COUNT = 200
BATCH = 20
MODEL, DATA = "minilm.onnx", "minilm.npz"


def prepare(folder: Path) -> None:
    """The exported model and the token ids of test and calibration sentences, once per folder."""
    if (folder / MODEL).exists() and (folder / DATA).exists():
        return
    import torch
    from minilm_sentences import encode, load_minilm, sentences

    module, tokenizer = load_minilm()
    texts = sentences(2 * COUNT)
    ids, mask = encode(tokenizer, texts[::2])
    calibration_ids, calibration_mask = encode(tokenizer, texts[1::2])
    assert not set(texts[::2]) & set(texts[1::2])
    names = ["input_ids", "attention_mask"]
    axes = {name: {0: "batch", 1: "length"} for name in names}
    torch.onnx.export(
        module,
        (ids[:4], mask[:4]),
        str(folder / MODEL),
        input_names=names,
        output_names=["embedding"],
        dynamic_axes={**axes, "embedding": {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )
    arrays = {"ids": ids, "mask": mask, "calibration_ids": calibration_ids, "calibration_mask": calibration_mask}
    np.savez(folder / DATA, **{k: v.numpy() for k, v in arrays.items()})


def calibration(folder: Path) -> list[dict[str, np.ndarray]]:
    """Batches of 20 calibration sentences."""
    data = np.load(folder / DATA)
    ids, mask = data["calibration_ids"], data["calibration_mask"]
    parts = range(0, len(ids), BATCH)
    return [{"input_ids": ids[i : i + BATCH], "attention_mask": mask[i : i + BATCH]} for i in parts]


# ---- foldline ----------------------------------------------------------------------------------------------------
def foldline(*passes: Callable[[Any], Any]) -> Callable[[Path, Path], None]:
    def make(folder: Path, out: Path) -> None:
        import foldline as fl
        from foldline import passes as P

        pipe = fl.Pipeline([p(P) for p in passes])
        result = pipe.run(str(folder / MODEL), calibration=calibration(folder), verify=False)
        if result.artifact is None:
            fl.save(result.model, out)
        else:
            fl.save(result.artifact.model, out)

    return make


# ---- peers -------------------------------------------------------------------------------------------------------
class _Reader:
    """ONNX Runtime's calibration reader over the same batches."""

    def __init__(self, folder: Path) -> None:
        self.batches = iter(calibration(folder))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def ort_static(**options: Any) -> Callable[[Path, Path], None]:
    def make(folder: Path, out: Path) -> None:
        from onnxruntime.quantization import QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        ready = out.with_suffix(".ready.onnx")
        quant_pre_process(str(folder / MODEL), str(ready), skip_symbolic_shape=True)
        types = {"u8": QuantType.QUInt8, "s8": QuantType.QInt8}
        given = {k: types[v] if isinstance(v, str) else v for k, v in options.items()}
        quantize_static(str(ready), str(out), _Reader(folder), **given)

    return make


def ort_dynamic(folder: Path, out: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(folder / MODEL), str(out), weight_type=QuantType.QInt8, per_channel=True)


def nncf_transformer(folder: Path, out: Path) -> None:
    import nncf
    import onnx

    model = onnx.load(folder / MODEL)
    made = nncf.quantize(
        model, nncf.Dataset(calibration(folder)), model_type=nncf.ModelType.TRANSFORMER, subset_size=10
    )
    onnx.save(made, out)


def modelopt_int8(folder: Path, out: Path) -> None:
    from modelopt.onnx.quantization import quantize

    batches = calibration(folder)
    whole = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
    quantize(str(folder / MODEL), quantize_mode="int8", calibration_data=whole, output_path=str(out))


def _smooth(**options: Any) -> Callable[[Any], Any]:
    return lambda P: P.Smooth(insert=True, **options)


def _quantize(**options: Any) -> Callable[[Any], Any]:
    return lambda P: P.Quantize(**options)


def _lower() -> Callable[[Any], Any]:
    return lambda P: P.Lower("onnxruntime")


CPU, GPU = {"target": "onnxruntime-cpu"}, {"target": "tensorrt"}
METHODS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "plain": ("foldline: Quantize, Lower", foldline(_quantize(**CPU), _lower())),
    "smooth": ("foldline: Smooth, Quantize, Lower", foldline(_smooth(**CPU), _quantize(**CPU), _lower())),
    "gptq": (
        "foldline: Smooth, Quantize(gptq), Lower",
        foldline(_smooth(**CPU), _quantize(**CPU, rounding="gptq"), _lower()),
    ),
    "tensorrt": ("foldline: Smooth, Quantize, for TensorRT", foldline(_smooth(**GPU), _quantize(**GPU))),
    "tensorrt-gptq": (
        "foldline: Smooth, Quantize(gptq), for TensorRT",
        foldline(_smooth(**GPU), _quantize(**GPU, rounding="gptq")),
    ),
    "ort": ("onnxruntime static, defaults", ort_static()),
    "ort-u8s8": (
        "onnxruntime static, u8s8, per channel, MatMul only",
        ort_static(activation_type="u8", weight_type="s8", per_channel=True, op_types_to_quantize=["MatMul"]),
    ),
    "ort-dynamic": ("onnxruntime dynamic, per channel", ort_dynamic),
    "nncf": ("nncf, transformer mode", nncf_transformer),
    "modelopt": ("modelopt int8", modelopt_int8),
}
OURS = ("plain", "smooth", "gptq", "tensorrt", "tensorrt-gptq")


def one(name: str, folder: Path) -> None:
    """Quantize by one method in this process; writes its file and what it took."""
    began, cpu = time.perf_counter(), time.process_time()
    METHODS[name][1](folder, folder / f"{name}.onnx")
    facts = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    (folder / f"{name}.json").write_text(json.dumps(facts))


# ---- measuring ---------------------------------------------------------------------------------------------------
def session(path: Path, skipped: tuple[str, ...] = ()) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(skipped)
    )


def embed(run: Any, data: Any) -> np.ndarray:
    parts = range(0, COUNT, BATCH)
    feeds = [{"input_ids": data["ids"][i : i + BATCH], "attention_mask": data["mask"][i : i + BATCH]} for i in parts]
    return np.concatenate([run.run(None, feed)[0] for feed in feeds])


def agreement(reference: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Spearman of pairwise similarities, mean cosine, and signal to noise in dB."""
    from scipy.stats import spearmanr

    pairs = np.triu_indices(len(reference), 1)
    noise = float(np.square(found - reference).sum())
    return {
        "spearman": float(spearmanr((reference @ reference.T)[pairs], (found @ found.T)[pairs]).statistic),
        "cosine": float((reference * found).sum(1).mean()),
        "sqnr_db": float(10 * np.log10(np.square(reference).sum() / max(noise, 1e-30))),
    }


def weight_products(path: Path) -> tuple[int, int]:
    """(products with a stored weight whose both operands are dequantized, all products with a stored weight)."""
    import onnx

    graph = onnx.load(path).graph
    stored = {t.name for t in graph.initializer}
    made = {o: n for n in graph.node for o in n.output}

    def constant(name: str) -> bool:
        node = made.get(name)
        if name in stored or (node is not None and node.op_type == "Constant"):
            return True
        return node is not None and node.op_type in ("DequantizeLinear", "Transpose") and constant(node.input[0])

    def quantized(name: str) -> bool:
        node = made.get(name)
        if node is not None and node.op_type in ("Reshape", "Transpose"):
            return quantized(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"

    products = [n for n in graph.node if n.op_type in ("MatMul", "Gemm") and any(constant(i) for i in n.input[:2])]
    return sum(all(quantized(i) for i in n.input[:2]) for n in products), len(products)


def kernels(path: Path) -> dict[str, int]:
    """Integer products in the graph that ONNX Runtime makes of a file."""
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as scratch:
        options.optimized_model_filepath = str(Path(scratch) / "optimized.onnx")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        made = [n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node]
    integer = ("MatMulIntegerToFloat", "QGemm", "QLinearMatMul", "DynamicQuantizeMatMul", "MatMulInteger")
    return {op: made.count(op) for op in integer if op in made}


def latency(files: dict[str, Path], data: Any, rounds: int, batch: int) -> dict[tuple[str, bool], float]:
    """Median milliseconds per call; every round calls every file once, after two warm-up rounds.

    Each file is timed in a session with ONNX Runtime's defaults (False) and in one as foldline opens it (True).
    """
    from foldline.backends.onnxruntime.session import SLOWER_ON_CPU

    kinds: dict[bool, tuple[str, ...]] = {False: (), True: SLOWER_ON_CPU}
    runs = {(name, kind): session(path, off) for name, path in files.items() for kind, off in kinds.items()}
    feed = {"input_ids": data["ids"][:batch], "attention_mask": data["mask"][:batch]}
    spent: dict[tuple[str, bool], list[float]] = {key: [] for key in runs}
    order = list(runs.items())
    for i in range(rounds + 2):
        for name, run in order[i % len(order) :] + order[: i % len(order)]:
            run.run(None, feed)
            began = time.perf_counter()
            run.run(None, feed)
            if i >= 2:
                spent[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(times) for name, times in spent.items()}


def installed(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name} not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=None, help=f"methods ({', '.join(METHODS)}), or foldline")
    parser.add_argument("--folder", type=Path, help="where files go (and are found again); a temporary one if absent")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8, help="sentences per call while timing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return one(args.one, args.folder)
    names = list(METHODS) if not args.only else [n for a in args.only for n in (OURS if a == "foldline" else (a,))]
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder)
        table(folder, names, args)


def table(folder: Path, names: list[str], args: argparse.Namespace) -> None:
    data = np.load(folder / DATA)
    reference = embed(session(folder / MODEL), data)
    made, notes, rows = {"fp32": folder / MODEL}, [], {}
    for name in names:
        command = [sys.executable, __file__, "--one", name, "--folder", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        path = folder / f"{name}.onnx"
        if done.returncode or not path.exists():
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            notes.append(f"{METHODS[name][0]}: not made ({said[:160]})")
            continue
        try:
            rows[name] = agreement(reference, embed(session(path), data)) | json.loads(
                path.with_suffix(".json").read_text()
            )
            made[name] = path
        except Exception as exc:  # a peer's file may be invalid: that is a result
            notes.append(f"{METHODS[name][0]}: ONNX Runtime refuses its file ({str(exc)[:160]})")
    times = latency(made, data, args.rounds, args.batch)
    print(
        f"MiniLM, {COUNT} sentences, batch {args.batch} of 32 tokens, one thread of {platform.processor() or 'the CPU'}"
    )
    print(", ".join(installed(n) for n in ("foldline", "onnxruntime", "onnx", "nncf", "nvidia-modelopt", "torch")))
    floats = {kind: times["fp32", kind] for kind in (False, True)}
    size = (folder / MODEL).stat().st_size / 1e6
    print(f"fp32: {floats[False]:.1f} ms, in foldline's session {floats[True]:.1f} ms, {size:.1f} MB\n")
    heads = ["method", "Spearman", "cosine", "SQNR dB", "ms", "speed-up", "ms in foldline's session", "speed-up"]
    heads += ["file MB", "weight products in int8", "kernels", "quantized in s", "peak MB"]
    print(f"|{'|'.join(heads)}|\n|{'---|' * len(heads)}")
    for name, row in rows.items():
        inside, whole = weight_products(made[name])
        cells = [METHODS[name][0], f"{row['spearman']:.4f}", f"{row['cosine']:.4f}", f"{row['sqnr_db']:.1f}"]
        for kind in (False, True):
            cells += [f"{times[name, kind]:.1f}", f"{floats[kind] / times[name, kind]:.2f}"]
        cells += [f"{made[name].stat().st_size / 1e6:.1f}", f"{inside} of {whole}"]
        cells.append(", ".join(f"{n} {op}" for op, n in kernels(made[name]).items()) or "none")
        cells += [f"{row['seconds']:.0f}", f"{row['peak_mb']:.0f}"]
        print(f"|{'|'.join(cells)}|")
    for note in notes:
        print(f"\n{note}")


if __name__ == "__main__":
    main()
