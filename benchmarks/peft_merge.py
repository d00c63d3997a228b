"""Merging peft checkpoints: rounding error against float64, time and peak memory, peft's own merge beside foldline's.

    python benchmarks/peft_merge.py [--width 1024] [--layers 4] [--dtypes float32 bfloat16] [--only LORA ...]

Each row is one PEFT method on a stack of square linear layers, every trained tensor moved away from its start by
seeded noise. peft: ``PeftModel.from_pretrained`` and ``merge_and_unload``; foldline: ``merge_adapter(base, folder)``.
Both start from the base model in memory and the directory on disk, each in a forked process of its own.

- max error: largest |merged - reference|, relative to the weight's largest entry.
- not nearest: share of the entries that are not the representable number nearest to the reference.
- reference: peft's code run in float64; for methods marked * peft computes in float32 whatever the dtype, so there the
  reference is the formula in float64.
- CPU seconds and the growth of resident memory at its peak over the time before the merge; one thread.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import importlib.util
import os
import pickle
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
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


def alone(work: Callable[[], nn.Module]) -> tuple[dict[str, np.ndarray], float, float]:
    """(weights, CPU seconds, MiB) of a merge in a forked process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # or memory that was freed before would be reused, and not be counted
        before = _resident("VmRSS")  # a forked process starts with this as its peak
        start = time.process_time()
        model = work()
        seconds = time.process_time() - start
        grown = _resident("VmHWM") - before
        weights = {n: to_numpy(p) for n, p in model.named_parameters()}
        with os.fdopen(write, "wb") as pipe:
            pickle.dump((weights, seconds, grown), pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        result = pickle.load(pipe)
    os.waitpid(child, 0)
    return result


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
    chosen = parser.parse_args()
    define_torchvision_operators()
    if importlib.util.find_spec("peft") is None:
        raise SystemExit("peft is not installed")
    import peft

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
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
            torch.manual_seed(0)
            base = Stack(chosen.width, chosen.layers).to(getattr(torch, dtype)).eval()
            model = trained(base, kind, options)
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                true = reference(model, base, folder, title.endswith("*"))
                del model

                def theirs(base: nn.Module = base, folder: str = folder) -> nn.Module:
                    return peft.PeftModel.from_pretrained(base, folder).merge_and_unload()

                def ours(base: nn.Module = base, folder: str = folder) -> nn.Module:
                    merged: nn.Module = merge_adapter(base, folder).model
                    return merged

                (a, s_a, m_a), (b, s_b, m_b) = alone(theirs), alone(ours)
            (worst_a, wrong_a), (worst_b, wrong_b) = judged(a, true), judged(b, true)
            print(
                f"| {title} | {dtype} | {worst_a:.1e} | {worst_b:.1e} | {wrong_a:.2%} | {wrong_b:.2%} "
                f"| {s_a:.2f} | {s_b:.2f} | {m_a:.0f} | {m_b:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
