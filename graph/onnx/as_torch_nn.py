"""Convolutions, pools and recurrent layers of ONNX in torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .as_torch_run import Call, together, torch_op

CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAX_POOL: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def _pads(
    c: Call, sizes: list[int], kernel: list[int], stride: list[int], dilation: list[int]
) -> tuple[list[int], list[int]]:
    """Padding before and after each spatial axis."""
    n = len(kernel)
    auto = c.attr("auto_pad", "NOTSET")
    if auto == "NOTSET":
        flat = c.attr("pads", [0] * 2 * n)
        return list(flat[:n]), list(flat[n:])
    if auto == "VALID":
        return [0] * n, [0] * n
    total = [
        max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
        for size, k, s, d in zip(sizes, kernel, stride, dilation, strict=True)
    ]
    small, large = [t // 2 for t in total], [t - t // 2 for t in total]
    return (small, large) if auto == "SAME_UPPER" else (large, small)


def _pad(x: Tensor, low: list[int], high: list[int], value: float = 0.0) -> Tensor:
    amounts = [p for lo, hi in reversed(list(zip(low, high, strict=True))) for p in (lo, hi)]
    return F.pad(x, amounts, value=value) if any(amounts) else x


@torch_op("Conv")
def conv(c: Call) -> Tensor:
    x, weight, *rest = c.all()
    kernel = list(weight.shape[2:])
    n = len(kernel)
    if n not in CONV:
        raise c.refuse(f"{n} spatial axes")
    stride, dilation = c.attr("strides", [1] * n), c.attr("dilations", [1] * n)
    low, high = _pads(c, list(x.shape[2:]), kernel, stride, dilation)
    bias = rest[0] if rest else None
    if low != high:
        x, low = _pad(x, low, high), [0] * n
    return CONV[n](x, weight, bias, stride, low, dilation, c.attr("group", 1))


@torch_op("ConvTranspose")
def conv_transpose(c: Call) -> Tensor:
    x, weight, *rest = c.all()
    kernel = list(weight.shape[2:])
    n = len(kernel)
    if n not in TRANSPOSED:
        raise c.refuse(f"{n} spatial axes")
    stride, dilation = c.attr("strides", [1] * n), c.attr("dilations", [1] * n)
    extra = c.attr("output_padding", [0] * n)
    full = [
        (size - 1) * s + d * (k - 1) + 1 for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    wanted, auto = c.attr("output_shape"), c.attr("auto_pad", "NOTSET")
    if wanted is None and auto in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [size * s for size, s in zip(x.shape[2:], stride, strict=True)]
    if wanted is not None:
        total = [max(f + e - w, 0) for f, e, w in zip(full, extra, wanted[-n:], strict=True)]
        half = [t // 2 for t in total]
        rest_of = [t - h for t, h in zip(total, half, strict=True)]
        low, high = (half, rest_of) if auto == "SAME_UPPER" else (rest_of, half)
        out = list(wanted[-n:])
    else:
        low, high = _pads(c, list(x.shape[2:]), kernel, stride, dilation)
        out = [f + e - lo - hi for f, e, lo, hi in zip(full, extra, low, high, strict=True)]
    y = TRANSPOSED[n](x, weight, None, stride, 0, 0, c.attr("group", 1), dilation)
    y = _pad(y, [-lo for lo in low], [o - (f - lo) for o, f, lo in zip(out, full, low, strict=True)])
    return y + rest[0].reshape(-1, *[1] * n) if rest else y


def _pool_window(c: Call, x: Tensor) -> tuple[list[int], list[int], list[int], list[int], list[int], list[int]]:
    """kernel, stride, dilation, padding before, padding after, and what ceil mode adds behind that."""
    kernel = c.attr("kernel_shape")
    n = len(kernel)
    stride, dilation = c.attr("strides", [1] * n), c.attr("dilations", [1] * n)
    low, high = _pads(c, list(x.shape[2:]), kernel, stride, dilation)
    more = [0] * n
    for i, size in enumerate(x.shape[2:]):
        reach = dilation[i] * (kernel[i] - 1) + 1
        room = size + low[i] + high[i] - reach
        out = (-(-room // stride[i]) if c.attr("ceil_mode", 0) else room // stride[i]) + 1
        if c.attr("ceil_mode", 0) and (out - 1) * stride[i] >= size + low[i]:
            out -= 1  # a window may not start in the padding behind
        more[i] = (out - 1) * stride[i] + reach - (size + low[i] + high[i])
    return kernel, stride, dilation, low, high, more


@torch_op("MaxPool")
def max_pool(c: Call) -> Tensor | tuple[Tensor, Tensor]:
    x = c.x()
    kernel, stride, dilation, low, high, more = _pool_window(c, x)
    n = len(kernel)
    if n not in MAX_POOL:
        raise c.refuse(f"{n} spatial axes")
    behind = [h + m for h, m in zip(high, more, strict=True)]
    lowest: float = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
    source = x if x.is_floating_point() else x.to(torch.float32 if x.element_size() < 4 else torch.float64)
    padded = _pad(source, low, behind, lowest)
    if not c.used(1):
        return MAX_POOL[n](padded, kernel, stride, 0, dilation).to(x.dtype)
    y, at = MAX_POOL[n](padded, kernel, stride, 0, dilation, return_indices=True)
    return y.to(x.dtype), _pool_indices(c, at, x, padded, low)


def _pool_indices(c: Call, at: Tensor, x: Tensor, padded: Tensor, low: list[int]) -> Tensor:
    """Positions in the padded plane as ONNX counts them: in the whole tensor, without padding."""
    spatial = list(range(2, x.dim()))
    order = spatial if not c.attr("storage_order", 0) else list(reversed(spatial))
    weight = {}
    step = 1
    for axis in reversed(order):
        weight[axis] = step
        step *= x.shape[axis]
    flat = torch.zeros_like(at)
    for axis in reversed(spatial):
        flat = flat + (at % padded.shape[axis] - low[axis - 2]) * weight[axis]
        at = at // padded.shape[axis]
    plane = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(x.shape[0], x.shape[1], *[1] * len(spatial))
    return flat + plane * step


@torch_op("AveragePool", "LpPool")
def average_pool(c: Call) -> Tensor:
    x = c.x()
    kernel, stride, dilation, low, high, more = _pool_window(c, x)
    n = len(kernel)
    if n not in CONV:
        raise c.refuse(f"{n} spatial axes")
    p = c.attr("p", 2) if c.step.op == "LpPool" else 1
    padded = _pad(_pad(x.abs() ** p if c.step.op == "LpPool" else x, low, high), [0] * n, more)
    total = _window_sum(padded, kernel, stride, dilation)
    if c.step.op == "LpPool":
        return total ** (1 / p)
    ones = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    inside = _pad(ones, low, high, float(c.attr("count_include_pad", 0)))
    return total / _window_sum(_pad(inside, [0] * n, more), kernel, stride, dilation)


def _window_sum(x: Tensor, kernel: list[int], stride: list[int], dilation: list[int]) -> Tensor:
    n = len(kernel)
    size = 1
    for k in kernel:
        size *= k
    if all(d == 1 for d in dilation):
        pool: Callable[..., Tensor] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[n]
        return pool(x, kernel, stride) * size
    planes = x.reshape(-1, 1, *x.shape[2:])
    ones = torch.ones((1, 1, *kernel), dtype=x.dtype, device=x.device)
    y = CONV[n](planes, ones, None, stride, 0, dilation)
    return y.reshape(*x.shape[:2], *y.shape[2:])


@torch_op("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(c: Call) -> Tensor:
    x = c.x()
    axes = list(range(2, x.dim()))
    if c.step.op == "GlobalAveragePool":
        return x.mean(axes, keepdim=True)
    if c.step.op == "GlobalMaxPool":
        return x.amax(axes, keepdim=True)
    return torch.linalg.vector_norm(x, c.attr("p", 2), axes, True)


@torch_op("Col2Im")
def col2im(c: Call) -> Tensor:
    x, image, block = c.x(), c.ints(1), c.ints(2)
    if len(image) != 2:
        raise c.refuse(f"{len(image)} spatial axes")
    pads = c.attr("pads", [0] * 4)
    dilation, stride = c.attr("dilations", [1, 1]), c.attr("strides", [1, 1])
    size = [image[0] + pads[0] + pads[2], image[1] + pads[1] + pads[3]]
    y = F.fold(x, tuple(size), tuple(block), tuple(dilation), 0, tuple(stride))
    return y[:, :, pads[0] : size[0] - pads[2], pads[1] : size[1] - pads[3]]


# ---- recurrent layers --------------------------------------------------------------------------------------
@torch_op("LSTM", "GRU", "RNN")
def recurrent(c: Call) -> tuple[Tensor, ...]:
    """ONNX layers step by step in torch; all directions, initial states, lengths and peepholes."""
    kind = c.step.op
    x, w, r = together([c.x(0), c.x(1), c.x(2)])
    if c.attr("layout", 0):
        x = x.transpose(0, 1)
    steps, batch, _ = x.shape
    directions, hidden = w.shape[0], r.shape[2]
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    bias = c.maybe(3)
    b = torch.zeros(directions, 2 * gates * hidden, dtype=x.dtype, device=x.device) if bias is None else bias
    lengths = c.maybe(4)
    states = [_initial(c, i, directions, batch, hidden, x) for i in ((5, 6) if kind == "LSTM" else (5,))]
    peepholes = c.maybe(7) if kind == "LSTM" else None
    direction = c.attr("direction", "forward")
    outputs, last_h, last_c = [], [], []
    for d in range(directions):
        backwards = direction == "reverse" or d == 1
        h = states[0][d]
        cell = states[1][d] if kind == "LSTM" else h
        made: list[Tensor] = [h] * steps
        for t in reversed(range(steps)) if backwards else range(steps):
            new_h, new_c = _cell(
                c, kind, d, x[t], h, cell, w[d], r[d], b[d], None if peepholes is None else peepholes[d]
            )
            if lengths is not None:
                on = (t < lengths.to(x.device)).reshape(-1, 1)
                made[t] = torch.where(on, new_h, torch.zeros_like(new_h))
                new_h, new_c = torch.where(on, new_h, h), torch.where(on, new_c, cell)
            else:
                made[t] = new_h
            h, cell = new_h, new_c
        outputs.append(torch.stack(made))
        last_h.append(h)
        last_c.append(cell)
    y, final = torch.stack(outputs, 1), [torch.stack(last_h), torch.stack(last_c)]
    if c.attr("layout", 0):
        y, final = y.permute(2, 0, 1, 3), [f.transpose(0, 1) for f in final]
    return (y, *final) if kind == "LSTM" else (y, final[0])


def _initial(c: Call, i: int, directions: int, batch: int, hidden: int, x: Tensor) -> Tensor:
    given = c.maybe(i)
    if given is None:
        return torch.zeros(directions, batch, hidden, dtype=x.dtype, device=x.device)
    return given.transpose(0, 1) if c.attr("layout", 0) else given


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu, "softsign": F.softsign, "softplus": F.softplus,
}  # fmt: skip


def _functions(c: Call, d: int, defaults: list[str]) -> list[Callable[[Tensor], Tensor]]:
    names = c.attr("activations") or defaults * 2
    chosen = [n.lower() for n in names[d * len(defaults) : (d + 1) * len(defaults)]]
    for name in chosen:
        if name not in _ACTIVATIONS:
            raise c.refuse(f"activation {name}")
    return [_ACTIVATIONS[n] for n in chosen]


def _cell(
    c: Call, kind: str, d: int, x: Tensor, h: Tensor, cell: Tensor, w: Tensor, r: Tensor, b: Tensor, p: Tensor | None
) -> tuple[Tensor, Tensor]:
    limit = c.attr("clip")

    def clipped(t: Tensor) -> Tensor:
        return t if limit is None else t.clamp(-limit, limit)

    half = b.shape[0] // 2
    wb, rb = b[:half], b[half:]
    if kind == "RNN":
        (f,) = _functions(c, d, ["Tanh"])
        new = f(clipped(x @ w.T + wb + h @ r.T + rb))
        return new, new
    if kind == "GRU":
        f, g = _functions(c, d, ["Sigmoid", "Tanh"])
        n = h.shape[-1]
        ix = x @ w.T + wb
        ih = h @ r[: 2 * n].T + rb[: 2 * n]
        z = f(clipped(ix[:, :n] + ih[:, :n]))
        reset = f(clipped(ix[:, n : 2 * n] + ih[:, n:]))
        if c.attr("linear_before_reset", 0):
            inner = reset * (h @ r[2 * n :].T + rb[2 * n :])
        else:
            inner = (reset * h) @ r[2 * n :].T + rb[2 * n :]
        new = (1 - z) * g(clipped(ix[:, 2 * n :] + inner)) + z * h
        return new, new
    f, g, o_act = _functions(c, d, ["Sigmoid", "Tanh", "Tanh"])
    i, o, forget, candidate = (x @ w.T + wb + h @ r.T + rb).chunk(4, dim=-1)
    if p is not None:
        pi, po, pf = p.chunk(3)
        i, forget = i + pi * cell, forget + pf * cell
    i = f(clipped(i))
    forget = 1 - i if c.attr("input_forget", 0) else f(clipped(forget))
    new_cell = forget * cell + i * g(clipped(candidate))
    o = f(clipped(o + po * new_cell if p is not None else o))
    return o * o_act(new_cell), new_cell
