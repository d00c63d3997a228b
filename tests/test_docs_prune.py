"""The code about pruning in README.md, docs/prune.md and docs/plans.md runs as written, from top to bottom."""

from __future__ import annotations

import ast
import copy
import functools
import re
from pathlib import Path
from typing import Any

import foldline as fl
import pytest
import torch
from foldline import passes as P
from foldline.graph.errors import ConstraintError
from safetensors.torch import save_file
from support.frontends import exported
from support.resnet_cifar import ResNetCifar
from support.timm_models import transformers
from torch import nn

ROOT = Path(__file__).resolve().parent.parent


def run(page: str, names: dict[str, Any], heading: str = "") -> None:
    """Every Python block of a page, or of one of its sections; a line that says it is an error must be one."""
    text = (ROOT / page).read_text()
    if heading:
        text = text[text.index(heading) :].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert blocks
    for block in blocks:
        lines = block.splitlines()
        for statement in ast.parse(block).body:
            code = compile(ast.Module([statement], []), page, "exec")
            if lines[(statement.end_lineno or 1) - 1].endswith("an error"):
                with pytest.raises(ConstraintError):
                    exec(code, names)
            else:
                exec(code, names)


def build_the_original() -> nn.Module:
    torch.manual_seed(0)
    return ResNetCifar(1).eval()


@functools.cache
def onnx_file() -> Any:
    return exported(build_the_original(), (torch.randn(2, 3, 32, 32),))


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pages take for granted: a model with inputs and data, its ONNX file, its optimizer."""
    monkeypatch.chdir(tmp_path)
    model, x = build_the_original(), (torch.randn(2, 3, 32, 32),)
    fl.save(onnx_file(), "model.onnx")
    batches = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loss = model.train()(batches[0]).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    return {
        "fl": fl,
        "P": P,
        "model": model,
        "x": x,
        "batches": batches,
        "labelled": [(b, torch.randint(0, 10, (4,))) for b in batches],
        "optimizer": optimizer,
        "build_the_original": build_the_original,
    }


def test_pruning_page(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from foldline.passes.prune import automatic
    from foldline.passes.recover.recover_pass import Recover

    # As written it makes 64 images in 30 steps and 256 in 100: what that is worth is measured elsewhere.
    monkeypatch.setattr(automatic, "MADE", 8)
    monkeypatch.setattr(automatic, "STEPS", 2)
    fields = {"samples": 8, "steps": 2}
    whole = Recover.apply
    monkeypatch.setattr(Recover, "apply", lambda self, graph, ctx: whole(self.model_copy(update=fields), graph, ctx))
    run("docs/prune.md", names)
    assert names["result"].report.explain("layer1.0.conv1")


def test_plans_page(names: dict[str, Any]) -> None:
    model, x, optimizer = names["model"], names["x"], names["optimizer"]
    result = P.prune(model, x, ratio=0.5)
    state = model.state_dict()
    save_file(state, "ema.safetensors")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    names.update(
        plan=result.plan,
        small=result.model,
        checkpoint={"model": state, "ema": copy.deepcopy(state), "optimizer": optimizer.state_dict()},
        averaged=torch.optim.swa_utils.AveragedModel(model),
        other_model=copy.deepcopy(model),
        grouped=torch.optim.SGD([{"params": decayed}, {"params": rest}], lr=0.1),
    )
    run("docs/plans.md", names)
    held = optimizer.state[result.model.conv1.weight]
    assert held["exp_avg"].shape == result.model.conv1.weight.shape
    assert isinstance(names["other"], ResNetCifar) and isinstance(names["small"], ResNetCifar)


def test_readme(names: dict[str, Any]) -> None:
    t = transformers()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = t.LlamaConfig(vocab_size=50, num_hidden_layers=2, max_position_embeddings=32, use_cache=False, **sizes)
    texts = [{"input_ids": torch.randint(3, 50, (2, 9))} for _ in range(2)]
    names.update(llama=t.LlamaForCausalLM(config).eval(), ids=texts[0], texts=texts)
    run("README.md", names, "## Pruning in one call")
    with torch.no_grad():
        found, wanted = (m(*names["x"]) for m in (names["small"], names["result"].model))
    assert torch.allclose(found, wanted, atol=1e-6)
