"""Train the demo's network from scratch: ``python examples/digits/train.py``; the result is committed."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from digits import DigitsCnn, accuracy, fit
from safetensors.torch import save_file

CHECKPOINT = Path(__file__).with_name("digits_cnn.safetensors")


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.perf_counter()
    model = DigitsCnn()
    fit(model.train(), epochs=12, rate=0.1)
    found = accuracy(model)
    print(f"test accuracy {100 * found:.2f} % after {time.perf_counter() - start:.0f} s")
    if found < 0.975:
        raise SystemExit("below 97.5 %: not saved")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, CHECKPOINT)
    print(f"wrote {CHECKPOINT.name}, {CHECKPOINT.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
