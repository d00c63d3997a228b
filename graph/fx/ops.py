"""ATen call -> canonical node: the registry, and access to a call's arguments by schema name."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import fx

from .functional import by_identity, packet, packet_of

Slot: TypeAlias = tuple[str | int, int | None]
"""Where an operand sits in a call: (argument name or position, index inside a list argument)."""

ABSENT: Slot = ("", None)
"""An operand that the canonical op has and this ATen call has no place for."""

DTYPE_NAMES: dict[torch.dtype, str] = {
    getattr(torch, n): n
    for n in (
        "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool complex64 complex128 "
        "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz"
    ).split()
}
TORCH_DTYPES = {v: k for k, v in DTYPE_NAMES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """numpy-style name of a torch dtype."""
    return DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


@by_identity
def _signature(target: Any) -> tuple[Any, str, tuple[Any, ...], dict[str, int], tuple[bool, ...]]:
    """(schema, overload, arguments, position by name, which have a default other than None) of a call's target.

    torch builds these anew at every access.
    """
    if not isinstance(target, torch._ops.OpOverload):
        return None, "", (), {}, ()
    name, arguments = target._overloadname, tuple(target._schema.arguments)
    telling = tuple(a.has_default_value() and a.default_value is not None for a in arguments)
    positions = {a.name: i for i, a in enumerate(arguments)}
    return target._schema, "" if name == "default" else name, arguments, positions, telling


class Call:
    """One fx call with its arguments addressed by schema name (or position, for Python functions).

    Attributes:
        looked: whether somebody asked for the size of an operand or of the result.
    """

    looked = False

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.schema, self.overload, self.arguments, self._position, self._telling = _signature(node.target)

    def has(self, name: str) -> bool:
        return name in self._position

    def get(self, name: str | int, default: Any = None) -> Any:
        """The argument, or its schema default."""
        args = self.node.args
        i = self._position.get(name)  # type: ignore[arg-type]
        if i is None:
            return args[name] if isinstance(name, int) and name < len(args) else default
        if i < len(args):
            return args[i]
        kwargs = self.node.kwargs
        if name in kwargs:
            return kwargs[name]  # type: ignore[index]
        argument = self.arguments[i]
        if self._telling[i]:
            return argument.default_value
        return None if argument.has_default_value() else default

    def put(self, name: str | int, value: Any) -> None:
        """Write an argument; gaps before it are filled with the schema's defaults."""
        if isinstance(name, int):
            args = list(self.node.args)
            args[name] = value
            self.node.args = tuple(args)
            return
        i = self._position[name]
        argument = self.arguments[i]
        if argument.kwarg_only or name in self.node.kwargs:
            self.node.kwargs = {**self.node.kwargs, name: value}
            return
        args = list(self.node.args)
        while len(args) <= i:
            filler = self.arguments[len(args)]
            args.append(self.node.kwargs.get(filler.name, filler.default_value))
        args[i] = value
        taken = {a.name for a in self.arguments[: len(args)]}
        self.node.args = tuple(args)
        self.node.kwargs = {k: v for k, v in self.node.kwargs.items() if k not in taken}

    def operand(self, slot: Slot) -> Any:
        item = self.get(slot[0]) if slot[0] != "" else None
        if slot[1] is None:
            return item
        return item[slot[1]] if item is not None and slot[1] < len(item) else None

    def put_operand(self, slot: Slot, value: Any) -> None:
        if slot[1] is None:
            self.put(slot[0], value)
            return
        items = list(self.get(slot[0]) or [])
        while len(items) <= slot[1]:
            items.append(None)
        items[slot[1]] = value
        self.put(slot[0], items)

    def retarget(self, target: Any, *args: Any, **kwargs: Any) -> None:
        """Turn the call into another one in place: its users stay."""
        self.node.target = target
        self.node.args = tuple(args)
        self.node.kwargs = dict(kwargs)
        self.__init__(self.node)  # type: ignore[misc]

    # ---- facts about values ----------------------------------------------------------------------------------
    def val(self, item: Any) -> Any:
        """What stands for a value: a tensor with its size."""
        self.looked = True
        return item.meta.get("val") if isinstance(item, fx.Node) else item

    def rank(self, name: str | int) -> int:
        v = self.get(name)
        v = v.meta.get("val") if isinstance(v, fx.Node) else v
        return v.ndim if isinstance(v, torch.Tensor) else 0

    def axis(self, value: int, rank: int) -> int:
        return value + rank if value < 0 else value

    def sizes(self, items: Sequence[Any]) -> list[int | None]:
        """Baked sizes as ints; None for -1 and for what is computed at run time."""
        return [s if isinstance(s, int) and s >= 0 else None for s in items]

    def dynamic(self, items: Any) -> list[fx.Node]:
        items = items if isinstance(items, (list, tuple)) else [items]
        return [s for s in items if isinstance(s, fx.Node)]

    def put_sizes(self, name: str, new: Sequence[int | None]) -> None:
        """Write sizes back; None keeps what is there (-1 or a run-time size)."""
        old = list(self.get(name))
        self.put(name, [o if n is None else int(n) for o, n in zip(old, new, strict=True)])

    def output_rank(self) -> int:
        v = self.node.meta.get("val")
        return v.ndim if isinstance(v, torch.Tensor) else 0


@dataclass
class Spec:
    """Canonical reading of one call.

    Attributes:
        op: canonical op.
        operands: slot of each canonical operand.
        attrs: canonical attributes.
        dynamic: fx nodes that feed attributes at run time.
        write: how to change an attribute in the native call.
    """

    op: str
    operands: list[Slot]
    attrs: dict[str, Any] = field(default_factory=dict)
    dynamic: list[fx.Node] = field(default_factory=list)
    write: dict[str, Callable[[Any], None]] = field(default_factory=dict)


Reader: TypeAlias = Callable[[Call], "Spec | None"]
_READERS: dict[str, Reader] = {}


def reads(*names: str) -> Callable[[Reader], Reader]:
    """Register a reader for ATen packets (``"conv2d"``) or Python functions (``"operator.mul"``)."""

    def register(reader: Reader) -> Reader:
        for name in names:
            _READERS[name if "." in name else f"aten.{name}"] = reader
        return reader

    return register


def slots(*names: str | int) -> list[Slot]:
    return [(n, None) for n in names]


def list_slots(call: Call, name: str) -> list[Slot]:
    return [(name, i) for i in range(len(call.get(name) or []))]


def putter(call: Call, name: str) -> Callable[[Any], None]:
    """Writer of one plain argument; None keeps what is there."""

    def put(value: Any) -> None:
        if value is not None:
            call.put(name, value)

    return put


def known(node: fx.Node) -> bool:
    """Does this call have a canonical form (with the arguments it has)?"""
    if node.target is operator.getitem or node.op != "call_function":
        return True
    _load_families()
    reader = _READERS.get(packet(node))
    if reader is None or (spec := reader(call := Call(node))) is None:
        return False
    node.meta[_READ] = call, spec, node.args, node.kwargs
    return True


_READ = "foldline_reading"
"""What :func:`known` found, kept for the reading that follows."""


def read_once(node: fx.Node) -> tuple[Call, Spec]:
    """The call and its reading: as :func:`known` has just found it, if the call is still the same, else anew."""
    call, spec, args, kwargs = node.meta.pop(_READ, (None, None, None, None))
    if call is not None and call.node is node and node.args is args and node.kwargs is kwargs:
        return call, spec
    call = Call(node)
    return call, _read(call)


def read(node: fx.Node) -> Spec:
    """The canonical reading of a call; op ``"opaque"`` with every tensor operand where there is none."""
    return _read(Call(node))


def _read(call: Call) -> Spec:
    _load_families()
    reader = _READERS.get(packet(call.node))
    spec = reader(call) if reader is not None else None
    return spec if spec is not None else _opaque(call)


def _opaque(call: Call) -> Spec:
    found: list[Slot] = []

    def visit(name: str | int, item: Any) -> None:
        if isinstance(item, fx.Node):
            found.append((name, None))
        elif isinstance(item, (list, tuple)):
            found.extend((name, i) for i, x in enumerate(item) if isinstance(x, fx.Node))

    for i, item in enumerate(call.node.args):
        visit(call.arguments[i].name if call.schema else i, item)
    if call.schema:
        for key, item in call.node.kwargs.items():
            visit(key, item)
    return Spec("opaque", found)


def _load_families() -> None:
    """Import the family files on first use (they import this one)."""
    if "aten.conv2d" not in _READERS:
        from . import ops_elementwise, ops_linear, ops_reduce, ops_shape, ops_sizes  # noqa: F401


def native_name(node: fx.Node) -> str:
    """``"aten.conv2d.default"`` or ``"operator.mul"``: what Node.origin says."""
    return _native_name(node.target)


@by_identity
def _native_name(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else packet_of(target)


TENSOR_OVERLOADS = ("Tensor", "Tensor_Tensor", "self", "default")


def tensor_operands(c: Call) -> None:
    """Switch a call whose operand was a Python number to the overload that takes a tensor there."""
    schema = c.schema
    if schema is None:
        return
    for i, argument in enumerate(schema.arguments):
        value = c.node.args[i] if i < len(c.node.args) else c.node.kwargs.get(argument.name)
        if isinstance(value, fx.Node) and str(argument.type) in ("number", "Scalar", "float", "int"):
            if not isinstance(value.meta.get("val"), torch.Tensor):
                continue
            packet = c.node.target.overloadpacket  # type: ignore[union-attr]
            for overload in TENSOR_OVERLOADS:
                found = getattr(packet, overload, None)
                if found is not None and all(
                    str(a.type).startswith(("Tensor", "Optional[Tensor")) for a in found._schema.arguments[: i + 1]
                ):
                    c.retarget(found, *c.node.args, **c.node.kwargs)
                    return
