"""Axis groups: the two front ends agree, operand order does not matter, reasons are given, large models stay cheap."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foldline.graph.errors import ConstraintError
from foldline.graph.fx import load_torch
from foldline.graph.groups import AxisGroups, axis_groups
from foldline.graph.ir import Graph
from foldline.graph.onnx import load_onnx
from support.frontends import exported, toy_graph
from support.toys import TOYS, toy
from torch import nn

Place = tuple[str, int]


def correspondence(fx: Graph, onnx: Graph) -> dict[Place, Place]:
    """(ONNX weight, axis) -> (FX weight, axis): by name, and by content where the exporter stored a transpose."""
    by_content: dict[tuple[tuple[int, ...], bytes], list[tuple[str, tuple[int, ...]]]] = {}
    for name, w in fx.weights.items():
        data = w.numpy()
        for perm in {tuple(range(data.ndim)), tuple(reversed(range(data.ndim)))}:
            moved = np.ascontiguousarray(data.transpose(perm))
            by_content.setdefault((moved.shape, moved.tobytes()), []).append((name, perm))
    out: dict[Place, Place] = {}
    for name, w in onnx.weights.items():
        if name in fx.weights and fx.weights[name].shape == w.shape:
            out.update({(name, i): (name, i) for i in range(len(w.shape))})
            continue
        found = by_content.get((w.shape, np.ascontiguousarray(w.numpy()).tobytes()), [])
        if len(found) == 1:
            source, perm = found[0]
            out.update({(name, i): (source, perm[i]) for i in range(len(w.shape))})
    return out


def signature(groups: AxisGroups, places: dict[Place, Place]) -> set[tuple[int, bool, bool, frozenset[Place]]]:
    """Selectable groups by size, exactness, nesting and members, restricted to places that both sides know."""
    out = set()
    for g in groups:
        members = frozenset(places[m.weight.name, m.axis] for m in g.members if (m.weight.name, m.axis) in places)
        if members and g.can("select"):
            out.add((g.size, g.exact, g.nested, members))
    return out


@pytest.mark.parametrize("name", sorted(TOYS))
def test_fx_and_onnx_find_the_same_groups(name: str) -> None:
    module, inputs = toy(name)
    fx = axis_groups(load_torch(module, inputs))
    onnx = axis_groups(load_onnx(exported(module, inputs)))
    places = correspondence(fx.graph, onnx.graph)
    known = set(places.values())
    # The exporter folds batch norms, gate-reorders recurrent weights and renames tables; matrices must be compared.
    matrices = {n for n, w in fx.graph.weights.items() if n.endswith("weight") and len(w.shape) > 1}
    names = {n for n in matrices if not n.startswith(("lstm", "gru"))}
    assert names <= {p[0] for p in known}
    assert signature(fx, {p: p for p in known}) == signature(onnx, places)


@pytest.mark.parametrize("front", ["fx", "onnx"])
def test_operand_order_does_not_matter(front: str) -> None:
    class Net(nn.Module):
        def __init__(self, swap: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)
            self.d = nn.Conv2d(6, 5, 1)
            self.swap = swap

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = self.a(x), torch.cat(self.b(x).chunk(2, 1)[::-1], 1)
            y = right + left if self.swap else left + right
            gate = torch.sigmoid(self.c(y)).mean((2, 3), keepdim=True)
            z = self.c(y)
            return self.d(gate * z if self.swap else z * gate)

    from support.frontends import load

    x = (torch.randn(2, 3, 4, 4),)
    first, second = (axis_groups(load(Net(s), x, front)) for s in (False, True))

    def members(gs: AxisGroups) -> set[tuple[int, bool, frozenset[str]]]:
        return {(g.size, g.can("select"), frozenset(m.label for m in g.members)) for g in gs}

    assert members(first) == members(second)


def test_every_frozen_group_gives_a_reason() -> None:
    for name in TOYS:
        for g in axis_groups(toy_graph(name, "fx")):
            for action in ("select", "permute", "scale"):
                assert g.can(action) or g.why(action)


def test_explain_names_the_tie_and_the_reason() -> None:
    groups = axis_groups(toy_graph("residual_cnn", "fx"))
    text = groups.explain("head.2", axis=0)
    assert "frozen: graph output" in text
    assert "a1.0.weight[1]" in groups.explain("stem.0", axis=0)
    with pytest.raises(ConstraintError, match="did you mean"):
        groups.explain("sten.0")


def test_networkx_export_holds_every_member() -> None:
    groups = axis_groups(toy_graph("residual_cnn", "fx"))
    g = groups.to_networkx()
    assert g.number_of_edges() == sum(len({m.label for m in x.members}) for x in groups)


def test_unknown_op_freezes_and_says_so() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.linalg.qr(self.a(x))[0] @ torch.ones(6, 6))

    groups = axis_groups(load_torch(Net(), (torch.randn(8, 4),)))
    assert any("qr" in reason for _, reason in groups.opaque)
    assert not groups["a.weight:0"].can("select") and "qr" in groups["a.weight:0"].why()


def test_meta_weights_are_enough() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 11008), nn.ReLU(), nn.Linear(11008, 4096))
        x = torch.zeros(2, 4096)
    groups = axis_groups(load_torch(model, (x,)))
    assert groups["0.weight:0"].can("select") and groups["0.weight:0"].size == 11008


class Copies(nn.Module):
    """A convolution whose channels are repeated three times, then a batch norm or a normalization, then a reader."""

    def __init__(self, how: str, after: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.after = how, after
        self.a, self.bn, self.b = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(12), nn.Conv2d(12, 5, 1)
        for p in (self.bn.weight, self.bn.bias, self.bn.running_mean):
            nn.init.normal_(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        if self.how == "tile":
            y = y.repeat(1, 3, 1, 1)
        elif self.how == "interleave":
            y = y.repeat_interleave(3, 1)
        else:
            y = y[:, :, None].expand(-1, -1, 3, -1, -1).flatten(1, 2)
        return self.b(self.bn(y) if self.after == "norm" else F.normalize(y, dim=1))


@pytest.mark.parametrize("front", ["fx", "onnx"])
@pytest.mark.parametrize("how", ["tile", "interleave", "expand"])
def test_copies_of_a_slab_cannot_be_scaled_apart(front: str, how: str) -> None:
    """No weight makes the copies: what reads them would be divided, and what they are would not be multiplied."""
    from support.frontends import load

    groups = axis_groups(load(Copies(how, "norm").eval(), (torch.randn(2, 3, 4, 4),), front))
    many = next(g for g in groups.of("b.weight", 1) if g.size == 3)
    assert many.can("select") and not many.can("scale")
    assert "copies of one slab" in many.why("scale")


@pytest.mark.parametrize("front", ["fx", "onnx"])
@pytest.mark.parametrize("how", ["tile", "interleave", "expand"])
def test_a_statistic_over_copies_is_not_exact(front: str, how: str) -> None:
    """A removed copy is not zero in the masked model, so the norm over it changes."""
    from support.frontends import load

    groups = axis_groups(load(Copies(how, "normalize").eval(), (torch.randn(2, 3, 4, 4),), front))
    many = next(g for g in groups.of("b.weight", 1) if g.size == 3)
    assert many.can("select") and not many.exact
