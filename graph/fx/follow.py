"""Following a module along a recorded graph, call by call: the quick form of the proof by calls."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .clean import idle_copies, is_full_slice
from .functional import IN_PLACE, by_identity, packet
from .known_values import Known, Made, NotKnown, data_of, reads
from .record import MAKERS, NODE, PRE_DISPATCH_SET, SIZES, CannotRecord, Tape, meta_like
from .shortcuts import shortcut
from .spelled import rule_of
from .tensors import same_data, storage_key

if TYPE_CHECKING:
    from .view import FXView

META = "_foldline_meta"
MADE_BY = "_foldline_made_by"
_META_DEVICE = torch.device("meta")
SIZED = frozenset(("aten.view", "aten.reshape", "aten._unsafe_view", "aten.expand"))


class Lost(Exception):
    """Something that is not followed here: the replay that keeps a graph of its own has to decide."""


def follows(graph: FXView, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a call of ``module`` makes the graph's calls in the graph's order, each on the same operands.

    As each call comes, it is held against the next node of the graph; if it is that one, it is answered by an empty
    tensor of the shape that the node has. A call that is another one may be one whose result nobody reads: it is
    answered by shape, and no later call of the graph can have read it. A call in place counts only where the recorded
    one was in place, too: then nothing reads what it overwrote. ``module`` is in eval mode; False proves nothing.
    """
    try:
        guide = _Guide(graph, module, tensors)
        leaves, _ = pytree.tree_flatten((graph.source.args, graph.source.kwargs))
        args, kwargs = pytree.tree_unflatten(guide.inputs(leaves, []), graph.in_spec)
        result = guide.play(args, kwargs)
        found, out_spec = pytree.tree_flatten(result)
        return out_spec == graph.out_spec and guide.ends(found)
    except Exception:  # user code, or a case that is not followed: the replay that keeps a graph decides
        return False


class _Guide(Tape):
    """A tape that compares instead of recording."""

    compiling = False

    def __init__(self, graph: FXView, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        self.view = graph
        self.names = {id(t): n for n, t in tensors.items()}
        self.stored = tensors
        self.by_key: dict[tuple[Any, ...], str] | None = None
        self.parts: dict[tuple[fx.Node, int], fx.Node] = {}
        self.holders: list[fx.Node] = []
        self.calls: list[fx.Node] = []
        self.at = 0
        self.idle = idle_copies(graph.fx)
        for node in graph.fx.nodes:
            if node.op == "call_function":
                if node in self.idle:
                    continue
                if node.target is operator.getitem:
                    self.parts[node.args[0], node.args[1]] = node  # type: ignore[index]
                else:
                    self.calls.append(node)
            elif node.op == "placeholder":
                self.holders.append(node)
            elif node.op == "output":
                self.end = node
        self.wrapped: dict[int, torch.Tensor] = {}
        self.passed: dict[int, fx.Node] = {}
        self.wrote = False
        super().__init__(module, {})

    def _stand_in(self, module: nn.Module) -> nn.Module:
        return module

    def inputs(self, flat: list[Any], names: list[str]) -> list[Any]:
        out: list[Any] = []
        for leaf, node in zip(flat, self.holders, strict=True):
            given = isinstance(leaf, torch.Tensor)
            out.append(self._answer(node, node.meta["val"], leaf.device) if given else leaf)
        return out

    def ends(self, leaves: list[Any]) -> bool:
        """Whether every node was met, and the call returned what the graph returns."""
        return self.at == len(self.calls) and self._same(self.end.args[0], tuple(leaves))

    # ---- one call ------------------------------------------------------------------------------------------------
    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise CannotRecord("an autocast region")
        with torch._C._ExcludeDispatchKeyGuard(PRE_DISPATCH_SET), torch._C._DisablePythonDispatcher():
            node = self.calls[self.at] if self.at < len(self.calls) else None
            if node is None:
                return self._aside(func, args, kwargs)
            written = node.meta.get(IN_PLACE)
            same = func is (written or node.target) and self._matches(node, args, kwargs)
            if not same and not self._splits(node, func, args, kwargs):
                return self._aside(func, args, kwargs)
            if written is None and _writes(func):
                raise Lost("a call with an effect")
            self.at += 1
            val = node.meta["val"]
            if written is not None:
                return self._written(node, val, args)
            if isinstance(val, torch.Tensor):
                place = _place(args, kwargs)
                for old, new in zip(node.args, args, strict=True):
                    if isinstance(old, fx.Node) and old.meta.get("val") is val:  # nothing to do, says the shape rule
                        if id(new) in self.names:  # the module's own tensor carries no mark
                            self.passed[id(new)] = node
                        else:
                            setattr(new, NODE, node)
                        return new
                made = self._answer(node, val, place[0] if place else torch.get_default_device())
                if not place or func in MAKERS or not any(isinstance(a, torch.Tensor) for a in args):
                    self.wrapped[made.untyped_storage()._cdata] = made  # torch wraps it once more
                return made
            return self._several(node, val, _place(args, kwargs))

    def _matches(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        want = node.args
        if len(want) != len(args):
            return False
        for a, b in zip(want, args, strict=True):
            if a is not b and not self._same(a, b):
                return self._sized(node, args, kwargs)
        return self._same(node.kwargs, kwargs) if kwargs or node.kwargs else True

    def _sized(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """The same target shape in other words: -1 or the size itself."""
        if packet(node) not in SIZED or len(args) != 2 or kwargs or not self._same(node.args[0], args[0]):
            return False
        val = node.meta["val"]
        try:
            return bool(node.target(self._meta(args[0]), args[1]).shape == val.shape)  # type: ignore[operator]
        except RuntimeError:  # it does not fit
            return False

    def _splits(self, node: fx.Node, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Pieces of one size, where the graph lists the size of each."""
        if func is not torch.ops.aten.split.Tensor or node.target is not torch.ops.aten.split_with_sizes.default:
            return False
        x, size, dim = args if len(args) == 3 else (*args, 0)
        listed: Any = node.args if len(node.args) == 3 else (*node.args, 0)
        if kwargs or node.kwargs or type(size) is not int or size < 1 or dim != listed[2]:
            return False
        n = x.shape[dim]
        pieces = [size] * (n // size) + [n % size] * (n % size > 0)
        return list(listed[1]) == pieces and self._same(listed[0], x)

    def _same(self, a: Any, b: Any) -> bool:
        """Whether an operand of a call is what the graph says."""
        if isinstance(b, torch.Tensor):
            return isinstance(a, fx.Node) and self._is(a, b)
        if isinstance(b, (list, tuple)):
            if not isinstance(a, (list, tuple)) or len(a) != len(b):
                return False
            return all([x is y or self._same(x, y) for x, y in zip(a, b, strict=True)])
        if isinstance(b, dict):
            return isinstance(a, dict) and a.keys() == b.keys() and all([self._same(a[k], b[k]) for k in b])
        if isinstance(b, torch.device):
            return isinstance(a, torch.device)  # the tape notes the module's own for all
        return type(a) is type(b) and bool(a == b)

    def _is(self, node: fx.Node, t: torch.Tensor) -> bool:
        node = self.idle.get(node, node) if self.idle else node
        made = getattr(t, NODE, None)
        if made is not None:
            return made is node
        name = self.names.get(id(t))
        if name is not None:
            if id(t) in self.passed:
                return self.passed[id(t)] is node
            return node.op == "get_attr" and node.target == name
        if hasattr(t, META):
            return False  # of a call that the graph lacks
        twin = self.wrapped.get(t.untyped_storage()._cdata)
        if twin is not None:
            return twin.shape == t.shape and getattr(twin, NODE, None) is node
        if node.op != "get_attr":
            return False
        if t.numel():
            if self.by_key is None:
                self.by_key = {storage_key(s): n for n, s in self.stored.items() if s.numel()}
            name = self.by_key.get(storage_key(t))
            if name is not None:
                return node.target == name
        constant = str(node.target)  # made by the forward itself
        return self.view.kinds[constant] == "constant" and same_data(self.view.tensors.get(constant), t)

    # ---- answers -------------------------------------------------------------------------------------------------
    def _answer(self, node: fx.Node, val: torch.Tensor, device: torch.device) -> torch.Tensor:
        made = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=device)
        setattr(made, NODE, node)
        return made

    def _several(self, node: fx.Node, val: Any, place: list[torch.device]) -> Any:
        device = place[0] if place else torch.get_default_device()
        out: list[Any] = []
        for i, part in enumerate(val):
            read = self.parts.get((node, i))
            if not isinstance(part, torch.Tensor):
                out.append(part)
            elif read is None:
                out.append(_unread(part, device))
            else:
                out.append(self._answer(read, part, device))
        return type(val)(out)

    def _written(self, node: fx.Node, val: Any, args: tuple[Any, ...]) -> torch.Tensor:
        """A call in place that the recorded module makes in place, too."""
        mine = args[0]
        plain = isinstance(mine, torch.Tensor) and isinstance(val, torch.Tensor) and mine.shape == val.shape
        if self.view.rewritten or not plain or mine.dtype != val.dtype or id(mine) in self.names:
            raise Lost("a write that is not followed")
        self.wrote = True
        setattr(mine, NODE, node)
        twin = self.wrapped.get(mine.untyped_storage()._cdata)
        if twin is not None:
            setattr(twin, NODE, node)
        return mine  # type: ignore[no-any-return]

    def _aside(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that the graph lacks: one that gives a size, a slice of everything, or one that nobody reads."""
        if func in SIZES:
            return func(*args, **kwargs)
        if reads(func):
            return func(self._data(args[0]), *args[1:], **kwargs)
        if _writes(func):
            raise Lost("a write that the graph lacks")
        if func is torch.ops.aten.slice.Tensor and not kwargs and is_full_slice(args):
            source = getattr(args[0], NODE, None)
            if source is None:
                raise Lost("a weight sliced")
            return self._answer(source, args[0], args[0].device)
        rule = rule_of(func)
        if rule is not None:
            out = rule(lambda target, *given: self.call(target, given, {}), lambda t: t, *args, **kwargs)
            if out is not None:
                return out
        place = _place(args, kwargs)
        given: dict[int, torch.Tensor] = {}

        def behind(item: Any) -> Any:
            if isinstance(item, torch.Tensor):
                meta = self._meta(item)
                given[id(meta)] = item
                return meta
            if isinstance(item, torch.device):
                return _META_DEVICE
            return [behind(x) for x in item] if isinstance(item, (list, tuple)) else item

        on_meta, keywords = [behind(a) for a in args], {k: behind(v) for k, v in kwargs.items()}
        out = shortcut(func, tuple(on_meta), keywords)
        out = func(*on_meta, **keywords) if out is None else out
        device = place[0] if place else torch.get_default_device()
        if isinstance(out, torch.Tensor):
            if id(out) in given:
                return given[id(out)]
            made = _unread(out, device)
            setattr(made, MADE_BY, (func, args, kwargs))
            if not given or func in MAKERS:
                self.wrapped[made.untyped_storage()._cdata] = made
            return made
        if isinstance(out, (list, tuple)) and all(isinstance(x, torch.Tensor) for x in out):
            return type(out)([given[id(x)] if id(x) in given else _unread(x, device) for x in out])
        raise Lost(f"{func} gave {type(out).__name__}")

    def _data(self, t: torch.Tensor) -> torch.Tensor:
        """What a tensor holds, where sizes alone say it."""

        def made_by(x: torch.Tensor) -> Made | torch.Tensor:
            twin = self.wrapped.get(x.untyped_storage()._cdata, x)
            x = twin if twin.shape == x.shape else x
            node, call = getattr(x, NODE, None), getattr(x, MADE_BY, None)
            if node is not None:
                return data_of(node)
            if call is None:
                raise NotKnown
            return (*call, x)

        if self.wrote:
            raise Lost("data read after a write in place")
        found: torch.Tensor = Known(torch.Tensor, made_by)[t]
        return found

    def _meta(self, t: torch.Tensor) -> torch.Tensor:
        found = getattr(t, META, None)
        return meta_like(t) if found is None else found


@by_identity
def _writes(func: Any) -> bool:
    return bool(func._schema.is_mutable)


def _place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.device]:
    """Where a result lies: a device that is named, or that of the first tensor."""
    place: list[torch.device] = []
    for item in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(item, torch.Tensor):
            if not place:
                place.append(item.device)
        elif isinstance(item, torch.device):
            return [item]
        elif isinstance(item, (list, tuple)) and not place:
            place += [x.device for x in item if isinstance(x, torch.Tensor)][:1]
    return place


def _unread(meta: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The result of a call that the graph lacks."""
    made = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device=device)
    setattr(made, META, meta)
    return made
