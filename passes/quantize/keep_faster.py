"""KeepFaster: layers that run slower in integers on this machine, measured on the target, go back to float."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from ...graph.errors import ConfigError
from ...graph.ir import Graph, Node, Value
from ..base import BackendLike, Context, Contract, Decision, Outcome, Pass
from .reference.fuse import find_kernels, source


class KeepFaster(Pass):
    """Measure each layer quantized and in float on the target, and keep the faster form of each.

    A layer is a convolution or matrix product with all that works on its result up to the next one. Those that are
    slower in integers get their float weights back, Q/DQ pairs that then serve no integer kernel go, and the whole is
    measured again: a change is kept only if the model got faster. Where no quantized form is faster than the float
    model, the float model is what comes out. Depends on the machine: run it where the model will run.
    """

    name: ClassVar[str] = "keep_faster"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    requires: ClassVar[frozenset[str]] = frozenset({"quantized"})

    target: str = "onnxruntime-cpu"
    """Backend that runs the model and tells the time of each node."""
    runs: int = Field(default=20, ge=3)
    """Profiled calls per measurement."""
    rounds: int = Field(default=3, ge=1)
    """How often layers are weighed anew after some went back to float."""
    margin: float = Field(default=0.02, ge=0)
    """Relative loss below which a layer stays in integers."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the backend's lowering, e.g. ``{"threads": 1}``."""

    def prepare(self, ctx: Context) -> None:
        ctx.backends(self.target)

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        """See the class.

        Raises:
            ConfigError: nothing was quantized in this run. BackendError: the target tells no times of single nodes.
        """
        before = ctx.unquantized
        if before is None:
            raise ConfigError(
                "this pass compares with the model as it was before quantization",
                node=self.name,
                expected="a pass that quantizes, earlier in the same run",
                found=None,
            )
        backend = ctx.backends(self.target)
        floats = self._times(backend, before, ctx)
        best, times = graph, self._times(backend, graph, ctx)
        first = sum(times.values())
        restored: dict[str, tuple[float, float]] = {}
        for _ in range(self.rounds):
            slower = {
                node.name: (times.get(node.name, 0.0), floats.get(node.name, 0.0))
                for node in quantized_layers(best)
                if times.get(node.name, 0.0) > (1 + self.margin) * floats.get(node.name, 0.0)
            }
            if not slower:
                break
            trial = best.clone()
            restore(trial, before, set(slower))
            found = self._times(backend, trial, ctx)
            if sum(found.values()) >= sum(times.values()):
                break
            best, times = trial, found
            restored |= slower
        total = sum(floats.values())
        if sum(times.values()) > total or not quantized_layers(best):
            reason = f"no quantized form is faster: {first:.3f} ms against {total:.3f} ms in float"
            decision = Decision("model", "kept in float", reason)
            return Outcome(decisions=[decision], details=_details(total, first, total), graph=before.clone())
        decisions = [
            Decision(name, "kept in float", f"slower in integers: {a:.3f} ms against {b:.3f} ms", {"ms": a, "float": b})
            for name, (a, b) in restored.items()
        ]
        return Outcome(decisions=decisions, details=_details(total, first, sum(times.values())), graph=best)

    def _times(self, backend: BackendLike, graph: Graph, ctx: Context) -> dict[str, float]:
        return backend.node_times(graph, ctx.example_inputs, runs=self.runs, **self.options)


def _details(floats: float, quantized: float, after: float) -> dict[str, Any]:
    return {"latency": {"before_ms": quantized, "after_ms": after}, "float_ms": floats}


def quantized_layers(graph: Graph) -> list[Node]:
    """Nodes whose weight is stored as integers and read through a dequantize node."""
    return [n for n in graph.nodes if n.op in ("conv", "linear", "matmul") and _stored(n.input(1)) is not None]


def _stored(value: Value | None) -> Node | None:
    """The dequantize node of a stored tensor that a value comes out of."""
    dq = source(value)
    return dq if dq is not None and dq.inputs[0] is not None and dq.inputs[0].is_const else None


def restore(graph: Graph, before: Graph, names: set[str]) -> None:
    """Give nodes back the float operands that they have in ``before``, and remove pairs that serve no kernel any more.

    Args:
        graph: the quantized graph, edited.
        before: the same graph before it was quantized: nodes have the same names.
        names: nodes whose weights (and biases, in the node or in the addition behind it) become float.
    """
    originals = {n.name: n for n in before.nodes}
    for node in [n for n in graph.nodes if n.name in names]:
        behind = [u for u, _ in node.output.uses if u.op == "add"] if len(node.output.uses) == 1 else []
        for touched in (node, *behind):
            original = originals.get(touched.name)
            if original is None or original.attrs.get("transposed_weight") != touched.attrs.get("transposed_weight"):
                continue
            for position, value in enumerate(touched.inputs):
                was = original.input(position)
                dq = _stored(value)
                if dq is None or was is None or was.weight is None:
                    continue
                known = graph.weights.get(was.weight.name)
                data = was.weight.numpy()
                if known is not None and known.value is not None and known.shape == data.shape:
                    made = known.value
                else:
                    made = graph.add_weight(was.weight.name, data)
                graph.set_input(touched, position, made)
                _erase_unread(graph, dq)
    while _remove_idle_pairs(graph):
        pass
    graph.refresh()


def _erase_unread(graph: Graph, node: Node) -> None:
    if not any(graph.is_read(v) for v in node.outputs):
        graph.erase(node)


def _remove_idle_pairs(graph: Graph) -> int:
    """Remove Q/DQ pairs of activations that neither come from an integer kernel nor lead to one; returns how many."""
    kernels = find_kernels(graph)
    serving = {k.quantize.name for k in kernels.values() if k.quantize is not None}
    idle = []
    for q in [n for n in reversed(graph.nodes) if n.op == "quantize"]:
        readers = [node for node, _ in q.output.uses]
        users = [u for dq in readers for u, _ in dq.output.uses]
        plain = not q.output.is_output and all(r.op == "dequantize" for r in readers) and q.inputs[0] is not None
        # A node that only moves elements passes the integers on to a pair behind it, which was judged before this one.
        leads = any(u.name in kernels or any(b.name in serving for b in _behind(u)) for u in users)
        if not plain or leads or q.name in serving:
            serving.add(q.name)
        else:
            idle.append((q, readers))
    for q, readers in idle:
        for dq in readers:
            graph.replace_uses(dq.output, q.inputs[0])  # type: ignore[arg-type]
            graph.erase(dq)
        graph.erase(q)
    return len(idle)


def _behind(node: Node) -> list[Node]:
    """The quantize nodes that read a node's results."""
    return [u for v in node.outputs for u, _ in v.uses if u.op == "quantize"]
