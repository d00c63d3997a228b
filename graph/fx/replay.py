"""Replay: does a module make exactly the calls that a recorded graph lists? Proved call by call, without computing."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .clean import clean, idle_copies
from .follow import META, SIZED, follows
from .functional import make_functional, packet
from .ops import known
from .record import MAKERS, NODE, PRE_DISPATCH_SET, Tape, meta_like, unmark
from .tensors import same_data, storage_key
from .walk import modules_of

if TYPE_CHECKING:
    from .view import FXView

_META_DEVICE = torch.device("meta")


def replays(graph: FXView, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> bool | None:
    """Whether a call of ``module`` on the example is, op by op, what a graph recorded from one call says.

    Then both compute the same function, whatever the data: same operators, same arguments, same weights, in the same
    order. The forward runs as it would for the user (outside any tracing, tensors on their own device), but every
    operator is answered by a tensor without contents. False proves nothing: the two may still agree. None: the forward
    raised, or reads what tensors hold (as the recorded module itself does, if it had to be told that it is traced).

    Args:
        graph: a recorded graph (``graph.mode`` is None), edited or not.
        module: the candidate, holding ``tensors``; left as it was.
        tensors: the stored tensor of each weight of the graph, by name.
    """
    if not graph.source.as_run:
        return None  # told that it was traced: its user's calls read data, or are others
    flags = [(m, True) for _, m in modules_of(module) if m.training]
    for m, _ in flags:
        m.training = False
    tape: _Replay | None = None
    try:
        if follows(graph, module, tensors):
            return True
        tape = _Replay(module, tensors)
        flat, _ = pytree.tree_flatten((graph.source.args, graph.source.kwargs))
        args, kwargs = pytree.tree_unflatten(tape.inputs(flat, [n.name for n in _inputs(graph.fx)]), graph.in_spec)
        result = tape.play(args, kwargs)
        leaves, out_spec = pytree.tree_flatten(result)
        tape.graph.output(tuple(tape.held(tape.meta(x)) if isinstance(x, torch.Tensor) else x for x in leaves))
    except Exception:  # user code; the check that computes reports what it raises
        return None
    finally:
        if tape is not None:
            unmark(tape.graph)
        for m, flag in flags:
            m.training = flag
    if out_spec != graph.out_spec or not make_functional(tape.graph):
        return False
    clean(tape.graph, known)
    return _Comparison(graph, tape).equal()


class _Replay(Tape):
    """A tape of a module as it is: weights keep their data, which nobody reads, and results are empty tensors."""

    compiling = False

    def __init__(self, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        self.names = {storage_key(t): n for n, t in tensors.items() if t.numel()}
        self.empty: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        super().__init__(module, {})

    def _stand_in(self, module: nn.Module) -> nn.Module:
        return module

    def _place(self, meta: dict[str, Any]) -> None:
        return

    def _given(self, leaf: torch.Tensor, node: fx.Node) -> torch.Tensor:
        return self._real(super()._given(leaf, node), leaf.device)

    def _real(self, meta: torch.Tensor, device: torch.device) -> torch.Tensor:
        """What user code sees of a meta tensor: one of the same shape on the device where it would lie."""
        if device.type == "meta":
            return meta
        made = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device=device)
        setattr(made, META, meta)
        return made

    def meta(self, t: torch.Tensor) -> torch.Tensor:
        """The meta tensor behind what user code holds."""
        found = getattr(t, META, None)
        if found is not None:
            return found  # type: ignore[no-any-return]
        known = self.weights.get(id(t))
        if known is not None:
            return known[2]
        if hasattr(t, NODE):
            return t
        wrapped = self.empty.get(t.untyped_storage()._cdata)
        if wrapped is not None and wrapped[0].shape == t.shape:
            return wrapped[1]
        name = self.names.get(storage_key(t)) if t.numel() else None
        if name is None and t.is_meta:
            return t
        known_as = (f"constant_{len(self.weights)}", "constant") if name is None else (name, "weight")
        stand_in = meta_like(t)
        self.keep += [t, stand_in]
        self.weights[id(stand_in)] = (*known_as, t)
        self.weights[id(t)] = (*known_as, stand_in)
        return stand_in

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(PRE_DISPATCH_SET), torch._C._DisablePythonDispatcher():
            return self._answer(func, args, kwargs)  # none of what is made meanwhile is the module's

    def _answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen: dict[int, torch.Tensor] = {}
        place: list[torch.device] = []

        def behind(item: Any) -> Any:
            if isinstance(item, torch.Tensor):
                meta = self.meta(item)
                seen[id(meta)] = item
                place.append(item.device)
                return meta
            if isinstance(item, torch.device):
                place.insert(0, item)
                return _META_DEVICE
            if isinstance(item, (list, tuple)) and any(isinstance(x, torch.Tensor) for x in item):
                return [behind(x) for x in item]
            return item

        out = super().call(func, tuple([behind(a) for a in args]), {k: behind(v) for k, v in kwargs.items()})
        device = place[0] if place else torch.get_default_device()
        if isinstance(out, torch.Tensor):
            return self._handed(out, seen, device, func in MAKERS or not seen)
        if isinstance(out, (list, tuple)):
            return type(out)([self._handed(x, seen, device) if isinstance(x, torch.Tensor) else x for x in out])
        return out

    def _handed(
        self, out: torch.Tensor, seen: dict[int, torch.Tensor], device: torch.device, wrapped: bool = False
    ) -> torch.Tensor:
        if id(out) in seen:
            return seen[id(out)]  # in place, or nothing to do
        real = self._real(out, device)
        if wrapped:
            self.empty[real.untyped_storage()._cdata] = real, out
        return real


class _Comparison:
    """A recorded graph beside what a replay gave, node by node."""

    def __init__(self, graph: FXView, tape: _Replay) -> None:
        self.graph, self.tape = graph, tape
        self.twin: dict[fx.Node, fx.Node] = {}
        self.idle = {**idle_copies(graph.fx), **idle_copies(tape.graph)}

    def equal(self) -> bool:
        """Whether both make the same calls."""
        want, found = self._calls(self.graph.fx), self._calls(self.tape.graph)
        if len(want) != len(found):
            return False
        for a, b in zip(want, found, strict=True):
            if a.op != b.op or (a.op == "call_function" and (a.target is not b.target or not self._same_call(a, b))):
                return False
            if a.op == "output" and not self._same(a.args, b.args):
                return False
            self.twin[b] = a
        return True

    def _calls(self, graph: fx.Graph) -> list[fx.Node]:
        """What is compared in order: inputs, calls and the output."""
        return [
            n for n in graph.nodes if n.op != "get_attr" and n.target is not operator.getitem and n not in self.idle
        ]

    def _same_call(self, a: fx.Node, b: fx.Node) -> bool:
        if self._same(a.args, b.args) and self._same(a.kwargs, b.kwargs):
            return True
        if packet(a) not in SIZED or len(a.args) != 2 or len(b.args) != 2 or not self._same(a.args[0], b.args[0]):
            return False
        one, other = a.meta.get("val"), b.meta.get("val")  # -1 or the size itself
        return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and one.shape == other.shape

    def _same(self, a: Any, b: Any) -> bool:
        if isinstance(b, fx.Node):
            return isinstance(a, fx.Node) and self._same_value(a, b)
        if isinstance(b, (list, tuple)):
            return (
                isinstance(a, (list, tuple))
                and len(a) == len(b)
                and all([self._same(x, y) for x, y in zip(a, b, strict=True)])
            )
        if isinstance(b, dict):
            return isinstance(a, dict) and a.keys() == b.keys() and all([self._same(a[k], b[k]) for k in b])
        return type(a) is type(b) and bool(a == b)

    def _same_value(self, a: fx.Node, b: fx.Node) -> bool:
        a, b = self.idle.get(a, a), self.idle.get(b, b)
        if self.twin.get(b) is a:
            return True
        if b.op == "get_attr" and a.op == "get_attr":
            return self._same_weight(str(a.target), str(b.target))
        item = operator.getitem
        return a.target is item and b.target is item and a.args[1] == b.args[1] and self._same(a.args[0], b.args[0])

    def _same_weight(self, name: str, found: str) -> bool:
        tensor, kind = self.tape.tensors[found]
        if kind == "weight":
            return name == found
        if self.graph.kinds.get(name) != "constant":
            return False
        return same_data(self.graph.tensors.get(name), tensor)  # made by the forward itself


def _inputs(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "placeholder"]
