"""Freezing of weights during quantization-aware training, against oscillation between two neighbouring integers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ....graph.errors import ConfigError, ConstraintError

if TYPE_CHECKING:
    import torch


@dataclass(eq=False)
class TrainedWeight:
    """A parameter that a fake-quantize node reads: where its elements lie between the integers.

    Attributes:
        name: of the parameter.
        parameter: the trained tensor.
        scale: nodes that compute the scale, evaluated anew each time (a parameter, or a statistic of the weight).
        axis: of the scale.
        low, high: integers used.
    """

    name: str
    parameter: torch.nn.Parameter
    module: Any
    scale: Any
    axis: int | None
    low: int
    high: int

    def spread_scale(self) -> torch.Tensor:
        """The scale in use now, broadcast against the parameter."""
        from ....graph.fx.custom import _spread
        from ....graph.fx.fake_quantize import used_scale

        scale = used_scale(_evaluate(self.module, self.scale))
        return _spread(scale, self.parameter, self.axis, 0).to(self.parameter.dtype)

    def steps(self) -> torch.Tensor:
        """parameter / scale."""
        return self.parameter.detach() / self.spread_scale()


def _evaluate(module: Any, node: Any) -> torch.Tensor:
    """The value of a node that depends on parameters only."""
    import torch
    from torch import fx

    known: dict[Any, Any] = {}

    def value(n: fx.Node) -> Any:
        if n not in known:
            if n.op == "get_attr":
                found: Any = module
                for part in str(n.target).split("."):
                    found = getattr(found, part)
                known[n] = found.detach() if isinstance(found, torch.Tensor) else found
            elif n.op == "call_function":
                args = fx.map_arg(n.args, value)
                known[n] = n.target(*args, **fx.map_arg(n.kwargs, value))  # type: ignore[operator]
            else:
                raise ConstraintError(
                    "the scale of a weight depends on the model's input", node=n.name,
                    expected="a parameter, or a statistic of the weight", found=n.op,
                )  # fmt: skip
        return known[n]

    with torch.no_grad():
        return value(node)


def trained_weights(module: Any) -> Iterator[TrainedWeight]:
    """The weights of a module that ``P.qat`` made, in the order of its graph; a tied weight once.

    Raises:
        ConstraintError: the module holds no fake-quantized weight.
    """
    import torch

    from ....graph.fx.fake_quantize import fake_quantize

    graph = getattr(module, "graph", None)
    seen: set[int] = set()
    for node in graph.nodes if graph is not None else ():
        if node.op != "call_function" or node.target is not fake_quantize or node.args[0].op != "get_attr":
            continue
        path = str(node.args[0].target)
        owner, _, leaf = path.rpartition(".")
        parameter = getattr(module.get_submodule(owner), leaf)
        if not isinstance(parameter, torch.nn.Parameter) or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        axis, low, high = (list(node.args[3:6]) + [None, -128, 127][len(node.args) - 3 :])[:3]
        yield TrainedWeight(path, parameter, module, node.args[1], axis, low, high)
    if not seen:
        raise ConstraintError(
            "this module has no fake-quantized weight", expected="the model of P.qat(...)", found=type(module).__name__
        )


class WeightFreezing:
    """Call :meth:`step` after each step of the optimizer: weights that may freeze are set back to where they froze.

    Two criteria. ``"frequency"`` freezes a weight whose integer keeps changing to and fro: the moving average of its
    reversals exceeds ``threshold``; it freezes at the integer it was at most of the time ("Overcoming Oscillations in
    Quantization-Aware Training"). ``"confidence"`` freezes weights that lie at least ``margin`` of a step away from the
    nearest tie between two integers, so that the others come to rest among fixed neighbours ("Oscillation-free
    Quantization for Low-bit Vision Transformers"). What is frozen is the position between the integers: where the scale
    still trains, the weight moves with it and its integer stays.

    Args:
        module: the trained model of ``P.qat``.
        by: the criterion.
        threshold: reversals per step, for frequency.
        momentum: of the moving averages, for frequency.
        margin: in steps, 0 to 0.5, for confidence.
        start: step at which freezing begins (statistics are kept from the first one).

    Attributes:
        flips: how many integers changed in each step so far.
        frozen: weight name -> mask of frozen elements.

    Raises:
        ConfigError: a number is out of its range. ConstraintError: nothing in the module is fake-quantized.
    """

    def __init__(
        self,
        module: Any,
        *,
        by: Literal["frequency", "confidence"] = "frequency",
        threshold: float = 0.02,
        momentum: float = 0.01,
        margin: float = 0.4,
        start: int = 0,
    ) -> None:
        import torch

        if by not in ("frequency", "confidence"):
            raise ConfigError("unknown criterion", node="by", expected="frequency or confidence", found=by)
        for name, found, high in (("threshold", threshold, 1), ("momentum", momentum, 1), ("margin", margin, 0.5)):
            if not 0 < found <= high:
                raise ConfigError("out of range", node=name, expected=f"above 0, at most {high}", found=found)
        self.by, self.threshold, self.momentum, self.margin, self.start = by, threshold, momentum, margin, start
        self.weights = list(trained_weights(module))
        self.count = 0
        self.flips: list[int] = []
        self._integers = [self._rounded(w) for w in self.weights]
        self._direction = [torch.zeros_like(w.parameter, dtype=torch.int8) for w in self.weights]
        self._reversals = [torch.zeros_like(w.parameter) for w in self.weights]
        self._mean = [q.clone() for q in self._integers]
        self._masks = [torch.zeros_like(w.parameter, dtype=torch.bool) for w in self.weights]
        self._held = [torch.zeros_like(w.parameter) for w in self.weights]

    @staticmethod
    def _rounded(w: TrainedWeight) -> torch.Tensor:
        return w.steps().round().clamp_(w.low, w.high)

    @property
    def frozen(self) -> dict[str, torch.Tensor]:
        return {w.name: mask for w, mask in zip(self.weights, self._masks, strict=True)}

    @property
    def share(self) -> float:
        """Share of all weights that are frozen, 0..1."""
        total = sum(m.numel() for m in self._masks)
        return sum(int(m.sum()) for m in self._masks) / total

    def step(self) -> None:
        """Hold the frozen weights, follow the others, freeze those that now qualify."""
        import torch

        flips = 0
        with torch.no_grad():
            for i, w in enumerate(self.weights):
                scale = w.spread_scale()
                mask = self._masks[i]
                if bool(mask.any()):
                    w.parameter.copy_(torch.where(mask, self._held[i] * scale, w.parameter))
                steps = w.parameter / scale
                integers = steps.round().clamp_(w.low, w.high)
                flips += int((integers != self._integers[i]).sum())
                self._follow(i, integers)
                if self.count >= self.start:
                    self._freeze(i, steps, integers, scale)
                self._integers[i] = integers
        self.flips.append(flips)
        self.count += 1

    def _follow(self, i: int, integers: torch.Tensor) -> None:
        change = (integers - self._integers[i]).sign().to(self._direction[i].dtype)
        moved = change != 0
        reversed_ = moved & (change == -self._direction[i])
        self._reversals[i].mul_(1 - self.momentum).add_(reversed_.to(integers.dtype), alpha=self.momentum)
        self._direction[i] = change.where(moved, self._direction[i])
        self._mean[i].mul_(1 - self.momentum).add_(integers, alpha=self.momentum)

    def _freeze(self, i: int, steps: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor) -> None:
        import torch

        w, mask = self.weights[i], self._masks[i]
        if self.by == "frequency":
            new = (self._reversals[i] > self.threshold) & ~mask
            held = self._mean[i].round().clamp(w.low, w.high)
        else:
            to_tie = 0.5 - (steps - steps.round()).abs()
            beyond = (steps < w.low - 0.5) | (steps > w.high + 0.5)  # no tie is near where the range ends
            new = ((to_tie >= self.margin) | beyond) & ~mask
            held = steps
        if not bool(new.any()):
            return
        self._held[i] = torch.where(new, held, self._held[i])
        self._masks[i] = mask | new
        w.parameter.copy_(torch.where(new, held * scale, w.parameter))
        integers.copy_(torch.where(new, held.round().clamp(w.low, w.high), integers))
