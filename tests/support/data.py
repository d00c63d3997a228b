"""CIFAR-10 images and trained ResNets for tests and benchmarks: found, decoded, or a skip with the reason.

The files are no part of the repository. ``FOLDLINE_DATA`` names their folder; without it ``../shared/data`` beside
the checkout is tried. Images come as float32 [N, 3, 32, 32], RGB / 255 normalised by MEAN and STD; labels as int64.
"""

from __future__ import annotations

import functools
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from .resnet_cifar import ResNetCifar, resnet20, resnet56

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
ARCHIVE = "cifar10-jpeg.tar.xz"
PER_CLASS = {"train": 5000, "test": 1000}


def find_data() -> Path | None:
    """The data folder, or None where there is none."""
    named = os.environ.get("FOLDLINE_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2].parent / "shared" / "data"
    return folder if (folder / ARCHIVE).is_file() else None


def data_dir() -> Path:
    """The data folder; skips the test, with the reason, where there is none."""
    folder = find_data()
    if folder is None:
        pytest.skip(f"{ARCHIVE} not found: set FOLDLINE_DATA to the folder that holds it")
    return folder


def cifar10(split: str = "test", count: int | None = None, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """``count`` images per split (all without it), the classes taken in turn: (images, labels).

    Image i has class i % 10, so that any prefix is balanced; the same arguments give the same tensors.
    """
    total = 10 * PER_CLASS[split]
    stop = total if count is None else min(offset + count, total)
    images, labels = _decoded(data_dir() / ARCHIVE, split, -(-stop // 10))
    pixels = torch.from_numpy(images[offset:stop]).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    return ((pixels - mean) / std).contiguous(), torch.from_numpy(labels[offset:stop])


@functools.lru_cache(maxsize=4)
def _decoded(archive: Path, split: str, per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [10 * per_class, 32, 32, 3] and labels, classes interleaved."""
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    by_class: dict[str, list[np.ndarray]] = {}
    with tarfile.open(archive, "r|xz") as tar:
        for member in tar:
            parts = member.name.split("/")
            if not member.isfile() or parts[0] != split or len(by_class.get(parts[1], ())) >= per_class:
                continue
            stream = tar.extractfile(member)
            assert stream is not None
            with image.open(io.BytesIO(stream.read())) as picture:
                by_class.setdefault(parts[1], []).append(np.asarray(picture.convert("RGB")))
    stacked = np.stack([np.stack(by_class[name]) for name in sorted(by_class)], axis=1)
    labels = np.tile(np.arange(stacked.shape[1], dtype=np.int64), stacked.shape[0])
    return stacked.reshape(-1, *stacked.shape[2:]), labels


def trained_resnet(depth: int = 20, *, jpeg: bool = True) -> ResNetCifar:
    """A trained ResNet-20 or -56 in eval mode.

    ``jpeg``: fine-tuned on the JPEG images (88.06 % and 90.03 % on their test split); False: the published weights
    (81.03 % and 83.20 % on the JPEG images).
    """
    model = {20: resnet20, 56: resnet56}[depth]()
    if jpeg:
        state = torch.load(data_dir() / f"resnet{depth}-jpeg.pt", map_location="cpu", weights_only=True)
    else:
        name = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}[depth]
        loaded = torch.load(data_dir() / name, map_location="cpu", weights_only=False)["state_dict"]
        state = {key.removeprefix("module."): value for key, value in loaded.items()}
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, batch: int = 500) -> float:
    """Share of images whose largest output is their label."""
    right = 0
    for i in range(0, len(images), batch):
        right += int((model(images[i : i + batch]).argmax(1) == labels[i : i + batch]).sum())
    return right / len(images)
