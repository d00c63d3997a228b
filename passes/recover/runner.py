"""Step by step execution of a graph from either front end in torch, several batches side by side."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import ChainMap
from collections.abc import Callable, Container, Hashable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...graph.errors import ConstraintError
from ...graph.execute import batches_of
from ...graph.ir import Graph, Node, Value

if TYPE_CHECKING:
    from ...graph.fx.view import FXView
    from ...graph.onnx import ONNXGraph


class Runner(ABC):
    """Executes the calls of one graph in order; every batch has its own tensors, freed after their last reader.

    A value lives until the step after its last reader begins, so that what a call read and made can be looked at
    right after it. Memory: the live values of all batches.

    Attributes:
        at: number of calls made.
        calls: (reads, writes) of each call, as native keys; ``order`` is the order in which they are made.
        stored: current tensor of each weight, by native key.
    """

    def __init__(self, graph: Graph, heavy: Container[str] = ()) -> None:
        self.graph = graph
        self.at = 0
        self.calls: list[tuple[list[Hashable], list[Hashable]]] = []
        self.stored: dict[Hashable, Any] = {}
        self.envs: list[dict[Hashable, Any]] = []
        self._compile()
        self.order = _schedule(
            self.calls, {k for n in graph.nodes if n.op in heavy for v in n.outputs if (k := self.key(v))}
        )
        self._last: dict[Hashable, int] = {}
        self._writer: dict[Hashable, int] = {}
        for i, (reads, writes) in enumerate(self.calls[k] for k in self.order):
            self._last.update(dict.fromkeys([*reads, *writes], i))
            self._writer.update({key: i for key in writes})
        self._dying: dict[int, list[Hashable]] = {}
        kept = {self.key(v) for v in graph.outputs}
        for key, i in self._last.items():
            if key not in kept:
                self._dying.setdefault(i, []).append(key)

    @abstractmethod
    def _compile(self) -> None:
        """Fill ``calls`` and ``stored``."""

    @abstractmethod
    def _call(self, i: int, env: dict[Hashable, Any]) -> None:
        """Make call i on one batch."""

    @abstractmethod
    def key(self, value: Value) -> Hashable:
        """The native key of a canonical value."""

    def start(self, batches: Iterable[dict[str, Any]]) -> None:
        """Begin with these inputs, {graph input name: array or tensor} per batch."""
        self.at = 0
        self.envs = [self.bind(batch) for batch in batches]

    def bind(self, batch: dict[str, Any]) -> dict[Hashable, Any]:
        """The tensors of one batch before the first call, by native key."""
        env: dict[Hashable, Any] = {}
        for value in self.graph.inputs:
            if value.name in batch:
                env[self.key(value)] = self._input(value, batch[value.name])
        return env

    def call(self, position: int, env: dict[Hashable, Any]) -> None:
        """Make the call at one position of ``order`` on these tensors; ``env`` goes before what is stored."""
        self._call(self.order[position], env)

    def dead(self, position: int) -> list[Hashable]:
        """Keys that nothing reads after the call at this position."""
        return self._dying.get(position, [])

    def _input(self, value: Value, given: Any) -> Any:
        from ...graph.fx.tensors import from_numpy

        return from_numpy(given)

    def position(self, node: Node) -> int | None:
        """The number of the call that a canonical node stands for; None if it is not executed by itself."""
        return next((self._writer[k] for v in node.outputs if (k := self.key(v)) in self._writer), None)

    def advance(self, until: int) -> None:
        """Make all calls before number ``until`` that have not been made yet."""
        while self.at < until:
            for key in self._dying.get(self.at - 1, ()):
                for env in self.envs:
                    env.pop(key, None)
            for env in self.envs:
                self._call(self.order[self.at], env)
            self.at += 1

    def repeat(self) -> None:
        """Make the last call again, after a weight it reads has changed."""
        for env in self.envs:
            self._call(self.order[self.at - 1], env)

    def remake(self, value: Value) -> None:
        """Make the call that wrote a computed value again, after a weight it reads has changed."""
        for env in self.envs:
            self._call(self.order[self._writer[self.key(value)]], env)

    def values(self, value: Value) -> list[Any] | None:
        """The tensor of a value in each batch, or None where it is not alive."""
        key = self.key(value)
        if value.is_const:
            return None
        if not self.envs or any(key not in env for env in self.envs):
            return None
        return [env[key] for env in self.envs]

    def set_weight(self, value: Value, data: np.ndarray) -> None:
        """Replace a weight, in the graph too."""
        from ...graph.fx.tensors import from_numpy

        assert value.weight is not None
        self.graph.set_weight(value.weight, data)
        self.stored[self.key(value)] = from_numpy(data)


class FXRunner(Runner):
    """Calls are the fx nodes of the captured graph."""

    graph: FXView

    def _compile(self) -> None:
        from ...graph.fx.functional import has_effect

        self._effect = has_effect
        self._nodes: list[Any] = []
        for node in self.graph.fx.nodes:
            if node.op == "get_attr":
                name = str(node.target)
                found: Any = self.graph.submodules.get(name, self.graph.tensors.get(name))
                self.stored[node] = found.detach() if isinstance(found, Tensor) else found
            elif node.op == "call_function":
                self._nodes.append(node)
                self.calls.append((list(node.all_input_nodes), [node]))
            elif node.op == "placeholder" and node not in self.graph._value_of:
                self.stored[node] = None

    def key(self, value: Value) -> Hashable:
        return value.native

    def _input(self, value: Value, given: Any) -> Any:
        if not isinstance(value.native.meta.get("val"), Tensor):
            return np.asarray(given).item()  # a size given as an argument
        return super()._input(value, given)

    def _call(self, i: int, env: dict[Hashable, Any]) -> None:
        from torch import fx

        from ...graph.fx.run import fitting

        node = self._nodes[i]
        if self._effect(node):
            env[node] = self._look(env, node.all_input_nodes[-1])  # a buffer update: weights are never written to
            return
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self._look(env, n))
        try:
            env[node] = node.target(*args, **kwargs)
        except Exception as error:
            raise ConstraintError(
                f"the graph cannot run: {str(error).strip().splitlines()[0][:300]}",
                node=node.name,
                found=[tuple(a.shape) for a in args if isinstance(a, Tensor)],
                hint=fitting(self.graph),
            ) from error

    def _look(self, env: dict[Hashable, Any], node: Any) -> Any:
        return env[node] if node in env else self.stored[node]


class ONNXRunner(Runner):
    """Calls are the ONNX nodes, computed by torch functions."""

    graph: ONNXGraph

    def _compile(self) -> None:
        from ...graph.onnx.as_torch import to_torch

        module = to_torch(self.graph)
        self._program = module.program
        self.stored.update(self._program.constants)
        self.stored.update({name: getattr(module, slot).detach() for name, slot in module._slots.items()})
        self.stored.update({name: self.stored[held] for name, held in self._program.aliases.items()})
        from ...graph.onnx.as_torch_run import Program

        for step in self._program.steps:
            reads: list[Hashable] = [n for n in step.inputs if n]
            for attr in step.attrs.values():
                if isinstance(attr, Program):
                    reads += sorted(
                        {n for s in attr.steps for n in s.inputs if n} | set(attr.outputs) | attr._captured()
                    )
            self.calls.append((reads, [n for n in step.outputs if n]))

    def key(self, value: Value) -> Hashable:
        return value.native.name if value.native is not None else value.name

    def bind(self, batch: dict[str, Any]) -> dict[Hashable, Any]:
        env = super().bind(batch)
        for name, data in self._program.defaults.items():
            env.setdefault(name, torch.from_numpy(np.array(data)))
        return env

    def _call(self, i: int, env: dict[Hashable, Any]) -> None:
        from ...graph.onnx.as_torch_run import TORCH_OPS, Call

        step = self._program.steps[i]
        try:
            results = TORCH_OPS[step.op](Call(step, ChainMap(env, self.stored), False))  # type: ignore[arg-type]
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ConstraintError(
                f"{step.op} failed in torch", node=step.name, found=str(error).splitlines()[0][:300] or error
            ) from error
        results = results if isinstance(results, (tuple, list)) else (results,)
        for name, result in zip(step.outputs, results, strict=False):
            if name:
                env[name] = result


def _schedule(calls: list[tuple[list[Hashable], list[Hashable]]], heavy: set[Hashable]) -> list[int]:
    """An order of the calls in which each one whose operands are there precedes the heavy ones.

    So the skip of a residual block is there when the last heavy call of the branch is made, wherever the model's
    author put the line that computes it.
    """
    writer = {key: i for i, (_, writes) in enumerate(calls) for key in writes}
    late = [any(key in heavy for key in writes) for _, writes in calls]
    needs = [{writer[k] for k in reads if k in writer} for reads, _ in calls]
    readers: dict[int, list[int]] = {}
    for i, sources in enumerate(needs):
        for j in sources:
            readers.setdefault(j, []).append(i)
    waiting = [len(n) for n in needs]
    ready = [(late[i], i) for i, n in enumerate(waiting) if not n]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        i = heapq.heappop(ready)[1]
        order.append(i)
        for j in readers.get(i, ()):
            waiting[j] -= 1
            if not waiting[j]:
                heapq.heappush(ready, (late[j], j))
    return order


def runner(graph: Graph, heavy: Container[str] = ()) -> Runner:
    """The runner of a graph; nodes of the ``heavy`` ops are executed as late as their readers allow.

    Raises:
        UnsupportedOp: an ONNX operator has no torch implementation; names the node.
        ConstraintError: the graph is of neither front end.
    """
    kinds: dict[str, Callable[..., Runner]] = {"fx": FXRunner, "onnx": ONNXRunner}
    if graph.kind not in kinds:
        raise ConstraintError("only torch and ONNX graphs can be recovered", node=graph.name, found=graph.kind)
    return kinds[graph.kind](graph, heavy)


def bound(graph: Graph, batches: Iterable[Any]) -> list[dict[str, Any]]:
    """Batches as {graph input name: array}, in a list.

    Raises:
        ConstraintError: there was no batch, or one does not fit the model's inputs.
    """
    found = list(batches_of(graph, batches))
    if not found:
        raise ConstraintError(
            "the calibration data is empty", expected="at least one batch", found="none", hint="pass a list of batches"
        )
    return found
