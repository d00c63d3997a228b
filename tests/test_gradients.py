"""Gradients on both front ends: losses, mean and sample gradients, Kronecker factors, Hessians; no batching shows."""

from __future__ import annotations

from typing import Any

import foldline as fl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foldline.graph.errors import ConfigError, ConstraintError
from foldline.graph.groups import AxisGroups, axis_groups
from foldline.passes import sample_gradients as sampled
from foldline.passes.gradients import Differentiable, Example, drawn_target, examples, losses_of, mean_gradients
from foldline.passes.sample_gradients import hessian_diagonal, kronecker_factors, sample_gradients
from foldline.passes.sites import SampleAxis, Site, uses_as_matrix
from support.frontends import FRONT_ENDS, toy_graph
from support.toys import toy
from torch import nn

X = {"x": np.zeros((4, 1), np.float32)}


def test_cross_entropy_of_classes_sequences_and_maps() -> None:
    for shape, axis in (((4, 7), 1), ((4, 5, 7), 2), ((4, 7, 3, 2), 1)):
        output = torch.randn(shape)
        target = torch.randint(0, 7, tuple(s for i, s in enumerate(shape) if i != axis))
        found = losses_of(output, Example(X, target), "cross_entropy", 0)
        own = F.cross_entropy(output.movedim(axis, 1), target, reduction="none")
        assert torch.allclose(found, own.reshape(4, -1).mean(1), atol=1e-6)
    soft = torch.rand(4, 7).softmax(1)
    found = losses_of(output := torch.randn(4, 7), Example(X, soft), "cross_entropy", 0)
    assert torch.allclose(found, F.cross_entropy(output, soft, reduction="none"), atol=1e-6)


def test_ignored_targets_count_for_nothing() -> None:
    output, target = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    target[0, 2:] = -100
    found = losses_of(output, Example(X, target), "cross_entropy", 0)
    assert torch.allclose(found[0], F.cross_entropy(output[0, :2], target[0, :2]), atol=1e-6)
    assert torch.allclose(found.mean(), (F.cross_entropy(output[0, :2], target[0, :2]) + found[1]) / 2)


def test_own_losses_see_one_sample_at_a_time_and_must_be_numbers() -> None:
    output, target = torch.randn(3, 4), {"y": torch.randn(3, 4)}
    found = losses_of(output, Example(X, target), lambda o, t: (o - t["y"]).abs().sum(), 0)
    assert torch.allclose(found, (output - target["y"]).abs().sum(1))
    with pytest.raises(ConstraintError, match="one finite number"):
        losses_of(output, Example(X, target), lambda o, t: o, 0)
    with pytest.raises(ConfigError, match="needs targets"):
        losses_of(output, Example(X), lambda o, t: o.sum(), 0)


def test_bad_data_says_what_to_pass() -> None:
    graph = toy_graph("plain_cnn", "fx")
    with pytest.raises(ConfigError, match=r"data=.*calibration="):
        next(examples(graph, None, None))
    with pytest.raises(ConfigError, match="not a pair"):
        next(examples(graph, [torch.zeros(2, 3, 12, 12)], None))
    with pytest.raises(ConstraintError, match="does not fit"):
        losses_of(torch.randn(4, 7), Example(X, torch.zeros(3, dtype=torch.long)), "cross_entropy", 0)
    with pytest.raises(ConstraintError, match="does not fit"):
        losses_of(torch.randn(4, 7), Example(X, torch.zeros(4)), "mse", 0)
    for wrong in (7, -1):  # -1 is no class either, and no class 0
        with pytest.raises(ConstraintError, match="names a class") as caught:
            losses_of(torch.randn(2, 7), Example(X, torch.tensor([1, wrong])), "cross_entropy", 0)
        assert caught.value.found == wrong
    assert losses_of(torch.randn(2, 7), Example(X, torch.tensor([1, -100])), "cross_entropy", 0)[1] == 0
    with pytest.raises(ConfigError, match="unknown loss"):
        losses_of(torch.randn(4, 7), Example(X, torch.zeros(4)), "hinge", 0)
    with pytest.raises(ConstraintError, match="empty"):
        mean_gradients(graph, [next(iter(graph.weights))], [])


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_drawn_targets_follow_the_model_and_not_the_batching(loss: str) -> None:
    output = torch.tensor([[2.0, 0.0, -1.0]]).expand(4000, 3)
    inputs = {"x": np.arange(4000, dtype=np.float32)[:, None]}
    drawn = drawn_target(output, inputs, loss, 0)
    again = torch.cat([drawn_target(output[:9], {"x": inputs["x"][i : i + 9]}, loss, 0) for i in (0, 9)])
    assert torch.equal(drawn[:18], again)
    if loss == "mse":
        assert np.allclose((drawn - output).numpy().var(0), 3 / 2, atol=0.15)
    else:
        share = np.bincount(drawn.numpy(), minlength=3) / 4000
        assert np.allclose(share, output[0].softmax(0).numpy(), atol=0.03)


def test_gradients_are_those_of_the_module_and_leave_it_alone() -> None:
    model, (x,) = toy("residual_cnn")
    target = torch.randint(0, 5, (len(x),))
    graph = fl.load(model, (x,))
    names = [n for n, w in graph.weights.items() if w.trainable]
    found, count = mean_gradients(graph, names, examples(graph, [(x, target)], None))
    assert count == len(x) and all(p.grad is None for p in model.parameters())
    F.cross_entropy(model(x), target).backward()
    own = dict(model.named_parameters())
    for name in names:
        grad = own[name].grad
        assert grad is not None and np.allclose(found[name], grad.numpy(), atol=1e-6), name


def test_only_the_weights_named_are_differentiated() -> None:
    for front in FRONT_ENDS:
        graph = toy_graph("vision_transformer", front)
        name = next(n for n, w in graph.weights.items() if w.trainable)
        function = Differentiable(graph, [name])
        assert set(function.leaves) == {name} and function.leaves[name].requires_grad
        if front == "fx":
            assert function.leaves[name].data_ptr() != graph.tensors[name].data_ptr()  # type: ignore[attr-defined]


NETS = ["residual_cnn", "grouped_convs", "transposed_convs", "conv1d_net", "vision_transformer", "window_attention",
        "shared_module", "torch_mha", "lstm"]  # fmt: skip


def labelled(name: str) -> list[tuple[Any, torch.Tensor]]:
    model, inputs = toy(name)
    with torch.no_grad():
        output = model(*inputs)
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    return [(inputs if len(inputs) > 1 else inputs[0], target)]


def matrices(groups: AxisGroups) -> list[str]:
    return [n for n, w in groups.graph.weights.items() if uses_as_matrix(w)]


def collected(groups: AxisGroups, names: list[str], data: list[Any]) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {n: [] for n in names}
    for _, at, name, grads in sample_gradients(groups, names, examples(groups.graph, data, None), "mse"):
        assert at == sum(map(len, found[name]))
        found[name].append(grads.detach().double().numpy())
    return {n: np.concatenate(parts) for n, parts in found.items()}


@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("name", NETS)
def test_sample_gradients_are_those_of_samples_alone(name: str, front: str, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = axis_groups(toy_graph(name, front))
    names, data = matrices(groups), labelled(name)
    fast = collected(groups, names, data)
    monkeypatch.setattr(sampled, "sites_of", lambda weight: None)
    slow = collected(groups, names, data)
    for n in names:
        top = max(np.abs(slow[n]).max(), 1e-6)
        assert fast[n].shape == slow[n].shape and np.abs(fast[n] - slow[n]).max() < 1e-4 * top, n


@pytest.mark.parametrize("name", ["grouped_convs", "transposed_convs", "window_attention", "conv1d_net"])
def test_the_samples_are_found_in_every_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One backward pass per batch, not one per sample: no layer falls back."""
    groups = axis_groups(toy_graph(name, "fx"))
    assert SampleAxis(groups).atom is not None
    calls = []
    real = sampled.gradients
    monkeypatch.setattr(sampled, "gradients", lambda *a, **k: calls.append(1) or real(*a, **k))
    collected(groups, matrices(groups), labelled(name))
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["residual_cnn", "grouped_convs", "transposed_convs", "vision_transformer"])
def test_factors_multiply_to_the_gradient(name: str) -> None:
    """left @ right^T over all positions is the gradient of the weight, in its own layout."""
    groups = axis_groups(toy_graph(name, "fx"))
    sites = [s for w in groups.graph.weights.values() for s in uses_as_matrix(w)]
    taps = [v.name for s in sites for v in (s.x, s.y)]
    function = Differentiable(groups.graph, [s.weight.name for s in sites], taps)
    example = next(examples(groups.graph, labelled(name), None))
    outputs, values = function(example.inputs)
    losses = losses_of(outputs[0], example, "mse", 0)
    by = {**{s.y.name: values[s.y.name] for s in sites}, **function.leaves}
    grads = dict(zip(by, torch.autograd.grad(losses.sum(), list(by.values())), strict=True))
    for s in sites:
        left, right = s.factors(values[s.x.name], grads[s.y.name])
        product = (left @ right.transpose(1, 2)).reshape(s.weight.shape)
        assert torch.allclose(product, grads[s.weight.name], atol=1e-5), s.weight.name


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.fc = nn.Linear(4 * 9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(torch.tanh(self.conv(x)).flatten(1))
        return out


def small() -> tuple[AxisGroups, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Small().eval(), torch.randn(12, 2, 6, 6)
    return axis_groups(fl.load(model, (x[:2],))), x, torch.randint(0, 3, (12,))


def split(x: torch.Tensor, y: torch.Tensor, sizes: list[int], order: list[int] | None = None) -> list[Any]:
    rows = torch.arange(len(x)) if order is None else torch.tensor(order)
    return list(zip(x[rows].split(sizes), y[rows].split(sizes), strict=True))


def test_nothing_depends_on_order_or_split_of_the_batches() -> None:
    groups, x, y = small()
    names = ["conv.weight", "fc.weight"]
    order = torch.randperm(12).tolist()
    one, other = split(x, y, [12]), split(x, y, [5, 1, 6], order)
    a, b = ({n: (g**2).mean(0) for n, g in collected_ce(groups, names, d).items()} for d in (one, other))
    c, d = (hessian_diagonal(groups, names, examples(groups.graph, data, None), 4) for data in (one, other))
    for n in names:
        assert np.allclose(a[n], b[n], rtol=1e-4, atol=1e-9) and np.allclose(c[n], d[n], rtol=1e-3, atol=1e-7)
    for f, g in zip(*(kronecker(groups, names, data) for data in (one, other)), strict=True):
        assert torch.allclose(f.left, g.left, rtol=1e-4, atol=1e-9)
        assert torch.allclose(f.right, g.right, rtol=1e-4, atol=1e-9)


def collected_ce(groups: AxisGroups, names: list[str], data: list[Any]) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {n: [] for n in names}
    for _, _, name, grads in sample_gradients(groups, names, examples(groups.graph, data, None)):
        found[name].append(grads.detach().double().numpy())
    return {n: np.concatenate(parts) for n, parts in found.items()}


def kronecker(groups: AxisGroups, names: list[str], data: list[Any]) -> list[sampled.Kronecker]:
    return list(kronecker_factors(groups, names, lambda: examples(groups.graph, data, None)))


def test_kronecker_factors_in_portions_are_the_same() -> None:
    groups, x, y = small()
    names, data = ["conv.weight", "fc.weight"], split(x, y, [12])
    passes = []

    def read() -> Any:
        passes.append(1)
        return examples(groups.graph, data, None)

    portions = list(kronecker_factors(groups, names, read, memory=1))
    assert len(passes) == 2
    for f, g in zip(portions, kronecker(groups, names, data), strict=True):
        assert isinstance(f.site, Site) and torch.equal(f.left, g.left) and torch.equal(f.right, g.right)


def test_the_hessian_diagonal_is_the_true_one() -> None:
    """Exact where the Hessian is diagonal (one probe is enough), unbiased otherwise."""
    groups, x, y = small()
    w = groups.graph.weights["fc.weight"].numpy()
    found = hessian_diagonal(groups, ["fc.weight"], examples(groups.graph, split(x, y, [4, 8]), None), 400)["fc.weight"]
    conv = groups.graph.weights["conv.weight"].numpy(), groups.graph.weights["conv.bias"].numpy()
    z = torch.tanh(F.conv2d(x, torch.tensor(conv[0]), torch.tensor(conv[1]), stride=2, padding=1)).flatten(1)
    p = (z @ torch.tensor(w).T + torch.tensor(groups.graph.weights["fc.bias"].numpy())).softmax(1)
    exact = ((p * (1 - p)).T @ z.square() / len(x)).numpy()
    assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] > 0.9
    assert abs(found.mean() / exact.mean() - 1) < 0.1


def test_operators_without_a_second_derivative_are_differenced(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, x, y = small()
    data = split(x, y, [12])
    exact = hessian_diagonal(groups, ["fc.weight"], examples(groups.graph, data, None), 2)["fc.weight"]
    monkeypatch.setattr(sampled, "_second", lambda *a: None)
    near = hessian_diagonal(groups, ["fc.weight"], examples(groups.graph, data, None), 2)["fc.weight"]
    assert np.abs(near - exact).max() < 0.02 * np.abs(exact).max()


def test_kronecker_factors_are_means_over_samples_and_positions() -> None:
    """E[sum_t a a^T] (x) E[mean_t g g^T]: the product of both sums over samples * rows, rows = samples * positions."""
    groups, x, y = small()
    (f,) = kronecker(groups, ["conv.weight"], split(x, y, [7, 5]))
    conv, fc = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Linear(36, 3)
    for name, p in (*conv.named_parameters(prefix="conv"), *fc.named_parameters(prefix="fc")):
        p.data = torch.tensor(groups.graph.weights[name].numpy())
    out = conv(x)
    (grad,) = torch.autograd.grad(F.cross_entropy(fc(torch.tanh(out).flatten(1)), y, reduction="sum"), out)
    a, g = F.unfold(x, 3, stride=2, padding=1), grad.flatten(2)
    product = torch.kron(torch.einsum("nit,njt->ij", g, g), torch.einsum("nit,njt->ij", a, a)) / (12 * 12 * 9)
    assert torch.allclose(torch.kron(f.left[0], f.right[0]).float(), product, rtol=1e-4, atol=1e-9)
