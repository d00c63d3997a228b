"""Adapters on real architectures: ViT, Mixer, ResNet, MobileNet; GPT-2, T5, BERT, Llama with grouped heads."""

from __future__ import annotations

from typing import Any

import foldline as fl
import numpy as np
import pytest
import torch
from foldline import passes as P
from support.frontends import exported
from support.timm_models import create, timm, transformers
from torch import nn


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())


def perturb(model: nn.Module, scale: float = 0.05) -> nn.Module:
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn_like(p))
    return model


def call(model: nn.Module, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return out if isinstance(out, torch.Tensor) else out[0]


def check(model: nn.Module, inputs: Any, kind: str, **options: Any) -> nn.Module:
    """Insert, move, merge, restore; returns the adapted model."""
    before = call(model, inputs)
    tuned = P.insert_adapter(model, kind=kind, **options).model
    assert type(tuned) is type(model) and relative(call(tuned, inputs), before) < 1e-5
    perturb(tuned)
    want = call(tuned, inputs)
    assert relative(want, before) > 1e-4
    merged = P.merge_adapter(tuned)
    assert relative(call(merged.model, inputs), want) < 2e-5
    back, state = merged.unmerge().state_dict(), model.state_dict()
    assert list(back) == list(state) and all(torch.equal(back[k], state[k]) for k in state)
    return tuned


VISION = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2},
    "mixer": {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 48},
    "resnet18": {},
    "mobilenetv2_050": {},
}


def vision(name: str) -> tuple[nn.Module, torch.Tensor]:
    if name == "mixer":
        torch.manual_seed(0)
        model: nn.Module = perturb(timm().models.mlp_mixer.MlpMixer(num_classes=10, **VISION[name]))  # its head is zero
    else:
        model = create(name, num_classes=10, **VISION[name])
    size = VISION[name].get("img_size", 32)
    return model.eval(), torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name, kind, options", [
    ("vit_tiny_patch16_224", "lora", {"rank": 4, "targets": ["qkv[0/3]", "qkv[2/3]"]}),
    ("vit_tiny_patch16_224", "ssf", {}),
    ("vit_tiny_patch16_224", "dora", {"rank": 4}),
    ("vit_tiny_patch16_224", "sorsa", {"rank": 4, "targets": ["fc1", "fc2"]}),
    ("mixer", "ssf", {}),
    ("mixer", "vectorfit", {"exclude": ["stem"]}),
    ("resnet18", "tucker", {"rank": 4}),
    ("resnet18", "ssf", {}),
    ("mobilenetv2_050", "tucker", {"rank": 4}),
    ("mobilenetv2_050", "ssf", {}),
    ("mobilenetv2_050", "lora", {"rank": 2}),
])  # fmt: skip
def test_vision_models(name: str, kind: str, options: dict[str, Any]) -> None:
    model, x = vision(name)
    check(model, x, kind, **options)


def gpt2() -> tuple[nn.Module, Any]:
    tf = transformers()
    config = tf.GPT2Config(
        n_layer=2, n_embd=32, n_head=4, vocab_size=61, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    return tf.GPT2LMHeadModel(config).eval(), {"input_ids": torch.arange(7)[None] % 61, "use_cache": False}


def llama() -> tuple[nn.Module, Any]:
    tf = transformers()
    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(config).eval(), {"input_ids": torch.arange(7)[None] % 61, "use_cache": False}


def t5() -> tuple[nn.Module, Any]:
    tf = transformers()
    config = tf.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=61, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    ids = torch.arange(7)[None] % 61
    return tf.T5ForConditionalGeneration(config).eval(), {
        "input_ids": ids,
        "decoder_input_ids": ids,
        "use_cache": False,
    }


def bert() -> tuple[nn.Module, Any]:
    tf = transformers()
    config = tf.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=61
    )
    torch.manual_seed(0)
    return tf.BertModel(config).eval(), {"input_ids": torch.arange(7)[None] % 61}


LANGUAGE = {"gpt2": gpt2, "llama": llama, "t5": t5, "bert": bert}
IA3 = {
    "gpt2": {"c_attn[1/3]": {}, "c_attn[2/3]": {}, "mlp.c_proj": {"axis": "in"}},
    "llama": {"k_proj": {}, "v_proj": {}, "down_proj": {"axis": "in"}},
    "t5": {"k": {}, "v": {}, "wo": {"axis": "in"}},
    "bert": {"key": {}, "value": {}, "encoder.layer.?.output.dense": {"axis": "in"}},
}


@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.parametrize("kind", ["ia3", "lora", "bone"])
def test_language_models(name: str, kind: str) -> None:
    model, inputs = LANGUAGE[name]()
    options: dict[str, Any] = {"ia3": {"targets": IA3[name]}, "lora": {"rank": 4}, "bone": {"rank": 4}}[kind]
    if kind == "bone":
        options = {**options, "exclude": ["lm_head"]}
    tuned = check(model, inputs, kind, **options)
    if kind == "lora" and name == "gpt2":
        assert tuned.lm_head.weight.shape == tuned.transformer.wte.weight.shape
        assert torch.equal(tuned.lm_head.weight, tuned.transformer.wte.weight)  # tied, adapted together


def test_a_prefix_on_a_vit_and_a_bottleneck_on_a_bert_stay_in_the_model() -> None:
    model, x = vision("vit_tiny_patch16_224")
    tuned = P.insert_adapter(model, x, kind="prefix", targets=["qkv[0/3]"]).model
    assert torch.equal(tuned(x), model(x)) and relative(perturb(tuned)(x), model(x)) > 1e-5
    encoder, inputs = bert()
    tuned = P.insert_adapter(encoder, kind="bottleneck", targets=["attention.output.dense"]).model
    assert torch.equal(call(tuned, inputs), call(encoder, inputs))
    assert relative(call(perturb(tuned), inputs), call(encoder, inputs)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ssf", "lora", "dora"])
def test_an_exported_vit_folds_to_the_plain_models_nodes(kind: str) -> None:
    """Merging by registry and merging by folding the exported graph agree, and neither leaves a node."""
    model, x = vision("vit_tiny_patch16_224")
    perturb(model)  # biases of zero would fold to nothing in the plain model
    tuned = perturb(P.insert_adapter(model, kind=kind, **({} if kind == "ssf" else {"rank": 4})).model)
    plain = P.fold(exported(model, (x,)), verify=False).model
    folded = P.fold(exported(tuned, (x,))).model
    assert len(folded.graph.node) <= len(plain.graph.node)
    merged = exported(P.merge_adapter(tuned).model, (x,))
    assert len(merged.graph.node) == len(exported(model, (x,)).graph.node)
    one, two = (np.asarray(fl.load(m).run({m.graph.input[0].name: x.numpy()})[0][0]) for m in (folded, merged))
    assert relative(torch.from_numpy(one), torch.from_numpy(two)) < 1e-4
