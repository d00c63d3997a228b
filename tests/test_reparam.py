"""Reparameterizations are inserted without changing the function where they can, and evaluated away again."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from foldline.graph.errors import ConfigError, ConstraintError
from foldline.graph.execute import run_graph
from foldline.graph.load import load
from foldline.passes import Pipeline
from foldline.passes.reparam.bind import Bind
from foldline.passes.reparam.insert import Reparametrize
from foldline.passes.reparam.kinds import kinds
from foldline.passes.reparam.materialise import Materialise
from foldline.passes.reparam.replace_norm import ReplaceNorm
from foldline.passes.reparam.sharing import HashShare, hash_blocks
from foldline.passes.reparam.subspace import Subspace, load_subspace, save_subspace, subspaces
from torch import Tensor, nn
from torch.nn.utils import parametrize


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 64, 5),
    ).eval()


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(5))


def insert(model: nn.Module, kind: str, x: Tensor = X, seed: int = 0, **options: Any) -> Any:
    targets = options.pop("targets", None)
    step = Reparametrize(kind=kind, targets=targets, options=options)
    return Pipeline([step], seed=seed).run(model, (x,))


def materialise(model: Any, x: Tensor = X) -> Any:
    return Pipeline([Materialise()]).run(model, (x,) if isinstance(model, nn.Module) else None)


def out(model: nn.Module, *args: Tensor) -> Tensor:
    with torch.no_grad():
        return model(*args)


def close(a: Tensor, b: Tensor, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=rtol * float(b.abs().max()))


def export(model: nn.Module, *args: Tensor) -> onnx.ModelProto:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model.eval(), args, dynamo=True, optimize=False, verbose=False)
    assert program is not None
    return program.model_proto


def train_a_little(model: nn.Module, x: Tensor = X) -> None:
    for p in model.parameters():
        if p.requires_grad and p.ndim:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    torch.optim.SGD([p for p in model.parameters() if p.grad is not None], 0.05).step()


EXACT = {
    "weight_norm": {},
    "spectral_norm": {},
    "row_equilibration": {},
    "compander": {},
    "hash_share": {"ratio": 1.0},
    "random_subspace": {"d": 20, "form": "dense"},
}
OTHERS = {
    "scaled_ws": {},
    "hash_share": {"ratio": 0.25, "block": 4},
    "row_equilibration": {"keep": False},
    "spectral_norm": {"keep": False},
    "random_subspace": {"d": 20, "form": "sparse"},
}


@pytest.mark.parametrize("kind", EXACT)
def test_insertion_keeps_the_function_and_training_moves_it(kind: str) -> None:
    base = net()
    state = {k: v.clone() for k, v in base.state_dict().items()}
    result = insert(base, kind, **EXACT[kind])
    model = result.model
    assert type(model) is nn.Sequential and parametrize.is_parametrized(model[0], "weight")
    assert result.report.passes[0].contract == "exact"
    close(out(model, X), out(base, X))
    assert all(torch.equal(v, state[k]) for k, v in base.state_dict().items()), "the caller's model"
    train_a_little(model)
    assert float((out(model, X) - out(base, X)).abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("kind", "options"), [*EXACT.items(), *OTHERS.items()], ids=lambda v: v if isinstance(v, str) else ""
)
def test_materialised_models_are_plain_on_both_front_ends(kind: str, options: dict[str, Any]) -> None:
    model = insert(net(), kind, **options).model
    train_a_little(model)
    model.eval()
    want = out(model, X)
    plain = materialise(model).model
    assert type(plain) is nn.Sequential and set(plain.state_dict()) == set(net().state_dict())
    assert [type(m) for m in plain] == [type(m) for m in net()]
    close(out(plain, X), want)
    file = load(materialise(export(model, X)).model)
    assert {n.op for n in file.nodes} <= {"conv", "relu", "reshape", "linear", "concat", "expand"}, [
        n.op for n in file.nodes
    ]
    (got,), _ = run_graph(file, {file.inputs[0].name: X.numpy()})
    close(torch.from_numpy(got), want)
    stored = {n: w.numpy() for n, w in file.weights.items()}
    # exporters keep Python's numbers as float32, so the two agree to a rounding of those
    np.testing.assert_allclose(stored["0.weight"], plain[0].weight.detach().numpy(), rtol=0, atol=1e-7)


def test_spectral_norm_is_that_of_the_stored_vectors() -> None:
    model = insert(net(), "spectral_norm", keep=False).model
    before = {k: v.clone() for k, v in model.state_dict().items() if k.endswith(("_u", "_v"))}
    assert before
    plain = materialise(model).model
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    close(out(plain, X), out(model, X))


def test_row_equilibration_conditions_skewed_rows() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 16))
    with torch.no_grad():
        base[0].weight.mul_(torch.logspace(0, 4, 16)[:, None])
    x = torch.randn(3, 24)
    result = insert(base, "row_equilibration", x)
    (decision,) = result.report.passes[0].decisions
    assert decision.data["cond_after"] < 1e-2 * decision.data["cond_before"]
    close(out(result.model, x), out(base, x))


def test_a_compander_refuses_what_lies_outside_its_range() -> None:
    base = nn.Sequential(nn.Linear(3, 3))
    with torch.no_grad():
        base[0].weight.fill_(2.0)
    with pytest.raises(ConstraintError, match=r"0\.weight"):
        insert(base, "compander", torch.randn(1, 3), a=1.0)
    model = insert(base, "compander", torch.randn(1, 3), a=1.5, b=0.3).model
    torch.testing.assert_close(model[0].weight, base[0].weight, rtol=1e-6, atol=0)


def test_weight_norm_refuses_a_row_of_zeros() -> None:
    base = nn.Sequential(nn.Linear(3, 3))
    with torch.no_grad():
        base[0].weight[1] = 0
    with pytest.raises(ConstraintError, match="zeros"):
        insert(base, "weight_norm", torch.randn(1, 3))


def test_standardised_weights_have_no_mean_and_unit_spread_times_the_gain() -> None:
    model = insert(net(), "scaled_ws", targets=["0"], gain=1.0).model
    w = model[0].weight.detach().double()
    fan_in = w[0].numel()
    torch.testing.assert_close(w.mean((1, 2, 3)), torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-8)
    torch.testing.assert_close(
        w.var((1, 2, 3), unbiased=False) * fan_in, torch.ones(8, dtype=torch.float64), rtol=1e-5, atol=0
    )


class Block(nn.Module):
    """A residual network of two blocks with batch norms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.na = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        for m in (self.norm, self.na):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + torch.relu(self.na(self.a(x)))
        return self.head(x.mean((2, 3)))


def test_batch_norms_give_way_to_standardised_weights() -> None:
    model, x = Block(), torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    base = model.eval()
    result = Pipeline([ReplaceNorm()]).run(base, (x,), verify=False)
    assert not any(n.op == "batch_norm" for n in result.graph.nodes)
    want = out(result.model, x)
    facts = [d.data for d in result.report.passes[0].decisions]
    gains = [float(base.norm.weight.detach().square().mean()), float(base.na.weight.detach().square().mean())]
    for fact, gain in zip(facts, gains, strict=True):
        assert abs(fact["var_after"] - gain) < 1e-3 and "var_before" in fact
    largest = max(float(base.norm.bias.detach().abs().max()), 1e-3)
    assert abs(facts[0]["mean_after"] - largest) < 1e-4, "the shift that was trained"
    plain = materialise(result.model, x).model
    assert type(plain) is Block and type(plain.stem) is nn.Conv2d
    assert not any(n.op in ("mean", "var", "sqrt", "rsqrt") for n in load(plain, (x,)).nodes[:2])
    close(out(plain, x), want)
    assert isinstance(base.norm, nn.BatchNorm2d), "the caller's model"


# ---- random subspaces -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["dense", "sparse", "fastfood"])
def test_a_subspace_starts_at_the_base_and_is_found_again_from_its_seeds(form: str, tmp_path: Path) -> None:
    base = net()
    model = insert(base, "random_subspace", form=form, d=16, seed=3).model
    assert torch.equal(out(model, X), out(base, X)), "z = 0"
    found = subspaces(model)
    assert [n for n, _ in found] == ["0.weight", "2.weight", "5.weight"]
    assert len({id(p.z) for _, p in found}) == 1, "one z"
    assert [n for n, p in model.named_parameters() if p.requires_grad and "original" in n] == []
    with torch.no_grad():
        found[0][1].z.copy_(torch.randn(16, generator=torch.Generator().manual_seed(1)))
    moved = out(model, X)
    assert float((moved - out(base, X)).abs().max()) > 1e-3
    file = save_subspace(model, tmp_path / "z.safetensors")
    assert file.stat().st_size < 1500, "seeds and z, nothing of the model's size"
    theta0 = {n: p.detach().numpy() for n, p in base.named_parameters()}
    weights = load_subspace(theta0, file)
    plain = materialise(model).model
    for name, data in weights.items():
        np.testing.assert_allclose(data, dict(plain.named_parameters())[name].detach().numpy(), rtol=1e-5, atol=1e-6)
    np.savez(tmp_path / "theta0.npz", **theta0)
    code = (
        "import sys, hashlib, numpy as np\n"
        "from foldline.passes.reparam.subspace import load_subspace\n"
        "state = dict(np.load(sys.argv[1]))\n"
        "made = load_subspace(state, sys.argv[2])\n"
        "print(hashlib.sha256(b''.join(made[k].tobytes() for k in sorted(made))).hexdigest())\n"
    )
    import hashlib

    here = hashlib.sha256(b"".join(weights[k].tobytes() for k in sorted(weights))).hexdigest()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "theta0.npz"), str(file)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == here


def test_fastfood_with_scales_per_layer_is_the_base_at_zero_whatever_they_are() -> None:
    model = insert(net(), "random_subspace", form="fastfood", d=10).model
    with torch.no_grad():
        for i, (_, p) in enumerate(subspaces(model)):
            p.scale.fill_(3.0 + i)
    assert torch.equal(out(model, X), out(net(), X))


def test_columns_of_every_projection_have_about_unit_length() -> None:
    for form in ("dense", "sparse", "fastfood"):
        z = nn.Parameter(torch.zeros(12))
        p = Subspace((40, 50), form, z, 7, 2000)
        columns = torch.stack([p(torch.zeros(40, 50)).detach().reshape(-1) * 1.0 for _ in [0]])
        assert float(columns.abs().max()) == 0
        norms = []
        for i in range(12):
            with torch.no_grad():
                z.zero_()
                z[i] = 1.0
            norms.append(float(p(torch.zeros(40, 50)).detach().norm()))
        assert 0.7 < np.mean(norms) < 1.4, (form, norms)


def test_a_small_net_learns_digits_in_a_subspace() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    x = torch.tensor(digits.data / 16, dtype=torch.float32)
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def accuracy(model: nn.Module, rate: float) -> float:
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[:1400]), y[:1400]).backward()
            optimizer.step()
        return float((out(model, x[1400:]).argmax(1) == y[1400:]).float().mean())

    model = insert(base, "random_subspace", x[:2], form="dense", d=150).model
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(".z"))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 150
    small = accuracy(model, 0.1)
    assert small >= 0.9 * accuracy(base, 0.01)


# ---- sharing ------------------------------------------------------------------------------------------------------
def test_hash_sharing_with_as_many_entries_is_the_weight_bit_for_bit() -> None:
    torch.manual_seed(0)
    w = torch.randn(13, 7)
    share = HashShare((13, 7), 92, 4, 11)
    assert torch.equal(share(share.right_inverse(w)), w)


def test_hash_sharing_stores_what_it_says_and_shares_evenly() -> None:
    base = nn.Sequential(nn.Linear(100, 40))
    model = insert(base, "hash_share", torch.randn(1, 100), ratio=0.1, block=8).model
    original = model[0].parametrizations.weight.original
    assert original.numel() == 400
    assert set(model.state_dict()) == {"0.bias", "0.parametrizations.weight.original"}, "no indices are stored"
    index, sign = hash_blocks(4000, 400, 8, 5)
    counts = np.bincount(index, minlength=50)
    assert counts.max() <= -(-4000 // 400) and set(sign.tolist()) == {-1, 1}
    again, _ = hash_blocks(4000, 400, 8, 5)
    np.testing.assert_array_equal(index, again)


# ---- hypernetworks ------------------------------------------------------------------------------------------------
class Generated(nn.Module):
    """A linear layer plus an adapter whose weight a small network makes from a task's number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tasks, self.maker = nn.Embedding(3, 4), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 36))
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        made = self.maker(self.tasks(task)).reshape(6, 6)
        return nn.functional.linear(x, self.layer.weight + made, self.layer.bias)


@pytest.mark.parametrize("task", [0, 2])
def test_a_hypernetwork_with_a_bound_task_disappears(task: int) -> None:
    model, x = Generated().eval(), torch.randn(5, 6)
    number = torch.tensor([task])
    want = out(model, x, number)
    for form in (model, export(model, x, number)):
        example = (x, number) if isinstance(form, nn.Module) else None
        graph = load(form, example)
        name = graph.inputs[1].name
        result = Pipeline([Bind(values={name: [task]}), Materialise()]).run(form, example, verify=False)
        after = result.graph
        assert [n.op for n in after.nodes if n.op != "add"] == ["linear"]
        inputs = {after.inputs[0].name: x.numpy(), name: np.array([1])}  # whatever is passed
        (got,), _ = run_graph(after, inputs)
        close(torch.from_numpy(np.asarray(got)), want)
        assert not any("maker" in w or "tasks" in w for w in after.weights)


def test_binding_checks_names_and_shapes() -> None:
    model, x = Generated().eval(), torch.randn(5, 6)
    with pytest.raises(ConstraintError, match="tusk"):
        Pipeline([Bind(values={"tusk": [0]})]).run(model, (x, torch.tensor([0])), verify=False)
    with pytest.raises(ConstraintError, match="fit"):
        Pipeline([Bind(values={"task": [0, 1]})]).run(model, (x, torch.tensor([0])), verify=False)


# ---- bad input ------------------------------------------------------------------------------------------------------
def test_unknown_kinds_options_and_targets_name_the_nearest() -> None:
    assert {"weight_norm", "compander", "random_subspace", "hash_share"} <= set(kinds())
    with pytest.raises(ConfigError, match="weight_norm"):
        insert(net(), "weight_nrm")
    with pytest.raises(ConfigError, match="ratio"):
        insert(net(), "hash_share", ratoi=0.5)
    with pytest.raises(ConfigError, match="nothing"):
        insert(net(), "weight_norm", targets=["9"])


def test_the_same_seed_gives_the_same_bytes() -> None:
    def state(seed: int) -> bytes:
        model = insert(net(), "hash_share", seed=seed, ratio=0.5).model
        return b"".join(v.numpy().tobytes() for v in model.state_dict().values())

    assert state(1) == state(1) != state(2)
