"""Values that are the same in every run, computed in float64 and rounded once to the dtype they had."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any

import numpy as np

from ...graph.errors import ConstraintError
from ...graph.ir import Graph, Node, Value

WIDE = {"float16": "float64", "bfloat16": "float64", "float32": "float64", "complex64": "complex128"}
"""Dtypes that the arithmetic leaves for a wider one."""
DIGITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8, "complex128": 53, "complex64": 24}
"""Bits of the significand; a cast to fewer of them in the middle of a computation is a rounding that was meant."""

RUNTIME = frozenset(("random", "if", "loop", "scan", "quantize", "dequantize", "fake_quantize"))
"""Ops that are no function of their operands, hold graphs of their own, or carry a quantization worth keeping."""

JUMPS = frozenset(
    "floor ceil round sign mod fmod floor_div eq ne lt le gt ge logical_and logical_or logical_xor logical_not "
    "argmax argmin topk sort threshold hardshrink isnan isinf any all".split()
)
"""Ops that are not continuous: in float64 an operand may fall on the other side of the step than in the model."""


PLAIN = frozenset("GatherND ScatterND ScatterElements Trilu EyeLike Compress ReverseSequence Clip".split())
"""ONNX operators without a canonical form that move elements or bound them, so that no two runtimes differ."""


def evaluable(graph: Graph, node: Node) -> bool:
    """Whether a node is a deterministic function of its operands that :func:`evaluate64` can compute."""
    if node.op in RUNTIME or node.captured:
        return False
    if node.attrs.get("training") and (node.op != "batch_norm" or node.input(3) is not None):
        return False  # a batch norm without running statistics learns nothing: weight standardization is written so
    if node.op == "identity" and node.attrs.get("fn") == "dropout" and graph.kind == "fx":
        return False  # it drops in training, and what comes back may be trained
    if graph.kind == "onnx" and node.op == "opaque" and node.origin not in PLAIN:
        return False  # what has no canonical form is computed as the runtime does, by the rule of constant folding
    if graph.kind == "onnx":
        from ...graph.onnx.single import takes

        return takes(node)
    return bool(_machine(graph).takes(node))


def evaluate64(graph: Graph, values: Sequence[Value]) -> dict[str, np.ndarray]:
    """The data of ``values``, whose computation reads weights and literals only.

    Floating operands are widened to float64 (complex ones to complex128), the result is rounded once, to nearest, to
    the dtype that the value has in the graph. Integers and booleans are computed as they are. A comparison, a
    rounding or a cast to an integer in the middle is decided in the dtypes of the model, so that it falls as it does
    there. A value that is not finite after rounding is computed in the dtypes of the model altogether.

    Args:
        graph: FX or ONNX.
        values: any values of it; weights and literals are returned as they are.

    Returns:
        {value name: array of the value's shape and dtype}.

    Raises:
        ConstraintError: a value depends on an input of the graph or on an op that cannot be evaluated; names it.
    """
    found: dict[str, np.ndarray] = {}
    wanted: list[Value] = []
    for value in values:
        data = value.const()
        if data is None:
            wanted.append(value)
        else:
            found[value.name] = np.asarray(data)
    if not wanted:
        return found
    nodes = _cone(graph, wanted)
    jumps = _jumps(nodes)
    if graph.kind == "onnx" and (plain := _in_numpy(graph, nodes, wanted, bool(jumps))) is not None:
        return found | plain
    both = bool(jumps)
    wide, native = _run(graph, nodes, wanted, both, jumps)
    unfinished = [v for v in wanted if not _finite(wide[id(v)], v.dtype)]
    if unfinished and not both:
        native = _run(graph, _cone(graph, unfinished), unfinished, None)[1]
    for value in wanted:
        if any(value is v for v in unfinished):
            found[value.name] = _array(native[id(value)], value.dtype)
        else:
            found[value.name] = cast_once(_array(wide[id(value)], WIDE.get(value.dtype, value.dtype)), value.dtype)
    return found


def _in_numpy(
    graph: Graph, nodes: Sequence[Node], wanted: Sequence[Value], jumps: bool
) -> dict[str, np.ndarray] | None:
    """The same without torch, where moves and plain arithmetic are all there is; None elsewhere."""
    from ...graph.onnx.single import ARITHMETIC, in_numpy

    floats = any(v.dtype in WIDE for node in nodes for v in node.outputs)
    wide = floats and any(node.native.op_type in ARITHMETIC for node in nodes)
    made = None if wide and jumps else in_numpy(graph, nodes, wanted, wide)  # type: ignore[arg-type]
    if made is None or not wide:
        return made
    rounded = {v.name: cast_once(made[v.name], v.dtype) for v in wanted}
    finite = all(np.isfinite(r.astype(np.float64)).all() for r in rounded.values())
    return rounded if finite else None


def cast_once(data: np.ndarray, dtype: str) -> np.ndarray:
    """float64 data rounded once, to nearest (even), to a dtype by its numpy-style name; other dtypes plainly cast.

    numpy and torch go from float64 to bfloat16 by way of float32, which rounds twice.
    """
    if dtype != "bfloat16":
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(data).astype(np.dtype(dtype), copy=False)
    import ml_dtypes

    if data.dtype != np.float64:
        return np.asarray(data).astype(ml_dtypes.bfloat16)
    with np.errstate(over="ignore", invalid="ignore"):
        near = data.astype(np.float32)
    exact = np.isnan(data) | np.isinf(near) | (near == data)
    bits = near.reshape(-1).view(np.uint32).reshape(data.shape).copy()
    beyond = ~exact & (np.abs(near.astype(np.float64)) > np.abs(data))
    bits -= beyond.astype(np.uint32)  # towards zero
    bits |= (~exact).astype(np.uint32)  # an odd last bit remembers that something was cut off
    return bits.view(np.float32).astype(ml_dtypes.bfloat16)


def _array(result: Any, dtype: str) -> np.ndarray:
    from ...graph.execute import to_numpy

    if not hasattr(result, "detach"):
        return np.asarray(result, dtype=dtype)
    return np.ascontiguousarray(to_numpy(result.contiguous())).reshape(tuple(result.shape))


def _finite(result: Any, dtype: str) -> bool:
    """Whether a wide result stays finite in ``dtype``; integers are."""
    import torch

    if not isinstance(result, torch.Tensor) or dtype not in WIDE and dtype not in DIGITS:
        return True
    if result.is_complex():
        result = torch.view_as_real(result)
    largest = getattr(torch, "float32" if dtype == "complex64" else "float64" if dtype == "complex128" else dtype)
    return result.numel() == 0 or bool((result.abs() <= torch.finfo(largest).max).all())


def _jumps(nodes: Sequence[Node]) -> set[int]:
    """Ids of the nodes where rounding of a floating operand can change the result by more than a rounding."""
    found: set[int] = set()
    digits: dict[int, int] = {}  # of the finest floating weight from which a value is computed
    for node in nodes:
        finest = 0
        for v in node.inputs:
            if v is not None:
                own = DIGITS.get(v.dtype, 0) if v.weight is not None else 0
                finest = max(finest, own, digits.get(id(v), 0))
        digits.update((id(v), finest) for v in node.outputs)
        if not any(v is not None and v.dtype in DIGITS for v in node.inputs):
            continue
        target = node.outputs[0].dtype
        if node.op in JUMPS:
            found.add(id(node))
        elif node.op == "cast" or node.attrs.get("fn") == "to":
            # bfloat16 weights that pass through float32 and back are rounded for want of room, not on purpose
            meant = DIGITS.get(target, 0) < finest and any(u.op not in _MOVES for u, _ in node.outputs[0].uses)
            stored = node.inputs[0] is not None and node.inputs[0].is_const  # the same number in float64
            if (target not in DIGITS and not stored) or (target in DIGITS and meant):
                found.add(id(node))
    return found


_MOVES = frozenset("reshape transpose squeeze unsqueeze expand identity concat slice select conv linear".split())
"""Readers behind which a narrowing cast is the last rounding rather than one in the middle."""


def _cone(graph: Graph, values: Iterable[Value]) -> list[Node]:
    """The nodes that compute ``values`` from constants, operands first."""
    order: list[Node] = []
    seen: set[int] = set()
    stack: list[tuple[Value, bool]] = [(v, False) for v in values]
    while stack:
        value, ready = stack.pop()
        node = value.producer
        if value.is_const or (node is not None and id(node) in seen and not ready):
            continue
        if node is None or not evaluable(graph, node):
            raise ConstraintError(
                "the value is not the same in every run",
                node=None if node is None else node.name,
                value=value.name,
                found="an input of the graph" if node is None else node.origin or node.op,
            )
        if ready:
            order.append(node)
            continue
        seen.add(id(node))
        stack.append((value, True))
        stack.extend((v, False) for v in [*node.inputs, *node.dynamic] if v is not None)
    return order


def _run(
    graph: Graph, nodes: Sequence[Node], wanted: Sequence[Value], both: bool | None, jumps: Container[int] = ()
) -> tuple[dict[int, Any], dict[int, Any]]:
    """Results by value id, (wide, native). ``both``: True computes the two, False wide only, None native only."""
    import torch

    machine = _machine(graph)
    wide: dict[int, Any] = {}
    native: dict[int, Any] = {}
    left: dict[int, int] = {id(v): 1 for v in wanted}
    for node in nodes:
        for value in (*node.inputs, *node.dynamic):
            if value is not None:
                left[id(value)] = left.get(id(value), 0) + 1
    with torch.no_grad():
        for node in nodes:
            parts: Sequence[Any] = ()
            if both is not False:
                parts = machine.run(node, native, widen=False)
                native.update((id(v), p) for v, p in zip(node.outputs, parts, strict=False))
            if both is True and id(node) in jumps:
                wide.update((id(v), machine.widened(p)) for v, p in zip(node.outputs, parts, strict=False))
            elif both is not None:
                results = machine.run(node, wide, widen=True)
                wide.update((id(v), r) for v, r in zip(node.outputs, results, strict=False))
            for value in (*node.inputs, *node.dynamic):
                if value is not None:
                    left[id(value)] -= 1
                    if not left[id(value)]:
                        wide.pop(id(value), None)
                        native.pop(id(value), None)
    return wide, native


def _machine(graph: Any) -> Any:
    """What evaluates the native nodes of a graph of this kind."""
    if graph.kind == "fx":
        from ...graph.fx.single import Single as FX

        return FX(graph)
    from ...graph.onnx.single_torch import Single as ONNX

    return ONNX(graph)
