"""Recover: exact for linear combinations, better than slicing from each kind of data, alike on both front ends."""

from __future__ import annotations

import functools
from typing import Any

import foldline as fl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foldline import passes as P
from foldline.graph.actions import mask, select
from foldline.graph.errors import ConfigError, ConstraintError
from foldline.graph.execute import run_graph
from foldline.graph.groups import axis_groups
from foldline.passes.base import Reference
from foldline.passes.recover.layers import linear_op
from foldline.passes.recover.recover_pass import recover_graph
from foldline.passes.recover.solve import Normal, solve
from foldline.passes.recover.synthetic import coloured_noise, synthetic_inputs
from support.frontends import exported
from torch import nn


def drop(*gone: int) -> Any:
    """A criterion under which these indices of every group are the least important."""
    return lambda g, _: np.where(np.isin(np.arange(g.size), gone), 0.0, 1.0) + np.arange(g.size) * 1e-6


def outputs(result: Any, x: torch.Tensor) -> np.ndarray:
    return run_graph(result.graph, result.graph.bind((x,)))[0][0]


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


class Combined(nn.Module):
    """Two operators; output channel 1 of the first is 2 * channel 0 - channel 2, channel 3 is 0.5 * channel 4 (+ bias).

    Linear in between, so that what the second one reads is such a combination too.
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        with torch.no_grad():
            w, b = first.weight, first.bias
            w[1], b[1] = 2 * w[0] - w[2], 0.7
            w[3], b[3] = 0.5 * w[4], -0.3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


# A shift of the mean cannot be undone at a zero-padded border, so padded kernels get biases that combine likewise.
EXACT = {
    "linear": (lambda: (nn.Linear(7, 6), nn.Linear(6, 5)), (16, 7)),
    "tokens": (lambda: (nn.Linear(7, 6), nn.Linear(6, 5)), (4, 9, 7)),
    "conv": (lambda: (nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)), (4, 3, 12, 12)),
    "padded": (lambda: (nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, 2, padding=1)), (4, 3, 12, 12)),
    "dilated": (lambda: (nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3, 2, padding=2, dilation=2)), (4, 3, 12, 12)),
    "one axis": (lambda: (nn.Conv1d(3, 6, 3), nn.Conv1d(6, 4, 5, stride=2)), (8, 3, 40)),
    "three axes": (lambda: (nn.Conv3d(2, 6, 1), nn.Conv3d(6, 3, 2)), (4, 2, 6, 6, 6)),
    "transposed": (
        lambda: (nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 4, 3, 2, padding=1, output_padding=1)),
        (4, 3, 9, 9),
    ),
}


def combined(kind: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = EXACT[kind]
    model = Combined(*make())
    if kind in ("padded", "dilated", "transposed"):
        with torch.no_grad():
            b = model.first.bias
            b[1], b[3] = 2 * b[0] - b[2], 0.5 * b[4]
    return model.eval(), torch.randn(*shape)


@pytest.mark.parametrize("front", ["fx", "onnx"])
@pytest.mark.parametrize("kind", sorted(EXACT))
def test_exact_when_removed_channels_are_combinations_of_kept_ones(kind: str, front: str) -> None:
    model, x = combined(kind)
    wanted = model(x).detach().numpy()
    given = model if front == "fx" else exported(model, (x,))
    cut = P.Prune(criterion=drop(1, 3), ratio=1 / 3)
    sliced = fl.Pipeline([cut]).run(given, (x,))
    result = fl.Pipeline([cut, P.Recover(ridge=1e-9)]).run(given, (x,), calibration=[(torch.randn_like(x) + 0.3,)])
    assert relative(outputs(sliced, x), wanted) > 0.05
    assert relative(outputs(result, x), wanted) < 1e-4


def test_grouped_convolution_is_fitted_group_by_group() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, padding=1, groups=2)
    with torch.no_grad():
        for g in (0, 4):  # in each group channel 1 is 3 * channel 0 - channel 3
            first.weight[g + 1] = 3 * first.weight[g] - first.weight[g + 3]
            first.bias[g + 1] = 3 * first.bias[g] - first.bias[g + 3]
    model, x = nn.Sequential(first, second).eval(), torch.randn(4, 3, 10, 10)
    groups = axis_groups(fl.load(model, (x,)))
    inner = next(g for g in groups if g.can("select") and g.size == 4)
    criterion = lambda g, _: drop(1)(g, _)  # noqa: E731
    cut = P.Prune(criterion=criterion, ratio=0.25, atoms="all", ignore=[g.name for g in groups if g is not inner])
    result = fl.Pipeline([cut, P.Recover(ridge=1e-9)]).run(model, (x,), calibration=[(x,)])
    assert result.model[1].weight.shape == (6, 3, 3, 3)
    assert relative(outputs(result, x), model(x).detach().numpy()) < 1e-4


class Residual(nn.Module):
    """A block whose skip is cut too: conv, norm, relu, conv, norm, plus skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.a, self.na = nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.nb = nn.Conv2d(16, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.down, self.nd = nn.Conv2d(12, 24, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(24)
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))) + x)
        return self.head(F.relu(self.nd(self.down(x))).mean((2, 3)))


@functools.cache
def digits() -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A network trained for seconds on scikit-learn's digits, its training images, and test images with labels."""
    data = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed").load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 0.6
    y = torch.tensor(data.target)
    torch.manual_seed(0)
    model = Residual()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(8):
        for part in torch.randperm(1300).split(64):
            loss = F.cross_entropy(model(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval(), x[:1300], x[1300:], y[1300:]


def right(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


@functools.cache
def sliced() -> float:
    model, _, x, y = digits()
    return right(P.prune(model, (x[:2],), ratio=0.5, verify=False).model, x, y)


SOURCES = {
    "calibration": (P.Recover(), 0.15),
    "synthetic": (P.Recover(data="synthetic", samples=128, steps=30), 0.1),
    "moments": (P.Recover(data="moments"), 0.05),
}


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_each_source_of_data_beats_slicing(source: str) -> None:
    model, train, x, y = digits()
    recover, margin = SOURCES[source]
    calibration = [train[:256]] if source == "calibration" else None
    result = fl.Pipeline([P.Prune(ratio=0.5), recover]).run(model, (x[:2],), calibration=calibration)
    assert right(model, x, y) > 0.9
    assert right(result.model, x, y) > sliced() + margin
    details = result.report.passes[1].details
    assert details["corrected"] and details["mean_error_after"] < details["mean_error_before"]
    assert "error" in result.report.explain("down.weight")


@pytest.mark.parametrize("source", ["calibration", "moments"])
def test_both_front_ends_give_the_same(source: str) -> None:
    model, train, x, _ = digits()
    pipe = fl.Pipeline([P.Prune(ratio=0.4), P.Recover(data=source, ridge=1e-3)])
    batch = train[:64]
    # The exporter's own optimizer would fold the norms, and the criterion would judge other weights.
    program = torch.onnx.export(model, (batch,), dynamo=True, optimize=False, verbose=False)
    results = [pipe.run(m, (batch,), calibration=[batch]) for m in (model, program.model_proto)]
    assert results[0].graph.nodes and any(n.op == "batch_norm" for n in results[1].graph.nodes)
    a, b = (outputs(r, batch) for r in results)
    assert relative(a, b) < 1e-3


def test_same_input_same_bytes_and_the_model_stays() -> None:
    model, train, x, _ = digits()
    before = {k: v.numpy().tobytes() for k, v in model.state_dict().items()}
    pipe = fl.Pipeline([P.Prune(ratio=0.4), P.Recover(rows=500)])
    states = [pipe.run(model, (x[:2],), calibration=[train[:64]]).model.state_dict() for _ in range(2)]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert {k: v.numpy().tobytes() for k, v in model.state_dict().items()} == before
    again = fl.Pipeline([P.Prune(ratio=0.4), P.Recover(data="synthetic", samples=32, steps=3)])
    states = [again.run(model, (x[:2],)).model.state_dict() for _ in range(2)]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_the_sum_with_the_skip_comes_closer_to_the_original() -> None:
    """What the skip lacks is made up for by the branch: the error after the addition falls."""
    model, train, x, _ = digits()

    def error(sums: bool) -> float:
        graph = fl.load(model, (x[:2],))
        before = graph.clone()
        groups = axis_groups(graph)
        g = groups["stem.weight:0"]
        kept = np.arange(0, g.size, 2)
        plan = select(groups, {g: kept})
        recover_graph(graph, Reference(before, plan), [(train[:200],)], sums=sums)
        add = next(n for n in graph.nodes if n.op == "add").output.name
        inputs = graph.bind((x[:100],))
        a, b = (run_graph(h, inputs, [add])[1][add] for h in (before, graph))
        return float(np.square(a[:, kept] - b).sum() / np.square(a[:, kept]).sum())

    # The kept channels of the skip are the original's; the stem is only sliced, so there is nothing to make up for.
    assert error(True) == pytest.approx(error(False), rel=1e-6)

    def deep(sums: bool) -> float:
        torch.manual_seed(1)
        model, data = nn.Sequential(Block(6), Block(24)).eval(), torch.randn(200, 6)
        pipe = fl.Pipeline([P.Prune(ratio=0.5), P.Recover(sums=sums, ridge=1e-9)])
        result = pipe.run(model, (data[:2],), calibration=[data])
        return float((result.model(data) - model(data)).detach().square().sum())

    # What the narrow first block loses is linear in the skip: the wide second one can put it back.
    assert deep(True) < 1e-4 * deep(False)


class Block(nn.Module):
    """x + W2 W1 x of the given inner width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, width), nn.Linear(width, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(self.a(x))


def test_nothing_is_touched_where_nothing_differs() -> None:
    """Removed channels that are zero anyway: no output differs, so no weight changes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    with torch.no_grad():
        model[0].weight[[1, 5]], model[0].bias[[1, 5]] = 0.0, 0.0
        model[2].weight[2], model[2].bias[2] = 0.0, 0.0
    x = torch.randn(64, 6)
    cut = P.Prune(criterion=lambda g, _: drop(1, 5)(g, _) if g.size == 8 else drop(2)(g, _), ratio=0.25)
    plain = fl.Pipeline([cut]).run(model, (x,))
    for data in ("calibration", "synthetic"):
        result = fl.Pipeline([cut, P.Recover(data=data)]).run(model, (x,), calibration=[x])
        for name, tensor in plain.model.state_dict().items():
            assert torch.equal(result.model.state_dict()[name], tensor), (data, name)


def test_batch_norm_remembers_the_mean_and_variance_it_meets() -> None:
    """A norm over a concatenation has no operator before it to take the shift: its statistics are re-estimated."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
            self.norm, self.out = nn.BatchNorm2d(14), nn.Conv2d(14, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = F.relu(self.a(x))
            return self.out(F.relu(self.norm(torch.cat([a, self.b(a)], 1))))

    torch.manual_seed(0)
    model, x = Dense(), torch.randn(32, 2, 8, 8)
    model(x)  # lets the norm see something
    model.eval()
    graph = fl.load(model, (x,))
    before, groups = graph.clone(), axis_groups(graph)
    g = groups["a.weight:0"]
    plan = select(groups, {g: np.array([0, 2, 4, 6])})
    recover_graph(graph, Reference(before, plan), [(x,)], ridge=1e-6)
    name = next(n for n in graph.nodes if n.op == "batch_norm").output.name
    inputs = graph.bind((x,))
    a, b = (run_graph(h, inputs, [name])[1][name] for h in (before, graph))
    a = a[:, [0, 2, 4, 6, *range(8, 14)]]
    assert np.allclose(a.mean((0, 2, 3)), b.mean((0, 2, 3)), atol=1e-4)
    assert np.allclose(a.std((0, 2, 3)), b.std((0, 2, 3)), rtol=1e-3)


def test_the_masked_original_recovers_to_the_same() -> None:
    """Slicing and masking are one: recovering against the original gives one network, whichever is looked at."""
    model, train, x, _ = digits()
    graph = fl.load(model, (x[:2],))
    groups = axis_groups(graph)
    g = groups["a.weight:0"]
    masked = mask(groups, {g: np.arange(8)})
    before = graph.clone()
    plan = select(groups, {g: np.arange(8)})
    inputs = graph.bind((x[:50],))
    assert relative(run_graph(graph, inputs)[0][0], run_graph(masked, inputs)[0][0]) < 1e-4
    found = recover_graph(graph, Reference(before, plan), [(train[:128],)])
    assert set(found.errors) >= {"b.weight"} and "stem.weight" not in found.errors and "a.weight" not in found.errors
    wanted, now, was = (run_graph(h, inputs)[0][0] for h in (before, graph, masked))
    assert np.square(now - wanted).sum() < 0.5 * np.square(was - wanted).sum()


def test_attention_heads_are_made_up_for_by_the_projections() -> None:
    from support.toys import toy

    model, (x, *rest) = toy("vision_transformer")
    torch.manual_seed(0)
    batch = (torch.randn(32, *x.shape[1:]), *rest)
    pipe = [P.Prune(ratio=0.3, ignore=["*embed*", "*head*"])]
    plain = fl.Pipeline(pipe).run(model, batch)
    result = fl.Pipeline([*pipe, P.Recover()]).run(model, batch, calibration=[batch])
    wanted = run_graph(fl.load(model, batch), fl.load(model, batch).bind(batch))[0][0]
    errors = [np.square(run_graph(r.graph, r.graph.bind(batch))[0][0] - wanted).sum() for r in (plain, result)]
    assert errors[1] < 0.7 * errors[0]


def test_shared_weights_are_left_with_a_reason() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.b(F.relu(self.b(F.relu(self.a(x))))))

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(64, 5)
    result = fl.Pipeline([P.Prune(ratio=0.25), P.Recover()]).run(model, (x,), calibration=[x])
    assert "shared" in result.report.explain("b.weight")
    assert result.model.c.weight.shape == (3, 6)


def test_errors() -> None:
    model, train, x, _ = digits()
    with pytest.raises(ConfigError, match="needs calibration data"):
        fl.Pipeline([P.Prune(ratio=0.5), P.Recover()]).run(model, (x[:2],))
    with pytest.raises(ConstraintError, match="requires 'pruned'"):
        fl.Pipeline([P.Recover()])
    with pytest.raises(ConstraintError, match="empty"):
        fl.Pipeline([P.Prune(ratio=0.5), P.Recover(calibration=[])]).run(model, (x[:2],))
    with pytest.raises(ConstraintError, match="rewritten"):
        fl.Pipeline([P.Prune(ratio=0.5), P.Fold(), P.Recover(data="moments")]).run(model, (x[:2],))
    with pytest.raises(ConfigError, match="data"):
        P.Recover(data="dreams")


def test_least_squares_by_hand() -> None:
    rng = torch.Generator().manual_seed(0)
    x, noise = torch.randn(1, 400, 5, generator=rng).double(), torch.randn(1, 400, 3, generator=rng).double()
    w = torch.randn(1, 3, 5, generator=rng).double()
    y = x @ w.transpose(1, 2) + 2.0 + 0.1 * noise
    folds = [Normal(1, 5, 3) for _ in range(2)]
    for fold, part in zip(folds, (slice(0, 200), slice(200, 400)), strict=True):
        fold.update(x[:, part], y[:, part])
    found = solve(folds, torch.zeros(1, 3, 5).double(), 0.0, True)
    design = torch.cat([x[0], torch.ones(400, 1).double()], 1)
    by_hand = torch.linalg.lstsq(design, y[0]).solution
    assert torch.allclose(found.matrix[0], by_hand[:5].T, atol=1e-8)
    assert torch.allclose(found.shift[0], by_hand[5], atol=1e-8)
    residual = (y[0] - design @ by_hand).square().mean(0).sum() / y[0].var(0, unbiased=False).sum()
    assert found.after == pytest.approx(float(residual), rel=1e-6)
    # So strong a ridge leaves the old weights: shrinking is towards them, not towards zero.
    old = torch.ones(1, 3, 5).double()
    assert torch.allclose(solve(folds, old, 1e9, True).matrix, old, atol=1e-6)


def test_fewer_rows_than_columns_still_generalise() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 5)).eval()
    x = torch.randn(500, 10)
    cut = P.Prune(ratio=0.25)
    plain = fl.Pipeline([cut]).run(model, (x,))
    result = fl.Pipeline([cut, P.Recover()]).run(model, (x,), calibration=[torch.randn(24, 10)])
    wanted = model(x).detach()
    assert (result.model(x) - wanted).square().sum() < (plain.model(x) - wanted).square().sum()


def test_made_up_inputs() -> None:
    noise = coloured_noise((64, 3, 32, 32), 0)
    assert abs(noise.mean()) < 1e-9 and noise.std() == pytest.approx(1)
    power = np.square(np.abs(np.fft.fft2(noise))).mean((0, 1))
    assert power[0, 2] / power[0, 8] == pytest.approx(16, rel=0.5)
    assert np.corrcoef(noise[:, 0].ravel(), noise[:, 1].ravel())[0, 1] > 0.4

    model, _, x, _ = digits()
    graph = fl.load(model, (x[:2],))
    node = next(n for n in graph.nodes if n.op == "batch_norm" and "na" in n.scope)
    losses = []
    for steps in (0, 20):
        batches = synthetic_inputs(graph, 32, steps=steps)
        found = run_graph(graph, batches[0], [node.inputs[0].name])[1][node.inputs[0].name]
        mean, var = node.inputs[3].const(), node.inputs[4].const()
        losses.append(float((np.square(found.mean((0, 2, 3)) - mean) / var).mean()))
    assert losses[1] < 0.5 * losses[0]


def test_weights_as_matrices_there_and_back() -> None:
    for kind in EXACT:
        model, x = combined(kind)
        for node in fl.load(model, (x,)).nodes:
            op = linear_op(node)
            if not isinstance(op, str):
                data = op.weight.const()
                assert np.array_equal(op.tensor(op.matrix(data), data), data), kind
