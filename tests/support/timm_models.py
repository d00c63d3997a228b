"""timm, torchvision and transformers for tests: imported where they are, a skip with the reason where they are not."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import pytest
import torch

_OPERATORS = ("nms", "qnms")
_LIBRARY: list[torch.library.Library] = []  # a Library undefines its operators when it is collected


@functools.cache
def define_torchvision_operators() -> None:
    """Define ``torchvision::nms`` and ``::qnms`` where torchvision's binary part does not load on this torch.

    torchvision registers fake kernels for both at import and fails when the operators are unknown. Models built
    here never call them.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in _OPERATORS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARY.append(library)


def timm() -> Any:
    """The timm module; skips the test where it is missing."""
    define_torchvision_operators()
    return pytest.importorskip("timm", reason="timm is not installed (pip install --no-deps timm torchvision)")


def torchvision_models() -> Any:
    """The module torchvision.models; skips the test where it is missing."""
    define_torchvision_operators()
    return pytest.importorskip("torchvision.models", reason="torchvision is not installed")


def transformers() -> Any:
    """The transformers module, told never to reach for the network; skips the test where it is missing."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    define_torchvision_operators()
    return pytest.importorskip("transformers", reason="transformers is not installed")


def create(name: str, seed: int = 0, **options: Any) -> torch.nn.Module:
    """A timm model with seeded random weights, in eval mode."""
    module = timm()
    torch.manual_seed(seed)
    model: torch.nn.Module = module.create_model(name, pretrained=False, **options)
    return model.eval()
