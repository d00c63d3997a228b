"""Real architectures at random weights: one generic call, both front ends, smaller, running, masked equals sliced."""

from __future__ import annotations

from typing import Any

import foldline as fl
import numpy as np
import pytest
import torch
from foldline import passes as P
from foldline.graph.execute import run_graph, synthesize_inputs
from support import timm_models
from support.frontends import exported, exported_legacy

VISION = (
    *("resnet50", "mobilenetv3_large_100", "efficientnet_b0", "convnext_tiny", "densenet121", "regnety_004"),
    *("vit_small_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s16_224"),
)
TEXT = ("bert", "gpt2", "llama", "t5")

pytestmark = [pytest.mark.model, pytest.mark.slow]


def build(name: str) -> tuple[torch.nn.Module, Any]:
    if name in VISION:
        model = timm_models.create(name)
        with torch.no_grad():  # a zero-initialised head or gate would make every identity hold by nothing
            for p in model.parameters():
                if p.ndim and float(p.abs().max()) <= 1e-5:
                    p.normal_(0, 0.05)
        return model, (torch.randn(2, 3, 224, 224),)
    tr = timm_models.transformers()
    torch.manual_seed(0)
    ids = torch.randint(0, 200, (2, 10))
    if name == "bert":
        sizes = dict(hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192, vocab_size=200)
        mask = torch.ones(2, 10, dtype=torch.long)
        return tr.BertModel(tr.BertConfig(**sizes)).eval(), {"input_ids": ids, "attention_mask": mask}
    if name == "gpt2":
        special = dict(bos_token_id=0, eos_token_id=0, use_cache=False)
        config = tr.GPT2Config(n_embd=96, n_layer=2, n_head=4, vocab_size=200, n_positions=64, **special)
        return tr.GPT2LMHeadModel(config).eval(), {"input_ids": ids}
    if name == "llama":
        sizes = dict(hidden_size=96, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4)
        config = tr.LlamaConfig(**sizes, intermediate_size=192, vocab_size=200, use_cache=False)
        return tr.LlamaForCausalLM(config).eval(), {"input_ids": ids}
    config = tr.T5Config(d_model=96, d_kv=24, num_heads=4, d_ff=192, num_layers=2, vocab_size=200, use_cache=False)
    decoder = torch.randint(0, 200, (2, 7))
    return tr.T5ForConditionalGeneration(config).eval(), {"input_ids": ids, "decoder_input_ids": decoder}


@pytest.mark.parametrize("front", ["fx", "onnx"])
@pytest.mark.parametrize("name", [*VISION, *TEXT])
def test_generic_call(name: str, front: str) -> None:
    model, inputs = build(name)
    given: Any = model
    if front == "onnx":
        # torch 2.13's newer exporter fails on T5's views; its older one writes a file of another style.
        given = exported_legacy(model, inputs) if name == "t5" else exported(model, inputs)
    graph = fl.load(given, inputs)
    shapes = [v.hint for v in graph.outputs]
    result = P.prune(given, inputs, ratio=0.5, verify=True)
    identity = result.report.passes[0].details["identity"]
    assert identity["checked"] and identity["relative_error"] <= 1e-4
    assert fl.cost(result.graph).parameters < 0.75 * fl.cost(graph).parameters
    outputs, _ = run_graph(result.graph, synthesize_inputs(result.graph, 1))
    assert [v.hint for v in result.graph.outputs] == shapes
    assert all(np.isfinite(np.asarray(o, dtype=np.float64)).any() for o in outputs)
    if front == "fx":
        call = result.model(**inputs) if isinstance(inputs, dict) else result.model(*inputs)
        assert call is not None
        assert set(result.model.state_dict()) == set(model.state_dict())
