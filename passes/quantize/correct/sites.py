"""Layers of a quantized graph beside their float twins: what their stored weights stand for, where a shift can go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ....graph.errors import ConfigError, ConstraintError
from ....graph.ir import Graph, Node, Value, Weight
from ....graph.load import load
from ....graph.quantized import dequantizer, real
from ...base import Context

LAYERS = ("conv", "linear", "matmul")
INT32 = (-(2**31), 2**31 - 1)


@dataclass
class Site:
    """A layer whose weight is stored as integers.

    Attributes:
        node, twin: the layer in the quantized graph and in the float one, which gives it the same name.
        position: of the weight among the operands.
        stored: the integers; ``weight``: the float weight they stand for.
        channel_axis: axis of the layer's output that its output channels lie on.
    """

    node: Node
    twin: Node
    position: int
    stored: Weight
    weight: Weight
    channel_axis: int

    @property
    def scope(self) -> str:
        return self.node.scope or self.node.name

    @property
    def dequantize(self) -> Node:
        found = dequantizer(self.stored)
        assert found is not None
        return found

    @property
    def channels(self) -> int:
        return int((self.node.output.hint or (0,) * (self.channel_axis + 1))[self.channel_axis])

    def quantized(self) -> np.ndarray:
        """The numbers that the integers stand for, float32 in the weight's layout."""
        return np.asarray(real(self.stored), dtype=np.float32)

    def error(self) -> np.ndarray:
        """Quantized minus float weight, float32."""
        return self.quantized() - np.asarray(self.weight.numpy(), dtype=np.float32)

    def input_scale(self) -> np.ndarray | None:
        """Scale of the layer's quantized input, a single number; None where the input is float."""
        x = self.node.inputs[1 - self.position if self.node.op == "matmul" else 0]
        node = None if x is None else x.producer
        scale = node.inputs[1] if node is not None and node.op == "dequantize" else None
        data = None if scale is None else scale.const()
        return None if data is None or data.size != 1 else np.asarray(data, dtype=np.float32).reshape(())


def stored_behind(value: Value | None) -> Weight | None:
    """The stored integers that a value is dequantized from; None if it is anything else."""
    node = None if value is None else value.producer
    if node is None or node.op != "dequantize":
        return None
    source = node.inputs[0]
    return None if source is None else source.weight


def sites(graph: Graph, reference: Graph) -> list[Site]:
    """The layers of ``graph`` whose stored integers replace a float weight of ``reference``, in graph order."""
    twins = {n.name: n for n in reference.nodes}
    found = []
    for node in graph.nodes:
        twin = twins.get(node.name)
        if node.op not in LAYERS or twin is None or twin.op != node.op:
            continue
        for position, (here, there) in enumerate(zip(node.inputs[:2], twin.inputs[:2], strict=True)):
            stored = stored_behind(here)
            weight = None if there is None else there.weight
            if stored is not None and weight is not None and stored.shape == weight.shape:
                axis = 1 if node.op == "conv" else (node.output.rank or 1) - 1
                found.append(Site(node, twin, position, stored, weight, axis))
                break
    return found


def float_reference(ctx: Context, given: Any, name: str) -> Graph:
    """The float graph that a quantized one is compared with: the pass's own option, else what the run kept.

    Raises:
        ConfigError: there is none.
    """
    if given is not None:
        return given if isinstance(given, Graph) else load(given, ctx.example_inputs)
    if ctx.unquantized is None:
        raise ConfigError(
            f"pass {name!r} compares the quantized model with the float one, and none is known",
            node=name,
            expected="P.Quantize(...) before it in the same pipeline, or reference=the float model",
            found=None,
        )
    return ctx.unquantized


def quantized_sites(graph: Graph, reference: Graph, name: str) -> list[Site]:
    """:func:`sites`, at least one.

    Raises:
        ConstraintError: no layer of the graph holds integers for a float weight of the reference.
    """
    found = sites(graph, reference)
    if not found:
        raise ConstraintError(
            "no layer holds integers that stand for a weight of the float model",
            node=name,
            expected="conv, linear or matmul layers of the same names whose weight is a DequantizeLinear of integers",
            found=f"{sum(n.op in LAYERS for n in graph.nodes)} layers, none such",
            hint="run it right after P.Quantize; layers keep their names there",
        )
    return found


Form = Literal["float", "int32", "mean"]


@dataclass
class BiasSlot:
    """Where a shift of a layer's output goes: a float vector, an int32 one behind its scale, or a batch norm's mean.

    Attributes:
        value: the stored vector; ``result``: the operand that the graph computes from it (itself, if it is float).
        scale: per element, of the int32 form.
        sign: -1 for a running mean, which is subtracted.
    """

    form: Form
    value: Value
    result: Value
    scale: np.ndarray | None = None
    factor: float = 1.0
    step: np.ndarray | None = field(default=None, repr=False)

    def numbers(self) -> np.ndarray:
        """What the vector stands for, float64."""
        data = np.asarray(self.value.const(), dtype=np.float64)
        return data if self.scale is None else data * self.scale

    def shifted(self, shift: np.ndarray) -> np.ndarray:
        """The stored vector after the layer's output must grow by ``shift`` (one number per channel)."""
        old = self.value.const()
        assert old is not None
        wanted = shift.reshape(old.shape).astype(np.float64) * self.factor
        if self.scale is None:
            return np.asarray((old.astype(np.float64) + wanted).astype(old.dtype))
        steps = np.rint(wanted / self.scale.reshape(-1) if self.scale.ndim else wanted / self.scale)
        return np.clip(old.astype(np.float64) + steps, *INT32).astype(old.dtype)

    def replaced(self, numbers: np.ndarray, scale: np.ndarray | None = None) -> np.ndarray:
        """The stored vector that stands for these numbers, under ``scale`` where the scale is about to change."""
        old = self.value.const()
        assert old is not None
        scale = self.scale if scale is None else scale
        wanted = numbers.reshape(old.shape).astype(np.float64)
        if scale is None:
            return np.asarray(wanted.astype(old.dtype))
        return np.clip(np.rint(wanted / scale), *INT32).astype(old.dtype)


def bias_slot(site: Site) -> BiasSlot | None:
    """The vector that a shift of the layer's output can be added to, or None."""
    node, size = site.node, site.channels
    bias = node.input(2) if node.op != "matmul" else None
    if bias is not None:
        return _vector(bias, size, 1.0 / node.attrs.get("beta", 1.0) if node.attrs.get("beta", 1.0) else 0.0)
    if len(node.output.uses) != 1 or node.output.is_output:
        return None
    reader, position = node.output.uses[0]
    if reader.op == "add" and reader.attrs.get("alpha", 1) == 1:
        other = reader.input(1 - position)
        if (
            other is None
            or other.hint is None
            or not _along(other.hint, site.channel_axis, node.output.rank or 0, size)
        ):
            return None
        return _vector(other, size, 1.0)
    if reader.op == "batch_norm" and position == 0 and not reader.attrs.get("training"):
        mean = reader.inputs[3]
        found = None if mean is None else _vector(mean, size, -1.0)
        return (
            found if found is None or found.form != "float" else BiasSlot("mean", found.value, found.result, None, -1.0)
        )
    return None


def _along(shape: tuple[int, ...], axis: int, rank: int, size: int) -> bool:
    whole = (1,) * (rank - len(shape)) + tuple(shape)
    return len(whole) == rank and all(n == (size if i == axis else 1) for i, n in enumerate(whole))


def _vector(value: Value, size: int, factor: float) -> BiasSlot | None:
    """A stored vector of one number per channel that this layer alone reads."""
    if len(value.uses) != 1 or not factor:
        return None
    if value.weight is not None:
        own = value.weight.size == size and value.weight.dtype.startswith(("float", "bfloat"))
        return BiasSlot("float", value, value, None, factor) if own else None
    stored, node = stored_behind(value), value.producer
    if stored is None or node is None or stored.dtype != "int32" or stored.size != size or len(stored.value.uses) != 1:  # type: ignore[union-attr]
        return None
    scale = node.inputs[1].const() if node.inputs[1] is not None else None
    if scale is None:
        return None
    assert stored.value is not None
    wide = np.asarray(scale, dtype=np.float64)
    return BiasSlot("int32", stored.value, value, wide.reshape(-1) if wide.size > 1 else wide.reshape(()), factor)


def add_bias(graph: Graph, site: Site, integers: bool) -> BiasSlot | None:
    """Give a layer without a bias one of zeros, in int32 on the accumulator's scale or in float32.

    Returns None where the operator takes none (then an addition after it would be a new operator: not done here), or
    something already adds to its result.
    """
    node = site.node
    if node.op == "matmul" or node.input(2) is not None or not site.channels:
        return None
    if node.op == "linear" and node.origin.endswith("MatMul"):
        return None
    x = site.input_scale()
    scale = site.dequantize.inputs[1]
    w = None if scale is None else scale.const()
    if not integers or x is None or w is None or w.size not in (1, site.channels):
        zeros = graph.add_weight(f"{node.name}_bias", np.zeros(site.channels, dtype=np.float32))
        graph.set_input(node, 2, zeros)
        return _vector(zeros, site.channels, 1.0)
    step = np.asarray(x * np.asarray(w, dtype=np.float32).reshape(-1), dtype=np.float32)
    step = step if step.size > 1 else step.reshape(())
    stored = graph.add_weight(f"{node.name}_bias_quantized", np.zeros(site.channels, dtype=np.int32))
    scales = graph.add_weight(f"{node.name}_bias_scale", step)
    attrs: dict[str, Any] = {"axis": 0 if step.ndim else None, "dtype": "float32", "block": 0}
    zero = graph.add_weight(f"{node.name}_bias_zero_point", np.zeros(step.shape, dtype=np.int32))
    made = graph.insert(
        "dequantize", [stored, scales, zero], attrs, name=f"{node.name}_bias_dequantize", after=None, scope=node.scope
    )
    graph.set_input(node, 2, made.output)
    return _vector(made.output, site.channels, 1.0)


def slots(graph: Graph, found: list[Site]) -> dict[str, BiasSlot]:
    """A bias slot for every site that has or can get one, by node name; new ones look like the others in the graph."""
    have = {site.node.name: bias_slot(site) for site in found}
    integers = any(slot is not None and slot.form == "int32" for slot in have.values())
    fresh = False
    for site in found:
        if have[site.node.name] is None and (made := add_bias(graph, site, integers)) is not None:
            have[site.node.name], fresh = made, True
    if fresh:
        graph.refresh()
    return {name: slot for name, slot in have.items() if slot is not None}
