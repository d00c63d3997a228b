"""Rules for TensorRT on what builds, and then computes in float, moves more memory or rounds for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from ..rules.onnx_file import OnnxFile, name_of
from ..rules.qdq import DQ, PRODUCTS, Pair, Q, dequantizer, is_op, pairs, readers, same_scale, stored
from ..rules.rule import Hit, Rule, Where
from .flow import BLOCKS, ProductState, arrival, crosses, state


def _states(where: Where, reason: str) -> Iterator[tuple[ir.Node, ProductState]]:
    for node in where.file.of(*PRODUCTS):
        found = state(where.file, node)
        if found.reason == reason:
            yield node, found


def _operand(where: Where) -> Iterator[Hit]:
    for node, found in _states(where, "operand"):
        which = "activation" if found.x.kind == "quantized" else "weight"
        other = "weight" if which == "activation" else "activation"
        yield name_of(node), f"its {which} is quantized, its {other} is not"


def _blocked(where: Where) -> Iterator[Hit]:
    for node, found in _states(where, "blocked"):
        at = "" if found.at is None else f"{found.at.op_type} {name_of(found.at)}"
        yield name_of(node), f"{at} stands between the DequantizeLinear and it"


def _unequal(where: Where) -> Iterator[Hit]:
    for node, found in _states(where, "unequal"):
        yield name_of(node), f"the concatenation {'' if found.at is None else name_of(found.at)} in front of it"


def _weight_axis(where: Where) -> Iterator[Hit]:
    for node, found in _states(where, "weight-axis"):
        yield name_of(node), f"the scales of its weight lie on axis {found.w.channel}"


def _activation_axis(where: Where) -> Iterator[Hit]:
    for node, found in _states(where, "activation-axis"):
        yield name_of(node), f"its activation has {_count(where.file, found.x.pairs[0])} scales"


def _scale_vector(where: Where) -> Iterator[Hit]:
    for node, found in _states(where, "scale-vector"):
        yield name_of(node), f"the scale of {found.x.pairs[0].name} has shape [1]"


def _packed(where: Where) -> Iterator[Hit]:
    for node, _ in _states(where, "packed"):
        yield name_of(node), "its parts go into the scores as they are"


def _transposed(where: Where) -> Iterator[Hit]:
    for node, _ in _states(where, "transposed"):
        yield name_of(node), "ConvTranspose"


def _blocks(where: Where) -> Iterator[Hit]:
    """Weights that a kernel of its own dequantizes before a float product, in every run."""
    for node, found in _states(where, "blocks"):
        for pair in (*found.w.pairs, *found.x.pairs):
            shape, axis = where.file.shape(pair.data), pair.positive_axis
            if pair.dtype not in ("int4", "int8", "float8_e4m3fn", "float4_e2m1fn"):
                continue  # refused anyway
            if pair.dtype != "int4":
                yield name_of(node), f"{pair.dtype} in blocks"
            elif not pair.block:
                yield name_of(node), "int4 without blocks"
            elif node.op_type == "Conv":
                yield name_of(node), "int4 in a convolution"
            elif shape is not None and axis is not None and shape[axis] == pair.block:
                yield name_of(node), "int4 in one block"
            elif found.x.kind == "quantized":
                yield name_of(node), "int4 weights under a quantized activation"


def _count(file: OnnxFile, pair: Pair) -> Any:
    shape = file.shape(pair.scale)
    return shape[0] if shape else 1


def _recurrent(where: Where) -> Iterator[Hit]:
    for node in where.file.of("LSTM", "GRU", "RNN"):
        if any(dequantizer(where.file, v) is not None for v in node.inputs[:3]):
            yield name_of(node), node.op_type


# ---- residual sums ------------------------------------------------------------------------------------------------
def _adds(where: Where) -> Iterator[tuple[ir.Node, ir.Value, ir.Value]]:
    """Additions of a product's result and something else: (node, branch, skip)."""
    for node in where.file.of("Add"):
        a, b = node.inputs[0], node.inputs[1]
        if a is None or b is None or where.file.is_static(a) or where.file.is_static(b):
            continue
        for branch, skip in ((a, b), (b, a)):
            if product_behind(where.file, branch) is not None:
                yield node, branch, skip
                break


def product_behind(file: OnnxFile, value: ir.Value | None) -> ir.Node | None:
    """The quantized product whose result this is: nobody else reads it, but for a bias addition and a Q/DQ pair."""
    for _ in range(4):
        node = None if value is None else value.producer()
        if node is None or value is None:
            return None
        if is_op(node, *PRODUCTS):
            return node if state(file, node).precision != "float" else None
        if len(readers(value)) != 1:
            return None
        if is_op(node, Q, DQ):
            value = node.inputs[0]
        elif is_op(node, "Add") and any(file.is_static(v) for v in node.inputs):
            value = node.inputs[0] if file.is_static(node.inputs[1]) else node.inputs[1]
        else:
            return None
    return None


def _skip_float(where: Where) -> Iterator[Hit]:
    for node, _, skip in _adds(where):
        if arrival(where.file, skip).kind != "float" or product_behind(where.file, skip) is not None:
            continue
        pair = next((n for n in readers(skip) if is_op(n, Q)), None)
        if pair is not None:
            yield name_of(node), f"{skip.name!r} is read in float although {name_of(pair)} has it in 8 bits"


def _branch_quantized(where: Where) -> Iterator[Hit]:
    for node, branch, _ in _adds(where):
        pair = dequantizer(where.file, branch)
        if pair is not None and not stored(where.file, pair):
            yield name_of(node), f"{pair.name} rounds the branch"


# ---- pairs that cost accuracy and bring nothing ----------------------------------------------------------------------
def _inside_attention(where: Where) -> Iterator[Hit]:
    for core in attention_cores(where.file):
        for pair in core:
            yield pair.name, "a Q/DQ pair between query, key or value and the attention's result"


def attention_cores(file: OnnxFile) -> Iterator[list[Pair]]:
    """For every softmax between two products of activations: the dequantizations of what these products read."""
    for softmax in file.of("Softmax"):
        before, after = _above(file, softmax.inputs[0]), _below(file, softmax.outputs[0])
        if before is None or after is None:
            continue
        found = []
        for node in (before, after):
            for value in node.inputs[:2]:
                found += [p for p in arrival(file, value).pairs if not stored(file, p)]
        if found:
            yield list({id(p.node): p for p in found}.values())


def _above(file: OnnxFile, value: ir.Value | None) -> ir.Node | None:
    """The product of two activations that scores come from, past scaling, mask addition and Q/DQ."""
    for _ in range(10):
        node = None if value is None else value.producer()
        if node is None:
            return None
        if is_op(node, "MatMul"):
            return None if any(file.is_static(v) for v in node.inputs[:2]) else node
        if is_op(node, "Add", "Mul", "Div", "Where", "Cast", "Reshape", "Transpose", "Sub", Q, DQ):
            moving = [v for v in node.inputs if v is not None and not file.is_static(v)]
            value = next((v for v in moving if _leads_to_product(file, v)), None)
        else:
            return None
    return None


def _leads_to_product(file: OnnxFile, value: ir.Value) -> bool:
    seen: ir.Value | None = value
    for _ in range(10):
        node = None if seen is None else seen.producer()
        if node is None:
            return False
        if is_op(node, "MatMul"):
            return True
        seen = next((v for v in node.inputs if v is not None and not file.is_static(v)), None)
    return False


def _below(file: OnnxFile, value: ir.Value | None) -> ir.Node | None:
    for _ in range(10):
        if value is None:
            return None
        users = readers(value)
        product = next((n for n in users if is_op(n, "MatMul")), None)
        if product is not None:
            return product
        step = next((n for n in users if is_op(n, Q, DQ, "Dropout", "Cast", "Reshape", "Where", "Transpose")), None)
        value = None if step is None else step.outputs[0]
    return None


def _unread(where: Where) -> Iterator[Hit]:
    """Pairs whose rounded result no product and no residual sum reads."""
    for pair in pairs(where.file):
        if pair.quantizes or stored(where.file, pair):
            continue
        users = list(_users(where.file, pair.node.outputs[0]))
        if not where.file.is_static(pair.scale) or any(_wants(where.file, n) for n in users):
            continue
        if users or pair.node.outputs[0].is_graph_output():
            into = ", ".join(sorted({n.op_type for n in users})) or "the graph's output"
            yield pair.name, f"it is read by {into} alone"


def _wants(file: OnnxFile, node: ir.Node) -> bool:
    """Whether a reader can make use of integers, or another rule speaks of it."""
    if is_op(node, *PRODUCTS, Q, "Add", "Concat", "LSTM", "GRU", "RNN"):
        return True
    return is_op(node, *BLOCKS) and any(is_op(n, *PRODUCTS, Q) for v in node.outputs for n in _users(file, v))


def _users(file: OnnxFile, value: ir.Value) -> Iterator[ir.Node]:
    """Nodes that read a value, past what a dequantization crosses."""
    stack, seen = [value], {value}
    while stack:
        for node in readers(stack.pop()):
            if crosses(file, node):
                fresh = [v for v in node.outputs if v not in seen]
                stack += fresh
                seen.update(fresh)
            else:
                yield node


def _twice(where: Where) -> Iterator[Hit]:
    """A pair right behind another: with or without an activation between, it rounds twice."""
    for pair in pairs(where.file):
        if not pair.quantizes or pair.data is None:
            continue
        node = pair.data.producer()
        value = pair.data
        if node is not None and is_op(node, "Relu", "Clip") and len(readers(value)) == 1:
            value = node.inputs[0]  # type: ignore[assignment]
        first = dequantizer(where.file, value)
        if first is None or stored(where.file, first):
            continue
        second = Pair(where.file, pair.node)
        if value is pair.data and same_scale(first, second):
            continue
        yield pair.name, f"it rounds again what {first.name} gives"


def _fan_out(where: Where) -> Iterator[Hit]:
    found: dict[ir.Value, list[Pair]] = {}
    for pair in pairs(where.file):
        if pair.quantizes and pair.data is not None:
            found.setdefault(pair.data, []).append(pair)
    for value, many in found.items():
        others = [p for p in many[1:] if not same_scale(many[0], p)]
        if others:
            yield others[0].name, f"{value.name!r} is quantized {len(others) + 1} times, with different scales"


RULES: tuple[Rule, ...] = (
    Rule(
        "operand-float",
        "slow",
        "a product computes in float unless both its operands are quantized",
        "quantize both, or neither",
        _operand,
    ),
    Rule(
        "dequantize-blocked",
        "slow",
        "a product computes in float where its integers do not reach it",
        "quantize behind that operator",
        _blocked,
        "requantize",
    ),
    Rule(
        "concat-scales",
        "slow",
        "a concatenation of unequal scales is read in float",
        "give its operands one scale",
        _unequal,
        "share_scales",
    ),
    Rule(
        "weight-axis",
        "slow",
        "weights whose scales lie off the output channels are dequantized in every run",
        "quantize the weight per output channel",
        _weight_axis,
        "weight_axis",
    ),
    Rule(
        "activation-axis",
        "slow",
        "activations with a scale per channel are computed in float",
        "one scale per activation",
        _activation_axis,
        "per_tensor",
    ),
    Rule(
        "packed-attention",
        "slow",
        "one product for query, key and value whose weight has a scale per channel computes in float",
        "one scale for that weight, or a product for each",
        _packed,
    ),
    Rule(
        "scale-vector",
        "slow",
        "a convolution whose activation has a scale of shape [1] computes in float",
        "store the scale as a scalar",
        _scale_vector,
        "scalars",
    ),
    Rule(
        "weight-blocks",
        "slow",
        "weights that a kernel of its own dequantizes in every run",
        "int4 in two or more blocks of a matrix, or int8 per channel",
        _blocks,
    ),
    Rule(
        "transposed-conv",
        "slow",
        "a transposed convolution has no integer kernel",
        "keep it in float",
        _transposed,
        "strip_float",
    ),
    Rule(
        "recurrent",
        "slow",
        "recurrent layers compute in float, dequantizing in every run",
        "keep their weights in float",
        _recurrent,
    ),
    Rule(
        "residual-skip",
        "slow",
        "a residual sum reads its skip in float",
        "let it read the dequantized value",
        _skip_float,
        "residual",
    ),
    Rule(
        "residual-branch",
        "inaccurate",
        "a residual's branch is rounded before the sum, which the kernel does in float anyway",
        "drop the pair",
        _branch_quantized,
        "residual",
    ),
    Rule(
        "attention",
        "slow",
        "attention with Q/DQ inside is not fused into one kernel (16 bit), and loses accuracy",
        "leave attention in float",
        _inside_attention,
        "strip_attention",
    ),
    Rule(
        "pair-unread",
        "inaccurate",
        "a Q/DQ pair that no integer kernel reads",
        "drop the pair",
        _unread,
        "strip_float",
    ),
    Rule(
        "pair-twice",
        "inaccurate",
        "a value is rounded twice, one pair behind another",
        "keep the last pair",
        _twice,
        "strip_twice",
    ),
    Rule(
        "fan-out",
        "slow",
        "one value is written more than once in 8 bits",
        "one pair for all its readers",
        _fan_out,
        "share_scales",
    ),
)
