"""A vision transformer in W8A8 for ONNX Runtime on the CPU: signal to noise of the outputs, and speed, beside peers.

    OMP_NUM_THREADS=1 python benchmarks/quantize_vit.py [--recipes default sqnr] [--no-peers]

timm's vit_tiny_patch16_224 at random weights (no trained ones are at hand), CIFAR-10 images enlarged to 224: 32 to
calibrate, 32 others to judge. All files are run by ONNX Runtime; SQNR over all logits against the float file. Times:
one image, one thread, the order changes from round to round, each timed call behind an untimed one of the same file;
ratio: median over the rounds of fp32's time over the file's. Run it by an interpreter that has the peers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import foldline as fl
import numpy as np
import torch
from foldline import passes as P

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.data import cifar10
from support.timm_models import timm

TARGET = {"target": "onnxruntime-cpu"}
RECIPES: dict[str, tuple[str, list[Any]]] = {
    "default": ("Fold, Quantize", [P.Quantize(**TARGET)]),
    "gptq": ("Fold, Quantize(rounding=gptq)", [P.Quantize(**TARGET, rounding="gptq")]),
    "smooth": ("Fold, Smooth, Quantize", [P.Smooth(**TARGET), P.Quantize(**TARGET)]),
    "sqnr": ("Fold, Quantize(sqnr=34.5)", [P.Quantize(**TARGET, sqnr=34.5)]),
    "smooth-sqnr": ("Fold, Smooth, Quantize(sqnr=34.5)", [P.Smooth(**TARGET), P.Quantize(**TARGET, sqnr=34.5)]),
    "smooth-gptq-sqnr": (
        "Fold, Smooth, Quantize(rounding=gptq, sqnr=34.5)",
        [P.Smooth(**TARGET), P.Quantize(**TARGET, rounding="gptq", sqnr=34.5)],
    ),
}


def ours(model: Any, data: list[torch.Tensor], passes: list[Any], path: Path) -> str:
    """Write the lowered file; how many layers stayed in float."""
    pipe = fl.Pipeline([P.Fold(), *passes, P.Lower("onnxruntime", path=str(path), threads=1)])
    result = pipe.run(model, data[0], calibration=data, verify=False)
    details = next(r.details for r in result.report.passes if r.name == "quantize")
    return (
        f"{len(details.get('floats_for_sqnr', []))} of {details['weights'] + len(details.get('floats_for_sqnr', []))}"
    )


def ort(source: Path, data: list[np.ndarray], path: Path) -> str:
    import onnxruntime.quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(q.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.items = iter(data)

        def get_next(self) -> Any:
            x = next(self.items, None)
            return None if x is None else {"x": x}

    ready = path.with_suffix(".ready.onnx")
    quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
    kinds = {"activation_type": q.QuantType.QUInt8, "weight_type": q.QuantType.QInt8}
    q.quantize_static(str(ready), str(path), Reader(), per_channel=True, **kinds)
    return ""


def nncf(source: Path, data: list[np.ndarray], path: Path) -> str:
    import nncf
    import onnx

    nncf.set_log_level(40)
    batches = nncf.Dataset([{"x": x} for x in data])
    made = nncf.quantize(onnx.load(source), batches, subset_size=len(data), model_type=nncf.ModelType.TRANSFORMER)
    onnx.save(made, path)
    return ""


PEERS = {"onnxruntime.quantization, u8s8, per channel": ort, "nncf, transformer mode": nncf}


def session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(opened: Any, x: np.ndarray) -> np.ndarray:
    return np.asarray(opened.run(None, {opened.get_inputs()[0].name: x})[0])


def times(opened: dict[str, Any], x: np.ndarray, seconds: float) -> dict[str, tuple[float, float]]:
    """Median milliseconds, and the median ratio to the first."""
    spent: dict[str, list[float]] = {name: [] for name in opened}
    order, turn, stop = list(opened.items()), 0, time.perf_counter() + seconds
    while time.perf_counter() < stop or turn < 11:
        turn += 1
        for name, s in order[turn % len(order) :] + order[: turn % len(order)]:
            run(s, x)
            began = time.perf_counter()
            run(s, x)
            spent[name].append(1e3 * (time.perf_counter() - began))
    base = spent[order[0][0]]
    return {
        n: (statistics.median(t), statistics.median(b / a for a, b in zip(t, base, strict=True)))
        for n, t in spent.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm().create_model("vit_tiny_patch16_224", pretrained=False).eval()
    images = torch.nn.functional.interpolate(cifar10("test", 64)[0], size=(224, 224), mode="bilinear")
    data, test = list(images[:32].split(8)), images[32:].split(8)
    rows: dict[str, tuple[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = folder / "float.onnx"
        program = torch.onnx.export(
            model, (data[0],), dynamo=True, verbose=False, input_names=["x"], dynamic_shapes=({0: "batch"},)
        )
        assert program is not None
        program.save(str(source))
        opened = {"float32": session(source)}
        jobs: dict[str, Any] = {
            RECIPES[r][0]: lambda path, r=r: ours(model, data, RECIPES[r][1], path) for r in args.recipes
        }
        if not args.no_peers:
            arrays = [x.numpy() for x in data]
            jobs |= {name: lambda path, peer=peer: peer(source, arrays, path) for name, peer in PEERS.items()}
        for i, (name, job) in enumerate(jobs.items()):
            began = time.process_time()
            try:
                floats = job(folder / f"{i}.onnx")
            except ImportError as exc:
                print(f"{name}: left out ({exc})", file=sys.stderr)
                continue
            rows[name] = (floats, time.process_time() - began)
            opened[name] = session(folder / f"{i}.onnx")
        outputs = {n: np.concatenate([run(s, x.numpy()) for x in test]).astype(np.float64) for n, s in opened.items()}
        timed = times(opened, test[0][:1].numpy(), args.seconds)
    reference = outputs["float32"]
    print("| recipe | SQNR dB | layers left in float | ms | times as fast as fp32 | CPU seconds |")
    print("|---|---|---|---|---|---|")
    for name, (ms, ratio) in timed.items():
        noise = float(np.square(outputs[name] - reference).sum())
        sqnr = "-" if name == "float32" else f"{10 * np.log10(float(np.square(reference).sum()) / noise):.2f}"
        floats, cpu = rows.get(name, ("", 0.0))
        print(f"| {name} | {sqnr} | {floats} | {ms:.2f} | {ratio:.2f} | {cpu:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
