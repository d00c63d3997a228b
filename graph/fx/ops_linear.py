"""ATen call -> canonical node: convolutions, matrix products, lookups, attention, recurrent layers, normalizations."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .ops import ABSENT, Call, Slot, Spec, list_slots, reads, slots

aten = torch.ops.aten


def _spread(value: Any, n: int) -> list[int]:
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    return items * n if len(items) == 1 and n > 1 else items


def _pairs(value: Any, n: int) -> list[tuple[int, int]]:
    return [(int(p), int(p)) for p in _spread(value, n)]


@reads("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
def _conv(c: Call) -> Spec | None:
    weight = c.val(c.get("weight"))
    n = weight.ndim - 2
    transposed = "transpose" in str(c.node.target) or bool(c.get("transposed", False))
    stride, dilation = _spread(c.get("stride"), n), _spread(c.get("dilation"), n)
    padding = c.get("padding")
    if isinstance(padding, str):
        total = [d * (int(k) - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = _pairs(padding, n)
    attrs = {
        "stride": stride,
        "padding": pads,
        "dilation": dilation,
        "groups": c.get("groups"),
        "transposed": transposed,
        "output_padding": _spread(c.get("output_padding", [0] * n), n),
    }

    def put_padding(new: Any) -> None:
        if any(lo != hi for lo, hi in new):
            raise ValueError("ATen convolutions pad both sides alike: insert a pad node")
        if isinstance(padding, str):
            bias = c.get("bias")
            base = getattr(aten, str(c.node.target).split(".")[1]).default
            c.retarget(base, c.get("input"), c.get("weight"), bias, stride, [0] * n, dilation, c.get("groups"))
        c.put("padding", [int(lo) for lo, _ in new])

    write = {
        "groups": lambda v: c.put("groups", int(v)),
        "stride": lambda v: c.put("stride", list(v)),
        "dilation": lambda v: c.put("dilation", list(v)),
        "padding": put_padding,
        "output_padding": lambda v: c.put("output_padding", list(v)),
    }
    return Spec("conv", slots("input", "weight", "bias"), attrs, write=write)


def _stored(item: Any) -> bool:
    """A stored tensor, possibly behind the ops of quantization."""
    while isinstance(item, fx.Node) and item.op == "call_function" and "quantize" in str(item.target) and item.args:
        item = item.args[0]
    return isinstance(item, fx.Node) and item.op == "get_attr"


@reads("linear")
def _linear(c: Call) -> Spec | None:
    if c.rank("weight") != 2:
        return None
    return Spec("linear", slots("input", "weight", "bias"), {"transposed_weight": False, "alpha": 1.0, "beta": 1.0})


@reads("addmm")
def _addmm(c: Call) -> Spec | None:
    if not _stored(c.get("mat2")) or c.overload != "":
        return None
    attrs = {"transposed_weight": True, "alpha": float(c.get("alpha")), "beta": float(c.get("beta"))}
    write = {"alpha": lambda v: c.put("alpha", v), "beta": lambda v: c.put("beta", v)}
    return Spec("linear", slots("mat1", "mat2", "self"), attrs, write=write)


@reads("mm", "bmm", "matmul", "mv", "dot")
def _matmul(c: Call) -> Spec | None:
    if c.overload == "dtype":
        return None
    right = next(n for n in ("mat2", "other", "vec", "tensor") if c.has(n))
    if _stored(c.get(right)) and c.rank(right) == 2 and c.rank("self") >= 2:
        return Spec("linear", slots("self", right), {"transposed_weight": True, "alpha": 1.0, "beta": 1.0})
    return Spec("matmul", slots("self", right))


@reads("einsum")
def _einsum(c: Call) -> Spec | None:
    equation = str(c.get("equation")).replace(" ", "")
    if "." in equation or not equation.replace(",", "").replace("->", "").isalpha():
        return None
    if "->" not in equation:
        letters = equation.replace(",", "")
        equation += "->" + "".join(sorted(x for x in set(letters) if letters.count(x) == 1))
    if equation != equation.lower():
        free = iter(x for x in "abcdefghijklmnopqrstuvwxyz" if x not in equation)
        for upper in sorted({x for x in equation if x.isupper()}):
            equation = equation.replace(upper, next(free))
    return Spec(
        "einsum",
        list_slots(c, "tensors"),
        {"equation": equation},
        write={"equation": lambda v: c.put("equation", v)},
    )


@reads("embedding")
def _embedding(c: Call) -> Spec | None:
    return Spec("gather", slots("weight", "indices"), {"axis": 0})


@reads("scaled_dot_product_attention")
def _sdpa(c: Call) -> Spec | None:
    attrs = {"causal": bool(c.get("is_causal")), "scale": c.get("scale"), "gqa": bool(c.get("enable_gqa"))}
    write = {
        "scale": lambda v: c.put("scale", None if v is None else float(v)),
        "causal": lambda v: c.put("is_causal", bool(v)),
        "gqa": lambda v: c.put("enable_gqa", bool(v)),
    }
    return Spec("sdpa", slots("query", "key", "value", "attn_mask"), attrs, write=write)


@reads("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(c: Call) -> Spec | None:
    if c.overload != "input":
        return None
    op = str(c.node.target).split(".")[1]
    has_biases, layers, both = bool(c.get("has_biases")), int(c.get("num_layers")), bool(c.get("bidirectional"))
    per = 4 if has_biases else 2
    params = list_slots(c, "params")
    if len(params) != per * layers * (2 if both else 1):
        return None  # projections (proj_size) have no canonical form
    states: list[Slot] = [("hx", 0), ("hx", 1)] if op == "lstm" else [("hx", None), ABSENT]
    hidden = c.val(c.get("params")[1]).shape[-1]
    attrs = {
        "layers": layers,
        "bidirectional": both,
        "batch_first": bool(c.get("batch_first")),
        "has_biases": has_biases,
        "gates": {"lstm": 4, "gru": 3}.get(op, 1),
        "layout": "torch",
        "hidden": int(hidden),
    }
    if op.startswith("rnn"):
        attrs["activation"] = op[4:]
    operands: list[Slot] = [("input", None), *states, *params]
    return Spec("rnn" if op.startswith("rnn") else op, operands, attrs, write={"hidden": lambda v: None})


@reads("batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_with_update", "native_batch_norm")
def _batch_norm(c: Call) -> Spec | None:
    training = bool(c.get("training", False))
    if training and c.get("running_mean") is None and "native" in str(c.node.target):
        return None
    return Spec(
        "batch_norm",
        slots("input", "weight", "bias", "running_mean", "running_var"),
        {"eps": float(c.get("eps")), "training": training},
        write={"eps": lambda v: c.put("eps", float(v))},
    )


@reads("instance_norm")
def _instance_norm(c: Call) -> Spec | None:
    return Spec(
        "instance_norm",
        slots("input", "weight", "bias", "running_mean", "running_var"),
        {"eps": float(c.get("eps")), "training": bool(c.get("use_input_stats"))},
        write={"eps": lambda v: c.put("eps", float(v))},
    )


@reads("group_norm")
def _group_norm(c: Call) -> Spec | None:
    attrs = {"groups": int(c.get("num_groups")), "eps": float(c.get("eps"))}
    write = {"groups": lambda v: c.put("num_groups", int(v)), "eps": lambda v: c.put("eps", float(v))}
    return Spec("group_norm", slots("input", "weight", "bias"), attrs, write=write)


@reads("layer_norm", "native_layer_norm", "rms_norm")
def _layer_norm(c: Call) -> Spec | None:
    op = "rms_norm" if "rms" in str(c.node.target) else "layer_norm"
    rank, shape = c.rank("input"), c.get("normalized_shape")
    eps = c.get("eps")
    if eps is None:
        eps = torch.finfo(c.val(c.get("input")).dtype).eps
    names = ("input", "weight", "bias") if op == "layer_norm" else ("input", "weight")
    return Spec(
        op,
        slots(*names),
        {"axes": list(range(rank - len(shape), rank)), "eps": float(eps), "normalized_shape": c.sizes(shape)},
        c.dynamic(shape),
        {
            "eps": lambda v: c.put("eps", float(v)),
            "normalized_shape": lambda v: c.put_sizes("normalized_shape", v),
        },
    )


@reads("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax")
def _softmax(c: Call) -> Spec | None:
    op = "log_softmax" if "log_softmax" in str(c.node.target) else "softmax"
    return Spec(op, slots("self"), {"axis": c.axis(c.get("dim"), c.rank("self"))})


@reads("prelu", "_prelu_kernel")
def _prelu(c: Call) -> Spec | None:
    return Spec("prelu", slots("self", "weight"))


@reads("foldline.quantize_linear", "foldline.dequantize_linear")
def _quantize(c: Call) -> Spec | None:
    op = "dequantize" if "dequantize" in str(c.node.target) else "quantize"
    attrs = {"axis": c.get("axis"), "dtype": c.get("dtype"), "block": int(c.get("block"))}
    if op == "quantize" and c.get("rounding") != "divide":
        attrs["rounding"] = c.get("rounding")
    write = {
        "axis": lambda v: c.put("axis", v),
        "dtype": lambda v: c.put("dtype", v),
        "block": lambda v: c.put("block", int(v)),
    }
    return Spec(op, slots("x", "scale", "zero_point"), attrs, write=write)


@reads("fake_quantize_per_channel_affine", "fake_quantize_per_tensor_affine")
def _fake_quantize(c: Call) -> Spec | None:
    attrs = {"axis": c.get("axis", None), "quant_min": c.get("quant_min"), "quant_max": c.get("quant_max")}
    return Spec("fake_quantize", slots("self", "scale", "zero_point"), attrs)


@reads("foldline.matmul_nbits")
def _matmul_nbits(c: Call) -> Spec | None:
    attrs = {key: int(c.get(key)) for key in ("k", "n", "bits", "block")}
    return Spec("matmul_nbits", slots("x", "packed", "scales", "zero_points", "bias"), attrs)


@reads("foldline.fake_quantize")
def _trained_quantize(c: Call) -> Spec | None:
    attrs = {"axis": c.get("axis"), "quant_min": c.get("low"), "quant_max": c.get("high"), "learn": c.get("learn")}
    return Spec("fake_quantize", slots("x", "scale", "zero_point"), attrs, write={"axis": lambda v: c.put("axis", v)})
