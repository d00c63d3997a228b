"""Small language models trained for some seconds on the characters of Python's own library, and their perplexity."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .language_shapes import Logits
from .timm_models import define_torchvision_operators

LENGTH = 48
VOCABULARY = 128
TRAINED_ON = ("argparse", "ast", "dataclasses", "difflib", "enum", "inspect", "pathlib", "shutil", "tarfile", "typing")
HELD_OUT = ("configparser", "textwrap", "zipfile")


@functools.cache
def _characters(modules: tuple[str, ...]) -> torch.Tensor:
    """ASCII codes of the modules' sources, int64 [N]; 127 stands for every other character."""
    text = "".join(inspect.getsource(importlib.import_module(m)) for m in modules)
    return torch.tensor([min(ord(c), 127) for c in text])


def sequences(count: int, seed: int, *, held_out: bool = False, length: int = LENGTH) -> torch.Tensor:
    """``count`` pieces of ``length`` + 1 characters from random places, int64; the same for the same seed."""
    text = _characters(HELD_OUT if held_out else TRAINED_ON)
    starts = torch.randint(0, len(text) - length - 1, (count, 1), generator=torch.Generator().manual_seed(seed))
    return text[starts + torch.arange(length + 1)]


def calibration(count: int = 8, rows: int = 8, seed: int = 900_000) -> list[tuple[torch.Tensor, ...]]:
    """Batches of characters trained on."""
    return [(sequences(rows, seed + i)[:, :-1],) for i in range(count)]


@torch.no_grad()
def perplexity(model: nn.Module, count: int = 160) -> float:
    """exp of the mean cross-entropy per held-out character."""
    ids = sequences(count, 1_000_000, held_out=True)
    return float(F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).exp())


@functools.cache
def _state(shape: str, layers: int, steps: int) -> dict[str, torch.Tensor]:
    model = _fresh(shape, layers)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(steps):
        share = step / steps
        optimizer.param_groups[0]["lr"] = 4e-3 * min((step + 1) / 20, 1.05 - share)
        ids = sequences(24, step)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def _fresh(shape: str, layers: int) -> nn.Module:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    define_torchvision_operators()
    tr: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    if shape == "llama":
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "num_attention_heads": 4}
        config = tr.LlamaConfig(
            **sizes, num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=False, **common
        )
        return Logits(tr.LlamaForCausalLM(config), "logits")
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = tr.GPT2Config(n_embd=64, n_head=4, n_layer=layers, n_positions=64, **drop, **common)
    return Logits(tr.GPT2LMHeadModel(config), "logits")


def trained(shape: str, *, layers: int = 3, steps: int = 250) -> nn.Module:
    """A fresh copy, in eval mode, of ``"llama"`` or ``"gpt2"``: width 64, 4 heads, trained once per session."""
    model = _fresh(shape, layers)
    model.load_state_dict(_state(shape, layers, steps))
    return model.eval()
