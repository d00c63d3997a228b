"""Configurations after pruning: from_pretrained gives the pruned model back; where no configuration can, a note."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import foldline as fl
import pytest
import torch
from foldline import passes as P
from support.timm_models import transformers
from torch import nn

IDS = torch.arange(18).view(2, 9) % 50
SHARED = {"vocab_size": 60, "num_hidden_layers": 2, "use_cache": False, "max_position_embeddings": 40}
DECODER = {**SHARED, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 56}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def build(t: Any, name: str) -> tuple[nn.Module, Any]:
    """A tiny model of random weights with sizes that meet by chance (4 heads, 4 labels, token 2, 2 layers)."""
    torch.manual_seed(0)
    text = {"input_ids": IDS}
    encoder = {**SHARED, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 56, "num_labels": 4}
    made: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
        "bert": lambda: (t.BertForSequenceClassification(t.BertConfig(**encoder)), text),
        "gpt2": lambda: (
            t.GPT2LMHeadModel(
                t.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=40, use_cache=False, **TOKENS)
            ),
            text,
        ),
        "llama": lambda: (t.LlamaForCausalLM(t.LlamaConfig(**DECODER, **TOKENS)), text),
        "mistral": lambda: (t.MistralForCausalLM(t.MistralConfig(**DECODER, **TOKENS)), text),
        "qwen2": lambda: (t.Qwen2ForCausalLM(t.Qwen2Config(**DECODER, **TOKENS)), text),
        "t5": lambda: (
            t.T5ForConditionalGeneration(
                t.T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=56, num_layers=2, num_heads=4, use_cache=False)
            ),
            {"input_ids": IDS, "decoder_input_ids": IDS},
        ),
        "vit": lambda: (
            t.ViTForImageClassification(
                t.ViTConfig(
                    hidden_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    intermediate_size=56,
                    image_size=32,
                    patch_size=8,
                    num_labels=4,
                )
            ),
            {"pixel_values": torch.randn(2, 3, 32, 32)},
        ),
        "swin": lambda: (
            t.SwinForImageClassification(
                t.SwinConfig(
                    image_size=32,
                    patch_size=2,
                    embed_dim=16,
                    depths=[2, 2],
                    num_heads=[2, 4],
                    window_size=4,
                    num_labels=4,
                )
            ),
            {"pixel_values": torch.randn(2, 3, 32, 32)},
        ),
        "convnextv2": lambda: (
            t.ConvNextV2ForImageClassification(
                t.ConvNextV2Config(hidden_sizes=[16, 32, 48, 64], depths=[1, 2, 1, 1], num_labels=4)
            ),
            {"pixel_values": torch.randn(2, 3, 64, 64)},
        ),
        "resnet": lambda: (
            t.ResNetForImageClassification(
                t.ResNetConfig(
                    embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], layer_type="bottleneck", num_labels=4
                )
            ),
            {"pixel_values": torch.randn(2, 3, 32, 32)},
        ),
    }
    model, x = made[name]()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.eval(), x


EXPECTED = {
    "bert": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 28},
    "gpt2": {"n_embd": 16, "n_head": 2},
    "llama": {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 28},
    "mistral": {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 28},
    "qwen2": {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 28},
    "t5": {"num_heads": 2, "d_ff": 28},
    "vit": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 28},
    "swin": {"embed_dim": 8, "num_heads": [1, 2], "hidden_size": 16},
    "convnextv2": {"hidden_sizes": [8, 16, 24, 32]},
    "resnet": {"embedding_size": 8, "hidden_sizes": [16, 32]},
}


def integers(config: Any) -> dict[str, Any]:
    """Entries that hold an integer, or a list of them."""
    entries = config.to_dict().items()
    return {k: v for k, v in entries if type(v) is int or isinstance(v, list) and all(type(i) is int for i in v)}


def logits(model: nn.Module, x: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**x)[0]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_from_pretrained_gives_the_pruned_model(name: str, tmp_path: Path) -> None:
    t = transformers()
    model, x = build(t, name)
    before, state = integers(model.config), torch.random.get_rng_state()
    result = P.prune(model, x, ratio=0.5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert integers(model.config) == before
    small = result.model
    after = integers(small.config)
    assert {k: v for k, v in after.items() if before.get(k) != v} == EXPECTED[name]
    small.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, x), logits(small, x))
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in model.parameters())
    again.train()
    again(**x)[0].square().mean().backward()


def test_an_entry_left_to_its_default_is_written_where_it_must_be(tmp_path: Path) -> None:
    t = transformers()
    model, x = build(t, "gpt2")
    result = P.prune(model, x, ratio=0.5, ignore=["*.mlp.c_fc.bias"])
    assert integers(result.model.config)["n_inner"] == 128 and result.model.config.n_embd == 16
    result.model.save_pretrained(tmp_path)
    assert torch.equal(logits(t.GPT2LMHeadModel.from_pretrained(tmp_path).eval(), x), logits(result.model, x))


@pytest.mark.parametrize("why", ["uneven", "tied to the width"])
def test_widths_that_no_configuration_gives(why: str, tmp_path: Path) -> None:
    t = transformers()
    model, x = build(t, "llama" if why != "tied to the width" else "bert")
    options: dict[str, Any] = {
        "uneven": {"ratio": 0.5, "ignore": ["model.layers.1.mlp.*"]},
        "tied to the width": {"ratio": 0.5, "ignore": ["*embeddings*"]},
    }[why]
    result = P.prune(model, x, **options)
    assert type(result.model) is type(model)
    assert result.model.config.to_dict() == model.config.to_dict()
    notes = [n for n in result.graph.notes if "Config stays as it was" in n]
    assert len(notes) == 1 and "fl.load_pruned" in notes[0]
    assert notes[0] in result.report.notes
    result.save(tmp_path / "out")
    again = fl.load_pruned(build(t, "llama" if why != "tied to the width" else "bert")[0], tmp_path / "out")
    assert torch.equal(logits(again, x), logits(result.model, x))


def test_load_pruned_restores_the_configuration(tmp_path: Path) -> None:
    t = transformers()
    model, x = build(t, "t5")
    result = P.prune(model, x, ratio=0.5)
    result.save(tmp_path / "out")
    again = fl.load_pruned(build(t, "t5")[0], tmp_path / "out")
    assert again.config.to_dict() == result.model.config.to_dict()
    assert again.encoder.config.d_ff == result.model.encoder.config.d_ff == 28
    again.save_pretrained(tmp_path / "hf")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "hf").eval(), x), logits(result.model, x))


class Wrapped(nn.Module):
    """What users write around such a model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids=ids).logits.softmax(-1)


def test_a_model_inside_another(tmp_path: Path) -> None:
    t = transformers()
    inner, _ = build(t, "llama")
    model = Wrapped(inner).eval()
    result = P.prune(model, (IDS,), ratio=0.5)
    assert result.model.inner.config.hidden_size == 16 and inner.config.hidden_size == 32
    result.model.inner.save_pretrained(tmp_path)
    again = Wrapped(t.LlamaForCausalLM.from_pretrained(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS), result.model(IDS))


class Lookalike:
    """A configuration of another library: told by what it offers."""

    def __init__(self, width: int = 24, depth: int = 2, other: int = 24) -> None:
        self.width, self.depth, self.other = width, depth, other

    def to_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def save_pretrained(self, folder: str) -> None:
        raise NotImplementedError


class Net(nn.Module):
    """Width from the configuration; ``reads`` makes forward look at an entry that says the width."""

    reads = False

    def __init__(self, config: Lookalike) -> None:
        super().__init__()
        self.config = config
        self.up, self.down = nn.Linear(6, config.width), nn.Linear(config.width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.down(torch.relu(self.up(x)))
        return h * self.config.width if self.reads else h

    def save_pretrained(self, folder: str) -> None:
        raise NotImplementedError


class Reads(Net):
    reads = True


class Scaled(Net):
    """A scale worked out from the width when the module is built, as attention's from the head dim."""

    def __init__(self, config: Lookalike) -> None:
        super().__init__(config)
        self.scale = config.width**-0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


def test_told_by_evidence_and_not_when_the_function_would_change() -> None:
    torch.manual_seed(0)
    x = (torch.randn(4, 6),)
    model = Net(Lookalike()).eval()
    result = P.prune(model, x, ratio=0.5)
    assert vars(result.model.config) == {"width": 12, "depth": 2, "other": 24}
    assert vars(model.config) == {"width": 24, "depth": 2, "other": 24}
    for kind in (Reads, Scaled):
        model = kind(Lookalike()).eval()
        result = P.prune(model, x, ratio=0.5)
        assert type(result.model) is kind and vars(result.model.config) == vars(model.config)
        assert any("computes something else" in n for n in result.report.notes)
        keep = torch.tensor(result.plan.weights["up.weight"][0])
        factor = 24 if kind is Reads else 24**-0.5
        hand = torch.relu(x[0] @ model.up.weight[keep].T + model.up.bias[keep])
        assert torch.allclose(result.model(*x), (hand @ model.down.weight[:, keep].T + model.down.bias) * factor)


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_dropped_layers_are_counted_in_the_configuration(kind: str, tmp_path: Path) -> None:
    """The same model again from its folder; layers know their new places, which key-value caches go by."""
    model, inputs = _tiny(kind)
    result = P.drop_blocks(model, inputs, count=1, unit="layer", criterion="magnitude", verify=False)
    result.model.save_pretrained(tmp_path)
    again = type(result.model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], result.model(**inputs)[0])
    places = [m.layer_idx for m in result.model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    assert not places or set(places) == set(range(result.model.config.num_hidden_layers))


def _tiny(kind: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    tr = transformers()
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, vocab_size=50)
    if kind == "bert":
        model = tr.BertModel(tr.BertConfig(**sizes))
    elif kind == "llama":
        model = tr.LlamaForCausalLM(tr.LlamaConfig(**sizes, num_key_value_heads=2, use_cache=False))
    else:
        config = tr.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=50, use_cache=False)
        model = tr.GPT2LMHeadModel(config)
    return model.eval(), {"input_ids": torch.randint(0, 50, (2, 7))}
