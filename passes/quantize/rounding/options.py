"""Options of the rounding methods, checked before anything runs."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...base import config_error

Chosen = TypeVar("Chosen", bound=BaseModel)


class LayerOptions(BaseModel):
    """What all methods that look at one layer at a time share."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    inputs: Literal["quantized", "float"] = "quantized"
    """Whether a layer is fitted on what it gets once all layers before it are quantized, or on float inputs that are
    quantized at its own point only. The outputs aimed at are the float network's either way."""
    samples: int = Field(1024, ge=1)
    """Samples of the calibration data used at most; the first ones."""
    rows: int = Field(65_536, ge=1)
    """Output positions per layer whose inputs enter its Hessian, drawn at random (8 per column at least)."""
    scales: Literal["keep", "search"] = "search"
    """Weight scales as given, or searched: shrunk to where the layer's error is least, refitted to the integers."""
    bias: bool = True
    """Whether the layer's bias takes up the shift of its mean output."""
    asymmetry: float = Field(1.0, ge=0, le=1)
    """How far the layer also makes up for errors of the layers before it: 0 aims at its own float weight."""
    damping: float = Field(0.01, gt=0)
    """Share of the mean diagonal added to the Hessian."""


class GPTQOptions(LayerOptions):
    """Options of ``gptq``."""

    act_order: bool = True
    """Columns of large inputs first."""
    columns: int = Field(128, ge=1)
    """Columns treated between two updates of the rest (changes rounding of sums only)."""
    sweeps: int = Field(3, ge=0)
    """Sweeps of coordinate descent over the integers afterwards; 0: plain GPTQ."""


class LearnedOptions(LayerOptions):
    """Options of ``adaround``, ``adaquant``, ``flexround`` and ``lrq`` layer by layer."""

    steps: int = Field(400, ge=0)
    """Steps of Adam per layer."""
    rate: float | None = Field(None, gt=0)
    """Learning rate, in units of the method's own variables; None: the method's."""
    rank: int = Field(8, ge=1)
    """Rank of ``lrq``."""
    start: Literal["nearest", "gptq"] = "nearest"
    """Integers to start from (``adaround``, ``adaquant``)."""


class BlockOptions(BaseModel):
    """Options of ``reconstruct``: the recipe of block reconstruction."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    freedom: Literal["adaround", "adaquant", "flexround", "lrq"] = "adaquant"
    """What is learned of the weights."""
    start: Literal["nearest", "gptq"] = "gptq"
    """Integers to start from (``adaround``, ``adaquant``)."""
    loss: Literal["mse", "l1", "huber", "cosine"] = "mse"
    """Distance of a block's outputs from the float ones."""
    task: float = Field(0.0, ge=0)
    """Weight of a second loss: how far the network's own outputs move when the block is quantized (Kullback-Leibler
    divergence of the softmax for outputs of rank 2, else mean square). Runs the rest of the network in each step."""
    drop: float | None = Field(None, ge=0, le=1)
    """Share of activation elements that stay float in each step, block inputs included (QDrop); None: 0.5 in blocks
    with activations of fewer than 8 bits, else 0."""
    activations: bool | None = None
    """Whether activation scales are learned too (LSQ); None: where they have fewer than 8 bits."""
    scales: bool = True
    """Whether weight scales are learned too (``adaquant``; ``flexround`` and ``lrq`` always learn theirs)."""
    bias: bool = True
    """Whether biases are learned too."""
    optimizer: Literal["adam", "sgd", "sign"] = "adam"
    """Adam, gradient descent with momentum, or the sign of the gradient; all with a cosine schedule."""
    steps: int = Field(200, ge=0)
    """Steps per block."""
    rate: float | None = Field(None, gt=0)
    """Learning rate of the weights' variables; None: the method's."""
    batch: int = Field(32, ge=1)
    """Samples per step."""
    samples: int = Field(1024, ge=1)
    """Samples of the calibration data used at most; the first ones."""
    rank: int = Field(8, ge=1)
    """Rank of ``lrq``."""
    merge: int = Field(1, ge=1)
    """Neighbouring blocks reconstructed together."""
    most: int = Field(16, ge=1)
    """Blocks with more weight layers than this are done layer by layer."""
    inputs: Literal["quantized", "float"] = "quantized"
    """What a block is fed with, apart from dropping: what the quantized part before it gives, or float values."""
    rows: int = Field(65_536, ge=1)
    """For ``start="gptq"``: output positions per layer that enter its Hessian."""


def options(kind: type[Chosen], given: dict[str, Any], method: str) -> Chosen:
    """Validated options. Raises ConfigError naming the one that is wrong, and the nearest that exists."""
    try:
        return kind(**given)
    except ValidationError as exc:
        raise config_error(exc, kind, f"rounding {method!r}") from exc
