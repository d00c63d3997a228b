"""Run a graph, with taps on inner values, and make up inputs that are legal for it."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import ConstraintError
from .ir import Graph, Node, Value

MOVES = frozenset(
    "cast reshape identity expand squeeze unsqueeze transpose slice select concat split unbind flip roll tile stack "
    "repeat_interleave pad".split()
)
"""Ops that carry the elements of an integer or mask input on unchanged, so that its meaning shows further on."""

COMPARISONS = frozenset("eq ne lt le gt ge logical_and logical_or logical_xor logical_not bitwise_not".split())
LARGE = 1e3
"""A float operand multiplied by a constant beyond this is taken for an additive attention mask in the making."""


def to_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor (also bfloat16 and float8, as ml_dtypes) or anything array-like as numpy."""
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    tensor = tensor.detach().cpu()
    try:
        return tensor.numpy()
    except TypeError:
        import ml_dtypes
        import torch

        name = str(tensor.dtype).removeprefix("torch.")
        carrier = torch.int16 if tensor.element_size() == 2 else torch.uint8
        return tensor.contiguous().view(carrier).numpy().view(np.dtype(getattr(ml_dtypes, name)))


def run_graph(
    graph: Graph, inputs: Mapping[str, np.ndarray], taps: Sequence[str] = ()
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Execute the graph once.

    Args:
        graph: an FX graph (runs in torch) or an ONNX graph (runs in ONNX Runtime).
        inputs: one array for every graph input, by name.
        taps: names of values whose tensors are wanted too; weights may be tapped.

    Returns:
        The outputs in order, and the tapped values by name, all numpy.

    Raises:
        ConstraintError: an input or a tap does not exist, or an input is missing.
    """
    expected = [v.name for v in graph.inputs]
    if set(inputs) != set(expected):
        raise ConstraintError(
            "the arrays given do not match the graph's inputs",
            expected=", ".join(expected),
            found=", ".join(sorted(inputs)),
            hint="graph.bind(batch) makes this dictionary from one call's arguments",
        )
    for name in taps:
        if name not in graph.values:
            raise ConstraintError("no such value to tap", value=name, hint="value names are the keys of graph.values")
    run = getattr(graph, "run", None)
    if run is None:
        raise ConstraintError("this graph cannot be executed", node=graph.name, found=type(graph).__name__)
    computed = [name for name in taps if not graph.values[name].is_const]
    outputs, tapped = run(dict(inputs), computed)
    found = {name: to_numpy(t) for name, t in tapped.items()}
    for name in taps:
        constant = graph.values[name].const()
        if constant is not None:
            found[name] = np.asarray(constant)
    return [to_numpy(t) for t in outputs], found


@dataclass
class _Role:
    """What the consumers of one input do with it."""

    low: int = 0
    high: int | None = None
    indexes: bool = False
    masks: bool = False
    sizes: str = ""
    computes: bool = False
    dequantizes: bool = False


def _other_constant(node: Node, position: int) -> float | None:
    """The scalar constant that a two-operand node combines with operand ``position``; None if it is not one."""
    for i, v in enumerate(node.inputs):
        if i != position and v is not None:
            data = v.const() if v.literal is not None or (v.weight is not None and v.weight.size == 1) else None
            return None if data is None or data.size != 1 else float(data.reshape(-1)[0])
    return None


def _role(root: Value) -> _Role:
    """Follow an input through value-preserving ops to the nodes that give it a meaning."""
    role = _Role()
    stack: list[tuple[Value, float]] = [(root, 0.0)]
    seen: set[tuple[int, float]] = set()
    while stack:
        value, shift = stack.pop()
        if (id(value), shift) in seen:
            continue
        seen.add((id(value), shift))
        for node, position in value.uses:
            constant = _other_constant(node, position)
            if node.op in MOVES and position == 0 or node.op in ("concat", "stack"):
                stack.extend((out, shift) for out in node.outputs)
            elif node.op == "gather":
                if position == 0:
                    stack.append((node.output, shift))
                else:
                    _bound(role, node, shift)
            elif node.op in ("add", "sub") and constant is not None and float(constant).is_integer():
                if node.op == "sub" and position == 1:
                    stack.append((node.output, shift))
                else:
                    stack.append((node.output, shift + (constant if node.op == "add" else -constant)))
            elif node.op in COMPARISONS or node.op in ("masked_fill", "where") and position in (0, 1):
                masking = node.op in COMPARISONS or position == (1 if node.op == "masked_fill" else 0)
                role.masks, role.computes = role.masks or masking, role.computes or not masking
                if node.op in ("logical_and", "logical_or", "logical_not"):
                    stack.append((node.output, shift))
            elif node.op == "sdpa" and position == 3:
                role.masks = True
            elif node.op == "mul" and constant is not None and abs(constant) >= LARGE:
                role.masks = True
            elif node.op in ("dequantize", "quantize"):
                role.dequantizes = True
            elif node.op == "shape_of":
                continue
            else:
                role.computes = True
        # Sizes are read through `dynamic`, which `uses` does not list.
    return role


def _bound(role: _Role, node: Node, shift: float) -> None:
    data, axis = node.inputs[0], node.attrs.get("axis", 0)
    role.indexes = True
    if data is None or data.hint is None or axis is None:
        return
    role.low = max(role.low, int(-shift))
    limit = data.hint[axis] - int(shift)
    role.high = limit if role.high is None else min(role.high, limit)


def _size_reader(graph: Graph, root: Value) -> str | None:
    """Name of a node that takes a size from this input, following value-preserving ops and size arithmetic."""
    reached = {id(root)}
    for node in graph.nodes:
        if any(id(v) in reached for v in node.dynamic):
            return node.name
        if (node.op in MOVES or node.op in ("scalar", "gather")) and any(
            v is not None and id(v) in reached for v in node.inputs
        ):
            reached.update(id(v) for v in node.outputs)
    return None


def _prefix_mask(shape: tuple[int, ...], rng: np.random.Generator, whole_first: bool) -> np.ndarray:
    """Ones followed by zeros along the last axis; at least one 1 per row, and one 0 too where there is room."""
    if not shape:
        return np.ones((), dtype=bool)
    length = shape[-1]
    rows = int(np.prod(shape[:-1], dtype=np.int64))
    kept = rng.integers((length + 1) // 2, max(length, (length + 1) // 2 + 1), size=rows)
    if whole_first and rows:
        kept[0] = length
    return (np.arange(length) < kept[:, None]).reshape(shape)


def _integers(graph: Graph, value: Value, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    role, dtype = _role(value), np.dtype(value.dtype)
    if role.indexes:
        high = role.high if role.high is not None else 2
        if high <= role.low:
            raise ConstraintError(
                "no integer is legal for every consumer of this input", value=value.name, found=f"[{role.low}, {high})"
            )
        return rng.integers(role.low, high, size=shape).astype(dtype)
    if reader := _size_reader(graph, value):
        raise ConstraintError(
            "this integer input sets a size, so it cannot be made up",
            node=reader,
            value=value.name,
            hint="pass real inputs (example_inputs or calibration batches)",
        )
    if role.dequantizes or dtype.itemsize == 1 and role.computes and not role.masks:
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max + 1, size=shape).astype(dtype)
    # A mask, or a consumer that is not understood: 0 and 1 are the integers most often legal.
    return _prefix_mask(shape, rng, whole_first=True).astype(dtype)


def synthesize_inputs(
    graph: Graph, seed: int = 0, *, sizes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, np.ndarray]:
    """Random inputs at the hint shapes (or at ``sizes``), legal for their consumers and the same for the same seed.

    Floats are normal. Integers that reach a gather (through casts, reshapes, slices, added constants) are drawn from
    the range that it can index; other integers are masks: row 0 all ones, the others ones followed by zeros.
    Booleans are random, unless they mask (where, masked_fill, sdpa): then a prefix that leaves something of
    both. Float inputs that only become a mask (multiplied by a huge constant) are masks of ones and zeros.

    Raises:
        ConstraintError: an input has no known shape, sets a size, has a dtype without an obvious distribution, or
            has consumers no integer can please.
    """
    found: dict[str, np.ndarray] = {}
    for value in graph.inputs:
        if value.hint is None:
            raise ConstraintError(
                "the shape of this input is unknown, so it cannot be made up",
                value=value.name,
                hint="pass example_inputs to fl.load",
            )
        shape = tuple(value.hint) if sizes is None else sizes.get(value.name, tuple(value.hint))
        # Seeded per name: adding an input elsewhere leaves the others as they were.
        rng = np.random.default_rng([seed, zlib.crc32(value.name.encode())])
        found[value.name] = _one_input(graph, value, shape, rng)
    return found


def _one_input(graph: Graph, value: Value, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    name = value.dtype
    if name == "bool":
        masks = _role(value).masks
        return _prefix_mask(shape, rng, whole_first=False) if masks else rng.random(shape) < 0.5
    if name.startswith(("int", "uint")):
        return _integers(graph, value, shape, rng)
    if name.startswith("complex"):
        return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(name)
    if name.startswith(("float", "bfloat")):
        role = _role(value)
        if role.masks and not role.computes:
            return _prefix_mask(shape, rng, whole_first=True).astype(_float_dtype(name))
        return rng.standard_normal(shape, dtype=np.float64).astype(_float_dtype(name))
    raise ConstraintError("no random values are known for this dtype", value=value.name, found=name)


def _float_dtype(name: str) -> np.dtype:
    if hasattr(np, name):
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name))


def batches_of(graph: Graph, batches: Iterable[Any]) -> Iterable[dict[str, np.ndarray]]:
    """Each batch as the dictionary that :func:`run_graph` takes; dictionaries of all input names pass unchanged."""
    names = {v.name for v in graph.inputs}
    for batch in batches:
        if isinstance(batch, dict) and set(batch) == names:
            yield {k: to_numpy(v) for k, v in batch.items()}
        else:
            yield graph.bind(batch)
