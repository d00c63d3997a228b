"""Fine-tuning of several CIFAR networks in lockstep: the same batches and schedule for all, CUDA graphs on a GPU.

Needs torch, numpy and pillow only. All images are one uint8 tensor on the device; flip and crop are one gather per
epoch. On a GPU each network's step (forward, backward, update) is captured once as a CUDA graph and replayed on a
stream of its own: these networks are bound by launches, not by arithmetic.
"""

from __future__ import annotations

import io
import math
import tarfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ARCHIVE = "cifar10-jpeg.tar.xz"
TEMPERATURE = 4.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Budget:
    """What every network gets: SGD with Nesterov momentum, linear warm-up and cosine, no choice by test accuracy."""

    epochs: float
    batch: int = 128
    rate: float = 0.05
    momentum: float = 0.9
    decay: float = 5e-4
    clip: float = 1.0
    warm: float = 0.1
    smoothing: float = 0.0
    distil: float = 0.0
    """Weight of the teacher's soft answers (the unpruned base, temperature 4) beside the labels."""

    def shape_at(self, share: float) -> float:
        """The schedule, 1 at its peak: each network multiplies it by its own rate."""
        if share < self.warm:
            return max(share, 1e-3) / self.warm
        return 0.5 * (1 + math.cos(math.pi * (share - self.warm) / (1 - self.warm)))


def images(archive: Path, split: str, per_class: int | None = None, cache: Path | None = None) -> tuple[Any, Any]:
    """uint8 [N, 32, 32, 3] and int64 labels, the classes in turn; decoded once into ``cache`` where one is given."""
    from PIL import Image

    count = per_class or {"train": 5000, "test": 1000}[split]
    stored = None if cache is None else cache / f"cifar10-{split}-{count}.npz"
    if stored is not None and stored.is_file():
        with np.load(stored) as found:
            return torch.from_numpy(found["images"]), torch.from_numpy(found["labels"])
    by_class: dict[str, list[np.ndarray]] = {}
    with tarfile.open(archive, "r|xz") as tar:
        for member in tar:
            parts = member.name.split("/")
            if not member.isfile() or parts[0] != split or len(by_class.get(parts[1], ())) >= count:
                continue
            stream = tar.extractfile(member)
            assert stream is not None
            with Image.open(io.BytesIO(stream.read())) as picture:
                by_class.setdefault(parts[1], []).append(np.asarray(picture.convert("RGB")))
    pixels = np.stack([np.stack(by_class[name]) for name in sorted(by_class)], axis=1).reshape(-1, 32, 32, 3)
    labels = np.tile(np.arange(10, dtype=np.int64), count)
    if stored is not None:
        stored.parent.mkdir(parents=True, exist_ok=True)
        np.savez(stored.with_suffix(".part.npz"), images=pixels, labels=labels)
        stored.with_suffix(".part.npz").replace(stored)
    return torch.from_numpy(pixels), torch.from_numpy(labels)


@cache
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation on the device: made once, since a CUDA graph cannot capture copies from the host."""
    return torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 32, 32, 3] to float32 [N, 3, 32, 32] (a view in channels-last order), by MEAN and STD."""
    mean, std = _statistics(pixels.device)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


class Epochs:
    """Shuffled, flipped and cropped images; the choices come from a CPU generator: the same on every device."""

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor, batch: int, seed: int) -> None:
        self.labels, self.batch = labels, batch
        self.padded = F.pad(pixels, (0, 0, 4, 4, 4, 4))
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = len(pixels) // batch

    def epoch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One epoch's images, uint8 [steps, batch, 32, 32, 3], and labels [steps, batch]."""
        device, n = self.padded.device, self.steps * self.batch
        order = torch.randperm(len(self.padded), generator=self.generator)[:n].to(device)
        top, left = (torch.randint(0, 9, (n, 1), generator=self.generator).to(device) for _ in range(2))
        flip = torch.randint(0, 2, (n, 1), generator=self.generator).to(device)
        at = torch.arange(32, device=device)
        rows, columns = top + at, left + torch.where(flip > 0, 31 - at, at)
        pixels = self.padded[order[:, None, None], rows[:, :, None], columns[:, None, :]]
        return pixels.view(self.steps, self.batch, 32, 32, 3), self.labels[order].view(self.steps, self.batch)


class Trainee:
    """One network in training: eager on a CPU, a replayed CUDA graph on a GPU. ``peak``: its own rate, else the
    budget's."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        budget: Budget,
        device: str,
        half: bool,
        nhwc: bool,
        peak: float | None = None,
    ) -> None:
        self.peak = budget.rate if peak is None else peak
        layout = torch.channels_last if nhwc else torch.contiguous_format
        self.name, self.budget, self.half, self.layout, self.device = name, budget, half, layout, device
        self.model = model.to(device).to(memory_format=layout)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.momenta = [torch.zeros_like(p) for p in self.parameters]
        self.rate = torch.zeros((), device=device)
        self.pixels = torch.zeros(budget.batch, 32, 32, 3, dtype=torch.uint8, device=device)
        self.labels = torch.zeros(budget.batch, dtype=torch.int64, device=device)
        self.taught = torch.zeros(budget.batch, 10, device=device)
        self.loss = torch.zeros((), device=device)
        self.graph: Any = None
        self.stream = torch.cuda.Stream() if device == "cuda" else None

    def _compute(self) -> None:
        """One step on ``pixels`` and ``labels``: the update of torch.optim.SGD(nesterov=True), capturable."""
        b = self.budget
        x = normalized(self.pixels).contiguous(memory_format=self.layout)
        with torch.autocast(self.device, torch.bfloat16, cache_enabled=False) if self.half else nullcontext():
            out = self.model(x)
        loss = F.cross_entropy(out.float(), self.labels, label_smoothing=b.smoothing)
        if b.distil:
            wanted = F.log_softmax(self.taught / TEMPERATURE, 1)
            soft = F.kl_div(F.log_softmax(out.float() / TEMPERATURE, 1), wanted, reduction="batchmean", log_target=True)
            loss = (1 - b.distil) * loss + b.distil * TEMPERATURE**2 * soft
        with torch.no_grad():
            grads = list(torch.autograd.grad(loss, self.parameters))
            if b.clip:
                norm = torch.stack(torch._foreach_norm(grads)).norm()
                torch._foreach_mul_(grads, (b.clip / (norm + 1e-6)).clamp(max=1))
            torch._foreach_add_(grads, self.parameters, alpha=b.decay)
            torch._foreach_mul_(self.momenta, b.momentum)
            torch._foreach_add_(self.momenta, grads)
            torch._foreach_add_(grads, self.momenta, alpha=b.momentum)
            torch._foreach_mul_(grads, self.rate)
            torch._foreach_sub_(self.parameters, grads)
            self.loss.copy_(loss)

    def capture(self, say: Say) -> None:
        """Record the step as a CUDA graph; weights and statistics are put back afterwards."""
        saved = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.model.train()
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                self._compute()
        torch.cuda.synchronize()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                self._compute()
            self.graph = graph
        except RuntimeError as error:
            torch.cuda.synchronize()
            say(f"{self.name}: no CUDA graph, eager instead: {str(error).splitlines()[0]}")
        self.model.load_state_dict(saved)
        for m in self.momenta:
            m.zero_()
        torch.cuda.synchronize()

    def step(
        self, pixels: torch.Tensor, labels: torch.Tensor, shape: torch.Tensor, taught: torch.Tensor | None = None
    ) -> None:
        """One batch at ``shape`` of the peak rate; on a GPU it is only queued on this network's stream."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            self.pixels.copy_(pixels)
            self.labels.copy_(labels)
            self.rate.copy_(shape * self.peak)
            if taught is not None:
                self.taught.copy_(taught)
            if self.graph is not None:
                self.graph.replay()
            else:
                self._compute()

    @torch.no_grad()
    def answers(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits of a batch in eval mode, [N, 10] float32: what a teacher says."""
        with torch.autocast(self.device, torch.bfloat16, cache_enabled=False) if self.half else nullcontext():
            return self.model.eval()(normalized(pixels).contiguous(memory_format=self.layout)).float()

    @torch.no_grad()
    def accuracy(self, pixels: torch.Tensor, labels: torch.Tensor, batch: int = 1000) -> float:
        """Share of right answers in eval mode, float32."""
        training = self.model.training
        self.model.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        for x, y in zip(pixels.split(batch), labels.split(batch), strict=True):
            right += (self.model(normalized(x).contiguous(memory_format=self.layout)).argmax(1) == y).sum()
        self.model.train(training)
        return int(right) / len(labels)


def train(
    trainees: list[Trainee],
    data: dict[str, tuple[torch.Tensor, torch.Tensor]],
    budget: Budget,
    seed: int,
    minutes: float,
    say: Say,
    agree: Callable[[int], int] = lambda epochs: epochs,
    teacher: Trainee | None = None,
) -> tuple[float, dict[str, list[float]]]:
    """Train all for the same epochs; fewer than asked where the time would not do, planned before the first.

    ``agree`` makes several processes settle on one number of epochs; where not even one fits, or the epochs asked are
    no whole number (0.3), it is that share of one epoch's steps. Returns that number and each network's test accuracy
    after every fifth of the epochs (the last entry counts; none is chosen).
    """
    started = time.monotonic()
    source = Epochs(*data["train"], budget.batch, seed)
    cuda = trainees[0].device == "cuda"
    for t in trainees:
        t.model.train()
        if cuda:
            t.capture(say)
    affordable = budget.epochs
    if math.isfinite(minutes):
        affordable = _affordable(trainees, source, budget, started, minutes, say, teacher)
    epochs = agree(int(affordable)) if affordable >= 1 else 1
    steps = source.steps if affordable >= 1 else max(int(affordable * source.steps), 1)
    total, curves = epochs * steps, {t.name: [] for t in trainees}  # type: ignore[var-annotated]
    shapes = torch.tensor([budget.shape_at(i / total) for i in range(total)], device=trainees[0].device)
    marks = {max(round(epochs * k / 5), 1) for k in range(1, 6)}
    for epoch in range(epochs):
        pixels, labels = source.epoch()
        for i in range(steps):
            taught = None if teacher is None else teacher.answers(pixels[i])
            for t in trainees:
                t.step(pixels[i], labels[i], shapes[epoch * steps + i], taught)
            if not cuda and (i + 1) % 50 == 0:
                losses = " ".join(f"{t.loss.item():.2f}" for t in trainees)
                say(f"step {i + 1}/{steps} {time.monotonic() - started:.0f} s loss {losses}")
        if cuda:
            torch.cuda.synchronize()
        if epoch + 1 in marks:
            for t in trainees:
                curves[t.name].append(t.accuracy(*data["test"]))
        losses = " ".join(f"{t.loss.item():.2f}" for t in trainees)
        now = " ".join(f"{100 * c[-1]:.2f}" for c in curves.values() if c) if epoch + 1 in marks else ""
        say(f"epoch {epoch + 1}/{epochs} {time.monotonic() - started:.0f} s loss {losses} {now and 'test ' + now}")
    return epochs * steps / source.steps, curves


def _affordable(
    ts: list[Trainee], source: Epochs, b: Budget, started: float, minutes: float, say: Say, teacher: Trainee | None
) -> float:
    """Epochs that fit into ``minutes`` (below 1 a share), from timed steps on blank images with rate 0 and everything
    put back."""
    saved = [({k: v.clone() for k, v in t.model.state_dict().items()}, [m.clone() for m in t.momenta]) for t in ts]
    blank = torch.zeros_like(ts[0].pixels), torch.zeros_like(ts[0].labels), torch.zeros_like(ts[0].rate)
    count = 50 if ts[0].device == "cuda" else 2
    begin = 0.0
    for i in range(count + 3):
        if i == 3:
            _wait(ts)
            begin = time.monotonic()
        if teacher is not None:
            teacher.answers(blank[0])
        for t in ts:
            t.step(*blank)
    _wait(ts)
    each = (time.monotonic() - begin) / count
    for t, (state, momenta) in zip(ts, saved, strict=True):
        t.model.load_state_dict(state)
        for m, old in zip(t.momenta, momenta, strict=True):
            m.copy_(old)
    left = minutes * 60 - (time.monotonic() - started)
    fits = left / (each * source.steps * 1.1 + 0.05)
    epoch = each * source.steps
    say(f"{1000 * each:.2f} ms a step for {len(ts)} networks, {epoch:.1f} s an epoch: {fits:.2f} epochs fit")
    chosen = min(b.epochs, fits)
    return float(int(chosen)) if chosen >= 1 else chosen


def fastest(build: Callable[[bool, bool], list[Trainee]], say: Say) -> tuple[bool, bool]:
    """(bfloat16, channels-last) under which the networks of ``build`` step fastest on this GPU: four are timed."""
    times = {}
    for half, nhwc in ((False, False), (False, True), (True, False), (True, True)):
        trainees = build(half, nhwc)
        for t in trainees:
            t.model.train()
            t.capture(say)
        blank = torch.zeros_like(trainees[0].pixels), torch.zeros_like(trainees[0].labels)
        for i in range(25):
            if i == 5:
                _wait(trainees)
                begin = time.monotonic()
            for t in trainees:
                t.step(*blank, t.rate)
        _wait(trainees)
        times[half, nhwc] = (time.monotonic() - begin) / 20
        say(f"bfloat16 {half}, channels-last {nhwc}: {1000 * times[half, nhwc]:.2f} ms a step")
        del trainees
        torch.cuda.empty_cache()
    return min(times, key=lambda k: times[k])


def _wait(trainees: list[Trainee]) -> None:
    if trainees[0].device == "cuda":
        torch.cuda.synchronize()
