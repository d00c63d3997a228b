"""Adapters that scale: IA3 on the rows or columns of a weight, SSF (scale and shift) behind an op."""

from __future__ import annotations

import numpy as np

from ...graph.errors import ConfigError
from .kinds import AdapterKind, Array, Geometry, Options, Start, Tensors, register


# ---- IA3 -------------------------------------------------------------------------------------------------------------
def _ia3_start(start: Start) -> dict[str, np.ndarray]:
    if start.options["axis"] not in ("out", "in"):
        raise ConfigError("IA3 scales outputs or inputs", node="axis", expected="out, in", found=start.options["axis"])
    return {"l": np.ones(start.geometry.out if start.options["axis"] == "out" else inputs(start.geometry))}


def inputs(g: Geometry) -> int:
    """Input channels of all groups."""
    return g.inp * g.groups


def scale_inputs(w: Array, factor: Array, g: Geometry) -> Array:
    """W diag(factor): the columns, per group of a grouped convolution.

    w: canonical [out, inp, *kernel]; factor: [inp * groups].
    """
    by_group = factor.reshape((g.groups, 1, g.inp) + (1,) * len(g.kernel))
    return (w.reshape((g.groups, g.out // g.groups, g.inp, *g.kernel)) * by_group).reshape(g.shape)


def _ia3(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """diag(l) W (axis "out": keys and values) or W diag(l) (axis "in": the second projection of an FFN)."""
    if o["axis"] == "in":
        return scale_inputs(w, t["l"], g)
    return w * t["l"].reshape((-1,) + (1,) * (w.ndim - 1))


def _ia3_bias(b: Array, t: Tensors, o: Options) -> Array:
    return b * t["l"] if o["axis"] == "out" else b


IA3 = register(
    AdapterKind(
        name="ia3",
        paper="Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
        init=_ia3_start,
        weight=_ia3,
        bias=_ia3_bias,
        composition="scale",
        defaults={"axis": "out"},
    )
)


# ---- SSF -------------------------------------------------------------------------------------------------------------
def _ssf_start(start: Start) -> dict[str, np.ndarray]:
    return {"scale": np.ones(start.geometry.out), "shift": np.zeros(start.geometry.out)}


def _ssf(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """diag(scale) W."""
    return w * t["scale"].reshape((-1,) + (1,) * (w.ndim - 1))


def _ssf_bias(b: Array, t: Tensors, o: Options) -> Array:
    """scale b + shift."""
    return b * t["scale"] + t["shift"]


SSF = register(
    AdapterKind(
        name="ssf",
        paper="Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning",
        init=_ssf_start,
        weight=_ssf,
        bias=_ssf_bias,
        insertion="sequential",
        composition="scale",
    )
)
