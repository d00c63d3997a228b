"""Merging peft checkpoints: rounding error against float64, time and peak memory, peft's own merge beside foldline's.

    python benchmarks/peft_merge.py [--width 1024] [--layers 4] [--dtypes float32 bfloat16] [--only LORA ...]

Each row is one PEFT method on a stack of square linear layers, every trained tensor moved away from its start by
seeded noise. peft: ``PeftModel.from_pretrained`` and ``merge_and_unload``; foldline: ``merge_adapter(base, folder)``.
Both start from the base model in memory and the directory on disk, each in a process of its own.

- max error: largest |merged - reference|, relative to the weight's largest entry.
- not nearest: share of the entries that are not the representable number nearest to the reference.
- reference: peft's code run in float64; for methods marked * peft computes in float32 whatever the dtype, so there the
  reference is the formula in float64.
- CPU seconds and the growth of resident memory at its peak over the time before the merge; one thread.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
import torch
from foldline.graph.fx.tensors import to_numpy
from foldline.passes.adapters.adapter import cast_once, merged_weight
from foldline.passes.adapters.merge import merge_adapter
from foldline.passes.adapters.peft import load_peft
from support.timm_models import define_torchvision_operators
from torch import nn

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LORA", {"r": 16, "lora_alpha": 32}),
    "LoRA, rank-stabilised": ("LORA", {"r": 16, "lora_alpha": 32, "use_rslora": True}),
    "DoRA": ("LORA", {"r": 16, "lora_alpha": 32, "use_dora": True}),
    "AdaLoRA": ("ADALORA", {"init_r": 16, "total_step": 10}),
    "IA3": ("IA3", {"feedforward_modules": ["layers.1"]}),
    "Bone (MiSS bat)": ("MISS", {"r": 64, "init_weights": "bat"}),
    "MiSS": ("MISS", {"r": 64}),
    "OFT": ("OFT", {"oft_block_size": 32}),
    "OFT, Cayley": ("OFT", {"oft_block_size": 32, "use_cayley_neumann": False}),
    "BOFT": ("BOFT", {"boft_block_size": 32}),
    "LoHa": ("LOHA", {"r": 16}),
    "LoKr": ("LOKR", {"r": 16}),
    "VeRA": ("VERA", {"r": 64}),
    "FourierFT *": ("FOURIERFT", {"n_frequency": 1000}),
    "HRA": ("HRA", {"r": 16}),
    "VB-LoRA": ("VBLORA", {"vector_length": 64, "num_vectors": 64, "r": 8}),
    "RandLoRA": ("RANDLORA", {"r": 32}),
    "HiRA": ("HIRA", {"r": 16}),
    "RoAd": ("ROAD", {"group_size": 64}),
    "GraLoRA": ("GRALORA", {"r": 32}),
    "DeLoRA": ("DELORA", {"r": 16}),
    "C3A *": ("C3A", {"block_size": 64}),
    "WaveFT": ("WAVEFT", {"n_frequency": 1000}),
}
NAMES = ("float32", "bfloat16", "float16")


class Stack(nn.Module):
    """Square linear layers."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.config = {"model_type": "custom"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def trained(base: nn.Module, kind: str, options: dict[str, Any]) -> Any:
    """The base wrapped by peft, its trained tensors moved by noise."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    targets = [f"layers.{i}" for i in range(len(base.layers))]  # type: ignore[arg-type]
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](target_modules=targets, **options)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "ranknum" not in name:
                p.add_((torch.randn(p.shape, generator=generator) * 0.02).to(p.dtype))
    return model


def reference(model: Any, base: nn.Module, folder: str, marked: bool) -> dict[str, np.ndarray]:
    """The merged weights in float64."""
    if not marked:
        merged = copy.deepcopy(model).double().merge_and_unload()
        return {n: p.detach().numpy() for n, p in merged.named_parameters()}
    found = {n: to_numpy(p).astype(np.float64) for n, p in base.named_parameters()}
    for target, entries in load_peft(folder).bind(base).targets().items():
        for entry in entries:
            found[target] = np.asarray(merged_weight(found[target], None, entry)[0])
    return found


def alone(who: str, folder: str, chosen: argparse.Namespace, dtype: str) -> tuple[dict[str, np.ndarray], float, float]:
    """(weights, CPU seconds, MiB) of a merge in a process of its own."""
    result = Path(folder) / f"{who}.pickle"
    options = ["--width", str(chosen.width), "--layers", str(chosen.layers), "--dtypes", dtype]
    subprocess.run([sys.executable, __file__, *options, "--one", who, folder], check=True)
    with result.open("rb") as file:
        found: tuple[dict[str, np.ndarray], float, float] = pickle.load(file)
    return found


def one(who: str, folder: str, chosen: argparse.Namespace) -> None:
    """What such a process does."""
    import peft

    def merge(base: nn.Module) -> nn.Module:
        if who == "peft":
            return peft.PeftModel.from_pretrained(base, folder).merge_and_unload()
        merged: nn.Module = merge_adapter(base, folder).model
        return merged

    base = stack(chosen.width, chosen.layers, chosen.dtypes[0])
    torch.ones(2, 2) @ torch.ones(2, 2)
    before, start = _resident("VmRSS"), time.process_time()
    model = merge(base)
    seconds, grown = time.process_time() - start, _resident("VmHWM") - before
    weights = {n: to_numpy(p) for n, p in model.named_parameters()}
    (Path(folder) / f"{who}.pickle").write_bytes(pickle.dumps((weights, seconds, grown)))


def stack(width: int, layers: int, dtype: str) -> Stack:
    """The seeded base."""
    torch.manual_seed(0)
    return Stack(width, layers).to(getattr(torch, dtype)).eval()


def _resident(field: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def judged(weights: dict[str, np.ndarray], true: dict[str, np.ndarray]) -> tuple[float, float]:
    """(largest error, share of entries that are not the nearest representable number)."""
    worst, wrong, count = 0.0, 0, 0
    for name, want in true.items():
        got = weights[name]
        worst = max(worst, float(np.abs(got.astype(np.float64) - want).max() / np.abs(want).max()))
        nearest = cast_once(want, got.dtype)
        wrong, count = wrong + int((got != nearest).sum()), count + got.size
    return worst, wrong / count


def versions() -> str:
    import peft

    found = {"peft": peft.__version__, "torch": torch.__version__, "numpy": np.__version__}
    return ", ".join(f"{k} {v}" for k, v in {**found, "python": platform.python_version()}.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=NAMES)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--one", nargs=2, metavar=("WHO", "FOLDER"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    define_torchvision_operators()
    if importlib.util.find_spec("peft") is None:
        raise SystemExit("peft is not installed")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if chosen.one:
        one(*chosen.one, chosen)
        return
    print(f"{versions()}; {chosen.layers} layers of {chosen.width} x {chosen.width}\n")
    print(
        "| method | dtype | max error peft | foldline | not nearest peft | foldline "
        "| s peft | foldline | MiB peft | foldline |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for title, (kind, options) in METHODS.items():
        if chosen.only and kind not in chosen.only:
            continue
        for dtype in chosen.dtypes:
            base = stack(chosen.width, chosen.layers, dtype)
            model = trained(base, kind, options)
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                true = reference(model, base, folder, title.endswith("*"))
                del model

                (a, s_a, m_a), (b, s_b, m_b) = (alone(who, folder, chosen, dtype) for who in ("peft", "foldline"))
            (worst_a, wrong_a), (worst_b, wrong_b) = judged(a, true), judged(b, true)
            print(
                f"| {title} | {dtype} | {worst_a:.1e} | {worst_b:.1e} | {wrong_a:.2%} | {wrong_b:.2%} "
                f"| {s_a:.2f} | {s_b:.2f} | {m_a:.0f} | {m_b:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
