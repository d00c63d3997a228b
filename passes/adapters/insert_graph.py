"""Inserting adapters into an ONNX graph, as nodes beside the op: low-rank branches, scales, shifts, bottlenecks."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...graph.errors import ConfigError, ConstraintError, FoldlineError
from ...graph.ir import Graph, Node, Value
from ..base import Decision, Outcome, nearest
from .kinds import AdapterKind, Start, Tensors
from .patterns import matches, rows_of, split_part
from .view import View

DTYPES = ("float32", "float64", "float16")


@dataclass
class Branch:
    """A low-rank update in three factors: x -> A -> inner? -> gate? -> B -> scale."""

    a: np.ndarray
    b: np.ndarray
    gate: np.ndarray | None = None
    inner: np.ndarray | None = None


LOW_RANK: dict[str, Callable[[Tensors], Branch]] = {
    "lora": lambda t: Branch(t["A"], t["B"]),
    "gated_lora": lambda t: Branch(t["A"], t["B"], t["gate"]),
    "adalora": lambda t: Branch(t["A"], t["B"], t["gate"]),
    "increlora": lambda t: Branch(t["A"], t["B"], t["gate"]),
    "triangular_lora": lambda t: Branch(t["A"], t["B"]),
    "concept_lora": lambda t: Branch(t["u"], t["v"].T, t["gate"]),
    "xs": lambda t: Branch(t["A"], t["B"], inner=t["R"]),
}
OTHERS = ("ia3", "ssf", "bottleneck")


@dataclass
class _Spot:
    """A node whose weight is adapted."""

    node: Node
    view: View
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        weight = self.node.inputs[1]
        assert weight is not None and weight.weight is not None
        return weight.weight.name


def insert_branches(
    graph: Graph, kind: AdapterKind, targets: Any, exclude: Sequence[str], options: Mapping[str, Any], seed: int
) -> Outcome:
    """Insert an adapter beside every linear op and convolution that the patterns choose, by weight or layer name.

    Raises:
        ConstraintError: the kind is no function of the op's input or output alone (give the ``nn.Module``), or an
            initialisation gave a start product, which a branch cannot subtract.
        ConfigError: a pattern chooses nothing.
    """
    if kind.name not in (*LOW_RANK, *OTHERS):
        raise ConstraintError(
            "adapters of this kind have no branch of nodes",
            node=kind.name,
            expected=", ".join((*LOW_RANK, *OTHERS)),
            hint="insert into the nn.Module and export it: P.Fold materialises what depends on weights alone",
        )
    decisions, inputs = [], []
    for spot in _spots(graph, targets, exclude):
        chosen = kind.options({**options, **spot.options})
        tensors, geometry = _start(kind, spot, chosen, seed)
        writer = _Writer(graph, spot, geometry.kernel != ())
        if kind.name in LOW_RANK:
            if any(name.endswith("_start") for name in tensors):
                raise ConstraintError("a branch cannot subtract a start product", node=spot.name, hint="init='zero'")
            branch = LOW_RANK[kind.name](tensors)
            writer.low_rank(branch, float(chosen["scale"]))
            if chosen.get("dynamic"):
                inputs.append(writer.named["gate"])
        else:
            getattr(writer, kind.name)(tensors, chosen)
        count = sum(tensors[k].size for k in tensors if k not in kind.fixed)
        decisions.append(Decision(spot.name, "inserted", f"{kind.name}, {count} trained elements"))
    graph.refresh()
    made = _as_inputs(graph, inputs) if inputs else None
    details = {"adapters": len(decisions), "kind": kind.name, "inputs": inputs}
    return Outcome(decisions=decisions, details=details, graph=made)


def _spots(graph: Graph, targets: Any, exclude: Sequence[str]) -> list[_Spot]:
    wanted = dict(targets) if isinstance(targets, Mapping) else {t: {} for t in (targets or ())}
    found, used, names = [], set(), []
    for node in list(graph.nodes):
        weight = node.inputs[1] if node.op in ("linear", "conv") and len(node.inputs) > 1 else None
        if weight is None or weight.weight is None or weight.weight.dtype not in DTYPES:
            continue
        name, path = weight.weight.name, node.scope or weight.weight.name.rpartition(".")[0]
        names.append(name)
        if any(matches(e, path, name) for e in exclude):
            continue
        transposed = bool(node.attrs.get("transposed_weight") or node.attrs.get("transposed"))
        view = View(transposed, int(node.attrs.get("groups", 1)))
        for pattern, own in wanted.items() if targets is not None else [("", {})]:
            stem, part = split_part(pattern)
            if pattern and not matches(stem, path, name):
                continue
            used.add(pattern)
            rows = None if part is None else rows_of(part, view.rows_of(weight.weight.shape), name)
            found.append(_Spot(node, View(view.transposed, view.groups, rows), own))
    missing = [p for p in wanted if p not in used]
    if missing or not found:
        close = nearest(missing[0], names) if missing else None
        raise ConfigError(
            "a target pattern chooses no weight" if missing else "there is no weight for an adapter",
            node=missing[0] if missing else "targets",
            expected=f"weights such as {', '.join(names[:6])}",
            hint=f"did you mean {close!r}?" if close else None,
        )
    return found


def _start(kind: AdapterKind, spot: _Spot, options: Mapping[str, Any], seed: int) -> tuple[dict[str, np.ndarray], Any]:
    weight = spot.node.inputs[1]
    assert weight is not None and weight.weight is not None
    stored = weight.weight.numpy().astype(np.float64)
    stream = zlib.crc32(f"{spot.name}{spot.view.rows or ''}".encode())
    rng = np.random.Generator(np.random.Philox(key=[seed, stream]))
    g = spot.view.geometry(stored.shape)
    try:
        return kind.init(Start(spot.view.canonical(stored), None, g, options, rng)), g
    except FoldlineError as exc:
        exc.node = spot.name
        exc.args = (exc._render(),)
        raise


class _Writer:
    """Writes the nodes of one adapter right behind its target; every reader of the target then reads the sum."""

    def __init__(self, graph: Graph, spot: _Spot, spatial: bool) -> None:
        self.graph, self.spot, self.spatial = graph, spot, spatial
        self.node = spot.node
        self.last = spot.node
        stem = spot.name.rpartition(".")[0] or spot.name
        rows = "" if spot.view.rows is None else f"_{spot.view.rows[0]}"
        self.prefix = f"{stem}.adapter{rows}"
        weight = self.node.inputs[1]
        assert weight is not None and weight.weight is not None
        self.dtype = weight.weight.numpy().dtype
        self.outputs = spot.view.rows_of(weight.weight.shape)
        self.named: dict[str, str] = {}

    def store(self, name: str, data: np.ndarray) -> Value:
        value = self.graph.add_weight(f"{self.prefix}.{name}", np.ascontiguousarray(data.astype(self.dtype)))
        self.named[name] = value.name
        return value

    def add(self, op: str, inputs: Sequence[Value | None], attrs: dict[str, Any] | None = None) -> Value:
        name = f"{self.prefix}.{op}"
        made = self.graph.insert(op, inputs, attrs, name=name, after=self.last, scope=self.node.scope)
        self.last = made
        return made.output

    def project(self, x: Value, name: str, matrix: np.ndarray) -> Value:
        """x times a matrix [out, in] on the channel axis; a 1x1 convolution, per group, on spatial values."""
        if not self.spatial:
            return self.add("linear", [x, self.store(name, matrix.T)], {"transposed_weight": True})
        dims = self._dims()
        weight = self.store(name, matrix.reshape(*matrix.shape, *[1] * dims))
        return self.add("conv", [x, weight], {"groups": self.spot.view.groups})

    def channels(self, vector: np.ndarray) -> np.ndarray:
        """A vector that multiplies the channel axis."""
        return vector.reshape(-1, *[1] * self._dims()) if self.spatial else vector

    def _dims(self) -> int:
        weight = self.node.inputs[1]
        assert weight is not None and weight.weight is not None
        return len(weight.weight.shape) - 2

    def low_rank(self, branch: Branch, scale: float) -> None:
        """y + s (x A^T) B^T."""
        x, y = self.node.inputs[0], self.node.output
        assert x is not None
        g = self.spot.view.groups
        if not self.spatial:
            hidden = self.project(x, "A", branch.a)
        else:
            hidden = self._first_conv(x, branch.a)
        if branch.inner is not None:
            hidden = self.project(hidden, "R", np.tile(branch.inner, (g if self.spatial else 1, 1)))
        if branch.gate is not None:
            gate = self.store("gate", branch.gate)
            if self.spatial:
                repeated = gate if g == 1 else self.add("tile", [gate], {"repeats": [g]})
                gate = self.add("reshape", [repeated], {"shape": [g * len(branch.gate), *[1] * self._dims()]})
            hidden = self.add("mul", [hidden, gate])
        out = self.project(hidden, "B", self._all_rows(branch.b))
        scale *= float(self.node.attrs.get("alpha", 1.0))
        if scale != 1.0:
            out = self.add("mul", [out, self.store("scale", np.array(scale))])
        self.sum(y, out)

    def _first_conv(self, x: Value, a: np.ndarray) -> Value:
        """The target's own convolution with r outputs per group."""
        weight = self.node.inputs[1]
        assert weight is not None and weight.weight is not None
        shape, g = weight.weight.shape, self.spot.view.groups
        kernel = shape[2:]
        rank = len(a)
        same = {k: v for k, v in self.node.attrs.items() if k in ("stride", "padding", "dilation", "groups")}
        if self.spot.view.transposed:
            inputs = a.reshape(rank, shape[0] // g, *kernel).swapaxes(0, 1)
            data = np.tile(inputs, (g, 1, *[1] * len(kernel)))
            same |= {"transposed": True, "output_padding": self.node.attrs.get("output_padding")}
        else:
            data = np.tile(a.reshape(rank, shape[1], *kernel), (g, 1, *[1] * len(kernel)))
        return self.add("conv", [x, self.store("A", data)], same)

    def _all_rows(self, b: np.ndarray) -> np.ndarray:
        rows = self.spot.view.rows
        if rows is None:
            return b
        whole = np.zeros((self.outputs, b.shape[1]))
        whole[rows[0] : rows[1]] = b
        return whole

    def sum(self, y: Value, added: Value) -> None:
        total = self.add("add", [y, added])
        self._reads(y, total)

    def _reads(self, y: Value, new: Value) -> None:
        mine = [n for n, _ in y.uses if n.name.startswith(self.prefix)]
        self.graph.replace_uses(y, new, except_nodes=mine)

    def _whole(self, vector: np.ndarray, rest: float) -> np.ndarray:
        rows = self.spot.view.rows
        if rows is None:
            return vector
        whole = np.full(self.outputs, rest)
        whole[rows[0] : rows[1]] = vector
        return whole

    def ia3(self, t: Tensors, o: Mapping[str, Any]) -> None:
        """y * l, or x * l for the columns."""
        if o["axis"] == "out":
            y = self.node.output
            new = self.add("mul", [y, self.store("l", self.channels(self._whole(t["l"], 1.0)))])
            self._reads(y, new)
            return
        x = self.node.inputs[0]
        assert x is not None
        at = x.producer
        stored = self.store("l", self.channels(t["l"]))
        made = self.graph.insert("mul", [x, stored], name=f"{self.prefix}.mul", after=at, scope=self.node.scope)
        self.graph.set_input(self.node, 0, made.output)

    def ssf(self, t: Tensors, o: Mapping[str, Any]) -> None:
        """y * scale + shift."""
        y = self.node.output
        scaled = self.add("mul", [y, self.store("scale", self.channels(self._whole(t["scale"], 1.0)))])
        new = self.add("add", [scaled, self.store("shift", self.channels(self._whole(t["shift"], 0.0)))])
        self._reads(y, new)

    def bottleneck(self, t: Tensors, o: Mapping[str, Any]) -> None:
        """y + s f(y W_down + b) W_up + b."""
        if self.spatial:
            raise ConstraintError("a bottleneck node branch needs a linear op", node=self.spot.name, found="conv")
        y = self.node.output
        down = self.add("add", [self.project(y, "down", t["down"]), self.store("down_bias", t["down_bias"])])
        hidden = self.add(o["activation"], [down])
        scale = float(o["scale"])
        up = self.project(hidden, "up", t["up"] * scale)
        self.sum(y, self.add("add", [up, self.store("up_bias", t["up_bias"] * scale)]))


def _as_inputs(graph: Graph, names: Sequence[str]) -> Graph:
    """The graph with these initializers as inputs (gates that come with every call)."""
    from ...graph.onnx import load_onnx

    model = graph.to_model()
    if hasattr(model, "SerializeToString"):
        import onnx

        model = onnx.load_from_string(model.SerializeToString())
        for name in names:
            tensor = next(t for t in model.graph.initializer if t.name == name)
            info = onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
            model.graph.initializer.remove(tensor)
            model.graph.input.append(info)
        return load_onnx(model)
    for name in names:
        model.graph.inputs.append(model.graph.initializers.pop(name))
    return load_onnx(model)
