"""Rounding layer by layer: GPTQ against its textbook form, methods that begin at nearest and never end worse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from foldline import passes as P
from foldline.graph.errors import ConfigError, ConstraintError
from foldline.graph.fx import load_torch
from foldline.passes.quantize.rounding import METHODS, round_weights
from foldline.passes.quantize.rounding.gptq import MatrixGrid, Quadratic, descend, gptq
from foldline.passes.quantize.rounding.grid import Grid
from foldline.passes.quantize.rounding.variables import AdaRound, variable
from foldline.passes.quantize.spec import TensorFormat
from support.frontends import load
from support.rounding import job, mse, outputs
from torch import nn

LEARNED = ("adaround", "adaquant", "flexround", "lrq")


class Convs(nn.Module):
    """Every kind of convolution that has rows and columns, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, (3, 1), stride=2, groups=4, dilation=(2, 1), padding=(2, 0))
        self.fc = nn.Linear(12 * 25, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.plain(x))
        x = torch.relu(self.depthwise(x))
        return self.fc(torch.relu(self.grouped(x)).flatten(1))


def convs() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    return Convs().eval(), [torch.randn(16, 3, 10, 10) for _ in range(3)]


def mlp(width: int = 24, rows: int = 64) -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, 16)).eval()
    mixing = torch.randn(width, width) * torch.linspace(0.2, 2, width)
    return net, [torch.randn(rows, width) @ mixing for _ in range(2)]


# ---- GPTQ ---------------------------------------------------------------------------------------------------------
def textbook(w: np.ndarray, h: np.ndarray, scale: np.ndarray, low: int, high: int, damping: float) -> np.ndarray:
    """Columns in turn, the error of each spread over the rest by the inverse Hessian, eliminated step by step."""
    h = h + damping * np.diag(h).mean() * np.eye(len(h))
    inverse, w, q = np.linalg.inv(h), w.copy(), np.zeros_like(w)
    for j in range(w.shape[1]):
        q[:, j] = np.clip(np.rint(w[:, j] / scale), low, high)
        error = (w[:, j] - q[:, j] * scale) / inverse[j, j]
        w[:, j:] -= np.outer(error, inverse[j, j:])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return q


def problem(groups: int = 1, outputs: int = 12, columns: int = 40) -> tuple[Quadratic, MatrixGrid]:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(groups, 300, columns, generator=g) @ torch.randn(groups, columns, columns, generator=g)
    w = torch.randn(groups, outputs, columns, generator=g)
    scale = (w.abs().amax(2, keepdim=True) / 7).expand_as(w).contiguous()
    hessian = (x.transpose(1, 2) @ x / 300).double()
    return Quadratic(hessian, w.double()), MatrixGrid(scale, torch.zeros_like(w), -8, 7)


@pytest.mark.parametrize("columns", [1, 7, 128])
def test_gptq_is_the_textbook_algorithm_whatever_the_blocks_of_columns(columns: int) -> None:
    p, grid = problem()
    found = gptq(p, grid, act_order=False, columns=columns)[0].numpy()
    wanted = textbook(p.target[0].numpy(), p.hessian[0].numpy(), grid.scale[0, :, 0].double().numpy(), -8, 7, 0.01)
    # float32 against float64: what falls on a tie may differ and change what follows in its row.
    assert (found == wanted).mean() > 0.98


@pytest.mark.parametrize("order", [False, True])
def test_gptq_and_descent_beat_nearest(order: bool) -> None:
    p, grid = problem(groups=3)
    nearest = p.error(grid.real(grid.integers(p.target.float())).double()).sum()
    q = gptq(p, grid, act_order=order)
    once = p.error(grid.real(q).double()).sum()
    better = descend(p, grid, q, 5)
    twice = p.error(grid.real(better).double()).sum()
    assert twice < once < 0.6 * nearest
    assert better.min() >= -8 and better.max() <= 7
    # From nearest too, and it stops where no single integer can be improved.
    still = descend(p, grid, descend(p, grid, grid.integers(p.target.float()), 200), 1)
    for j in range(0, 40, 7):
        for step in (-1, 1):
            tried = still.clone()
            tried[..., j] = (tried[..., j] + step).clamp(-8, 7)
            before, after = (p.error(grid.real(t).double()) for t in (still, tried))
            assert bool((after >= before * (1 - 1e-5)).all())


def test_act_order_is_a_permutation_of_the_problem() -> None:
    p, grid = problem()
    order = p.hessian[0].diagonal().argsort(descending=True, stable=True)
    sorted_p = Quadratic(p.hessian[:, order][:, :, order], p.target[..., order])
    sorted_grid = MatrixGrid(grid.scale[..., order], grid.zero, -8, 7)
    found = gptq(p, grid, act_order=True)[..., order]
    assert torch.equal(found, gptq(sorted_p, sorted_grid, act_order=False))


# ---- every method, both front ends ----------------------------------------------------------------------------------
@pytest.mark.parametrize("front", ["fx", "onnx"])
@pytest.mark.parametrize("method", ["gptq", *LEARNED])
def test_no_layer_ends_worse_than_nearest(method: str, front: str) -> None:
    model, batches = convs()
    graph = load(model, (batches[0],), front)
    fixed = {} if method == "gptq" else {"steps": 60}
    j = job(graph, batches, method, weight_bits=3, **fixed)
    found = round_weights(j)
    assert set(found) == {s.node.name for s in j.placement.weights} and len(found) == 4
    for site in j.placement.weights:
        r = found[site.node.name]
        assert r.integers.shape == site.weight.shape and r.integers.dtype == np.int8
        assert r.integers.min() >= -4 and r.integers.max() <= 3
        assert r.details["mse"] <= r.details["mse_nearest"] * (1 + 1e-6)
    nearest = round_weights(job(graph, batches, weight_bits=3))
    held_out = torch.randn(16, 3, 10, 10, generator=torch.Generator().manual_seed(9))
    assert mse(j, found, held_out) < 0.7 * mse(j, nearest, held_out)


def test_torch_and_onnx_get_the_same_integers() -> None:
    model, batches = convs()
    sides = []
    for front in ("fx", "onnx"):
        j = job(load(model, (batches[0],), front), batches, "gptq")
        found = round_weights(j)
        sides.append({s.weight.name: found[s.node.name] for s in j.placement.weights})
    for a, b in zip(*(sorted(side.items()) for side in sides), strict=True):
        assert a[0] == b[0]
        # Sums of float32 in another order move a column now and then.
        assert (a[1].integers == b[1].integers).mean() > 0.97
        np.testing.assert_allclose(a[1].params.scale, b[1].params.scale, rtol=2e-2)


def test_the_same_job_gives_the_same_bytes() -> None:
    model, batches = mlp()
    graph = load_torch(model, batches[0])
    for method in ("gptq", "lrq"):
        one, two = (round_weights(job(graph, batches, method)) for _ in range(2))
        for name in one:
            assert one[name].integers.tobytes() == two[name].integers.tobytes()
            assert one[name].params.scale.tobytes() == two[name].params.scale.tobytes()


def test_the_callers_graph_is_only_read() -> None:
    model, batches = mlp()
    graph = load_torch(model, batches[0])
    names, data = [n.name for n in graph.nodes], {k: w.numpy().copy() for k, w in graph.weights.items()}
    round_weights(job(graph, batches, "gptq"))
    assert [n.name for n in graph.nodes] == names
    assert all((graph.weights[k].numpy() == v).all() for k, v in data.items())


@pytest.mark.parametrize("inputs", ["quantized", "float"])
def test_the_bias_takes_up_the_mean(inputs: str) -> None:
    model, batches = mlp()
    j = job(load_torch(model, batches[0]), batches, "gptq", weight_bits=2, activation_bits=4, inputs=inputs)
    found = round_weights(j)
    assert all(r.bias is not None for r in found.values())
    if inputs == "quantized":
        pairs = [outputs(j, found, b) for b in batches]
        f, q = (np.concatenate(t) for t in zip(*pairs, strict=True))
        np.testing.assert_allclose(q.mean(0), f.mean(0), atol=2e-3 * np.abs(f).max())


def test_later_layers_make_up_for_earlier_ones() -> None:
    """With 2-bit layers before it, a layer fitted on quantized inputs does better than one fitted on float inputs."""
    model, batches = mlp()
    graph = load_torch(model, batches[0])
    errors = []
    for options in ({"inputs": "quantized"}, {"inputs": "float", "asymmetry": 0.0}):
        j = job(graph, batches, "gptq", weight_bits=2, **options)
        errors.append(mse(j, round_weights(j), torch.cat(batches)))
    assert errors[0] < errors[1]


def test_blocks_of_input_channels_keep_their_own_scales() -> None:
    model, batches = mlp(32)
    form = TensorFormat("int4", symmetric=True, granularity="block", block=8)
    graph = load_torch(model, batches[0])
    j = job(graph, batches, "gptq", form=form, scales="keep", bias=False)
    for site in j.placement.weights:
        r = round_weights(j)[site.node.name]
        assert r.params.scale.shape == j.weight_params[site.node.name].scale.shape
        assert r.integers.dtype.name == "int4"
        np.testing.assert_array_equal(r.params.scale, j.weight_params[site.node.name].scale)
        assert r.details["mse"] < r.details["mse_nearest"]


# ---- what the methods are -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["flexround", "lrq", "adaround", "adaquant"])
@pytest.mark.parametrize("shape", [(6, 10), (5, 4, 3, 3)])
def test_without_a_step_it_is_nearest_bit_for_bit(kind: str, shape: tuple[int, ...]) -> None:
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    form = TensorFormat("int8", symmetric=True, granularity="out_channel", range=(-8, 7))
    from foldline.passes.quantize.numerics import weight_params

    params = weight_params(w, 0, form)
    v = variable(kind, torch.from_numpy(w), Grid.of(params, shape), None, True, 3, 0)
    np.testing.assert_array_equal(v.grid.stored(v.integers()), params.quantize(w))
    if kind != "adaround":  # whose soft weight is the float one at first
        np.testing.assert_array_equal(v.soft().detach().numpy(), params.dequantize(params.quantize(w)))
    np.testing.assert_array_equal(v.scale.detach().numpy().reshape(-1), params.scale)
    m, n = shape[0], int(np.prod(shape[1:]))
    counts = {"lrq": 3 * (m + n) + m + n, "adaround": m * n, "adaquant": m * n}
    counts["flexround"] = m * n + m + (shape[1] if len(shape) == 4 else 0)
    assert v.count() == counts[kind]


@pytest.mark.parametrize("method", ["flexround", "lrq"])
def test_no_step_no_search_is_nearest_for_a_whole_model(method: str) -> None:
    model, batches = mlp()
    graph = load_torch(model, batches[0])
    found = round_weights(job(graph, batches, method, steps=0, scales="keep", bias=False))
    for name, r in round_weights(job(graph, batches)).items():
        assert r.integers.tobytes() == found[name].integers.tobytes()
        assert r.params.scale.tobytes() == found[name].params.scale.tobytes()


def test_adaround_moves_nothing_by_more_than_one() -> None:
    model, batches = convs()
    graph = load_torch(model, batches[0])
    found = round_weights(job(graph, batches, "adaround", scales="keep", steps=200))
    moved = 0
    for name, r in round_weights(job(graph, batches)).items():
        distance = np.abs(r.integers.astype(int) - found[name].integers.astype(int))
        assert distance.max() <= 1
        moved += distance.sum()
    assert moved > 20


def test_adarounds_penalty_drives_h_to_its_ends() -> None:
    form = TensorFormat("int8", symmetric=True, granularity="out_channel", range=(-8, 7))
    from foldline.passes.quantize.numerics import weight_params

    w = np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)
    v = AdaRound(torch.from_numpy(w), Grid.of(weight_params(w, 0, form), w.shape))
    torch.testing.assert_close(v.soft(), torch.from_numpy(w).clamp(*_ends(v)), rtol=1e-3, atol=1e-3)
    optimizer = torch.optim.Adam(v.groups(0.1))
    for step in range(300):
        optimizer.zero_grad()
        loss = v.penalty(0.3 + 0.7 * step / 300)
        assert loss is not None
        loss.backward()
        optimizer.step()
    h = v.up().detach()
    assert float(torch.minimum(h, 1 - h).max()) < 0.05
    assert v.penalty(0.1) is None
    torch.testing.assert_close(v.hard(), v.soft().detach(), rtol=0.05, atol=0.05)


def _ends(v: AdaRound) -> tuple[torch.Tensor, torch.Tensor]:
    return v.grid.scale * v.grid.low, v.grid.scale * v.grid.high


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_only_codes_and_scales_are_stored(front: str) -> None:
    """FlexRound's divisors and LRQ's factors leave no trace in the file."""
    model, batches = mlp()
    sizes = {}
    for method in ("nearest", "flexround", "lrq"):
        options = {} if method == "nearest" else {"steps": 20}
        graph = load(model, (batches[0],), front)
        quantize = P.Quantize(target="onnxruntime-cpu", weight_bits=4, rounding=method, rounding_options=options)
        made = P.Pipeline([quantize]).run(graph, calibration=batches, verify=False).graph
        sizes[method] = sorted((w.shape, w.dtype) for w in made.weights.values())
    assert sizes["nearest"] == sizes["flexround"] == sizes["lrq"]


def test_low_rank_generalizes_from_few_rows() -> None:
    """With fewer rows than columns, LRQ's held-out error is below FlexRound's (F8-05)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(96, 64)).eval()
    mixing = torch.randn(96, 96)
    train, test = torch.randn(24, 96) @ mixing, torch.randn(512, 96) @ mixing
    graph = load_torch(net, train)
    errors = {}
    for method in ("flexround", "lrq"):
        j = job(graph, [train], method, weight_bits=3, scales="keep", asymmetry=0.0, bias=False, steps=300, rank=4)
        errors[method] = mse(j, round_weights(j), test)
    assert errors["lrq"] < errors["flexround"]


# ---- options and refusals -------------------------------------------------------------------------------------------
def test_wrong_options_are_named() -> None:
    model, batches = mlp()
    graph = load_torch(model, batches[0])
    with pytest.raises(ConfigError, match=r"act_order"):
        round_weights(job(graph, batches, "gptq", act_ordr=True))
    with pytest.raises(ConfigError, match="gptq"):
        round_weights(job(graph, batches, "gptqq"))
    with pytest.raises(ConstraintError, match="needs calibration data"):
        j = job(graph, batches, "gptq")
        j.batches = []
        round_weights(j)
    assert next(iter(METHODS)) == "nearest"


def test_grids_that_are_no_integers_are_rounded_to_nearest_with_the_reason() -> None:
    model, batches = mlp()
    form = TensorFormat("float8_e4m3fn", symmetric=True, granularity="out_channel")
    j = job(load_torch(model, batches[0]), batches, "gptq", form=form)
    for site in j.placement.weights:
        r = round_weights(j)[site.node.name]
        assert "no grid of integers" in r.details["reason"]
        np.testing.assert_array_equal(
            r.integers.view(np.uint8), j.weight_params[site.node.name].quantize(site.weight.numpy()).view(np.uint8)
        )


def test_samples_are_capped() -> None:
    model, batches = mlp()
    j = job(load_torch(model, batches[0]), batches, "gptq", samples=64)
    assert {r.details["rows"] for r in round_weights(j).values()} == {64}
