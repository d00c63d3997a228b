"""How an operator of this backend is registered with torch, so that export, torch.compile and AOTInductor take it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

NAMESPACE = "foldline"
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


def operator(name: str, check: Callable[..., None], fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as ``torch.ops.foldline.<name>``.

    ``torch.export`` keeps the operator as one call. When the program is compiled, the function is traced: on CUDA
    tensors the Triton kernels that it launches are compiled into the result (an AOTInductor package then needs neither
    Python nor foldline), on the CPU the plain torch functions of its reference are.

    Args:
        name: without the namespace.
        check: refuses arguments that do not fit, before anything runs or is traced.
        fake: empty results of the right shapes and dtypes, from the same arguments.
    """

    def register(function: Callable[..., Any]) -> Any:
        @wraps(function)
        def checked(*args: Any) -> Any:
            check(*args)
            return function(*args)

        @wraps(fake)
        def checked_fake(*args: Any) -> Any:
            check(*args)
            return fake(*args)

        made: Any = torch.library.triton_op(f"{NAMESPACE}::{name}", checked, mutates_args=())
        made.register_fake(checked_fake)
        return made

    return register


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] as [M, K] whose rows are contiguous."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 and flat.stride(0) >= flat.shape[1] else flat.contiguous()


def activated(y: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation by name, as the kernels compute it."""
    if activation == "relu":
        return torch.relu(y)
    if activation == "gelu":
        return torch.nn.functional.gelu(y)
    if activation == "gelu_tanh":
        return torch.nn.functional.gelu(y, approximate="tanh")
    if activation == "silu":
        return torch.nn.functional.silu(y)
    return y


def expect(condition: Any, text: str) -> None:
    """Refuse operands that do not fit, with torch's own error, as its operators do."""
    torch._check(bool(condition), lambda: text)


def known_activation(activation: str) -> None:
    """Refuse an unknown activation."""
    expect(activation in ACTIVATIONS, f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
