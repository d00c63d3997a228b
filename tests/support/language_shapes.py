"""Small transformers with random weights and norms, as modules from ids (or pixels) to logits."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch
from foldline.graph.ir import Graph
from torch import nn

from .frontends import load
from .timm_models import define_torchvision_operators

VOCABULARY = 60


class Logits(nn.Module):
    """A transformers model as a function of the ids alone."""

    def __init__(self, model: nn.Module, field: str) -> None:
        super().__init__()
        self.model, self.field = model, field

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return getattr(self.model(input_ids=ids), self.field)


@functools.cache
def _loaded(shape: str, front: str, tied: bool, layers: int) -> Graph:
    return load(*language_model(shape, tied=tied, layers=layers), front)


def language_graph(shape: str, front: str, *, tied: bool = False, layers: int = 2) -> Graph:
    """The same as a graph of a front end; loaded once per session, cloned for each use."""
    return _loaded(shape, front, tied, layers).clone()


def language_model(shape: str, *, tied: bool = False, layers: int = 2) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """(module, inputs): ``"llama"`` (4 heads over 2 key-value heads), ``"gpt2"`` or ``"bert"`` (post-norm)."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    define_torchvision_operators()
    tr: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": tied,
    }
    model: nn.Module
    if shape == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4}
        config = tr.LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=32, use_cache=False, **common)
        model = Logits(tr.LlamaForCausalLM(config), "logits")
    elif shape == "gpt2":
        config = tr.GPT2Config(n_embd=32, n_head=4, n_layer=layers, n_positions=32, use_cache=False, **common)
        model = Logits(tr.GPT2LMHeadModel(config), "logits")
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4}
        config = tr.BertConfig(**sizes, max_position_embeddings=32, vocab_size=VOCABULARY)
        model = Logits(tr.BertModel(config, add_pooling_layer=False), "last_hidden_state")
    randomize(model)
    return model.eval(), (torch.randint(0, VOCABULARY, (2, 9)),)


def randomize(model: nn.Module) -> None:
    """Weights with a few channels ten times as large, norms with gains and biases: nothing is trivial."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.normal_(0.0, 0.3, generator=generator)
                p.add_(1.0 if name.endswith("weight") else 0.0)
            else:
                p.normal_(0.0, p.shape[-1] ** -0.5, generator=generator)
        for name, p in model.named_parameters():
            if p.ndim == 1 and name.endswith("weight"):
                p[:3] *= 12.0


TOKENS = (torch.zeros(2, 9, dtype=torch.int64),)
"""Inputs of the shape that :func:`batches` fills."""


def batches(inputs: tuple[torch.Tensor, ...] = TOKENS, count: int = 4) -> list[tuple[torch.Tensor, ...]]:
    """Calibration batches of the same form."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(count):
        made = []
        for x in inputs:
            if x.dtype == torch.int64:
                made.append(torch.randint(0, VOCABULARY, x.shape, generator=generator))
            else:
                made.append(torch.randn(x.shape, generator=generator))
        found.append(tuple(made))
    return found
