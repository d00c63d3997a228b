"""Three small models and their axis groups, as printed in docs/architecture.md.

python examples/axis_groups.py            # print
python examples/axis_groups.py --write    # and refresh docs/architecture.md
"""

from __future__ import annotations

import sys
from pathlib import Path

import foldline as fl
import numpy as np
import torch
import torch.nn.functional as F
from foldline.graph.actions import select
from torch import nn


class Residual(nn.Module):
    """A residual CNN: one width runs through stem, both shortcuts and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv1, self.conv2 = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = x + self.conv2(F.relu(self.conv1(x)))
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


class GroupedQuery(nn.Module):
    """Attention with 4 query heads over 2 key-value heads of dimension 6."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(16, 24), nn.Linear(16, 12), nn.Linear(16, 12), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 6).transpose(1, 2)
        k = self.k(x).view(b, n, 2, 6).transpose(1, 2)
        v = self.v(x).view(b, n, 2, 6).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(b, n, 24))


class SplitConcat(nn.Module):
    """A convolution is split in two, one part passes a convolution, and all three are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 10, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(16, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.a(x).split([4, 6], 1)
        return self.c(torch.cat([left, right, F.relu(self.b(right))], 1)).mean((2, 3))


def show(model: nn.Module, x: torch.Tensor, layers: list[tuple[str, int]]) -> str:
    graph = fl.load(model.eval(), (x,))
    groups = fl.axis_groups(graph)
    lines = [f"{w}[{i}] = {groups.space(w, i)}" for w, i in layers]
    return "\n".join([*lines, "", str(groups)])


def explain_cut() -> str:
    """What selecting two groups of the attention does to every weight and every baked size."""
    graph = fl.load(GroupedQuery().eval(), (torch.randn(2, 3, 16),))
    groups = fl.axis_groups(graph)
    heads, dim = groups.of("k.weight", 0)
    before = {n.name: n.attrs["shape"] for n in graph.nodes if n.op == "reshape"}
    plan = select(groups, {heads: np.array([1]), dim: np.array([0, 2, 3, 5])})
    lines = [f"keep {heads.name}: [1], {dim.name}: [0, 2, 3, 5]"]
    lines += [f"{w}[{a}]: {len(k)} of {plan.shapes[w][a]}" for w, axes in plan.weights.items() for a, k in axes.items()]
    for n in graph.nodes:
        if n.op == "reshape":
            lines.append(f"{n.name}: {before[n.name]} -> {n.attrs['shape']}")
        if n.op == "sdpa":
            lines.append(f"{n.name}: scale = {n.attrs['scale']:.6f} (1/sqrt(6), kept from before the cut)")
    return "\n".join(lines)


def sections() -> dict[str, str]:
    torch.manual_seed(0)
    return {
        "residual": show(Residual(), torch.randn(2, 3, 8, 8), [("stem.weight", 0), ("head.weight", 1)]),
        "attention": show(
            GroupedQuery(), torch.randn(2, 3, 16), [("q.weight", 0), ("k.weight", 0), ("v.weight", 0), ("o.weight", 1)]
        ),
        "attention-cut": explain_cut(),
        "concat": show(SplitConcat(), torch.randn(2, 3, 4, 4), [("a.weight", 0), ("c.weight", 1)]),
    }


def embed(text: str, parts: dict[str, str]) -> str:
    """The document with each block between ``<!-- name -->`` and ``<!-- end -->`` replaced."""
    for name, body in parts.items():
        start = text.index(f"<!-- {name} -->")
        end = text.index("<!-- end -->", start)
        text = text[:start] + f"<!-- {name} -->\n```text\n{body}\n```\n" + text[end:]
    return text


def main() -> None:
    parts = sections()
    for name, body in parts.items():
        print(f"== {name}\n{body}\n")
    if "--write" in sys.argv:
        page = Path(__file__).resolve().parent.parent / "docs" / "architecture.md"
        page.write_text(embed(page.read_text(), parts))


if __name__ == "__main__":
    main()
