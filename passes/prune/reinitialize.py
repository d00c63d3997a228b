"""Reinitialize: the same architecture from fresh weights, the baseline that every pruning result has to beat."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, SkipValidation

from ...graph.errors import ConstraintError
from ...graph.execute import LARGE, to_numpy
from ...graph.ir import Graph, Node, Weight
from ..base import Context, Contract, Decision, Needs, Outcome, Pass
from ..finetune import resolve

if TYPE_CHECKING:
    import torch

    from ..result import Result

NORMS = ("batch_norm", "group_norm", "layer_norm", "rms_norm", "instance_norm")
RECURRENT = ("lstm", "gru", "rnn")


class Reinitialize(Pass):
    """Give every learned weight a fresh start; shapes and graph stay as they are.

    "Rethinking the Value of Network Pruning": if the pruned architecture trained from scratch does as well as the
    pruned weights fine-tuned, the criterion has chosen an architecture, not weights. Where the weight belongs to a
    module with ``reset_parameters``, that is called (torch models that kept their classes). Every other weight gets
    the rule of its role: normal with variance 2 / fan-in for what convolutions and products read, uniform within
    1 / sqrt(hidden) for recurrent layers, 1 for gains and variances, 0 for biases and means, the tensor's own
    deviation round 0 for tables, its own mean for other per-channel factors. The report says which. Same seed, same
    bytes.

    Raises:
        ConstraintError: an ignore pattern matches nothing, nothing could be reinitialized, or an initialisation
            changed a shape or left NaN.
    """

    name: ClassVar[str] = "reinitialize"
    contract: ClassVar[Contract] = Contract.FRESH
    needs: ClassVar[Needs] = Needs.NOTHING
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    by: Literal["modules", "roles"] = "modules"
    """"modules": ``reset_parameters`` where a module has it, roles elsewhere; "roles": roles everywhere."""
    init: Annotated[Callable[[Any], Any], SkipValidation] | str | None = None
    """The model's own initialisation instead, a function of one nn.Module (in files `module:function`)."""
    seed: int | None = Field(None, ge=0)
    """Seed of the fresh weights; the run's, if None."""
    ignore: list[str] = Field(default_factory=list)
    """Patterns (fnmatch) of weight names that keep their values."""

    def prepare(self, ctx: Context) -> None:
        """The initialisation can be found."""
        if isinstance(self.init, str):
            resolve(self.init)

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        seed = ctx.seed if self.seed is None else self.seed
        self._check_patterns(graph)
        by_module = self._from_modules(graph, seed)
        decisions = []
        for weight in list(graph.weights.values()):
            if any(fnmatchcase(n, p) for n in (weight.name, *weight.aliases) for p in self.ignore):
                decisions.append(Decision(weight.name, "kept", "ignored"))
                continue
            found = next((by_module[n] for n in (weight.name, *weight.aliases) if n in by_module), None)
            new, rule = found if found is not None else by_role(weight, seed)
            if new is None:
                if weight.dtype.startswith(("float", "bfloat")):
                    decisions.append(Decision(weight.name, "kept", rule))
                continue
            self._check(weight, new)
            graph.set_weight(weight, np.ascontiguousarray(new))
            decisions.append(Decision(weight.name, "reinitialized", rule))
        rules: dict[str, int] = {}
        for d in decisions:
            if d.action == "reinitialized":
                rules[d.reason] = rules.get(d.reason, 0) + 1
        if not rules:
            raise ConstraintError("nothing was reinitialized", found="no learned weight", hint="shorten ignore")
        return Outcome(decisions=decisions, details={"seed": seed, "rules": rules})

    def _check_patterns(self, graph: Graph) -> None:
        names = {n for w in graph.weights.values() for n in (w.name, *w.aliases)}
        for pattern in self.ignore:
            if not any(fnmatchcase(n, pattern) for n in names):
                raise ConstraintError(
                    "an ignore pattern matches nothing",
                    node="ignore",
                    value=pattern,
                    expected="a weight name (wildcards allowed)",
                    hint="`foldline inspect MODEL` lists the names",
                )

    @staticmethod
    def _check(weight: Weight, new: np.ndarray) -> None:
        if new.shape != weight.shape or not np.isfinite(new.astype(np.float32)).all():
            raise ConstraintError(
                "the initialisation does not fit the weight",
                node=weight.name,
                expected=f"finite, of shape {weight.shape}",
                found=new.shape,
                hint="by='roles' does without the modules' own initialisation",
            )

    def _from_modules(self, graph: Graph, seed: int) -> dict[str, tuple[np.ndarray, str]]:
        """Name -> (fresh data, rule), for what modules or the user's function initialise."""
        if graph.kind != "fx" or (self.by == "roles" and self.init is None):
            if self.init is None:
                return {}
        import torch

        module = module_of(graph)
        init = resolve(self.init) if isinstance(self.init, str) else self.init
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if init is not None:
                init(module)
                rule = f"by {getattr(init, '__name__', 'the function given')}"
                return {n: (to_numpy(t).copy(), rule) for n, t in _state(module, graph).items()}
            return _reset(module)


def _reset(module: torch.nn.Module) -> dict[str, tuple[np.ndarray, str]]:
    """Call every reset_parameters; what the modules hold afterwards, by name."""
    rules: dict[str, str] = {}
    for path, m in module.named_modules():
        reset = getattr(m, "reset_parameters", None) or getattr(m, "_reset_parameters", None)
        if not callable(reset):
            continue
        try:
            reset()
        except Exception as error:  # user code: a class of its own may not know its new sizes
            raise ConstraintError(
                f"reset_parameters failed: {error}", node=path, value=type(m).__name__, hint="use by='roles' or init"
            ) from error
        own = [*m._parameters, *m._buffers]
        rules.update({f"{path}.{n}" if path else n: f"reset_parameters of {type(m).__name__}" for n in own})
    state = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    return {n: (to_numpy(t).copy(), rules[n]) for n, t in state.items() if n in rules and t.is_floating_point()}


def module_of(graph: Graph) -> torch.nn.Module:
    """A trainable nn.Module of the graph that shares nothing with it.

    Raises:
        UnsupportedOp: an ONNX operator has no torch implementation.
    """
    if graph.kind == "fx":
        found: torch.nn.Module = copy.deepcopy(graph.to_model())
        return found
    from ...graph.onnx import ONNXGraph
    from ...graph.onnx.as_torch import to_torch

    if not isinstance(graph, ONNXGraph):
        raise ConstraintError("only torch and ONNX graphs can be trained", node=graph.name, found=type(graph).__name__)
    return to_torch(graph)


def _state(module: Any, graph: Graph) -> dict[str, torch.Tensor]:
    """The module's learned tensors under the graph's names."""
    if graph.kind == "fx":
        return {n: t for n, t in module.named_parameters(remove_duplicate=False)} | dict(module.named_buffers())
    return {name: getattr(module, slot) for slot, name in module.weight_names.items()}


# ---- the rules -----------------------------------------------------------------------------------------------------
def by_role(weight: Weight, seed: int) -> tuple[np.ndarray | None, str]:
    """Fresh data for a weight by what the graph does with it, in its dtype, and the rule; None and why it stays."""
    uses = weight.value.uses if weight.value is not None else []
    places = [(n, i) for n, i in uses if n.op != "shape_of"]
    if not weight.dtype.startswith(("float", "bfloat")) or not places:
        return None, "not a learned tensor of the graph"
    node, position = places[0]
    old = weight.numpy()
    rng = np.random.default_rng([seed, zlib.crc32(weight.name.encode())])
    if node.op in NORMS:
        value = {1: 1.0, 2: 0.0, 3: 0.0, 4: 1.0}.get(position)
        if value is not None:
            return np.full(weight.shape, value, old.dtype), f"{value:g}, as {node.op} starts"
    if weight.kind != "parameter":
        return None, f"a {weight.kind}"
    values = old.astype(np.float64)
    if not np.isfinite(values).all() or (weight.size and np.abs(values).max() > LARGE):
        return None, "not learned: its values are a mask's"
    fan_in = _fan_in(node, position, weight.shape)
    if fan_in is not None:
        deviation = math.sqrt(2 / max(fan_in, 1))
        return (rng.standard_normal(weight.shape) * deviation).astype(old.dtype), "normal, variance 2 / fan-in"
    if node.op in RECURRENT and position >= 3:
        bound = 1 / math.sqrt(max(int(node.attrs.get("hidden") or 1), 1))
        return rng.uniform(-bound, bound, weight.shape).astype(old.dtype), "uniform within 1 / sqrt(hidden)"
    wide = sum(n > 1 for n in weight.shape)
    if (node.op in ("conv", "linear") and position == 2) or (node.op in ("add", "sub") and wide <= 1):
        return np.zeros(weight.shape, old.dtype), "0, as biases start"
    if node.op in ("mul", "div"):
        if wide > 1:
            return None, "a table that multiplies: position rotations and masks are not learned"
        return np.full(weight.shape, values.mean(), old.dtype), "its own mean, as per-channel factors start"
    deviation = float(values.std()) or 0.02
    return (rng.standard_normal(weight.shape) * deviation).astype(old.dtype), "normal of its own deviation"


def _fan_in(node: Node, position: int, shape: Sequence[int]) -> int | None:
    """Inputs that each output of a linear operator sums; None where it is no linear operator's weight."""
    if node.op == "conv" and position == 1:
        taps = math.prod(shape[2:])
        if node.attrs.get("transposed"):
            stride = math.prod(node.attrs.get("stride") or [1])
            return max(shape[0] // int(node.attrs.get("groups", 1)) * taps // stride, 1)
        return shape[1] * taps
    if node.op == "linear" and position == 1:
        return shape[0] if node.attrs.get("transposed_weight") else shape[1]
    if node.op == "matmul" and len(shape) > 1:
        return shape[-1] if position == 0 else shape[-2]
    return None


# ---- what the baseline is for --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ScratchRow:
    """One start: its score before and after training."""

    start: str
    before: float
    after: float


@dataclass(frozen=True)
class ScratchComparison:
    """Inherited weights against the same architecture from scratch, printed as a table."""

    rows: tuple[ScratchRow, ...]

    def __getitem__(self, start: str) -> ScratchRow:
        return next(row for row in self.rows if row.start == start)

    def __str__(self) -> str:
        lines = ["start        before training   after training"]
        lines += [f"{r.start:<12} {r.before:15.4f}  {r.after:15.4f}" for r in self.rows]
        return "\n".join(lines)


def compare_with_scratch(
    result: Result,
    train: Callable[[Any], Any],
    evaluate: Callable[[Any], float],
    *,
    train_scratch: Callable[[Any], Any] | None = None,
    reinitialize: Reinitialize | None = None,
    seed: int = 0,
) -> ScratchComparison:
    """Does the criterion earn its keep: the pruned weights trained, against fresh weights in the same architecture.

    Args:
        result: of a pruning run, torch or ONNX; it is left as it is.
        train: the training loop, a function of one nn.Module.
        evaluate: a score of one nn.Module (its mode is the function's business).
        train_scratch: the loop for the fresh weights, where they get a longer budget ("Scratch-B" of "Rethinking the
            Value of Network Pruning": as much compute as the pruned one had in all); ``train``, if None.
        seed: torch's seed before each loop, so that both see the data in one order; seed of the fresh weights.
    """
    import torch

    fresh = result.graph.clone()
    (reinitialize or Reinitialize()).apply(fresh, Context(seed=seed, verify=False))
    rows = []
    starts = (("inherited", result.graph.clone(), train), ("scratch", fresh, train_scratch or train))
    for start, graph, loop in starts:
        module = module_of(graph)
        before = float(evaluate(module))
        torch.manual_seed(seed)
        loop(module)
        rows.append(ScratchRow(start, before, float(evaluate(module))))
    return ScratchComparison(tuple(rows))
