"""The parts of the fine-tuning and language-model benchmarks that their figures stand on, on tiny inputs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.resnet_cifar import resnet56
from support.timm_models import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import cifar_finetune_model as models
import cifar_finetune_prune as pruning
import cifar_finetune_train as training
import language_models as lm
import language_models_data as lm_data


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norm gains and biases drawn at random, so that no two channels are alike."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight, m.bias, m.running_mean):
                assert t is not None
                t.data.copy_(torch.randn(t.shape, generator=generator) * 0.3 + (1 if t is m.weight else 0))
    return model.eval()


@torch.no_grad()
def test_padded_and_gathered_shortcuts_and_convolutions_compute_the_option_a_shortcut() -> None:
    x = torch.randn(2, 16, 8, 8)
    wanted = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
    whole = models.sources(list(range(16)), list(range(32)), 8)
    assert whole == [-1] * 8 + list(range(16)) + [-1] * 8
    assert torch.equal(models.PaddedShortcut(8, 8)(x), wanted)
    assert torch.equal(models.GatheredShortcut(whole)(x), wanted)
    kept_in, kept_out = [1, 4, 5], [0, 9, 12, 13, 31]
    cut = models.sources(kept_in, kept_out, 8)
    assert torch.equal(models.GatheredShortcut(cut)(x[:, kept_in]), wanted[:, kept_out])
    base = lively(resnet56())
    images = torch.randn(2, 3, 32, 32)
    before = base(images)
    torch.testing.assert_close(models.with_convolutions(base)(images), before)


@pytest.mark.parametrize("text", ["foldline:l2/uniform", "foldline:l2/uniform/inner"])
def test_what_foldline_pruned_is_rebuilt_from_its_state_dict_at_the_macs_asked_for(text: str) -> None:
    base = lively(resnet56())
    full, parameters = models.cost(base)
    assert (full, parameters) == (125_485_696, 853_018)
    pairs = [(torch.randn(16, 3, 32, 32), torch.arange(16) % 10)]
    made = pruning.by_foldline(base, 1 / 2.1, pruning.Setting.parse(text), pairs, 0)  # type: ignore[arg-type]
    model = models.rebuild(made.state, made.shortcuts)
    assert models.cost(model)[0] / full == pytest.approx(1 / 2.1, rel=0.02)
    assert (models.widths(model)["between"][0] == 16) == text.endswith("inner")
    with pytest.raises(SystemExit):
        pruning.Setting.parse("foldline:l2/uniform/rewritten")


def test_images_are_shifted_and_mirrored_and_the_same_for_the_same_seed() -> None:
    pixels = torch.randint(1, 256, (8, 32, 32, 3), dtype=torch.uint8)
    labels = torch.arange(8)
    one, two = (training.Epochs(pixels, labels, 4, seed=5).epoch() for _ in range(2))
    assert torch.equal(one[0], two[0]) and one[0].shape == (2, 4, 32, 32, 3)
    padded = F.pad(pixels, (0, 0, 4, 4, 4, 4))
    mirrored = 0
    for image, label in zip(one[0].flatten(0, 1), one[1].flatten(), strict=True):
        windows = [padded[label, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
        plain = any(torch.equal(image, w) for w in windows)
        assert plain or any(torch.equal(image, w.flip(1)) for w in windows)
        mirrored += not plain
    assert 0 < mirrored < 8
    assert sorted(one[1].flatten().tolist()) == list(range(8))


def test_the_update_is_that_of_sgd_with_nesterov_momentum() -> None:
    torch.manual_seed(0)
    budget = training.Budget(1, batch=4, rate=0.1, clip=0.0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 10))
    twin = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 10))
    twin.load_state_dict(model.state_dict())
    trainee = training.Trainee("tiny", model, budget, "cpu", half=False, nhwc=False)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for step in range(3):
        pixels = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
        labels = torch.tensor([1, 2, 3, step])
        trainee.step(pixels, labels, torch.tensor(1.0))
        optimizer.zero_grad()
        F.cross_entropy(twin(training.normalized(pixels)), labels).backward()
        optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_all_networks_get_the_same_epochs_and_learn() -> None:
    torch.manual_seed(0)
    labels = torch.arange(64) % 2
    pixels = (labels.view(-1, 1, 1, 1) * 200 + torch.randint(0, 50, (64, 32, 32, 3))).to(torch.uint8)
    budget = training.Budget(3, batch=16, rate=0.1)
    nets = [nn.Sequential(nn.Conv2d(3, w, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(w, 10)) for w in (4, 8)]
    trainees = [training.Trainee(str(i), net, budget, "cpu", False, False) for i, net in enumerate(nets)]
    data = {"train": (pixels, labels), "test": (pixels, labels)}
    said: list[str] = []
    epochs, curves = training.train(trainees, data, budget, 0, 5, said.append, agree=lambda n: min(n, 2))
    assert epochs == 2 and [len(c) for c in curves.values()] == [2, 2]
    assert trainees[0].loss < 2.0 and "epoch 2/2" in said[-1]


@pytest.mark.parametrize(("shape", "kv_heads"), [("llama", 2), ("llama", 4), ("gpt2", 8)])
def test_language_models_lose_whole_heads_and_load_again(shape: str, kv_heads: int) -> None:
    transformers()
    tokens = torch.randint(0, lm_data.VOCABULARY, (20_000,), generator=torch.Generator().manual_seed(0))
    corpus = lm_data.Text(tokens[:16_000], tokens[16_000:], "random tokens")
    model = lm_data.build(shape, kv_heads)
    atoms = lm.atoms_of(shape, kv_heads)
    row = lm.one(model, atoms, "foldline", "l2", 0.5, False, corpus, corpus.held_out_sequences(4), 1)
    assert "failed" not in row, row
    assert row["heads"] == [{2: (4, 2), 4: (4, 2), 8: (4, 4)}[kv_heads]] * 4
    assert 500 < row["perplexity"] < 3000  # random tokens, random weights: near the 1024 of the vocabulary
    uniform = atoms if shape == "llama" else ["ffn"]
    told = lm.round_trip(model, uniform, corpus.held_out_sequences(4))
    assert float(told.split("difference ")[1].split(";")[0]) < 1e-4


class Attending(nn.Module):
    """Two heads of four channels between layers, as transformers write it: the number of heads follows the width."""

    def __init__(self, width: int = 8, seen: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(seen)
        self.q, self.k, self.v = (nn.Linear(seen, width) for _ in range(3))
        self.out = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(self.norm(x)).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("kept", "right"), [([4, 5, 6, 7], True), ([0, 1, 2, 3], True), ([0, 2, 4, 6], False), ([0, 1, 2, 5], False)]
)
def test_a_cut_is_right_where_it_is_the_original_without_the_removed_weights(kept: list[int], right: bool) -> None:
    """Whole heads may go; channels of two heads put together are another function, though it runs."""
    import masked

    torch.manual_seed(0)
    model, seen = Attending().double(), [0, 2, 3, 5]
    masked.distinct(model)
    pruned = Attending(4, 4).double()
    with torch.no_grad():
        for name, p in pruned.named_parameters():
            whole = dict(model.named_parameters())[name]
            if name.startswith("norm"):
                p.copy_(whole[seen])
            elif name.startswith("out"):
                p.copy_(whole[:, kept] if p.ndim == 2 else whole)
            else:
                p.copy_(whole[kept][:, seen] if p.ndim == 2 else whole[kept])

    class Cut(nn.Module):  # the original sees all inputs, the pruned one those that are left
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x[..., seen])

        def named_parameters(self, *args: object, **options: object) -> object:  # type: ignore[override]
            return self.inner.named_parameters()

    x = torch.zeros(2, 5, 6, dtype=torch.float64)
    x[..., seen] = torch.randn(2, 5, 4, dtype=torch.float64)
    found = masked.error(model, Cut(pruned), (x,))
    assert (found < masked.WRONG) is right
    assert found < masked.WRONG or found > 1e-3
