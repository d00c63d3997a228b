"""Random ONNX models for the fuzzer of folding: every step draws an operator that fits the shapes it meets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = tuple[int, int, int, int]


@dataclass
class Net:
    """A model in the making: feature maps (N, C, H, W) with a symbolic N that is 2 here."""

    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    pool: list[tuple[str, Shape]] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    quantized: bool = False
    count: int = 0

    def name(self, base: str) -> str:
        self.count += 1
        return f"{base}_{self.count}"

    def weight(self, data: np.ndarray, dtype: type = np.float32) -> str:
        name = self.name("w")
        self.weights.append(numpy_helper.from_array(np.asarray(data, dtype), name))
        return name

    def add(self, op: str, inputs: list[str], count: int = 1, **attrs: object) -> list[str]:
        outs = [self.name(op.lower()) for _ in range(count)]
        self.nodes.append(helper.make_node(op, inputs, outs, self.name(f"n_{op}"), **attrs))
        return outs

    def pick(self, *choices: object) -> object:
        return choices[int(self.rng.integers(len(choices)))]

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape)

    def scale(self, *shape: int) -> np.ndarray:
        """Numbers away from zero, some of them negative or exactly one."""
        data = self.rng.uniform(0.3, 2.0, shape) * self.rng.choice((1.0, 1.0, -1.0), shape)
        return np.where(self.rng.random(shape) < 0.1, 1.0, data)


Step = Callable[[Net, str, Shape], "tuple[str, Shape] | None"]
STEPS: dict[str, Step] = {}


def step(function: Step) -> Step:
    STEPS[function.__name__] = function
    return function


def _divisors(*numbers: int) -> list[int]:
    return [d for d in range(1, min(numbers) + 1) if all(n % d == 0 for n in numbers)]


@step
def conv(net: Net, x: str, s: Shape) -> tuple[str, Shape] | None:
    n, c, h, w = s
    out = int(net.pick(c, 2 * c, 4, 6))  # type: ignore[call-overload]
    g = int(net.rng.choice(_divisors(c, out)))
    k, d, st = int(net.rng.choice((1, 3))), int(net.rng.choice((1, 1, 2))), int(net.rng.choice((1, 1, 2)))
    pads = [int(p) for p in net.rng.integers(0, 2, 4)] if net.rng.random() < 0.5 else [d * (k // 2)] * 4
    hh = (h + pads[0] + pads[2] - d * (k - 1) - 1) // st + 1
    ww = (w + pads[1] + pads[3] - d * (k - 1) - 1) // st + 1
    if hh < 2 or ww < 2 or out > 24:
        return None
    ins = [x, net.weight(net.normal(out, c // g, k, k) / np.sqrt(c // g * k * k))]
    if net.rng.random() < 0.6:
        ins.append(net.weight(net.normal(out)))
    (y,) = net.add("Conv", ins, kernel_shape=[k, k], pads=pads, strides=[st, st], dilations=[d, d], group=g)
    return y, (n, out, hh, ww)


@step
def branches(net: Net, x: str, s: Shape) -> tuple[str, Shape]:
    """Parallel convolutions of one input, each with its norm, and maybe the identity; then their sum."""
    n, c, h, w = s
    total = ""
    for k in net.rng.choice((1, 3), int(net.rng.integers(2, 4))):
        k = int(k)
        ins = [x, net.weight(net.normal(c, c, k, k) / np.sqrt(c * k * k))]
        (y,) = net.add("Conv", ins, kernel_shape=[k, k], pads=[k // 2] * 4)
        if net.rng.random() < 0.7:
            y, _ = norm(net, y, s)
        total = net.add("Add", [total, y])[0] if total else y
    if net.rng.random() < 0.5:
        side = norm(net, x, s)[0] if net.rng.random() < 0.5 else x
        (total,) = net.add("Add", [side, total])
    return total, s


@step
def transposed(net: Net, x: str, s: Shape) -> tuple[str, Shape] | None:
    n, c, h, w = s
    if h > 12:
        return None
    g = int(net.rng.choice(_divisors(c, 4)))
    ins = [x, net.weight(net.normal(c, 4 // g, 2, 2)), net.weight(net.normal(4))]
    (y,) = net.add("ConvTranspose", ins, kernel_shape=[2, 2], strides=[2, 2], group=g)
    return y, (n, 4, 2 * h, 2 * w)


@step
def norm(net: Net, x: str, s: Shape) -> tuple[str, Shape]:
    c = s[1]
    stats = [net.scale(c), net.normal(c), net.normal(c), net.rng.uniform(0.5, 2, c)]
    if net.rng.random() < 0.2:
        stats[1], stats[2] = np.zeros(c), np.zeros(c)
    (y,) = net.add("BatchNormalization", [x, *(net.weight(t) for t in stats)], epsilon=1e-3)
    return y, s


@step
def affine(net: Net, x: str, s: Shape) -> tuple[str, Shape]:
    c, h, w = s[1:]
    shape = [(), (1,), (c, 1, 1), (1, c, 1, 1), (1, 1, w), (h, 1), (c, h, w)][int(net.rng.integers(7))]
    op = str(net.pick("Mul", "Add", "Sub", "Div"))
    data = net.weight(net.scale(*shape) if op in ("Mul", "Div") else net.normal(*shape))
    swap = op in ("Mul", "Add", "Sub") and net.rng.random() < 0.3
    (y,) = net.add(op, [data, x] if swap else [x, data])
    return y, s


@step
def activation(net: Net, x: str, s: Shape) -> tuple[str, Shape]:
    op = str(net.pick("Relu", "LeakyRelu", "Sigmoid", "Tanh", "Clip", "Neg", "Abs", "Identity", "Dropout"))
    ins = [x]
    if op == "Clip":
        low = float(net.pick(-3.0, -1.0, 0.0))  # type: ignore[arg-type]
        ins += [net.weight(np.asarray(low)), net.weight(np.asarray(low + float(net.pick(0.5, 2.0))))]  # type: ignore[arg-type]
    return net.add(op, ins)[0], s


@step
def pooling(net: Net, x: str, s: Shape) -> tuple[str, Shape] | None:
    n, c, h, w = s
    if min(h, w) < 4:
        return None
    pads = [int(p) for p in net.rng.integers(0, 2, 4)]
    attrs: dict[str, object] = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": pads}
    op = str(net.pick("MaxPool", "AveragePool"))
    if op == "AveragePool":
        attrs["count_include_pad"] = int(net.rng.integers(2))
    (y,) = net.add(op, [x], **attrs)
    return y, (n, c, (h + pads[0] + pads[2] - 3) // 2 + 1, (w + pads[1] + pads[3] - 3) // 2 + 1)


@step
def pad(net: Net, x: str, s: Shape) -> tuple[str, Shape]:
    lo = [int(v) for v in net.rng.integers(0, 2, 4)]
    mode = str(net.pick("constant", "constant", "reflect", "edge"))
    ins = [x, net.weight(np.asarray([0, 0, lo[0], lo[1], 0, 0, lo[2], lo[3]]), np.int64)]
    if mode == "constant" and net.rng.random() < 0.3:
        ins.append(net.weight(np.asarray(0.5)))
    (y,) = net.add("Pad", ins, mode=mode)
    return y, (s[0], s[1], s[2] + lo[0] + lo[2], s[3] + lo[1] + lo[3])


@step
def transpose_pair(net: Net, x: str, s: Shape) -> tuple[str, Shape]:
    """Two transposes with an elementwise operator between them, inverse or not."""
    (y,) = net.add("Transpose", [x], perm=[0, 2, 3, 1])
    if net.rng.random() < 0.5:
        (y,) = net.add("Mul", [y, net.weight(net.scale(s[1]))])
    if net.rng.random() < 0.7:
        return net.add("Transpose", [y], perm=[0, 3, 1, 2])[0], s
    (z,) = net.add("Transpose", [y], perm=[0, 3, 2, 1])
    return z, (s[0], s[1], s[3], s[2])


@step
def linear_last(net: Net, x: str, s: Shape) -> tuple[str, Shape]:
    """MatMul and bias over the channels, moved to the end and back."""
    (y,) = net.add("Transpose", [x], perm=[0, 2, 3, 1])
    (y,) = net.add("MatMul", [y, net.weight(net.normal(s[1], 5) / np.sqrt(s[1]))])
    (y,) = net.add("Add", [y, net.weight(net.normal(5))])
    if net.rng.random() < 0.5:
        (y,) = net.add("Mul", [y, net.weight(net.scale(5))])
    return net.add("Transpose", [y], perm=[0, 3, 1, 2])[0], (s[0], 5, s[2], s[3])


@step
def layer_norm(net: Net, x: str, s: Shape) -> tuple[str, Shape]:
    (y,) = net.add("Transpose", [x], perm=[0, 2, 3, 1])
    (y,) = net.add("LayerNormalization", [y, net.weight(net.scale(s[1])), net.weight(net.normal(s[1]))], axis=-1)
    (y,) = net.add("MatMul", [y, net.weight(net.normal(s[1], s[1]) / np.sqrt(s[1]))])
    return net.add("Transpose", [y], perm=[0, 3, 1, 2])[0], s


@step
def reshape_pair(net: Net, x: str, s: Shape) -> tuple[str, Shape]:
    """Flatten by sizes read at run time, an operator, and back by constants with 0 and -1."""
    n, c, h, w = s
    (sizes,) = net.add("Shape", [x], start=0, end=2)
    (sizes,) = net.add("Concat", [sizes, net.weight(np.asarray([-1]), np.int64)], axis=0)
    (y,) = net.add("Reshape", [x, sizes])
    if net.rng.random() < 0.5:
        (y,) = net.add("Mul", [y, net.weight(net.scale(c, 1))])
    return net.add("Reshape", [y, net.weight(np.asarray([0, -1, h, w]), np.int64)])[0], s


@step
def cast_pair(net: Net, x: str, s: Shape) -> tuple[str, Shape]:
    (y,) = net.add("Cast", [x], to=int(net.pick(TensorProto.DOUBLE, TensorProto.FLOAT)))  # type: ignore[call-overload]
    return net.add("Cast", [y], to=TensorProto.FLOAT)[0], s


@step
def slices(net: Net, x: str, s: Shape) -> tuple[str, Shape] | None:
    if s[1] < 4:
        return None
    lo, hi = (net.weight(np.asarray([v]), np.int64) for v in (1, s[1] - 1))
    axis = net.weight(np.asarray([1]), np.int64)
    (y,) = net.add("Slice", [x, lo, hi, axis])
    (y,) = net.add("Slice", [y, net.weight(np.asarray([0]), np.int64), net.weight(np.asarray([99]), np.int64), axis])
    return y, (s[0], s[1] - 2, s[2], s[3])


@step
def split_concat(net: Net, x: str, s: Shape) -> tuple[str, Shape] | None:
    if s[1] < 3:
        return None
    parts = net.add("Split", [x, net.weight(np.asarray([1, s[1] - 1]), np.int64)], 2, axis=1)
    if net.rng.random() < 0.5:
        parts[1] = net.add("Relu", [parts[1]])[0]
    order = parts if net.rng.random() < 0.5 else parts[::-1]
    return net.add("Concat", order, axis=1)[0], s


@step
def join(net: Net, x: str, s: Shape) -> tuple[str, Shape] | None:
    """Add, multiply or concatenate with an earlier value of the same size."""
    same = [v for v, t in net.pool if t == s and v != x]
    if not same:
        return None
    other = same[int(net.rng.integers(len(same)))]
    op = str(net.pick("Add", "Add", "Mul", "Concat"))
    if op != "Concat":
        return net.add(op, [x, other])[0], s
    return (net.add(op, [x, other], axis=1)[0], (s[0], 2 * s[1], s[2], s[3])) if s[1] <= 12 else None


@step
def squeeze_excite(net: Net, x: str, s: Shape) -> tuple[str, Shape]:
    axes = net.weight(np.asarray([2, 3]), np.int64)
    (y,) = net.add("ReduceMean", [x, axes], keepdims=1)
    (y,) = net.add("Conv", [y, net.weight(net.normal(s[1], s[1], 1, 1) / np.sqrt(s[1]))], kernel_shape=[1, 1])
    (y,) = net.add("Sigmoid", [y])
    return net.add("Mul", [x, y])[0], s


@step
def twins(net: Net, x: str, s: Shape) -> tuple[str, Shape]:
    """The same subexpression twice, with equal constants stored twice."""
    data = net.scale(s[1], 1, 1)
    left, right = (net.add("Mul", [x, net.weight(data)])[0] for _ in range(2))
    return net.add("Sub" if net.rng.random() < 0.1 else "Add", [net.add("Relu", [left])[0], right])[0], s


@step
def computed_constant(net: Net, x: str, s: Shape) -> tuple[str, Shape]:
    """A constant that the file computes: exp of a stored vector, reshaped."""
    (y,) = net.add("Exp", [net.weight(0.3 * net.normal(s[1]))])
    (y,) = net.add("Unsqueeze", [y, net.weight(np.asarray([1, 2]), np.int64)])
    return net.add("Mul", [x, y])[0], s


@step
def fake_quantized(net: Net, x: str, s: Shape) -> tuple[str, Shape]:
    net.quantized = True
    scale, zero = net.weight(np.asarray(0.05)), net.weight(np.asarray(3), np.int8)  # type: ignore[arg-type]
    (y,) = net.add("QuantizeLinear", [x, scale, zero])
    return net.add("DequantizeLinear", [y, scale, zero])[0], s


@step
def conditional(net: Net, x: str, s: Shape) -> tuple[str, Shape]:
    """An If over a constant, whose bodies read an outer value and a weight."""
    factor = net.weight(net.scale(s[1], 1, 1))
    bodies = []
    for op in ("Mul", "Add"):
        out = net.name("inner")
        info = helper.make_tensor_value_info(out, TensorProto.FLOAT, [None] * 4)
        bodies.append(helper.make_graph([helper.make_node(op, [x, factor], [out])], op, [], [info]))
    choice = net.weight(np.asarray(net.rng.random() < 0.5), np.bool_)  # type: ignore[arg-type]
    (y,) = net.add("If", [choice], then_branch=bodies[0], else_branch=bodies[1])
    return y, s


@step
def show(net: Net, x: str, s: Shape) -> tuple[str, Shape]:
    """Make an inner value an output of the model."""
    if x not in net.outputs and x != "x":
        net.outputs.append(x)
    return x, s


def random_model(seed: int, length: int = 9) -> tuple[onnx.ModelProto, list[str], bool]:
    """(model, names of the steps taken, whether it quantizes): input ``x`` of (N, 4, 8, 6), opset 20."""
    net = Net(np.random.default_rng(seed))
    value, shape = "x", (2, 4, 8, 6)
    net.pool.append((value, shape))
    taken: list[str] = []
    names = list(STEPS)
    while len(taken) < length:
        name = names[int(net.rng.integers(len(names)))]
        if net.rng.random() < 0.15:
            value, shape = net.pool[int(net.rng.integers(len(net.pool)))]
        made = STEPS[name](net, value, shape)
        if made is None:
            continue
        taken.append(name)
        value, shape = made
        net.pool.append(made)
    outputs = [*dict.fromkeys([*net.outputs, *([] if value == "x" else [value])])] or net.add("Relu", ["x"])
    infos = [helper.make_tensor_value_info(o, TensorProto.FLOAT, [None] * 4) for o in outputs]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 8, 6])
    graph = helper.make_graph(net.nodes, "net", [given], infos, net.weights)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    onnx.checker.check_model(model)
    return model, taken, net.quantized
