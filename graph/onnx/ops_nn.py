"""Layers in canonical terms: convolutions, pools, linear maps, norms, attention, recurrences, resize."""

from __future__ import annotations

from .ops import Canon, Native, axes_of, axis_of, rule

Pads = list[tuple[int, int]]


def _windows(c: Native, kernel: list[int], transposed: bool = False) -> dict[str, object] | None:
    """stride, padding, dilation of a sliding window; None where auto padding needs a size that is unknown."""
    n = len(kernel)
    stride, dilation = c.attr("strides", [1] * n), c.attr("dilations", [1] * n)
    auto = c.attr("auto_pad", "NOTSET")
    if auto in ("NOTSET", "VALID"):
        flat = c.attr("pads", [0] * 2 * n) if auto == "NOTSET" else [0] * 2 * n
        padding: Pads = [(flat[i], flat[i + n]) for i in range(n)]
    else:
        shape = c.hint(0)
        if shape is None:
            return None
        padding = []
        for size, k, s, d in zip(shape[2:], kernel, stride, dilation, strict=True):
            reach = d * (k - 1) + 1
            total = max(reach - s, 0) if transposed else max((-(-size // s) - 1) * s + reach - size, 0)
            small, large = total // 2, total - total // 2
            padding.append((small, large) if auto == "SAME_UPPER" else (large, small))
    return {"stride": stride, "padding": padding, "dilation": dilation}


@rule("Conv", "ConvTranspose")
def conv(c: Native) -> Canon | None:
    weight = c.hint(1)
    if weight is None:
        return None
    kernel = c.attr("kernel_shape") or list(weight[2:])
    transposed = c.node.op_type == "ConvTranspose"
    window = _windows(c, kernel, transposed)
    if window is None:
        return None
    attrs: dict[str, object] = {**window, "groups": c.attr("group", 1), "transposed": transposed}
    extra = c.attr("output_padding", [0] * len(kernel))
    attrs["output_padding"] = extra
    wanted = c.attr("output_shape")
    if transposed and wanted is not None:
        shape, upper = c.hint(0), c.attr("auto_pad", "NOTSET") == "SAME_UPPER"
        if shape is None:
            return None
        steps = zip(shape[2:], wanted[-len(kernel) :], kernel, c.attr("strides", [1] * len(kernel)),
                    c.attr("dilations", [1] * len(kernel)), extra, strict=True)  # fmt: skip
        padding: Pads = []
        for size, out, k, s, d, e in steps:
            total = max(s * (size - 1) + e + (k - 1) * d + 1 - out, 0)
            half = total // 2
            padding.append((half, total - half) if upper else (total - half, half))
        attrs["padding"] = padding
    return Canon("conv", c.every(3), attrs)


@rule("MaxPool", "AveragePool")
def pool(c: Native) -> Canon | None:
    window = _windows(c, c.attr("kernel_shape"))
    if window is None or c.used(1):
        return None
    attrs = {"kernel": c.attr("kernel_shape"), **window, "ceil": bool(c.attr("ceil_mode", 0))}
    attrs["count_include_pad"] = bool(c.attr("count_include_pad", 0))
    return Canon("max_pool" if c.node.op_type == "MaxPool" else "avg_pool", (0,), attrs)


@rule("GlobalAveragePool", "GlobalMaxPool")
def global_pool(c: Native) -> Canon | None:
    rank = c.rank(0)
    if rank is None:
        return None
    op = "adaptive_avg_pool" if c.node.op_type == "GlobalAveragePool" else "adaptive_max_pool"
    return Canon(op, (0,), {"output_size": [1] * (rank - 2)})


@rule("Gemm")
def gemm(c: Native) -> Canon | None:
    addend = c.hint(2) if c.has(2) else ()
    if c.attr("transA", 0) or addend is None:
        return None
    if len(addend) == 2 and addend[0] != 1:
        return None  # a full matrix: not a bias
    attrs = {"transposed_weight": not c.attr("transB", 0), "alpha": c.attr("alpha", 1.0), "beta": c.attr("beta", 1.0)}
    return Canon("linear", c.every(3), attrs)


_WEIGHT_CARRIERS = ("DequantizeLinear", "QuantizeLinear", "Cast", "Identity", "Transpose")


def _is_weight(c: Native, position: int) -> bool:
    """A stored matrix, possibly behind the ops of weight-only quantization."""
    from .native import constant_tensor

    value = c.value(position)
    for _ in range(8):
        if value is None:
            return False
        if constant_tensor(value) is not None:
            return True
        producer = value.producer()
        if producer is None or producer.op_type not in _WEIGHT_CARRIERS:
            return False
        value = producer.inputs[0]
    return False


@rule("MatMul")
def matmul(c: Native) -> Canon | None:
    if c.rank(1) == 2 and _is_weight(c, 1):
        return Canon("linear", (0, 1), {"transposed_weight": True, "alpha": 1.0, "beta": 1.0})
    return Canon("matmul", (0, 1))


@rule("BatchNormalization")
def batch_norm(c: Native) -> Canon | None:
    if any(c.used(i) for i in range(1, len(c.node.outputs))):
        return None
    attrs = {"eps": c.attr("epsilon", 1e-5), "training": bool(c.attr("training_mode", 0))}
    return Canon("batch_norm", c.every(5), attrs)


@rule("InstanceNormalization")
def instance_norm(c: Native) -> Canon:
    return Canon("instance_norm", c.every(3), {"eps": c.attr("epsilon", 1e-5), "training": False})


@rule("GroupNormalization")
def group_norm(c: Native) -> Canon | None:
    if c.opset < 21:
        return None  # scale and bias are per group there
    return Canon("group_norm", c.every(3), {"groups": c.attr("num_groups"), "eps": c.attr("epsilon", 1e-5)})


@rule("LayerNormalization", "RMSNormalization")
def layer_norm(c: Native) -> Canon | None:
    rank = c.rank(0)
    if rank is None or c.used(1) or c.used(2):
        return None
    op = "layer_norm" if c.node.op_type == "LayerNormalization" else "rms_norm"
    axes = list(range(axis_of(c.attr("axis", -1), rank), rank))
    return Canon(op, c.every(3), {"axes": axes, "eps": c.attr("epsilon", 1e-5)})


@rule("LpNormalization")
def lp_normalize(c: Native) -> Canon | None:
    rank = c.rank(0)
    if rank is None:
        return None
    return Canon("lp_normalize", (0,), {"axes": axes_of([c.attr("axis", -1)], rank), "p": c.attr("p", 2), "eps": 0.0})


@rule("LRN")
def local_response_norm(c: Native) -> Canon:
    attrs = {
        "size": c.attr("size"),
        "alpha": c.attr("alpha", 1e-4),
        "beta": c.attr("beta", 0.75),
        "k": c.attr("bias", 1.0),
    }
    return Canon("local_response_norm", (0,), attrs)


@rule("Softmax", "LogSoftmax")
def softmax(c: Native) -> Canon | None:
    rank = c.rank(0)
    if rank is None:
        return None
    axis = axis_of(c.attr("axis", -1 if c.opset >= 13 else 1), rank)
    if c.opset < 13 and axis != rank - 1:
        return None  # flattens the trailing axes into one
    return Canon("softmax" if c.node.op_type == "Softmax" else "log_softmax", (0,), {"axis": axis})


@rule("Attention")
def attention(c: Native) -> Canon | None:
    q, k = c.hint(0), c.hint(1)
    if q is None or k is None or any(c.has(i) for i in range(4, 7)) or any(c.used(i) for i in range(1, 4)):
        return None  # key-value cache, padding lengths
    if (
        c.attr("softcap", 0.0)
        or len(q) != 4
        or c.attr("left_window_size", -1) >= 0
        or c.attr("right_window_size", -1) >= 0
    ):
        return None  # three axes: heads packed into the last one, a layout that sdpa does not have
    attrs = {"causal": bool(c.attr("is_causal", 0)), "scale": c.attr("scale"), "gqa": q[1] != k[1]}
    return Canon("sdpa", c.every(4), attrs)


@rule("LSTM", "GRU", "RNN")
def recurrent(c: Native) -> Canon | None:
    if c.has(4) or c.has(7):  # lengths per sample; peepholes
        return None
    op = c.node.op_type.lower()
    weights = (1, 2, 3 if c.has(3) else None)
    states = (5 if c.has(5) else None, 6 if op == "lstm" and c.has(6) else None)
    direction = c.attr("direction", "forward")
    hidden = c.attr("hidden_size") or (c.hint(2) or (0, 0, 0))[2]
    attrs = {
        "layers": 1,
        "bidirectional": direction == "bidirectional",
        "batch_first": bool(c.attr("layout", 0)),
        "has_biases": c.has(3),
        "gates": {"lstm": 4, "gru": 3, "rnn": 1}[op],
        "layout": "onnx",
        "hidden": hidden,
    }
    if direction == "reverse":
        attrs["reverse"] = True
    return Canon(op, (0, *states, *weights), attrs)


@rule("Resize", "Upsample")
def resize(c: Native) -> Canon | None:
    shape, out = c.hint(0), c.out(0)
    if shape is None or out is None or c.attr("coordinate_transformation_mode") == "tf_crop_and_resize":
        return None
    first = 2 if c.node.op_type == "Resize" and c.opset >= 11 else 1
    sizes = c.sizes(*range(1, 4))
    scales = c.const(first)
    axes = axes_of(c.attr("axes", range(len(shape))), len(shape))
    if scales is not None and scales.size == len(axes):
        axes = [a for a, s in zip(axes, scales.ravel().tolist(), strict=True) if s != 1.0]
    else:
        listed, axes = axes, [a for a in axes if shape[a] != out[a]]
        given = c.ints(3) if first == 2 else None
        if given is not None and len(given) == len(listed):
            wanted: list[int | None] = [None] * len(shape)
            for a, n in zip(listed, given, strict=True):
                wanted[a] = n
            return Canon("resize", (0,), {"axes": axes, "shape": wanted}, sizes)
    return Canon("resize", (0,), {"axes": axes}, sizes)


@rule("DepthToSpace", "SpaceToDepth")
def pixel_shuffle(c: Native) -> Canon:
    factor = c.attr("blocksize")
    if c.node.op_type == "SpaceToDepth":
        return Canon("pixel_unshuffle", (0,), {"factor": factor, "mode": c.attr("mode", "DCR").lower()})
    return Canon("pixel_shuffle", (0,), {"factor": factor, "mode": c.attr("mode", "DCR").lower()})


@rule("Col2Im")
def fold(c: Native) -> Canon | None:
    size, kernel = c.ints(1), c.const(2)
    if size is None or kernel is None:
        return None
    n = kernel.size
    flat = c.attr("pads", [0] * 2 * n)
    attrs = {
        "kernel": [int(k) for k in kernel.ravel()],
        "stride": c.attr("strides", [1] * n),
        "padding": [(flat[i], flat[i + n]) for i in range(n)],
        "dilation": c.attr("dilations", [1] * n),
        "output_size": size,
    }
    return Canon("fold", (0,), attrs, c.sizes(1, 2))


@rule("QuantizeLinear", "DequantizeLinear")
def quantize(c: Native) -> Canon | None:
    rank, scale = c.rank(0), c.hint(1)
    if rank is None or scale is None:
        return None
    quantizes = c.node.op_type == "QuantizeLinear"
    info = c.table.info.get(c.node.outputs[0])
    dtype = info.dtype if quantizes and info is not None else c.dtype(0)
    block = c.attr("block_size", 0)
    per_tensor = not scale or (len(scale) == 1 and scale[0] == 1 and not block and rank != 1)
    axis = None if per_tensor else axis_of(c.attr("axis", 1), rank)
    attrs = {"axis": axis, "dtype": dtype, "block": block}
    return Canon("quantize" if quantizes else "dequantize", c.every(3), attrs)
