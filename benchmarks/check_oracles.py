"""fl.check against the tools it speaks for: ONNX Runtime's optimized graphs and TensorRT-RTX's parser and builder.

Files are written by onnxruntime.quantization, nncf, modelopt, torchao and foldline from the same float models, then
judged, per convolution and matrix product. Peers run in ``--peers PYTHON``; TensorRT's part needs the extra
``tensorrt-oracle`` (no GPU). Prints a markdown table.

    python benchmarks/check_oracles.py --folder FOLDER [--peers PYTHON] [--models resnet20 ...] [--rules]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import architectures  # noqa: F401  (puts tests/support on the path)
import onnx
import onnx_ir as ir
import onnxruntime
from foldline.backends.check import check
from foldline.backends.fix import fix
from foldline.backends.onnxruntime.flow import fusion
from foldline.backends.rules import OnnxFile
from foldline.backends.rules.onnx_file import name_of
from foldline.backends.rules.qdq import PRODUCTS
from foldline.backends.tensorrt.engine import EngineReport, build, library
from foldline.backends.tensorrt.flow import state
from foldline.graph.save import save
from quantize_files import TOOLS, U8S8, nncf, once, ort, prepare

KERNELS = (
    *("QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "MatMulNBits"),
    *("MatMulInteger", "DynamicQuantizeMatMul"),
)
QOPERATOR = ort(U8S8)[2].replace("QuantFormat.QDQ", "QuantFormat.QOperator")
LOAD = "import numpy as np; all_data = {n: np.concatenate([b[n] for b in batches()]) for n in names}"
TORCHAO = """
import foldline as fl
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, convert_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer, get_default_x86_inductor_quantization_config)
module = fl.load(src)
from support.data import trained_resnet
net = trained_resnet(int(src.split("resnet")[-1].split(".")[0])).eval()
first = next(iter(batches()))
x = torch.from_numpy(next(iter(first.values())))
quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
ready = prepare_pt2e(torch.export.export(net, (x,)).module(), quantizer)
for b in batches():
    ready(torch.from_numpy(next(iter(b.values()))))
made = convert_pt2e(ready)
torch.onnx.export(made, (x,), dynamo=True, verbose=False).save(dst)
"""
MORE = {
    "ort QOperator": ("import onnxruntime.quantization as q", ort(U8S8)[1], QOPERATOR),
    "ort dynamic": (
        "import onnxruntime.quantization as q",
        "",
        "q.quantize_dynamic(src, dst, weight_type=q.QuantType.QInt8, per_channel=True)",
    ),
    "modelopt int8": (
        "from modelopt.onnx.quantization import quantize",
        LOAD,
        "quantize(src, quantize_mode='int8', calibration_data=all_data, output_path=dst)",
    ),
    "torchao PT2E": ("import torch, sys; sys.path[:0] = [{tests!r}]", "", TORCHAO),
    "foldline tensorrt": (
        "import foldline as fl; from foldline import passes as P",
        "class Batches:\n    def __iter__(self): return batches()\nof_file = Batches()",
        "r = fl.Pipeline([P.Fold(), P.Quantize(target='tensorrt', calibration=of_file)]).run(src, verify=False); "
        "fl.save(r.model, dst)",
    ),
    "nncf transformer": nncf("model_type=nncf.ModelType.TRANSFORMER"),
}
FILES: dict[str, tuple[str, ...]] = {
    "resnet20": (
        "ort",
        "ort u8s8",
        "ort QOperator",
        "nncf",
        "modelopt int8",
        "torchao PT2E",
        "foldline",
        "foldline tensorrt",
    ),
    "resnet56": ("ort", "nncf", "foldline tensorrt"),
    "mobilenetv2_100": ("ort u8s8", "nncf", "foldline tensorrt"),
    "vit_tiny_patch16_224": ("ort u8s8", "nncf transformer", "foldline tensorrt"),
    "minilm": ("ort", "ort dynamic", "nncf transformer", "modelopt int8", "foldline tensorrt"),
}


@dataclass
class Verdict:
    """What check and the oracles say of one file."""

    name: str
    trt_errors: int = 0
    trt_wrong: int = 0
    trt: EngineReport | None = None
    trt_predicted: dict[str, str] = field(default_factory=dict)
    ort_predicted: int = 0
    ort_found: int | str = 0
    ort_errors: int = 0
    fixed: str = ""
    fixed_agrees: bool = True

    def trt_nodes(self) -> tuple[int, int]:
        """Products on whose precision both agree, of all that the engine has."""
        assert self.trt is not None
        found = {name: self.trt.precision(name) for name in self.trt_predicted}
        known = {name: kind for name, kind in found.items() if kind is not None}
        return sum(self.trt_predicted[name] == kind for name, kind in known.items()), len(known)

    @property
    def agrees(self) -> bool:
        """The file itself, and what fl.fix made of it."""
        return self.fixed_agrees and self._agrees()

    def _agrees(self) -> bool:
        right = self.ort_predicted == self.ort_found if isinstance(self.ort_found, int) else self.ort_errors > 0
        if self.trt is None:
            return right
        if bool(self.trt_errors) != (not self.trt.built):
            return False
        same, of = self.trt_nodes() if self.trt.built else (0, 0)
        return right and same == of

    def row(self) -> str:
        trt, precise = "not installed", "-"
        if self.trt is not None:
            trt = "built" if self.trt.built else "crashed" if self.trt.crash is not None else "refused"
            if self.trt.built:
                same, of = self.trt_nodes()
                narrow = sum(self.trt.precision(n) not in (None, "float") for n in self.trt_predicted)
                precise = f"{same} of {of} ({narrow} in 8 bits)"
        said = f"{self.trt_errors} errors" if self.trt_errors else "takes it"
        said += f", {self.trt_wrong} silently wrong" if self.trt_wrong else ""
        kernels = f"{self.ort_predicted} / {self.ort_found}"
        agree = "yes" if self.agrees else "NO"
        return f"| {self.name} | {said} | {trt} | {precise} | {kernels} | {self.fixed} | {agree} |"


def named(path: Path) -> None:
    """Give nameless nodes names, so that the engine's layers can be told apart."""
    model = ir.load(path)
    seen: set[str] = set()
    for i, node in enumerate(model.graph.all_nodes()):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{i}_"
        seen.add(node.name)
    save(model, path)


def optimized(path: Path) -> tuple[int | str, Counter[str]]:
    """Integer products in ONNX Runtime's optimized graph, or how it refuses."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "o.onnx"
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(target)
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        try:
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # onnxruntime raises classes of its own
            return str(exc).splitlines()[0][:40], Counter()
        ops = Counter(node.op_type for node in onnx.load(target, load_external_data=False).graph.node)
        return sum(ops[k] for k in KERNELS), ops


def judge(path: Path, name: str) -> Verdict:
    """Everything but TensorRT's own word."""
    file = OnnxFile(path)
    found = Verdict(name)
    said = check(path, "tensorrt")
    found.trt_errors = sum(d.consequence == "error" for d in said)
    found.trt_wrong = sum(d.consequence == "silently wrong" for d in said)
    products = list(file.of(*PRODUCTS))
    found.trt_predicted = {name_of(n): state(file, n).precision for n in products}
    fusions = [fusion(file, n) for n in products]
    already = sum(n.op_type in KERNELS for n in file.nodes)
    found.ort_predicted = sum(f is not None and f.integer for f in fusions) + already
    found.ort_errors = sum(d.consequence == "error" for d in check(path, "onnxruntime-cpu"))
    found.ort_found, _ = optimized(path)
    return found


def files(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """Write what is not there yet."""
    found = []
    tests = str(Path(__file__).resolve().parents[1] / "tests")
    TOOLS.update({k: tuple(part.replace("{tests!r}", repr(tests)) for part in v) for k, v in MORE.items()})  # type: ignore[misc]
    for model in args.models:
        source, data = prepare(model, args.folder, args.samples, 2)
        for tool in FILES[model]:
            target = args.folder / f"{model}.{tool.replace(' ', '_')}.onnx"
            if not target.exists():
                done = once(tool, source, data, target, args.peers)
                if "failed" in done:
                    print(f"{model}, {tool}: {done['failed']}", file=sys.stderr)
                    continue
                named(target)
            found.append((f"{model}, {tool}", target))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where files are kept")
    parser.add_argument("--peers", default=sys.executable, help="interpreter with the peers")
    parser.add_argument("--models", nargs="+", default=list(FILES), choices=list(FILES))
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--no-fix", action="store_true", help="do not judge what fl.fix makes of refused files")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    found = files(args)
    verdicts = [judge(path, name) for name, path in found]
    if library() is not None:
        for verdict, report in zip(verdicts, build([path for _, path in found]), strict=True):
            verdict.trt = report
    if not args.no_fix:
        repaired(found, verdicts, args.folder)
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("onnxruntime", "onnx"))
    trt = next((v.trt.version for v in verdicts if v.trt is not None), "none")
    print(f"onnxruntime and TensorRT as oracles ({versions}, TensorRT-RTX {trt})\n")
    print(
        "| file | fl.check tensorrt | TensorRT-RTX | precision of products: agreed | integer products in ONNX Runtime: "
        "predicted / found | after fl.fix | agree |\n|---|---|---|---|---|---|---|"
    )
    for verdict in verdicts:
        print(verdict.row())
    print(f"\n{sum(v.agrees for v in verdicts)} of {len(verdicts)} files agree")


def repaired(found: list[tuple[str, Path]], verdicts: list[Verdict], folder: Path) -> None:
    """What TensorRT says to the result of fl.fix."""
    made = []
    for (name, path), verdict in zip(found, verdicts, strict=True):
        if not verdict.trt_errors and name.endswith("foldline tensorrt"):
            verdict.fixed = "-"
            continue
        model, report = fix(path, "tensorrt")
        target = folder / "fixed" / path.name
        target.parent.mkdir(exist_ok=True)
        save(model, target)
        left = sorted({d.rule for d in report.after if d.consequence in ("error", "silently wrong")})
        quality = min(report.sqnr_db.values(), default=float("nan"))
        verdict.fixed = f"{', '.join(left) or 'clean'}, {quality:.1f} dB"
        made.append((verdict, target, any(d.consequence == "error" for d in report.after)))
    if library() is None:
        return
    for (verdict, _, errors), report in zip(made, build([path for _, path, _ in made]), strict=True):
        verdict.fixed_agrees = errors != report.built
        counts = ", ".join(f"{n} {kind}" for kind, n in report.counts().items())
        verdict.fixed += f"; {counts}" if report.built else "; refused"


if __name__ == "__main__":
    main()
