"""What entries changed alone say about entries changed together, and that a search builds no more than it must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from foldline import passes as P
from foldline.graph.fx.config_effects import Effects, Misses, tables
from foldline.graph.fx.config_marks import Marked
from foldline.graph.fx.config_search import Search
from support import timm_models


def _tables(width: int, inner: int, heads: int) -> Any:
    shapes = {"a.weight": (inner, width), "b.weight": (width, inner), "mix": (heads * inner,)}
    return tables(shapes, {("", "heads"): heads, ("", "head_dim"): width // heads})


def _effects(built: list[Any]) -> Effects:
    def build(found: dict[str, Any]) -> Any:
        built.append(found)
        if found.get("heads") == 5:
            return None
        if "layers" in found:
            return {}, {}
        return _tables(found.get("width", 16), found.get("inner", 32), found.get("heads", 4))

    return Effects(_tables(16, 32, 4), build)


def test_together_is_said_only_where_nothing_is_shared() -> None:
    built: list[Any] = []
    effects = _effects(built)
    tensors, sizes = effects.together({"width": 8, "inner": 20})
    assert tensors == {("a.weight", 1): 8, ("b.weight", 0): 8, ("a.weight", 0): 20, ("b.weight", 1): 20, ("mix", 0): 80}
    assert sizes == {("", "head_dim"): 2}
    assert effects.together({"inner": 20, "heads": 2})[0] is None  # both change the size of "mix"
    assert effects.together({"inner": 20, "heads": 2})[1] == {("", "heads"): 2, ("", "head_dim"): 8}
    assert effects.together({"width": 8, "heads": 2})[1] is None  # and both the head dim
    assert effects.together({"heads": 5}) == effects.together({"layers": 1}) == (None, None)
    assert effects.together({}) == ({}, {})
    assert sorted(map(str, built)) == sorted(
        map(str, [{"width": 8}, {"inner": 20}, {"heads": 2}, {"heads": 5}, {"layers": 1}])
    )


def test_misses_count_what_is_not_as_wanted() -> None:
    before, wanted = _tables(16, 32, 4)[0], _tables(8, 32, 4)[0]
    misses = Misses(before, wanted)
    assert misses.under({}) == 2
    assert misses.under({("a.weight", 1): 8, ("b.weight", 0): 8}) == 0
    assert misses.under({("a.weight", 1): 8, ("mix", 0): 1}) == 2
    assert misses.under({("a.weight", 1): 9}) == 2


def _bart(strict: bool) -> Any:
    torch.manual_seed(0)
    transformers = timm_models.transformers()
    sizes = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4)
    config = transformers.BartConfig(
        **sizes, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=50, max_position_embeddings=20, use_cache=False
    )

    class Strict(transformers.BartForConditionalGeneration):  # type: ignore[misc, name-defined]
        def __init__(self, config: Any) -> None:
            if type(config.d_model) is not int:
                raise TypeError("a width is an int and nothing else")
            super().__init__(config)

    model = (Strict if strict else transformers.BartForConditionalGeneration)(config).eval()
    ids = {"input_ids": torch.randint(3, 50, (2, 6)), "decoder_input_ids": torch.randint(3, 50, (2, 5))}
    return model, ids


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What searches build."""
    seen: list[dict[str, Any]] = []
    original = Search._built

    def counted(self: Search, found: Any, *marking: Any) -> Any:
        seen.append(dict(found))
        return original(self, found, *marking)

    monkeypatch.setattr(Search, "_built", counted)
    return seen


def test_one_build_tells_that_an_entry_is_torn(built: list[dict[str, Any]]) -> None:
    """BART's width is its output and stays, so that no configuration says the pruned heads."""
    model, ids = _bart(strict=False)
    result = P.prune(model, ids, ratio=0.5, verify=False)
    note = next(n for n in result.report.notes if n.startswith("BartConfig stays as it was"))
    assert "d_model would have to be 32 (model.shared.embedding_dim) and 16 (model." in note
    assert len(built) == 1
    _as_it_was(model, result.model)


def test_a_search_that_fails_builds_each_entry_alone(built: list[dict[str, Any]]) -> None:
    """The same where a class takes no marked numbers: 17 builds told it."""
    model, ids = _bart(strict=True)
    result = P.prune(model, ids, ratio=0.5, verify=False)
    note = next(n for n in result.report.notes if n.startswith("BartConfig stays as it was"))
    assert "model.encoder.layers.0.self_attn.k_proj.weight: [16, 32]" in note
    assert len(built) == len({str(sorted(b.items())) for b in built}) <= 7
    _as_it_was(model, result.model)


def _as_it_was(model: Any, pruned: Any) -> None:
    assert pruned.generation_config is not model.generation_config  # a copy of the caller's own
    assert pruned.generation_config.to_dict() == model.generation_config.to_dict()
    assert model.config.d_model == 32 and model.config.encoder_ffn_dim == 64
    assert all(type(v) is not Marked for m in (model, pruned) for v in vars(m.config).values())


@pytest.mark.parametrize("positions, builds", [(32, 2), (20, 1)])
def test_layers_tell_which_entries_hold_a_size_by_chance(
    built: list[dict[str, Any]], positions: int, builds: int
) -> None:
    """As many positions as channels: the embedding that keeps its rows says that this entry stays."""
    torch.manual_seed(0)
    transformers = timm_models.transformers()
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=50)
    config = transformers.BertConfig(**sizes, max_position_embeddings=positions, pad_token_id=4)
    model = transformers.BertForSequenceClassification(config).eval()
    result = P.prune(model, {"input_ids": torch.randint(3, 50, (2, 6))}, ratio=0.5, verify=False)
    now = result.model.config
    assert (now.hidden_size, now.max_position_embeddings, now.num_attention_heads) == (16, positions, 2)
    assert now.pad_token_id == 4 and result.model.bert.embeddings.word_embeddings.padding_idx == 4
    assert len(built) == builds
    assert all(type(v) is int for m in result.model.modules() for v in vars(m).values() if isinstance(v, Marked))


def test_two_entries_of_one_size_need_one_build(built: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    transformers = timm_models.transformers()
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=64, vocab_size=50)
    config = transformers.OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=20, use_cache=False)
    model = transformers.OPTForCausalLM(config).eval()
    result = P.prune(model, {"input_ids": torch.randint(3, 50, (2, 6))}, ratio=0.5, verify=False)
    now = result.model.config
    assert (now.hidden_size, now.word_embed_proj_dim, now.ffn_dim) == (16, 16, 32)
    assert len(built) == 1


def test_a_model_in_half_precision_needs_one_build_too(built: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    transformers = timm_models.transformers()
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=50)
    config = transformers.BertConfig(**sizes, max_position_embeddings=20)
    model = transformers.BertForSequenceClassification(config).eval().bfloat16()
    result = P.prune(model, {"input_ids": torch.randint(3, 50, (2, 6))}, ratio=0.5, verify=False)
    assert result.model.config.hidden_size == 16 and {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    assert len(built) == 1
