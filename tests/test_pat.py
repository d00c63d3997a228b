"""Pruning-aware tuning: insertion is identity, random ops fold exactly, the masked width is cut from every weight."""

from __future__ import annotations

from typing import Any

import foldline as fl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foldline import passes as P
from foldline.graph.errors import ConstraintError
from foldline.graph.execute import run_graph
from foldline.passes.prune.pat import FoldLinearOp, InsertLinearOp, SharedMask, identity_loss, mask_loss
from support import timm_models
from support.frontends import exported
from support.toys import toy
from support.toys_attention import Mlp
from support.toys_base import fill
from torch import Tensor, nn

WIDTH, VOCABULARY = 32, 40


class Block(nn.Module):
    """Pre-norm, causal attention with a fused qkv, GELU MLP."""

    def __init__(self, rms: bool) -> None:
        super().__init__()
        make: Any = nn.RMSNorm if rms else nn.LayerNorm
        self.norm1, self.norm2 = make(WIDTH, eps=1e-2), make(WIDTH, eps=1e-2)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = Mlp(WIDTH, 48)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, 32))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    """Four blocks, learned positions, final norm, head (its own weight or the embedding's)."""

    def __init__(self, rms: bool, tied: bool) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList(Block(rms) for _ in range(4))
        self.norm = nn.RMSNorm(WIDTH) if rms else nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class PostNorm(nn.Module):
    """BERT's order: the stream is what a layer norm gives; its bias is no zero in a masked channel."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, WIDTH), nn.LayerNorm(WIDTH)
        self.mlps = nn.ModuleList(Mlp(WIDTH, 20) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x))
        for mlp, norm in zip(self.mlps, self.norms, strict=True):
            x = norm(x + mlp(x))
        return self.head(x)


def model_of(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    if name == "post_norm":
        return fill(PostNorm()), (torch.randn(2, 7, 6),)
    if name == "llama":
        return toy("grouped_query_rope")
    model = fill(Gpt(rms="rms" in name, tied="tied" in name))
    return model, (torch.randint(VOCABULARY, (2, 9)),)


def run(result: Any, x: tuple[Tensor, ...]) -> np.ndarray:
    return run_graph(result.graph, result.graph.bind(x))[0][0]


def close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    return bool(np.abs(a - b).max() <= tolerance * np.abs(a).max())


def randomize(result: Any, seed: int = 0) -> Any:
    """Random ops, far from identity."""
    rng = np.random.default_rng(seed)
    for name, w in list(result.graph.weights.items()):
        if name.endswith(("_down", "_up")):
            result.graph.set_weight(w, rng.normal(0, 0.3, w.shape).astype(np.float32))
    return result.graph.to_model()


@pytest.mark.parametrize("front", ["fx", "onnx"])
@pytest.mark.parametrize(
    ("name", "where"),
    [("gpt", "both"), ("gpt_rms", "readers"), ("gpt_tied", "writers"), ("llama", "both"), ("post_norm", "both")],
)
def test_insert_train_mask_fold(front: str, name: str, where: str) -> None:
    model, x = model_of(name)
    given = model if front == "fx" else exported(model, x)
    start = model(*x).detach().numpy()
    inserted = P.insert_linear_op(given, x, rank=3, where=where)
    assert inserted.report.passes[0].details["ops"] >= 4
    assert close(start, run(inserted, x), 1e-6)

    tuned = randomize(inserted)
    loose = run(
        fl.Pipeline([SharedMask(kept=list(range(inserted.report.passes[0].details["width"])))]).run(tuned, x), x
    )
    assert not close(start, loose, 1e-2)
    folded = P.fold_linear_op(tuned, x)  # the mask is all ones: nothing is cut
    assert close(loose, run(folded, x), 1e-4)
    assert not any("pat_" in n for n in folded.graph.weights)

    masked = P.shared_mask(tuned, x, ratio=0.25)
    wanted = run(masked, x)
    assert not close(loose, wanted, 1e-3)
    cut = P.fold_linear_op(masked.model, x)
    assert close(wanted, run(cut, x), 1e-4)
    width = inserted.report.passes[0].details["width"]
    was = fl.load(given, x).weights
    axes = cut.plan.weights
    for n, w in cut.graph.weights.items():
        if n in was and width in was[n].shape and len(w.shape) <= 2 and n in axes:
            assert round(0.75 * width) in w.shape, n


def test_every_weight_of_a_gpt_loses_the_masked_quarter() -> None:
    model, x = model_of("gpt")
    tuned = randomize(P.insert_linear_op(model, x, rank=4))
    cut = P.fold_linear_op(P.shared_mask(tuned, x, ratio=0.25).model, x)
    shapes = {n: w.shape for n, w in cut.graph.weights.items()}
    assert shapes["embed.weight"] == (VOCABULARY, 24) and shapes["position.weight"] == (16, 24)
    assert shapes["head.weight"] == (VOCABULARY, 24) and shapes["norm.weight"] == (24,)
    for i in range(4):
        assert shapes[f"blocks.{i}.qkv.weight"] == (96, 24) and shapes[f"blocks.{i}.proj.weight"] == (24, 32)
        assert shapes[f"blocks.{i}.norm1.bias"] == (24,) and shapes[f"blocks.{i}.mlp.fc2.weight"] == (24, 48)
    before, after = fl.cost(fl.load(model, x)), fl.cost(cut.graph)
    assert after.parameters < 0.8 * before.parameters and after.macs < 0.8 * before.macs


def test_training_through_the_ops_on_both_front_ends() -> None:
    model, x = model_of("gpt_rms")
    for given in (model, exported(model, x)):
        losses: list[float] = []

        def train(module: nn.Module, losses: list[float] = losses) -> None:
            optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
            target = torch.roll(x[0], 1, 1)
            for _ in range(4):
                optimizer.zero_grad()
                loss = F.cross_entropy(module(x[0]).flatten(0, 1), target.flatten()) + 0.1 * identity_loss(module)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            assert identity_loss(module).item() > 0

        steps = [InsertLinearOp(rank=2, where="both"), SharedMask(ratio=0.25), P.FineTune(train), FoldLinearOp()]
        result = fl.Pipeline(steps).run(given, x)
        assert losses[-1] < losses[0]
        assert result.graph.weight("embed.weight").shape == (VOCABULARY, 24)
        assert result.plan.weights["embed.weight"][1] == result.plan.weights["norm.weight"][0]


def test_identity_loss_is_zero_for_fresh_ops_and_counts_by_hand() -> None:
    model, x = model_of("gpt")
    module = P.insert_linear_op(model, x, rank=2).model
    assert identity_loss(module).item() == 0
    names = dict(module.named_parameters())
    with torch.no_grad():
        names["pat_0_up"].fill_(0.1)
    d = torch.eye(WIDTH) + names["pat_0_down"] @ names["pat_0_up"]
    expected = (d @ d.T - torch.eye(WIDTH)).square().sum() / WIDTH
    assert identity_loss(module).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_mask_follows_the_criterion_and_fades_in() -> None:
    model, x = model_of("gpt")
    inserted = P.insert_linear_op(model, x)
    dull = lambda g, groups: (np.arange(g.size) * 7 % g.size).astype(float)  # noqa: E731
    masked = P.shared_mask(inserted.model, x, ratio=0.25, criterion=dull, round_to=8)
    assert np.flatnonzero(masked.graph.weight("pat_mask").numpy() == 0).tolist() == sorted(
        np.argsort(np.arange(32) * 7 % 32)[:8].tolist()
    )
    faint = P.shared_mask(inserted.model, x, kept=list(range(24)), value=0.5)
    assert set(faint.graph.weight("pat_mask").numpy().tolist()) == {0.5, 1.0}
    with pytest.raises(ConstraintError, match="zeros and ones"):
        P.fold_linear_op(faint.model, x)


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_a_learnt_mask_finds_the_channels_that_can_go(front: str) -> None:
    """The wanted outputs are those of the model without eight channels: training the mask alone tells which."""
    model, x = model_of("gpt_rms")
    gone = [1, 4, 9, 12, 17, 22, 25, 30]
    stays = [i for i in range(WIDTH) if i not in gone]
    given = model if front == "fx" else exported(model, x)
    inserted = P.insert_linear_op(given, x, rank=2, learn_mask=True)
    wanted = torch.from_numpy(run(P.shared_mask(inserted.model, x, kept=stays), x))
    with pytest.raises(ConstraintError, match="not trained"):
        P.shared_mask(inserted.model, x, ratio=0.25, criterion="mask")

    def train(module: nn.Module) -> None:
        named = getattr(module, "weight_names", {})
        mask = [p for n, p in module.named_parameters() if named.get(n, n).endswith("pat_mask")]
        assert len(mask) == 1 and mask_loss(module).item() == 1
        optimizer = torch.optim.Adam(mask, lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (module(x[0]) - wanted).square().mean() / wanted.square().mean() + 0.02 * mask_loss(module)
            loss.backward()
            optimizer.step()

    steps = [InsertLinearOp(rank=2, learn_mask=True), P.FineTune(train), SharedMask(ratio=0.25, criterion="mask")]
    masked = fl.Pipeline(steps).run(given, x)
    assert np.flatnonzero(masked.graph.weight("pat_mask").numpy() == 0).tolist() == gone
    by_weights = P.shared_mask(inserted.model, x, ratio=0.25)
    assert np.flatnonzero(by_weights.graph.weight("pat_mask").numpy() == 0).tolist() != gone
    cut = P.fold_linear_op(masked.model, x)
    assert close(wanted.numpy(), run(cut, x), 1e-4)
    assert cut.graph.weight("embed.weight").shape == (VOCABULARY, WIDTH - 8)


def test_errors() -> None:
    model, x = model_of("gpt")
    with pytest.raises(ConstraintError, match="no linear ops"):
        P.fold_linear_op(model, x)
    with pytest.raises(ConstraintError, match="no such axis group"):
        P.insert_linear_op(model, x, group="embd.weight:1")
    inserted = P.insert_linear_op(model, x).model
    with pytest.raises(ConstraintError, match="already"):
        P.insert_linear_op(inserted, x)
    with pytest.raises(ConstraintError, match="out of range"):
        P.shared_mask(inserted, x, ratio=1.0)
    with pytest.raises(ConstraintError, match="out of range"):
        P.shared_mask(inserted, x, kept=[32])
    with pytest.raises(ConstraintError, match="no linear ops"):
        identity_loss(model)
    with pytest.raises(ConstraintError, match="learns no mask"):
        mask_loss(inserted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_transformers_models(kind: str) -> None:
    transformers = timm_models.transformers()
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, use_cache=False,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=4, n_head=4, n_positions=32, use_cache=False)
        model = transformers.GPT2LMHeadModel(config)
    model = fill(model)
    x = {"input_ids": torch.randint(50, (2, 9))}
    inserted = P.insert_linear_op(model, x, rank=2, where="both")
    tuned = randomize(inserted)
    masked = P.shared_mask(tuned, x, ratio=0.25)
    cut = P.fold_linear_op(masked.model, x)
    assert close(run(masked, x), run(cut, x), 1e-4)
    assert fl.cost(cut.graph).parameters < 0.8 * fl.cost(fl.load(model, x)).parameters
