"""A target of your own: its wishes are a YAML file (accelerator.yaml), and Quantize follows it.

python examples/accelerator.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import foldline as fl
import torch
from foldline import passes as P
from torch import nn

SPEC = Path(__file__).with_name("accelerator.yaml")


class Net(nn.Module):
    """A stem, a residual block, a depthwise convolution (which the accelerator has not) and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv1, self.conv2 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.wide, self.head = nn.Conv2d(16, 32, 1), nn.Linear(32, 10)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.conv2(torch.relu(self.conv1(x))))
        return self.head(torch.relu(self.depthwise(self.wide(x))).mean((2, 3)))


def main() -> Any:
    """Fold, quantize for the accelerator, and say what became of each layer and why."""
    torch.manual_seed(0)
    model, batches = Net().eval(), [torch.rand(8, 3, 16, 16) for _ in range(8)]
    formats = {"conv?": {"weight": 4}}  # the two convolutions of the block in 4 bits
    pipe = fl.Pipeline([P.Fold(), P.Quantize(target=str(SPEC), formats=formats, weight_ranges="mse")])
    result = pipe.run(model, batches[0], calibration=batches)
    for decision in result.report.passes[-1].decisions:
        print(f"{decision.subject:12} {decision.action:15} {decision.reason}")
    for group in result.report.passes[-1].details["scale_groups"]:
        print("one scale:", ", ".join(group["members"]), "-", "; ".join(group["because"]))
    return result


if __name__ == "__main__":
    main()
