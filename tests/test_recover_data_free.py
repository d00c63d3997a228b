"""Data-free roads: words made up in the form of the examples, allocation after repair, and the guard of moments."""

from __future__ import annotations

import foldline as fl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foldline import passes as P
from foldline.graph.execute import run_graph
from foldline.passes.recover.synthetic import synthetic_inputs
from foldline.passes.recover.tokens import framed, probabilities
from support.frontends import exported
from torch import nn


class Words(nn.Module):
    """Token ids, mask and token types -> the masked mean after a feed-forward block."""

    def __init__(self, trained: int = 80) -> None:
        super().__init__()
        self.words, self.types = nn.Embedding(120, 16), nn.Embedding(2, 16)
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(48, 16)
        with torch.no_grad():
            self.words.weight[trained:] *= 0.1

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.words(ids) + self.types(types))
        x = x + self.down(F.gelu(self.up(x)))
        m = mask.unsqueeze(-1).to(x.dtype)
        return (x * m).sum(1) / m.sum(1)


def words() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    ids = torch.tensor([[101, 5, 17, 30, 8, 102, 0, 0], [101, 9, 23, 102, 0, 0, 0, 0], [101, 4, 6, 7, 40, 41, 42, 102]])
    return Words().eval(), (ids, (ids > 0).long(), torch.zeros_like(ids))


def test_the_form_of_examples_is_told_from_their_words() -> None:
    _, (ids, mask, _) = words()
    wordless = framed(ids.numpy())
    assert np.array_equal(wordless, (ids > 100).numpy() | (mask == 0).numpy())
    assert framed(ids.numpy()[2:])[0].tolist() == [True, *[False] * 6, True]
    assert framed(np.array([[3, 4, 5, 6], [7, 8, 9, 1]])).sum() == 0


def test_untrained_rows_are_never_drawn_and_first_ones_most_often() -> None:
    table = np.random.default_rng(0).standard_normal((100, 64))
    table[:10] *= 0.01
    chance = probabilities(table)
    assert chance.sum() == pytest.approx(1) and not chance[:10].any()
    assert chance[10] == chance.max() and chance[10] / chance[-1] == pytest.approx((90 + 20) / (1 + 20))


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_words_are_made_up_in_the_form_of_the_examples(front: str) -> None:
    model, example = words()
    graph = fl.load(model if front == "fx" else exported(model, example), example)
    names = [v.name for v in graph.inputs]
    batches = synthetic_inputs(graph, 70, examples=example, seed=3)
    made = {n: np.concatenate([b[n] for b in batches]) for n in names}
    again = synthetic_inputs(graph, 70, examples=example, seed=3)
    assert all(np.array_equal(a[n], b[n]) for a, b in zip(batches, again, strict=True) for n in names)
    ids, mask, types = (made[n] for n in names)
    given = [e.numpy() for e in example]
    size = len(batches[0][names[0]])  # 3 where the file says so
    rows = np.arange(size) % 3
    assert np.array_equal(mask[:size], given[1][rows]) and np.array_equal(types[:size], given[2][rows])
    inner = (mask == 1) & ~np.isin(ids, (101, 102))
    assert np.array_equal(ids[:size] == 101, given[0][rows] == 101)
    assert np.array_equal(ids[mask == 0], np.zeros((mask == 0).sum()))
    assert ids[inner].max() < 80 and len(np.unique(ids[inner])) > 20
    assert run_graph(graph, batches[0])[0][0].shape == (size, 16)


def test_made_up_words_repair_a_token_model() -> None:
    model, example = words()
    cut = P.Prune(criterion="l2", ratio=0.5)
    torch.manual_seed(1)
    ids = torch.cat([torch.full((32, 1), 101), torch.randint(1, 80, (32, 6)), torch.full((32, 1), 102)], 1)
    real = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    with torch.no_grad():
        wanted = model(*real)
        errors = [
            float((fl.Pipeline(steps).run(model, example).model(*real) - wanted).square().mean())
            for steps in ([cut], [cut, P.Recover(data="synthetic", samples=128)])
        ]
    assert errors[1] < 0.5 * errors[0]


class TwoHidden(nn.Module):
    """Two hidden widths: of the first half the channels are copies, of the second half have little say."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na, self.b = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1)
        self.c, self.nc, self.d = nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(F.relu(self.nc(self.c(self.b(F.relu(self.na(self.a(x))))))))


def two_hidden() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = TwoHidden()
    with torch.no_grad():
        model.a.weight[8:] = model.a.weight[:8]
        model.d.weight[:, 8:] *= 0.5
    x = torch.randn(32, 3, 8, 8)
    model.train()
    for norm in (model.na, model.nc):
        norm.momentum = None
    with torch.no_grad():
        for _ in range(3):  # the second norm's statistics follow the first's
            model(x)
    return model.eval(), x


class Letters(nn.Module):
    """A vocabulary of 30, as models of characters have."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cell, self.up, self.down = (
            nn.Embedding(30, 24),
            nn.LSTM(24, 32, batch_first=True),
            nn.Linear(32, 64),
            nn.Linear(64, 5),
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.up(self.cell(self.table(ids))[0])))


def test_small_vocabularies_are_drawn_from_too() -> None:
    torch.manual_seed(1)
    model, ids, unseen = Letters().eval(), torch.randint(0, 30, (2, 9)), torch.randint(0, 30, (32, 9))
    made = synthetic_inputs(fl.load(model, (ids,)), 64, examples=(ids,))
    assert len(np.unique(np.concatenate([b["ids"] for b in made]), axis=0)) > 60
    cut = P.Prune(ratio=0.5)
    errors = []
    for passes in ([cut], [cut, P.Recover(data="synthetic")]):
        small = fl.Pipeline(passes).run(model, (ids,), verify=False).model
        with torch.no_grad():
            errors.append(float((small(unseen) - model(unseen)).norm() / model(unseen).norm()))
    assert errors[1] < 0.5 * errors[0]


def test_allocation_after_repair_cuts_where_channels_stand_in_for_each_other() -> None:
    model, x = two_hidden()
    names = ("a.weight", "c.weight")
    first = lambda g, _: -np.arange(g.size, dtype=float)  # noqa: E731  (the last ones go first)
    lost, kept = {}, {}
    for repair in (False, True):
        cut = P.Prune(
            criterion=first, target=fl.macs(0.75), scope="layerwise", repair=repair, samples=32, ignore=["b.bias"]
        )
        result = fl.Pipeline([cut, P.Recover(data="moments")]).run(model, (x[:4],), calibration=[x], verify=False)
        kept[repair] = [dict(result.model.state_dict())[n].shape[0] for n in names]
        with torch.no_grad():
            lost[repair] = float((result.model(x) - model(x)).square().mean())
        assert result.report.passes[0].details["distortion"]["repaired"] is repair
    assert kept[True][0] < kept[False][0] and kept[True][1] > kept[False][1]
    assert lost[True] < 0.5 * lost[False]


class Unrelated(nn.Module):
    """Nothing is known of the correlations under the norm, which centres its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(torch.sin(self.a(x))))


def test_moments_leave_alone_what_they_would_not_improve() -> None:
    torch.manual_seed(0)
    model, x = Unrelated().eval(), torch.randn(2, 3, 5, 5)
    cut = P.Prune(ratio=0.5)
    plain = fl.Pipeline([cut]).run(model, (x,))
    result = fl.Pipeline([cut, P.Recover(data="moments")]).run(model, (x,))
    assert torch.equal(result.model.b.weight, plain.model.b.weight)
    assert "would not fall" in result.report.explain("b.weight")


class Grouped(nn.Module):
    """Four channel groups after a norm, read by a strided convolution; in each group two channels copy the others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.c = nn.Conv2d(16, 8, 3, stride=2, padding=1, groups=4), nn.Conv2d(8, 5, 1)
        with torch.no_grad():
            for of in (self.a.weight, self.a.bias):
                of.unflatten(0, (4, 4))[:, 2:] = of.unflatten(0, (4, 4))[:, :2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(F.relu(self.norm(self.a(x)))))


def test_moments_correct_grouped_convolutions_group_by_group() -> None:
    torch.manual_seed(0)
    model, x = Grouped(), torch.randn(16, 3, 12, 12)
    model.norm.momentum = None
    model.train()(x)
    model.eval()
    groups = fl.axis_groups(fl.load(model, (x,)))
    inner = next(g for g in groups if g.can("select") and g.nested and g.size == 4)  # the same channels of all groups
    options = {"criterion": lambda g, _: -np.arange(g.size, dtype=float), "atoms": "all"}
    cut = P.Prune(ratio=0.5, ignore=[g.name for g in groups if g is not inner], **options)

    def error(*passes: P.Pass) -> float:
        small = fl.Pipeline([*passes]).run(model, (x,), verify=False).model
        with torch.no_grad():
            assert small.b.weight.shape == (8, 2, 3, 3)
            return float((small(x) - model(x)).norm() / model(x).norm())

    assert error(cut) > 0.1
    assert error(cut, P.Recover(data="moments")) < 0.01
    assert error(cut, P.Recover(data="moments", ridge=1e-9)) < 1e-4
    # Whole groups go too, down to one: what is left of them is still told by the group it comes from.
    for ratio, left in ((0.5, 2), (0.75, 1)):
        pipe = fl.Pipeline([P.Prune(ratio=ratio, **options), P.Recover(data="moments")])
        result = pipe.run(model, (x,), verify=False)
        assert result.model.b.groups == left and result.model(x).shape == model(x).shape
        assert "removed channels expressed" in result.report.explain("b.weight")
