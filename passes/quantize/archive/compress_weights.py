"""The pass: weights pruned and quantized by one transform to a size in bytes, then coded without loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from ....graph.errors import ConstraintError
from ....graph.ir import Graph, Node, Weight
from ...base import Context, Contract, Decision, Outcome, Pass
from ...calibrate import Moments, collect
from . import rans
from .container import Archive

if TYPE_CHECKING:
    from .size import Layer

SAMPLE = 1 << 16
"""Numbers of a weight that the search of its step looks at."""
HEADER = 48
"""Bytes of header per tensor assumed while the steps are searched; the file's own are counted at the end."""


class CompressWeights(Pass):
    """Joint pruning, quantization and entropy coding to a compression ratio.

    Each weight gets a step and a dead zone: ``w -> step * rint(w / step)``, zero inside the dead zone; both are learned
    for all weights together, so that the error of the layers' outputs is least while the size, a differentiable
    function of them, meets the budget ("Lossy and Lossless (L^2) Post-training Model Size Compression"). The integers
    are then coded by range ANS; the artifact is the archive (``artifact.save(path)``, ``read_archive``). Lossless from
    the integers on; the graph computes with the numbers that the archive restores.
    """

    name: ClassVar[str] = "compress_weights"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    ratio: float = Field(default=10.0, gt=1)
    """Bytes of all stored float tensors over bytes of the archive, headers counted."""
    calibration: Any = Field(default=None, exclude=True, repr=False)
    """Batches of typical inputs: errors of inputs that are large then cost more. Without any, all cost alike."""
    steps: int = Field(default=150, ge=1)
    """Steps of the search."""
    least: int = Field(default=256, ge=1)
    """Tensors with fewer numbers are stored as they are."""

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        """Compress.

        Raises:
            ConstraintError: the budget is less than what must be stored as it is.
        """
        import torch

        torch.manual_seed(ctx.seed)
        stored = [w for w in graph.weights.values() if w.dtype in ("float32", "float16", "bfloat16")]
        chosen = [w for w in stored if w.size >= self.least and len(w.shape) > 1]
        archive = Archive()
        for weight in stored:
            if weight not in chosen:
                archive.add_raw(weight.name, weight.numpy())
        whole = sum(w.numpy().nbytes for w in stored)
        budget = whole / self.ratio - archive.nbytes
        if not chosen or budget < HEADER * len(chosen):
            raise ConstraintError(
                "the budget does not hold what is stored as it is", node="ratio",
                expected=f"below {whole / archive.nbytes:.1f}",
                found=self.ratio, hint="fold norms first, or lower `least`",
            )  # fmt: skip
        power = self._input_power(graph, ctx, chosen)
        layers = {w.name: layer_of(w, power.get(w.name), ctx.seed) for w in chosen}
        learn(list(layers.values()), 8 * (budget - HEADER * len(chosen)), self.steps)
        factor, coded = self._fit(chosen, layers, archive, whole / self.ratio)
        decisions = []
        for weight in chosen:
            integers, step = coded[weight.name]
            zero = float((integers == 0).mean())
            bits = rans.entropy_bits(np.bincount((integers - integers.min()).ravel())) / weight.size
            facts = {"step": step, "zeros": zero, "bits_per_weight": bits}
            reason = f"{100 * zero:.0f} % zero, {bits:.2f} bits a weight"
            decisions.append(Decision(weight.name, "compressed", reason, facts))
        restored = archive.tensors()
        for weight in chosen:
            graph.set_weight(weight, restored[weight.name])
        predicted = predicted_bytes(archive, coded)
        details = {"float_bytes": whole, "bytes": archive.nbytes, "predicted_bytes": predicted, "step_factor": factor}
        return Outcome(decisions=decisions, details=details, artifact=archive)

    def _input_power(self, graph: Graph, ctx: Context, chosen: list[Weight]) -> dict[str, np.ndarray]:
        """Mean square of what each weight multiplies, broadcast to the weight's shape; only with calibration."""
        if self.calibration is None and ctx.calibration is None:
            return {}
        readers = {w.name: reader for w in chosen if (reader := matrix_reader(w)) is not None}
        wanted = {
            n.inputs[0].name: Moments(1 if n.op == "conv" else -1) for n in readers.values() if n.inputs[0] is not None
        }
        collect(graph, self.batches(ctx), wanted, progress=ctx.progress)
        found = {}
        for name, node in readers.items():
            assert node.inputs[0] is not None
            seen = wanted[node.inputs[0].name]
            assert seen.squares is not None
            power = seen.squares / seen.per_channel
            swapped = node.attrs.get("transposed" if node.op == "conv" else "transposed_weight", False)
            shape = next(w.shape for w in chosen if w.name == name)
            axis = 0 if swapped else 1
            if len(power) != shape[axis]:  # grouped convolutions: the mean over the groups
                power = (
                    power.reshape(-1, shape[axis]).mean(0) if len(power) % shape[axis] == 0 else np.ones(shape[axis])
                )
            found[name] = np.broadcast_to(power.reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape)
        return found

    def _fit(
        self, chosen: list[Weight], layers: dict[str, Layer], archive: Archive, budget: float
    ) -> tuple[float, dict[str, tuple[np.ndarray, float]]]:
        """Scale all steps by one factor until the file meets the budget, then fill the archive."""
        fixed = len(archive.entries)

        def tried(factor: float) -> tuple[int, dict[str, tuple[np.ndarray, float]]]:
            del archive.entries[fixed:]
            coded = {}
            for weight in chosen:
                layer = layers[weight.name]
                step = float(np.float32(math.exp(float(layer.log_step.detach())) * factor))
                integers = integers_of(weight.numpy().astype(np.float32), step, float(layer.edge().detach()))
                coded[weight.name] = integers, step
            size = predicted_bytes_of(coded, archive)
            return size, coded

        low, high = 0.05, 20.0
        for _ in range(24):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if tried(middle)[0] > budget else (low, middle)
        _, coded = tried(high)
        for weight in chosen:
            integers, step = coded[weight.name]
            archive.add_grid(weight.name, weight.numpy(), integers, np.asarray([step], np.float32), -1)
        return high, coded


def matrix_reader(weight: Weight) -> Node | None:
    """The linear node or convolution that alone multiplies with a weight."""
    uses = list(weight.value.uses) if weight.value is not None else []
    if len(uses) != 1 or uses[0][0].op not in ("linear", "conv") or uses[0][1] != 1:
        return None
    x = uses[0][0].inputs[0]
    return None if x is None or x.is_const else uses[0][0]


def layer_of(weight: Weight, power: np.ndarray | None, seed: int) -> Layer:
    """A weight with a first guess of its step (a sixth of its deviation) and the importance of its errors."""
    import torch

    from .size import Layer

    data = weight.numpy().astype(np.float32).ravel()
    cost = np.ones_like(data) if power is None else np.asarray(power, np.float32).ravel()
    total = float((cost * np.square(data)).sum(dtype=np.float64)) or 1.0
    share = 1.0
    if data.size > SAMPLE:
        picked = np.random.default_rng(seed).choice(data.size, SAMPLE, replace=False)
        share = data.size / SAMPLE
        data, cost = data[picked], cost[picked]
    log_step = torch.tensor(math.log(max(float(data.std()), 1e-12) / 3), requires_grad=True)
    dead = torch.tensor(-2.0, requires_grad=True)
    importance = torch.from_numpy(cost * np.float32(share / total))
    return Layer(torch.from_numpy(data.copy()), importance, weight.size, log_step, dead)


def learn(layers: list[Layer], budget: float, steps: int) -> None:
    """Steps and dead zones with the least summed relative error of the layers within ``budget`` bits.

    Gradient descent along the surface of equal size: bits get the price at which a change of all steps together
    neither helps nor hurts, and after every step all steps are scaled together until the size is the budget's again.
    """
    import torch

    numbers = sum(layer.count for layer in layers)
    log_steps, dead = [layer.log_step for layer in layers], [layer.dead for layer in layers]
    optimizer = torch.optim.Adam([*log_steps, *dead], lr=0.05)

    def measured() -> torch.Tensor:
        return torch.stack([layer.bits() for layer in layers]).sum()

    def rescale() -> None:
        for _ in range(8):
            with torch.no_grad():
                over = float(measured()) - budget
                if abs(over) < 5e-3 * budget:
                    return
                for t in log_steps:  # a number costs one bit less when its step doubles
                    t += max(min(math.log(2) * over / numbers, 1.0), -1.0)

    rescale()
    for i in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - i / steps) + 0.001
        every = [*log_steps, *dead]
        error = torch.stack([layer.distortion() for layer in layers]).sum()
        by_error = torch.autograd.grad(torch.log(error + 1e-12), every)
        by_size = torch.autograd.grad(torch.log(measured()), every)
        together = [float(torch.stack(list(g[: len(layers)])).sum()) for g in (by_error, by_size)]
        price = -together[0] / together[1] if together[1] < 0 else 0.0
        for t, e, b in zip(every, by_error, by_size, strict=True):
            t.grad = e + max(price, 0.0) * b
        optimizer.step()
        rescale()


def integers_of(weight: np.ndarray, step: float, edge: float) -> np.ndarray:
    """The hard transform: int32 integers of a weight."""
    scaled = weight / np.float32(step)
    found: np.ndarray = np.where(np.abs(scaled) >= np.float32(edge), np.rint(scaled), 0).astype(np.int32)
    return found


def predicted_bytes_of(coded: dict[str, tuple[np.ndarray, float]], rest: Archive) -> int:
    """Entropy of all integers, the coder's states and steps, and the header with its tables of frequencies."""
    from .container import Entry

    trial, bits = Archive(list(rest.entries)), 0.0
    for name, (integers, _) in coded.items():
        low = int(integers.min(initial=0))
        counts = np.bincount(integers.ravel() - low)
        bits += rans.entropy_bits(counts) + 32 * rans.lanes_for(integers.size) + 32
        facts = {"low": low, "steps": 1, "axis": -1, "freq": rans.frequencies(counts).tolist()}
        trial.entries.append(Entry(name, integers.shape, "float32", "grid", b"", facts))
    return trial.nbytes + math.ceil(bits / 8)


def predicted_bytes(archive: Archive, coded: dict[str, tuple[np.ndarray, float]]) -> int:
    """The prediction for a filled archive."""
    rest = Archive([e for e in archive.entries if e.name not in coded])
    return predicted_bytes_of(coded, rest)
