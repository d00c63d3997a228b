"""Adapters that peft saved merge as peft merges them, with one rounding; what is no function of a weight is refused."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foldline.graph.errors import ConstraintError, ModelFileError
from foldline.graph.execute import run_graph
from foldline.graph.fx.tensors import to_numpy
from foldline.graph.load import load
from foldline.passes.adapters.kinds import NotFoldable
from foldline.passes.adapters.merge import merge_adapter
from foldline.passes.adapters.peft import is_peft, load_peft
from foldline.passes.adapters.peft_kinds import METHODS, peft_kind
from support.peft_cases import BOTH, CASES, SINGLE, Net, Pixels
from support.timm_models import transformers
from torch import Tensor, nn

transformers()  # peft imports it, and it wants torchvision's operators
peft = pytest.importorskip("peft", reason="peft is not installed")


def trained(base: nn.Module, kind: str, options: dict[str, Any], seed: int = 1) -> nn.Module:
    """The base wrapped by peft, with every trained tensor moved away from its start."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), PEFT_TYPE_TO_CONFIG_MAPPING[kind](**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "ranknum" not in name:  # that one is not saved
                p.add_((torch.randn(p.shape, generator=generator) * 0.2).to(p.dtype))
    return model.eval()


def saved(model: nn.Module, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder))  # type: ignore[operator]
    return folder


def reference(model: nn.Module) -> dict[str, np.ndarray]:
    """peft's own merge in float64."""
    merged = copy.deepcopy(model).double().merge_and_unload()  # type: ignore[operator]
    return {name: p.detach().numpy() for name, p in merged.named_parameters()}


def errors(weights: dict[str, np.ndarray], true: dict[str, np.ndarray]) -> float:
    """Sum over all weights of the mean error, each relative to the largest entry."""
    assert set(weights) == set(true)
    return sum(
        float(np.abs(w.astype(np.float64) - true[n]).mean() / max(np.abs(true[n]).max(), 1e-30))
        for n, w in weights.items()
    )


def arrays(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: to_numpy(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_merges_as_peft_does_and_no_less_exactly(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    cls, kind, options = CASES[case]
    if dtype is torch.bfloat16 and case in ("pissa", "olora", "osf"):
        pytest.skip("peft rounds the decomposed base to bfloat16 when it inserts; the checkpoint does not say to what")
    torch.manual_seed(0)
    base = cls().to(dtype).eval()
    model = trained(base, kind, options)
    folder = saved(model, tmp_path)
    ours = merge_adapter(base, folder).model
    assert type(ours) is cls
    true = reference(model)
    theirs = arrays(model.merge_and_unload())  # type: ignore[operator]
    mine = arrays(ours)
    assert any(not np.array_equal(mine[n], a) for n, a in arrays(base).items()), "something was merged"
    unit = 2.0**-24 if dtype is torch.float32 else 2.0**-8
    slack = 2e-6 if case in SINGLE else 1e-12
    for name, want in true.items():
        top = np.abs(want).max()
        assert np.abs(mine[name].astype(np.float64) - want).max() <= (unit + slack) * top + 1e-30, name
    if case not in SINGLE:
        assert errors(mine, true) <= errors(theirs, true) * (1 + 1e-9)


def test_rounding_is_lower_than_pefts_where_it_computes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Net()
    model = trained(base, "LORA", {**BOTH, "r": 4, "use_dora": True})
    mine = arrays(merge_adapter(base, saved(model, tmp_path)).model)
    true = reference(model)
    theirs = arrays(model.merge_and_unload())  # type: ignore[operator]
    assert errors(mine, true) < 0.75 * errors(theirs, true)


# ---- real architectures -------------------------------------------------------------------------------------------
def tiny(name: str) -> tuple[nn.Module, list[str], tuple[Tensor, ...]]:
    t = transformers()
    torch.manual_seed(0)
    ids = torch.randint(0, 40, (2, 7))
    if name == "llama":
        config = t.LlamaConfig(
            vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
        return t.LlamaForCausalLM(config), ["q_proj", "v_proj", "down_proj"], (ids,)
    if name == "gpt2":
        config = t.GPT2Config(
            vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0
        )
        return t.GPT2LMHeadModel(config), ["c_attn", "mlp.c_proj"], (ids,)
    if name == "t5":
        config = t.T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        return t.T5EncoderModel(config), ["q", "v", "wo"], (ids,)
    if name == "bert":
        config = t.BertConfig(
            vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
        )
        return t.BertModel(config), ["query", "value", "output.dense"], (ids,)
    config = t.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    return t.ViTModel(config), ["q_proj", "v_proj", "query", "value"], (torch.randn(2, 3, 16, 16),)


def methods(targets: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "LORA", {"r": 4, "lora_alpha": 9}
    yield "LORA", {"r": 4, "use_dora": True}
    yield "IA3", {"feedforward_modules": [targets[-1]]}
    yield "VERA", {"r": 8}


def first(output: Any) -> Tensor:
    return output[0]


@pytest.mark.model
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "vit"])
def test_transformers_compute_what_the_wrapped_model_computes(name: str, tmp_path: Path) -> None:
    base, targets, inputs = tiny(name)
    base.eval()
    for i, (kind, options) in enumerate(methods(targets)):
        model = trained(base, kind, {"target_modules": targets, **options})
        merged = merge_adapter(base, saved(model, tmp_path / str(i))).model
        assert type(merged) is type(base)
        with torch.no_grad():
            want, got, before = first(model(*inputs)), first(merged(*inputs)), first(base(*inputs))
        top = float(want.abs().max())
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * top)
        assert float((want - before).abs().max()) > 1e-3 * top, "the adapter does something"


# ---- other forms of the base ----------------------------------------------------------------------------------------
def export(model: nn.Module, *args: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model.eval(), args, dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto


@pytest.mark.parametrize("case", ["lora", "dora", "ia3", "lora, bias and head", "lora, embedding", "lora, tokens"])
def test_an_onnx_file_of_the_base(case: str, tmp_path: Path) -> None:
    _, kind, options = CASES[case]
    torch.manual_seed(0)
    base, ids = Net().eval(), torch.randint(0, 10, (2, 5))
    model = trained(base, kind, options)
    folder = saved(model, tmp_path)
    merged = load(merge_adapter(export(base, ids), folder).model)
    (got,), _ = run_graph(merged, {merged.inputs[0].name: ids.numpy()})
    with torch.no_grad():
        want = model(ids).numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_an_onnx_file_of_a_convolutional_base(tmp_path: Path) -> None:
    base, x = Pixels().eval(), torch.randn(1, 4, 6, 6)
    model = trained(base, "LORA", {**BOTH, "r": 2})
    merged = load(merge_adapter(export(base, x), saved(model, tmp_path)).model)
    (got,), _ = run_graph(merged, {merged.inputs[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(got, model(x).numpy(), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.model
def test_an_onnx_file_of_gpt2_with_its_transposed_layers(tmp_path: Path) -> None:
    base, targets, inputs = tiny("gpt2")
    base.config.use_cache = False  # type: ignore[union-attr]
    model = trained(base.eval(), "LORA", {"target_modules": targets, "r": 4})
    merged = load(merge_adapter(export(base, *inputs), saved(model, tmp_path)).model)
    outputs, _ = run_graph(merged, {merged.inputs[0].name: inputs[0].numpy()})
    with torch.no_grad():
        want = first(model(*inputs)).numpy()
    np.testing.assert_allclose(outputs[0], want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_a_state_dict_of_the_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Net()
    model = trained(base, "LORA", {**BOTH, "r": 4})
    merged = merge_adapter(base.state_dict(), saved(model, tmp_path)).model
    want = arrays(model.merge_and_unload())  # type: ignore[operator]
    for name in ("a.weight", "b.weight"):
        np.testing.assert_allclose(merged[name].numpy(), want[name], rtol=1e-6, atol=1e-7)
    assert torch.equal(merged["head.weight"], base.head.weight)


def test_unmerge_restores_every_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Net()
    result = merge_adapter(base, saved(trained(base, "IA3", CASES["ia3"][2]), tmp_path))
    back = result.unmerge()
    for name, p in base.named_parameters():
        assert torch.equal(dict(back.named_parameters())[name], p)


# ---- refusals --------------------------------------------------------------------------------------------------------
def test_every_method_of_peft_is_known() -> None:
    peft_kind("peft_lora")
    assert {t.value for t in peft.PeftType} <= set(METHODS)


@pytest.mark.parametrize(
    ("kind", "options"), [("POLY", BOTH), ("LILY", BOTH), ("PSOFT", {**BOTH, "r": 4}), ("ADAMSS", BOTH), ("FROD", BOTH)]
)
def test_what_is_no_function_of_a_stored_weight_is_refused_by_name(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    base = Net()
    with pytest.raises(NotFoldable, match=kind.lower()):
        merge_adapter(base, saved(trained(base, kind, options), tmp_path))


def test_prompts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    with pytest.raises(NotFoldable, match="prompt_tuning"):
        merge_adapter(Net(), tmp_path)


def test_options_that_no_weight_expresses_are_refused(tmp_path: Path) -> None:
    base = Net()
    folder = saved(trained(base, "LORA", {**BOTH, "r": 4}), tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    for changed in ({"alora_invocation_tokens": [1, 2]}, {"init_lora_weights": "loftq"}, {"use_qalora": True}):
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(NotFoldable, match=next(iter(changed))):
            merge_adapter(base, folder)


def test_indices_that_were_not_saved_are_missed(tmp_path: Path) -> None:
    base = Net()
    folder = saved(trained(base, "UNILORA", BOTH), tmp_path)
    with pytest.raises(ConstraintError, match="save_indices"):
        merge_adapter(base, folder)


def test_another_base_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    folder = saved(trained(Net(), "LORA", {**BOTH, "r": 4}), tmp_path)
    with pytest.raises(ConstraintError, match=r"a\.weight"):
        merge_adapter(nn.Sequential(nn.Linear(3, 3)), folder)


def test_damaged_directories(tmp_path: Path) -> None:
    assert not is_peft(tmp_path)
    with pytest.raises(ModelFileError):
        load_peft(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORRA"}))
    with pytest.raises(ConstraintError, match="LORA"):
        load_peft(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelFileError, match="safe_serialization"):
        load_peft(tmp_path)


def test_loading_needs_no_peft() -> None:
    import subprocess
    import sys

    code = "import sys; import foldline.passes.adapters.peft; print(sorted(m for m in sys.modules if m == 'peft'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
