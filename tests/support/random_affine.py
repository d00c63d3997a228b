"""Random ONNX graphs round affine maps: linear operators, norms, arithmetic with constants, and what moves indices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = tuple[int, ...]
LIMIT = 2048


class Builder:
    """Collects nodes; ``now`` is the value that the next operator reads, ``shape`` its shape."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        # axes of equal length on purpose: a map on the wrong one must not look right
        n = int(self.rng.integers(2, 5))
        self.shape: Shape = (2, 4, n, 4) if self.rng.random() < 0.7 else (2, n, 4)
        self.first = self.shape
        self.now = "x"
        self.seen: list[tuple[str, Shape]] = []
        self.outputs: list[str] = []

    def const(self, shape: Shape, *, ints: list[int] | None = None, low: float | None = None) -> str:
        name = f"c{len(self.weights)}"
        if ints is not None:
            data = np.asarray(ints, np.int64)
        else:
            data = self.rng.normal(size=shape) if low is None else self.rng.uniform(low, low + 1.0, size=shape)
            data = data.astype(np.float32)
            if low is None and self.rng.random() < 0.1:
                data[...] = np.abs(data) + 0.1
        self.weights.append(numpy_helper.from_array(np.asarray(data), name))
        return name

    def emit(self, op: str, inputs: list[str], shape: Shape | None = None, outputs: int = 1, **attrs: object) -> str:
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, f"{op}_{len(self.nodes)}", **attrs))
        if shape is not None:
            self.seen.append((self.now, self.shape))
            self.now, self.shape = names[0], shape
        return names[0]

    def model(self) -> onnx.ModelProto:
        outputs = dict.fromkeys([*self.outputs, self.now])
        graph = helper.make_graph(
            self.nodes, "random", [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.first)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs], self.weights,
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        return onnx.shape_inference.infer_shapes(model)


def _arithmetic(b: Builder) -> None:
    lead = int(b.rng.integers(0, len(b.shape)))
    shape = tuple(n if b.rng.random() < 0.5 else 1 for n in b.shape[lead:])
    if b.rng.random() < 0.2:
        shape = ()
    op = str(b.rng.choice(["Mul", "Mul", "Add", "Add", "Sub", "Div"]))
    other = b.const(shape, low=0.5 if op == "Div" else None)
    b.emit(op, [b.now, other] if b.rng.random() < 0.7 or op == "Div" else [other, b.now], b.shape)


def _batch_norm(b: Builder) -> None:
    c = b.shape[1]
    stats = [b.const((c,)), b.const((c,)), b.const((c,)), b.const((c,), low=0.5)]
    b.emit("BatchNormalization", [b.now, *stats], b.shape)


def _conv(b: Builder) -> None:
    if len(b.shape) < 3:
        return
    c, spatial = b.shape[1], b.shape[2:]
    groups = int(b.rng.choice([g for g in (1, 2, 4) if c % g == 0]))
    out = groups * int(b.rng.integers(1, 4))
    kernel = [int(b.rng.integers(1, min(3, n) + 1)) for n in spatial]
    pads = [int(b.rng.integers(0, 2)) if k > 1 else 0 for k in kernel]
    bias = [b.const((out,))] if b.rng.random() < 0.5 else []
    if b.rng.random() < 0.25:
        size = tuple(n + k - 1 for n, k in zip(spatial, kernel, strict=True))
        weight = b.const((c, out // groups, *kernel))
        b.emit("ConvTranspose", [b.now, weight, *bias], (b.shape[0], out, *size), group=groups)
        return
    size = tuple(n + 2 * p - k + 1 for n, k, p in zip(spatial, kernel, pads, strict=True))
    weight = b.const((out, c // groups, *kernel))
    b.emit("Conv", [b.now, weight, *bias], (b.shape[0], out, *size), group=groups, pads=[*pads, *pads])


def _product(b: Builder) -> None:
    k, n = b.shape[-1], int(b.rng.integers(1, 5))
    kind = int(b.rng.integers(0, 5))
    if kind == 0 and len(b.shape) == 2:
        alpha, beta = (float(v) for v in b.rng.choice([0.5, 1.0, -2.0], 2))
        bias = [b.const([(n,), (1, n), (1,)][int(b.rng.integers(0, 3))])] if b.rng.random() < 0.7 else []
        flip = int(b.rng.integers(0, 2))
        weight = b.const((n, k) if flip else (k, n))
        b.emit("Gemm", [b.now, weight, *bias], (b.shape[0], n), alpha=alpha, beta=beta, transB=flip)
    elif kind == 1 and len(b.shape) > 2:
        b.emit("MatMul", [b.const((n, b.shape[-2])), b.now], (*b.shape[:-2], n, k))
    elif kind == 2 and len(b.shape) > 2:
        b.emit(
            "MatMul", [b.now, b.const((b.shape[-3], k, n) if b.rng.random() < 0.5 else (1, k, n))], (*b.shape[:-1], n)
        )
    elif kind == 3 and len(b.shape) == 4:
        b.emit(
            "Einsum",
            [b.now, b.const((b.shape[1], b.shape[3], n))],
            (b.shape[0], n, b.shape[2]),
            equation="bchw,cwo->boh",
        )
    else:
        b.emit("MatMul", [b.now, b.const((k, n))], (*b.shape[:-1], n))
        if b.rng.random() < 0.6:
            b.emit("Add", [b.now, b.const((n,))], b.shape)


def _norm(b: Builder) -> None:
    if b.rng.random() < 0.3 and len(b.shape) > 2 and min(b.shape) > 0 and np.prod(b.shape[2:]) > 1:
        c = b.shape[1]
        b.emit("InstanceNormalization", [b.now, b.const((c,)), b.const((c,))], b.shape, epsilon=0.1)
        return
    axis = int(b.rng.integers(1, len(b.shape)))
    bias = [b.const(b.shape[axis:])] if b.rng.random() < 0.7 else []
    b.emit("LayerNormalization", [b.now, b.const(b.shape[axis:]), *bias], b.shape, axis=axis, epsilon=0.1)


def _unary(b: Builder) -> None:
    op = str(b.rng.choice(["Relu", "Relu", "LeakyRelu", "Abs", "Neg", "Identity", "Sigmoid", "Tanh"]))
    b.emit(op, [b.now], b.shape)


def _pool(b: Builder) -> None:
    if len(b.shape) < 3:
        return
    if b.rng.random() < 0.3:
        b.emit("GlobalAveragePool", [b.now], (*b.shape[:2], *[1] * (len(b.shape) - 2)))
        return
    kernel = [min(2, n) for n in b.shape[2:]]
    pads = [int(b.rng.integers(0, 2)) if k > 1 else 0 for k in kernel]
    size = tuple(n + 2 * p - k + 1 for n, k, p in zip(b.shape[2:], kernel, pads, strict=True))
    op = str(b.rng.choice(["MaxPool", "AveragePool"]))
    extra = {"count_include_pad": int(b.rng.integers(0, 2))} if op == "AveragePool" else {}
    b.emit(op, [b.now], (*b.shape[:2], *size), kernel_shape=kernel, pads=[*pads, *pads], **extra)


def _reduce(b: Builder) -> None:
    if len(b.shape) < 3:
        return
    axis = int(b.rng.integers(1, len(b.shape)))
    keep = int(b.rng.integers(0, 2))
    op = str(b.rng.choice(["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"]))
    shape = tuple(1 if i == axis else n for i, n in enumerate(b.shape) if keep or i != axis)
    b.emit(op, [b.now, b.const((), ints=[axis])], shape, keepdims=keep)


def _transpose(b: Builder) -> None:
    perm = [int(p) for p in b.rng.permutation(len(b.shape))]
    b.emit("Transpose", [b.now], tuple(b.shape[p] for p in perm), perm=perm)


def _reshape(b: Builder) -> None:
    shape = list(b.shape)
    i = int(b.rng.integers(0, len(shape)))
    if b.rng.random() < 0.5 and i + 1 < len(shape) and len(shape) > 2:
        shape[i : i + 2] = [shape[i] * shape[i + 1]]
    elif len(shape) < 5 and (found := [d for d in (2, 3, 4) if shape[i] % d == 0]):
        d = int(b.rng.choice(found))
        shape[i : i + 1] = [d, shape[i] // d]
    elif b.rng.random() < 0.5:
        shape = [shape[0] * shape[-1], *shape[1:-1], 1]
    b.emit("Reshape", [b.now, b.const((), ints=shape)], tuple(shape))


def _axes(b: Builder) -> None:
    if ones := [i for i, n in enumerate(b.shape) if n == 1 and len(b.shape) > 2]:
        shape = tuple(n for i, n in enumerate(b.shape) if i != ones[0])
        b.emit("Squeeze", [b.now, b.const((), ints=ones[:1])], shape)
    elif len(b.shape) < 4:
        i = int(b.rng.integers(0, len(b.shape) + 1))
        b.emit("Unsqueeze", [b.now, b.const((), ints=[i])], (*b.shape[:i], 1, *b.shape[i:]))


def _slice(b: Builder) -> None:
    axis = int(b.rng.integers(0, len(b.shape)))
    n = b.shape[axis]
    if b.rng.random() < 0.3:
        start, end, step, size = -1, -(n + 1), -1, n
    else:
        start = int(b.rng.integers(0, n))
        end, step = int(b.rng.integers(start + 1, n + 1)), 1
        size = end - start
    parts = [b.const((), ints=[v]) for v in (start, end, axis, step)]
    b.emit("Slice", [b.now, *parts], (*b.shape[:axis], size, *b.shape[axis + 1 :]))


def _split(b: Builder) -> None:
    """Cut, treat one part, join again, or go on with one part and let the other be an output."""
    axis = int(b.rng.integers(0, len(b.shape)))
    n = b.shape[axis]
    if n < 2:
        return
    k = int(b.rng.integers(1, n))
    first = b.emit("Split", [b.now, b.const((), ints=[k, n - k])], outputs=2, axis=axis)
    other = first[:-1] + "1"
    whole = b.shape
    b.now, b.shape = first, (*whole[:axis], k, *whole[axis + 1 :])
    if b.rng.random() < 0.6:
        _arithmetic(b)
        order = [b.now, other] if b.rng.random() < 0.5 else [other, b.now]
        b.emit("Concat", order, whole, axis=axis)
    elif b.rng.random() < 0.5:
        b.outputs.append(other)


def _join(b: Builder) -> None:
    """Meet an earlier value: a second consumer of it, and an operator with two run-time operands."""
    if found := [name for name, shape in b.seen if shape == b.shape]:
        op = str(b.rng.choice(["Add", "Sub", "Mul", "Max", "Concat"]))
        other = str(b.rng.choice(found))
        if op == "Concat":
            axis = int(b.rng.integers(0, len(b.shape)))
            shape = (*b.shape[:axis], 2 * b.shape[axis], *b.shape[axis + 1 :])
            b.emit("Concat", [other, b.now], shape, axis=axis)
        else:
            b.emit(op, [b.now, other] if b.rng.random() < 0.5 else [other, b.now], b.shape)


def _branches(b: Builder) -> None:
    """Two constants' worth of arithmetic or convolution on one value, joined."""
    start, shape = b.now, b.shape
    kind = _arithmetic if b.rng.random() < 0.5 else _unary
    kind(b)
    left = b.now
    b.now, b.shape = start, shape
    _arithmetic(b)
    if b.shape == shape:
        b.emit(str(b.rng.choice(["Add", "Max", "Mul"])), [left, b.now], shape)


def _copies(b: Builder) -> None:
    axis = int(b.rng.integers(0, len(b.shape)))
    if b.rng.random() < 0.5:
        repeats = [2 if i == axis else 1 for i in range(len(b.shape))]
        shape = tuple(n * r for n, r in zip(b.shape, repeats, strict=True))
        b.emit("Tile", [b.now, b.const((), ints=repeats)], shape)
    else:
        index = [int(i) for i in b.rng.integers(0, b.shape[axis], int(b.rng.integers(1, 5)))]
        shape = (*b.shape[:axis], len(index), *b.shape[axis + 1 :])
        b.emit("Gather", [b.now, b.const((), ints=index)], shape, axis=axis)


def _pad(b: Builder) -> None:
    if len(b.shape) < 3:
        return
    lo = [0, *(int(v) for v in b.rng.integers(0, 2, len(b.shape) - 1))]
    shape = tuple(n + 2 * p for n, p in zip(b.shape, lo, strict=True))
    mode = str(b.rng.choice(["constant", "edge"]))
    b.emit("Pad", [b.now, b.const((), ints=[*lo, *lo])], shape, mode=mode)


def _pixels(b: Builder) -> None:
    if len(b.shape) != 4:
        return
    n, c, h, w = b.shape
    if c % 4 == 0 and b.rng.random() < 0.6:
        mode = str(b.rng.choice(["CRD", "DCR"]))
        b.emit("DepthToSpace", [b.now], (n, c // 4, 2 * h, 2 * w), blocksize=2, mode=mode)
    elif h % 2 == 0 and w % 2 == 0:
        b.emit("SpaceToDepth", [b.now], (n, 4 * c, h // 2, w // 2), blocksize=2)


def _output(b: Builder) -> None:
    if b.now != "x" and b.rng.random() < 0.3:
        b.outputs.append(b.now)


STEPS: list[tuple[Callable[[Builder], None], int]] = [
    (_arithmetic, 8), (_batch_norm, 3), (_conv, 4), (_product, 5), (_norm, 2), (_unary, 2), (_pool, 1), (_reduce, 1),
    (_transpose, 2), (_reshape, 3), (_axes, 1), (_slice, 1), (_split, 2), (_join, 1), (_branches, 1), (_copies, 1),
    (_pad, 1), (_pixels, 1), (_output, 1),
]  # fmt: skip


def random_affine(seed: int) -> onnx.ModelProto:
    """A graph of four to twelve random steps, its constants random too; some scales negative."""
    b = Builder(seed)
    steps = [step for step, weight in STEPS for _ in range(weight)]
    for _ in range(int(b.rng.integers(4, 13))):
        steps[int(b.rng.integers(0, len(steps)))](b)
        if np.prod(b.shape) > LIMIT:
            break
    return b.model()
