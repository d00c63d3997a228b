"""The example's vision transformer with its trained weights, and its images."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor, nn

Images = tuple[Tensor, Tensor]


def digits_vit() -> tuple[nn.Module, Images, Images]:
    """Model in eval mode; training images and labels; test images and labels. [N, 1, 16, 16] -> [N, 10]."""
    folder = Path(__file__).resolve().parents[2] / "examples" / "pipelines"
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # models.py puts the folder of digits.py beside it
    from models import WEIGHTS, DigitsVit  # type: ignore[import-not-found]
    from digits import load_digits  # type: ignore[import-not-found]  # isort: skip
    from safetensors.torch import load_file

    model = DigitsVit()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval(), load_digits("train"), load_digits("test")
