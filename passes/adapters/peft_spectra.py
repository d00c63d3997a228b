"""peft checkpoints with sparse or spectral updates: FourierFT, WaveFT, C3A, SHiRA, supertuning."""

from __future__ import annotations

import numpy as np

from ...graph.errors import ConstraintError
from .kinds import Array, Geometry, Options, Tensors
from .peft_kinds import method, whole


def _places(g: Geometry, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) that peft draws from a seed; its generator is torch's."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(g.out * g.inp, generator=generator)[:count].numpy()
    return drawn // g.inp, drawn % g.inp


@method("FOURIERFT", "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", "fourierft_")
def fourierft(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W + s Re(inverse DFT of a sparse spectrum), its places drawn from a seed."""
    values = t["fourierft_spectrum"]
    spectrum = np.zeros((g.out, g.inp))
    spectrum[_places(g, values.size, o["seed"])] = values
    return w + o["scale"] * np.fft.ifft2(spectrum).real


@method("WAVEFT", "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets", "waveft_")
def waveft(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W + s (inverse Haar transform of) a sparse matrix, its places drawn from a seed."""
    values = t["waveft_spectrum"]
    rows, columns = _places(g, values.size, o["seed"])
    if not o["inverse"]:
        sparse = np.zeros((g.out, g.inp))
        sparse[rows, columns] = values
        return w + o["scale"] * sparse
    if o["family"] not in ("db1", "haar"):
        raise ConstraintError("this wavelet is not known here", expected="db1 (Haar)", found=o["family"])
    height, width = g.out + g.out % 2, g.inp + g.inp % 2
    sparse = np.zeros((height, width))
    top, left = (height - g.out) // 2, (width - g.inp) // 2
    sparse[rows + top, columns + left] = values
    h, v = height // 2, width // 2
    whole_, across, down, both = sparse[:h, :v], sparse[:h, v:], sparse[h:, :v], sparse[h:, v:]
    made = np.zeros((height, width))
    made[::2, ::2] = whole_ + across + down + both
    made[::2, 1::2] = whole_ + across - down - both
    made[1::2, ::2] = whole_ - across + down - both
    made[1::2, 1::2] = whole_ - across - down + both
    return w + o["scale"] * made[top : top + g.out, left : left + g.inp] / 2


@method("C3A", "Parameter-Efficient Fine-Tuning via Circular Convolution", "c3a_")
def c3a(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W + circulant blocks / in, from one vector each [out / b, in / b, b]."""
    kernel = t["c3a_kernel"]
    m, n, b = kernel.shape
    shift = (np.arange(b)[None, :] - np.arange(b)[:, None]) % b
    return w + kernel[:, :, shift].transpose(0, 2, 1, 3).reshape(m * b, n * b) / g.inp


@method("SHIRA", "Sparse High Rank Adapters", "shira_")
def shira(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W + sparse values at stored places."""
    if "shira_indices" not in t:
        raise ConstraintError("the places of the values are not in the checkpoint", expected="shira_indices")
    new, (rows, columns) = np.array(w), whole(t, "shira_indices")
    np.add.at(new, (rows, columns), t["shira_weight"])
    return new


@method("SUPERTUNING", "Supertuning (peft)", "supertuning_")
def supertuning(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """W + sparse values at the places of the largest (or smallest) weights, and a low-rank term."""
    values = t["supertuning_values"]
    if "supertuning_indices" in t:
        places = whole(t, "supertuning_indices")
    else:
        raise ConstraintError("the places of the values are not in the checkpoint", expected="supertuning_indices")
    new = np.array(w).reshape(-1)
    np.add.at(new, places, values)
    new = new.reshape(w.shape)
    if "supertuning_lora_A.weight" in t:
        new = new + o["scale"] * t["supertuning_lora_B.weight"] @ t["supertuning_lora_A.weight"]
    return new
