"""The canonical view of a functional fx graph: nodes, values and weights, read from the calls and kept with them."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy  # type: ignore[import-untyped]
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ..errors import ConstraintError
from ..ir import Dim, Graph, Node, Value, Weight
from .copying import copy_view
from .extract import Cut
from .functional import Pure
from .ops import Call, Slot, dtype_name, native_name, read_once
from .picks import Picks
from .propagate import fake_mode
from .record import Recorded
from .source import location_of, scope_of
from .tensors import from_numpy, frozen, to_numpy
from .trace import Capture, normalize_call
from .walk import tensors_of


@dataclass(frozen=True)
class Record:
    """A node as it was loaded."""

    op: str
    scope: str
    attrs: dict[str, Any]
    shapes: list[tuple[Dim, ...] | None]


class FXView(Graph):
    """Canonical view over ``graph.fx``, a functional ATen graph whose weights are ``get_attr`` nodes.

    Attributes:
        fx: the native graph. Every canonical node's ``native`` is its fx node.
        tensors: current tensor of each weight, by canonical name; never modified in place.
        source: the capture (caller's module, example call).
        pristine: per node name, its scope, attributes and output shapes as loaded.
        originals: the caller's tensor of each loaded weight.
        kept: per loaded weight and axis, which of its indices are left, in order.
        rewritten: the first edit that was no selection ("" while there is none).
    """

    kind = "fx"

    def __init__(
        self,
        found: Capture,
        pure: Pure | Recorded | Cut | None,
        like: FXView | None = None,
        names: dict[fx.Node, str] | None = None,
    ) -> None:
        super().__init__()
        self.source = found
        self.tensors: dict[str, torch.Tensor] = {}
        self.kinds: dict[str, str] = {}
        self.submodules: dict[str, nn.Module] = {}
        self.alias_names: dict[str, tuple[str, ...]] = {}
        self.changed: set[str] = set()
        self.given: set[str] = set()
        self.kept: dict[str, dict[int, np.ndarray]] = {}
        self.rewritten = ""
        self.sizes: dict[str, int] = dict(found.sizes)
        self._dirty: set[fx.Node] = set()
        self._plain: set[fx.Node] = set()  # calls whose reading looks at no size
        self._picks = Picks()
        self._seen_used: set[str] = set()
        self._node_of: dict[fx.Node, Node] = {}
        self._value_of: dict[fx.Node, Value] = {}
        self.name = type(found.module).__name__ if found.module is not None else "graph"
        if like is not None:
            copy_view(self, like)
            return
        assert pure is not None
        self.fx = pure.graph
        self.notes = [*found.notes, *pure.notes]
        self.in_spec = pure.in_spec
        self.out_spec = pure.out_spec
        self.mode: FakeTensorMode | None = None if isinstance(pure, Recorded) else fake_mode(self.fx)
        self._adopt_weights(pure)
        self._build(names or {})
        self._seen_used = set(self.weights)
        self.originals = dict(self.tensors)
        self.loaded_names = {a for w in self.weights.values() for a in w.aliases}
        self.pristine = self.snapshot()

    # ---- building the view -----------------------------------------------------------------------------------
    def _adopt_weights(self, pure: Pure | Recorded | Cut) -> None:
        """One get_attr node per storage; aliases are every state-dict name of that storage."""
        names: dict[tuple[Any, ...], list[str]] = {}
        keys = self.source.keys
        for name, tensor in self.state_tensors():
            names.setdefault(keys[tensor], []).append(name)
        for name, (tensor, _) in pure.tensors.items():
            found = names.setdefault(keys[tensor], [])
            if name not in found:
                found.append(name)
        canonical: dict[tuple[Any, ...], fx.Node] = {}
        self.submodules = dict(pure.submodules)
        for node in [n for n in self.fx.nodes if n.op == "get_attr" and str(n.target) in pure.tensors]:
            tensor, kind = pure.tensors[str(node.target)]
            key = keys[tensor]
            if key in canonical and tensor.numel():
                node.replace_all_uses_with(canonical[key])
                self.fx.erase_node(node)
                continue
            canonical[key] = node
            aliases = names[key] if tensor.numel() else [str(node.target)]
            name = aliases[0]
            node.target = name
            self.tensors[name] = tensor
            self.kinds[name] = kind
            self.alias_names[name] = tuple(aliases)
        self._sort_weights(canonical.values(), {n: i for i, found in enumerate(names.values()) for n in found})

    def _sort_weights(self, nodes: Iterable[fx.Node], order: dict[str, int]) -> None:
        """Weights in the order in which the module defines them, however it was captured: groups are named by it."""
        first = next((n for n in self.fx.nodes if n.op not in ("placeholder", "get_attr")), None)
        if first is not None:
            for node in sorted(nodes, key=lambda n: order[str(n.target)]):
                first.prepend(node)

    def _build(self, names: dict[fx.Node, str]) -> None:
        """Make canonical nodes and values from the fx graph; ``names`` keeps value names over a clone."""
        taken: set[str] = set()

        def unique(base: str) -> str:
            name, k = base, 1
            while name in taken:
                k += 1
                name = f"{base}_{k}"
            taken.add(name)
            return name

        for node in self.fx.nodes:
            if node.op == "placeholder" and isinstance(
                node.meta.get("val"), (torch.Tensor, torch.SymInt, torch.SymFloat)
            ):
                value = self._new_value(node, unique(names.get(node, node.name)))
                value.is_input = True
                self.inputs.append(value)
            elif node.op == "get_attr" and str(node.target) not in self.submodules:
                self._new_weight(node, unique(names.get(node, str(node.target))))
            elif node.op == "call_function" and not self._is_getitem(node):
                self._new_node(node, unique, names)
        self._refresh_outputs()
        self._relink()

    def _new_value(self, node: fx.Node, name: str) -> Value:
        shape, hint, dtype = self.describe(node.meta.get("val"))
        value = Value(name, shape, hint, dtype, native=node)
        self.values[name] = value
        self._value_of[node] = value
        return value

    def _new_weight(self, node: fx.Node, value_name: str) -> Value:
        name = str(node.target)
        tensor = self.tensors[name]
        value = self._new_value(node, value_name)
        trainable = bool(tensor.requires_grad and self.kinds[name] == "parameter")
        self.weights[name] = self._weight(name, value, tuple(tensor.shape), dtype_name(tensor.dtype), trainable)
        return value

    def _weight(self, name: str, value: Value, shape: tuple[int, ...], dtype: str, trainable: bool) -> Weight:
        def load() -> np.ndarray:
            return frozen(to_numpy(self.tensors[name], name))

        kind, aliases = self.kinds[name], self.alias_names.get(name, (name,))
        value.weight = Weight(name, shape, dtype, kind, load, aliases, value, trainable)
        return value.weight

    def _new_node(self, node: fx.Node, unique: Any, names: dict[fx.Node, str], at: int | None = None) -> Node:
        made = Node(
            unique(node.name),
            "opaque",
            [],
            [],
            scope=scope_of(node),
            origin=native_name(node),
            location=location_of(node),
            native=node,
        )
        val = node.meta.get("val")
        if isinstance(val, (list, tuple)):
            items = {u.args[1]: u for u in node.users if self._is_getitem(u)}
            for i, part in enumerate(val):
                if i in items:
                    value = self._new_value(items[i], unique(names.get(items[i], items[i].name)))
                else:
                    shape, hint, dtype = self.describe(part)
                    value = Value(unique(f"{made.name}_out{i}"), shape, hint, dtype)
                    self.values[value.name] = value
                made.outputs.append(value)
        else:
            made.outputs.append(self._new_value(node, names.get(node, made.name)))
        for i, value in enumerate(made.outputs):
            value.producer, value.index = made, i
        self._node_of[node] = made
        self.nodes.insert(len(self.nodes) if at is None else at, made)
        self._read_into(made)
        return made

    def _read_into(self, node: Node) -> None:
        """Fill op, inputs, attributes of a canonical node from its fx call."""
        call, spec = read_once(node.native)
        if not call.looked:
            self._plain.add(node.native)
        old = {v.name: v for v in node.inputs if v is not None and v.literal is not None}
        node.op, node.attrs, node.origin = spec.op, spec.attrs, native_name(node.native)
        node.inputs = [self._operand(node, call, slot, old) for slot in spec.operands]
        node.dynamic = [self._value_of[n] for n in spec.dynamic if n in self._value_of]

    def _operand(self, node: Node, call: Call, slot: Slot, old: dict[str, Value]) -> Value | None:
        item = call.operand(slot)
        if item is None:
            return None
        if isinstance(item, fx.Node):
            return self._value_of.get(item)
        name = f"{node.native.name}.{slot[0]}" + ("" if slot[1] is None else f".{slot[1]}")
        data = self._literal(call, item)
        if (before := old.get(name)) is not None and before.literal is not None:
            if before.literal.dtype == data.dtype and np.array_equal(before.literal, data):
                return before
        value = Value(name, (), (), str(data.dtype), literal=data)
        self.values[name] = value
        return value

    def _literal(self, call: Call, item: Any) -> np.ndarray:
        """A Python number takes the dtype torch gives it next to a floating tensor: that tensor's."""
        if isinstance(item, bool):
            return np.asarray(item)
        for other in call.node.all_input_nodes:
            val = other.meta.get("val")
            if isinstance(val, torch.Tensor) and val.dtype in (torch.float32, torch.float64, torch.float16):
                return np.asarray(item, dtype=dtype_name(val.dtype))
        return np.asarray(item, dtype=np.int64 if isinstance(item, int) else np.float32)

    @staticmethod
    def _is_getitem(node: fx.Node) -> bool:
        return getattr(node.target, "__name__", "") == "getitem" and isinstance(node.args[0], fx.Node)

    def _refresh_outputs(self) -> None:
        for value in self.outputs:
            value.is_output = False
        flat = self.output_node.args[0]
        self.outputs = [self._value_of[n] for n in flat if isinstance(n, fx.Node) and n in self._value_of]  # type: ignore[union-attr]
        for value in self.outputs:
            value.is_output = True

    def _relink(self) -> None:
        self._link()
        for weight in list(self.weights.values()):
            if weight.value is not None:
                weight.value.weight = weight

    @property
    def output_node(self) -> fx.Node:
        """The fx output node."""
        return next(n for n in reversed(self.fx.nodes) if n.op == "output")

    def fx_value(self, value: Value) -> Any:
        """What stands for a canonical value in an fx call: an fx node, or a Python number for a literal."""
        if value.native is not None:
            return value.native
        if value.literal is not None:
            return value.literal.item()
        producer = value.producer
        if producer is None:
            raise ConstraintError("the value does not belong to this graph", value=value.name)
        with self.fx.inserting_after(producer.native):
            made = self.fx.call_function(operator.getitem, (producer.native, value.index))
        made.meta = {**producer.native.meta, "val": producer.native.meta["val"][value.index]}
        value.native = made
        self._value_of[made] = value
        return made

    # ---- shapes ----------------------------------------------------------------------------------------------
    def describe(self, val: Any) -> tuple[tuple[Dim, ...] | None, tuple[int, ...] | None, str]:
        """(symbolic shape, hint, dtype) of a fake value; sizes are 0-d int64."""
        if isinstance(val, torch.Tensor):
            if self.mode is None:
                sizes = tuple(val.shape)
                return sizes, sizes, dtype_name(val.dtype)
            shape = tuple(s if isinstance(s, int) else str(s.node.expr) for s in val.shape)
            return shape, tuple(self.hint(s) for s in val.shape), dtype_name(val.dtype)
        if isinstance(val, (torch.SymInt, int)):
            return (), (), "bool" if isinstance(val, bool) else "int64"
        if isinstance(val, (torch.SymFloat, torch.SymBool, float)):
            return (), (), "bool" if isinstance(val, torch.SymBool) else "float64"
        return None, None, "unknown"

    def hint(self, size: Any) -> int:
        """Concrete size of a dimension: its symbols take the sizes in ``self.sizes``, else those of the trace."""
        if isinstance(size, int):
            return size
        expr = size.node.expr
        values = {s: self.sizes[str(s)] for s in expr.free_symbols if str(s) in self.sizes}
        missing = [s for s in expr.free_symbols if s not in values]
        traced = size.node.shape_env.backed_var_to_val
        values |= {s: int(traced.get(s, 2)) for s in missing}
        return int(expr.xreplace({s: sympy.Integer(v) for s, v in values.items()}))

    def set_hints(self, **sizes: int) -> None:
        """Choose another concrete size for symbols (all hints are recomputed)."""
        self.sizes.update(sizes)
        for node, value in self._value_of.items():
            value.shape, value.hint, value.dtype = self.describe(node.meta.get("val"))
        for n in self.nodes:
            val = n.native.meta.get("val")
            if isinstance(val, (list, tuple)):
                for value, part in zip(n.outputs, val, strict=True):
                    value.shape, value.hint, value.dtype = self.describe(part)

    def snapshot(self) -> dict[str, Record]:
        """Attributes, scopes and output shapes by node name, to see later what edits changed."""
        return {n.name: Record(n.op, n.scope, dict(n.attrs), [v.shape for v in n.outputs]) for n in self.nodes}

    def state_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every parameter and buffer of the caller's module, tied ones under each name."""
        module = self.source.module
        if module is not None:
            yield from tensors_of(module)

    def state_names(self) -> list[str]:
        """State-dict names of the caller's module in order."""
        return [] if self.source.module is None else list(self.source.module.state_dict(keep_vars=True))

    @property
    def user_class(self) -> bool:
        """Whether the graph was captured from a module that has a program of its own."""
        return self.source.module is not None and not isinstance(self.source.module, fx.GraphModule)

    def is_persistent(self, name: str) -> bool:
        """Does the caller's state_dict hold this name? (True for names foldline added.)"""
        return name not in self.source.unsaved

    # ---- calls ------------------------------------------------------------------------------------------------
    def bind_tensors(self, batch: Any) -> dict[str, torch.Tensor]:
        """Like :meth:`bind`, with torch tensors."""
        if isinstance(batch, dict) and set(batch) == {v.name for v in self.inputs}:
            return {k: from_numpy(v) for k, v in batch.items()}
        args, kwargs = normalize_call(batch)
        flat = self._flatten_call(args, kwargs)
        named = {}
        for node, item in zip([n for n in self.fx.nodes if n.op == "placeholder"], flat, strict=True):
            value = self._value_of.get(node)
            if value is not None:
                named[value.name] = torch.as_tensor(item) if isinstance(item, (int, float)) else from_numpy(item)
        return named

    def _flatten_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Flat leaves in placeholder order; positional and keyword spellings of one call are the same."""
        want_args, want_kwargs = (self.in_spec.child(0).num_children, list(self.in_spec.child(1).context or []))
        if len(args) != want_args or set(kwargs) != set(want_kwargs):
            names = self.argument_names()
            given = dict(zip(names, args, strict=False)) | kwargs
            missing, extra = [n for n in names if n not in given], [n for n in given if n not in names]
            if missing or extra or len(args) > len(names):
                raise ConstraintError(
                    "the batch does not fit the model's inputs",
                    expected=", ".join(names),
                    found=f"{len(args)} positional, keywords {sorted(kwargs)}",
                    hint=f"missing: {missing}; unexpected: {extra}",
                )
            args, kwargs = tuple(given[n] for n in names[:want_args]), {n: given[n] for n in names[want_args:]}
        leaves, spec = pytree.tree_flatten((args, {k: kwargs[k] for k in want_kwargs}))
        if spec != self.in_spec:
            raise ConstraintError(
                "the batch is nested differently from the example inputs", expected=self.in_spec, found=spec
            )
        return leaves

    def argument_names(self) -> list[str]:
        """Names of the top-level arguments of the traced call, positional ones first."""
        count, keywords = self.in_spec.child(0).num_children, list(self.in_spec.child(1).context or [])
        names: list[str] = []
        if self.source.module is not None:
            parameters = inspect.signature(self.source.module.forward).parameters.values()
            names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:count]
        names += [f"arg_{i}" for i in range(len(names), count)]
        return names + keywords
