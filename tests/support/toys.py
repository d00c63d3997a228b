"""Small architectures for tests: ``TOYS[name]()`` gives (module in eval mode, example inputs).

Weights are seeded and non-trivial: batch-norm statistics are random, some gammas negative, biases not zero; sizes of
different axes differ, so that two axes are never equal by chance. The batch holds at least two items.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from . import toys_attention, toys_conv, toys_misc
from .toys_base import Toy

TOYS: dict[str, Callable[[], Toy]] = {**toys_conv.TOYS, **toys_attention.TOYS, **toys_misc.TOYS}
"""Every toy by name."""


def toy(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The toy of that name, freshly built."""
    return TOYS[name]()
