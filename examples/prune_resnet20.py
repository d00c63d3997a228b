"""Prune a ResNet-20 to half its MACs and fine-tune it in a plain PyTorch loop.

python examples/prune_resnet20.py --data FOLDER --epochs 4 --out pruned     # CIFAR-10, or FOLDLINE_DATA=FOLDER
python examples/prune_resnet20.py --epochs 4                                # scikit-learn's digits, trained first

FOLDER holds ``cifar10-jpeg.tar.xz`` (``train/<class>/*.jpg``, ``test/<class>/*.jpg``) and ``resnet20-jpeg.pt`` (a state
dict). Without it the network is trained on handwritten digits scaled to 32x32 first, which takes some minutes.
"""

from __future__ import annotations

import argparse
import io
import os
import tarfile
from pathlib import Path
from typing import TypeAlias

import foldline as fl
import numpy as np
import torch
import torch.nn.functional as F
from foldline import passes as P
from torch import Tensor, nn

ARCHIVE, WEIGHTS = "cifar10-jpeg.tar.xz", "resnet20-jpeg.pt"
BATCH = 64
Split: TypeAlias = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut that is subsampled and zero-padded where the shape changes."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.pad = (width - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(x + y)


class ResNet20(nn.Module):
    """ResNet-20 for 32x32 images (He et al., "Deep Residual Learning", section 4.2): [N, 3, 32, 32] -> [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


# ---- data ------------------------------------------------------------------------------------------------------
def cifar10(archive: Path, images: int | None) -> tuple[Split, Split]:
    """Training and test images, the classes in turn; ``images`` per split at most."""
    from PIL import Image

    found: dict[str, dict[str, list[np.ndarray]]] = {"train": {}, "test": {}}
    each = None if images is None else -(-images // 10)
    with tarfile.open(archive, "r|xz") as tar:
        for member in tar:
            split, _, rest = member.name.partition("/")
            kind = rest.partition("/")[0]
            if not member.isfile() or len(found[split].setdefault(kind, [])) == each:
                continue
            stream = tar.extractfile(member)
            assert stream is not None
            with Image.open(io.BytesIO(stream.read())) as picture:
                found[split][kind].append(np.asarray(picture.convert("RGB")))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def tensors(split: str) -> Split:
        stacked = np.stack([np.stack(found[split][kind]) for kind in sorted(found[split])], axis=1)
        labels = torch.arange(stacked.shape[1]).repeat(stacked.shape[0])
        pixels = torch.from_numpy(stacked.reshape(-1, *stacked.shape[2:])).float() / 255
        return ((pixels - mean) / std).permute(0, 3, 1, 2).contiguous(), labels

    return tensors("train"), tensors("test")


def digits(images: int | None) -> tuple[Split, Split]:
    """scikit-learn's 8x8 digits as 32x32 images of three equal channels; the last 360 are the test split."""
    from sklearn.datasets import load_digits

    data, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(data.reshape(-1, 1, 8, 8)).float() / 8 - 1
    pixels = F.interpolate(small, size=32, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    target = torch.from_numpy(labels).long()
    return (pixels[:-360][:images], target[:-360][:images]), (pixels[-360:][:images], target[-360:][:images])


# ---- plain PyTorch ---------------------------------------------------------------------------------------------
def augmented(pixels: Tensor, generator: torch.Generator, flip: bool) -> Tensor:
    """Shifted by up to four pixels; half of the images mirrored, where that keeps their meaning."""
    dx, dy = torch.randint(-4, 5, (2,), generator=generator).tolist()
    pixels = torch.roll(F.pad(pixels, (4, 4, 4, 4)), (dy, dx), (2, 3))[:, :, 4:-4, 4:-4]
    mirrored = (torch.rand(len(pixels), generator=generator) < 0.5) & flip
    return torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)


def train(model: nn.Module, data: Split, epochs: int, rate: float, flip: bool, seed: int = 0) -> None:
    """SGD with momentum and a one-cycle schedule: nothing in it knows that the model was pruned."""
    pixels, labels = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batches = -(-len(pixels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * batches)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(pixels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(augmented(pixels[batch], generator, flip)), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Split) -> float:
    """Share of images whose largest output is their label."""
    pixels, labels = data
    right = sum(int((model(p).argmax(1) == t).sum()) for p, t in zip(pixels.split(500), labels.split(500), strict=True))
    return right / len(pixels)


# ---- the example -----------------------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run it; returns the accuracies of the base, the pruned and the fine-tuned model and the share of MACs left."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("FOLDLINE_DATA"), help="folder of CIFAR-10")
    parser.add_argument("--images", type=int, help="images per split at most")
    parser.add_argument("--epochs", type=int, default=4, help="of fine-tuning")
    parser.add_argument("--macs", type=float, default=0.5, help="share of the multiply-accumulates that is to remain")
    parser.add_argument("--out", type=Path, help="folder for the pruned model")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    model = ResNet20()
    if options.data is not None:
        training, test = cifar10(Path(options.data) / ARCHIVE, options.images)
        model.load_state_dict(torch.load(Path(options.data) / WEIGHTS, map_location="cpu", weights_only=True))
        model.eval()
    else:
        training, test = digits(options.images)
        train(model, training, epochs=6, rate=0.1, flip=False)
    base = accuracy(model, test)

    result = P.prune(model, (test[0][:2],), target=fl.macs(options.macs), scope="isomorphic")
    small = result.model
    cut = accuracy(small, test)
    train(small, training, options.epochs, rate=0.02, flip=options.data is not None)
    tuned = accuracy(small, test)

    before, after = result.report.before, result.report.after
    print(f"MACs {before.macs:,} -> {after.macs:,}, parameters {before.parameters:,} -> {after.parameters:,}")
    print(f"accuracy {base:.2%}, pruned {cut:.2%}, after {options.epochs} epochs {tuned:.2%}")
    if options.out is not None:
        result.save(options.out)
        # The example inputs are for blocks whose two zero paddings came to differ, which ResNet20's code cannot say.
        again = fl.load_pruned(ResNet20(), options.out, (test[0][:2],)).eval()
        assert torch.equal(again(test[0][:4]), small(test[0][:4]))
        print(f"saved in {options.out}; fl.load_pruned(ResNet20(), {str(options.out)!r}, (x,)) gives it back")
    return {"base": base, "pruned": cut, "tuned": tuned, "macs": after.macs / before.macs}


if __name__ == "__main__":
    main()
