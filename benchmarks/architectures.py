"""The architectures that the pruning benchmarks run over: names, and how each is built at random weights.

Plain names are timm's, ``tv:`` are torchvision's, ``hf:`` are transformers classes on small configurations (the class
and its structure are what matters here). Constant weights (zero-initialised gates, unit scales) are made random, so
that no branch is hidden behind a zero.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

VISION = """
tv:alexnet tv:vgg16_bn tv:resnet18 tv:shufflenet_v2_x0_5 tv:googlenet tv:squeezenet1_1 tv:mobilenet_v2
tv:mobilenet_v3_small tv:mnasnet0_5 tv:regnet_y_400mf tv:densenet121 tv:inception_v3 tv:convnext_tiny tv:vit_b_32
tv:swin_t tv:maxvit_t
vgg11_bn resnet34 resnet50 resnet50d resnet152 wide_resnet50_2 resnext50_32x4d seresnet50 res2net50_14w_8s res2next50
resnest14d resnest50d skresnet18 ecaresnet26t resnetv2_50 resnetrs50 cspresnet50 cspdarknet53 darknet53 dla34 dpn68
densenet201 hrnet_w18_small selecsls42b regnetx_004 regnety_004 nfnet_f0 tresnet_m ese_vovnet19b_dw xception41
inception_v4 inception_resnet_v2 mnasnet_100 mobilenetv3_large_100 mobilenetv4_conv_small efficientnet_b0
tf_efficientnetv2_b0 mixnet_s fbnetc_100 spnasnet_100 lcnet_050 tinynet_a hardcorenas_a rexnet_100 ghostnet_100
ghostnetv2_100 repghostnet_050 repvgg_a0 repvit_m1 mobileone_s0 fastvit_t8 starnet_s1 hgnetv2_b0 rdnet_tiny
edgenext_xx_small mobilevit_xxs mobilevitv2_050 efficientformer_l1 efficientformerv2_s0 efficientvit_b0
efficientvit_m0 tiny_vit_5m_224 levit_128s convnext_tiny convnextv2_atto inception_next_tiny mambaout_femto
poolformer_s12 caformer_s18 convformer_s18 vit_small_patch16_224 deit_tiny_patch16_224 deit3_small_patch16_224
cait_xxs24_224 beit_base_patch16_224 eva02_tiny_patch14_224 xcit_nano_12_p16_224 crossvit_tiny_240 convit_tiny
twins_svt_small twins_pcpvt_small pvt_v2_b0 visformer_tiny nest_tiny swin_tiny_patch4_window7_224
swinv2_tiny_window8_256 gcvit_xxtiny volo_d1_224 davit_tiny focalnet_tiny_srf coat_lite_tiny coatnet_0_rw_224
maxvit_tiny_tf_224 maxvit_rmlp_pico_rw_256 hiera_tiny_224 mvitv2_tiny sequencer2d_s mixer_s16_224 resmlp_12_224
gmlp_s16_224 pit_ti_224 tnt_s_patch16_224 samvit_base_patch16_224
""".split()

TEXT = """
hf:bert hf:distilbert hf:roberta hf:electra hf:albert hf:mpnet hf:gpt2 hf:gpt_neox hf:opt hf:llama hf:mistral hf:qwen2
hf:qwen3 hf:gemma hf:phi hf:stablelm hf:t5 hf:bart hf:segformer hf:vit hf:swin hf:convnextv2 hf:clip_vision
""".split()

MODELS = [*VISION, *TEXT]


def build(name: str, pixels: int | None = None) -> tuple[Any, Any]:
    """(module in eval mode, example inputs: a tuple, or a dict of keyword arguments).

    ``pixels`` is the side of the example images of timm and torchvision models, instead of the model's own.
    """
    import torch

    torch.manual_seed(0)
    model, inputs = _transformer(name[3:]) if name.startswith("hf:") else _vision(name, pixels)
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() > 1 and bool((p == p.flatten()[0]).all()):
                p.add_(0.1 * torch.randn_like(p))
    return model.eval(), inputs


def head_of(model: Any) -> Any:
    """The classifier or language-model head, that a peer must be told to keep; the last layer where none is named."""
    import torch

    if hasattr(model, "get_classifier") and isinstance(found := model.get_classifier(), torch.nn.Module):
        return found
    if hasattr(model, "get_output_embeddings") and (found := model.get_output_embeddings()) is not None:
        return found
    return [m for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))][-1]


def output_of(model: Any, inputs: Any) -> Any:
    """The first tensor that a call of the model gives."""
    import torch
    from torch.utils import _pytree as pytree

    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return next(x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor))


def parameters_of(model: Any) -> int:
    """How many numbers the parameters hold."""
    return sum(p.numel() for p in model.parameters())


def _vision(name: str, pixels: int | None) -> tuple[Any, Any]:
    import torch
    from support import timm_models

    if name.startswith("tv:"):
        options = {"init_weights": False} if name[3:] in ("googlenet", "inception_v3") else {}
        model = timm_models.torchvision_models().get_model(name[3:], weights=None, **options).eval()
        channels, size = 3, 299 if name == "tv:inception_v3" else 224
    else:
        model = timm_models.create(name)
        channels, _, size = model.default_cfg["input_size"]
    return model, (torch.randn(2, channels, pixels or size, pixels or size),)


_SIZES = dict(hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192, vocab_size=200)
_SPECIAL = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
_GQA = dict(**{**_SIZES, "num_attention_heads": 8}, num_key_value_heads=4, use_cache=False, **_SPECIAL)
_IMAGE = dict(image_size=64, num_channels=3)
REAL = """
hf:bert-base hf:distilbert-base hf:roberta-base hf:electra-small hf:electra-base hf:albert-base hf:mpnet-base
hf:gpt2-small hf:opt-125m hf:bart-base hf:vit-base hf:clip_vision-base
""".split()
"""transformers at their published sizes (random weights); the others are small configurations of the same classes."""

_CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert-base": ("Bert", "ForSequenceClassification", {}),
    "distilbert-base": ("DistilBert", "ForSequenceClassification", {}),
    "gpt2-small": ("GPT2", "LMHeadModel", dict(use_cache=False)),
    "roberta-base": (
        *("Roberta", "ForSequenceClassification"),
        dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1),
    ),
    "electra-small": (
        *("Electra", "ForSequenceClassification"),
        dict(embedding_size=128, hidden_size=256, num_attention_heads=4, intermediate_size=1024),
    ),
    "electra-base": (
        *("Electra", "ForSequenceClassification"),
        dict(embedding_size=768, hidden_size=768, num_attention_heads=12, intermediate_size=3072),
    ),
    "albert-base": (
        *("Albert", "ForSequenceClassification"),
        dict(embedding_size=128, hidden_size=768, num_attention_heads=12, intermediate_size=3072),
    ),
    "mpnet-base": ("MPNet", "ForSequenceClassification", dict(max_position_embeddings=514, pad_token_id=1)),
    "opt-125m": ("OPT", "ForCausalLM", dict(use_cache=False)),
    "bart-base": (
        *("Bart", "ForConditionalGeneration"),
        dict(d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12, decoder_attention_heads=12)
        | dict(encoder_ffn_dim=3072, decoder_ffn_dim=3072, use_cache=False),
    ),
    "vit-base": ("ViT", "ForImageClassification", dict(image_size=224)),
    "clip_vision-base": ("CLIPVision", "Model", dict(image_size=224)),
    "bert": ("Bert", "ForSequenceClassification", _SIZES),
    "distilbert": (
        *("DistilBert", "ForSequenceClassification"),
        dict(dim=96, n_layers=2, n_heads=4, hidden_dim=192, vocab_size=200),
    ),
    "roberta": ("Roberta", "ForSequenceClassification", {**_SIZES, "pad_token_id": 1}),
    "electra": ("Electra", "ForSequenceClassification", dict(**_SIZES, embedding_size=48)),
    "albert": ("Albert", "ForSequenceClassification", dict(**_SIZES, embedding_size=48)),
    "mpnet": ("MPNet", "ForSequenceClassification", {**_SIZES, "pad_token_id": 1}),
    "gpt2": ("GPT2", "LMHeadModel", dict(n_embd=96, n_layer=2, n_head=4, vocab_size=200, use_cache=False, **_SPECIAL)),
    "gpt_neox": ("GPTNeoX", "ForCausalLM", dict(**_SIZES, use_cache=False, **_SPECIAL)),
    "opt": (
        *("OPT", "ForCausalLM"),
        dict(hidden_size=96, num_hidden_layers=2, ffn_dim=192, num_attention_heads=4, vocab_size=200)
        | dict(word_embed_proj_dim=96, use_cache=False, **_SPECIAL),
    ),
    "llama": ("Llama", "ForCausalLM", _GQA),
    "mistral": ("Mistral", "ForCausalLM", _GQA),
    "qwen2": ("Qwen2", "ForCausalLM", _GQA),
    "qwen3": ("Qwen3", "ForCausalLM", dict(**_GQA, head_dim=12)),
    "gemma": ("Gemma", "ForCausalLM", dict(**_GQA, head_dim=12)),
    "phi": ("Phi", "ForCausalLM", dict(**_SIZES, use_cache=False, **_SPECIAL)),
    "stablelm": ("StableLm", "ForCausalLM", {**_GQA, "hidden_size": 128, "num_attention_heads": 4}),
    "t5": (
        *("T5", "ForConditionalGeneration"),
        dict(d_model=96, d_kv=24, num_heads=4, d_ff=192, num_layers=2, vocab_size=200, use_cache=False),
    ),
    "bart": (
        *("Bart", "ForConditionalGeneration"),
        dict(d_model=96, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
        | dict(encoder_ffn_dim=192, decoder_ffn_dim=192, vocab_size=200, use_cache=False),
    ),
    "segformer": ("Segformer", "ForSemanticSegmentation", dict(num_labels=10)),
    "vit": ("ViT", "ForImageClassification", dict(**_SIZES, **_IMAGE)),
    "swin": ("Swin", "ForImageClassification", dict(embed_dim=24, depths=[1, 2], num_heads=[2, 4], image_size=56)),
    "convnextv2": ("ConvNextV2", "ForImageClassification", dict(hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 2, 1])),
    "clip_vision": (
        "CLIPVision",
        "Model",
        dict(**_IMAGE, patch_size=16, hidden_size=96, num_hidden_layers=2)
        | dict(num_attention_heads=4, intermediate_size=192),
    ),
}


def _transformer(name: str) -> tuple[Any, Any]:
    import torch
    from support import timm_models

    library = timm_models.transformers()
    prefix, kind, options = _CONFIGS[name]
    options = {k: v for k, v in options.items() if k != "vocab_size" or "image_size" not in options}
    model = getattr(library, prefix + kind)(getattr(library, prefix + "Config")(**options)).eval()
    if prefix in ("Segformer", "ViT", "Swin", "ConvNextV2", "CLIPVision"):
        size = options.get("image_size", 64)
        return model, {"pixel_values": torch.randn(2, 3, size, size)}
    ids = torch.randint(2, 200, (2, 10))
    more = {"decoder_input_ids": torch.randint(2, 200, (2, 7))} if prefix in ("T5", "Bart") else {}
    return model, {"input_ids": ids, **more}
