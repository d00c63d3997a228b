"""Matrix products of a float32 graph in a 16-bit type: operands cast in front, the result cast back."""

from __future__ import annotations

import torch
from torch import fx

from .module import stored

PRODUCTS = frozenset(
    "linear addmm mm bmm matmul baddbmm conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d "
    "conv_transpose3d scaled_dot_product_attention einsum".split()
)
"""ATen operators that tensor cores compute; everything between them stays as it is (norms, softmax, additions)."""


def narrow_products(module: fx.GraphModule, dtype: torch.dtype) -> int:
    """Let every float32 matrix product of the module compute in ``dtype``; returns how many do.

    Stored operands are converted once; the compiler fuses the other casts into what stands beside them.
    """
    if dtype == torch.float32:
        return 0
    native, count = module.graph, 0
    converted: dict[str, str] = {}
    for node in list(native.nodes):
        target = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
            continue
        value = node.meta.get("val")
        if target._schema.name.removeprefix("aten::") not in PRODUCTS:
            continue
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            continue
        with native.inserting_before(node):
            cast = {n: _cast(module, n, dtype, converted) for n in node.all_input_nodes}
        node.args = fx.node.map_arg(node.args, cast.__getitem__)
        node.kwargs = fx.node.map_arg(node.kwargs, cast.__getitem__)
        with native.inserting_after(node):
            back = native.call_function(torch.ops.aten.to.dtype, (node, torch.float32))
        node.replace_all_uses_with(back, delete_user_cb=back.__ne__)
        count += 1
    native.eliminate_dead_code()
    module.recompile()
    return count


def _cast(module: fx.GraphModule, node: fx.Node, dtype: torch.dtype, converted: dict[str, str]) -> fx.Node:
    """The operand in ``dtype``; masks, sizes and what is no float32 stay."""
    if node.op == "get_attr":
        name = str(node.target)
        tensor = module.get_parameter(name) if name in dict(module.named_parameters()) else module.get_buffer(name)
        if tensor.dtype != torch.float32:
            return node
        if name not in converted:
            made = stored(module, f"{name}_{str(dtype).removeprefix('torch.')}", tensor.detach().to(dtype))
            converted[name] = str(made.target)
            return made
        return module.graph.get_attr(converted[name])
    value = node.meta.get("val")
    if value is not None and not (isinstance(value, torch.Tensor) and value.dtype == torch.float32):
        return node
    return module.graph.call_function(torch.ops.aten.to.dtype, (node, dtype))
