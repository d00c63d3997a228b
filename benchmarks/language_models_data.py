"""Two small language models and the text they learn: made from what ships with Python, trained on any device, cached.

Text: the standard library's own Python files in the order of their names (every tenth is held out), as byte-level BPE.
Needs torch, transformers and tokenizers. A cache folder keeps the tokens and the checkpoints, so that a machine
without this Python version trains on the same tokens.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY = 1024
LENGTH = 128
SHAPES = ("llama", "gpt2")


@cache
def transformers() -> Any:
    """The transformers module, kept off the network, also where torchvision does not load on this torch."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    try:
        from support.timm_models import define_torchvision_operators
    except ImportError:  # a machine that only trains may lack pytest, which the test support imports
        return importlib.import_module("transformers")
    define_torchvision_operators()
    return importlib.import_module("transformers")


def build(shape: str, kv_heads: int = 4) -> nn.Module:
    """4 layers, width 256, 8 heads of 32: Llama (queries over ``kv_heads``, gated FFN 688) or GPT-2 (FFN 1024)."""
    tr = transformers()
    torch.manual_seed(0)
    if shape == "llama":
        return tr.LlamaForCausalLM(
            tr.LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=256,
                intermediate_size=688,
                num_hidden_layers=4,
                num_attention_heads=8,
                num_key_value_heads=kv_heads,
                head_dim=32,
                max_position_embeddings=512,
                tie_word_embeddings=False,
                use_cache=False,
            )
        ).eval()
    return tr.GPT2LMHeadModel(
        tr.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=256,
            n_inner=1024,
            n_layer=4,
            n_head=8,
            n_positions=512,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    ).eval()


@dataclass
class Text:
    """Token ids, int64 [N] each, and where they come from."""

    train: torch.Tensor
    held_out: torch.Tensor
    about: str

    def held_out_sequences(self, count: int) -> torch.Tensor:
        """The first ``count`` sequences of LENGTH + 1 held-out tokens, taken from all over the text."""
        n = len(self.held_out) // (LENGTH + 1)
        rows = self.held_out[: n * (LENGTH + 1)].view(n, LENGTH + 1)
        return rows[torch.linspace(0, n - 1, min(count, n)).long()]

    def train_sequences(self, count: int, seed: int, length: int = LENGTH) -> torch.Tensor:
        """``count`` sequences of ``length`` + 1 training tokens from random places, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, len(self.train) - length - 1, (count, 1), generator=generator)
        return self.train[starts + torch.arange(length + 1)]


def text(folder: Path) -> Text:
    """The corpus as tokens, from ``folder`` or made now (about half a minute)."""
    stored = folder / "tokens.npz"
    if not stored.is_file():
        _make_tokens(stored)
    with np.load(stored) as found:
        train, held_out = (torch.from_numpy(found[k].astype(np.int64)) for k in ("train", "held_out"))
        return Text(train, held_out, str(found["about"]))


def _make_tokens(stored: Path, limit: int = 6_000_000) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in folder.rglob("*.py") if not {"site-packages", "test", "tests"} & set(p.parts))
    parts: dict[str, list[str]] = {"train": [], "held_out": []}
    size = 0
    for i, path in enumerate(files):
        content = path.read_text(encoding="utf-8", errors="replace")
        size += len(content)
        parts["held_out" if i % 10 == 9 else "train"].append(content)
        if size > limit:
            break
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(parts["train"], trainer)
    end = tokenizer.token_to_id("<|end|>")
    ids = {}
    for name, contents in parts.items():
        ids[name] = np.array([t for e in tokenizer.encode_batch(contents) for t in [*e.ids, end]], dtype=np.int16)
    version = ".".join(map(str, sys.version_info[:3]))
    about = f"Python {version} standard library, {size:,} characters, {len(ids['train']):,} training tokens"
    stored.parent.mkdir(parents=True, exist_ok=True)
    np.savez(stored, **ids, about=np.array(about))


def train(
    model: nn.Module,
    corpus: Text,
    *,
    steps: int,
    minutes: float,
    batch: int,
    rate: float,
    device: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """AdamW, warm-up and cosine; as many of ``steps`` as fit into ``minutes``, planned after ten timed ones."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    half = torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda")
    started, planned, probe, last = time.monotonic(), steps, 10, 0.0
    begin = started
    step = 0
    while step < planned:
        if step == 2:
            begin = time.monotonic()
        if step == probe:
            each = (time.monotonic() - begin) / (probe - 2)
            planned = max(min(steps, int((minutes * 60 - (time.monotonic() - started)) / each) + probe), probe + 1)
            say(f"{1000 * each:.0f} ms a step: {planned} steps")
        share = (step + 1) / planned
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / min(100, planned / 10), 0.5 * (1 + math.cos(math.pi * share)) + 0.02)
        rows = corpus.train_sequences(batch, step).to(device)
        with half:
            logits = model(input_ids=rows[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            last = loss.item()
            say(f"step {step + 1}/{planned}, {time.monotonic() - started:.0f} s, loss {last:.3f}")
        step += 1
    model.to("cpu").eval()
    seconds = round(time.monotonic() - started)
    return {"steps": planned, "batch": batch, "rate": rate, "device": device, "seconds": seconds}


def trained(shape: str, folder: Path, kv_heads: int) -> tuple[nn.Module, dict[str, Any]]:
    """The cached checkpoint and how it was trained; exits with the command to run where there is none."""
    name = checkpoint_name(shape, kv_heads)
    path = folder / f"{name}.pt"
    if not path.is_file():
        raise SystemExit(f"no {path}: run the command `train` first")
    model = build(shape, kv_heads)
    model.load_state_dict({k: v.float() for k, v in torch.load(path, weights_only=True).items()})
    return model.eval(), json.loads((folder / f"{name}.json").read_text())


def checkpoint_name(shape: str, kv_heads: int) -> str:
    return f"llama-kv{kv_heads}" if shape == "llama" else shape


@torch.no_grad()
def sequence_losses(model: nn.Module, rows: torch.Tensor, batch: int = 16) -> torch.Tensor:
    """Mean cross-entropy of the next tokens of each sequence, natural logarithm per token, float64 [sequences]."""
    found = []
    for r in rows.split(batch):
        logits = model(input_ids=r[:, :-1]).logits
        found.append(F.cross_entropy(logits.transpose(1, 2), r[:, 1:], reduction="none").double().mean(1))
    return torch.cat(found)


def perplexity(model: nn.Module, rows: torch.Tensor, batch: int = 16) -> float:
    """exp of the mean cross-entropy over the sequences' next tokens, natural logarithm, per token."""
    return math.exp(min(float(sequence_losses(model, rows, batch).mean()), 50))
