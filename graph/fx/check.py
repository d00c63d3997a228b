"""A written-back module against its graph: both run on the example, constant weights and inputs made random."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .functional import has_effect
from .run import interpret
from .shorten import renamed
from .trace import user_line

if TYPE_CHECKING:
    from .view import FXView


class Check:
    """Compares a module with the graph on the example inputs."""

    def __init__(self, graph: FXView) -> None:
        self.graph = graph
        self.generator = torch.Generator().manual_seed(0)
        self.moved: dict[str, str] = {}
        self.error: Exception | None = None

    @cached_property
    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example call, constant inputs made random."""
        small = _small(self.graph, self.graph.source.args, self.graph.source.kwargs)
        call: Any = pytree.tree_map_only(torch.Tensor, lambda t: _lively(t, self.generator), small)
        return call  # type: ignore[no-any-return]

    @cached_property
    def random(self) -> dict[str, torch.Tensor]:
        """Weights to run with instead of those that hold one value only."""
        return _randomized(self.graph, self.generator)

    @cached_property
    def expected(self) -> list[torch.Tensor]:
        """What the graph gives for them."""
        return interpret(self.graph, self.graph.bind_tensors(self.call), (), False, self.random)[0]

    def __call__(self, module: nn.Module) -> str | None:
        """None if the module agrees with the graph, else why not (``self.error`` holds what it raised)."""
        self.error = None
        flags = [(m, m.training) for m in module.modules()]
        state: dict[str, torch.Tensor] = {}
        for name, tensor in self.random.items():
            for alias in self.graph.weights[name].aliases:
                state[renamed(alias, self.moved)] = tensor
        names = {n for n, _ in module.named_parameters(remove_duplicate=False)}
        names |= {n for n, _ in module.named_buffers(remove_duplicate=False)}
        state = {k: v for k, v in state.items() if k in names}
        if any(has_effect(n) for n in self.graph.fx.nodes):  # the forward writes buffers: let it write copies
            state = {n: b.clone() for n, b in module.named_buffers()} | state
        for m, _ in flags:
            m.training = False
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                args, kwargs = self.call
                result = torch.func.functional_call(module, state, args, kwargs) if state else module(*args, **kwargs)
        except Exception as error:
            line, self.error = user_line(error), error
            return f"its forward fails ({str(error).strip().splitlines()[0][:160]}) at {_short(line)}"
        finally:
            for m, flag in flags:
                m.training = flag
        got = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        want = [t for t in self.expected if isinstance(t, torch.Tensor)]
        if len(got) != len(want):
            return "it returns another number of outputs"
        for a, b in zip(got, want, strict=True):
            if a.shape != b.shape:
                return f"an output has shape {tuple(a.shape)} instead of {tuple(b.shape)}"
            if not a.is_meta and not _agree(a, b):
                return "its forward computes something else"
        return None


def _short(line: str) -> str:
    head, sep, rest = line.partition(":")
    return "/".join(head.replace("\\", "/").split("/")[-2:]) + sep + rest


def _agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    if not a.is_floating_point():
        return bool(torch.equal(a, b))
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(a.dtype, 3e-2)
    x, y = a.double(), b.double()
    finite = torch.isfinite(y)
    if not torch.equal(torch.isfinite(x), finite):
        return False
    scale = float(y[finite].abs().max()) if bool(finite.any()) else 0.0
    return bool(torch.allclose(x[finite], y[finite], rtol=tolerance, atol=tolerance * scale + 1e-12))


def _small(graph: FXView, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The example call with a dynamic batch narrowed to two."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    holders = [n for n in graph.fx.nodes if n.op == "placeholder"]
    for i, (node, leaf) in enumerate(zip(holders, leaves, strict=True)):
        val = node.meta.get("val")
        if isinstance(leaf, torch.Tensor) and leaf.ndim and isinstance(val, torch.Tensor):
            if isinstance(val.shape[0], torch.SymInt) and leaf.shape[0] > 2:
                leaves[i] = leaf[:2]
    return pytree.tree_unflatten(leaves, spec)


def _lively(t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random values in place of a constant float example (torch.zeros tells nothing apart)."""
    if t.is_meta or not t.is_floating_point() or t.numel() < 2 or bool((t != t.flatten()[0]).any()):
        return t
    return torch.randn(t.shape, generator=generator).to(t)


def _randomized(graph: FXView, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random stand-ins for weights that hold one value only (zero biases, unit scales)."""
    found: dict[str, torch.Tensor] = {}
    for name, t in graph.tensors.items():
        if graph.kinds[name] == "constant" or t.is_meta or not t.is_floating_point() or t.numel() < 2:
            continue
        first = t.flatten()[:16]
        if not bool((first != first[0]).any()) and not bool((t != first[0]).any()):
            new = (torch.rand(t.shape, generator=generator) * 0.5 + 0.5).to(t)
            found[name] = nn.Parameter(new, requires_grad=False) if isinstance(t, nn.Parameter) else new
    return found
