"""DropBlocks: blocks and layers found from structure, dropped exactly where the branch is zero, classes kept."""

from __future__ import annotations

import foldline as fl
import numpy as np
import pytest
import torch
from foldline import passes as P
from foldline.graph.errors import ConfigError, ConstraintError
from foldline.graph.execute import run_graph
from foldline.passes.prune.blocks import Reach, layers, residual_blocks
from support.frontends import FRONT_ENDS, exported, load, toy_graph
from support.resnet_cifar import ResNetCifar
from support.timm_models import transformers
from support.toys import toy
from torch import nn


def resnet() -> tuple[ResNetCifar, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    return ResNetCifar(3).eval(), (torch.randn(4, 3, 32, 32),)


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_blocks_are_found_without_names(front: str) -> None:
    assert len(residual_blocks(load(*resnet(), front))) == 7  # two of nine have a padded shortcut
    vit = residual_blocks(toy_graph("vision_transformer", front))
    assert [b.start is a.stop for a, b in zip(vit, vit[1:], strict=False)] == [True] * 3
    assert not residual_blocks(toy_graph("norm_mlp", front))


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_an_activation_written_out_is_no_block(front: str) -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return x + self.b(y + 0.04 * y**3)

    found = residual_blocks(load(Written().eval(), (torch.randn(2, 6),), front))
    assert len(found) == 1 and sum(len(w.shape) > 1 for w in found[0].weights) == 2


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_nested_blocks_are_found_and_an_outer_one_takes_the_inner_along(front: str) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.tanh(self.a(x))
            y = y + torch.tanh(self.b(y))
            return x + self.c(y)

    torch.manual_seed(0)
    model, x = Nested().eval(), (torch.randn(3, 6),)
    graph = load(model, x, front)
    inner, outer = residual_blocks(graph)
    assert inner.join in outer.body and outer.join not in inner.body
    given = model if front == "fx" else exported(model, x)
    result = P.drop_blocks(given, x, count=2, criterion=lambda b, _: float(len(b.body)))
    found, _ = run_graph(result.graph, result.graph.bind(x))
    assert np.allclose(found[0], x[0].numpy(), atol=1e-6)
    assert not [w for w in result.graph.weights.values() if len(w.shape) > 1]


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_a_block_of_zero_is_dropped_exactly(front: str) -> None:
    model, x = resnet()
    with torch.no_grad():
        for block in (model.layer1[1], model.layer3[2]):
            block.bn2.weight.zero_()
            block.bn2.bias.zero_()
    given = model if front == "fx" else exported(model, x)
    result = P.drop_blocks(given, x, count=2, criterion="output")
    graph = result.graph
    found, _ = run_graph(graph, graph.bind(x))
    with torch.no_grad():
        expected = model(x[0]).numpy()
    assert np.allclose(found[0], expected, atol=1e-5 * np.abs(expected).max())
    scores = sorted(b["score"] for b in result.report.passes[0].details["blocks"])
    assert scores[1] < 1e-10 < scores[2]
    assert fl.cost(graph).parameters < fl.cost(fl.load(given, x)).parameters - 2 * 9 * 16 * 16
    assert sum(p.numel() for p in model.parameters()) == fl.cost(fl.load(model, x)).parameters  # caller's is whole


def test_a_resnet_keeps_its_class_and_runs() -> None:
    model, x = resnet()
    result = P.drop_blocks(model, x, ratio=0.3)
    assert type(result.model) is ResNetCifar
    assert sum(isinstance(m, nn.Identity) for m in result.model.modules()) == 2
    found, _ = run_graph(result.graph, result.graph.bind(x))
    with torch.no_grad():
        assert torch.allclose(result.model(*x), torch.from_numpy(found[0]), atol=1e-5)


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_layers_are_the_run_that_repeats(front: str) -> None:
    graph = toy_graph("vision_transformer", front)
    reach = Reach(graph)
    found = layers(graph, residual_blocks(graph, reach), reach)
    assert len(found) == 2 and found[0].stop is found[1].start
    assert sum(n.op == "softmax" for n in found[0].body) == 1


def small_llama() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    module = transformers()
    torch.manual_seed(0)
    config = module.LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, use_cache=False,
    )  # fmt: skip
    return module.LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(0, 50, (2, 7))}


def test_a_transformers_model_closes_the_gap_in_its_list_of_layers() -> None:
    model, x = small_llama()
    second = model.model.layers[1]
    with torch.no_grad():
        second.self_attn.o_proj.weight.zero_()
        second.mlp.down_proj.weight.zero_()
    result = P.drop_blocks(model, x, count=1, unit="layer")
    assert type(result.model) is type(model) and len(result.model.model.layers) == 2
    with torch.no_grad():
        assert torch.allclose(result.model(**x).logits, model(**x).logits, atol=1e-5)
    assert len(model.model.layers) == 3
    names = [b["kept"] for b in result.report.passes[0].details["blocks"]]
    assert names == [True, False, True]


def test_post_norm_layers_take_their_norm_along() -> None:
    module = transformers()
    torch.manual_seed(0)
    config = module.BertConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, vocab_size=50
    )
    model = module.BertModel(config, add_pooling_layer=False).eval()
    x = {"input_ids": torch.randint(0, 50, (2, 7))}
    for last in (False, True):

        def score(b: object, graph: fl.graph.ir.Graph, last: bool = last) -> float:
            at = [v.name for v in graph.values.values()].index(b.start.name)  # type: ignore[attr-defined]
            return -at if last else at

        result = P.drop_blocks(model, x, count=1, unit="layer", criterion=score)
        assert type(result.model) is type(model)
        expected = module.BertModel(config, add_pooling_layer=False).eval()
        expected.load_state_dict(model.state_dict())
        del expected.encoder.layer[2 if last else 0]
        with torch.no_grad():
            assert torch.allclose(result.model(**x)[0], expected(**x)[0], atol=1e-5)


def test_targets_and_criteria() -> None:
    model, x = resnet()
    whole = fl.cost(fl.load(model, x)).macs
    result = P.drop_blocks(model, x, target=fl.macs(0.6), criterion="magnitude")
    reached = result.report.passes[0].details["reached"]
    assert reached == pytest.approx(fl.cost(result.graph).macs / whole) and abs(reached - 0.6) < 0.06
    a, b, c = (
        [b["kept"] for b in P.drop_blocks(model, x, count=3, criterion="random").report.passes[0].details["blocks"]],
        [b["kept"] for b in P.drop_blocks(model, x, count=3, criterion="random").report.passes[0].details["blocks"]],
        [b["kept"] for b in P.drop_blocks(model, x, count=3).report.passes[0].details["blocks"]],
    )
    assert a == b and c.count(False) == 3
    ignored = P.drop_blocks(model, x, ratio=0.5, ignore=["layer1"]).report.passes[0].details["blocks"]
    assert [b["kept"] for b in ignored[:3]] == [True] * 3


def test_influence_is_one_minus_the_cosine() -> None:
    torch.manual_seed(0)

    class Turn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.a(x)
            return x + self.b(x)

    model, x = Turn().eval(), (torch.randn(5, 6),)
    result = P.drop_blocks(model, x, count=1, calibration=[x])
    with torch.no_grad():
        y = x[0] + model.a(x[0])
        z = y + model.b(y)
        expected = [float(1 - nn.functional.cosine_similarity(*p).mean()) for p in ((x[0], y), (y, z))]
    found = [b["score"] for b in result.report.passes[0].details["blocks"]]
    assert found == pytest.approx(expected, abs=1e-6)


def test_bad_input_is_refused() -> None:
    model, x = resnet()
    with pytest.raises(ConfigError, match="exactly one"):
        P.drop_blocks(model, x)
    with pytest.raises(ConfigError, match="influence"):
        P.drop_blocks(model, x, count=1, criterion="influenza")
    with pytest.raises(ConfigError, match="count, a ratio"):
        P.drop_blocks(model, x, target=fl.latency(0.5))
    with pytest.raises(ConstraintError, match="cannot be dropped"):
        P.drop_blocks(model, x, count=8)
    with pytest.raises(ConstraintError, match="matches nothing"):
        P.drop_blocks(model, x, count=1, ignore=["layer9"])
    with pytest.raises(ConstraintError, match="cannot be reached"):
        P.drop_blocks(model, x, target=fl.macs(0.01))
    with pytest.raises(ConstraintError, match="no residual block"):
        P.drop_blocks(*toy("norm_mlp"), count=1)
    with pytest.raises(ConfigError, match="finite number"):
        P.drop_blocks(model, x, count=1, criterion=lambda b, _: float("nan"))
