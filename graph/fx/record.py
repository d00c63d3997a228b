"""A cheap capture: one call of the model on meta tensors, recorded at the level of torch.export's own graphs."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import get_ident
from typing import Any

import torch
from torch import fx, nn
from torch._export.utils import _compiling_state_context
from torch._library.utils import handle_dispatch_mode
from torch._ops import _pop_mode_from_pre_dispatch, _set_mode_pre_dispatch, unset_mode_pre_dispatch
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.utils import _pytree as pytree

from .copies import copied_with
from .frames import user_frame
from .functional import by_identity, make_functional
from .known_values import NotKnown, data_of, reads
from .shortcuts import shortcut
from .tensors import StorageKeys
from .trace import Capture, leaf_names
from .walk import calls_forward_only, modules_of

aten = torch.ops.aten
NODE = "_foldline_node"
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
PRE_DISPATCH_SET = torch._C.DispatchKeySet(_PRE_DISPATCH)


_ATOMS = frozenset((type(None), bool, int, float, torch.dtype))


class CannotRecord(Exception):
    """This model needs torch.export: what the recorder saw is not the whole program, or not a pure one."""


class Recorded:
    """The functional graph of one recorded call, with what :class:`~.functional.Pure` gives for an exported program.

    Every size is a constant of the example call. Weights are the caller's own tensors; the call itself ran on meta
    tensors, so nothing was computed. Control flow that reads tensor data cannot be recorded (CannotRecord).
    ``compiling``: what torch.compiler tells the model that asks whether it is traced (True: as torch.export does).
    """

    def __init__(self, found: Capture, compiling: bool = True) -> None:
        assert found.module is not None
        self.notes: list[str] = []
        self.tensors: dict[str, tuple[torch.Tensor, str]] = {}
        self.submodules: dict[str, nn.Module] = {}
        self.mode = None
        flat, self.in_spec = pytree.tree_flatten((found.args, found.kwargs))
        tape = Tape(found.module, self.tensors, found.keys)
        tape.compiling = compiling
        args, kwargs = pytree.tree_unflatten(tape.inputs(flat, leaf_names(found)), self.in_spec)
        try:
            result = tape.play(args, kwargs)
            leaves, self.out_spec = pytree.tree_flatten(result)
            tape.graph.output(tuple(tape.held(x) if isinstance(x, torch.Tensor) else x for x in leaves))
        except CannotRecord:
            raise
        except Exception as error:  # user code on meta tensors: whatever fails there, torch.export decides
            raise CannotRecord(f"{type(error).__name__}: {str(error)[:200]}") from error
        finally:
            tape.part()
            unmark(tape.graph)
        self.graph = tape.graph
        if not make_functional(self.graph):
            raise CannotRecord("in-place operations on views")


def unmark(graph: fx.Graph) -> None:
    """Let the tensors of a recording forget their nodes: Python cannot collect such a cycle where views share them."""
    for node in graph.nodes:
        val = node.meta.get("val")
        for t in val if isinstance(val, (list, tuple)) else (val,):
            if isinstance(t, torch.Tensor):
                t.__dict__.pop(NODE, None)


class Tape(SchemaCheckMode):
    """Records every call that reaches the dispatcher before autograd and decompositions, as torch.export sees it.

    It takes the one mode slot at that level that is free for outsiders. Each tensor carries the fx node that made it.
    """

    compiling = True
    """Models ask torch.compiler whether they are traced: the answer is that of torch.export."""

    def __init__(
        self, module: nn.Module, tensors: dict[str, tuple[torch.Tensor, str]], keys: StorageKeys | None = None
    ) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.tensors, self.storage = tensors, keys or StorageKeys()
        self.device = next((t.device for t in module.parameters()), torch.device("cpu"))
        self.path: list[tuple[str, str]] = [("", type(module).__name__)]
        self.stacks: dict[str, dict[str, tuple[str, str]]] = {}
        self.weights: dict[int, tuple[str, str, torch.Tensor]] = {}
        self.made: dict[str, fx.Node] = {}
        self.fresh: dict[int, tuple[fx.Node, torch.Tensor]] = {}
        self.answered: list[Any] = []
        self.keep: list[torch.Tensor] = []
        self.called: list[dict[str, Any]] = []
        self.twin = self._stand_in(module)

    def _stand_in(self, module: nn.Module) -> nn.Module:
        """What is called: a copy of the module on meta tensors."""
        names: dict[int, tuple[str, str]] = {}
        for path, m in modules_of(module):
            prefix = f"{path}." if path else ""
            for n, parameter in m._parameters.items():
                names.setdefault(id(parameter), (prefix + n, "parameter"))
            for n, buffer in m._buffers.items():
                if names.get(id(buffer), ("", "parameter"))[1] == "parameter":
                    names[id(buffer)] = prefix + n, "buffer"
        same: dict[tuple[Any, ...], torch.Tensor] = {}

        def give(t: torch.Tensor) -> torch.Tensor:
            where = (*self.storage[t], t.dtype) if t.numel() else (id(t),)
            meta = same.get(where)
            own = isinstance(t, nn.Parameter)
            if meta is None or own != isinstance(meta, nn.Parameter):
                meta = t.detach() if t.is_meta else meta_like(t)
                meta = nn.Parameter(meta, requires_grad=False) if own else meta
                same[where] = meta
                name, kind = names.get(id(t), (f"constant_{len(self.weights)}", "constant"))
                self.weights[id(meta)] = (name, kind, t)
                self.keep.append(meta)  # ids stay unique while the tensors live
            return meta

        try:
            twin = copied_with(module, give)
        except Exception as error:  # copying runs user code (__deepcopy__, __setstate__)
            raise CannotRecord(f"the module cannot be copied ({error})") from error
        for name, m in modules_of(twin):
            m.__dict__["training"] = False
            if not name:
                continue
            if calls_forward_only(m):
                m.__dict__["_compiled_call_impl"] = self._called(m, (name, type(m).__name__))
                self.called.append(m.__dict__)
            else:
                # the twin's own dicts: torch's registration counts through all handles ever made
                m._forward_pre_hooks[-1] = self._enter(name, type(m).__name__)
                m._forward_hooks[-1] = self._leave
        return twin

    def _called(self, module: nn.Module, where: tuple[str, str]) -> Any:
        """What a module without hooks is called by, instead of hooks that torch would look for in a dozen places."""
        path, forward = self.path, module._call_impl

        def call(*args: Any, **kwargs: Any) -> Any:
            path.append(where)
            try:
                return forward(*args, **kwargs)
            finally:
                path.pop()

        return call

    def part(self) -> None:
        """Give up the twin. Its modules know their own calls, and its hooks the tape: cycles that would wait for gc."""
        for held in self.called:
            held.pop("_compiled_call_impl", None)
        del self.twin, self.called

    def _enter(self, name: str, kind: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self.path.append((name, kind))

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.path.pop()

    def inputs(self, flat: list[Any], names: list[str]) -> list[Any]:
        """Meta stand-ins for the leaves of the call, each with its placeholder."""
        out: list[Any] = []
        for leaf, name in zip(flat, names, strict=True):
            node = self.graph.placeholder(name)
            if isinstance(leaf, torch.Tensor):
                leaf = self._given(leaf, node)
            else:
                node.meta["val"] = leaf
            out.append(leaf)
        return out

    def _given(self, leaf: torch.Tensor, node: fx.Node) -> torch.Tensor:
        """What the call gets for a tensor of the example."""
        stand_in = node.meta["val"] = meta_like(leaf)
        setattr(stand_in, NODE, node)
        return stand_in

    def play(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The recorded call."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _recording(self):
            return self.twin(*args, **kwargs)

    def held(self, tensor: torch.Tensor) -> fx.Node:
        """The node that made a tensor; weights and constants get theirs on first use."""
        node = getattr(tensor, NODE, None)
        if node is not None and node.graph is self.graph:
            return node
        known = self.weights.get(id(tensor))
        if known is None:
            if tensor.is_meta:
                made, out = self.fresh.get(tensor.untyped_storage()._cdata, (None, None))
                if made is not None and out is not None and out.shape == tensor.shape:
                    return made  # torch wraps what a factory made in a new tensor
                raise CannotRecord("a tensor came from outside the recorded calls")
            known = (f"constant_{len(self.weights)}", "constant", tensor.detach())
            self.weights[id(tensor)] = known
            self.keep.append(tensor)
        name, kind, original = known
        if name not in self.made:
            plain = name.replace(".", "_")
            node = self.graph.create_node("get_attr", name, name=plain)  # FXView puts them all first
            node.meta["val"] = tensor if tensor.is_meta else torch.empty_like(tensor, device="meta")
            self.made[name] = node
            self.tensors[name] = (original, kind)
        return self.made[name]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RESHAPING_IN_PLACE:
            raise CannotRecord(f"{func} changes the shape of a tensor in place")
        if isinstance(func, torch._ops.OpOverload):
            self._answer_directly(func)
        return self.call(func, args, kwargs or {})

    def _answer_directly(self, func: Any) -> None:
        """Let the dispatcher hand further calls of this op straight to this tape (torch looks them up anew)."""
        thread = get_ident()

        def handler(*args: Any, **kwargs: Any) -> Any:
            if get_ident() != thread:  # a capture in another thread: as torch does it
                mode = _pop_mode_from_pre_dispatch()
                try:
                    return handle_dispatch_mode(mode, func, *args, **kwargs)
                finally:
                    _set_mode_pre_dispatch(mode)
            return self.call(func, args, kwargs)

        if func._dispatch_cache.setdefault(_PRE_DISPATCH, handler) is handler:
            self.answered.append(func)
            _MET[func] = None

    def forget(self) -> None:
        """Take back what :meth:`_answer_directly` left in torch's tables."""
        for func in self.answered:
            func._dispatch_cache.pop(_PRE_DISPATCH, None)
        self.answered.clear()

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the model: recorded, and answered by shape."""
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise CannotRecord("an autocast region")
        if reads(func):
            return self._read(func, args)
        given = tuple([self._argument(a) for a in args]), self._argument(kwargs) if kwargs else {}
        with torch._C._ExcludeDispatchKeyGuard(PRE_DISPATCH_SET), torch._C._DisablePythonDispatcher():
            out = shortcut(func, args, kwargs)
            if out is None:
                out = func(*args, **kwargs)
        if not isinstance(out, (torch.Tensor, list, tuple)):
            if func in SIZES:
                return out
            raise CannotRecord(f"{func} gave {type(out).__name__}: tensor data in Python")
        node = self.graph.create_node("call_function", func, name=_plain_name(func))
        node.args = given[0]  # given at once, torch would look for symbolic numbers among them: half of the time
        if given[1]:
            node.kwargs = given[1]
        self._place(node.meta)
        node.meta["val"] = _described(out)
        if isinstance(out, torch.Tensor):
            setattr(out, NODE, node)
            if not node.all_input_nodes or _wraps(func):
                self.fresh[out.untyped_storage()._cdata] = (node, out)
        else:
            for i, part in enumerate(out):
                if isinstance(part, torch.Tensor):
                    setattr(part, NODE, _item(self.graph, node, i, part))
        return out

    def _read(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Data that the model reads in Python: only what sizes alone say is a constant of the recorded call."""
        node = getattr(args[0], NODE, None)
        if node is None and args[0].is_meta:
            node, _ = self.fresh.get(args[0].untyped_storage()._cdata, (None, None))
        if node is None or node.graph is not self.graph:
            raise CannotRecord(f"{func}: tensor data in Python")
        with torch._C._ExcludeDispatchKeyGuard(PRE_DISPATCH_SET), torch._C._DisablePythonDispatcher():
            try:
                return func(data_of(node), *args[1:])
            except NotKnown as unknown:
                raise CannotRecord(f"{func}: tensor data in Python") from unknown

    def _argument(self, item: Any) -> Any:
        if type(item) in _ATOMS:
            return item
        if isinstance(item, torch.Tensor):
            return self.held(item)
        if isinstance(item, (list, tuple)):
            new = [self._argument(x) for x in item]
            return new if type(item) is list else tuple(new)
        if isinstance(item, dict):
            return {k: self._argument(v) for k, v in item.items()}
        if isinstance(item, torch.device) and item.type == "meta":
            return self.device
        return item

    def _place(self, meta: dict[str, Any]) -> None:
        """Note where in the model a call stands."""
        meta["nn_module_stack"], meta["line"] = self._stack(), user_frame()

    def _stack(self) -> dict[str, tuple[str, str]]:
        name, kind = self.path[-1]
        found = self.stacks.get(name)
        if found is None:
            found = self.stacks[name] = {name: (name, kind)}
        return found


_RESHAPING_IN_PLACE = {
    getattr(getattr(aten, name), overload)
    for name in "t_ transpose_ unsqueeze_ squeeze_ resize_ resize_as_ as_strided_ set_ swapaxes_ swapdims_".split()
    for overload in getattr(aten, name).overloads()
}
MAKERS = {
    getattr(getattr(aten, name), overload)
    for name in "full_like zeros_like ones_like empty_like rand_like new_full new_zeros new_ones new_empty".split()
    for overload in getattr(aten, name).overloads()
}
"""Their Python bindings wrap the result once more, as those of factories do."""


@by_identity
def _wraps(func: Any) -> bool:
    return func in MAKERS


SIZES = {aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int, aten.sym_storage_offset.default}


def meta_like(t: torch.Tensor) -> torch.Tensor:
    """A new meta tensor of the same shape, strides and dtype."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


@by_identity
def _plain_name(func: Any) -> str:
    """What torch.export calls a node of this op."""
    return str(func.overloadpacket.__name__).strip("_")


def _item(graph: fx.Graph, node: fx.Node, i: int, part: torch.Tensor) -> fx.Node:
    made = graph.call_function(operator.getitem, (node, i))
    made.meta.update(node.meta, val=_described(part))
    return made


def _described(out: Any) -> Any:
    """Shapes and dtypes only: meta tensors as they are."""
    if isinstance(out, torch.Tensor):
        return out if out.is_meta else torch.empty_like(out, device="meta")
    return type(out)(_described(x) for x in out) if isinstance(out, (list, tuple)) else out


_MET: dict[Any, None] = {}
"""Operators that earlier recordings met."""


@contextmanager
def _recording(tape: Tape) -> Iterator[None]:
    with _compiling_state_context() if tape.compiling else nullcontext(), torch._C._EnablePythonDispatcher():
        _set_mode_pre_dispatch(tape)
        for func in list(_MET):  # spares each its way through torch's mode stack
            tape._answer_directly(func)
        try:
            yield
        finally:
            unset_mode_pre_dispatch(None, schema_check=True)
            tape.forget()
