"""Float ONNX files, calibration data and the tools that quantize them, each in a process of its own.

Shared by ``quantize_speed.py`` and ``quantize_memory.py``. The peers run in ``--peers PYTHON``, an interpreter that has
them installed (the one that runs the benchmark by default).
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

REAL = ("resnet20", "resnet56", "minilm")
"""Models with trained weights and real data; all others are timm's, at random weights and on noise."""

HARNESS = """
import os, sys, time, warnings
warnings.filterwarnings("ignore")
src, data, dst = sys.argv[1:4]
import numpy as np
{imports}
stored = np.load(data)
count = int(stored["batches"])
names = [k[2:] for k in stored.files if k.startswith("0/")]
def batches():
    for i in range(count):
        yield {{n: stored[f"{{i}}/{{n}}"] for n in names}}
{define}
start, cpu = time.perf_counter(), time.process_time()
{work}
took, cpu = time.perf_counter() - start, time.process_time() - cpu
# ru_maxrss would be that of the process that started this one
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("\\nTOOK", took, int(peak.split()[1]) / 1024, cpu)
"""

ORT_DEFINE = """
class Reader(q.CalibrationDataReader):
    def __init__(self): self.items = batches()
    def get_next(self): return next(self.items, None)
from onnxruntime.quantization.shape_inference import quant_pre_process
"""
ORT_WORK = """
ready = dst + ".pre.onnx"
try:
    quant_pre_process(src, ready)
except Exception:
    quant_pre_process(src, ready, skip_symbolic_shape=True)
q.quantize_static(ready, dst, Reader(), quant_format=q.QuantFormat.QDQ, {options})
"""


def ort(options: str) -> tuple[str, str, str]:
    """onnxruntime.quantization as its guide says: preprocessing, then static quantization to Q/DQ."""
    return "import onnxruntime.quantization as q", ORT_DEFINE, ORT_WORK.format(options=options)


def nncf(options: str = "") -> tuple[str, str, str]:
    """nncf.quantize on the file."""
    work = f"onnx.save(nncf.quantize(onnx.load(src), nncf.Dataset(list(batches())), subset_size=count, {options}), dst)"
    return "import logging, nncf, onnx; nncf.set_log_level(logging.ERROR)", "", work


def foldline(options: str = "") -> tuple[str, str, str]:
    """Fold and Quantize for onnxruntime-cpu."""
    work = (
        "r = fl.Pipeline([P.Fold(), P.Quantize(target='onnxruntime-cpu', "
        f"{options})]).run(src, calibration=batches, verify=False); fl.save(r.model, dst)"
    )
    return (
        # What is imported when first used would be timed otherwise.
        "import foldline as fl, foldline.backends.onnxruntime; from foldline import passes as P; P.Fold, P.Quantize; "
        "fl.Pipeline, fl.save",
        "class Batches:\n    def __iter__(self): return batches()\nbatches_of_file = Batches()",
        work.replace("calibration=batches", "calibration=batches_of_file"),
    )


U8S8 = "activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8, per_channel=True"
TOOLS: dict[str, tuple[str, str, str]] = {
    "foldline": foldline(),
    "ort": ort(""),
    "ort u8s8": ort(U8S8),
    "nncf": nncf(),
    "foldline percentile": foldline("ranges='percentile'"),
    "foldline entropy": foldline("ranges='entropy'"),
    "foldline mse": foldline("ranges='mse'"),
    "ort percentile": ort(f"{U8S8}, calibrate_method=q.CalibrationMethod.Percentile"),
    "ort entropy": ort(f"{U8S8}, calibrate_method=q.CalibrationMethod.Entropy"),
    "nncf transformer": nncf("model_type=nncf.ModelType.TRANSFORMER"),
}
"""Tool and setting -> (imports, definitions, what is timed); ``src``, ``data`` and ``dst`` are file names."""


def prepare(name: str, folder: Path, samples: int, batch: int) -> tuple[Path, Path]:
    """The float file and its calibration data (npz: ``batches``, and ``"<i>/<input>"`` each), made once."""
    source, data = folder / f"{name}.onnx", folder / f"{name}.{samples}x{batch}.npz"
    if not (source.exists() and data.exists()):
        command = [sys.executable, "-W", "ignore", __file__, name, str(source), str(data), str(samples), str(batch)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} could not be exported: {done.stderr.strip().splitlines()[-1]}")
    return source, data


def once(tool: str, source: Path, data: Path, target: Path, python: str) -> dict[str, Any]:
    """One process: seconds and CPU seconds without its imports, whole seconds, peak memory in MiB; or how it failed."""
    imports, define, work = TOOLS[tool]
    code = HARNESS.format(imports=imports, define=define, work=work)
    interpreter = sys.executable if tool.startswith("foldline") else python
    start = time.perf_counter()
    done = subprocess.run(
        [interpreter, "-W", "ignore", "-c", code, str(source), str(data), str(target)], capture_output=True, text=True
    )
    whole = time.perf_counter() - start
    told = [line for line in done.stdout.splitlines() if line.startswith("TOOK")]
    if done.returncode or not told:
        lines = (done.stderr.strip() or f"exit {done.returncode}").splitlines()
        return {"failed": lines[-1][:80].replace("|", "/")}
    inner, peak, cpu = map(float, told[0].split()[1:])
    return {"whole": whole, "inner": inner, "mib": peak, "cpu": cpu}


def _inputs(name: str, samples: int) -> tuple[Any, tuple[Any, ...], dict[str, np.ndarray]]:
    """The module, one call's arguments for the exporter, and all calibration inputs by name."""
    import torch

    torch.manual_seed(0)
    if name.startswith("resnet") and name in REAL:
        from support.data import cifar10, trained_resnet

        images, _ = cifar10("train", samples)
        return trained_resnet(int(name.removeprefix("resnet"))), (images[:2],), {"x": images.numpy()}
    if name == "minilm":
        from minilm_sentences import encode, load_minilm, sentences

        model, tokenizer = load_minilm()
        ids, mask = encode(tokenizer, sentences(samples))
        return model, (ids[:2], mask[:2]), {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    from fold_models import build

    model, image = build(name)
    images = torch.randn(samples, *image.shape[1:])
    return model, (images[:2],), {"x": images.numpy()}


def export(name: str, source: Path, data: Path, samples: int, batch: int) -> None:
    """Write the model as torch exports it, with a dynamic batch, and its calibration data."""
    import torch

    model, arguments, inputs = _inputs(name, samples)
    dynamic = tuple({0: torch.export.Dim.DYNAMIC} for _ in arguments)
    try:
        program = torch.onnx.export(model, arguments, dynamo=True, verbose=False, dynamic_shapes=dynamic)
    except Exception:  # some models fix the batch
        arguments = tuple(a[:1] for a in arguments)
        program = torch.onnx.export(model, arguments, dynamo=True, verbose=False)
        batch = 1
    assert program is not None
    program.save(str(source))
    named = [v.name for v in program.model.graph.inputs]
    stored = {"batches": np.array(samples // batch)}
    for i in range(samples // batch):
        for key, values in zip(named, inputs.values(), strict=True):
            stored[f"{i}/{key}"] = values[i * batch : (i + 1) * batch]
    np.savez(data, **stored)


if __name__ == "__main__":
    import architectures  # noqa: F401  (puts tests/support on the path)

    export(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
