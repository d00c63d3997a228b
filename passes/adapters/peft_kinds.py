"""What each kind of peft checkpoint does to a weight, as one formula in float64; and why the others cannot be merged.

``w`` is the canonical weight [out, in / groups, *kernel] (an embedding: as stored, [rows, width]), ``t`` the stored
tensors under peft's own names without prefix and adapter name, ``o`` what the formula needs of the configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...graph.errors import ConfigError
from .kinds import AdapterKind, Array, Geometry, NewBias, NewWeight, Options, Start, Tensors

PREFIX = "peft_"


def _loaded_only(start: Start) -> dict[str, np.ndarray]:
    raise ConfigError(
        "this kind is read from peft's checkpoints, not inserted",
        node="kind",
        hint="`lora`, `dora`, `ia3`, `bone`, ...",
    )


@dataclass(frozen=True)
class Method:
    """One PEFT method.

    Attributes:
        parameters: first parts of the names of its tensors (``"lora_"``), which end the path of the layer.
        kind: formula, as a kind of the adapter registry.
        shared: names of tensors that belong to the model instead of a layer.
    """

    parameters: tuple[str, ...]
    kind: AdapterKind
    shared: tuple[str, ...] = ()


METHODS: dict[str, Method] = {}
"""By ``peft_type`` in ``adapter_config.json``."""


def method(
    name: str,
    paper: str,
    *parameters: str,
    bias: NewBias | None = None,
    shared: tuple[str, ...] = (),
) -> Callable[[NewWeight], NewWeight]:
    """Register the formula of a method that merges."""

    def register(formula: NewWeight) -> NewWeight:
        kind = AdapterKind(
            PREFIX + name.lower(),
            paper,
            _loaded_only,
            weight=formula,
            bias=bias,
            composition="transform",
            identity=False,
        )
        METHODS[name] = Method(parameters, kind, shared)
        return formula

    return register


def refused(name: str, paper: str, why: str, *parameters: str) -> None:
    """Register a method whose checkpoints cannot be merged into weights."""
    kind = AdapterKind(
        PREFIX + name.lower(),
        paper,
        _loaded_only,
        function="nonlinear",
        composition="gate",
        identity=False,
        why_not=why,
    )
    METHODS[name] = Method(parameters, kind)


def peft_kind(name: str) -> AdapterKind:
    """The kind of that name (``"peft_lora"``).

    Raises:
        ConfigError: peft's current version has no such method.
    """
    from . import peft_low_rank, peft_spectra, peft_transforms  # noqa: F401  (they register their methods)

    found = METHODS.get(name.removeprefix(PREFIX).upper())
    if found is None:
        raise ConfigError("no such method in peft", node="kind", expected=", ".join(sorted(METHODS)), found=name)
    return found.kind


# ---- small things that several formulas share -----------------------------------------------------------------------
def flat(x: Array) -> Array:
    """[rows, everything else]."""
    return x.reshape(x.shape[0], -1)


def like(delta: Array, w: Array) -> Array:
    """An update as a tensor of the weight's shape."""
    return np.asarray(delta).reshape(w.shape)


def whole(t: Tensors, name: str) -> np.ndarray:
    """Indices, which were widened with all other tensors, as integers again."""
    return np.asarray(t[name]).astype(np.int64)


def transpose_if(matrix: Array, o: Options) -> Array:
    """For embeddings, whose rows are inputs."""
    return matrix.T if o.get("embedding") else matrix


# ---- replaced as a whole --------------------------------------------------------------------------------------------
def _replaced_bias(b: Array, t: Tensors, o: Options) -> Array:
    return np.asarray(t["bias"]) if "bias" in t else b


@method("REPLACE", "modules_to_save and trained biases", bias=_replaced_bias)
def replaced(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """The weight that was trained in place of the base's."""
    return np.asarray(t["weight"]).reshape(w.shape) if "weight" in t else w


@method(
    "LN_TUNING", "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", "ln_tuning_layers",
    bias=lambda b, t, o: np.asarray(t["ln_tuning_layers.bias"]) if "ln_tuning_layers.bias" in t else b,
)  # fmt: skip
def ln_tuning(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """gain' = the trained gain, bias' = the trained bias."""
    return np.asarray(t["ln_tuning_layers.weight"]).reshape(w.shape)


@method("TRAINABLE_TOKENS", "Trainable tokens (peft)", "trainable_tokens_", "token_adapter")
def trainable_tokens(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """Rows of the embedding that were trained replace the base's."""
    name = next(k for k in t if k.endswith("trainable_tokens_delta"))
    new = np.array(w)
    new[np.asarray(o["tokens"], dtype=np.int64)] = t[name]
    return new


@method(
    "BEFT", "BEFT: Bias-Efficient Fine-Tuning of Language Models", "beft_",
    bias=lambda b, t, o: b + np.asarray(t["beft_bias"]).reshape(b.shape),
)  # fmt: skip
def beft(w: Array, t: Tensors, g: Geometry, o: Options) -> Array:
    """b' = b + trained bias; the weight stays."""
    return w


# ---- methods that are no function of a weight -----------------------------------------------------------------------
_PROMPT = "its trained vectors are inputs of the model or keys of attention, not a function of a weight"
for _name, _paper, _parameters in (
    ("PROMPT_TUNING", "The Power of Scale for Parameter-Efficient Prompt Tuning", "prompt_embeddings"),
    ("MULTITASK_PROMPT_TUNING", "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning", "prompt"),
    ("P_TUNING", "GPT Understands, Too", "prompt_embeddings"),
    ("PREFIX_TUNING", "Prefix-Tuning: Optimizing Continuous Prompts for Generation", "prompt_embeddings"),
    ("CPT", "Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods", "prompt_embeddings"),
    ("CARTRIDGE", "Cartridges: Lightweight and general-purpose long context representations", "prompt_embeddings"),
    (
        "ADAPTION_PROMPT",
        "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention",
        "adaption_",
    ),
):
    refused(_name, _paper, _PROMPT, _parameters)
refused(
    "XLORA", "X-LoRA: Mixture of Low-Rank Adapter Experts",
    "a classifier chooses the scale of every adapter at run time", "xlora_", "internal_xlora_classifier",
)  # fmt: skip
refused(
    "POLY", "Combining Modular Skills in Multitask Learning", "a router mixes skills by the task at run time", "poly_"
)
refused("LILY", "Low-Rank Interconnected Adaptation across Layers", "a router mixes its matrices by the input", "lily_")
refused("SHADOW", "Shadow tuning (peft)", "it is a second network beside the layers, with states of its own", "shadow_")
refused(
    "ADAMSS", "AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning",
    "which rows belong to which subspace is clustered anew from the base and is not in the checkpoint", "adamss_",
)  # fmt: skip
refused(
    "FROD", "FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees",
    "the left factor U is not in the checkpoint", "frod_",
)  # fmt: skip
refused(
    "PSOFT", "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation",
    "its bases are computed anew from the base by an SVD, whose signs are not in the checkpoint", "psoft_",
)  # fmt: skip
