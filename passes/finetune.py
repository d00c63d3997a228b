"""FineTune: hand the model to the user's own training loop and take the trained weights back."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..graph.errors import ConfigError, ConstraintError
from ..graph.execute import to_numpy
from ..graph.ir import Graph
from .base import Context, Contract, Decision, Needs, Outcome, Pass

if TYPE_CHECKING:
    from ..graph.onnx import ONNXGraph


class FineTune(Pass):
    """Train between other passes: ``train(module)`` gets the current model as nn.Module and changes its weights.

    The module is a copy: neither the caller's model nor the graph before this pass sees the training. The structure
    must stay; only parameters and buffers are taken back. An ONNX graph is turned into a module and back.
    """

    name: ClassVar[str] = "finetune"
    contract: ClassVar[Contract] = Contract.FRESH
    needs: ClassVar[Needs] = Needs.TRAINING
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    train: Callable[[Any], Any] | str
    """The training loop, a function of one nn.Module; in files `module:function`."""

    def __init__(self, train: Callable[[Any], Any] | str | None = None, **options: Any) -> None:
        super().__init__(**(options if train is None else {"train": train, **options}))

    def function(self) -> Callable[[Any], Any]:
        """The training loop itself.

        Raises:
            ConfigError: the text names no importable function.
        """
        return resolve(self.train) if isinstance(self.train, str) else self.train

    def prepare(self, ctx: Context) -> None:
        """The training loop can be found."""
        self.function()

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        """Train and write back.

        Raises:
            ConstraintError: training changed the shape of a weight, or left NaN or infinity in one.
        """
        import torch

        train = self.function()
        torch.manual_seed(ctx.seed)
        if graph.kind == "fx":
            module = copy.deepcopy(graph.to_model())
        else:
            from ..graph.onnx.as_torch import to_torch

            module = to_torch(_onnx(graph))
        modes = {name: m.training for name, m in module.named_modules()}
        train(module)
        for name, m in module.named_modules():
            m.training = modes.get(name, m.training)
        changed = _take_back(graph, module)
        decisions = [
            Decision(name, "trained", f"moved by {delta:.3g} of its norm", {"relative_change": delta})
            for name, delta in changed.items()
        ]
        return Outcome(decisions=decisions, details={"weights_changed": len(changed)})


def resolve(text: str) -> Callable[[Any], Any]:
    """The function that ``module:function`` names.

    Raises:
        ConfigError: there is no such module or function.
    """
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise ConfigError("not a function's name", node="train", value=text, expected="module:function", found=text)
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as exc:
        hint = "the folder of the module must be on PYTHONPATH"
        raise ConfigError(f"the function cannot be found: {exc}", node="train", value=text, hint=hint) from exc
    if not callable(found):
        raise ConfigError("this is not a function", node="train", value=text, found=type(found).__name__)
    return found


def _onnx(graph: Graph) -> ONNXGraph:
    from ..graph.onnx import ONNXGraph

    if not isinstance(graph, ONNXGraph):
        raise ConstraintError("only torch and ONNX graphs can be trained", node=graph.name, found=type(graph).__name__)
    return graph


def _take_back(graph: Graph, module: Any) -> dict[str, float]:
    """Set every weight of the graph to what it is in the module; returns how far each one that changed has moved."""
    before = {name: w.numpy().copy() for name, w in graph.weights.items() if _is_float(w.dtype)}
    if graph.kind == "fx":
        _write_back(graph, module)
    else:
        from ..graph.onnx.as_torch import write_back

        write_back(module, _onnx(graph))
    changed = {}
    for name, old in before.items():
        new = graph.weights[name].numpy()
        if not np.isfinite(new.astype(np.float32)).all() and np.isfinite(old.astype(np.float32)).all():
            raise ConstraintError(
                "training left NaN or infinity in a weight", node=name, hint="lower the learning rate, clip gradients"
            )
        a, b = old.astype(np.float64), new.astype(np.float64)
        if not np.array_equal(a, b):
            changed[name] = float(np.linalg.norm(b - a) / (np.linalg.norm(a) or 1.0))
    return changed


def _write_back(graph: Graph, module: Any) -> None:
    state = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    for weight in list(graph.weights.values()):
        name = next((n for n in (weight.name, *weight.aliases) if n in state), None)
        if name is None:
            if weight.kind == "constant":
                continue
            raise ConstraintError("training removed a weight of the module", node=weight.name, found="missing")
        tensor = state[name]
        if tuple(tensor.shape) != tuple(weight.shape):
            raise ConstraintError(
                "training changed the shape of a weight",
                node=weight.name,
                expected=tuple(weight.shape),
                found=tuple(tensor.shape),
                hint="change structure with passes, train only weights",
            )
        new = to_numpy(tensor)
        if not np.array_equal(new, weight.numpy()):
            graph.set_weight(weight, new.copy())


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat"))
