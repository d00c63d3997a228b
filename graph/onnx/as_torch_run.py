"""The interpreter behind ONNXModule: plain-data programs, one torch function per ONNX operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ConstraintError, UnsupportedOp


@dataclass
class Step:
    """One node: operator, operands by name (None where absent), outputs by name ("" where unused), attributes."""

    op: str
    name: str
    inputs: list[str | None]
    outputs: list[str]
    attrs: dict[str, Any]
    opset: int
    release: list[str] = field(default_factory=list)


@dataclass
class Program:
    """A graph as data. ``aliases`` maps tied names to the name that holds the tensor."""

    inputs: list[str]
    outputs: list[str]
    steps: list[Step]
    constants: dict[str, Tensor]
    defaults: dict[str, Any]
    dtypes: list[torch.dtype | None]
    aliases: dict[str, str] = field(default_factory=dict)

    def plan_releases(self) -> None:
        """Note after which step each intermediate tensor is no longer needed."""
        seen = set(self.outputs) | self._captured()
        for step in reversed(self.steps):
            step.release = []
            for name in dict.fromkeys(n for n in [*step.inputs, *step.outputs] if n):
                if name not in seen:
                    seen.add(name)
                    step.release.append(name)

    def _captured(self) -> set[str]:
        """Names that nested programs read."""
        found: set[str] = set()
        for step in self.steps:
            for attr in step.attrs.values():
                if isinstance(attr, Program):
                    found |= {n for s in attr.steps for n in s.inputs if n} | set(attr.outputs) | attr._captured()
        return found


class Call:
    """What an operator's implementation sees of one node at one run."""

    def __init__(self, step: Step, env: dict[str, Any], training: bool) -> None:
        self.step, self.env, self.training = step, env, training
        self.opset = step.opset

    def x(self, i: int = 0) -> Tensor:
        """Operand i, which must be there."""
        name = self.step.inputs[i]
        assert name is not None
        return self.env[name]

    def maybe(self, i: int) -> Tensor | None:
        inputs = self.step.inputs
        return None if i >= len(inputs) or inputs[i] is None else self.env[inputs[i]]  # type: ignore[index]

    def all(self) -> list[Tensor]:
        """All operands, on one device."""
        return together([self.env[n] for n in self.step.inputs if n])

    def attr(self, name: str, default: Any = None) -> Any:
        value = self.step.attrs.get(name)
        return default if value is None else value

    def ints(self, i: int, name: str = "", default: Any = None) -> Any:
        """A list of ints that is operand i, or attribute ``name`` in old opsets."""
        if name and name in self.step.attrs:
            return list(self.step.attrs[name])
        value = self.maybe(i)
        return default if value is None else [int(v) for v in value.reshape(-1).tolist()]

    def scalar(self, i: int, name: str = "", default: Any = None) -> Any:
        if name and name in self.step.attrs:
            return self.step.attrs[name]
        value = self.maybe(i)
        return default if value is None else value.reshape(-1)[0].item()

    def used(self, i: int) -> bool:
        return i < len(self.step.outputs) and bool(self.step.outputs[i])

    def axis(self, default: int, rank: int, name: str = "axis") -> int:
        axis = self.attr(name, default)
        return axis + rank if axis < 0 else axis

    def refuse(self, why: str) -> UnsupportedOp:
        return UnsupportedOp(f"{self.step.op}: {why} has no torch implementation", node=self.step.name)


TorchOp = Callable[[Call], Any]
TORCH_OPS: dict[str, TorchOp] = {}


def torch_op(*names: str) -> Callable[[TorchOp], TorchOp]:
    """Register the implementation of ONNX operators; it returns a tensor or a tuple with one entry per output."""

    def register(function: TorchOp) -> TorchOp:
        for name in names:
            TORCH_OPS[name] = function
        return function

    return register


def together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Small tensors that were computed on the CPU follow the data to its device."""
    device = next((t.device for t in tensors if t.device.type != "cpu"), None)
    if device is None:
        return list(tensors)
    return [t if t.device == device or (t.dim() == 0 and t.device.type == "cpu") else t.to(device) for t in tensors]


def execute(program: Program, env: dict[str, Any], *, training: bool) -> list[Any]:
    """Run a program; ``env`` holds inputs, weights and, for nested programs, all outer values."""
    for name, tensor in program.constants.items():
        env.setdefault(name, tensor)
    for name, holder in program.aliases.items():
        env[name] = env[holder]
    for step in program.steps:
        try:
            results = TORCH_OPS[step.op](Call(step, env, training))
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ConstraintError(
                f"{step.op} failed in torch",
                node=step.name,
                found=str(error).splitlines()[0][:300] if str(error) else error,
            ) from error
        if not isinstance(results, (tuple, list)):
            results = (results,)
        for name, value in zip(step.outputs, results, strict=False):
            if name:
                env[name] = value
        for name in step.release:
            env.pop(name, None)
    outputs = []
    for name, dtype in zip(program.outputs, program.dtypes, strict=True):
        value = env[name]
        fits = dtype is None or not isinstance(value, Tensor) or value.dtype == dtype
        outputs.append(value if fits else value.to(dtype))
    return outputs
