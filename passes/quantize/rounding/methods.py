"""The table of rounding methods, and the one function that quantizers call: round_weights."""

from __future__ import annotations

from collections.abc import Callable

from ....graph.errors import ConfigError
from .job import Rounded, RoundingJob
from .nearest import round_nearest


def _gptq(job: RoundingJob) -> dict[str, Rounded]:
    from .layerwise import round_gptq  # brings torch along

    return round_gptq(job)


def _learned(job: RoundingJob) -> dict[str, Rounded]:
    from .layerwise import round_learned

    return round_learned(job)


def _reconstruct(job: RoundingJob) -> dict[str, Rounded]:
    from .reconstruct import reconstruct

    return reconstruct(job)


METHODS: dict[str, Callable[[RoundingJob], dict[str, Rounded]]] = {
    "nearest": round_nearest,
    "gptq": _gptq,
    "adaround": _learned,
    "adaquant": _learned,
    "flexround": _learned,
    "lrq": _learned,
    "reconstruct": _reconstruct,
}
"""Name -> method. A method returns one ``Rounded`` per weight site, by the name of the site's node."""


def round_weights(job: RoundingJob) -> dict[str, Rounded]:
    """Choose the stored integers of every weight site of a job.

    Returns:
        Name of the site's node -> its integers, grid and, where they were learned, bias and activation grids.

    Raises:
        ConfigError: there is no such method, or it does not know an option.
        ConstraintError: the method needs calibration data and there is none, or a batch does not fit.
        UnsupportedOp: an ONNX operator has no torch implementation; names the node.
    """
    if job.method not in METHODS:
        raise ConfigError("unknown rounding", node="rounding", expected=", ".join(METHODS), found=job.method)
    return METHODS[job.method](job)
