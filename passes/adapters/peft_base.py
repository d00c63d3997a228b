"""The base model of a peft checkpoint: names of its weights and how each is stored, whatever form the model has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...graph.errors import ConstraintError
from ..base import nearest
from .view import View


class BaseModel:
    """Names and layouts of a base model's weights, whatever form it has."""

    def __init__(self, model: Any) -> None:
        if isinstance(model, (str, Path)) or type(model).__name__ == "ModelProto":
            from ...graph.load import load

            model = load(model)
        self.graph = model if hasattr(model, "weights") and hasattr(model, "nodes") else None
        self.module = model if hasattr(model, "named_modules") else None
        if self.graph is not None:
            source = getattr(self.graph, "source", None)
            self.module = source if hasattr(source, "named_modules") else getattr(source, "module", None)
            self.shapes = {a: w.shape for w in self.graph.weights.values() for a in (w.name, *w.aliases)}
        elif self.module is not None:
            items = self.module.named_parameters(remove_duplicate=False)
            self.shapes = {n: tuple(p.shape) for n, p in items}
        else:
            self.shapes = {str(n): tuple(p.shape) for n, p in model.items()}

    def name_of(self, name: str) -> str:
        """The model's name of a parameter; exporters and wrappers add or leave out a first part.

        Raises:
            ConstraintError: there is none, or several.
        """
        if name in self.shapes:
            return name
        ends = [n for n in self.shapes if n.endswith("." + name) or name.endswith("." + n)]
        if len(ends) == 1:
            return ends[0]
        close = nearest(name, self.shapes)
        raise ConstraintError(
            "the adapter's target is not in this model", node=name, expected="one parameter of this name",
            found=f"{len(ends)} that end alike", hint=f"did you mean {close!r}?" if close else None,
        )  # fmt: skip

    def weight_of(self, path: str, fan_in_fan_out: bool | None, *, embedding: bool) -> tuple[str, View]:
        """(name, layout) of the weight of a layer."""
        stem = f"{path}." if path else ""
        if (found := self._by_scope(path)) is not None:
            return found
        names = [stem + leaf for leaf in ("weight", "in_proj_weight")]
        for name in names:
            try:
                target = self.name_of(name)
                break
            except ConstraintError:
                if name == names[-1]:
                    target = self.name_of(names[0])
        if embedding:
            return target, View()
        return target, self._layout(target, path, fan_in_fan_out)

    def _by_scope(self, path: str) -> tuple[str, View] | None:
        """The weight that the layer's own operator reads, where an exporter has transposed and renamed it."""
        if self.graph is None or f"{path}.weight" in self.shapes:
            return None
        nodes = [n for n in self.graph.nodes if n.op in ("linear", "conv") and n.scope and n.scope == path]
        weights = {n.inputs[1].weight.name for n in nodes if n.inputs[1] is not None and n.inputs[1].weight is not None}
        if len(weights) != 1:
            return None
        target = weights.pop()
        return target, self._layout(target, path, None)

    def bias_of(self, target: str, path: str) -> str | None:
        """The bias of the layer whose weight is ``target``, if it has one."""
        stem = f"{path}." if path else ""
        beside = target[: -len("weight")] + "bias" if target.endswith("weight") else ""
        for name in (beside, stem + "bias"):
            if name in self.shapes:
                return name
        node = self._reader(target) if self.graph is not None and self.graph.kind != "weights" else None
        if node is None:
            return None
        held = [node.input(2), *(v for user, _ in node.output.uses if user.op == "add" for v in user.inputs)]
        found = [v.weight.name for v in held if v is not None and v.weight is not None and v.rank == 1]
        return found[0] if found and (node.input(2) is not None or len(node.output.uses) == 1) else None

    def whole(self, path: str, leaf: str, shape: tuple[int, ...]) -> tuple[str, View]:
        """(name, layout) of a parameter that is replaced by one of this shape."""
        found = self._by_scope(path) if leaf == "weight" else None
        target = found[0] if found is not None else self.name_of(f"{path}.{leaf}" if path else leaf)
        return target, View(transposed=self.turned(target, shape))

    def turned(self, target: str, shape: tuple[int, ...]) -> bool:
        """Whether the model stores a matrix of another layout than the one given."""
        if self.graph is not None and self.graph.kind == "onnx" and len(shape) == 2:
            return bool(self._reader_turns(target))
        return self.shapes[target] != shape and self.shapes[target] == shape[::-1]

    def _layout(self, target: str, path: str, fan_in_fan_out: bool | None) -> View:
        if self.graph is not None and self.graph.kind in ("onnx", "fx"):
            node = self._reader(target)
            if node is not None and node.op == "linear":
                return View(transposed=bool(node.attrs.get("transposed_weight")))
            if node is not None and node.op == "conv":
                return View(bool(node.attrs.get("transposed")), int(node.attrs.get("groups", 1)))
            return View()
        if self.module is not None:
            from .places import stored_weights

            layer = self.module.get_submodule(target.rpartition(".")[0])
            leaf = target.rpartition(".")[2]
            found = next((view for weight, _, view in stored_weights(layer) if weight == leaf), None)
            if found is not None:
                return found
        return View(transposed=bool(fan_in_fan_out) and len(self.shapes[target]) == 2)

    def _reader(self, target: str) -> Any:
        assert self.graph is not None
        value = self.graph.weight(target).value
        return next((user for user, _ in value.uses if user.op in ("linear", "conv")), None) if value else None

    def _reader_turns(self, target: str) -> bool:
        node = self._reader(target)
        return node is not None and node.op == "linear" and bool(node.attrs.get("transposed_weight"))
