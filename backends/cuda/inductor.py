"""Q/DQ in the operators that Inductor's x86 patterns know (quantized_decomposed), so that it calls oneDNN's int8."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...graph.fx.custom import _RANGES
from ...graph.ir import Node
from .constants import Constants
from .module import stored

if TYPE_CHECKING:
    from ...graph.fx import FXGraph


def decomposed_quantization(graph: FXGraph, module: fx.GraphModule) -> Counter[str]:
    """Rewrite the Q/DQ calls of ``module`` (of ``graph``) that are per tensor, or per channel of a stored weight.

    Biases stored as int32 become floats: the patterns add the bias in float. Others stay as they are and are
    computed by plain torch functions.

    Returns:
        How many calls of each operator were written.
    """
    import torch.ao.quantization.fx._decomposed

    constants, written = Constants(graph), Counter[str]()
    named = {n.name: n for n in module.graph.nodes}
    for node in graph.nodes:
        native = named.get(node.native.name)
        if native is None or node.op not in ("quantize", "dequantize"):
            continue
        if node.op == "dequantize" and _is_bias(constants, node):
            data = constants.get(node.output)
            assert data is not None
            with module.graph.inserting_before(native):
                made = stored(module, f"{node.name}_float", data)
            name = "bias"
        else:
            call = _call(constants, node)
            if call is None:
                continue
            name, args = call
            with module.graph.inserting_before(native):
                items = tuple(
                    stored(module, f"{node.name}_{i}", a) if isinstance(a, torch.Tensor) else a
                    for i, a in enumerate(args)
                )
                overload = getattr(torch.ops.quantized_decomposed, name).default
                made = module.graph.call_function(overload, (native.args[0], *items))
        native.replace_all_uses_with(made)
        written[name] += 1
    module.graph.eliminate_dead_code()
    module.recompile()
    return written


def _is_bias(constants: Constants, node: Node) -> bool:
    x = node.input(0)
    return x is not None and x.dtype == "int32" and constants.holds(node.output)


def _call(constants: Constants, node: Node) -> tuple[str, tuple[Any, ...]] | None:
    """(operator, its arguments behind the first) of a Q or DQ, or None where Inductor has no pattern."""
    scale, zero = constants.get(node.input(1)), constants.get(node.input(2))
    x = node.input(0)
    if x is None or scale is None or node.attrs.get("block") or (node.input(2) is not None and zero is None):
        return None
    kind = str(node.attrs.get("dtype")) if node.op == "quantize" else x.dtype
    if kind not in _RANGES or _RANGES[kind][2] not in (torch.int8, torch.uint8):
        return None
    low, high, dtype = _RANGES[kind]
    zero = torch.zeros_like(scale, dtype=torch.int64) if zero is None else zero.to(torch.int64)
    if scale.numel() == 1 and node.attrs.get("axis") is None:
        return f"{node.op}_per_tensor", (float(scale), int(zero), low, high, dtype)
    if node.op == "dequantize" and scale.ndim == 1 and constants.holds(x) and x.rank is not None:
        axis = int(node.attrs.get("axis") or 0) % x.rank
        return "dequantize_per_channel", (scale.float(), zero.expand(scale.shape), axis, low, high, dtype)
    return None
