"""Edits of an FXGraph: each changes the fx call first and rereads the canonical node from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from ..errors import ConstraintError
from ..ir import Node, Value, Weight
from .alike import alike, merged, same
from .build import build_call
from .ops import Call, dtype_name, native_name, read, tensor_operands
from .picks import fixed
from .propagate import fixes_a_size, meta_of, propagate, sync_baked_sizes
from .tensors import from_numpy
from .view import FXView


class FXEdits(FXView):
    """The edit methods of ``ir.Graph`` for the FX front end."""

    # ---- weights ---------------------------------------------------------------------------------------------
    def set_weight(self, weight: Weight, data: np.ndarray) -> None:
        """See Graph.set_weight. Stays on the weight's device; a parameter keeps ``requires_grad``."""
        old = self.tensors[weight.name]
        self.rewritten = self.rewritten or f"set_weight {weight.name}"
        self._put_tensor(weight, from_numpy(data).to(old.device))

    def slice_weight(self, weight: Weight, kept: dict[int, np.ndarray]) -> None:
        """See Graph.slice_weight. The gather runs on the weight's own device."""
        new = self.tensors[weight.name].detach()
        wanted = {axis: fixed(indices) for axis, indices in sorted(kept.items())}
        for axis, indices in wanted.items():
            new = self._picks.gather(new, axis, indices, weight.name)
        known = self.kept.setdefault(weight.name, {})
        for axis, indices in wanted.items():
            known[axis] = known[axis][indices] if axis in known else indices
        self._put_tensor(weight, new)

    def adopt_tensor(self, weight: Weight, tensor: torch.Tensor) -> None:
        """Replace the data of a weight by this very tensor (no copy, no wrapper)."""
        self.rewritten = self.rewritten or f"adopt_tensor {weight.name}"
        self._put_tensor(weight, tensor, wrap=False)

    def _put_tensor(self, weight: Weight, new: torch.Tensor, wrap: bool = True) -> None:
        old = self.tensors[weight.name]
        if weight.kind == "parameter" and wrap:
            floating = new.is_floating_point() or new.is_complex()
            new = torch.nn.Parameter(new.detach(), requires_grad=old.requires_grad and floating)
        self.tensors[weight.name] = new
        self.changed.add(weight.name)
        self.given.discard(weight.name)
        weight.shape, weight.dtype = tuple(new.shape), dtype_name(new.dtype)
        value = weight.value
        assert value is not None
        if tuple(old.shape) != tuple(new.shape) or old.dtype != new.dtype:
            value.native.meta["val"] = meta_of(self.mode, new)
            value.shape, value.hint, value.dtype = self.describe(value.native.meta["val"])
            self._dirty.update(value.native.users)
            if old.dtype != new.dtype:
                self._plain.difference_update(value.native.users)
            for user in list(value.native.users):
                if sync_baked_sizes(user):
                    self._resync(self._node_of[user])

    def add_weight(self, name: str, data: np.ndarray, *, trainable: bool = False) -> Value:
        """See Graph.add_weight. A trainable tensor becomes a parameter, any other a buffer."""
        taken = self._stored_names
        if taken is None:  # once per graph: a quantizer adds thousands
            taken = {a for w in self.weights.values() for a in w.aliases} | {n for n, _ in self.state_tensors()}
        unique, k = name, 1
        while unique in taken or unique in self.values or unique in self.weights:
            k += 1
            unique = f"{name}_{k}"
        taken.add(unique)
        self._stored_names = taken
        tensor = from_numpy(data)
        anchor = next((t for t in self.tensors.values()), None)
        if anchor is not None:
            tensor = tensor.to(anchor.device)
        self.tensors[unique] = torch.nn.Parameter(tensor, requires_grad=True) if trainable else tensor
        self.kinds[unique] = "parameter" if trainable else "buffer"
        self.alias_names[unique] = (unique,)
        self.changed.add(unique)
        with self.fx.inserting_before(self._first_call()):
            node = self.fx.get_attr(unique)
        node.meta["val"] = meta_of(self.mode, tensor)
        self._last_stored = node
        return self._new_weight(node, unique)

    _stored_names: set[str] | None = None
    _last_stored: fx.Node | None = None
    _node_names: set[str] | None = None

    def _first_call(self) -> fx.Node:
        """The first call; what stands before it are inputs and stored tensors."""
        last = self._last_stored
        node = next(iter(self.fx.nodes)) if last is None or last._erased else last
        while node.op in ("placeholder", "get_attr"):
            node = node.next
        return node

    # ---- attributes ------------------------------------------------------------------------------------------
    def set_attr(self, node: Node, **attrs: Any) -> None:
        """See Graph.set_attr. Raises ConstraintError for an attribute that the ATen call cannot express."""
        for key, value in attrs.items():
            spec = read(node.native)
            if key in spec.attrs and same(spec.attrs[key], value):
                continue
            if key not in spec.write:
                raise ConstraintError(
                    "this attribute cannot be changed in the FX graph",
                    node=node.name,
                    value=f"{key}={value!r}",
                    expected=", ".join(sorted(spec.write)) or "none",
                    hint="erase the node and insert another one",
                )
            try:
                spec.write[key](value)
            except (ValueError, TypeError, IndexError) as error:
                raise ConstraintError(
                    f"the attribute does not fit: {error}", node=node.name, value=f"{key}={value!r}"
                ) from error
        self._dirty.add(node.native)
        self._resync(node)
        for key, value in attrs.items():
            node.attrs[key] = merged(node.attrs.get(key), value)

    def _resync(self, node: Node) -> None:
        """Reread one canonical node after its fx call changed."""
        for i, v in enumerate(node.inputs):
            if v is not None:
                v.uses.discard((node, i))
        literals = {v.name for v in node.inputs if v is not None and v.literal is not None}
        self._read_into(node)
        for name in literals - {v.name for v in node.inputs if v is not None}:
            self.values.pop(name, None)
        for i, v in enumerate(node.inputs):
            if v is not None:
                v.uses.append((node, i))

    # ---- wiring ----------------------------------------------------------------------------------------------
    def set_input(self, node: Node, position: int, value: Value | None) -> None:
        """See Graph.set_input."""
        call, spec = Call(node.native), read(node.native)
        if position < len(spec.operands):
            slot = spec.operands[position]
        elif position == len(spec.operands) and spec.operands and spec.operands[-1][1] is not None:
            slot = (spec.operands[-1][0], position)
        else:
            raise ConstraintError("no such operand", node=node.name, value=position, expected=f"< {len(spec.operands)}")
        old = node.input(position)
        new = None if value is None else self.fx_value(value)
        if value is None and slot[1] is not None:
            items = list(call.get(slot[0]))
            del items[slot[1]]
            call.put(slot[0], items)
        else:
            try:
                call.put_operand(slot, new)
            except KeyError as error:
                raise ConstraintError(
                    "the native call has no place for this operand",
                    node=node.name,
                    value=position,
                    found=native_name(node.native),
                    hint="insert a separate node (for a bias: add)",
                ) from error
        self._check_order(node.native)
        tensor_operands(Call(node.native))
        self._dirty.add(node.native)
        self._resync(node)
        self._drop_unused([old])

    def _check_order(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if not source < node:
                raise ConstraintError(
                    "an operand is made after its use", node=node.name, value=source.name, hint="insert it earlier"
                )

    def replace_uses(self, old: Value, new: Value, *, except_nodes: Iterable[Node] = ()) -> None:
        """See Graph.replace_uses. The node that makes ``new`` keeps reading ``old`` if it does."""
        self.rewritten = self.rewritten or f"replace_uses {old.name}"
        skip = {n.native for n in except_nodes}
        if new.producer is not None:
            skip.add(new.producer.native)
        source = self.fx_value(old)
        output, was_output = self.output_node, old.is_output and self.output_node not in skip
        if was_output and (new.is_input or new.is_const or new.is_output):
            after = self._last_node_before_output()
            new = self.insert("identity", [new], name=f"{old.name}_out", after=after).output
            skip.add(new.producer.native)  # type: ignore[union-attr]
        target = self.fx_value(new)
        users = [u for u in source.users if u not in skip]
        for user in users:
            if isinstance(target, fx.Node) and not target < user:
                raise ConstraintError(
                    "the new value is made after a use of the old one",
                    node=user.name,
                    value=new.name,
                    hint="insert the new node right after the old one, or name the node in except_nodes",
                )
        for user in users:
            user.replace_input_with(source, target)
        if was_output and output in users:
            self._refresh_outputs()
            self._swap_names(old, new)
        for user in users:
            if user in self._node_of:
                tensor_operands(Call(user))
                self._dirty.add(user)
                self._resync(self._node_of[user])
        self._drop_unused([old])

    def _last_node_before_output(self) -> Node | None:
        return self.nodes[-1] if self.nodes else None

    def _swap_names(self, old: Value, new: Value) -> None:
        """The new output takes over the name that users know."""
        old.name, new.name = new.name, old.name
        self.values[old.name], self.values[new.name] = old, new

    # ---- nodes -----------------------------------------------------------------------------------------------
    def insert(
        self,
        op: str,
        inputs: Sequence[Value | None],
        attrs: dict[str, Any] | None = None,
        *,
        name: str,
        after: Node | None = None,
        scope: str = "",
    ) -> Node:
        """See Graph.insert. Raises ConstraintError for an op that has no ATen form here."""
        self.rewritten = self.rewritten or f"insert {name}"
        operands = [None if v is None else self.fx_value(v) for v in inputs]
        target, args, kwargs = build_call(op, operands, dict(attrs or {}), name)
        if after is None:
            anchor = self._first_call()
            context = self.fx.inserting_before(anchor)
        else:
            last = after.native
            for user in after.native.users:
                if self._is_getitem(user) and last < user:
                    last = user
            context = self.fx.inserting_after(last)
        with context:
            made = self.fx.create_node("call_function", target, args, kwargs, name=_identifier(name))
        made.meta = {"nn_module_stack": {scope: (scope, "")}} if scope else {}
        try:
            self._check_order(made)
            if op == "reshape" and None not in (attrs or {})["shape"] and not _is_static(inputs[0]):
                raise fixes_a_size(made, str(inputs[0] and inputs[0].shape))  # asked of torch, it would fix the size
            made.meta["val"] = propagate(self.mode, made)
        except Exception:
            self.fx.erase_node(made)
            raise
        at = 0 if after is None else self.nodes.index(after) + 1
        node = self._new_node(made, self._unique_name, {}, at)
        for i, v in enumerate(node.inputs):
            if v is not None:
                v.uses.append((node, i))
        return node

    def _unique_name(self, base: str) -> str:
        if self._node_names is None:
            self._node_names = {n.name for n in self.nodes}
        name, k = base, 1
        while name in self.values or name in self._node_names:
            k += 1
            name = f"{base}_{k}"
        self._node_names.add(name)
        return name

    def erase(self, node: Node) -> None:
        """See Graph.erase."""
        self.rewritten = self.rewritten or f"erase {node.name}"
        used = [v.name for v in node.outputs if v.uses or v.is_output]
        getitems = [u for u in node.native.users if self._is_getitem(u)]
        others = [u for u in node.native.users if u not in getitems] + [u for g in getitems for u in g.users]
        if used or others:
            raise ConstraintError(
                "a node whose outputs are used cannot be erased",
                node=node.name,
                value=", ".join(used) or "a size computed from it",
                found=", ".join(u.name for u in others),
                hint="replace_uses first",
            )
        for i, v in enumerate(node.inputs):
            if v is not None:
                v.uses.discard((node, i))
                if v.literal is not None:
                    self.values.pop(v.name, None)
        for g in getitems:
            self._value_of.pop(g, None)
            self.fx.erase_node(g)
        for v in node.outputs:
            self.values.pop(v.name, None)
        self._value_of.pop(node.native, None)
        self._node_of.pop(node.native, None)
        self._dirty.discard(node.native)
        self.fx.erase_node(node.native)
        self.nodes.remove(node)
        if self._node_names is not None:
            self._node_names.discard(node.name)
        self._drop_unused(node.inputs)
        self._drop_unused_weights()

    def _drop_unused(self, values: Iterable[Value | None]) -> None:
        """Forget the stored tensors among these values, which have just lost a reader, if it was the last."""
        for value in values:
            weight = None if value is None else value.weight
            if weight is not None and self.weights.get(weight.name) is weight:
                self._seen_used.add(weight.name)
                self._drop_if_unused(weight)

    def _drop_unused_weights(self) -> None:
        for weight in list(self.weights.values()):
            self._drop_if_unused(weight)

    def _drop_if_unused(self, weight: Weight) -> None:
        value = weight.value
        assert value is not None
        if value.native.users:
            self._seen_used.add(weight.name)
        elif weight.name in self._seen_used and not value.is_output:
            del self.weights[weight.name], self.tensors[weight.name]
            self.values.pop(value.name, None)
            self._value_of.pop(value.native, None)
            self.fx.erase_node(value.native)

    # ---- shapes ----------------------------------------------------------------------------------------------
    def refresh(self) -> None:
        """See Graph.refresh. Only calls downstream of an edit are evaluated (on fake tensors)."""
        changed: set[fx.Node] = set()
        for node in list(self.fx.nodes):
            if node.op != "call_function":
                continue
            if node not in self._dirty and not any([i in changed for i in node.all_input_nodes]):
                continue
            synced = sync_baked_sizes(node)
            old, new = node.meta.get("val"), propagate(self.mode, node)
            node.meta["val"] = new
            if not alike(old, new):
                changed.add(node)
                if getattr(old, "dtype", None) != getattr(new, "dtype", None):
                    self._plain.difference_update(node.users)  # numbers beside it take its dtype
            self._redescribe(node, synced or node not in self._plain)
        self._dirty.clear()
        self._picks.forget()

    def _redescribe(self, native: fx.Node, reread: bool) -> None:
        """The shapes of a call's values anew, and the call itself where its reading looks at sizes."""
        node = self._node_of.get(native)
        val = native.meta.get("val")
        if node is None:
            if (value := self._value_of.get(native)) is not None:
                value.shape, value.hint, value.dtype = self.describe(val)
            return
        if reread:
            self._resync(node)
        for value, part in zip(node.outputs, val if isinstance(val, (list, tuple)) else [val], strict=True):
            value.shape, value.hint, value.dtype = self.describe(part)


def _identifier(name: str) -> str:
    clean = "".join(ch if ch.isalnum() or ch == "_" else "_" for ch in name)
    return clean if clean and not clean[0].isdigit() else f"n_{clean}"


def _is_static(value: Value | None) -> bool:
    return value is None or value.shape is None or all(isinstance(d, int) for d in value.shape)
