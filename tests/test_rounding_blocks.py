"""Block reconstruction: blocks found in the graph, activation scales learned, samples mixed only where legal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from foldline import passes as P
from foldline.graph.errors import ConfigError
from foldline.graph.fx import load_torch
from foldline.passes.quantize.numerics import range_params
from foldline.passes.quantize.rounding import round_weights
from foldline.passes.quantize.rounding.activations import Activation
from foldline.passes.quantize.rounding.regions import blocks, layers, merged
from foldline.passes.quantize.rounding.samples import Samples
from foldline.passes.quantize.rounding.simulate import Simulation
from foldline.passes.quantize.spec import TensorFormat
from foldline.passes.recover.runner import bound
from support.frontends import load
from support.resnet_cifar import resnet20
from support.rounding import job, mse, outputs
from torch import nn


class Residual(nn.Module):
    """A stem, two residual blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.Conv2d(16, 16, 3, padding=1)
        self.skip, self.head = nn.Conv2d(8, 16, 1, stride=2), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.a2(torch.relu(self.a1(x))) + x)
        x = torch.relu(self.b2(torch.relu(self.b1(x))) + self.skip(x))
        return self.head(x.mean((2, 3)))


class Encoder(nn.Module):
    """One transformer layer (attention written out) with position codes, and a linear head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(6, width))
        self.embed, self.qkv, self.out = nn.Linear(8, width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down, self.head = nn.Linear(width, 32), nn.Linear(32, width), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) + self.positions
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ v)
        x = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return self.head(x)


def residual() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    return Residual().eval(), [torch.randn(16, 3, 8, 8) for _ in range(4)]


def encoder() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    return Encoder().eval(), [torch.randn(16, 6, 8) for _ in range(4)]


# ---- blocks -------------------------------------------------------------------------------------------------------
def sites(model: nn.Module, x: torch.Tensor, front: str, most: int = 16) -> list[list[str]]:
    """Weights of every block, by name."""
    sim = Simulation(job(load(model, (x,), front), [x]))
    found = blocks(sim, most)
    assert found[0].first == 0 and found[-1].last == sim.length
    assert all(a.last == b.first for a, b in zip(found, found[1:], strict=False))
    return [sorted(sim.sites[name].weight.name.removesuffix(".weight") for name in r.sites) for r in found]


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_residual_blocks_are_found(front: str) -> None:
    model, batches = residual()
    assert sites(model, batches[0], front) == [["stem"], ["a1", "a2"], ["b1", "b2", "skip"], ["head"]]


def test_transformer_layers_are_found() -> None:
    model, batches = encoder()
    assert sites(model, batches[0], "fx") == [["embed"], ["out", "qkv"], ["down", "up"], ["head"]]


def test_a_cifar_resnet_has_a_block_per_addition() -> None:
    model = P.fold(resnet20().eval(), torch.randn(2, 3, 32, 32), verify=False).graph
    sim = Simulation(job(model, [torch.randn(2, 3, 32, 32)]))
    found = blocks(sim)
    assert [len(r.sites) for r in found] == [1] + [2] * 9 + [1]
    assert all(len(r.entries) == len(r.exits) == 1 for r in found)
    assert [len(r.sites) for r in layers(sim)] == [1] * 20
    assert [len(r.sites) for r in merged(sim, found, 3)] == [5, 6, 6, 3]


def test_a_tangle_is_cut_into_layers() -> None:
    class Hourglass(nn.Module):
        """Skips that span everything: no inner value stands alone."""

        def __init__(self) -> None:
            super().__init__()
            self.down = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
            self.up = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = []
            for conv in self.down:
                x = torch.relu(conv(x))
                kept.append(x)
            for conv in self.up:
                x = torch.relu(conv(torch.cat([x, kept.pop()], 1)))
            return x

    x = torch.randn(2, 4, 6, 6)
    assert max(len(b) for b in sites(Hourglass().eval(), x, "fx")) >= 4
    assert max(len(b) for b in sites(Hourglass().eval(), x, "fx", most=3)) == 1


# ---- samples ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("baked", [False, True])
def test_samples_mix_only_where_rows_are_independent(baked: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.a(x))
            return x + self.b(y - y.mean(0, keepdim=True) if baked else y)

    torch.manual_seed(0)
    batches = [torch.randn(8, 6) for _ in range(3)]
    j = job(load_torch(Net().eval(), batches[0]), batches)
    sim = Simulation(j)
    envs = sim.envs(bound(sim.graph, batches))
    region = merged(sim, blocks(sim), 9)[0]
    starts = [dict(env) for env in envs]
    with torch.no_grad():
        for env in envs:
            sim.execute(region.calls, env)
        samples = Samples.of(sim, region, envs, starts)
    assert samples.mixes is not baked
    assert sum(p.size for p in samples.all(5)) == 24
    picked = samples.draw(5, torch.Generator().manual_seed(0))
    assert picked.size == (8 if baked else 5)


# ---- activation scales --------------------------------------------------------------------------------------------
def test_learned_steps_have_the_gradient_of_lsq() -> None:
    a = Activation(range_params(-1.0, 3.0, TensorFormat("uint8", range=(0, 15))))
    assert a.scale is not None
    x = torch.linspace(-2, 5, 101, requires_grad=True)
    a.scale.requires_grad_()
    weight = torch.randn(101, generator=torch.Generator().manual_seed(0))
    (a(x) * weight).sum().backward()
    steps = x.detach() / a.scale.detach()
    low, high = a.low - a.zero, a.high - a.zero
    clipped = (steps < low - 0.5) | (steps > high + 0.5)
    slope = torch.where(clipped, steps.clamp(low, high).round(), steps.round().clamp(low, high) - steps)
    assert float(a.scale.grad) == pytest.approx(float((slope * weight).sum()), rel=1e-4)
    torch.testing.assert_close(x.grad, torch.where(clipped, 0.0, weight))


def test_without_gradients_a_point_computes_what_is_stored() -> None:
    p = range_params(-1.0, 3.0, TensorFormat("uint8", range=(0, 15)))
    x = ((torch.arange(64) - 20) * float(p.scale) / 2).reshape(8, 8)  # ties
    np.testing.assert_array_equal(Activation(p)(x).numpy(), p.apply(x.numpy()))


def test_dropping_leaves_a_share_in_float() -> None:
    a = Activation(range_params(-1.0, 1.0, TensorFormat("uint8", range=(0, 3))))
    a.drop, a.generator = 0.3, torch.Generator().manual_seed(0)
    x = torch.rand(10_000, requires_grad=True)
    assert float((a(x) == x).float().mean()) == pytest.approx(0.3, abs=0.02)
    with torch.no_grad():
        assert len(a(x).unique()) <= 4


# ---- the whole ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_reconstruction_beats_nearest_and_layers(front: str) -> None:
    model, batches = residual()
    graph = load(model, (batches[0],), front)
    held_out = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    errors = {}
    for method, options in (("nearest", {}), ("gptq", {}), ("reconstruct", {"steps": 60, "batch": 16})):
        j = job(graph, batches, method, weight_bits=4, activation_bits=4, **options)
        found = round_weights(j)
        errors[method] = mse(j, found, held_out)
        if method == "reconstruct":
            points = {name for r in found.values() for name in r.points}
            assert points == set(j.placement.points)
            assert any(r.points[n].scale != j.params[n].scale for r in found.values() for n in r.points)
            assert all(r.details["loss_after"] <= r.details["loss_before"] for r in found.values())
    assert errors["reconstruct"] < errors["gptq"] < errors["nearest"]
    assert errors["reconstruct"] < 0.4 * errors["nearest"]


RECIPES = [
    {"freedom": "adaround"},
    {"freedom": "flexround"},
    {"freedom": "lrq", "rank": 2},
    {"freedom": "adaquant", "start": "nearest", "loss": "cosine", "activations": False},
    {"freedom": "adaround", "start": "nearest", "task": 1.0, "activations": False},
    {"optimizer": "sign", "rate": 5e-3, "loss": "l1", "drop": 0.0},
    {"optimizer": "sgd", "loss": "huber", "inputs": "float", "merge": 2, "scales": False, "bias": False},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: "-".join(f"{v}" for v in r.values()))
def test_every_recipe_works_on_a_transformer(recipe: dict) -> None:
    model, batches = encoder()
    graph = load_torch(model, batches[0])
    held_out = torch.randn(16, 6, 8, generator=torch.Generator().manual_seed(5))
    nearest = job(graph, batches, weight_bits=3)
    j = job(graph, batches, "reconstruct", weight_bits=3, **{"steps": 30, "batch": 16, **recipe})
    found = round_weights(j)
    assert set(found) == {s.node.name for s in j.placement.weights}
    # The mean over blocks falls; each block by itself never ends worse than it began.
    assert all(r.details["loss_after"] <= r.details["loss_before"] for r in found.values())
    assert mse(j, found, held_out) < mse(nearest, round_weights(nearest), held_out)
    if recipe.get("freedom") == "adaround" and recipe.get("start") == "nearest":
        for name, r in round_weights(nearest).items():
            assert np.abs(r.integers.astype(int) - found[name].integers.astype(int)).max() <= 1


def test_the_task_loss_reaches_back_from_the_outputs() -> None:
    """With a task loss the network's own outputs move less than without, on the data it was fitted on."""
    model, batches = residual()
    graph = load_torch(model, batches[0])
    errors = []
    for task in (0.0, 30.0):
        options = {"freedom": "adaround", "start": "nearest", "drop": 0.0, "steps": 40, "batch": 32, "task": task}
        j = job(graph, batches, "reconstruct", weight_bits=3, **options)
        errors.append(mse(j, round_weights(j), torch.cat(batches)[:16]))
    assert errors[1] < errors[0]


def test_the_same_seed_gives_the_same_bytes_and_another_does_not() -> None:
    model, batches = residual()
    graph = load_torch(model, batches[0])
    results = []
    for seed in (0, 0, 1):
        j = job(graph, batches, "reconstruct", activation_bits=4, steps=15)
        j.seed = seed
        found = round_weights(j)
        results.append(b"".join(r.integers.tobytes() + r.params.scale.tobytes() for r in found.values()))
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_the_pass_writes_what_was_learned(front: str) -> None:
    model, batches = residual()
    quantize = P.Quantize(
        target="inductor-cpu", weight_bits=4, activation_bits=4, rounding="reconstruct", rounding_options={"steps": 10}
    )
    graph = load(model, (batches[0],), front)
    result = P.Pipeline([quantize]).run(graph, calibration=batches, verify=False)
    grids = result.report.passes[0].details["activations"]
    before = job(graph, batches, weight_bits=4, activation_bits=4).params
    assert any(abs(grids[n]["scale"] / float(before[n].scale) - 1) > 1e-4 for n in grids)
    x = {v.name: batches[0].numpy() for v in result.graph.inputs}
    (y,), _ = result.graph.run(x)
    (wanted,), _ = graph.run({v.name: batches[0].numpy() for v in graph.inputs})
    y, wanted = np.asarray(y), np.asarray(wanted)
    assert np.square(y - wanted).sum() < 0.2 * np.square(wanted).sum()


@pytest.mark.parametrize("method", ["gptq", "reconstruct"])
@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_a_shared_weight_is_rounded_once(front: str, method: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.a(torch.relu(self.a(torch.tanh(x))))
            return torch.relu(self.b(x)) + self.a(x)

    torch.manual_seed(0)
    batches = [torch.randn(32, 8) for _ in range(2)]
    options = {"steps": 10} if method == "reconstruct" else {}
    j = job(load(Twice().eval(), (batches[0],), front), batches, method, **options)
    found = round_weights(j)
    shared = [found[s.node.name] for s in j.placement.weights if s.weight.name.startswith("a.")]
    assert len(shared) == 3
    assert len({r.integers.tobytes() + r.params.scale.tobytes() for r in shared}) == 1


def test_a_wrong_recipe_is_refused() -> None:
    model, batches = residual()
    with pytest.raises(ConfigError, match="freedom"):
        round_weights(job(load_torch(model, batches[0]), batches, "reconstruct", freedom="adaroundd"))


# ---- trained weights ------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_trained_resnet20_at_4_bits() -> None:
    """F8-01, F8-02, F8-06: every layer at most nearest's error, held-out error at most twice, accuracy kept."""
    from support.data import cifar10, trained_resnet

    images, labels = cifar10("train", 128)[0], cifar10("test", 200)
    graph = P.fold(trained_resnet(20), images[:64], verify=False).graph
    batches = list(images.split(64))
    right, error = {}, {}
    for method, options in (
        ("nearest", {}),
        ("gptq", {"rows": 8192}),
        ("reconstruct", {"steps": 10, "rows": 8192, "samples": 64}),
    ):
        j = job(graph, batches, method, weight_bits=4, activation_bits=8, **options)
        found = round_weights(j)
        f, q = outputs(j, found, labels[0])
        right[method] = float((q.argmax(1) == labels[1].numpy()).mean())
        error[method] = float(np.square(f - q).sum() / np.square(f).sum())
        if method == "gptq":
            assert all(r.details["mse"] <= r.details["mse_nearest"] for r in found.values())
            seen = mse(j, found, batches[0])
            assert error[method] <= 2 * seen + 1e-3
    assert error["gptq"] < 0.25 * error["nearest"] and error["reconstruct"] < 0.25 * error["nearest"]
    assert right["gptq"] >= right["nearest"] and right["reconstruct"] >= right["nearest"]
