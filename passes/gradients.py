"""Gradients of a graph on either front end: the same call runs torch ATen graphs and ONNX graphs under autograd."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..graph.errors import ConfigError, ConstraintError, FoldlineError
from ..graph.execute import batches_of
from ..graph.ir import Graph
from .base import Progress, no_progress

if TYPE_CHECKING:
    from ..graph.fx.view import FXView
    from ..graph.onnx import ONNXGraph

Loss: TypeAlias = str | Callable[[Any, Any], Any]
"""``"cross_entropy"``, ``"mse"``, or a function (output, target) -> scalar tensor, a mean over its samples."""
LOSSES = ("cross_entropy", "mse")
IGNORED = -100
"""Target index that no loss is taken at, as in torch."""


F = TypeVar("F", bound=Callable[..., Any])


def recorded(function: F) -> F:
    """Autograd records inside the function, a generator too, whatever mode the caller is in (no_grad, inference)."""
    return torch.inference_mode(False)(torch.enable_grad()(function))


class Differentiable:
    """A graph as a function of some of its weights, in eval semantics (dropout off, batch norms on their statistics).

    Only the weights named require gradients: for all others autograd keeps no buffer. The graph is not changed.

    Attributes:
        leaves: weight name -> tensor to differentiate by; it has the weight's shape and dtype.

    Raises:
        ConstraintError: a weight is not floating, or the graph is of a kind that torch cannot run.
        UnsupportedOp: an ONNX operator without a torch implementation.
    """

    def __init__(self, graph: Graph, weights: Iterable[str], taps: Sequence[str] = ()) -> None:
        """``taps``: names of values (inputs or outputs of nodes) whose tensors are wanted as well."""
        self.graph = graph
        self.taps = list(dict.fromkeys(taps))
        self.leaves: dict[str, Tensor] = {}
        names = list(dict.fromkeys(weights))
        for name in names:
            if not graph.weight(name).dtype.startswith(("float", "bfloat")):
                raise ConstraintError("only floating weights have gradients", node=name, found=graph.weight(name).dtype)
        if graph.kind == "fx":
            self._run = self._prepare_fx(names)
        elif graph.kind == "onnx":
            self._run = self._prepare_onnx(names)
        else:
            raise ConstraintError("only torch and ONNX graphs have gradients", node=graph.name, found=graph.kind)

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Outputs in graph order and tapped tensors by value name, all connected to the leaves."""
        return self._run(inputs)

    def _prepare_fx(self, names: list[str]) -> Callable[[Mapping[str, np.ndarray]], Any]:
        from ..graph.fx.run import interpret

        graph: FXView = self.graph  # type: ignore[assignment]
        stored = {name: t.detach() for name, t in graph.tensors.items()}
        for name in names:
            stored[name] = self.leaves[name] = graph.tensors[name].detach().clone().requires_grad_()

        def run(inputs: Mapping[str, np.ndarray]) -> tuple[list[Tensor], dict[str, Tensor]]:
            return interpret(graph, dict(inputs), self.taps, grad=True, tensors=stored)

        return run

    def _prepare_onnx(self, names: list[str]) -> Callable[[Mapping[str, np.ndarray]], Any]:
        from ..graph.onnx.as_torch import to_torch

        graph: ONNXGraph = self.graph.clone()  # type: ignore[assignment]  # to_torch may untie statistics
        module = to_torch(graph).requires_grad_(False)
        slots = {weight: slot for slot, weight in module.weight_names.items()}
        for name in names:
            self.leaves[name] = getattr(module, slots[name]).detach().clone().requires_grad_()
        given = {slots[name]: leaf for name, leaf in self.leaves.items()}
        count = len(module.program.outputs)
        computed = [t for t in self.taps if not self.graph.values[t].is_input]
        module.program.outputs += computed
        module.program.dtypes += [None] * len(computed)
        module.program.plan_releases()

        def run(inputs: Mapping[str, np.ndarray]) -> tuple[list[Tensor], dict[str, Tensor]]:
            arrays = {name: torch.from_numpy(np.array(a)) for name, a in inputs.items()}
            with torch.enable_grad():
                found = torch.func.functional_call(module, given, (arrays,))
            found = (found,) if isinstance(found, Tensor) else found
            tapped = dict(zip(computed, found[count:], strict=True))
            return list(found[:count]), {t: arrays[t] if t in arrays else tapped[t] for t in self.taps}

        return run


@dataclass
class Example:
    """One batch: bound inputs by name, and its target (None: to be drawn from the model's own distribution)."""

    inputs: dict[str, np.ndarray]
    target: Any = None


def examples(
    graph: Graph, data: Iterable[Any] | None, batches: Iterable[Any] | None, progress: Progress = no_progress
) -> Iterator[Example]:
    """Batches as examples: pairs (model inputs, target) of ``data``, else the ``batches`` without targets.

    Raises:
        ConfigError: there is neither, or an item of ``data`` is not a pair.
    """
    if data is not None:
        for pair in progress(data, "gradients"):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ConfigError(
                    "an item of data is not a pair", node="data", expected="(model inputs, target)",
                    found=type(pair).__name__,
                )  # fmt: skip
            yield Example(next(iter(batches_of(graph, [pair[0]]))), pair[1])
    elif batches is not None:
        for inputs in batches_of(graph, progress(batches, "gradients")):
            yield Example(inputs)
    else:
        raise ConfigError(
            "gradients need data",
            node="data",
            expected="pairs (batch of model inputs, target)",
            found=None,
            hint="pass data=[(inputs, target), ...], or calibration=batches to draw targets from the model itself",
        )


def losses_of(output: Tensor, example: Example, loss: Loss, seed: int) -> Tensor:
    """The loss of every sample, [N], with a drawn target where the example has none.

    ``cross_entropy``: classes on the last axis of [N, T, V], on axis 1 of [N, C] and [N, C, H, W] (on the other one
    where only that fits the target); a sample's loss is the mean over its positions, those with target -100 left out.
    Targets stand for the outputs at the same place: for a causal language model the caller shifts them. ``mse``: mean
    over all elements of a sample. A function is called with one sample at a time, [1, ...] each.

    Raises:
        ConstraintError: target and output do not fit, or the loss is not finite.
        ConfigError: the loss is unknown, or a function has no target to work with.
    """
    if callable(loss):
        if example.target is None:
            raise ConfigError(
                "a loss function of your own needs targets", node="data", expected="pairs (model inputs, target)",
                found=None, hint="pass data=, or loss='cross_entropy' to draw targets from the model itself",
            )  # fmt: skip
        return _own(output, example.target, loss)
    if loss not in LOSSES:
        raise ConfigError("unknown loss", node="loss", value=loss, expected=", ".join(LOSSES) + " or a function")
    target = example.target if example.target is not None else drawn_target(output, example.inputs, loss, seed)
    target = torch.as_tensor(np.asarray(target) if not isinstance(target, Tensor) else target).to(output.device)
    found = _mse(output, target) if loss == "mse" else _cross_entropy(output, target)
    if not bool(torch.isfinite(found).all()):
        raise ConstraintError("the loss is not finite", node="loss", found=float(found.detach().sum()))
    return found


def _own(output: Tensor, target: Any, loss: Callable[[Any, Any], Any]) -> Tensor:
    found = [loss(output[n : n + 1], _row(target, n, output.device)) for n in range(output.shape[0])]
    for value in found:
        if not isinstance(value, Tensor) or value.numel() != 1 or not bool(torch.isfinite(value.detach()).all()):
            raise ConstraintError(
                "the loss function must return one finite number", node="loss", expected="a scalar tensor",
                found=tuple(value.shape) if isinstance(value, Tensor) and value.numel() != 1 else value,
            )  # fmt: skip
    return torch.stack([value.reshape(()) for value in found])


def _row(target: Any, n: int, device: torch.device) -> Any:
    """Sample n of a target, which may be nested in dicts, lists and tuples, with its batch axis."""
    if isinstance(target, (Tensor, np.ndarray)):
        return torch.as_tensor(target)[n : n + 1].to(device)
    if isinstance(target, Mapping):
        return {k: _row(v, n, device) for k, v in target.items()}
    if isinstance(target, (list, tuple)):
        return type(target)(_row(v, n, device) for v in target)
    return target


def _mse(output: Tensor, target: Tensor) -> Tensor:
    if target.shape != output.shape:
        raise _misfit(output, target, "the output's shape")
    return (_wide(output) - target.to(_wide(output).dtype)).square().flatten(1).mean(1)


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    if output.dim() < 2:
        raise _misfit(output, target, "an output [N, classes]")
    if target.is_floating_point():
        if target.shape != output.shape:
            raise _misfit(output, target, "class indices, or probabilities in the output's shape")
        axis = _class_axis(output)
        logp = _wide(output).log_softmax(axis)
        return -(target * logp).sum(axis).reshape(len(output), -1).mean(1)
    fitting = [a for a in (_class_axis(output), 1, output.dim() - 1) if _without(output, a) == tuple(target.shape)]
    if not fitting:
        raise _misfit(output, target, f"class indices {_without(output, _class_axis(output))}")
    logp = _wide(output).movedim(fitting[0], -1).log_softmax(-1)
    valid = target != IGNORED
    outside = target[valid & ((target < 0) | (target >= logp.shape[-1]))]
    if len(outside):
        raise ConstraintError(
            "a target names a class that the model's first output lacks", node="data",
            expected=f"classes 0 to {logp.shape[-1] - 1}, or {IGNORED} where no loss is taken", found=int(outside[0]),
            hint="number the classes from 0, as the model's outputs are",
        )  # fmt: skip
    found = -logp.gather(-1, target.long().clamp(min=0).unsqueeze(-1)).squeeze(-1) * valid
    return found.reshape(len(output), -1).sum(1) / valid.reshape(len(output), -1).sum(1).clamp(min=1)


def _wide(output: Tensor) -> Tensor:
    """Half precisions in float32: a loss summed in them would lose what is asked for."""
    return output if output.dtype == torch.float64 else output.float()


def _class_axis(output: Tensor) -> int:
    """Language models put the classes last, all others on axis 1."""
    return 2 if output.dim() == 3 else 1


def _without(output: Tensor, axis: int) -> tuple[int, ...]:
    return tuple(s for i, s in enumerate(output.shape) if i != axis)


def _misfit(output: Tensor, target: Tensor, expected: str) -> FoldlineError:
    return ConstraintError(
        "the target does not fit the model's first output", node="data", expected=f"{expected} for an output "
        f"{tuple(output.shape)}", found=f"{tuple(target.shape)} of {target.dtype}",
        hint="give loss= a function (output, target) -> scalar for anything else",
    )  # fmt: skip


def drawn_target(output: Tensor, inputs: Mapping[str, np.ndarray], loss: str, seed: int) -> Tensor:
    """A target drawn from the distribution whose negative log likelihood the loss is, at the model's own output.

    Squared gradients then average to the Fisher information ("New Insights and Perspectives on the Natural Gradient
    Method"). Each sample's draw is seeded by its inputs: it does not depend on the order or split of the batches.
    """
    found = output.detach().to("cpu", torch.float64).numpy()
    drawn: list[np.ndarray] = []
    for n in range(len(found)):
        code = 0
        for name in sorted(inputs):
            array = np.asarray(inputs[name])
            if array.ndim and len(array) == len(found):
                code = zlib.crc32(np.ascontiguousarray(array[n]).tobytes(), code)
        rng = np.random.default_rng([seed, code])
        if loss == "mse":
            drawn.append(found[n] + np.sqrt(found[n].size / 2) * rng.standard_normal(found[n].shape))
        else:
            drawn.append((found[n] + rng.gumbel(size=found[n].shape)).argmax(_class_axis(output) - 1))
    return torch.from_numpy(np.stack(drawn))


@recorded
def mean_gradients(
    graph: Graph,
    weights: Iterable[str],
    data: Iterable[Example],
    loss: Loss = "cross_entropy",
    seed: int = 0,
) -> tuple[dict[str, np.ndarray], int]:
    """d loss / d weight, float64, for the mean loss over all samples, and their number: independent of the batching.

    Raises:
        ConstraintError: there is no sample.
    """
    function = Differentiable(graph, weights)
    total = {n: torch.zeros_like(leaf, dtype=torch.float64) for n, leaf in function.leaves.items()}
    count = 0
    for example in data:
        outputs, _ = function(example.inputs)
        losses = losses_of(outputs[0], example, loss, seed)
        count += len(losses)
        for name, grad in gradients(losses.sum(), function.leaves).items():
            total[name] += grad
    if not count:
        raise no_samples()
    return {n: (t / count).cpu().numpy() for n, t in total.items()}, count


def gradients(of: Tensor, by: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Gradients by name; zeros where the scalar does not depend on a tensor. ``options``: of torch.autograd.grad."""
    names = [n for n, t in by.items() if t.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(names)
    if of.requires_grad and names:
        found = torch.autograd.grad(of, [by[n] for n in names], allow_unused=True, **options)
    known = dict(zip(names, found, strict=True))
    return {n: torch.zeros_like(t) if (g := known.get(n)) is None else g for n, t in by.items()}


def no_samples() -> ConstraintError:
    """The error for empty data."""
    return ConstraintError(
        "the data is empty", node="data", expected="at least one batch", found="none", hint="pass a list of batches"
    )
