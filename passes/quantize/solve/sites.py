"""Weight sites: which stored tensor, bias and axes belong to a product or a look-up, and what stands in the way."""

from __future__ import annotations

from ....graph.ir import Node, Value
from ..constants import constant
from ..placement import WeightSite
from ..spec import BackendSpec, OpPlacement, TensorFormat, input_axis, output_axis


def data_operands(node: Node, rule: OpPlacement) -> list[Value | None]:
    """The operands that are activations."""
    if rule.data is None:
        return list(node.inputs)
    return [node.input(i) for i in rule.data]


def obstacle(node: Node, rule: OpPlacement) -> str:
    """Why a node cannot take part by this rule, or an empty string."""
    if rule.role == "float":
        return ""
    if rule.role == "table":
        return _table_obstacle(node, rule)
    for x in data_operands(node, rule):
        if x is None or x.is_const:
            return "an operand that would be quantized as an activation is a constant"
        if x.dtype != "float32":
            return f"its operand is {x.dtype}; integer kernels take float32 around them"
    if rule.role == "carry" and node.op == "pad":
        zeros = node.attrs.get("mode", "constant") == "constant" and node.attrs.get("value") in (0, 0.0, None)
        return "" if zeros else "it pads with something other than 0"
    if rule.role not in ("anchor", "weight_only") or rule.weight is None:
        return ""
    w = node.input(rule.weight)
    if w is None or w.weight is None:
        return "its weight is computed, not stored (Fold evaluates constant subgraphs)"
    if w.dtype != "float32":
        return f"its weight is {w.dtype}, not float32"
    if len(w.weight.shape) < 2:
        return "its weight has one axis only"
    if any(abs(node.attrs.get(key, 1.0) - 1.0) > 0 for key in ("alpha", "beta")):
        return "integer kernels take alpha = beta = 1"
    return ""


def _table_obstacle(node: Node, rule: OpPlacement) -> str:
    w = node.input(rule.weight or 0)
    if w is None or w.weight is None:
        return "what it looks up is computed, not stored"
    if w.dtype != "float32" or len(w.weight.shape) != 2:
        return f"its table is {w.dtype} of rank {len(w.weight.shape)}; embeddings are float32 tables of rank 2"
    if node.attrs.get("axis", 0) != 0:
        return "it looks up along another axis than the rows"
    rows = node.input(1 - (rule.weight or 0))
    if rows is not None and (rows.is_const or constant(rows, {}, ranges=True)):
        return "it looks up the same rows in every run: its result is a constant"
    if node.output.is_output and not node.output.uses:
        return "its result is a graph output"
    return ""


def weight_site(node: Node, rule: OpPlacement, spec: BackendSpec) -> WeightSite | str:
    """The site of an anchor, of a weight-only product or of a table, or why there can be none."""
    assert rule.weight is not None
    w, x = node.inputs[rule.weight], node.input((rule.data or (0,))[0])
    if rule.role == "table":
        x = node.input(1 - rule.weight)
    assert w is not None and w.weight is not None and x is not None
    form = rule.weight_format or spec.weights
    inner = input_axis(node) if len(w.weight.shape) >= 2 else None
    problem = _fits(w.weight.shape, form, inner, node)
    if problem:
        return problem
    site = WeightSite(node, rule.weight, w.weight, output_axis(node), x, in_axis=inner, form=form, rule=rule)
    bias = node.input(rule.bias) if rule.bias is not None else None
    if rule.role != "anchor" or rule.bias_dtype != "int32":
        return site
    channels = w.weight.shape[site.axis]
    if bias is not None:
        if bias.weight is None or bias.weight.size != channels:
            return "its bias is computed or not one value per output channel"
        site.bias, site.bias_node, site.bias_position = bias.weight, node, rule.bias or 0
    elif rule.bias_add:
        _find_bias_add(site, channels)
    return site


def _fits(shape: tuple[int, ...], form: TensorFormat, inner: int | None, node: Node) -> str:
    if form.granularity == "block" and inner is not None and len(shape) != 2:
        return f"blocks lie along the rows of a matrix; its weight has rank {len(shape)}"
    return ""


def _find_bias_add(site: WeightSite, channels: int) -> None:
    """Note the constant that a single following addition adds along the last axis, if there is one."""
    value = site.node.output
    if value.is_output or len(value.uses) != 1:
        return
    user, position = value.uses[0]
    other = user.input(1 - position) if user.op == "add" and len(user.inputs) == 2 else None
    if other is None or other.weight is None or other.weight.shape != (channels,) or other.dtype != "float32":
        return
    if user.attrs.get("alpha", 1) == 1:
        site.bias, site.bias_node, site.bias_position = other.weight, user, 1 - position
