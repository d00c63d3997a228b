"""Models of parallel linear branches after each graph optimizer: nodes, latency in ONNX Runtime, relative error.

    OMP_NUM_THREADS=1 python benchmarks/branches.py [--rounds 50] [--folder DIR] [--tools ...] [MODEL ...]

Each model is exported plainly (torch's exporter as it is by default, its own optimizer included; batch-norm statistics,
gains and layer scales random, so that no branch is the identity or hidden behind a zero). Then: ``foldline`` folds the
file, ``foldline fx`` folds the module, which is then exported, and so do ``torch.fx fuse``
(torch.fx.experimental.optimization.fuse) and ``own fuse`` (timm's reparameterize_model, the architectures' own
methods; for LoRA and SSF the merge written by hand); onnxslim, onnxsim, onnxoptimizer, onnxscript.optimizer and
ONNX Runtime's offline levels get the file. Nodes of the file; milliseconds of one run in ONNX Runtime on one thread,
its own optimizations on, all files in turn, the best of the rounds; error: largest difference from the plain export,
relative to its largest output. ``lora:NAME`` is a model with a low-rank side branch beside every linear and dense
convolution, ``ssf:NAME`` one with a scale and shift per channel behind every linear, convolution and norm.
Needs the extras timm, bench, and the peers.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import architectures  # noqa: F401  (puts tests/support on the path)
import fold_speed
import numpy as np
from fold_models import build

BASES = "vit_tiny_patch16_224 resnet50 mobilenetv2_100 mixer_s16_224".split()
MODELS = [
    *"mobileone_s0 ghostnetv3_100 repvgg_a2 fastvit_t8 repvit_m1 levit_128s".split(),
    *(f"{kind}:{base}" for kind in ("lora", "ssf") for base in BASES),
]
PEERS = ("onnxslim", "onnxsim", "onnxoptimizer", "onnxscript")

LEVELS = {"ort basic": "ORT_ENABLE_BASIC", "ort extended": "ORT_ENABLE_EXTENDED", "ort all": "ORT_ENABLE_ALL"}
_, _ort = fold_speed.TOOLS["onnxruntime"]
for _name, _level in LEVELS.items():
    fold_speed.TOOLS[_name] = ("import onnxruntime as o", _ort.replace("ORT_ENABLE_EXTENDED", _level))


# ---- modules ---------------------------------------------------------------------------------------------------
def plain(name: str) -> tuple[Any, Any]:
    """(module in eval mode, one image)."""
    kind, _, base = name.rpartition(":")
    model, image = build(base)
    return wrapped(model, {"lora": side_branch, "ssf": scale_shift}.get(kind)).eval(), image


def wrapped(model: Any, wrapper: Callable[[Any], Any] | None) -> Any:
    """Every layer for which ``wrapper`` has something replaced by it, in place."""
    import torch

    torch.manual_seed(1)
    for parent in list(model.modules()) if wrapper is not None else ():
        for key, child in list(parent.named_children()):
            made = None if wrapper is None else wrapper(child)
            if made is not None:
                setattr(parent, key, made)
    return model


def side_branch(layer: Any, rank: int = 8, scale: float = 0.5) -> Any:
    """``W x + scale * B A x``, as LoRA trains it; for a convolution A has its kernel and B is pointwise."""
    import torch
    from torch import nn

    class SideBranch(nn.Module):
        def __init__(self, base: Any) -> None:
            super().__init__()
            self.base = base
            if isinstance(base, nn.Linear):
                self.a = nn.Linear(base.in_features, rank, bias=False)
                self.b: nn.Module = nn.Linear(rank, base.out_features, bias=False)
            else:
                window = {"stride": base.stride, "padding": base.padding, "bias": False}
                self.a = nn.Conv2d(base.in_channels, rank, base.kernel_size, **window)
                self.b = nn.Conv2d(rank, base.out_channels, 1, bias=False)

        def forward(self, x: Any) -> Any:
            return self.base(x) + scale * self.b(self.a(x))

        def merged(self) -> Any:
            with torch.no_grad():
                self.base.weight += scale * (self.b.weight.flatten(1) @ self.a.weight.flatten(1)).view_as(
                    self.base.weight
                )
            return self.base

    dense = type(layer) is nn.Conv2d and layer.groups == 1 and layer.dilation == (1, 1)
    return SideBranch(layer) if type(layer) is nn.Linear or dense else None


def scale_shift(layer: Any) -> Any:
    """The layer's output times a scale, plus a shift, both per channel, as SSF trains them."""
    import torch
    from torch import nn

    class ScaleShift(nn.Module):
        def __init__(self, base: Any) -> None:
            super().__init__()
            self.base = base
            shape = (len(base.weight), 1, 1) if isinstance(base, nn.Conv2d | nn.BatchNorm2d) else (len(base.weight),)
            self.scale = nn.Parameter(torch.empty(shape).uniform_(0.7, 1.3))
            self.shift = nn.Parameter(torch.empty(shape).normal_(0, 0.1))

        def forward(self, x: Any) -> Any:
            return self.base(x) * self.scale + self.shift

        def merged(self) -> Any:
            with torch.no_grad():
                scale, base = self.scale.flatten(), self.base
                old = torch.zeros_like(scale) if base.bias is None else base.bias
                base.weight *= scale.view(-1, *[1] * (base.weight.ndim - 1))
                base.bias = nn.Parameter(scale * old + self.shift.flatten())
            return base

    known = isinstance(layer, nn.Linear | nn.LayerNorm | nn.Conv2d | nn.BatchNorm2d)
    known = known and isinstance(getattr(layer, "act", None), nn.Identity | None)  # timm's norms may hold a relu
    return ScaleShift(layer) if known and layer.weight is not None else None


def own_fuse(name: str, model: Any, image: Any) -> Any:
    """What the authors of the architecture or of the adapter do before inference."""
    if ":" in name:
        return wrapped(copy.deepcopy(model), lambda layer: layer.merged() if hasattr(layer, "merged") else None)
    from timm.utils import reparameterize_model

    return reparameterize_model(model)


def fx_fuse(name: str, model: Any, image: Any) -> Any:
    from torch.fx.experimental import optimization

    return optimization.fuse(model)


def fx_fold(name: str, model: Any, image: Any) -> Any:
    from foldline import passes as P

    return P.fold(model, (image,), verify=False).model.eval()


MODULES: dict[str, Callable[[str, Any, Any], Any]] = {
    "foldline fx": fx_fold,
    "torch.fx fuse": fx_fuse,
    "own fuse": own_fuse,
}
TOOLS = ("foldline", *MODULES, *PEERS, *LEVELS)


# ---- files -----------------------------------------------------------------------------------------------------
def export(model: Any, image: Any, path: Path) -> None:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (image,), dynamo=True, verbose=False, external_data=False)
    assert program is not None
    program.save(str(path))


def make(tool: str, name: str, model: Any, image: Any, source: Path, target: Path) -> str:
    """Write what ``tool`` makes of the model; returns why it could not, or nothing."""
    if tool not in MODULES:
        return str(fold_speed.once(tool, source, target).get("failed", ""))
    try:
        export(MODULES[tool](name, model, image), image, target)
    except Exception as error:  # a row of the table
        return f"{type(error).__name__}: {error}".splitlines()[0][:60].replace("|", "/")
    return ""


def sessions(files: dict[str, Path]) -> dict[str, Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return {k: ort.InferenceSession(str(f), options, providers=["CPUExecutionProvider"]) for k, f in files.items()}


def measure(files: dict[str, Path], image: Any, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """(best milliseconds, error relative to the plain export) per file; the files run in turn."""
    running = sessions(files)
    outputs: dict[str, np.ndarray] = {}
    best = dict.fromkeys(running, float("inf"))
    for _ in range(rounds + 2):
        for key, session in running.items():
            feed = {session.get_inputs()[0].name: image.numpy()}
            start = time.perf_counter()
            outputs[key] = session.run(None, feed)[0]
            best[key] = min(best[key], 1e3 * (time.perf_counter() - start))
    wanted = outputs["as exported"].astype(np.float64)
    return best, {k: float(np.abs(y - wanted).max() / np.abs(wanted).max()) for k, y in outputs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=Path("out/branches"), help="for the files; kept")
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("models", nargs="*", default=MODELS)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    known = ["onnx", "onnxruntime", "torch", "timm", *PEERS]
    print(", ".join(f"{t} {version(t)}" for t in known) + f"; Python {sys.version.split()[0]}\n")
    print("| model | made by | nodes | ms | error |\n|---|---|---|---|---|")
    for name in args.models:
        model, image = plain(name)
        source = args.folder / f"{name.replace(chr(58), chr(95))}.onnx"
        export(model, image, source)
        files, failed = {"as exported": source}, dict[str, str]()
        for tool in args.tools:
            target = args.folder / f"{name.replace(':', '_')}.{tool.replace(' ', '_')}.onnx"
            why = make(tool, name, model, image, source, target)
            if why:
                failed[tool] = why
            else:
                files[tool] = fold_speed.written(tool, target)
        best, errors = measure(files, image, args.rounds)
        for tool in ("as exported", *args.tools):
            if tool in failed:
                print(f"| {name} | {tool} | fails: {failed[tool]} | | |")
            else:
                print(f"| {name} | {tool} | {fold_speed.nodes(files[tool])} | {best[tool]:.2f} | {errors[tool]:.1e} |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
