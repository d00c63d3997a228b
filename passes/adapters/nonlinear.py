"""Adapters that stay in the model: nonlinear bottlenecks and prefixes. They insert and train, and refuse to merge."""

from __future__ import annotations

import numpy as np

from ...graph.errors import ConstraintError
from .kinds import AdapterKind, Start, register


def _bottleneck_start(start: Start) -> dict[str, np.ndarray]:
    """down [rank, width] uniform, up [width, rank] zero; the width is that of the layer's output."""
    width, r = start.geometry.out, int(start.options["rank"])
    return {
        "down": start.rng.uniform(-1, 1, (r, width)) * np.sqrt(3 / width),
        "down_bias": np.zeros(r),
        "up": np.zeros((width, r)),
        "up_bias": np.zeros(width),
    }


BOTTLENECK = register(
    AdapterKind(
        name="bottleneck",
        paper="Parameter-Efficient Transfer Learning for NLP",
        init=_bottleneck_start,
        function="nonlinear",
        site="output",
        insertion="sequential",
        defaults={"rank": 8, "scale": 1.0, "activation": "relu"},
        why_not="a nonlinear function of the target's output: h + s f(h W_down) W_up",
    )
)


def _parallel_start(start: Start) -> dict[str, np.ndarray]:
    """down [rank, in] uniform, up [out, rank] zero."""
    g, r = start.geometry, int(start.options["rank"])
    if g.kernel or g.groups > 1:
        raise ConstraintError("a parallel adapter needs a linear layer", expected="[out, in]", found=g.shape)
    return {
        "down": start.rng.uniform(-1, 1, (r, g.inp)) * np.sqrt(3 / g.inp),
        "down_bias": np.zeros(r),
        "up": np.zeros((g.out, r)),
        "up_bias": np.zeros(g.out),
    }


PARALLEL = register(
    AdapterKind(
        name="parallel_adapter",
        paper="Towards a Unified View of Parameter-Efficient Transfer Learning",
        init=_parallel_start,
        function="nonlinear",
        site="output",
        insertion="parallel",
        defaults={"rank": 8, "scale": 4.0, "activation": "relu"},
        why_not="a nonlinear function of the target's input: y + s f(x W_down) W_up",
    )
)


def _compacter_start(start: Start) -> dict[str, np.ndarray]:
    """A bottleneck whose two projections are sums of Kronecker products; A is shared by all layers."""
    width, r = start.geometry.out, int(start.options["rank"])
    n = int(start.options["terms"])
    if width % n or r % n:
        raise ConstraintError(
            "the Kronecker block does not divide the bottleneck",
            node="terms",
            expected=f"a divisor of {width} and {r}",
            found=n,
        )
    uniform = start.rng.uniform
    return {
        "A": start.rng.standard_normal((n, n, n)) / n,
        "down_left": uniform(-1, 1, (n, r // n, 1)),
        "down_right": uniform(-1, 1, (n, 1, width // n)) * np.sqrt(3 * n / width),
        "down_bias": np.zeros(r),
        "up_left": np.zeros((n, width // n, 1)),
        "up_right": uniform(-1, 1, (n, 1, r // n)),
        "up_bias": np.zeros(width),
    }


COMPACTER = register(
    AdapterKind(
        name="compacter",
        paper="Compacter: Efficient Low-Rank Hypercomplex Adapter Layers",
        init=_compacter_start,
        function="nonlinear",
        site="output",
        insertion="sequential",
        defaults={"rank": 8, "scale": 1.0, "terms": 4, "activation": "gelu", "share": ["A"]},
        why_not="a nonlinear function of the target's output; its projections materialise as Kronecker sums",
    )
)


def _prefix_start(start: Start) -> dict[str, np.ndarray]:
    """Keys and values [length, width] for every head; gate zero, so that the attention is what it was."""
    width, n = start.geometry.out, int(start.options["length"])
    return {
        "key": start.rng.normal(0, 0.02, (n, width)),
        "value": start.rng.normal(0, 0.02, (n, width)),
        "gate": np.zeros(1),
    }


PREFIX = register(
    AdapterKind(
        name="prefix",
        paper="Prefix-Tuning: Optimizing Continuous Prompts for Generation (in the form of the unified view)",
        init=_prefix_start,
        function="nonlinear",
        site="attention",
        composition="gate",
        defaults={"length": 8, "heads": None},
        why_not="a softmax over learned keys: (1 - l) h + l softmax(x W_q P_k^T) P_v",
    )
)
