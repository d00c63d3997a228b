"""One power exponent for a whole model, chosen by what the quantized model computes on calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np

from ...graph.execute import batches_of, run_graph
from ...graph.ir import Graph
from .formats.power import PowerExponent
from .weight_sites import WeightSite

CANDIDATES = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)


def model_exponent(
    graph: Graph, sites: Sequence[WeightSite], form: PowerExponent, batches: Iterable[Any], count: int = 2
) -> tuple[float, dict[float, float]]:
    """The exponent under which the outputs are nearest to the float ones, all weights quantized with the same.

    "PowerQuant: Automorphism Search for Non-Uniform Quantization" and NUPES want one exponent where products of codes
    are to be computed as integers; the error of single weights says little about it, that of the outputs does.

    Args:
        form: bits and block; its exponent is not read.
        count: batches used.

    Returns:
        The exponent and, for each tried, the squared error of the outputs relative to their power.
    """
    inputs = list(islice(batches_of(graph, batches), count))
    wanted = [run_graph(graph, one)[0] for one in inputs]
    power = sum(float(np.square(y, dtype=np.float64).sum()) for ys in wanted for y in ys) or 1.0
    trial, errors = graph.clone(), {}
    floats = {site.name: site.weight.numpy() for site in sites}
    for exponent in CANDIDATES:
        fixed = PowerExponent(form.bits, form.block, exponent)
        for site in sites:
            original = floats[site.name]
            decoded = fixed.fit(original.astype(np.float32), site.axis).decode()
            trial.set_weight(trial.weight(site.name), decoded.astype(original.dtype))
        off = 0.0
        for one, ys in zip(inputs, wanted, strict=True):
            found, _ = run_graph(trial, one)
            off += sum(float(np.square(a - b, dtype=np.float64).sum()) for a, b in zip(found, ys, strict=True))
        errors[exponent] = off / power
    return min(errors, key=lambda a: errors[a]), errors
